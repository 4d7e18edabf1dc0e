//! Networks: initialisation, the U-Net, and the memory that training it takes.

mod init;
mod memory;
mod unet;

pub use memory::{MemoryPlan, planned_memory, pytorch_kept_bytes};
pub use unet::{PlainConvUNet, Stage, UNetShape};
