//! Overlapping regions: a sigmoid each, soft Dice of all regions, binary cross-entropy.

use super::channels::*;
use super::plan::{LossPlan, Weighting};
use super::walk::*;
use crate::block::strip;
use crate::vector_math::{exp, ln};
use cubecl::ir::ElemType;
use cubecl::prelude::*;

/// Up to this many labels, vectors of labels are compared with each, instead of looked up voxel by voxel.
const COMPARED_LABELS: usize = 8;

/// One word of the region sets of `N` voxels, empty for ignored ones.
#[cube]
fn region_word<N: Size>(
    grid: &LevelGrid,
    label: Vector<u32, N>,
    #[comptime] word: usize,
    #[comptime] words: usize,
    #[comptime] plan: LossPlan,
) -> Vector<u32, N> {
    let lanes = N::value();
    let mut set = Vector::<u32, N>::new(0u32);
    if comptime!(lanes > 1 && plan.labels <= COMPARED_LABELS) {
        #[unroll]
        for declared in 0..plan.labels {
            let regions = Vector::new(grid.regions[comptime!(declared * words + word)]);
            set = select_many(label.equal(&Vector::new(declared as u32)), regions, set);
        }
    } else {
        #[unroll]
        for lane in 0..lanes {
            // The entry for "ignored" is empty.
            set.insert(lane, grid.regions[label.extract(lane) as usize * words + word]);
        }
    }
    set
}

/// `(p, p (1 - p), 1 + exp(-|z|))` of a logit, without overflow or cancellation for either sign.
#[cube]
pub(super) fn sigmoid<N: Size>(z: Vector<f32, N>) -> (Vector<f32, N>, Vector<f32, N>, Vector<f32, N>) {
    let e = exp::<N>(Vector::<f32, N>::new(0.0f32) - z.abs());
    let one_plus = e + Vector::new(1.0f32);
    let r = Vector::<f32, N>::new(1.0f32) / one_plus;
    let small = e * r;
    (select_many(z.less_than(&Vector::new(0.0f32)), small, r), small * r, one_plus)
}

/// The voxels of a group that count for a region: none where it is missing.
#[cube]
fn counted<N: Size>(
    valid: Vector<bool, N>,
    grid: &LevelGrid,
    place: &Place,
    region: usize,
    #[comptime] plan: LossPlan,
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
    grid: &LevelGrid,
    place: &Place,
    voxel: usize,
    values: &mut Array<Vector<f32, N>>,
    sums: &mut Array<Vector<f32, N>>,
    products: &mut Array<Vector<f32, N>>,
    #[comptime] plan: LossPlan,
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
            let set = region_word::<N>(grid, label, word, words, plan);
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
                    let mut entropy = positive - select_many(inside, z, zero);
                    if comptime!(by_products(plan)) {
                        products[region] *= select_many(counts, one_plus, Vector::new(1.0f32));
                    } else {
                        entropy += ln::<N>(one_plus);
                    }
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

/// Groups whose `1 + exp(-|z|)` are multiplied before one logarithm is taken: each is at most 2.
const FACTORS: usize = 64;

/// Whether logarithms are taken of products: where all voxels count the same.
fn by_products(plan: LossPlan) -> bool {
    plan.entropy && plan.weighting == Weighting::None
}

#[cube]
fn start_products<N: Size>(products: &mut Array<Vector<f32, N>>, #[comptime] plan: LossPlan) {
    #[unroll(plan.unroll)]
    for region in 0..plan.classes {
        products[region] = Vector::new(1.0f32);
    }
}

/// Adds the logarithms of products to the cross-entropies, and begins new products.
#[cube]
fn take_logarithms<N: Size>(
    products: &mut Array<Vector<f32, N>>,
    sums: &mut Array<Vector<f32, N>>,
    #[comptime] plan: LossPlan,
) {
    #[unroll(plan.unroll)]
    for region in 0..plan.classes {
        sums[comptime!(plan.entropies()) + region] += ln::<N>(products[region]);
    }
    start_products::<N>(products, plan);
}

/// Pass 1: rows of partial sums of every chunk, see [`LossPlan::slots`].
#[cube(launch)]
pub(super) fn sigmoid_sums_kernel<E: Float, L: Int, W: Numeric, N: Size>(
    logits: &Sequence<Box<[E]>>,
    labels: &[L],
    weights: &[W],
    grid: &LevelGrid,
    sums: &mut [f32],
    #[comptime] plan: LossPlan,
    #[define(E)] _logit_type: ElemType,
    #[define(L)] _label_type: ElemType,
    #[define(W)] _weight_type: ElemType,
) {
    let channels = comptime!(plan.classes);
    let slots = comptime!(plan.slots());
    let lanes = N::value();
    let (low, high) = strip(grid.chunks);
    for item in low..high {
        let place = chunk_place(grid, item, plan);
        let (first, groups) = groups_of::<N>(&place);
        let mut wide = Array::<Vector<f32, N>>::new(slots);
        let mut values = Array::<Vector<f32, N>>::new(channels);
        let mut rest = Array::<Vector<f32, Const<1>>>::new(slots);
        let mut products = Array::<Vector<f32, N>>::new(channels);
        if comptime!(by_products(plan)) {
            start_products::<N>(&mut products, plan);
        }
        for group in 0..groups {
            let voxel = first + group * lanes;
            add_group::<E, L, W, N>(
                logits,
                labels,
                weights,
                grid,
                &place,
                voxel,
                &mut values,
                &mut wide,
                &mut products,
                plan,
            );
            if comptime!(by_products(plan)) {
                if group % FACTORS == FACTORS - 1 {
                    take_logarithms::<N>(&mut products, &mut wide, plan);
                }
            }
        }
        if comptime!(by_products(plan)) {
            take_logarithms::<N>(&mut products, &mut wide, plan);
        }
        if comptime!(lanes > 1) {
            let mut values = Array::<Vector<f32, Const<1>>>::new(channels);
            let mut products = Array::<Vector<f32, Const<1>>>::new(channels);
            if comptime!(by_products(plan)) {
                start_products::<Const<1>>(&mut products, plan);
            }
            // Fewer than two groups, and so than `FACTORS`.
            for i in 0..place.end - place.start - groups * lanes {
                let voxel = voxel_beside(&place, first, groups * lanes, i);
                add_group::<E, L, W, Const<1>>(
                    logits,
                    labels,
                    weights,
                    grid,
                    &place,
                    voxel,
                    &mut values,
                    &mut rest,
                    &mut products,
                    plan,
                );
            }
            if comptime!(by_products(plan)) {
                take_logarithms::<Const<1>>(&mut products, &mut rest, plan);
            }
        }
        let row = item * slots;
        write_row::<N>(&wide, &rest, sums, row, plan);
    }
}

/// Writes the gradient of a group of voxels: `w (p (1 - p) (B + y A) + e (p - y))` for each region.
#[cube]
fn write_group<E: Float, L: Int, W: Numeric, N: Size>(
    logits: &Sequence<Box<[E]>>,
    labels: &[L],
    weights: &[W],
    grid: &LevelGrid,
    place: &Place,
    voxel: usize,
    coefficients: &[f32],
    gradients: &mut Sequence<Box<[E]>>,
    values: &mut Array<Vector<f32, N>>,
    #[comptime] plan: LossPlan,
) {
    let channels = comptime!(plan.classes);
    let words = comptime!(plan.classes.div_ceil(32));
    let zero = Vector::<f32, N>::new(0.0f32);
    let first = (place.before + voxel) * channels;
    let (label, weight) = read_group::<L, W, N>(labels, weights, grid, place, voxel, plan);
    if any_counts::<N>(label, plan) {
        let valid = label.less_than(&Vector::new(comptime!(plan.labels as u32)));
        let _top = load_group::<E, N>(logits, place.level, first, valid, values, plan);
        let of_level = coefficients_at(grid.batch, place.level, plan);
        let dice = of_level + place.sample * comptime!(2 * plan.classes);
        let entropy = of_level + grid.batch * comptime!(2 * plan.classes);
        #[unroll]
        for word in 0..words {
            let set = region_word::<N>(grid, label, word, words, plan);
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
    grid: &LevelGrid,
    coefficients: &[f32],
    gradients: &mut Sequence<Box<[E]>>,
    #[comptime] plan: LossPlan,
    #[define(E)] _logit_type: ElemType,
    #[define(L)] _label_type: ElemType,
    #[define(W)] _weight_type: ElemType,
) {
    let channels = comptime!(plan.classes);
    let lanes = N::value();
    let (low, high) = strip(grid.chunks);
    for item in low..high {
        let place = chunk_place(grid, item, plan);
        let (first, groups) = groups_of::<N>(&place);
        let mut values = Array::<Vector<f32, N>>::new(channels);
        for group in 0..groups {
            write_group::<E, L, W, N>(
                logits,
                labels,
                weights,
                grid,
                &place,
                first + group * lanes,
                coefficients,
                gradients,
                &mut values,
                plan,
            );
        }
        if comptime!(lanes > 1) {
            let mut values = Array::<Vector<f32, Const<1>>>::new(channels);
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
                    gradients,
                    &mut values,
                    plan,
                );
            }
        }
    }
}
