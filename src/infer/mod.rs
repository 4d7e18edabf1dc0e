//! Predicting whole volumes from patches.

pub mod export;
mod mirror;
pub mod window;

pub use mirror::mirror_subsets;
pub use window::{Accumulator, SlidingWindow};
