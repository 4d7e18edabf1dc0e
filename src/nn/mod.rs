//! Networks: layers, initialisation, the U-Net, and the memory that predicting with it takes.

mod blocks;
mod init;
mod memory;
mod network;
mod unet;

pub use memory::{PredictionMemory, planned_prediction, pytorch_kept_bytes};
pub use network::Network;
pub use unet::{PlainConvUNet, Stage, UNetShape};
