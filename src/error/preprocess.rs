//! What is wrong with a case on its way to a preprocessed one, or with a stored one.

use std::path::PathBuf;

/// What is wrong with a case on its way to a preprocessed one, or with a stored one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PreprocessError {
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
}
