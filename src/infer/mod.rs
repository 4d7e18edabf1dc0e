//! Predicting whole volumes from patches.

mod accumulate;
mod demand;
mod device_sums;
pub mod export;
pub mod memory;
mod mirror;
pub mod window;

pub use accumulate::Accumulator;
pub use demand::{Budget, Demand, Kept, Planned};
pub use device_sums::{DeviceSums, Resolved, Wanted};
pub use export::Prediction;
pub use mirror::mirror_subsets;
pub use window::SlidingWindow;
