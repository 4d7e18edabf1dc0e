//! Many channels on a GPU: sums of every channel do not fit a unit's registers, so that a unit owns one channel
//! and walks over voxels, and neighbouring units read neighbouring channels. What a voxel's channels share goes
//! through memory: the logarithm of the softmax's denominator, and the mean of the Dice coefficients.

use super::pass::Plan;
use super::sigmoid::sigmoid;
use super::walk::*;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

/// Voxels of a chunk here: every voxel has a cube's attention, so chunks are short.
pub(super) const OWNED_CHUNK: usize = 256;

/// Label and sample of one voxel of the batch.
#[cube]
fn one_label(
    labels: &[u8],
    axes: &[u32],
    extent: &Extent,
    voxel: usize,
    none: u32,
    #[comptime] full: bool,
) -> (u32, usize) {
    let sample = voxel / extent.voxels;
    let label = read_labels::<Const<1>>(labels, axes, extent, sample, voxel % extent.voxels, none, full);
    (label.extract(0usize), sample)
}

/// `log sum exp` of the logits of each voxel that is not ignored; a unit takes one voxel.
#[cube(launch)]
pub(super) fn normaliser_kernel<E: Float>(
    logits: &[E],
    labels: &[u8],
    axes: &[u32],
    normalisers: &mut [f32],
    extent: Extent,
    #[comptime] plan: Plan,
    #[define(E)] _dtype: ElemType,
) {
    let classes = comptime!(plan.classes);
    let none = comptime!(plan.classes as u32).runtime();
    if ABSOLUTE_POS < extent.batch * extent.voxels {
        let (label, _sample) = one_label(labels, axes, &extent, ABSOLUTE_POS, none, plan.full);
        if label < none {
            let first = ABSOLUTE_POS * classes;
            let mut top = f32::cast_from(logits[first]);
            for class in 1..classes {
                top = top.max(f32::cast_from(logits[first + class]));
            }
            let mut sum = 0.0f32;
            for class in 0..classes {
                sum += (f32::cast_from(logits[first + class]) - top).exp();
            }
            normalisers[ABSOLUTE_POS] = top + sum.ln();
        }
    }
}

/// Pass 1. A row of `sums` is `[P.., cross-entropy of channel 0, I.., cross-entropy of the others]`, which has
/// the front of the other kernels' rows; a row of `counts` is `[G.., valid voxels]`. A cube has
/// `units / channels` rows. `regions` is only read for regions, `normalisers` only for labels.
#[cube(launch)]
pub(super) fn owned_sums_kernel<E: Float>(
    logits: &[E],
    labels: &[u8],
    axes: &[u32],
    regions: &[u32],
    normalisers: &[f32],
    sums: &mut [f32],
    counts: &mut [u32],
    extent: Extent,
    #[comptime] plan: Plan,
    #[define(E)] _dtype: ElemType,
) {
    let channels = comptime!(plan.classes);
    let none = comptime!(plan.none()).runtime();
    let chunks = (extent.voxels + OWNED_CHUNK - 1) / OWNED_CHUNK;
    let walkers = comptime!(plan.walkers / plan.classes);
    let channel = UNIT_POS as usize % channels;
    let walker = UNIT_POS as usize / channels;
    if CUBE_POS < extent.batch * chunks && walker < walkers {
        let sample = CUBE_POS / chunks;
        let start = (CUBE_POS % chunks) * OWNED_CHUNK;
        let end = (start + OWNED_CHUNK).min(extent.voxels);
        let mut p_sum = 0.0f32;
        let mut hit_sum = 0.0f32;
        let mut entropy = 0.0f32;
        let mut hits = 0u32;
        let mut valid = 0u32;
        for in_sample in range_stepped(start + walker, end, walkers) {
            let voxel = sample * extent.voxels + in_sample;
            let (label, _sample) = one_label(labels, axes, &extent, voxel, none, plan.full);
            if label < none {
                valid += 1;
                let z = f32::cast_from(logits[voxel * channels + channel]);
                if comptime!(plan.regions) {
                    let word = regions[label as usize * comptime!(plan.classes.div_ceil(32)) + channel / 32];
                    let inside = (word >> (channel as u32 % 32)) & 1 != 0;
                    let (p, _slope, one_plus) = sigmoid::<Const<1>>(Vector::new(z));
                    let p = p.extract(0usize);
                    p_sum += p;
                    entropy += z.max(0.0f32) - select(inside, z, 0.0f32) + one_plus.extract(0usize).ln();
                    hit_sum += select(inside, p, 0.0f32);
                    hits += u32::cast_from(inside);
                } else {
                    let hit = label == channel as u32;
                    let from_top = z - normalisers[voxel];
                    let p = from_top.exp();
                    p_sum += p;
                    entropy -= select(hit, from_top, 0.0f32);
                    hit_sum += select(hit, p, 0.0f32);
                    hits += u32::cast_from(hit);
                }
            }
        }
        let row = CUBE_POS * walkers + walker;
        let first = row * comptime!(3 * plan.classes);
        sums[first + channel] = p_sum;
        sums[first + channels + 1 + channel] = hit_sum;
        let entropy_slot = if channel == 0 { channels } else { comptime!(2 * plan.classes) + channel };
        sums[first + entropy_slot] = entropy;
        let at = row * comptime!(plan.classes + 1) + channel;
        counts[at] = hits;
        if channel == 0 {
            counts[at + channels] = valid;
        }
    }
}

/// `s = sum_k p_k (B_k + [k = label] A_k)` of each voxel that is not ignored; a unit takes one voxel.
#[cube(launch)]
pub(super) fn mean_kernel<E: Float>(
    logits: &[E],
    labels: &[u8],
    axes: &[u32],
    normalisers: &[f32],
    coefficients: &[f32],
    means: &mut [f32],
    extent: Extent,
    #[comptime] plan: Plan,
    #[define(E)] _dtype: ElemType,
) {
    let classes = comptime!(plan.classes);
    let none = comptime!(plan.classes as u32).runtime();
    if ABSOLUTE_POS < extent.batch * extent.voxels {
        let (label, sample) = one_label(labels, axes, &extent, ABSOLUTE_POS, none, plan.full);
        if label < none {
            let normaliser = normalisers[ABSOLUTE_POS];
            let first = ABSOLUTE_POS * classes;
            let of_sample = sample * comptime!(2 * plan.classes);
            let mut mean = 0.0f32;
            for class in 0..classes {
                let p = (f32::cast_from(logits[first + class]) - normaliser).exp();
                mean += p * coefficients[of_sample + 2 * class + 1];
            }
            let z = f32::cast_from(logits[first + label as usize]);
            mean += (z - normaliser).exp() * coefficients[of_sample + 2 * label as usize];
            means[ABSOLUTE_POS] = mean;
        }
    }
}

/// Pass 3 of labels; a unit takes one logit. `gradient` may be the memory of `logits`.
#[cube(launch)]
pub(super) fn owned_gradient_kernel<E: Float>(
    logits: &[E],
    labels: &[u8],
    axes: &[u32],
    normalisers: &[f32],
    coefficients: &[f32],
    means: &[f32],
    gradient: &mut [E],
    extent: Extent,
    #[comptime] plan: Plan,
    #[define(E)] _dtype: ElemType,
) {
    let classes = comptime!(plan.classes);
    let none = comptime!(plan.classes as u32).runtime();
    if ABSOLUTE_POS < extent.batch * extent.voxels * classes {
        let voxel = ABSOLUTE_POS / classes;
        let class = ABSOLUTE_POS % classes;
        let (label, sample) = one_label(labels, axes, &extent, voxel, none, plan.full);
        let mut g = 0.0f32;
        if label < none {
            let entropy = coefficients[extent.batch * comptime!(2 * plan.classes)];
            let at = (sample * classes + class) * 2;
            let p = (f32::cast_from(logits[ABSOLUTE_POS]) - normalisers[voxel]).exp();
            g = p * (entropy - means[voxel] + coefficients[at + 1]);
            if label == class as u32 {
                g += p * coefficients[at] - entropy;
            }
        }
        gradient[ABSOLUTE_POS] = E::cast_from(g);
    }
}
