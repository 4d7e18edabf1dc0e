//! Figures: the course of training, and segmentations beside their references.

mod canvas;
mod doubt;
mod events;
mod overlay;
mod progress;

pub use doubt::{Doubt, write_doubt};
pub use events::EventFile;
pub use overlay::{Overlay, write_annotation, write_overlay};
pub use progress::write_progress;
