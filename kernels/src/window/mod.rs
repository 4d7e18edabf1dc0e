//! Sliding windows over a case that lies on the device: windows are cut from it, mirrored if asked; logits of windows are
//! added up under their weights; and of the weighted means labels or resampled logits come out.
//!
//! The case is `[channels, depth, height, width]` in f32, as images lie in files. Windows lie in the *padded* volume, which is at
//! least as large as a window. Sums are `[slices, padded height, padded width, heads]` in f32, of which only some slices exist
//! at a time: slice `z` of the padded volume lies in place `z % slices`. A window's logits are added in one launch, in which every
//! sum has one writer, and launches follow each other: results repeat bit for bit.

mod accumulate;
mod cut;
mod problem;
mod resolve;

pub use accumulate::{add, clear};
pub use cut::cut;
pub use problem::Problem;
pub use resolve::{NOT_FINITE, Output, Resampling, resolve};
