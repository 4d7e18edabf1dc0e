//! The work that is timed: each item has an id that its peers print too.

mod conv;

use voxgrad::device;
use voxgrad::kernels::{Buffer, Context};

/// One piece of work. `prepare` uploads the inputs; the closure it returns runs the work once and waits for it.
pub struct Item {
    pub id: String,
    /// Floating-point operations of one run, where they are what limits it.
    pub flops: Option<u64>,
    pub prepare: Box<dyn Fn(&Context) -> Box<dyn FnMut()>>,
}

/// The device that `VOXGRAD_DEVICE` names; the CPU runtime unless set.
pub fn context() -> Context {
    let choice = std::env::var("VOXGRAD_DEVICE").unwrap_or_else(|_| "cpu".into());
    let device = device::open(choice.parse().expect("VOXGRAD_DEVICE")).expect("VOXGRAD_DEVICE");
    eprintln!("# device {} ({})", device.found.choice, device.found.name);
    device.context
}

/// All items, in the order in which they are printed.
pub fn items(_context: &Context) -> Vec<Item> {
    conv::items()
}

/// Values of a fixed pattern, uniform in [-1, 1).
pub fn upload(context: &Context, len: usize, seed: u32) -> Buffer {
    let mut state = seed.wrapping_mul(0x9E37_79B9) | 1;
    let values: Vec<f32> = (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            (state >> 8) as f32 / (1u32 << 23) as f32 - 1.0
        })
        .collect();
    context.upload_f32(&values).expect("upload")
}
