//! Figures: the course of training, and segmentations beside their references.

mod canvas;
mod overlay;
mod progress;

pub use overlay::{Overlay, write_annotation, write_overlay};
pub use progress::write_progress;
