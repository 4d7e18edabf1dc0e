//! What is computed together instead of going through memory.

/// What is done together, or again. Computing again gives the same bits as storing; else the results differ by rounding. That a
/// residual block adds its skip while it normalises is no setting: its parts are put together in the tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fusion {
    /// Whether backward computes normalised activations again from the convolution's output, which it keeps anyway,
    /// instead of keeping both. Costs a pass over the tensor (one read, one write) for each operation that reads it.
    pub recompute_activations: bool,
    /// Whether a convolution before an instance norm takes the moments of its output while it stores it. Saves the pass over
    /// the output that does nothing else.
    pub moments_by_convolution: bool,
    /// Whether the gradient of a convolution's bias before an instance norm, which takes every constant out again, is left at
    /// the 0 that it is; computed, it is a sum of rounding errors. Saves a pass over the gradient of the output.
    pub no_bias_gradient_before_norm: bool,
    /// Whether a convolution that stores the complete gradient of a normalised tensor takes the sums that the norm's
    /// own gradient begins with, where its kernel can. Saves a pass of two reads for an additional read in the convolution.
    pub norm_sums_by_convolution: bool,
    /// Of so many stages, from full resolution on, backward computes the convolutions again but for the last one of each row of
    /// blocks, where it computes activations again: less memory, for another forward pass of these. Without a fusion: for who
    /// lacks the memory.
    pub recompute_stages: usize,
}

impl Fusion {
    /// Every operation on its own, and nothing computed twice: what the fused ones are tested against.
    pub const NONE: Self = Self {
        recompute_activations: false,
        moments_by_convolution: false,
        no_bias_gradient_before_norm: false,
        norm_sums_by_convolution: false,
        recompute_stages: 0,
    };

    /// All that costs no time: the fewest launches.
    pub const ALL: Self = Self {
        recompute_activations: true,
        moments_by_convolution: true,
        no_bias_gradient_before_norm: true,
        norm_sums_by_convolution: true,
        recompute_stages: 0,
    };
}

/// All: as fast as nothing fused on two cores with AVX-512, within the scatter of some percent, with fewer launches and less
/// memory (benches/RESULTS.md).
impl Default for Fusion {
    fn default() -> Self {
        Self::ALL
    }
}
