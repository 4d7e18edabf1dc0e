//! Everything that can be wrong with a user's data, as one typed enum.
//!
//! A message names the file (or case), the field and what to do about it, because it is usually read by someone who did
//! not write the file. Variants are one per cause so that callers, and tests, can tell causes apart.

use std::path::PathBuf;

/// Result of everything in this crate that reads user data.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What was wrong, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    // ---- files -------------------------------------------------------------------------------------------------
    /// The operating system refused to read, write, list or rename a path.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as a verb ("read", "write", "list").
        action: &'static str,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A file is not valid JSON.
    #[error("{path}: not valid JSON: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why parsing stopped.
        source: serde_json::Error,
    },
    /// A JSON field is missing or holds something else than expected.
    #[error("{path}: field `{field}`: {problem}")]
    Field {
        /// The file.
        path: PathBuf,
        /// Dotted name of the field.
        field: String,
        /// What is wrong and what is expected.
        problem: String,
    },

    // ---- NIfTI -------------------------------------------------------------------------------------------------
    /// The file is not a NIfTI-1 single file.
    #[error("{path}: not a NIfTI-1 file (.nii or .nii.gz): {problem}; convert it to single-file NIfTI-1")]
    NotNifti {
        /// The file.
        path: PathBuf,
        /// Which field gave it away.
        problem: String,
    },
    /// A header field has a value that no reader can use.
    #[error("{path}: NIfTI header field `{field}` is {value}: {expected}; rewrite the file with a valid header")]
    NiftiHeader {
        /// The file.
        path: PathBuf,
        /// Name of the field in the NIfTI-1 standard.
        field: &'static str,
        /// The value found.
        value: String,
        /// The value that would be valid.
        expected: &'static str,
    },
    /// Voxel type that is not a real scalar (RGB, complex, 128-bit floats, unknown codes).
    #[error(
        "{path}: NIfTI datatype {datatype} is not a scalar type; store the image as (u)int8/16/32/64, float32 or float64"
    )]
    NiftiDatatype {
        /// The file.
        path: PathBuf,
        /// The code found.
        datatype: i16,
    },
    /// The file ends before the last voxel that its header promises.
    #[error(
        "{path}: truncated: the header promises {expected} bytes, the file holds {found}; copy or export the file again"
    )]
    NiftiTruncated {
        /// The file.
        path: PathBuf,
        /// Bytes from the start of the (decompressed) file to the last voxel.
        expected: u64,
        /// Bytes present.
        found: u64,
    },
    /// The (decompressed) file goes on for longer than its header can justify.
    #[error(
        "{path}: more than {limit} bytes where the header promises {expected}; the file is corrupt or not what its header says"
    )]
    NiftiTooLong {
        /// The file.
        path: PathBuf,
        /// Bytes the header promises.
        expected: u64,
        /// Where reading was given up.
        limit: u64,
    },
    /// The gzip stream is damaged: checksum, length or deflate data.
    #[error("{path}: damaged gzip stream: {source}; copy or compress the file again")]
    Gzip {
        /// The file.
        path: PathBuf,
        /// What the decompressor found.
        source: std::io::Error,
    },
    /// A 4-D (or higher) image where a 3-D one is needed.
    #[error(
        "{path}: the image has {shape:?} voxels (x, y, z, further axes); split it into one 3-D file per channel named \
         <case>_0000, <case>_0001, ... as nnU-Net expects"
    )]
    NotThreeDimensional {
        /// The file.
        path: PathBuf,
        /// All axes of the header, x first.
        shape: Vec<usize>,
    },
    /// A label file holds something that is not an integer.
    #[error(
        "{path}: label map holds {value} at voxel (z, y, x) = {voxel:?}; labels must be integers in -32768..=32767"
    )]
    LabelNotInteger {
        /// The file.
        path: PathBuf,
        /// The value found.
        value: f64,
        /// Where.
        voxel: [usize; 3],
    },
    /// A volume cannot be written as NIfTI.
    #[error("{path}: cannot write NIfTI: {problem}")]
    NiftiWrite {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: String,
    },

    // ---- dataset.json and labels -----------------------------------------------------------------------------------
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
    /// `ignore` is not the highest label plus one.
    #[error("{path}: `labels.ignore` is {value}; it must be {expected}, one above the highest other label")]
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
    /// A label value outside 0..=255.
    #[error("{path}: `labels.{name}` holds {value}; label values must lie in 0..=255")]
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

    // ---- folders and cases -------------------------------------------------------------------------------------------
    /// A number or name that no dataset has.
    #[error(
        "no dataset `{wanted}` in {searched:?}; there are {found:?}. Give a number, a folder name or a path, and name \
         the folders with --raw and --preprocessed or nnU-Net's environment variables"
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
    #[error("where to look is not known: give {option} FOLDER, or set the environment variable {variable}")]
    FolderUnknown {
        /// nnU-Net's variable.
        variable: &'static str,
        /// The option.
        option: &'static str,
    },
    /// No case at all.
    #[error("{path}: no case found; image files must be named <case>_0000{ending}")]
    DatasetEmpty {
        /// The folder.
        path: PathBuf,
        /// The declared file ending.
        ending: String,
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
        "case {case}: {path} is a channel beyond the {declared} declared in `channel_names`; declare it or remove the file"
    )]
    ChannelUndeclared {
        /// The case.
        case: String,
        /// The surplus file.
        path: PathBuf,
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
    /// A label value that `dataset.json` does not declare.
    #[error(
        "case {case}: {path} holds label {value} at voxel (z, y, x) = {voxel:?}; `labels` in dataset.json declares {expected:?}: declare it or \
         correct the file"
    )]
    UnexpectedLabel {
        /// The case.
        case: String,
        /// The label file.
        path: PathBuf,
        /// The value found.
        value: i16,
        /// Where it occurs first.
        voxel: [usize; 3],
        /// The values declared, ignore label included.
        expected: Vec<i16>,
    },

    // ---- splits and plans ---------------------------------------------------------------------------------------------
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
        "{path}: fold {fold} names case {case}, which is not in the dataset; delete the file to have it made again"
    )]
    SplitUnknownCase {
        /// The splits file.
        path: PathBuf,
        /// Index of the fold.
        fold: usize,
        /// The unknown case.
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

    // ---- preprocessing, sampling, inference ------------------------------------------------------------------------------
    /// Settings and data disagree on the number of channels.
    #[error("case {case}: {found} channels, the plans are for {expected}; plan again for this dataset")]
    ChannelCount {
        /// The case.
        case: String,
        /// Channels of the case.
        found: usize,
        /// Channels the settings describe.
        expected: usize,
    },
    /// RGB normalisation of values that are not RGB.
    #[error("channel {channel} is declared `rgb_to_0_1` but holds {value}; values must lie in 0..=255")]
    NotRgb {
        /// Index of the channel.
        channel: usize,
        /// An offending value.
        value: f32,
    },
    /// CT normalisation without the fingerprint's statistics.
    #[error(
        "plans: `foreground_intensity_properties_per_channel` lacks channel {channel}, which CT normalisation needs; plan again"
    )]
    IntensityMissing {
        /// Index of the channel.
        channel: usize,
    },
    /// Resampling would make an absurdly large volume.
    #[error(
        "resampling from {from:?} to {to:?} voxels would exceed {limit} voxels; check the spacing in the image header"
    )]
    ResampledTooLarge {
        /// Shape before.
        from: [usize; 3],
        /// Shape asked for.
        to: [usize; 3],
        /// The limit.
        limit: usize,
    },
    /// Nothing to sample from.
    #[error("no case to sample patches from")]
    NoCases,
    /// A buffer has not the length that its shape says.
    #[error("{what}: {found} values where {expected} are needed")]
    BufferLength {
        /// Which buffer.
        what: &'static str,
        /// Its length.
        found: usize,
        /// The length its shape asks for.
        expected: usize,
    },
    /// A setting outside its valid range.
    #[error("setting `{setting}` is {value}: {expected}")]
    Setting {
        /// Name of the setting.
        setting: &'static str,
        /// The value given.
        value: String,
        /// What would be valid.
        expected: &'static str,
    },

    /// A preprocessed case cannot be used.
    #[error("{path}: not a usable preprocessed case: {problem}; delete the file and preprocess again")]
    StoredCase {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A part of a preprocessed case that does not lie inside it.
    #[error("{path}: the box of {size:?} voxels from {start:?} (z, y, x) does not lie inside the volume of {shape:?}")]
    StoredBox {
        /// The file.
        path: PathBuf,
        /// First voxel asked for.
        start: [usize; 3],
        /// Extent asked for.
        size: [usize; 3],
        /// Extent of the volume.
        shape: [usize; 3],
    },

    // ---- evaluation ------------------------------------------------------------------------------------------------------
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
    /// Prediction and reference differ in shape.
    #[error(
        "{path}: prediction has shape {found:?} (z, y, x), its reference has {expected:?}; export predictions on the raw image's grid"
    )]
    EvaluationShape {
        /// The prediction file.
        path: PathBuf,
        /// Its shape.
        found: [usize; 3],
        /// The reference's shape.
        expected: [usize; 3],
    },

    // ---- networks and devices ---------------------------------------------------------------------------------
    /// A kernel refused its arguments, or the device failed.
    #[error(transparent)]
    Kernel(#[from] crate::kernels::KernelError),
    /// A device could not be opened.
    #[error(transparent)]
    Device(#[from] crate::device::DeviceError),
    /// The network that the plans describe cannot be built, or not be run on such a patch.
    #[error("plans, architecture.arch_kwargs.{field}: {problem}; correct the plans or plan again")]
    Architecture {
        /// The field.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// Training would not fit into the device.
    #[error(
        "{what} needs {needed} bytes, this device has room for {limit}; use a smaller patch size or batch size, or another \
         device"
    )]
    DeviceMemory {
        /// What is too large.
        what: &'static str,
        /// Its bytes.
        needed: u64,
        /// The largest number of bytes possible.
        limit: u64,
    },
    /// A file of measurements cannot be used.
    #[error("{path}: not usable for tuning: {problem}; delete the file to measure again")]
    Tuning {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// Predicting would not fit into memory.
    #[error("{what} needs {needed} bytes, there is room for {limit}; predict with {remedy}")]
    PredictionMemory {
        /// What is too large.
        what: &'static str,
        /// Its bytes.
        needed: u64,
        /// The largest number of bytes possible.
        limit: u64,
        /// What would need less.
        remedy: &'static str,
    },
    /// A saved state does not fit the network.
    #[error("parameter {name} {problem}; the checkpoint belongs to other plans")]
    State {
        /// The parameter.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A checkpoint cannot be read.
    #[error("{path}: not a usable checkpoint: {problem}")]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: String,
    },

    /// A name of a trainer class that stands for nothing here.
    #[error("unknown trainer `{name}`; voxgrad has: {known}")]
    UnknownTrainer {
        /// What was asked for.
        name: String,
        /// All names, with commas.
        known: String,
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

    /// The loss became infinite or NaN.
    #[error(
        "the loss of epoch {epoch} is not finite; lower the learning rate, or look for extreme intensities in the images"
    )]
    Diverged {
        /// The epoch, from 0.
        epoch: usize,
    },

    // ---- figures -----------------------------------------------------------------------------------------------------------
    /// A figure could not be drawn or encoded.
    #[error("{path}: cannot draw the figure: {problem}")]
    Figure {
        /// The figure's file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
}

impl Error {
    /// Attaches a path and what was tried to an operating-system error; for `map_err`.
    pub fn io(path: impl Into<PathBuf>, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Error::Io { path, action, source }
    }
}
