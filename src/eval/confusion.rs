//! Counting agreement, and the Dice that training shows after each epoch.

use std::collections::HashMap;

use ndarray::ArrayView3;

use crate::dataset::labels::first_maximum;
use crate::dataset::{LabelGroup, LabelManager};
use crate::error::{Error, Result};

/// Voxels by what was predicted and what is true.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Confusion {
    /// Predicted and true.
    pub true_positives: u64,
    /// Predicted, not true.
    pub false_positives: u64,
    /// True, not predicted.
    pub false_negatives: u64,
    /// Neither.
    pub true_negatives: u64,
}

impl Confusion {
    /// Counts one label or region over all voxels whose reference is not `ignore`. Shapes must agree.
    pub fn count(
        prediction: ArrayView3<i16>,
        reference: ArrayView3<i16>,
        group: &LabelGroup,
        ignore: Option<i16>,
    ) -> Self {
        JointHistogram::count(prediction, reference).confusion(group, ignore)
    }

    /// `2 TP / (2 TP + FP + FN)`; NaN if there is neither prediction nor truth.
    pub fn dice(&self) -> f64 {
        let doubled = 2 * self.true_positives;
        let all = doubled + self.false_positives + self.false_negatives;
        doubled as f64 / all as f64
    }

    /// `TP / (TP + FP + FN)`; NaN if there is neither prediction nor truth.
    pub fn iou(&self) -> f64 {
        let all = self.true_positives + self.false_positives + self.false_negatives;
        self.true_positives as f64 / all as f64
    }
}

impl std::ops::AddAssign for Confusion {
    fn add_assign(&mut self, other: Self) {
        self.true_positives += other.true_positives;
        self.false_positives += other.false_positives;
        self.false_negatives += other.false_negatives;
        self.true_negatives += other.true_negatives;
    }
}

/// How many voxels hold each pair of a predicted and a true label: one pass over both maps, whatever number of labels and
/// regions is then counted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct JointHistogram {
    /// Predicted label, true label, voxels; sorted.
    pairs: Vec<(i16, i16, u64)>,
}

impl JointHistogram {
    /// Counts all voxels. Shapes must agree.
    pub fn count(prediction: ArrayView3<i16>, reference: ArrayView3<i16>) -> Self {
        let (prediction, reference) = (prediction.as_standard_layout(), reference.as_standard_layout());
        // Both are in standard layout now.
        let predicted = prediction.as_slice().unwrap_or_default();
        let truth = reference.as_slice().unwrap_or_default();
        let mut counts: HashMap<(i16, i16), u64> = HashMap::new();
        let mut last = (predicted.first().copied().unwrap_or(0), truth.first().copied().unwrap_or(0));
        let mut run = 0;
        // Label maps are runs of equal labels, mostly: a whole piece is compared with the last pair at once.
        for (predicted, truth) in predicted.chunks(32).zip(truth.chunks(32)) {
            let both = predicted.iter().zip(truth);
            if both.clone().fold(0, |differs, (p, t)| differs | (p ^ last.0) | (t ^ last.1)) == 0 {
                run += predicted.len() as u64;
                continue;
            }
            for (&p, &t) in both {
                if (p, t) != last {
                    *counts.entry(last).or_default() += run;
                    (last, run) = ((p, t), 0);
                }
                run += 1;
            }
        }
        *counts.entry(last).or_default() += run;
        let mut pairs: Vec<_> =
            counts.into_iter().filter(|(_, n)| *n > 0).map(|((predicted, truth), n)| (predicted, truth, n)).collect();
        pairs.sort_unstable();
        JointHistogram { pairs }
    }

    /// The counts of one label or region over all voxels whose reference is not `ignore`.
    pub fn confusion(&self, group: &LabelGroup, ignore: Option<i16>) -> Confusion {
        let mut counts = Confusion::default();
        for &(predicted, truth, voxels) in self.pairs.iter().filter(|(_, truth, _)| Some(*truth) != ignore) {
            let count = match (group.contains(predicted), group.contains(truth)) {
                (true, true) => &mut counts.true_positives,
                (true, false) => &mut counts.false_positives,
                (false, true) => &mut counts.false_negatives,
                (false, false) => &mut counts.true_negatives,
            };
            *count += voxels;
        }
        counts
    }

    /// Predicted label, true label and voxels of every pair that occurs.
    pub fn pairs(&self) -> &[(i16, i16, u64)] {
        &self.pairs
    }
}

/// Dice over the validation patches of an epoch, as if they were one volume: counts are summed first. An estimate only,
/// because patches are not whole cases.
#[derive(Debug, Clone, PartialEq)]
pub struct PseudoDice {
    labels: LabelManager,
    groups: Vec<LabelGroup>,
    counts: Vec<Confusion>,
}

impl PseudoDice {
    /// No voxels yet.
    pub fn new(labels: &LabelManager) -> Self {
        let groups = labels.foreground();
        PseudoDice { labels: labels.clone(), counts: vec![Confusion::default(); groups.len()], groups }
    }

    /// Adds patches: logits `[..., heads]` and targets `[...]` with the ignore label as its value, 0 where there is no image.
    ///
    /// # Errors
    /// [`Error::BufferLength`] if they do not cover the same voxels.
    pub fn add_logits(&mut self, logits: &[f32], target: &[i16]) -> Result<()> {
        let heads = self.labels.num_segmentation_heads();
        if logits.len() != heads * target.len() {
            return Err(Error::BufferLength {
                what: "logits of the target's voxels",
                found: logits.len(),
                expected: heads * target.len(),
            });
        }
        let ignore = self.labels.ignore_label();
        for (voxel, &label) in logits.chunks_exact(heads).zip(target) {
            if Some(label) == ignore {
                continue;
            }
            // Nothing is predicted where a logit is no number.
            let best = (!voxel.iter().any(|score| score.is_nan())).then(|| first_maximum(voxel));
            for (head, (group, counts)) in self.groups.iter().zip(&mut self.counts).enumerate() {
                let predicted = match self.labels.has_regions() {
                    true => voxel[head] > 0.0,
                    // Head 0 is background.
                    false => best == Some(head + 1),
                };
                match (predicted, group.contains(label)) {
                    (true, true) => counts.true_positives += 1,
                    (true, false) => counts.false_positives += 1,
                    (false, true) => counts.false_negatives += 1,
                    (false, false) => counts.true_negatives += 1,
                }
            }
        }
        Ok(())
    }

    /// Adds counts made elsewhere, one per foreground label or region.
    ///
    /// # Errors
    /// [`Error::BufferLength`] for another number of counts.
    pub fn add_counts(&mut self, counts: &[Confusion]) -> Result<()> {
        if counts.len() != self.counts.len() {
            return Err(Error::BufferLength {
                what: "counts per class",
                found: counts.len(),
                expected: self.counts.len(),
            });
        }
        for (sum, added) in self.counts.iter_mut().zip(counts) {
            *sum += *added;
        }
        Ok(())
    }

    /// Dice of each foreground label or region; NaN where the epoch showed and predicted none of it.
    pub fn per_class(&self) -> Vec<f64> {
        self.counts.iter().map(Confusion::dice).collect()
    }

    /// Mean over the classes that have a Dice; NaN if none has.
    pub fn mean(&self) -> f64 {
        nan_mean(self.per_class().into_iter())
    }
}

/// Mean of the values that are numbers; NaN if there are none.
pub(crate) fn nan_mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) =
        values.filter(|value| !value.is_nan()).fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    sum / count
}
