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
    /// Several faults at once, each on a line of its own.
    #[error("{} faults:\n  {}", .faults.len(), .faults.iter().map(Error::to_string).collect::<Vec<_>>().join("\n  "))]
    Several {
        /// All of them.
        faults: Vec<Error>,
    },

    // ---- files -------------------------------------------------------------------------------------------------
    /// The operating system refused to read, write, list or rename a path.
    #[error("{path}: cannot {action}: {source}")]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried, as a verb ("read", "write", "list").
        action: &'static str,
        /// The operating system's answer. Raw, so that it is no `source()`: the message holds it already.
        r#source: std::io::Error,
    },
    /// A file is not valid JSON.
    #[error("{path}: not valid JSON: {source}")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why parsing stopped.
        r#source: serde_json::Error,
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
    /// The axes of a grid are not at right angles, or not three.
    #[error(
        "{path}: the axes {axes} of the sform stand at {angle:.2} degrees: voxels are no boxes; resample the volume (and its \
         label map) to a grid of right angles, or rewrite the header if the sform is wrong (a valid qform is used instead)"
    )]
    NiftiShear {
        /// The file.
        path: PathBuf,
        /// Which axes, such as "x and y".
        axes: &'static str,
        /// The angle between them in degrees.
        angle: f64,
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
        r#source: std::io::Error,
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
        "{path}: label map holds {value} at voxel (z, y, x) = {voxel:?}, and in {voxels} voxels something that is no label; \
         labels must be integers in -32768..=32767. The file holds {values}"
    )]
    LabelNotInteger {
        /// The file.
        path: PathBuf,
        /// The first such value.
        value: f64,
        /// Where.
        voxel: [usize; 3],
        /// How many voxels hold such values.
        voxels: usize,
        /// What the whole file holds.
        values: ValueSummary,
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
    /// A name that would lead out of the folder for which it is meant.
    #[error(
        "{path}: field `{field}`: {name:?} becomes a file's name; it must be one, without folders, `..` or control characters"
    )]
    UnsafeName {
        /// The file that holds the name.
        path: PathBuf,
        /// Where in the file.
        field: String,
        /// The name.
        name: String,
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

    // ---- sparse annotations ------------------------------------------------------------------------------------------
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
    /// A folder that must not be replaced.
    #[error("{path}: {problem}")]
    OutputExists {
        /// The folder.
        path: PathBuf,
        /// Why it stays as it is.
        problem: String,
    },

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
    /// Names that would lead out of the folder in which files of this name are written.
    #[error("{path}: {names}: not the name of a file or folder; write names without `/`, and neither `.` nor `..`")]
    NotAFileName {
        /// The file.
        path: PathBuf,
        /// The fields and what they hold.
        names: String,
    },
    /// Images too small for a network.
    #[error(
        "plans for {configuration}: images of {median:?} voxels (median, at the target spacing) give a network of {stages} \
         stage, and at least 2 are needed: two axes of 8 voxels, or one of 12. Choose a finer target spacing \
         (--overwrite-target-spacing), or larger images"
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
    /// Preprocessed cases that do not fit the plans, the raw files or each other.
    #[error(
        "{folder}: cases {problems}. Run `voxgrad preprocess` (or plan-and-preprocess): it redoes what is not up to date"
    )]
    StoredCases {
        /// The folder of the configuration.
        folder: PathBuf,
        /// Which cases, and what is wrong with them.
        problems: String,
    },
    /// Cases that are kept in memory as a whole, and are too large together.
    #[error(
        "{cases} of the {whole} cases that are not stored by voxgrad take {held} bytes of memory, of {limit} that are free \
         for them; all would take about {expected}. Run `voxgrad preprocess`: patches of its cases are read as they are \
         needed"
    )]
    CaseMemory {
        /// Cases that were read.
        cases: usize,
        /// Cases to be read.
        whole: usize,
        /// Bytes of those that were read.
        held: u64,
        /// Bytes that all would take if they are alike.
        expected: u64,
        /// Bytes that they may take.
        limit: u64,
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
    /// The network's output is infinite or no number.
    #[error(
        "case {case}: the logits of the window of {patch:?} voxels from {start:?} (z, y, x, preprocessed) hold {value}; \
         predict in f32 if this was {dtype:?} (--precision f32), else look at the image there, or take another checkpoint"
    )]
    NonFiniteLogits {
        /// The case.
        case: String,
        /// The first such value.
        value: f32,
        /// First voxel of the window; negative where it hangs over the image.
        start: [isize; 3],
        /// Extent of the window.
        patch: [usize; 3],
        /// Type of the activations.
        dtype: crate::kernels::Dtype,
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
    #[error(
        "{path} was trained otherwise: {differences}. Leave these options out to go on with it, or train into another \
         folder"
    )]
    Continuation {
        /// The checkpoint.
        path: PathBuf,
        /// Every option or file that differs, with both values.
        differences: String,
    },
    /// A checkpoint that does not say which cases it was trained on.
    #[error(
        "{path} was written by an earlier version and does not say which cases it was trained on; name the fold it was \
         trained on with --fold"
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

    // ---- figures -----------------------------------------------------------------------------------------------------------
    /// A figure could not be drawn or encoded.
    #[error("{path}: cannot draw the figure: {problem}")]
    Figure {
        /// The figure's file.
        path: PathBuf,
        /// Why.
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
    /// A training step that does not fit the device, and what would.
    #[error("{problem}{}", what_fits(.fits))]
    TrainingMemory {
        /// What does not fit.
        problem: Box<Error>,
        /// The largest patch (depth, height, width) and batch found that would; `None` if not even a small one does.
        fits: Option<([usize; 3], usize)>,
    },
    /// Weights that a training cannot begin with.
    #[error("{path}: no weights to begin with: {problem}")]
    Pretrained {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
}

/// What a volume holds, in words.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ValueSummary {
    /// Smallest finite value.
    pub min: f64,
    /// Largest finite value.
    pub max: f64,
    /// Number of distinct values, counted up to [`ValueSummary::COUNTED`].
    pub distinct: usize,
}

impl ValueSummary {
    /// Distinct values are counted up to here.
    pub const COUNTED: usize = 10_000;
    /// Label maps hold fewer distinct values than this, most images more.
    pub const FEW: usize = 64;

    /// Looks at all values of a volume.
    pub fn of(values: impl Iterator<Item = f64>) -> Self {
        let (mut min, mut max) = (f64::INFINITY, f64::NEG_INFINITY);
        let mut distinct = std::collections::HashSet::new();
        for value in values {
            if value.is_finite() {
                (min, max) = (min.min(value), max.max(value));
            }
            if distinct.len() < Self::COUNTED {
                distinct.insert(value.to_bits());
            }
        }
        Self { min, max, distinct: distinct.len() }
    }
}

impl std::fmt::Display for ValueSummary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let least = if self.distinct >= Self::COUNTED { "at least " } else { "" };
        write!(f, "{least}{} distinct values from {} to {}", self.distinct, self.min, self.max)?;
        if self.distinct >= Self::FEW { f.write_str(": it looks like an image") } else { Ok(()) }
    }
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

fn first(names: &[String]) -> &str {
    names.first().map_or("", String::as_str)
}

/// `case.nii.gz` as `case_0000.nii.gz`.
fn numbered(file: &str) -> String {
    let stem = file.trim_end_matches(".gz").trim_end_matches(".nii");
    format!("{stem}_0000{}", &file[stem.len()..])
}

fn undeclared(found: &[(i16, u64)]) -> String {
    let values: Vec<String> = found.iter().map(|(value, voxels)| format!("{value} ({voxels} voxels)")).collect();
    listed(&values)
}

impl Error {
    /// All faults as one error: the only one itself, none if there is none; of several among them each on its own.
    pub fn several(faults: Vec<Error>) -> Option<Self> {
        let single = |error| match error {
            Error::Several { faults } => faults,
            error => vec![error],
        };
        let mut faults: Vec<Error> = faults.into_iter().flat_map(single).collect();
        match faults.len() {
            0 | 1 => faults.pop(),
            _ => Some(Error::Several { faults }),
        }
    }

    /// Fails with all faults, if there are any.
    ///
    /// # Errors
    /// As [`several`](Self::several) puts them together.
    pub fn all(faults: Vec<Error>) -> Result<()> {
        Self::several(faults).map_or(Ok(()), Err)
    }

    /// Attaches a path and what was tried to an operating-system error; for `map_err`.
    pub fn io(path: impl Into<PathBuf>, action: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Error::Io { path, action, source }
    }
}
