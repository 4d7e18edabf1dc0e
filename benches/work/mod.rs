//! The work that is timed: each item has an id that its peers in `benches/peers` print too.

mod conv;
mod loss;
mod norm;
mod step;
mod winograd;

use voxgrad::device;
use voxgrad::kernels::{Buffer, Context};

/// What limits a piece of work, and how much of it one run does.
#[derive(Clone, Copy)]
pub enum Amount {
    /// Floating-point operations.
    Flops(u64),
    /// Bytes that have to be read and written at least.
    Bytes(u64),
    /// Voxels of the batch, for a whole training step.
    Voxels(u64),
}

/// One piece of work. `prepare` uploads the inputs; the closure it returns runs the work once and waits for it.
pub struct Item {
    pub id: String,
    pub amount: Amount,
    pub prepare: Prepare,
}

type Prepare = Box<dyn Fn(&Context) -> Box<dyn FnMut()>>;

/// The device that `VOXGRAD_DEVICE` names; the CPU runtime unless set.
pub fn context() -> Context {
    let device = device::open(device_choice().parse().expect("VOXGRAD_DEVICE")).expect("VOXGRAD_DEVICE");
    eprintln!("# device {} ({})", device.found.choice, device.found.name);
    device.context
}

fn device_choice() -> String {
    std::env::var("VOXGRAD_DEVICE").unwrap_or_else(|_| "cpu".into())
}

/// The items of a group: conv, norm, loss, step, size, winograd, or all of them but the last two; or the one item whose id
/// is given.
pub fn items(context: &Context, group: &str) -> Vec<Item> {
    let all: [(&str, &dyn Fn() -> Vec<Item>); 5] = [
        ("conv", &conv::items),
        ("norm", &norm::items),
        ("loss", &|| loss::items(context)),
        ("step", &step::items),
        ("winograd", &winograd::items),
    ];
    if group == "size" {
        return step::sizes();
    }
    let (group, id) = group.split_once('/').map_or((group, None), |(name, _)| (name, Some(group)));
    all.into_iter()
        .filter(|(name, _)| *name == group || group == "all" && *name != "winograd")
        .flat_map(|(_, items)| items())
        .filter(|item| id.is_none_or(|id| item.id == id))
        .collect()
}

/// `len` values of a fixed pattern, uniform in [-1, 1).
pub fn pattern(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
        })
        .collect()
}

/// The pattern on the device.
pub fn upload(context: &Context, len: usize, seed: u32) -> Buffer {
    context.upload_f32(&pattern(len, seed)).expect("upload")
}

/// A label map `[batch, dims]` of which one slice in ten is annotated, with labels `0..labels`; the rest is `labels`.
pub fn sparse_labels(batch: usize, dims: [usize; 3], labels: usize) -> Vec<u8> {
    let slice = dims[1] * dims[2];
    pattern(batch * dims[0] * slice, 9)
        .into_iter()
        .enumerate()
        .map(|(i, value)| match i / slice % 10 {
            0 => (((value + 1.0) * 0.5 * labels as f32) as usize).min(labels - 1) as u8,
            _ => labels as u8,
        })
        .collect()
}
