//! What is wrong with a raw dataset: its description, the names of its files, its volumes and labels.

use super::values::ValueSummary;
use std::path::PathBuf;

/// What is wrong with a raw dataset: its description, the names of its files, its volumes and labels.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// Nothing to work on.
    #[error("no case to work on")]
    NoCases,
    /// No `background` among the labels.
    #[error("{path}: `labels` has no `background`; add \"background\": 0")]
    BackgroundMissing {
        /// The file.
        path: PathBuf,
    },
    /// `background` is a list of labels.
    #[error("{path}: `labels.background` is a region; it must be the plain integer 0")]
    BackgroundIsRegion {
        /// The file.
        path: PathBuf,
    },
    /// `background` is not 0.
    #[error("{path}: `labels.background` is {value}; it must be 0")]
    BackgroundNotZero {
        /// The file.
        path: PathBuf,
        /// The value found.
        value: i64,
    },
    /// `ignore` is a list of labels.
    #[error("{path}: `labels.ignore` is a region; it must be one integer, the highest label value")]
    IgnoreIsRegion {
        /// The file.
        path: PathBuf,
    },
    /// The names and values of `labels` are exchanged.
    #[error(
        "{path}: `labels` has values as keys and names as values, as older formats have; it must be name: value. Write\n\
         {corrected}"
    )]
    LabelsReversed {
        /// The file.
        path: PathBuf,
        /// The block as it must be.
        corrected: String,
    },
    /// `ignore` is not the highest label plus one.
    #[error(
        "{path}: `labels.ignore` is {value}; it must be {expected}, one above the highest other label. Write {expected} here, \
         and turn {value} into {expected} in every label file, in Python for instance with: import nibabel, numpy; \
         i = nibabel.load(file); d = numpy.asarray(i.dataobj).astype('uint8'); d[d == {value}] = {expected}; \
         nibabel.save(nibabel.Nifti1Image(d, i.affine), file)"
    )]
    IgnoreNotHighest {
        /// The file.
        path: PathBuf,
        /// The value found.
        value: i64,
        /// The value it must have.
        expected: i64,
    },
    /// Label values leave a gap.
    #[error("{path}: `labels` must be consecutive integers from 0, found {found:?}; renumber the labels")]
    LabelsNotConsecutive {
        /// The file.
        path: PathBuf,
        /// The sorted label values.
        found: Vec<i16>,
    },
    /// A label value outside 0..=32766.
    #[error("{path}: `labels.{name}` holds {value}; label values must lie in 0..=32766")]
    LabelOutOfRange {
        /// The file.
        path: PathBuf,
        /// Name of the label.
        name: String,
        /// The value found.
        value: i64,
    },
    /// Only background, nothing to segment.
    #[error("{path}: `labels` declares nothing but background; add at least one foreground label or region")]
    NoForeground {
        /// The file.
        path: PathBuf,
    },
    /// Regions without `regions_class_order`.
    #[error(
        "{path}: `labels` declares regions but `regions_class_order` is missing; list the label to write for each region, \
         in the order of `labels`"
    )]
    RegionsClassOrderMissing {
        /// The file.
        path: PathBuf,
    },
    /// `regions_class_order` has the wrong length.
    #[error(
        "{path}: `regions_class_order` has {found} entries for {expected} regions; list one label per region, without \
         background and ignore"
    )]
    RegionsClassOrderLength {
        /// The file.
        path: PathBuf,
        /// Entries found.
        found: usize,
        /// Number of regions.
        expected: usize,
    },
    /// More regions than the loss has bits for.
    #[error("{path}: {found} regions; at most 32 are supported")]
    TooManyRegions {
        /// The file.
        path: PathBuf,
        /// Number of regions.
        found: usize,
    },
    /// A number or name that no dataset has.
    #[error(
        "no dataset `{wanted}` in {searched:?}; there are {found:?}. Give a number, a folder name or a path, and name \
         the folders, or set nnU-Net's environment variables"
    )]
    DatasetNotFound {
        /// What was asked for.
        wanted: String,
        /// Folders looked into.
        searched: Vec<String>,
        /// Names of the datasets there.
        found: Vec<String>,
    },
    /// A number that several datasets have.
    #[error("dataset `{wanted}` may be any of {found:?}; give the whole name")]
    DatasetAmbiguous {
        /// What was asked for.
        wanted: String,
        /// Names that fit.
        found: Vec<String>,
    },
    /// Nobody said where a folder is.
    #[error("where to look is not known: name the folder of {what}, or set the environment variable {variable}")]
    FolderUnknown {
        /// nnU-Net's variable.
        variable: &'static str,
        /// What lies there.
        what: &'static str,
    },
    /// No case at all.
    #[error(
        "{path}: no case found; image files must be named <case>_0000{ending}{}",
        others_seen(.others, .other_ending)
    )]
    DatasetEmpty {
        /// The folder.
        path: PathBuf,
        /// The declared file ending.
        ending: String,
        /// The other ending of NIfTI files.
        other_ending: &'static str,
        /// How many files end so.
        others: usize,
    },
    /// Images that fit no case.
    #[error(
        "{folder}: fits no case: {}; images must be named <case>_<four digits of the channel>{ending}, such as \
         case_001_0000{ending}: rename or remove them",
        listed(.files)
    )]
    ImageNames {
        /// The folder.
        folder: PathBuf,
        /// The files.
        files: Vec<String>,
        /// The declared file ending.
        ending: String,
    },
    /// Images named as cases, without the number of a channel.
    #[error(
        "{folder}: no channel number: {}; nnU-Net takes `_` and four digits at the end of an image's name for its channel \
         (labels have none), so append _0000 for the first channel even where the case's own name ends in four digits: {} \
         becomes {}",
        listed(.files), first(.files), numbered(first(.files))
    )]
    ChannelNumberMissing {
        /// The folder of images.
        folder: PathBuf,
        /// The files.
        files: Vec<String>,
    },
    /// Labels named as images.
    #[error("{folder}: label maps carry no channel number: {}; remove _0000 from their names", listed(.files))]
    LabelNumbered {
        /// The folder of labels.
        folder: PathBuf,
        /// The files.
        files: Vec<String>,
    },
    /// Labels of no case.
    #[error("{folder}: no image belongs to {}; a label map is named <case> and the ending. Add the images or remove them", listed(.files))]
    LabelWithoutImage {
        /// The folder of labels.
        folder: PathBuf,
        /// The files.
        files: Vec<String>,
    },
    /// Files with an ending other than the declared one.
    #[error(
        "{folder}: {} files end in {other_ending} and {fitting} in {ending}, which `file_ending` declares: {}; convert or \
         remove them",
        .files.len(), listed(.files)
    )]
    OtherEnding {
        /// The folder.
        folder: PathBuf,
        /// The declared file ending.
        ending: String,
        /// Number of files that have it.
        fitting: usize,
        /// The other ending of NIfTI files.
        other_ending: &'static str,
        /// The files.
        files: Vec<String>,
    },
    /// Images of one slice.
    #[error(
        "{folder}: the median image has {shape:?} voxels (z, y, x): that is 2-D, which is not supported; voxgrad needs \
         volumes of more than one slice in every direction"
    )]
    TwoDimensional {
        /// The dataset.
        folder: PathBuf,
        /// The median extent along each axis.
        shape: [usize; 3],
    },
    /// `numTraining` disagrees with the files.
    #[error(
        "{path}: `numTraining` is {declared} but {found} training cases were found; correct the number or the files"
    )]
    NumTraining {
        /// The `dataset.json`.
        path: PathBuf,
        /// The number declared.
        declared: usize,
        /// The number of cases found.
        found: usize,
    },
    /// A channel of a case has no file.
    #[error("case {case}: channel {channel} ({name}) has no file; expected {path}")]
    ChannelMissing {
        /// The case.
        case: String,
        /// Index of the channel.
        channel: usize,
        /// Name of the channel in `dataset.json`.
        name: String,
        /// The file expected.
        path: PathBuf,
    },
    /// A case has more channel files than the dataset declares.
    #[error(
        "case {case}: in {folder}, {} beyond the {declared} channels declared in `channel_names`: declare or remove them. The \
         four digits at the end of a name are the channel; if they belong to the names of several cases, append the \
         channel: {} becomes {}",
        surplus(.files), first(.files), numbered(first(.files))
    )]
    ChannelUndeclared {
        /// The case.
        case: String,
        /// The folder of images.
        folder: PathBuf,
        /// The surplus files.
        files: Vec<String>,
        /// Number of declared channels.
        declared: usize,
    },
    /// A training case has no label file.
    #[error("case {case}: no label file; expected {path}")]
    LabelMissing {
        /// The case.
        case: String,
        /// The file expected.
        path: PathBuf,
    },
    /// Channels of one case differ in shape.
    #[error(
        "case {case}: {path} has shape {found:?} (z, y, x), the first channel has {expected:?}; resample the channels to one grid"
    )]
    ChannelShape {
        /// The case.
        case: String,
        /// The channel file that differs.
        path: PathBuf,
        /// Its shape.
        found: [usize; 3],
        /// The first channel's shape.
        expected: [usize; 3],
    },
    /// Channels of one case differ in spacing.
    #[error(
        "case {case}: {path} has spacing {found:?} mm (z, y, x), the first channel has {expected:?}; resample the channels to one grid"
    )]
    ChannelSpacing {
        /// The case.
        case: String,
        /// The channel file that differs.
        path: PathBuf,
        /// Its spacing.
        found: [f64; 3],
        /// The first channel's spacing.
        expected: [f64; 3],
    },
    /// Label map and image differ in shape.
    #[error(
        "case {case}: label map {path} has shape {found:?} (z, y, x), the image has {expected:?}; they must lie on one grid"
    )]
    LabelShape {
        /// The case.
        case: String,
        /// The label file.
        path: PathBuf,
        /// Its shape.
        found: [usize; 3],
        /// The image's shape.
        expected: [usize; 3],
    },
    /// Label map and image differ in spacing.
    #[error(
        "case {case}: label map {path} has spacing {found:?} mm (z, y, x), the image has {expected:?}; they must lie on one grid"
    )]
    LabelSpacing {
        /// The case.
        case: String,
        /// The label file.
        path: PathBuf,
        /// Its spacing.
        found: [f64; 3],
        /// The image's spacing.
        expected: [f64; 3],
    },
    /// NaN or infinity in an image.
    #[error(
        "case {case}: {path} holds {value} at voxel (z, y, x) = {voxel:?}; replace non-finite voxels before training"
    )]
    NonFiniteVoxel {
        /// The case.
        case: String,
        /// The channel file.
        path: PathBuf,
        /// The value found.
        value: f32,
        /// Where.
        voxel: [usize; 3],
    },
    /// An image declared as RGB that holds other values.
    #[error(
        "case {case}: {path} (channel {channel}) is declared `rgb_to_0_1` and holds {value}; values must lie in 0..=255: \
         rescale the image, or give the channel another name in `channel_names`"
    )]
    NotRgbImage {
        /// The case.
        case: String,
        /// The channel file.
        path: PathBuf,
        /// Index of the channel.
        channel: usize,
        /// The first such value.
        value: f32,
    },
    /// No class is annotated anywhere.
    #[error("{folder}: no voxel of any class is annotated in any of the {cases} cases: there is nothing to learn")]
    NothingAnnotated {
        /// The dataset.
        folder: PathBuf,
        /// Number of cases.
        cases: usize,
    },
    /// Label values that `dataset.json` does not declare.
    #[error(
        "case {case}: {path} holds label {value} at voxel (z, y, x) = {voxel:?}; `labels` in dataset.json declares {expected:?}: \
         declare it or correct the file. Undeclared in all: {}",
        undeclared(.found)
    )]
    UnexpectedLabel {
        /// The case.
        case: String,
        /// The label file.
        path: PathBuf,
        /// The first such value.
        value: i16,
        /// Where it occurs first.
        voxel: [usize; 3],
        /// The values declared, ignore label included.
        expected: Box<[i16]>,
        /// All undeclared values, each with the number of its voxels.
        found: Box<[(i16, u64)]>,
    },
    /// A label file that holds far more values than labels are declared.
    #[error(
        "case {case}: {path} is no label map: it holds {values}; `labels` in dataset.json declares {expected:?}. Was an image \
         copied over it?"
    )]
    LabelIsImage {
        /// The case.
        case: String,
        /// The label file.
        path: PathBuf,
        /// What the file holds.
        values: ValueSummary,
        /// The values declared, ignore label included.
        expected: Vec<i16>,
    },
    /// A declared class that no case has.
    #[error(
        "{path}: no case has a voxel of {name} (label {label}); correct the label files, or take it out of `labels`"
    )]
    ClassEmpty {
        /// The `dataset.json`.
        path: PathBuf,
        /// Name of the class.
        name: String,
        /// Its label value.
        label: i16,
    },
}

/// Names in a message: all of them, or as many as somebody reads.
fn listed(names: &[String]) -> String {
    const SHOWN: usize = 30;
    let rest = names.len().saturating_sub(SHOWN);
    let shown = names[..names.len() - rest].join(", ");
    if rest == 0 { shown } else { format!("{shown} and {rest} more") }
}

fn others_seen(others: &usize, ending: &str) -> String {
    match others {
        0 => String::new(),
        n => format!(". {n} files end in {ending}: convert them, or correct `file_ending` in dataset.json"),
    }
}

fn surplus(files: &[String]) -> String {
    match files {
        [one] => format!("{one} is a channel"),
        several => format!("{} are channels", listed(several)),
    }
}

fn first(names: &[String]) -> &str {
    names.first().map_or("", String::as_str)
}

/// `case.nii.gz` as `case_0000.nii.gz`.
fn numbered(file: &str) -> String {
    let stem = file.trim_end_matches(".gz").trim_end_matches(".nii");
    format!("{stem}_0000{}", &file[stem.len()..])
}

/// Undeclared values with the number of their voxels.
pub(super) fn undeclared(found: &[(i16, u64)]) -> String {
    let values: Vec<String> = found.iter().map(|(value, voxels)| format!("{value} ({voxels} voxels)")).collect();
    listed(&values)
}
