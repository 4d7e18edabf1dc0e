//! Networks: initialisation, and the U-Net.

mod init;
mod unet;

pub use unet::{PlainConvUNet, Stage, UNetShape};
