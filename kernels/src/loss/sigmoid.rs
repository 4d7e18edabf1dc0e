//! Overlapping regions: a sigmoid each, soft Dice of all regions, binary cross-entropy.

use super::plan::Plan;
use super::walk::*;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

/// One word of the region sets of `N` voxels, empty for ignored ones.
#[cube]
fn region_word<N: Size>(
    grid: &Grid,
    label: Vector<u32, N>,
    #[comptime] word: usize,
    #[comptime] words: usize,
) -> Vector<u32, N> {
    let mut set = Vector::<u32, N>::empty();
    #[unroll]
    for lane in 0..N::value() {
        // The entry for "ignored" is empty.
        set.insert(lane, grid.regions[label.extract(lane) as usize * words + word]);
    }
    set
}

/// `(p, p (1 - p), 1 + exp(-|z|))` of a logit, without overflow or cancellation for either sign.
#[cube]
pub(super) fn sigmoid<N: Size>(z: Vector<f32, N>) -> (Vector<f32, N>, Vector<f32, N>, Vector<f32, N>) {
    let e = (Vector::<f32, N>::new(0.0f32) - z.abs()).exp();
    let one_plus = e + Vector::new(1.0f32);
    let r = Vector::<f32, N>::new(1.0f32) / one_plus;
    let small = e * r;
    (select_many(z.less_than(&Vector::new(0.0f32)), small, r), small * r, one_plus)
}

/// The voxels of a group that count for a region: none where it is missing.
#[cube]
fn counted<N: Size>(
    valid: Vector<bool, N>,
    grid: &Grid,
    place: &Place,
    region: usize,
    #[comptime] plan: Plan,
) -> Vector<bool, N> {
    if comptime!(plan.missing) {
        let present = grid.acting[place.sample * comptime!(plan.classes + 1) + region] == region as u32;
        valid.vec_and(Vector::new(present))
    } else {
        valid
    }
}

/// Adds a group of voxels to a row of partial sums.
#[cube]
fn add_group<E: Float, L: Int, W: Numeric, N: Size>(
    logits: &Sequence<Box<[E]>>,
    labels: &[L],
    weights: &[W],
    grid: &Grid,
    place: &Place,
    voxel: usize,
    values: &mut Array<Vector<f32, N>>,
    sums: &mut Array<Vector<f32, N>>,
    #[comptime] plan: Plan,
) {
    let channels = comptime!(plan.classes);
    let words = comptime!(plan.classes.div_ceil(32));
    let zero = Vector::<f32, N>::new(0.0f32);
    let (label, weight) = read_group::<L, W, N>(labels, weights, grid, place, voxel, plan);
    if any_counts::<N>(label, plan) {
        let valid = label.less_than(&Vector::new(comptime!(plan.labels as u32)));
        let first = (place.before + voxel) * channels;
        let _top = load_group::<E, N>(logits, place.level, first, valid, values, plan);
        sums[comptime!(plan.weight())] += select_many(valid, weight, zero);
        #[unroll]
        for word in 0..words {
            let set = region_word::<N>(grid, label, word, words);
            let here = comptime!((plan.classes - 32 * word).min(32));
            #[unroll(plan.unroll)]
            for bit in 0..here {
                let region = comptime!(32 * word) + bit;
                let z = values[region];
                let counts = counted::<N>(valid, grid, place, region, plan);
                let inside = (set & Vector::new(1u32 << (bit as u32))).not_equal(&Vector::new(0u32));
                let (p, _slope, one_plus) = sigmoid::<N>(z);
                if comptime!(plan.entropy) {
                    let positive = select_many(z.greater_than(&zero), z, zero);
                    let entropy = positive - select_many(inside, z, zero) + one_plus.ln();
                    sums[comptime!(plan.entropies()) + region] += select_many(counts, entropy * weight, zero);
                }
                if comptime!(plan.dice) {
                    let p = select_many(counts, p * weight, zero);
                    let inside = inside.vec_and(counts);
                    sums[region] += p;
                    sums[comptime!(plan.hits()) + region] += select_many(inside, p, zero);
                    sums[comptime!(plan.truth()) + region] += select_many(inside, weight, zero);
                }
            }
        }
    }
}

/// Pass 1: rows of partial sums of every chunk, see [`Plan::slots`].
#[cube(launch)]
pub(super) fn sigmoid_sums_kernel<E: Float, L: Int, W: Numeric, N: Size>(
    logits: &Sequence<Box<[E]>>,
    labels: &[L],
    weights: &[W],
    grid: &Grid,
    sums: &mut [f32],
    #[comptime] plan: Plan,
    #[define(E)] _logit_type: ElemType,
    #[define(L)] _label_type: ElemType,
    #[define(W)] _weight_type: ElemType,
) {
    let channels = comptime!(plan.classes);
    let slots = comptime!(plan.slots());
    let lanes = N::value();
    let (low, high) = my_chunks(grid.chunks, plan.walkers);
    let walker = my_place(plan.walkers);
    for item in low..high {
        let place = chunk_place(grid, item, plan);
        let groups = (place.end - place.start) / lanes;
        let mut wide = Array::<Vector<f32, N>>::new(slots);
        let mut values = Array::<Vector<f32, N>>::new(channels);
        let mut rest = Array::<Vector<f32, Const<1>>>::new(slots);
        for group in range_stepped(walker, groups, plan.walkers) {
            let voxel = place.start + group * lanes;
            add_group::<E, L, W, N>(logits, labels, weights, grid, &place, voxel, &mut values, &mut wide, plan);
        }
        if comptime!(lanes > 1) {
            let mut values = Array::<Vector<f32, Const<1>>>::new(channels);
            for voxel in place.start + groups * lanes..place.end {
                add_group::<E, L, W, Const<1>>(
                    logits,
                    labels,
                    weights,
                    grid,
                    &place,
                    voxel,
                    &mut values,
                    &mut rest,
                    plan,
                );
            }
        }
        let row = (item * plan.walkers + walker) * slots;
        for slot in 0..slots {
            sums[row + slot] = lane_sum::<N>(wide[slot]) + rest[slot].extract(0usize);
        }
    }
}

/// Writes the gradient of a group of voxels: `w (p (1 - p) (B + y A) + e (p - y))` for each region.
#[cube]
fn write_group<E: Float, L: Int, W: Numeric, N: Size>(
    logits: &Sequence<Box<[E]>>,
    labels: &[L],
    weights: &[W],
    grid: &Grid,
    place: &Place,
    voxel: usize,
    coefficients: &[f32],
    gradients: &mut Sequence<Box<[E]>>,
    values: &mut Array<Vector<f32, N>>,
    #[comptime] plan: Plan,
) {
    let channels = comptime!(plan.classes);
    let words = comptime!(plan.classes.div_ceil(32));
    let zero = Vector::<f32, N>::new(0.0f32);
    let first = (place.before + voxel) * channels;
    let (label, weight) = read_group::<L, W, N>(labels, weights, grid, place, voxel, plan);
    if any_counts::<N>(label, plan) {
        let valid = label.less_than(&Vector::new(comptime!(plan.labels as u32)));
        let _top = load_group::<E, N>(logits, place.level, first, valid, values, plan);
        let of_level = coefficients_of(grid.batch, place.level, plan);
        let dice = of_level + place.sample * comptime!(2 * plan.classes);
        let entropy = of_level + grid.batch * comptime!(2 * plan.classes);
        #[unroll]
        for word in 0..words {
            let set = region_word::<N>(grid, label, word, words);
            let here = comptime!((plan.classes - 32 * word).min(32));
            #[unroll(plan.unroll)]
            for bit in 0..here {
                let region = comptime!(32 * word) + bit;
                let inside = (set & Vector::new(1u32 << (bit as u32))).not_equal(&Vector::new(0u32));
                let (p, slope, _one_plus) = sigmoid::<N>(values[region]);
                let mut g = Vector::<f32, N>::new(0.0f32);
                if comptime!(plan.dice) {
                    let at = dice + 2 * region;
                    let a = Vector::<f32, N>::new(coefficients[at]);
                    g = slope * (Vector::new(coefficients[at + 1]) + select_many(inside, a, zero));
                }
                if comptime!(plan.entropy) {
                    let beside = p - select_many(inside, Vector::new(1.0f32), zero);
                    g += Vector::new(coefficients[entropy]) * beside;
                }
                let counts = counted::<N>(valid, grid, place, region, plan);
                values[region] = select_many(counts, g * weight, zero);
            }
        }
        store_group::<E, N>(gradients, place.level, first, values, plan);
    } else {
        let lanes = N::value();
        clear::<E>(gradients, place.level, first, comptime!(lanes * plan.classes), plan);
    }
}

/// Pass 3: the gradient, see [`TAIL`](super::plan::TAIL). A gradient may be the memory of its logits: a voxel is read
/// completely before it is written.
#[cube(launch)]
pub(super) fn sigmoid_gradient_kernel<E: Float, L: Int, W: Numeric, N: Size>(
    logits: &Sequence<Box<[E]>>,
    labels: &[L],
    weights: &[W],
    grid: &Grid,
    coefficients: &[f32],
    gradients: &mut Sequence<Box<[E]>>,
    #[comptime] plan: Plan,
    #[define(E)] _logit_type: ElemType,
    #[define(L)] _label_type: ElemType,
    #[define(W)] _weight_type: ElemType,
) {
    let channels = comptime!(plan.classes);
    let lanes = N::value();
    let (low, high) = my_chunks(grid.chunks, plan.walkers);
    let walker = my_place(plan.walkers);
    for item in low..high {
        let place = chunk_place(grid, item, plan);
        let groups = (place.end - place.start) / lanes;
        let mut values = Array::<Vector<f32, N>>::new(channels);
        for group in range_stepped(walker, groups, plan.walkers) {
            write_group::<E, L, W, N>(
                logits,
                labels,
                weights,
                grid,
                &place,
                place.start + group * lanes,
                coefficients,
                gradients,
                &mut values,
                plan,
            );
        }
        if comptime!(lanes > 1) {
            let mut values = Array::<Vector<f32, Const<1>>>::new(channels);
            for voxel in place.start + groups * lanes..place.end {
                write_group::<E, L, W, Const<1>>(
                    logits,
                    labels,
                    weights,
                    grid,
                    &place,
                    voxel,
                    coefficients,
                    gradients,
                    &mut values,
                    plan,
                );
            }
        }
    }
}
