//! Exclusive labels: softmax, soft Dice, cross-entropy.
//!
//! A group is `N` neighbouring voxels, one in each lane; the classes are a loop. That keeps exponentials,
//! logarithms and divisions in vectors, needs no sum across lanes per voxel, and lets any number of classes
//! use the same few registers. On a GPU `N` is 1: a unit's group is one voxel.

use super::channels::*;
use super::plan::LossPlan;
use super::walk::*;
use crate::block::strip;
use crate::vector_math::{exp, ln};
use cubecl::ir::ElemType;
use cubecl::prelude::*;

/// Values that `per_voxel` keeps for a class: I, G and cross-entropy.
const PER_CLASS: usize = 3;
/// Neighbouring voxels add to as many copies of them: mostly they have the same label, and an addition would wait for
/// the one before.
const COPIES: usize = 4;

/// Reads the logits of a group, zeros where a voxel does not count, and leaves `exp(z - max)` in `exponents`.
/// Returns their sum and `max - z` of the labelled class. Where classes are missing, the z of the background is
/// `log sum exp` of the channels that stand for it, and `z - max` is left in `shifted`.
#[cube]
fn exponentiate<E: Float, N: Size>(
    logits: &Sequence<Box<[E]>>,
    grid: &LevelGrid,
    place: &Place,
    voxel: usize,
    label: Vector<u32, N>,
    exponents: &mut Array<Vector<f32, N>>,
    shifted: &mut Array<Vector<f32, N>>,
    #[comptime] plan: LossPlan,
) -> (Vector<f32, N>, Vector<f32, N>) {
    let classes = comptime!(plan.classes);
    let counts = label.less_than(&Vector::new(classes as u32));
    let first = (place.before + voxel) * classes;
    let top = load_group::<E, N>(logits, place.level, first, counts, exponents, plan);
    let mut labelled = Vector::<f32, N>::new(0.0f32);
    if comptime!(plan.per_voxel) {
        #[unroll]
        for lane in 0..N::value() {
            let class = label.extract(lane).min(comptime!(classes as u32 - 1));
            labelled.insert(lane, exponents[class as usize].extract(lane));
        }
    } else {
        #[unroll(plan.unroll)]
        for class in 0..classes {
            labelled = select_many(label.equal(&Vector::new(class as u32)), exponents[class], labelled);
        }
    }
    if comptime!(plan.missing) {
        let row = place.sample * comptime!(plan.classes + 1);
        let mut best = exponents[0];
        for class in 1..classes {
            if grid.acting[row + class] == 0 {
                best = select_many(exponents[class].greater_than(&best), exponents[class], best);
            }
        }
        let mut merged = exp::<N>(exponents[0] - best);
        for class in 1..classes {
            if grid.acting[row + class] == 0 {
                merged += exp::<N>(exponents[class] - best);
            }
        }
        labelled = select_many(label.equal(&Vector::new(0u32)), best + ln::<N>(merged), labelled);
    }
    let mut sum = Vector::<f32, N>::new(0.0f32);
    #[unroll(plan.unroll)]
    for class in 0..classes {
        let below = exponents[class] - top;
        if comptime!(plan.missing) {
            shifted[class] = below;
        }
        let e = exp::<N>(below);
        exponents[class] = e;
        sum += e;
    }
    (sum, top - labelled)
}

/// Adds a group of voxels to a row of partial sums. With `per_voxel`, `sums` holds P and the weight only, and I, G
/// and cross-entropy of each class are in `hits`, a few additions a voxel, whose last class takes the ignored
/// voxels.
#[cube]
fn add_group<E: Float, L: Int, W: Numeric, N: Size>(
    logits: &Sequence<Box<[E]>>,
    labels: &[L],
    weights: &[W],
    grid: &LevelGrid,
    place: &Place,
    voxel: usize,
    entropies: &mut [f32],
    exponents: &mut Array<Vector<f32, N>>,
    shifted: &mut Array<Vector<f32, N>>,
    sums: &mut Array<Vector<f32, N>>,
    hits: &mut Array<f32>,
    #[comptime] plan: LossPlan,
) {
    let classes = comptime!(plan.classes);
    let zero = Vector::<f32, N>::new(0.0f32);
    let (label, weight) = read_group::<L, W, N>(labels, weights, grid, place, voxel, plan);
    let mut entropy = Vector::<f32, N>::new(0.0f32);
    if any_counts::<N>(label, plan) {
        let valid = label.less_than(&Vector::new(classes as u32));
        let (sum, below_top) = exponentiate::<E, N>(logits, grid, place, voxel, label, exponents, shifted, plan);
        if comptime!(plan.entropy || plan.top_k) {
            entropy = select_many(valid, weight * (ln::<N>(sum) + below_top), zero);
        }
        let counted = select_many(valid, weight, zero);
        let weight_slot = comptime!(if plan.per_voxel { classes } else { plan.weight() });
        sums[weight_slot] += counted;
        let scale = select_many(valid, weight / sum, zero);
        #[unroll(plan.unroll)]
        for class in 0..classes {
            let hit = label.equal(&Vector::new(class as u32));
            if comptime!(plan.dice) {
                let p = exponents[class] * scale;
                sums[class] += p;
                if comptime!(!plan.per_voxel) {
                    let mut stands_for = hit;
                    if comptime!(plan.missing) {
                        let row = place.sample * comptime!(plan.classes + 1);
                        stands_for = label.equal(&Vector::new(grid.acting[row + class]));
                    }
                    sums[comptime!(plan.hits()) + class] += select_many(stands_for, p, zero);
                    sums[comptime!(plan.truth()) + class] += select_many(hit, weight, zero);
                }
            }
            if comptime!(plan.entropy && !plan.per_voxel) {
                sums[comptime!(plan.entropies()) + class] += select_many(hit, entropy, zero);
            }
        }
        if comptime!(plan.per_voxel) {
            let p = exp::<N>(zero - below_top) * scale;
            #[unroll]
            for lane in 0..N::value() {
                let copy = comptime!(lane % COPIES * PER_CLASS * (plan.classes + 1));
                let at = copy + label.extract(lane) as usize * PER_CLASS;
                if comptime!(plan.dice) {
                    hits[at] += p.extract(lane);
                    hits[at + 1] += counted.extract(lane);
                }
                if comptime!(plan.entropy) {
                    hits[at + 2] += entropy.extract(lane);
                }
            }
        }
    }
    if comptime!(plan.top_k) {
        // Rounding below 0 would rank as the largest of all; NaN stays and does.
        let entropy = select_many(entropy.less_than(&zero), zero, entropy);
        #[unroll]
        for lane in 0..N::value() {
            entropies[place.first_voxel + place.before + voxel + lane] = entropy.extract(lane);
        }
    }
}

/// Pass 1: rows of partial sums of every chunk, see [`LossPlan::slots`]. `entropies` takes the cross-entropy of every
/// voxel if only the largest count.
#[cube(launch)]
pub(super) fn softmax_sums_kernel<E: Float, L: Int, W: Numeric, N: Size>(
    logits: &Sequence<Box<[E]>>,
    labels: &[L],
    weights: &[W],
    grid: &LevelGrid,
    sums: &mut [f32],
    entropies: &mut [f32],
    #[comptime] plan: LossPlan,
    #[define(E)] _logit_type: ElemType,
    #[define(L)] _label_type: ElemType,
    #[define(W)] _weight_type: ElemType,
) {
    let classes = comptime!(plan.classes);
    let lanes = N::value();
    // Accumulators that the plan does not use have one entry.
    let vector_sums = comptime!(if plan.per_voxel { plan.classes + 1 } else { plan.slots() });
    let hit_len = comptime!(if plan.per_voxel { COPIES * PER_CLASS * (plan.classes + 1) } else { 1 });
    let shifted_len = comptime!(if plan.missing { plan.classes } else { 1 });

    let (low, high) = strip(grid.chunks);
    for item in low..high {
        let place = chunk_place(grid, item, plan);
        let (first, groups) = groups_of::<N>(&place);

        let mut wide = Array::<Vector<f32, N>>::new(vector_sums);
        let mut exponents = Array::<Vector<f32, N>>::new(classes);
        let mut shifted = Array::<Vector<f32, N>>::new(shifted_len);
        let mut rest = Array::<Vector<f32, Const<1>>>::new(vector_sums);
        let mut hits = Array::<f32>::new(hit_len);

        for group in 0..groups {
            add_group::<E, L, W, N>(
                logits,
                labels,
                weights,
                grid,
                &place,
                first + group * lanes,
                entropies,
                &mut exponents,
                &mut shifted,
                &mut wide,
                &mut hits,
                plan,
            );
        }
        if comptime!(lanes > 1) {
            let mut exponents = Array::<Vector<f32, Const<1>>>::new(classes);
            let mut shifted = Array::<Vector<f32, Const<1>>>::new(shifted_len);
            for i in 0..place.end - place.start - groups * lanes {
                let voxel = voxel_beside(&place, first, groups * lanes, i);
                add_group::<E, L, W, Const<1>>(
                    logits,
                    labels,
                    weights,
                    grid,
                    &place,
                    voxel,
                    entropies,
                    &mut exponents,
                    &mut shifted,
                    &mut rest,
                    &mut hits,
                    plan,
                );
            }
        }

        let row = item * comptime!(plan.slots());
        if comptime!(plan.per_voxel) {
            let values = comptime!(PER_CLASS * (plan.classes + 1));
            for i in 0..values {
                for copy in 1..COPIES {
                    hits[i] += hits[copy * values + i];
                }
            }
            for class in 0..classes {
                if comptime!(plan.dice) {
                    sums[row + class] = lane_sum::<N>(wide[class]) + rest[class].extract(0usize);
                    sums[row + comptime!(plan.hits()) + class] = hits[class * PER_CLASS];
                    sums[row + comptime!(plan.truth()) + class] = hits[class * PER_CLASS + 1];
                }
                if comptime!(plan.entropy) {
                    sums[row + comptime!(plan.entropies()) + class] = hits[class * PER_CLASS + 2];
                }
            }
            let weight = lane_sum::<N>(wide[classes]) + rest[classes].extract(0usize);
            sums[row + comptime!(plan.weight())] = weight;
        } else {
            write_row::<N>(&wide, &rest, sums, row, plan);
        }
    }
}

/// Writes the gradient of a group of voxels, for a voxel of weight w
/// `w (p_c (B_c + e - s) + [c stands for the label] (p_c A_c - e p_c / q))` with
/// `s = sum_k p_k (B_k + [k stands for the label] A_k)`, where A, B are the Dice coefficients of the sample, `e` the
/// weight of the cross-entropy, and q the sum of the p that stand for the label: p_c itself, unless c is the
/// background and classes are missing.
#[cube]
fn write_group<E: Float, L: Int, W: Numeric, N: Size>(
    logits: &Sequence<Box<[E]>>,
    labels: &[L],
    weights: &[W],
    grid: &LevelGrid,
    place: &Place,
    voxel: usize,
    coefficients: &[f32],
    entropies: &[f32],
    gradients: &mut Sequence<Box<[E]>>,
    exponents: &mut Array<Vector<f32, N>>,
    shifted: &mut Array<Vector<f32, N>>,
    #[comptime] plan: LossPlan,
) {
    let classes = comptime!(plan.classes);
    let zero = Vector::<f32, N>::new(0.0f32);
    let first = (place.before + voxel) * classes;
    let (label, weight) = read_group::<L, W, N>(labels, weights, grid, place, voxel, plan);
    if any_counts::<N>(label, plan) {
        let valid = label.less_than(&Vector::new(classes as u32));
        let (sum, below_top) = exponentiate::<E, N>(logits, grid, place, voxel, label, exponents, shifted, plan);
        let scale = Vector::<f32, N>::new(1.0f32) / sum;
        let acting = place.sample * comptime!(plan.classes + 1);
        let of_level = coefficients_at(grid.batch, place.level, plan);
        let dice = of_level + place.sample * comptime!(2 * plan.classes);
        let entropy = entropy_weight::<N>(coefficients, entropies, grid, place, voxel, of_level, plan);

        let mut mean = Vector::<f32, N>::new(0.0f32);
        // With many classes the labelled one is looked up instead of compared with each of them.
        let mut a = Vector::<f32, N>::new(0.0f32);
        let mut b = Vector::<f32, N>::new(0.0f32);
        let mut e = Vector::<f32, N>::new(0.0f32);
        if comptime!(plan.per_voxel) {
            e = exp::<N>(zero - below_top);
        }
        if comptime!(plan.dice) {
            #[unroll(plan.unroll)]
            for class in 0..classes {
                let at = dice + 2 * class;
                mean += exponents[class] * Vector::new(coefficients[at + 1]);
                if comptime!(!plan.per_voxel) {
                    let hit = stands_for::<N>(label, grid, acting, class, plan);
                    mean += select_many(hit, exponents[class] * Vector::new(coefficients[at]), zero);
                }
            }
            if comptime!(plan.per_voxel) {
                #[unroll]
                for lane in 0..N::value() {
                    let class = label.extract(lane).min(comptime!(classes as u32 - 1)) as usize;
                    a.insert(lane, coefficients[dice + 2 * class]);
                    b.insert(lane, coefficients[dice + 2 * class + 1]);
                }
                mean += e * a;
            }
            mean *= scale;
        }
        let base = entropy - mean;
        let mut of_labelled = zero;
        if comptime!(plan.per_voxel) {
            of_labelled = select_many(valid, (e * scale * (base + b + a) - entropy) * weight, zero);
        }
        #[unroll(plan.unroll)]
        for class in 0..classes {
            let p = exponents[class] * scale;
            let at = dice + 2 * class;
            let mut slope = base;
            if comptime!(plan.dice) {
                slope += Vector::new(coefficients[at + 1]);
            }
            let mut g = p * slope;
            if comptime!(!plan.per_voxel) {
                let hit = stands_for::<N>(label, grid, acting, class, plan);
                let mut of_label = zero - entropy;
                if comptime!(plan.missing) {
                    of_label *= exp::<N>(shifted[class] + below_top);
                }
                if comptime!(plan.dice) {
                    of_label += p * Vector::new(coefficients[at]);
                }
                g += select_many(hit, of_label, zero);
            }
            g = select_many(valid, g * weight, zero);
            if comptime!(plan.per_voxel) {
                g = select_many(label.equal(&Vector::new(class as u32)), of_labelled, g);
            }
            exponents[class] = g;
        }
        store_group::<E, N>(gradients, place.level, first, exponents, plan);
    } else {
        let lanes = N::value();
        clear::<E>(gradients, place.level, first, comptime!(lanes * plan.classes), plan);
    }
}

/// Which voxels have the label that a channel stands for.
#[cube]
fn stands_for<N: Size>(
    label: Vector<u32, N>,
    grid: &LevelGrid,
    acting: usize,
    class: usize,
    #[comptime] plan: LossPlan,
) -> Vector<bool, N> {
    if comptime!(plan.missing) {
        label.equal(&Vector::new(grid.acting[acting + class]))
    } else {
        label.equal(&Vector::new(class as u32))
    }
}

/// What a voxel's cross-entropy counts in the loss: the same for all, or only for the largest ones and in part for
/// those that equal the least of them.
#[cube]
pub(super) fn entropy_weight<N: Size>(
    coefficients: &[f32],
    entropies: &[f32],
    grid: &LevelGrid,
    place: &Place,
    voxel: usize,
    of_level: usize,
    #[comptime] plan: LossPlan,
) -> Vector<f32, N> {
    let mut weight = Vector::<f32, N>::new(0.0f32);
    if comptime!(plan.entropy || plan.top_k) {
        let tail = of_level + 2 * grid.batch * plan.classes;
        weight = Vector::new(coefficients[tail]);
        if comptime!(plan.top_k) {
            let least = u32::reinterpret(coefficients[tail + 1]);
            let mut share = Vector::<f32, N>::empty();
            #[unroll]
            for lane in 0..N::value() {
                let entropy = entropies[place.first_voxel + place.before + voxel + lane];
                share.insert(lane, top_share(entropy, least, coefficients[tail + 2]));
            }
            weight *= share;
        }
    }
    weight
}

/// The share of a voxel in the largest cross-entropies. They are compared as integers, which for numbers that are
/// not negative is the same, and puts NaN above all.
#[cube]
pub(super) fn top_share(entropy: f32, least: u32, share_of_least: f32) -> f32 {
    let rank = u32::reinterpret(entropy);
    select(rank > least, 1.0f32, select(rank == least, share_of_least, 0.0f32))
}

/// Pass 3: the gradient, see [`TAIL`](super::plan::TAIL). A gradient may be the memory of its logits: a voxel is read
/// completely before it is written.
#[cube(launch)]
pub(super) fn softmax_gradient_kernel<E: Float, L: Int, W: Numeric, N: Size>(
    logits: &Sequence<Box<[E]>>,
    labels: &[L],
    weights: &[W],
    grid: &LevelGrid,
    coefficients: &[f32],
    entropies: &[f32],
    gradients: &mut Sequence<Box<[E]>>,
    #[comptime] plan: LossPlan,
    #[define(E)] _logit_type: ElemType,
    #[define(L)] _label_type: ElemType,
    #[define(W)] _weight_type: ElemType,
) {
    let classes = comptime!(plan.classes);
    let lanes = N::value();
    let shifted_len = comptime!(if plan.missing { plan.classes } else { 1 });
    let (low, high) = strip(grid.chunks);
    for item in low..high {
        let place = chunk_place(grid, item, plan);
        let (first, groups) = groups_of::<N>(&place);
        let mut exponents = Array::<Vector<f32, N>>::new(classes);
        let mut shifted = Array::<Vector<f32, N>>::new(shifted_len);
        for group in 0..groups {
            write_group::<E, L, W, N>(
                logits,
                labels,
                weights,
                grid,
                &place,
                first + group * lanes,
                coefficients,
                entropies,
                gradients,
                &mut exponents,
                &mut shifted,
                plan,
            );
        }
        if comptime!(lanes > 1) {
            let mut exponents = Array::<Vector<f32, Const<1>>>::new(classes);
            let mut shifted = Array::<Vector<f32, Const<1>>>::new(shifted_len);
            for i in 0..place.end - place.start - groups * lanes {
                let voxel = voxel_beside(&place, first, groups * lanes, i);
                write_group::<E, L, W, Const<1>>(
                    logits,
                    labels,
                    weights,
                    grid,
                    &place,
                    voxel,
                    coefficients,
                    entropies,
                    gradients,
                    &mut exponents,
                    &mut shifted,
                    plan,
                );
            }
        }
    }
}
