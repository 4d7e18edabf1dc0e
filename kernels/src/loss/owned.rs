//! Many channels on a GPU without shared memory (an old software driver): a unit owns channels and walks over voxels, and
//! neighbouring units read neighbouring channels. What a voxel's channels share goes through memory: the logarithm of
//! the softmax's denominator, and the mean of the Dice coefficients.

use super::plan::Plan;
use super::sigmoid::sigmoid;
use super::softmax::entropy_weight;
use super::walk::*;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

/// Label and weight of one voxel.
#[cube]
fn read_one<L: Int, W: Numeric>(
    labels: &[L],
    weights: &[W],
    grid: &Grid,
    place: &Place,
    voxel: usize,
    #[comptime] plan: Plan,
) -> (u32, f32) {
    let (label, weight) = read_group::<L, W, Const<1>>(labels, weights, grid, place, voxel, plan);
    (label.extract(0usize), weight.extract(0usize))
}

/// The score of the label of a voxel: its logit, or `log sum exp` of the channels that stand for the background.
#[cube]
fn labelled<E: Float>(
    logits: &Sequence<Box<[E]>>,
    grid: &Grid,
    place: &Place,
    first: usize,
    label: u32,
    #[comptime] plan: Plan,
) -> f32 {
    let mut z = load_one::<E>(logits, place.level, first + label as usize, plan);
    if comptime!(plan.missing) {
        if label == 0 {
            let row = place.sample * comptime!(plan.classes + 1);
            let mut best = z;
            for class in 1..plan.classes {
                if grid.acting[row + class] == 0 {
                    best = best.max(load_one::<E>(logits, place.level, first + class, plan));
                }
            }
            let mut sum = (z - best).exp();
            for class in 1..plan.classes {
                if grid.acting[row + class] == 0 {
                    sum += (load_one::<E>(logits, place.level, first + class, plan) - best).exp();
                }
            }
            z = best + sum.ln();
        }
    }
    z
}

/// `log sum exp` of the logits of each voxel that is not ignored, and the cross-entropy of each voxel if only the
/// largest count; a unit takes one voxel.
#[cube(launch)]
pub(super) fn normaliser_kernel<E: Float, L: Int, W: Numeric>(
    logits: &Sequence<Box<[E]>>,
    labels: &[L],
    weights: &[W],
    grid: &Grid,
    normalisers: &mut [f32],
    entropies: &mut [f32],
    #[comptime] plan: Plan,
    #[define(E)] _logit_type: ElemType,
    #[define(L)] _label_type: ElemType,
    #[define(W)] _weight_type: ElemType,
) {
    let classes = comptime!(plan.classes);
    if ABSOLUTE_POS < grid.voxels {
        let place = voxel_place(grid, ABSOLUTE_POS, plan);
        let (label, weight) = read_one::<L, W>(labels, weights, grid, &place, place.start, plan);
        let mut entropy = 0.0f32;
        if label < comptime!(plan.labels as u32) {
            let first = (place.before + place.start) * classes;
            let mut top = load_one::<E>(logits, place.level, first, plan);
            for class in 1..classes {
                top = top.max(load_one::<E>(logits, place.level, first + class, plan));
            }
            let mut sum = 0.0f32;
            for class in 0..classes {
                sum += (load_one::<E>(logits, place.level, first + class, plan) - top).exp();
            }
            let normaliser = top + sum.ln();
            normalisers[ABSOLUTE_POS] = normaliser;
            if comptime!(plan.top_k) {
                entropy = weight * (normaliser - labelled::<E>(logits, grid, &place, first, label, plan));
            }
        }
        if comptime!(plan.top_k) {
            // Rounding below 0 would rank as the largest of all; NaN stays and does.
            entropies[ABSOLUTE_POS] = select(entropy < 0.0f32, 0.0f32, entropy);
        }
    }
}

/// Pass 1: a row of partial sums of every chunk, see [`Plan::slots`]. `normalisers` is only read for labels.
#[cube(launch)]
pub(super) fn owned_sums_kernel<E: Float, L: Int, W: Numeric>(
    logits: &Sequence<Box<[E]>>,
    labels: &[L],
    weights: &[W],
    grid: &Grid,
    normalisers: &[f32],
    sums: &mut [f32],
    #[comptime] plan: Plan,
    #[define(E)] _logit_type: ElemType,
    #[define(L)] _label_type: ElemType,
    #[define(W)] _weight_type: ElemType,
) {
    let channels = comptime!(plan.classes);
    // The last cubes of a launch may lie behind the last chunk.
    if CUBE_POS < grid.chunks {
        let place = chunk_place(grid, CUBE_POS, plan);
        let row = CUBE_POS * comptime!(plan.slots());
        let acting = place.sample * comptime!(plan.classes + 1);
        for channel in range_stepped(UNIT_POS as usize, channels, plan.walkers) {
            let mut p_sum = 0.0f32;
            let mut hit_sum = 0.0f32;
            let mut truth = 0.0f32;
            let mut entropy_sum = 0.0f32;
            let mut weight_sum = 0.0f32;
            for voxel in place.start..place.end {
                let (label, weight) = read_one::<L, W>(labels, weights, grid, &place, voxel, plan);
                if label < comptime!(plan.labels as u32) {
                    weight_sum += weight;
                    let in_level = place.before + voxel;
                    let z = load_one::<E>(logits, place.level, in_level * channels + channel, plan);
                    if comptime!(plan.regions) {
                        let inside = inside_region(grid, label, channel, plan);
                        if takes_part(grid, acting, channel, plan) {
                            let (p, _slope, one_plus) = sigmoid::<Const<1>>(Vector::new(z));
                            let p = p.extract(0usize) * weight;
                            p_sum += p;
                            hit_sum += select(inside, p, 0.0f32);
                            truth += select(inside, weight, 0.0f32);
                            let positive = select(z > 0.0f32, z, 0.0f32) - select(inside, z, 0.0f32);
                            entropy_sum += (positive + one_plus.extract(0usize).ln()) * weight;
                        }
                    } else {
                        let normaliser = normalisers[place.first_voxel + in_level];
                        let p = (z - normaliser).exp() * weight;
                        p_sum += p;
                        hit_sum += select(label == stands_for(grid, acting, channel, plan), p, 0.0f32);
                        if label == channel as u32 {
                            truth += weight;
                            if comptime!(plan.entropy) {
                                let z = labelled::<E>(logits, grid, &place, in_level * channels, label, plan);
                                entropy_sum += (normaliser - z) * weight;
                            }
                        }
                    }
                }
            }
            if comptime!(plan.dice) {
                sums[row + channel] = p_sum;
                sums[row + comptime!(plan.hits()) + channel] = hit_sum;
                sums[row + comptime!(plan.truth()) + channel] = truth;
            }
            if comptime!(plan.entropy) {
                sums[row + comptime!(plan.entropies()) + channel] = entropy_sum;
            }
            if channel == 0 {
                sums[row + comptime!(plan.weight())] = weight_sum;
            }
        }
    }
}

/// Whether a label belongs to a region.
#[cube]
fn inside_region(grid: &Grid, label: u32, region: usize, #[comptime] plan: Plan) -> bool {
    let word = grid.regions[label as usize * comptime!(plan.classes.div_ceil(32)) + region / 32];
    (word >> (region as u32 % 32)) & 1 != 0
}

/// The label (region) that a channel stands for in a sample.
#[cube]
fn stands_for(grid: &Grid, acting: usize, channel: usize, #[comptime] plan: Plan) -> u32 {
    if comptime!(plan.missing) { grid.acting[acting + channel] } else { channel as u32 }
}

/// Whether a region was annotated in a sample.
#[cube]
fn takes_part(grid: &Grid, acting: usize, channel: usize, #[comptime] plan: Plan) -> bool {
    stands_for(grid, acting, channel, plan) == channel as u32
}

/// `s = sum_k p_k (B_k + [k stands for the label] A_k)` of each voxel that is not ignored, and behind it, where classes
/// are missing, the score of its label; a unit takes one voxel.
#[cube(launch)]
pub(super) fn mean_kernel<E: Float, L: Int, W: Numeric>(
    logits: &Sequence<Box<[E]>>,
    labels: &[L],
    weights: &[W],
    grid: &Grid,
    normalisers: &[f32],
    coefficients: &[f32],
    means: &mut [f32],
    #[comptime] plan: Plan,
    #[define(E)] _logit_type: ElemType,
    #[define(L)] _label_type: ElemType,
    #[define(W)] _weight_type: ElemType,
) {
    let classes = comptime!(plan.classes);
    if ABSOLUTE_POS < grid.voxels {
        let place = voxel_place(grid, ABSOLUTE_POS, plan);
        let (label, _weight) = read_one::<L, W>(labels, weights, grid, &place, place.start, plan);
        if label < comptime!(plan.labels as u32) {
            let first = (place.before + place.start) * classes;
            let mut mean = 0.0f32;
            if comptime!(plan.dice) {
                let normaliser = normalisers[ABSOLUTE_POS];
                let acting = place.sample * comptime!(plan.classes + 1);
                let dice = coefficients_of(grid.batch, place.level, plan) + place.sample * comptime!(2 * plan.classes);
                for class in 0..classes {
                    let p = (load_one::<E>(logits, place.level, first + class, plan) - normaliser).exp();
                    let hit = label == stands_for(grid, acting, class, plan);
                    let a = select(hit, coefficients[dice + 2 * class], 0.0f32);
                    mean += p * (a + coefficients[dice + 2 * class + 1]);
                }
            }
            if comptime!(plan.missing) {
                means[2 * ABSOLUTE_POS] = mean;
                means[2 * ABSOLUTE_POS + 1] = labelled::<E>(logits, grid, &place, first, label, plan);
            } else {
                means[ABSOLUTE_POS] = mean;
            }
        }
    }
}

/// Pass 3; a unit takes one logit. A gradient may be the memory of its logits: of the other logits of the voxel only
/// what lies in `normalisers` and `means` is needed, which are only read for labels.
#[cube(launch)]
pub(super) fn owned_gradient_kernel<E: Float, L: Int, W: Numeric>(
    logits: &Sequence<Box<[E]>>,
    labels: &[L],
    weights: &[W],
    grid: &Grid,
    normalisers: &[f32],
    means: &[f32],
    coefficients: &[f32],
    entropies: &[f32],
    gradients: &mut Sequence<Box<[E]>>,
    #[comptime] plan: Plan,
    #[define(E)] _logit_type: ElemType,
    #[define(L)] _label_type: ElemType,
    #[define(W)] _weight_type: ElemType,
) {
    let channels = comptime!(plan.classes);
    let item = ABSOLUTE_POS / channels;
    if item < grid.voxels {
        let channel = ABSOLUTE_POS % channels;
        let place = voxel_place(grid, item, plan);
        let (label, weight) = read_one::<L, W>(labels, weights, grid, &place, place.start, plan);
        let index = (place.before + place.start) * channels + channel;
        let mut g = 0.0f32;
        if label < comptime!(plan.labels as u32) {
            let acting = place.sample * comptime!(plan.classes + 1);
            let of_level = coefficients_of(grid.batch, place.level, plan);
            let at = of_level + (place.sample * channels + channel) * 2;
            let z = load_one::<E>(logits, place.level, index, plan);
            let entropy =
                entropy_weight::<Const<1>>(coefficients, entropies, grid, &place, place.start, of_level, plan);
            let entropy = entropy.extract(0usize);
            if comptime!(plan.regions) {
                if takes_part(grid, acting, channel, plan) {
                    let inside = inside_region(grid, label, channel, plan);
                    let (p, slope, _one_plus) = sigmoid::<Const<1>>(Vector::new(z));
                    g = entropy * (p.extract(0usize) - select(inside, 1.0f32, 0.0f32));
                    if comptime!(plan.dice) {
                        let a = select(inside, coefficients[at], 0.0f32);
                        g += slope.extract(0usize) * (a + coefficients[at + 1]);
                    }
                }
            } else {
                let hit = label == stands_for(grid, acting, channel, plan);
                let p = (z - normalisers[item]).exp();
                let mean = means[item * comptime!(if plan.missing { 2usize } else { 1usize })];
                let mut of_label = 0.0f32 - entropy;
                if comptime!(plan.missing) {
                    of_label *= select(hit, (z - means[2 * item + 1]).exp(), 0.0f32);
                }
                let mut slope = entropy - mean;
                if comptime!(plan.dice) {
                    slope += coefficients[at + 1];
                    of_label += p * coefficients[at];
                }
                g = p * slope + select(hit, of_label, 0.0f32);
            }
            g *= weight;
        }
        store_one::<E>(gradients, place.level, index, g, plan);
    }
}
