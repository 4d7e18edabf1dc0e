//! Networks: layers, initialisation, the U-Nets, and the memory that predicting with it takes.

mod blocks;
mod decoder;
mod init;
mod memory;
mod network;
mod residual;
mod shape;
mod unet;

pub use memory::{PredictionMemory, planned_prediction, pytorch_kept_bytes};
pub use network::Network;
pub use residual::ResidualEncoderUNet;
pub use shape::{Encoder, Stage, UNetShape};
pub use unet::PlainConvUNet;
