//! The work that is timed: each item has an id that its peers in `benches/peers` print too.

mod augment;
mod conv;
mod loss;
mod norm;
mod step;
mod winograd;

use half::{bf16, f16};
use voxgrad::device;
use voxgrad::kernels::{Buffer, Context, Dtype};

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
pub struct Place {
    pub context: Context,
    kind: Kind,
}

/// What decides how much work is enough, and which is too much.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Cpu,
    Gpu,
    /// A GPU's driver that runs on the CPU.
    Software,
}

impl Place {
    pub fn open() -> Self {
        let choice = std::env::var("VOXGRAD_DEVICE").unwrap_or_else(|_| "cpu".into());
        let device = device::open(choice.parse().expect("VOXGRAD_DEVICE")).expect("VOXGRAD_DEVICE");
        eprintln!("# device {} ({})", device.found.choice, device.found.name);
        let kind = match (device.context.caps().cores, device.found.software) {
            (Some(_), _) => Kind::Cpu,
            (None, false) => Kind::Gpu,
            (None, true) => Kind::Software,
        };
        Self { context: device.context, kind }
    }

    /// The types of activations that layers are timed with: bf16 only where it is not emulated.
    fn dtypes(&self) -> Vec<Dtype> {
        let caps = self.context.caps();
        let offered = [(Dtype::F32, true), (Dtype::F16, caps.f16), (Dtype::Bf16, caps.bf16 && self.kind == Kind::Gpu)];
        offered.into_iter().filter(|(_, there)| *there).map(|(dtype, _)| dtype).collect()
    }
}

/// The items of a group: conv, norm, loss, step, size, winograd, augment, or all of them but the last three; or the one item whose id
/// is given.
pub fn items(place: &Place, group: &str) -> Vec<Item> {
    let all: [(&str, &dyn Fn() -> Vec<Item>); 6] = [
        ("augment", &augment::items),
        ("conv", &|| conv::items(place)),
        ("norm", &|| norm::items(place)),
        ("loss", &|| loss::items(place)),
        ("step", &|| step::items(place)),
        ("winograd", &winograd::items),
    ];
    if group == "size" {
        return step::sizes();
    }
    let (group, id) = group.split_once('/').map_or((group, None), |(name, _)| (name, Some(group)));
    all.into_iter()
        .filter(|(name, _)| *name == group || group == "all" && !["winograd", "augment"].contains(name))
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

/// The pattern on the device, in f32.
pub fn upload(context: &Context, len: usize, seed: u32) -> Buffer {
    upload_as(context, &pattern(len, seed), Dtype::F32)
}

/// Values on the device, rounded to f32, f16 or bf16.
pub fn upload_as(context: &Context, values: &[f32], dtype: Dtype) -> Buffer {
    match dtype {
        Dtype::F16 => context.upload(&values.iter().map(|x| f16::from_f32(*x)).collect::<Vec<f16>>(), dtype),
        Dtype::Bf16 => context.upload(&values.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<bf16>>(), dtype),
        _ => context.upload_f32(values),
    }
    .expect("upload")
}

/// What an id says of a type; f32 goes without saying.
pub fn suffix(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F16 => "-f16",
        Dtype::Bf16 => "-bf16",
        _ => "",
    }
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
