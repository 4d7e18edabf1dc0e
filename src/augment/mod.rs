//! Random changes to training patches, made on the device.
//!
//! The loader cuts patches with a margin ([`Geometry`]), the parameters of every sample are drawn on the host from the
//! generator of training ([`Draw`]), and kernels make the batch that the network sees ([`Augmenter`]): the same generator
//! gives the same bits on the same device.

mod augmenter;
mod draw;
mod mirror;
mod recipe;

pub use augmenter::Augmenter;
pub use draw::Draw;
pub use mirror::flip;
pub use recipe::{Geometry, Recipe, TrainerVariant, Transforms};
