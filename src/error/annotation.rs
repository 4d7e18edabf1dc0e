//! Why annotations cannot be made sparse, or not be taken over from another program.

use std::path::PathBuf;

/// Why annotations cannot be made sparse, or not be taken over from another program.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AnnotationError {
    /// A volume of one slice.
    #[error(
        "case {case}: {path} has shape {shape:?} (z, y, x), a single slice along one axis; sparse annotations are made of \
         volumes only"
    )]
    FlatVolume {
        /// The case.
        case: String,
        /// The label file.
        path: PathBuf,
        /// Its shape.
        shape: [usize; 3],
    },
    /// A name that the dataset does not have.
    #[error("no {what} `{name}`; there are {available:?}")]
    NameUnknown {
        /// What the name was to be of.
        what: &'static str,
        /// The name.
        name: String,
        /// The names there are.
        available: Vec<String>,
    },
    /// A list of slices does not fit a case.
    #[error("slices of case {case}: {problem}")]
    Slices {
        /// The case.
        case: String,
        /// What does not fit.
        problem: String,
    },
    /// A share of annotated voxels that cannot be met.
    #[error(
        "case {case}: {:.3} % of the voxels were asked for, {:.3} % is what there would be; {remedy}",
        100.0 * fraction, 100.0 * reached
    )]
    BudgetUnmet {
        /// The case.
        case: String,
        /// The share asked for.
        fraction: f64,
        /// The share possible.
        reached: f64,
        /// What would help.
        remedy: &'static str,
    },
    /// A label map or mask lies elsewhere than its image.
    #[error("case {case}: {path} does not lie where the case's other files lie; export it on the same grid")]
    LabelPlacement {
        /// The case.
        case: String,
        /// The file.
        path: PathBuf,
    },
    /// A class without its mask file.
    #[error(
        "case {case}: no mask of {name}; expected {path}. If the class is not in the case, say that missing masks are empty"
    )]
    MaskMissing {
        /// The case.
        case: String,
        /// Name of the class.
        name: String,
        /// The file expected.
        path: PathBuf,
    },
    /// A model predicts other labels, or from other channels, than a dataset has.
    #[error(
        "{path}: the model is of another dataset:\n    {}\n  take a model that was trained on this dataset's labels and channels",
        .differences.join("\n    ")
    )]
    OtherDataset {
        /// The dataset's description.
        path: PathBuf,
        /// All that differs.
        differences: Vec<String>,
    },
    /// Cases that every fold of a model was trained on.
    #[error(
        "{} cases were not held out by any of the folds {}: {}; {}train the other folds, or let folds look at cases that they \
         were trained on",
        .cases.len(), .folds.join(", "), .cases.join(", "), unknown_splits(.unknown)
    )]
    NotHeldOut {
        /// The cases.
        cases: Vec<String>,
        /// The folds that there are.
        folds: Vec<String>,
        /// Checkpoints that do not say which cases they were trained on.
        unknown: Vec<String>,
    },
    /// No voxel is ignored.
    #[error("{path}: nothing to complete: {}", no_ignored(.ignore))]
    NothingToComplete {
        /// The dataset's description.
        path: PathBuf,
        /// The ignore label, if there is one.
        ignore: Option<i16>,
    },
    /// Every voxel is annotated.
    #[error("{path}: nothing to suggest: every voxel of every case is annotated; add images without labels")]
    NothingToSuggest {
        /// The dataset's description.
        path: PathBuf,
    },
    /// No annotation at all.
    #[error("{path}: no annotation found; files must be named <case>{ending}, folders of masks <case>")]
    NothingToImport {
        /// The folder.
        path: PathBuf,
        /// The declared file ending.
        ending: String,
    },
    /// A segmentation none of whose segments has the name of a label.
    #[error(
        "{path}: none of the segments {segments:?} has the name of one of the labels {labels:?}; say which is which"
    )]
    SegmentsUnknown {
        /// The file.
        path: PathBuf,
        /// Names of its segments.
        segments: Vec<String>,
        /// Names in `labels`.
        labels: Vec<String>,
    },
    /// Two files of one folder for one case.
    #[error(
        "case {case} has two annotations in {folder}; keep one, or put those of another annotator into another folder"
    )]
    AnnotatedTwice {
        /// The case.
        case: String,
        /// The folder.
        folder: PathBuf,
    },
}

fn unknown_splits(checkpoints: &[String]) -> String {
    match checkpoints.is_empty() {
        true => String::new(),
        false => format!(
            "{} {} not say which cases training had, name the splits of that time; else ",
            checkpoints.join(", "),
            if checkpoints.len() == 1 { "does" } else { "do" }
        ),
    }
}

fn no_ignored(ignore: &Option<i16>) -> String {
    match ignore {
        Some(ignore) => format!("no label map holds the ignore label {ignore}"),
        None => "`labels` declares no `ignore`, so that every voxel counts as annotated".into(),
    }
}
