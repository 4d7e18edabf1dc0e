//! Why training cannot begin, go on or be continued.

use super::network::NetworkError;
use std::path::PathBuf;

/// Why training cannot begin, go on or be continued.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrainError {
    /// No training case has a voxel to learn from.
    #[error(
        "every voxel of all {cases} training cases has the ignore label {ignore}: annotate some, or correct the value of \
         `ignore` in dataset.json"
    )]
    NothingToLearn {
        /// Number of training cases.
        cases: usize,
        /// The ignore label.
        ignore: i16,
    },
    /// A name of a trainer class that stands for nothing here.
    #[error("unknown trainer `{name}`; voxgrad has: {known}")]
    UnknownTrainer {
        /// What was asked for.
        name: String,
        /// All names, with commas.
        known: String,
    },
    /// A preprocessed case has a label that the dataset does not declare.
    #[error(
        "case {case} holds label {found}, the highest that dataset.json declares is {largest}; correct the label map and \
         preprocess again"
    )]
    CaseLabel {
        /// Case identifier.
        case: String,
        /// The label.
        found: i16,
        /// The highest declared one.
        largest: i16,
    },
    /// A training patch has a label that the dataset does not declare.
    #[error(
        "a training patch holds label {found}, the highest that dataset.json declares is {largest}; correct the label maps \
         and preprocess again"
    )]
    LabelBeyondDeclared {
        /// The label.
        found: i16,
        /// The highest declared one.
        largest: i16,
    },
    /// Step after step had a loss or gradient that is infinite or NaN.
    #[error(
        "epoch {epoch}: the last {in_a_row} steps had a loss or gradient that is not finite, and none of them was taken; \
         lower the learning rate, or look for extreme intensities in the images. Checkpoints are as they were before"
    )]
    Diverged {
        /// The epoch, from 0.
        epoch: usize,
        /// Steps since the last usable one.
        in_a_row: usize,
    },
    /// A training is to be continued with other settings than it was begun with.
    #[error("{path} was trained otherwise: {differences}. Go on with the same settings, or train into another folder")]
    Continuation {
        /// The checkpoint.
        path: PathBuf,
        /// Every option or file that differs, with both values.
        differences: String,
    },
    /// A checkpoint that does not say which cases it was trained on.
    #[error(
        "{path} was written by an earlier version and does not say which cases it was trained on; name the fold it was \
         trained on"
    )]
    SplitUnknown {
        /// The checkpoint.
        path: PathBuf,
    },
    /// Cases of a split that have no files.
    #[error("cases {cases} of the split are not in {folder}; bring them back, or train anew on another split")]
    SplitCasesMissing {
        /// Their names.
        cases: String,
        /// The dataset's folder.
        folder: PathBuf,
    },
    /// A case could be read when training began, and cannot be read any more.
    #[error("case {case} cannot be read any more: {source}. Training has ended")]
    CaseUnreadable {
        /// Case identifier.
        case: String,
        /// What reading it gave, the file's name in it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Training goes on without cases that cannot be read, and none is left.
    #[error("no case is left that can be read: {}", reasons.join("; "))]
    NoReadableCase {
        /// Every case and what reading it gave.
        reasons: Vec<String>,
    },
    /// The threads that cut patches could not do their work.
    #[error("patches cannot be loaded: {problem}; fewer threads need less of the system")]
    Loader {
        /// What is wrong.
        problem: String,
    },
    /// A fold that the splits do not have.
    #[error("fold {fold} is none of {whose}: it has {}; name one of these, or add the fold to the splits", folds(.known))]
    FoldUnknown {
        /// What was asked for.
        fold: usize,
        /// How many there are.
        known: usize,
        /// The file, or whose split it is.
        whose: String,
    },
    /// A training step that does not fit the memory it was allowed.
    #[error(
        "a training step takes at least {least} bytes, also with all stages computed again, and was allowed {budget}; allow \
         more, or use a smaller patch or batch size"
    )]
    MemoryBudget {
        /// Bytes that were allowed.
        budget: u64,
        /// Bytes that are needed.
        least: u64,
    },
    /// A training step that does not fit the device, and what would.
    #[error("{problem}{}", what_fits(.fits))]
    TrainingMemory {
        /// What does not fit.
        problem: Box<NetworkError>,
        /// The largest patch (depth, height, width) and batch found that would; `None` if not even a small one does.
        fits: Option<([usize; 3], usize)>,
    },
}

fn folds(known: &usize) -> String {
    match known {
        0 => "`all` only".into(),
        n => format!("folds 0 to {}, and `all`", n - 1),
    }
}

fn what_fits(found: &Option<([usize; 3], usize)>) -> String {
    match found {
        Some((patch, batch)) => {
            format!("; `\"patch_size\": {patch:?}` and `\"batch_size\": {batch}` in the plans would fit")
        }
        None => "; no smaller patch of this network fits either".into(),
    }
}
