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
    /// Folds without predictions of their validation cases.
    #[error("{path}: no files ending in {ending} in the validation folder of fold {}; train and validate it", .folds.join(", "))]
    FoldsMissing {
        /// The model folder.
        path: PathBuf,
        /// The folds.
        folds: Vec<String>,
        /// The file ending looked for.
        ending: String,
    },
    /// Cases that more than one fold has predicted.
    #[error("{path}: more than one fold has predicted {}; a case belongs to one fold: remove the outdated predictions", .files.join(", "))]
    PredictedTwice {
        /// The model folder.
        path: PathBuf,
        /// Names of the files.
        files: Vec<String>,
    },
    /// Validation folders do not hold the cases that their folds validate.
    #[error(
        "{path}: by {splits}, {}; validate these folds again, and remove the predictions of other cases",
        .faults.join("; ")
    )]
    FoldCases {
        /// The model folder.
        path: PathBuf,
        /// The file of splits.
        splits: PathBuf,
        /// For every such fold what it lacks and what does not belong to it.
        faults: Vec<String>,
    },
    /// The references of a dataset are nowhere.
    #[error("{dataset}: its labels are not known: there is neither {}", .searched.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" nor "))]
    ReferencesUnknown {
        /// Name of the dataset.
        dataset: String,
        /// Where they were looked for.
        searched: Vec<PathBuf>,
    },
    /// Probabilities cannot be averaged.
    #[error("{path}: {problem}")]
    Probabilities {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong and what helps.
        problem: String,
    },
    /// A label map does not lie on its image's grid.
    #[error("{path}: does not lie on the grid of its image: {problem}")]
    ImageGrid {
        /// The label map.
        path: PathBuf,
        /// What differs.
        problem: String,
    },
    /// Files of two kinds, so that it is not clear which are meant.
    #[error("{path}: files ending in .nii.gz and in .nii; move one kind elsewhere")]
    TwoEndings {
        /// The folder.
        path: PathBuf,
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
