//! Scoring segmentations against references, on annotated voxels only.

pub mod confusion;
pub mod summary;

pub use confusion::{Confusion, PseudoDice};
pub use summary::{CaseResult, Summary, evaluate_case, evaluate_folder};
