//! What is wrong with a single file: the operating system refuses it, or its format is not what it must be.

use super::values::ValueSummary;
use std::path::PathBuf;

/// What is wrong with a single file: the operating system refuses it, or its format is not what it must be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
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
    /// A file is no NRRD file.
    #[error("{path}: not an NRRD file: {problem}; save the segmentation again")]
    NotNrrd {
        /// The file.
        path: PathBuf,
        /// What gave it away.
        problem: String,
    },
    /// A field of an NRRD file that is missing, or that cannot be used.
    #[error("{path}: NRRD field `{field}`: {problem}")]
    NrrdField {
        /// The file.
        path: PathBuf,
        /// The field, or the key of a pair.
        field: String,
        /// What is wrong and what would be right.
        problem: String,
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
    /// A numpy archive is damaged, or lacks what is asked for.
    #[error("{path}: not a usable .npz: {problem}; copy or make the file again")]
    Npz {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A volume cannot be written as NIfTI.
    #[error("{path}: cannot write NIfTI: {problem}")]
    NiftiWrite {
        /// The file.
        path: PathBuf,
        /// Why.
        problem: String,
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
    /// A folder that must not be replaced.
    #[error("{path}: {problem}")]
    OutputExists {
        /// The folder.
        path: PathBuf,
        /// Why it stays as it is.
        problem: String,
    },
    /// Names that would lead out of the folder in which files of this name are written.
    #[error("{path}: {names}: not the name of a file or folder; write names without `/`, and neither `.` nor `..`")]
    NotAFileName {
        /// The file.
        path: PathBuf,
        /// The fields and what they hold.
        names: String,
    },
    /// A figure could not be drawn or encoded.
    #[error("{path}: cannot draw the figure: {problem}")]
    Figure {
        /// The figure's file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
}
