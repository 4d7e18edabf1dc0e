//! Scoring segmentations against references, on annotated voxels only.

mod classes;
mod components;
pub mod confusion;
pub mod crossval;
mod elements;
pub mod ensemble;
mod estimate;
mod json;
mod lesions;
pub mod measures;
pub mod postprocess;
pub mod summary;
mod surface;

pub use classes::Classes;
pub use components::Components;
pub use confusion::{Confusion, JointHistogram, PseudoDice};
pub use estimate::Estimate;
pub use json::Json;
pub use lesions::{Lesions, lesions};
pub use measures::{CaseMeasures, Measures};
pub use postprocess::{Determined, Postprocessing, Trial, keep_largest};
pub use summary::{CaseResult, Summary, evaluate_case, evaluate_classes, evaluate_folder, file_ending_of};
pub use surface::{SurfaceDistances, SurfaceKind, SurfaceSettings, surface_distances};
