//! What is wrong with plans and splits: a field with an unsupported value is [`PlanError::PlansUnsupported`] (found by
//! `dataset/support.rs`), a malformed one [`FileError::Field`](super::FileError::Field) (by `dataset/plans.rs`).

use std::path::PathBuf;

/// What is wrong with plans and splits.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// Fewer cases than folds.
    #[error("{cases} training cases cannot be split into {folds} folds; add cases, or train with fold `all`")]
    TooFewCases {
        /// Number of cases.
        cases: usize,
        /// Number of folds.
        folds: usize,
    },
    /// `splits_final.json` names a case that does not exist.
    #[error(
        "{path}: fold {fold} names {case}, not in the dataset; bring the files back, or delete the splits to have them made again"
    )]
    SplitUnknownCase {
        /// The splits file.
        path: PathBuf,
        /// Index of the fold.
        fold: usize,
        /// The unknown cases.
        case: String,
    },
    /// A split trains or validates on nothing.
    #[error("{path}: fold {fold} has no {part} cases")]
    SplitEmpty {
        /// The splits file.
        path: PathBuf,
        /// Index of the fold.
        fold: usize,
        /// "training" or "validation".
        part: &'static str,
    },
    /// A case that a split both trains and validates on.
    #[error("{path}: fold {fold} both trains and validates on case {case}; its scores would mean nothing")]
    SplitOverlap {
        /// The splits file.
        path: PathBuf,
        /// Index of the fold.
        fold: usize,
        /// The first such case.
        case: String,
    },
    /// The raw and the preprocessed dataset have different splits.
    #[error("{raw} and {preprocessed} are different splits; delete the one that is wrong")]
    SplitsDiffer {
        /// The file in the raw dataset.
        raw: PathBuf,
        /// The file in the preprocessed dataset.
        preprocessed: PathBuf,
    },
    /// Plans that ask for what voxgrad does not do.
    #[error("plans {plans}: {faults}; correct these fields, or plan again")]
    PlansUnsupported {
        /// Name of the plans.
        plans: String,
        /// Every such field with its value and what is supported.
        faults: String,
    },
    /// Images too small for a network.
    #[error(
        "plans for {configuration}: images of {median:?} voxels (median, at the target spacing) give a network of {stages} \
         stage, and at least 2 are needed: two axes of 8 voxels, or one of 12. Choose a finer target spacing, \
         or larger images"
    )]
    ImagesTooSmall {
        /// The configuration.
        configuration: &'static str,
        /// Median shape along the transposed axes.
        median: Vec<f64>,
        /// Stages that the shape allows.
        stages: usize,
    },
    /// A configuration that the plans do not have.
    #[error("plans have no configuration `{name}`; available: {available:?}")]
    ConfigurationMissing {
        /// The name asked for.
        name: String,
        /// The names there are.
        available: Vec<String>,
    },
    /// Configurations that inherit from each other in a circle.
    #[error("plans: configuration `{name}` inherits from itself; break the circle of `inherits_from`")]
    ConfigurationCycle {
        /// The configuration at which the circle closed.
        name: String,
    },
}
