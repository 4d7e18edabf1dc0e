//! Pass 2: partial sums to totals in a fixed order, and totals to the loss and the gradient's coefficients.

use crate::block::strip;
use cubecl::prelude::*;

/// Rows that are added before their sum goes into the next level of the summation.
const BLOCK: usize = 64;

/// Adds up groups of `group` rows: `[batch, rows, slots]` to `[batch, ceil(rows / group), slots]`, for the f32
/// sums and for the counts.
#[cube(launch)]
pub(super) fn reduce_kernel(
    sums: &[f32],
    counts: &[u32],
    reduced_sums: &mut [f32],
    reduced_counts: &mut [u32],
    batch: usize,
    rows: usize,
    group: usize,
    sum_slots: usize,
    count_slots: usize,
) {
    let groups = (rows + group - 1) / group;
    let slots = sum_slots + count_slots;
    let (low, high) = strip(batch * groups * slots);
    for i in low..high {
        let slot = i % slots;
        let target = i / slots;
        let sample = target / groups;
        let start = (target % groups) * group;
        let end = (start + group).min(rows);
        if slot < sum_slots {
            let mut total = 0.0f32;
            let mut block = start;
            while block < end {
                let mut sum = 0.0f32;
                for row in block..(block + BLOCK).min(end) {
                    sum += sums[(sample * rows + row) * sum_slots + slot];
                }
                total += sum;
                block += BLOCK;
            }
            reduced_sums[target * sum_slots + slot] = total;
        } else {
            let slot = slot - sum_slots;
            let mut total = 0u32;
            for row in start..end {
                total += counts[(sample * rows + row) * count_slots + slot];
            }
            reduced_counts[target * count_slots + slot] = total;
        }
    }
}

/// What the finalising kernel does; comptime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Finish {
    pub(super) classes: usize,
    /// Length of a row of sums: `[P.., cross-entropy, I.., more cross-entropy..]`.
    pub(super) sum_slots: usize,
    /// First class that has a Dice term: 1 skips the background.
    pub(super) first_dice: usize,
    pub(super) batch_dice: bool,
    /// The cross-entropy is a mean over channels too.
    pub(super) channel_mean: bool,
    /// First level of a launch sequence: the loss is overwritten, else added to.
    pub(super) overwrite: bool,
}

/// Numbers of one level.
#[derive(CubeLaunch, CubeType)]
pub(super) struct Weights {
    pub(super) batch: usize,
    pub(super) level: f32,
    pub(super) entropy: f32,
    pub(super) dice: f32,
    pub(super) smooth: f32,
    /// Factor on the gradient alone (loss scaling).
    pub(super) gradient: f32,
}

/// Denominator and numerator of a Dice term: of one sample, or of the batch's sums.
#[cube]
fn dice_parts(
    sums: &[f32],
    counts: &[u32],
    weights: &Weights,
    sample: usize,
    class: usize,
    #[comptime] finish: Finish,
) -> (f32, f32) {
    let sum_slots = finish.sum_slots;
    let count_slots = comptime!(finish.classes + 1);
    let mut p = 0.0f32;
    let mut i = 0.0f32;
    let mut g = 0u32;
    let mut low = sample;
    let mut high = sample + 1;
    if comptime!(finish.batch_dice) {
        low = 0;
        high = weights.batch;
    }
    for sample in low..high {
        p += sums[sample * sum_slots + class];
        i += sums[sample * sum_slots + comptime!(finish.classes + 1) + class];
        g += counts[sample * count_slots + class];
    }
    (f32::cast_from(g) + p + weights.smooth, 2.0f32 * i + weights.smooth)
}

/// Below this a Dice denominator counts as this, and as a constant.
const LEAST_DENOMINATOR: f32 = 1e-8;

/// One unit for each class, and one for the loss. See [`super::value_and_gradient`] for the layout of `loss`,
/// and the gradient kernels for that of `coefficients`.
#[cube(launch)]
pub(super) fn finish_kernel(
    sums: &[f32],
    counts: &[u32],
    coefficients: &mut [f32],
    loss: &mut [f32],
    weights: Weights,
    #[comptime] finish: Finish,
) {
    let classes = comptime!(finish.classes);
    let sum_slots = finish.sum_slots;
    let count_slots = comptime!(finish.classes + 1);
    let dice_classes = comptime!(finish.classes - finish.first_dice);
    let batch = weights.batch;
    let mut samples = batch;
    if comptime!(finish.batch_dice) {
        samples = 1;
    }
    let terms = f32::cast_from(samples * dice_classes);
    let (low, high) = strip(classes + 1);
    for class in low..high {
        if class < classes {
            let mut of_class = 0.0f32;
            for sample in 0..batch {
                let mut a = 0.0f32;
                let mut b = 0.0f32;
                if class >= finish.first_dice {
                    let (denominator, numerator) = dice_parts(sums, counts, &weights, sample, class, finish);
                    let d = denominator.max(LEAST_DENOMINATOR);
                    let dice = numerator / d;
                    of_class += dice;
                    let scale = weights.gradient * weights.level * weights.dice / terms;
                    a = 0.0f32 - 2.0f32 * scale / d;
                    b = select(denominator < LEAST_DENOMINATOR, 0.0f32, scale * dice / d);
                }
                let at = (sample * classes + class) * 2;
                coefficients[at] = a;
                coefficients[at + 1] = b;
            }
            if class >= finish.first_dice {
                let at = class + comptime!(3 - finish.first_dice);
                let mean = weights.level * of_class / f32::cast_from(batch);
                if comptime!(finish.overwrite) {
                    loss[at] = mean;
                } else {
                    loss[at] += mean;
                }
            }
        } else {
            let mut valid = 0u32;
            let mut entropy_sum = 0.0f32;
            for sample in 0..batch {
                valid += counts[sample * count_slots + classes];
                entropy_sum += sums[sample * sum_slots + classes];
                for slot in comptime!(2 * finish.classes + 1)..sum_slots {
                    entropy_sum += sums[sample * sum_slots + slot];
                }
            }
            let mut elements = f32::cast_from(valid);
            if comptime!(finish.channel_mean) {
                elements *= comptime!(finish.classes as f32);
            }
            let mut entropy = 0.0f32;
            let mut entropy_scale = 0.0f32;
            if valid > 0 {
                entropy = entropy_sum / elements;
                entropy_scale = weights.gradient * weights.level * weights.entropy / elements;
            }
            coefficients[batch * classes * 2] = entropy_scale;

            let mut dice_sum = 0.0f32;
            for sample in 0..samples {
                for class in finish.first_dice..classes {
                    let (denominator, numerator) = dice_parts(sums, counts, &weights, sample, class, finish);
                    dice_sum += numerator / denominator.max(LEAST_DENOMINATOR);
                }
            }
            let dice = 0.0f32 - dice_sum / terms;
            let total = weights.level * (weights.entropy * entropy + weights.dice * dice);
            if comptime!(finish.overwrite) {
                loss[0] = total;
                loss[1] = weights.level * entropy;
                loss[2] = weights.level * dice;
            } else {
                loss[0] += total;
                loss[1] += weights.level * entropy;
                loss[2] += weights.level * dice;
            }
        }
    }
}
