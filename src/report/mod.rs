//! Figures: the course of training, and segmentations beside their references.

mod canvas;
mod events;
mod overlay;
mod panel;
mod planes;
mod progress;

pub use events::EventFile;
pub use overlay::{Overlay, write_annotation, write_overlay};
pub use planes::{Planes, write_planes};
pub use progress::write_progress;
