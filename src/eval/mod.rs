//! Scoring segmentations against references, on annotated voxels only.

pub mod confusion;
mod grid;
pub mod summary;

pub use confusion::{Confusion, PseudoDice};
pub use grid::grid_difference;
pub use summary::{CaseResult, Summary, evaluate_case, evaluate_folder};
