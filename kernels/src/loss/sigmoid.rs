//! Overlapping regions: a sigmoid each, soft Dice of all regions, binary cross-entropy.
//!
//! `regions[label * words ..]` is the bit set of the regions that a label belongs to, 32 regions a word.

use super::pass::Plan;
use super::walk::*;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

/// The label that stands for "ignored" here: larger than any in the map.
pub(super) const NONE: u32 = 256;

/// One word of the region sets of `N` voxels, empty for ignored ones.
#[cube]
fn region_word<N: Size>(
    regions: &[u32],
    label: Vector<u32, N>,
    #[comptime] word: usize,
    #[comptime] words: usize,
) -> Vector<u32, N> {
    let mut set = Vector::<u32, N>::empty();
    #[unroll]
    for lane in 0..N::value() {
        // The entry for "ignored" is empty.
        set.insert(lane, regions[label.extract(lane) as usize * words + word]);
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

/// Adds a group of voxels to the sums `[P of every region, cross-entropy, I of every region]` and the counts
/// `[G of every region, valid voxels]`.
#[cube]
fn add_group<E: Float, N: Size>(
    logits: &[E],
    regions: &[u32],
    first: usize,
    label: Vector<u32, N>,
    sums: &mut Array<Vector<f32, N>>,
    counts: &mut Array<Vector<u32, N>>,
    #[comptime] plan: Plan,
) {
    let channels = comptime!(plan.classes);
    let words = comptime!(plan.classes.div_ceil(32));
    let zero = Vector::<f32, N>::new(0.0f32);
    let valid = label.less_than(&Vector::new(NONE));
    let mut entropy = Vector::<f32, N>::new(0.0f32);
    #[unroll]
    for word in 0..words {
        let set = region_word::<N>(regions, label, word, words);
        let here = comptime!((plan.classes - 32 * word).min(32));
        #[unroll(plan.unroll)]
        for bit in 0..here {
            let region = comptime!(32 * word) + bit;
            // A select and not a product: what an ignored voxel holds may be NaN.
            let z = select_many(valid, gather::<E, N>(logits, first + region, channels), zero);
            let inside = (set & Vector::new(1u32 << (bit as u32))).not_equal(&Vector::new(0u32));
            let (p, _slope, one_plus) = sigmoid::<N>(z);
            let p = select_many(valid, p, zero);
            let positive = select_many(z.greater_than(&zero), z, zero);
            entropy += positive - select_many(inside, z, zero) + one_plus.ln();
            sums[region] += p;
            sums[channels + 1 + region] += select_many(inside, p, zero);
            counts[region] += select_many(inside, Vector::new(1u32), Vector::new(0u32));
        }
    }
    sums[channels] += select_many(valid, entropy, zero);
    counts[channels] += select_many(valid, Vector::new(1u32), Vector::new(0u32));
}

/// Pass 1: partial sums of every chunk. A row of `sums` is `[P.., cross-entropy, I..]` of `2 * regions + 1`
/// values, a row of `counts` is `[G.., valid voxels]` of `regions + 1`.
#[cube(launch)]
pub(super) fn sigmoid_sums_kernel<E: Float, N: Size>(
    logits: &[E],
    labels: &[u8],
    axes: &[u32],
    regions: &[u32],
    sums: &mut [f32],
    counts: &mut [u32],
    extent: Extent,
    #[comptime] plan: Plan,
    #[define(E)] _dtype: ElemType,
) {
    let channels = comptime!(plan.classes);
    let lanes = N::value();
    let none = NONE.runtime();
    let sums_len = comptime!(2 * plan.classes + 1);
    let counts_len = comptime!(plan.classes + 1);

    let chunks = chunks_of(extent.voxels);
    let (low, high) = my_chunks(extent.batch * chunks, plan.walkers);
    let place = my_place(plan.walkers);
    for item in low..high {
        let sample = item / chunks;
        let start = (item % chunks) * CHUNK;
        let end = (start + CHUNK).min(extent.voxels);
        let groups = (end - start) / lanes;

        let mut wide = Array::<Vector<f32, N>>::new(sums_len);
        let mut wide_counts = Array::<Vector<u32, N>>::new(counts_len);
        let mut rest = Array::<Vector<f32, Const<1>>>::new(sums_len);
        let mut rest_counts = Array::<Vector<u32, Const<1>>>::new(counts_len);
        for group in range_stepped(place, groups, plan.walkers) {
            let voxel = start + group * lanes;
            let label = read_labels::<N>(labels, axes, &extent, sample, voxel, none, plan.full);
            let mut wanted = true.runtime();
            if comptime!(plan.skip) {
                wanted = any_below::<N>(label, none);
            }
            if wanted {
                let first = (sample * extent.voxels + voxel) * channels;
                add_group::<E, N>(logits, regions, first, label, &mut wide, &mut wide_counts, plan);
            }
        }
        if comptime!(lanes > 1) {
            for voxel in start + groups * lanes..end {
                let label = read_labels::<Const<1>>(labels, axes, &extent, sample, voxel, none, plan.full);
                let first = (sample * extent.voxels + voxel) * channels;
                add_group::<E, Const<1>>(logits, regions, first, label, &mut rest, &mut rest_counts, plan);
            }
        }
        let row = item * plan.walkers + place;
        write_row::<N>(&wide, &rest, sums, row * sums_len, sums_len);
        write_count_row::<N>(&wide_counts, &rest_counts, counts, row * counts_len, counts_len);
    }
}

/// Writes the gradient of a group of voxels: `p (1 - p) (B + y A) + e (p - y)` for each region.
#[cube]
fn write_group<E: Float, N: Size>(
    logits: &[E],
    gradient: &mut [E],
    regions: &[u32],
    coefficients: &[f32],
    first: usize,
    first_coefficient: usize,
    entropy: f32,
    label: Vector<u32, N>,
    values: &mut Array<Vector<f32, N>>,
    #[comptime] plan: Plan,
) {
    let channels = comptime!(plan.classes);
    let lanes = N::value();
    let words = comptime!(plan.classes.div_ceil(32));
    let zero = Vector::<f32, N>::new(0.0f32);
    let one = Vector::<f32, N>::new(1.0f32);
    let entropy = Vector::<f32, N>::new(entropy);
    let valid = label.less_than(&Vector::new(NONE));
    #[unroll]
    for word in 0..words {
        let set = region_word::<N>(regions, label, word, words);
        let here = comptime!((plan.classes - 32 * word).min(32));
        #[unroll(plan.unroll)]
        for bit in 0..here {
            let region = comptime!(32 * word) + bit;
            let z = gather::<E, N>(logits, first + region, channels);
            let inside = (set & Vector::new(1u32 << (bit as u32))).not_equal(&Vector::new(0u32));
            let (p, slope, _one_plus) = sigmoid::<N>(z);
            let at = first_coefficient + 2 * region;
            let a = Vector::<f32, N>::new(coefficients[at]);
            let b = Vector::<f32, N>::new(coefficients[at + 1]);
            let dice = b + select_many(inside, a, zero);
            let g = slope * dice + entropy * (p - select_many(inside, one, zero));
            let g = select_many(valid, g, zero);
            if comptime!(lanes == 1) {
                // Nothing to put in order: no array, whatever the number of regions.
                gradient[first + region] = E::cast_from(g.extract(0usize));
            } else {
                values[region] = g;
            }
        }
    }
    if comptime!(lanes > 1) {
        store_group::<E, N>(gradient, first, values, channels, plan.unroll);
    }
}

/// Pass 3: the gradient. `coefficients` is `[batch, regions, (A, B)]` and then the weight of the
/// cross-entropy. `gradient` may be the memory of `logits`: a logit is read before its gradient is written.
#[cube(launch)]
pub(super) fn sigmoid_gradient_kernel<E: Float, N: Size>(
    logits: &[E],
    labels: &[u8],
    axes: &[u32],
    regions: &[u32],
    coefficients: &[f32],
    gradient: &mut [E],
    extent: Extent,
    #[comptime] plan: Plan,
    #[define(E)] _dtype: ElemType,
) {
    let channels = comptime!(plan.classes);
    let lanes = N::value();
    let none = NONE.runtime();
    let chunks = chunks_of(extent.voxels);
    let (low, high) = my_chunks(extent.batch * chunks, plan.walkers);
    let place = my_place(plan.walkers);
    let entropy = coefficients[extent.batch * comptime!(2 * plan.classes)];
    for item in low..high {
        let sample = item / chunks;
        let start = (item % chunks) * CHUNK;
        let end = (start + CHUNK).min(extent.voxels);
        let groups = (end - start) / lanes;
        let at = sample * comptime!(2 * plan.classes);
        let mut values = Array::<Vector<f32, N>>::new(channels);
        for group in range_stepped(place, groups, plan.walkers) {
            let voxel = start + group * lanes;
            let first = (sample * extent.voxels + voxel) * channels;
            let label = read_labels::<N>(labels, axes, &extent, sample, voxel, none, plan.full);
            let mut wanted = true.runtime();
            if comptime!(plan.skip) {
                wanted = any_below::<N>(label, none);
            }
            if wanted {
                write_group::<E, N>(
                    logits,
                    gradient,
                    regions,
                    coefficients,
                    first,
                    at,
                    entropy,
                    label,
                    &mut values,
                    plan,
                );
            } else {
                clear::<E>(gradient, first, comptime!(lanes * channels));
            }
        }
        if comptime!(lanes > 1) {
            let mut values = Array::<Vector<f32, Const<1>>>::new(channels);
            for voxel in start + groups * lanes..end {
                let first = (sample * extent.voxels + voxel) * channels;
                let label = read_labels::<Const<1>>(labels, axes, &extent, sample, voxel, none, plan.full);
                write_group::<E, Const<1>>(
                    logits,
                    gradient,
                    regions,
                    coefficients,
                    first,
                    at,
                    entropy,
                    label,
                    &mut values,
                    plan,
                );
            }
        }
    }
}
