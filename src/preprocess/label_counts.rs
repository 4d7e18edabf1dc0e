//! Which labels occur, and how often.

use ndarray::ArrayView3;
use std::collections::BTreeMap;

/// How many voxels have each label that occurs.
pub fn label_counts(seg: ArrayView3<i16>) -> BTreeMap<i16, u64> {
    let mut counts = BTreeMap::new();
    // Neighbours mostly have the same label: runs are counted, not voxels.
    let (mut current, mut run) = (0, 0);
    for &label in seg {
        if label != current {
            if run > 0 {
                *counts.entry(current).or_insert(0) += run;
            }
            (current, run) = (label, 0);
        }
        run += 1;
    }
    if run > 0 {
        *counts.entry(current).or_insert(0) += run;
    }
    counts
}

/// Values of a label map that are not among the `expected` ones, each with the number of its voxels.
pub(crate) fn undeclared(map: ArrayView3<i16>, expected: &[i16]) -> Vec<(i16, u64)> {
    label_counts(map).into_iter().filter(|(label, _)| !expected.contains(label)).collect()
}
