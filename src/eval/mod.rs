//! Scoring segmentations against references, on annotated voxels only.

pub mod confusion;
mod lesions;
pub mod measures;
pub mod summary;
mod surface;

pub use confusion::{Confusion, PseudoDice};
pub use lesions::{Lesions, lesions};
pub use measures::{CaseMeasures, Measures};
pub use summary::{CaseResult, Summary, evaluate_case, evaluate_folder};
pub use surface::{SurfaceDistances, surface_distances};
