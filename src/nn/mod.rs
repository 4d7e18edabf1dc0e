//! Networks: layers, initialisation, the U-Net, and the memory that training it takes.

mod blocks;
mod init;
mod memory;
mod network;
mod unet;

pub use memory::{MemoryPlan, PredictionMemory, planned_memory, planned_prediction, pytorch_kept_bytes};
pub use network::Network;
pub use unet::{PlainConvUNet, Stage, UNetShape};
