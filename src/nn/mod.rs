//! Networks: initialisation, the U-Net, and the memory that training it takes.

mod init;
mod memory;
mod unet;

pub use memory::{MemoryPlan, PredictionMemory, planned_memory, planned_prediction, pytorch_kept_bytes};
pub use unet::{PlainConvUNet, Stage, UNetShape};
