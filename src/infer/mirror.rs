//! Test-time augmentation by mirroring.

/// All subsets of the allowed axes (depth, height, width), the empty one first: three axes give eight passes.
///
/// Each pass flips the patch with [`flip`](crate::augment::flip), predicts, and flips the logits back; logits of all passes
/// are averaged.
pub fn mirror_subsets(allowed: [bool; 3]) -> Vec<[bool; 3]> {
    (0..8u8)
        .map(|bits| [bits & 1 != 0, bits & 2 != 0, bits & 4 != 0])
        .filter(|subset| subset.iter().zip(allowed).all(|(&flip, ok)| ok || !flip))
        .collect()
}
