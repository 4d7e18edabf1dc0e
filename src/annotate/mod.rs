//! What a trained model says about cases that are annotated in part: dense labels around the annotations, and where to
//! annotate next.

mod complete;
mod ensemble;
mod folds;
mod suggest;
mod units;
pub mod voxel;

pub use complete::{
    CompletedCase, CompletedClass, Completion, CompletionSettings, complete_dataset, completed_labels, completion_table,
};
pub use ensemble::{Assessment, Ensemble, Event};
pub use folds::{Folds, Lookers, check_same_dataset, lookers};
pub use suggest::{CaseUncertainty, Measure, Suggestion, SuggestionSettings, Suggestions, rank, suggest};
pub use units::{Candidate, Unit, candidates, spread};
