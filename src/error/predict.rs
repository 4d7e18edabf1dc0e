//! Why a case cannot be predicted.

/// Why a case cannot be predicted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PredictError {
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
        /// Whether activations of 16 bits would.
        in_16_bits: bool,
    },
    /// Everything fits into memory but what is to be kept of all heads for the whole case.
    #[error(
        "{what} of {heads} heads in {voxels:?} voxels (z, y, x) are {bytes} bytes, with which predicting needs {needed}, and \
         there is room for {limit}; predict labels only, on a machine with more memory, or an image cut into parts"
    )]
    KeptMemory {
        /// What is kept: logits, or probabilities.
        what: &'static str,
        /// Its bytes.
        bytes: u64,
        /// Classes or regions.
        heads: usize,
        /// Extents of the image.
        voxels: [usize; 3],
        /// Bytes of all that is held.
        needed: u64,
        /// The largest number of bytes possible.
        limit: u64,
    },
    /// The network's output is infinite or no number.
    #[error(
        "case {case}: the logits of the window of {patch:?} voxels from {start:?} (z, y, x, preprocessed) hold {value}; \
         predict in f32 if this was {dtype:?}, else look at the image there, or take another checkpoint"
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
}
