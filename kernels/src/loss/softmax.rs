//! Exclusive labels: softmax, soft Dice without the background, cross-entropy.
//!
//! A group is `N` neighbouring voxels, one in each lane; the classes are a loop. That keeps exponentials,
//! logarithms and divisions in vectors, needs no sum across lanes per voxel, and lets any number of classes
//! use the same few registers. On a GPU `N` is 1: a unit's group is one voxel.

use super::pass::Plan;
use super::walk::*;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

/// Reads the logits of a group, zeros where the voxel is ignored, and leaves `exp(z - max)` in `exponents`.
/// Returns their sum and `max - z` of the labelled class.
#[cube]
fn exponentiate<E: Float, N: Size>(
    logits: &[E],
    first: usize,
    label: Vector<u32, N>,
    exponents: &mut Array<Vector<f32, N>>,
    #[comptime] plan: Plan,
) -> (Vector<f32, N>, Vector<f32, N>) {
    let classes = comptime!(plan.classes);
    let counts = label.less_than(&Vector::new(classes as u32));
    let zero = Vector::<f32, N>::new(0.0f32);
    let mut top = Vector::<f32, N>::new(f32::MIN);
    let mut labelled = Vector::<f32, N>::new(0.0f32);
    #[unroll(plan.unroll)]
    for class in 0..classes {
        // A select and not a product: what an ignored voxel holds may be NaN.
        let z = select_many(counts, gather::<E, N>(logits, first + class, classes), zero);
        exponents[class] = z;
        top = select_many(z.greater_than(&top), z, top);
        if comptime!(!plan.per_voxel) {
            labelled = select_many(label.equal(&Vector::new(class as u32)), z, labelled);
        }
    }
    if comptime!(plan.per_voxel) {
        #[unroll]
        for lane in 0..N::value() {
            let class = label.extract(lane).min(comptime!(classes as u32 - 1));
            labelled.insert(lane, f32::cast_from(logits[first + lane * classes + class as usize]));
        }
        labelled = select_many(counts, labelled, zero);
    }
    let mut sum = Vector::<f32, N>::new(0.0f32);
    #[unroll(plan.unroll)]
    for class in 0..classes {
        let e = (exponents[class] - top).exp();
        exponents[class] = e;
        sum += e;
    }
    (sum, top - labelled)
}

/// Adds a group of voxels to the sums `[P of every class, cross-entropy, I of every class]` and the counts
/// `[G of every class]`. With `per_voxel`, I and G are kept per class in `hits` and `hit_counts` instead, one
/// addition a voxel, whose last entry takes the ignored voxels.
#[cube]
fn add_group<E: Float, N: Size>(
    logits: &[E],
    first: usize,
    label: Vector<u32, N>,
    exponents: &mut Array<Vector<f32, N>>,
    sums: &mut Array<Vector<f32, N>>,
    counts: &mut Array<Vector<u32, N>>,
    hits: &mut Array<f32>,
    hit_counts: &mut Array<u32>,
    #[comptime] plan: Plan,
) {
    let classes = comptime!(plan.classes);
    let valid = label.less_than(&Vector::new(classes as u32));
    let zero = Vector::<f32, N>::new(0.0f32);
    let (sum, below_top) = exponentiate::<E, N>(logits, first, label, exponents, plan);
    sums[classes] += select_many(valid, sum.ln() + below_top, zero);
    let scale = select_many(valid, Vector::new(1.0f32) / sum, zero);
    #[unroll(plan.unroll)]
    for class in 0..classes {
        let p = exponents[class] * scale;
        sums[class] += p;
        if comptime!(!plan.per_voxel) {
            let hit = label.equal(&Vector::new(class as u32));
            sums[classes + 1 + class] += select_many(hit, p, zero);
            counts[class] += select_many(hit, Vector::new(1u32), Vector::new(0u32));
        }
    }
    if comptime!(plan.per_voxel) {
        let p = (zero - below_top).exp() * scale;
        #[unroll]
        for lane in 0..N::value() {
            let class = label.extract(lane) as usize;
            hits[class] += p.extract(lane);
            hit_counts[class] += 1;
        }
    }
}

/// Pass 1: partial sums of every chunk. A row of `sums` is `[P.., cross-entropy, I..]` of `2 * classes + 1`
/// values, a row of `counts` is `[G.., valid voxels]` of `classes + 1`.
#[cube(launch)]
pub(super) fn softmax_sums_kernel<E: Float, N: Size>(
    logits: &[E],
    labels: &[u8],
    axes: &[u32],
    sums: &mut [f32],
    counts: &mut [u32],
    extent: Extent,
    #[comptime] plan: Plan,
    #[define(E)] _dtype: ElemType,
) {
    let classes = comptime!(plan.classes);
    let lanes = N::value();
    let none = comptime!(plan.classes as u32).runtime();
    // Accumulators that the plan does not use have one entry.
    let vector_sums = comptime!(if plan.per_voxel { plan.classes + 1 } else { 2 * plan.classes + 1 });
    let vector_counts = comptime!(if plan.per_voxel { 1 } else { plan.classes });
    let hit_len = comptime!(if plan.per_voxel { plan.classes + 1 } else { 1 });

    let chunks = chunks_of(extent.voxels);
    let (low, high) = my_chunks(extent.batch * chunks, plan.walkers);
    let place = my_place(plan.walkers);
    for item in low..high {
        let sample = item / chunks;
        let start = (item % chunks) * CHUNK;
        let end = (start + CHUNK).min(extent.voxels);
        let groups = (end - start) / lanes;

        let mut wide = Array::<Vector<f32, N>>::new(vector_sums);
        let mut wide_counts = Array::<Vector<u32, N>>::new(vector_counts);
        let mut exponents = Array::<Vector<f32, N>>::new(classes);
        let mut rest = Array::<Vector<f32, Const<1>>>::new(vector_sums);
        let mut rest_counts = Array::<Vector<u32, Const<1>>>::new(vector_counts);
        let mut hits = Array::<f32>::new(hit_len);
        let mut hit_counts = Array::<u32>::new(hit_len);

        for group in range_stepped(place, groups, plan.walkers) {
            let voxel = start + group * lanes;
            let label = read_labels::<N>(labels, axes, &extent, sample, voxel, none, plan.full);
            let mut wanted = true.runtime();
            if comptime!(plan.skip) {
                wanted = any_below::<N>(label, none);
            }
            if wanted {
                let first = (sample * extent.voxels + voxel) * classes;
                add_group::<E, N>(
                    logits,
                    first,
                    label,
                    &mut exponents,
                    &mut wide,
                    &mut wide_counts,
                    &mut hits,
                    &mut hit_counts,
                    plan,
                );
            }
        }
        if comptime!(lanes > 1) {
            let mut exponents = Array::<Vector<f32, Const<1>>>::new(classes);
            for voxel in start + groups * lanes..end {
                let label = read_labels::<Const<1>>(labels, axes, &extent, sample, voxel, none, plan.full);
                let first = (sample * extent.voxels + voxel) * classes;
                add_group::<E, Const<1>>(
                    logits,
                    first,
                    label,
                    &mut exponents,
                    &mut rest,
                    &mut rest_counts,
                    &mut hits,
                    &mut hit_counts,
                    plan,
                );
            }
        }

        let row = item * plan.walkers + place;
        let sums_row = row * comptime!(2 * plan.classes + 1);
        let counts_row = row * comptime!(plan.classes + 1);
        write_row::<N>(&wide, &rest, sums, sums_row, vector_sums);
        let mut valid = 0u32;
        for class in 0..classes {
            if comptime!(plan.per_voxel) {
                sums[sums_row + classes + 1 + class] = hits[class];
                counts[counts_row + class] = hit_counts[class];
                valid += hit_counts[class];
            } else {
                let count = lane_count::<N>(wide_counts[class]) + rest_counts[class].extract(0usize);
                counts[counts_row + class] = count;
                valid += count;
            }
        }
        counts[counts_row + classes] = valid;
    }
}

/// Writes the gradient of a group of voxels:
/// `p_c (B_c + e - s) + [c = label] (p_c A_c - e)` with `s = sum_k p_k (B_k + [k = label] A_k)`,
/// where A, B are the Dice coefficients of the sample and `e` the weight of the cross-entropy over the valid
/// voxels.
#[cube]
fn write_group<E: Float, N: Size>(
    logits: &[E],
    gradient: &mut [E],
    coefficients: &[f32],
    first: usize,
    first_coefficient: usize,
    entropy: f32,
    label: Vector<u32, N>,
    exponents: &mut Array<Vector<f32, N>>,
    #[comptime] plan: Plan,
) {
    let classes = comptime!(plan.classes);
    let valid = label.less_than(&Vector::new(classes as u32));
    let zero = Vector::<f32, N>::new(0.0f32);
    let (sum, below_top) = exponentiate::<E, N>(logits, first, label, exponents, plan);
    let scale = Vector::<f32, N>::new(1.0f32) / sum;
    let mut mean = Vector::<f32, N>::new(0.0f32);
    #[unroll(plan.unroll)]
    for class in 0..classes {
        let e = exponents[class];
        let at = first_coefficient + 2 * class;
        mean += e * Vector::new(coefficients[at + 1]);
        if comptime!(!plan.per_voxel) {
            let hit = label.equal(&Vector::new(class as u32));
            mean += select_many(hit, e * Vector::new(coefficients[at]), zero);
        }
    }
    let entropy = Vector::<f32, N>::new(entropy);
    // With many classes the labelled one is looked up instead of compared with each of them.
    let mut a = Vector::<f32, N>::new(0.0f32);
    let mut b = Vector::<f32, N>::new(0.0f32);
    let mut e = Vector::<f32, N>::new(0.0f32);
    if comptime!(plan.per_voxel) {
        #[unroll]
        for lane in 0..N::value() {
            let class = label.extract(lane).min(comptime!(classes as u32 - 1)) as usize;
            a.insert(lane, coefficients[first_coefficient + 2 * class]);
            b.insert(lane, coefficients[first_coefficient + 2 * class + 1]);
        }
        e = (zero - below_top).exp();
        mean += e * a;
    }
    mean *= scale;
    let base = entropy - mean;
    #[unroll(plan.unroll)]
    for class in 0..classes {
        let p = exponents[class] * scale;
        let at = first_coefficient + 2 * class;
        let mut g = p * (base + Vector::new(coefficients[at + 1]));
        if comptime!(!plan.per_voxel) {
            let hit = label.equal(&Vector::new(class as u32));
            g += select_many(hit, p * Vector::new(coefficients[at]) - entropy, zero);
        }
        exponents[class] = select_many(valid, g, zero);
    }
    store_group::<E, N>(gradient, first, exponents, classes, plan.unroll);
    if comptime!(plan.per_voxel) {
        let g = select_many(valid, e * scale * (base + b + a) - entropy, zero);
        let stored = Vector::<E, N>::cast_from(g);
        #[unroll]
        for lane in 0..N::value() {
            // An ignored voxel gets its zero once more, in its last class.
            let class = label.extract(lane).min(comptime!(classes as u32 - 1)) as usize;
            gradient[first + lane * classes + class] = stored.extract(lane);
        }
    }
}

/// Pass 3: the gradient. `coefficients` is `[batch, classes, (A, B)]` and then the weight of the
/// cross-entropy. `gradient` may be the memory of `logits`: a voxel is read completely before it is written.
#[cube(launch)]
pub(super) fn softmax_gradient_kernel<E: Float, N: Size>(
    logits: &[E],
    labels: &[u8],
    axes: &[u32],
    coefficients: &[f32],
    gradient: &mut [E],
    extent: Extent,
    #[comptime] plan: Plan,
    #[define(E)] _dtype: ElemType,
) {
    let classes = comptime!(plan.classes);
    let lanes = N::value();
    let none = comptime!(plan.classes as u32).runtime();
    let chunks = chunks_of(extent.voxels);
    let (low, high) = my_chunks(extent.batch * chunks, plan.walkers);
    let place = my_place(plan.walkers);
    let entropy = coefficients[extent.batch * comptime!(2 * plan.classes)];
    for item in low..high {
        let sample = item / chunks;
        let start = (item % chunks) * CHUNK;
        let end = (start + CHUNK).min(extent.voxels);
        let groups = (end - start) / lanes;
        let first_coefficient = sample * comptime!(2 * plan.classes);

        let mut exponents = Array::<Vector<f32, N>>::new(classes);
        for group in range_stepped(place, groups, plan.walkers) {
            let voxel = start + group * lanes;
            let first = (sample * extent.voxels + voxel) * classes;
            let label = read_labels::<N>(labels, axes, &extent, sample, voxel, none, plan.full);
            let mut wanted = true.runtime();
            if comptime!(plan.skip) {
                wanted = any_below::<N>(label, none);
            }
            if wanted {
                write_group::<E, N>(
                    logits,
                    gradient,
                    coefficients,
                    first,
                    first_coefficient,
                    entropy,
                    label,
                    &mut exponents,
                    plan,
                );
            } else {
                clear::<E>(gradient, first, comptime!(lanes * classes));
            }
        }
        if comptime!(lanes > 1) {
            let mut exponents = Array::<Vector<f32, Const<1>>>::new(classes);
            for voxel in start + groups * lanes..end {
                let first = (sample * extent.voxels + voxel) * classes;
                let label = read_labels::<Const<1>>(labels, axes, &extent, sample, voxel, none, plan.full);
                write_group::<E, Const<1>>(
                    logits,
                    gradient,
                    coefficients,
                    first,
                    first_coefficient,
                    entropy,
                    label,
                    &mut exponents,
                    plan,
                );
            }
        }
    }
}
