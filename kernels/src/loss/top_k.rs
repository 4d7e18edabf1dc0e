//! The k largest cross-entropies of a level, found on the device: radix selection. Three passes over one value a voxel
//! count 11, 11 and 10 of its bits, and between them one unit picks the bin that the k-th largest falls in. Only
//! integers are added concurrently, so that the result does not depend on the order.
//!
//! Several voxels may equal the k-th largest: the last places are shared among them in equal parts, which is a
//! subgradient of the mean.

use super::plan::LossPlan;
use super::softmax::top_share;
use super::walk::*;
use crate::block::{only, strip};
use cubecl::ir::ElemType;
use cubecl::prelude::*;

/// Bins of a histogram.
pub(super) const BINS: usize = 2048;
/// Words of a level's search: the bits found so far, how many of the largest are still to be found, and after the
/// last pass how many voxels have all bits found.
const STATE: usize = 3;
/// The state of a search for the `k` largest.
pub(super) fn start_of_search(k: u32) -> [u32; STATE] {
    [0, k, 0]
}

/// Bits below those that a pass counts.
pub(super) const SHIFTS: [u32; 3] = [21, 10, 0];

/// Bits that a pass counts.
fn digit_bits(shift: u32) -> u32 {
    match shift {
        0 => 10,
        _ => 11,
    }
}

/// The chunks of this unit: a contiguous run of them where units are threads, else the one of its cube. Surplus cubes end
/// here.
#[cube]
fn my_chunks(chunks: usize, #[comptime] walkers: usize) -> (usize, usize) {
    if comptime!(walkers == 1) { strip(chunks) } else { only(CUBE_POS, chunks) }
}

/// This unit's place among those that share a chunk.
#[cube]
fn my_place(#[comptime] walkers: usize) -> usize {
    if comptime!(walkers == 1) { 0usize.runtime() } else { UNIT_POS as usize }
}

/// Counts voxels by the next digit, of those whose digits before are the ones found.
#[cube(launch)]
pub(super) fn histogram_kernel(
    entropies: &[f32],
    grid: &LevelGrid,
    state: &[u32],
    histograms: &[Atomic<u32>],
    #[comptime] shift: u32,
    #[comptime] plan: LossPlan,
) {
    let mask = comptime!((1u32 << digit_bits(shift)) - 1);
    let (low, high) = my_chunks(grid.chunks, plan.walkers);
    let walker = my_place(plan.walkers);
    // A thread counts by itself first. A unit of a GPU has no memory for that: of equal values in a row, ignored
    // voxels say, it adds only the number.
    let mut local = Array::<u32>::new(comptime!(if plan.walkers == 1 { plan.levels * BINS } else { 1 }));
    let mut run = 0u32;
    let mut bin = 0usize;
    for item in low..high {
        let place = chunk_place(grid, item, plan);
        let found = state[place.level * STATE];
        let first = place.first_voxel + place.before;
        for voxel in range_stepped(first + place.start + walker, first + place.end, plan.walkers) {
            let bits = u32::reinterpret(entropies[voxel]);
            let mut wanted = true.runtime();
            if comptime!(shift != SHIFTS[0]) {
                wanted = bits >> comptime!(shift + digit_bits(shift)) == found;
            }
            if wanted {
                let next = place.level * BINS + ((bits >> shift) & mask) as usize;
                if comptime!(plan.walkers == 1) {
                    local[next] += 1;
                } else {
                    if next != bin && run > 0 {
                        histograms[bin].fetch_add(run);
                        run = 0;
                    }
                    bin = next;
                    run += 1;
                }
            }
        }
    }
    if comptime!(plan.walkers == 1) {
        for bin in 0..comptime!(plan.levels * BINS) {
            if local[bin] > 0 {
                histograms[bin].fetch_add(local[bin]);
            }
        }
    } else if run > 0 {
        histograms[bin].fetch_add(run);
    }
}

/// Takes the bin of the k-th largest into what is found, and clears the histograms. A unit takes a level.
#[cube(launch)]
pub(super) fn select_kernel(
    histograms: &mut [u32],
    state: &mut [u32],
    selection: &mut [u32],
    #[comptime] shift: u32,
    #[comptime] levels: usize,
) {
    let (low, high) = strip(levels);
    for level in low..high {
        let mut left = state[level * STATE + 1];
        let mut digit = 0u32;
        let mut equal = 0u32;
        let mut searching = 1u32;
        for below in 0..BINS {
            let bin = comptime!(BINS - 1) - below;
            let count = histograms[level * BINS + bin];
            histograms[level * BINS + bin] = 0;
            if searching == 1 {
                if count >= left {
                    searching = 0;
                    digit = bin as u32;
                    equal = count;
                } else {
                    left -= count;
                }
            }
        }
        let found = (state[level * STATE] << comptime!(digit_bits(shift))) | digit;
        state[level * STATE] = found;
        state[level * STATE + 1] = left;
        state[level * STATE + 2] = equal;
        if comptime!(shift == 0) {
            selection[2 * level] = found;
            let share = f32::cast_from(left) / f32::cast_from(equal.max(1));
            selection[2 * level + 1] = u32::reinterpret(share);
        }
    }
}

/// Sums of the largest cross-entropies by label, a row `[classes]` for each chunk; a unit takes a chunk.
#[cube(launch)]
pub(super) fn largest_kernel<L: Int, W: Numeric>(
    labels: &[L],
    weights: &[W],
    grid: &LevelGrid,
    entropies: &[f32],
    selection: &[u32],
    sums: &mut [f32],
    #[comptime] plan: LossPlan,
    #[define(L)] _label_type: ElemType,
    #[define(W)] _weight_type: ElemType,
) {
    let (low, high) = strip(grid.chunks);
    for item in low..high {
        let place = chunk_place(grid, item, plan);
        let least = selection[2 * place.level];
        let share = f32::reinterpret(selection[2 * place.level + 1]);
        let mut of_label = Array::<f32>::new(comptime!(plan.classes + 1));
        for voxel in place.start..place.end {
            let entropy = entropies[place.first_voxel + place.before + voxel];
            let part = top_share(entropy, least, share);
            if part > 0.0f32 {
                let (label, _weight) = read_group::<L, W, Const<1>>(labels, weights, grid, &place, voxel, plan);
                // The last entry takes ignored voxels.
                of_label[label.extract(0usize) as usize] += entropy * part;
            }
        }
        for class in 0..plan.classes {
            sums[item * plan.classes + class] = of_label[class];
        }
    }
}
