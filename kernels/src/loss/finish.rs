//! Pass 2: partial sums to totals in a fixed order, and totals to the loss and the gradient's coefficients.

use super::plan::LossPlan;
use super::walk::coefficients_at;
use crate::block::strip;
use cubecl::prelude::*;

/// Rows that are added before their sum goes into the next level of the summation.
const BLOCK: usize = 64;

/// Adds up runs of rows of `slots` values: row r of `totals` is the sum of the rows `ranges[2 r]..ranges[2 r + 1]`.
#[cube(launch)]
pub(super) fn reduce_kernel(rows: &[f32], ranges: &[u32], totals: &mut [f32], count: usize, slots: usize) {
    let (low, high) = strip(count * slots);
    for i in low..high {
        let slot = i % slots;
        let range = i / slots * 2;
        let end = ranges[range + 1] as usize;
        let mut total = 0.0f32;
        let mut block = ranges[range] as usize;
        while block < end {
            let mut sum = 0.0f32;
            for row in block..(block + BLOCK).min(end) {
                sum += rows[row * slots + slot];
            }
            total += sum;
            block += BLOCK;
        }
        totals[i] = total;
    }
}

/// What the finalising kernel does; comptime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Finish {
    pub(super) plan: LossPlan,
    /// First class that has a Dice term: 1 skips the background.
    pub(super) first_dice: usize,
    pub(super) batch_dice: bool,
    /// The intersection has a least value.
    pub(super) clip: bool,
    /// The cross-entropy is a mean over regions too.
    pub(super) over_regions: bool,
}

/// Numbers of a loss.
#[derive(CubeLaunch, CubeType)]
pub(super) struct FinishNumbers {
    pub(super) batch: usize,
    pub(super) entropy: f32,
    pub(super) dice: f32,
    pub(super) smooth: f32,
    pub(super) clip: f32,
    /// Factor on the gradient alone (loss scaling).
    pub(super) gradient: f32,
}

/// What the finalising kernel reads.
#[derive(CubeLaunch, CubeType)]
pub(super) struct Totals {
    /// `[levels, batch]` rows, see [`LossPlan::slots`].
    pub(super) sums: Box<[f32]>,
    /// Where only the largest cross-entropies count, `[levels, batch, classes]`: their sums.
    pub(super) largest: Box<[f32]>,
    /// Where only the largest cross-entropies count, of every level: bits of the least of them, and bits of the
    /// share in which those equal to it count.
    pub(super) selection: Box<[u32]>,
    /// Of every level: its weight, and how many cross-entropies count as the largest.
    pub(super) levels: Box<[f32]>,
    /// See [`LevelGrid::acting`](super::walk::Grid).
    pub(super) acting: Box<[u32]>,
}

/// Whether a class was annotated in a sample.
#[cube]
fn present(totals: &Totals, sample: usize, class: usize, #[comptime] finish: Finish) -> bool {
    if comptime!(finish.plan.missing) {
        totals.acting[sample * comptime!(finish.plan.classes + 1) + class] == class as u32
    } else {
        true.runtime()
    }
}

/// The parts of a Dice coefficient.
#[derive(CubeType)]
struct Dice {
    /// Samples that it is of; without any there is no such term.
    samples: u32,
    denominator: f32,
    numerator: f32,
    /// By how much the intersection was raised to its least value.
    raised: f32,
}

/// The Dice coefficient of a class in a sample, or in the whole batch.
#[cube]
fn dice_of(
    totals: &Totals,
    numbers: &FinishNumbers,
    level: usize,
    sample: usize,
    class: usize,
    #[comptime] finish: Finish,
) -> Dice {
    let plan = comptime!(finish.plan);
    let mut p = 0.0f32;
    let mut i = 0.0f32;
    let mut g = 0.0f32;
    let mut samples = 0u32;
    let mut low = sample;
    let mut high = sample + 1;
    if comptime!(finish.batch_dice) {
        low = 0;
        high = numbers.batch;
    }
    for member in low..high {
        if present(totals, member, class, finish) {
            samples += 1;
            let row = (level * numbers.batch + member) * plan.slots();
            p += totals.sums[row + class];
            i += totals.sums[row + plan.hits() + class];
            g += totals.sums[row + plan.truth() + class];
            if comptime!(plan.missing && !plan.regions) {
                if class == 0 {
                    // The background has the probability of the missing classes too.
                    for other in 1..plan.classes {
                        if !present(totals, member, other, finish) {
                            p += totals.sums[row + other];
                            i += totals.sums[row + plan.hits() + other];
                        }
                    }
                }
            }
        }
    }
    let mut raised = 0.0f32;
    if comptime!(finish.clip) {
        raised = numbers.clip.max(i) - i;
    }
    // 2 max(I, c) and 2 max(I, c) + (P - I) + (G - I), each with the smoothing
    let numerator = 2.0f32 * (i + raised) + numbers.smooth;
    let denominator = p + g + 2.0f32 * raised + numbers.smooth;
    Dice { samples, denominator, numerator, raised }
}

/// Below this a Dice denominator counts as this, and as a constant.
const LEAST_DENOMINATOR: f32 = 1e-8;

#[cube]
fn coefficient(dice: &Dice) -> f32 {
    dice.numerator / dice.denominator.max(LEAST_DENOMINATOR)
}

/// Number of Dice terms.
#[cube]
fn count_terms(totals: &Totals, numbers: &FinishNumbers, #[comptime] finish: Finish) -> f32 {
    let dice_classes = comptime!(finish.plan.classes - finish.first_dice);
    let mut terms = 0usize;
    if comptime!(finish.plan.missing) {
        for class in finish.first_dice..finish.plan.classes {
            let mut of_class = 0usize;
            for sample in 0..numbers.batch {
                of_class += usize::cast_from(present(totals, sample, class, finish));
            }
            if comptime!(finish.batch_dice) {
                of_class = of_class.min(1);
            }
            terms += of_class;
        }
    } else if comptime!(finish.batch_dice) {
        terms = dice_classes.runtime();
    } else {
        terms = numbers.batch * dice_classes;
    }
    f32::cast_from(terms)
}

/// What the sum of a level's cross-entropies is divided by.
#[cube]
fn elements_of(totals: &Totals, numbers: &FinishNumbers, level: usize, #[comptime] finish: Finish) -> f32 {
    let plan = comptime!(finish.plan);
    let mut elements = 0.0f32;
    if comptime!(plan.top_k) {
        elements = totals.levels[2 * level + 1];
    } else {
        for sample in 0..numbers.batch {
            let mut weight = totals.sums[(level * numbers.batch + sample) * plan.slots() + plan.weight()];
            if comptime!(finish.over_regions) {
                let mut regions = plan.classes.runtime();
                if comptime!(plan.missing) {
                    regions = 0;
                    for region in 0..plan.classes {
                        regions += usize::cast_from(present(totals, sample, region, finish));
                    }
                }
                weight *= f32::cast_from(regions);
            }
            elements += weight;
        }
    }
    elements
}

/// The part of a channel in a level's cross-entropy.
#[cube]
fn entropy_of(
    totals: &Totals,
    numbers: &FinishNumbers,
    level: usize,
    channel: usize,
    elements: f32,
    #[comptime] finish: Finish,
) -> f32 {
    let plan = comptime!(finish.plan);
    let mut sum = 0.0f32;
    for sample in 0..numbers.batch {
        let row = level * numbers.batch + sample;
        if comptime!(plan.top_k) {
            sum += totals.largest[row * plan.classes + channel];
        } else if comptime!(plan.entropy) {
            sum += totals.sums[row * plan.slots() + plan.entropies() + channel];
        }
    }
    // Not 0 / 0 where nothing is annotated.
    select(elements > 0.0f32, sum / elements, 0.0f32)
}

/// One unit for each class, and one for the loss. See [`super::value_and_gradient`] for the layout of `loss`, and
/// [`TAIL`](super::plan::TAIL) for that of `coefficients`.
#[cube(launch)]
pub(super) fn finish_kernel(
    totals: &Totals,
    coefficients: &mut [f32],
    loss: &mut [f32],
    numbers: &FinishNumbers,
    #[comptime] finish: Finish,
) {
    let plan = comptime!(finish.plan);
    let classes = comptime!(finish.plan.classes);
    let (low, high) = strip(classes + 1);
    let terms = count_terms(totals, numbers, finish);
    for class in low..high {
        if class < classes {
            let mut coefficient_sum = 0.0f32;
            let mut entropy_sum = 0.0f32;
            for level in 0..plan.levels {
                let weight = totals.levels[2 * level];
                if comptime!(plan.entropy || plan.top_k) {
                    let elements = elements_of(totals, numbers, level, finish);
                    entropy_sum += weight * entropy_of(totals, numbers, level, class, elements, finish);
                }
                if comptime!(plan.dice) {
                    let mut sum = 0.0f32;
                    let mut samples = 0usize;
                    for sample in 0..numbers.batch {
                        // The class whose term the channel takes part in.
                        let mut stands_for = class;
                        if comptime!(plan.missing) {
                            let acting = totals.acting[sample * comptime!(plan.classes + 1) + class] as usize;
                            stands_for = acting.min(classes);
                        }
                        let mut a = 0.0f32;
                        let mut b = 0.0f32;
                        if stands_for >= finish.first_dice && stands_for < classes {
                            let dice = dice_of(totals, numbers, level, sample, stands_for, finish);
                            let scale = numbers.gradient * weight * numbers.dice / terms;
                            let constant = dice.denominator < LEAST_DENOMINATOR;
                            let d = dice.denominator.max(LEAST_DENOMINATOR);
                            b = select(constant, 0.0f32, scale * dice.numerator / (d * d));
                            a = select(dice.raised > 0.0f32, -2.0f32 * b, -2.0f32 * scale / d);
                            if stands_for == class {
                                sum += dice.numerator / d;
                                samples += 1;
                            }
                        }
                        let at = coefficients_at(numbers.batch, level, plan) + (sample * classes + class) * 2;
                        coefficients[at] = a;
                        coefficients[at + 1] = b;
                    }
                    coefficient_sum += select(samples > 0, weight * sum / f32::cast_from(samples), 0.0f32);
                }
            }
            if class >= finish.first_dice {
                loss[class + 3 - finish.first_dice] = coefficient_sum;
            }
            loss[3 + classes - finish.first_dice + class] = entropy_sum;
        } else {
            let mut entropy_sum = 0.0f32;
            let mut dice_sum = 0.0f32;
            for level in 0..plan.levels {
                let weight = totals.levels[2 * level];
                let tail = coefficients_at(numbers.batch, level, plan) + 2 * numbers.batch * classes;
                if comptime!(plan.entropy || plan.top_k) {
                    let elements = elements_of(totals, numbers, level, finish);
                    let mut entropy = 0.0f32;
                    for channel in 0..classes {
                        entropy += entropy_of(totals, numbers, level, channel, elements, finish);
                    }
                    entropy_sum += weight * entropy;
                    let scale = numbers.gradient * weight * numbers.entropy / elements;
                    coefficients[tail] = select(elements > 0.0f32, scale, 0.0f32);
                }
                if comptime!(plan.top_k) {
                    coefficients[tail + 1] = f32::reinterpret(totals.selection[2 * level]);
                    coefficients[tail + 2] = f32::reinterpret(totals.selection[2 * level + 1]);
                }
                if comptime!(plan.dice) {
                    let mut samples = numbers.batch;
                    if comptime!(finish.batch_dice) {
                        samples = 1;
                    }
                    let mut sum = 0.0f32;
                    for sample in 0..samples {
                        for class in finish.first_dice..classes {
                            let dice = dice_of(totals, numbers, level, sample, class, finish);
                            if dice.samples > 0 {
                                sum += coefficient(&dice);
                            }
                        }
                    }
                    dice_sum -= weight * select(terms > 0.0f32, sum / terms, 0.0f32);
                }
            }
            loss[0] = numbers.entropy * entropy_sum + numbers.dice * dice_sum;
            loss[1] = entropy_sum;
            loss[2] = dice_sum;
        }
    }
}
