//! Figures: the course of training, and segmentations beside their references.

mod canvas;
mod curves;
mod doubt;
mod events;
mod inspect;
mod montage;
mod overlay;
mod page;
mod panel;
mod planes;
mod progress;

pub use curves::{Curve, write_curves};
pub use doubt::{Doubt, write_doubt};
pub use events::EventFile;
pub use inspect::{InspectSettings, Inspected, Inspection, Intensities, inspect};
pub use overlay::{Overlay, write_annotation, write_overlay};
pub use page::{page, write_inspection};
pub use planes::{Planes, write_planes};
pub use progress::write_progress;
