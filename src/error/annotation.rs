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
