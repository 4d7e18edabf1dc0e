//! Predicting whole volumes from patches.

mod accumulate;
pub mod export;
pub mod memory;
mod mirror;
pub mod window;

pub use accumulate::Accumulator;
pub use export::Prediction;
pub use mirror::mirror_subsets;
pub use window::SlidingWindow;
