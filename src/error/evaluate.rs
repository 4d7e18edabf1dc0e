//! Why predictions cannot be compared with references.

use std::path::PathBuf;

/// Why predictions cannot be compared with references.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvaluateError {
    /// A reference without its prediction.
    #[error(
        "{path}: no prediction of this name although the reference exists; predict the case, or evaluate only what is there"
    )]
    PredictionMissing {
        /// The prediction file expected.
        path: PathBuf,
    },
    /// A prediction without its reference.
    #[error("{path}: no reference of this name although a prediction exists")]
    ReferenceMissing {
        /// The reference file expected.
        path: PathBuf,
    },
    /// Nothing to evaluate.
    #[error("{path}: no prediction files ending in {ending}")]
    NothingToEvaluate {
        /// The folder of predictions.
        path: PathBuf,
        /// The file ending looked for.
        ending: String,
    },
    /// Prediction and reference do not lie on one grid.
    #[error(
        "{path}: prediction and reference lie on different grids: {problem}; export predictions on the raw image's grid"
    )]
    EvaluationGrid {
        /// The prediction file.
        path: PathBuf,
        /// What differs.
        problem: String,
    },
}
