//! Which voxels of the input the rows of a block see, for kernels whose cubes compute a block of the matrix product that a
//! gather is: rows are output voxels, the sums run over taps and channels.
//!
//! A GPU divides slowly, so a unit divides once for each of the rows whose voxels it looks for; a tap is then an addition and a
//! look at three bits.

use super::axes::Axes;
use super::gather::GatherNumbers;
use cubecl::prelude::*;

/// Taps along an axis, at most.
const AXIS_BITS: u32 = 3;

/// What a unit knows of rows of its block.
#[derive(CubeType)]
pub(super) struct Corners {
    /// Position of the input voxel under the first tap, as if there were voxels all around: it may be below zero, and wraps
    /// around.
    first: Array<u32>,
    /// For each axis [`AXIS_BITS`] bits: whether a tap's voxel is inside along it.
    inside: Array<u32>,
}

/// A tap.
#[derive(CubeType)]
pub(super) struct Tap {
    depth: u32,
    height: u32,
    width: u32,
    /// Distance of its voxel from that of the first tap.
    ahead: u32,
}

/// Sample, and place along depth, height and width, of element `index` of a grid.
#[cube]
pub(super) fn place(index: usize, grid: &Axes) -> (usize, usize, usize, usize) {
    let line = index / grid.width;
    let plane = line / grid.height;
    (plane / grid.depth, plane % grid.depth, line % grid.height, index % grid.width)
}

/// Where output `row` of a launch lies in the output tensor.
#[cube]
pub(super) fn output_position(row: usize, s: &GatherNumbers) -> usize {
    let (n, jd, jh, jw) = place(row, &s.count);
    let od = jd * s.out_step.depth + s.out_offset.depth;
    let oh = jh * s.out_step.height + s.out_offset.height;
    let ow = jw * s.out_step.width + s.out_offset.width;
    ((n * s.output.depth + od) * s.output.height + oh) * s.output.width + ow
}

/// Of the rows `first_row + UNIT_POS + i * units` for `i` below `count`; those from `rows` on see nothing.
#[cube]
pub(super) fn corners(
    s: &GatherNumbers,
    first_row: usize,
    rows: usize,
    #[comptime] count: usize,
    #[comptime] units: usize,
) -> Corners {
    let mut first = Array::<u32>::new(count);
    let mut inside = Array::<u32>::new(count);
    #[unroll]
    for i in 0..count {
        let row = first_row + UNIT_POS as usize + comptime!(i * units);
        let (n, jd, jh, jw) = place(row, &s.count);
        let id = (jd * s.in_step.depth) as u32 - s.pad.depth as u32;
        let ih = (jh * s.in_step.height) as u32 - s.pad.height as u32;
        let iw = (jw * s.in_step.width) as u32 - s.pad.width as u32;
        let plane = (n * s.input.depth) as u32 + id;
        first[i] = (plane * s.input.height as u32 + ih) * s.input.width as u32 + iw;
        let mut bits = 0u32.runtime();
        #[unroll]
        for tap in 0..AXIS_BITS {
            // What is below zero has wrapped around, beyond any extent.
            bits |= u32::cast_from(id + tap < s.input.depth as u32) << tap;
            bits |= u32::cast_from(ih + tap < s.input.height as u32) << (tap + AXIS_BITS);
            bits |= u32::cast_from(iw + tap < s.input.width as u32) << (tap + 2 * AXIS_BITS);
        }
        inside[i] = select(row < rows, bits, 0u32);
    }
    Corners { first, inside }
}

/// Tap number `tap`, counted along the width first.
#[cube]
pub(super) fn tap_of(tap: usize, s: &GatherNumbers) -> Tap {
    let width = (tap % s.taps.width) as u32;
    let height = (tap / s.taps.width % s.taps.height) as u32;
    let depth = (tap / s.taps.width / s.taps.height) as u32;
    let ahead = (depth * s.input.height as u32 + height) * s.input.width as u32 + width;
    Tap { depth, height, width, ahead }
}

/// Whether the tap's voxel of the unit's row number `i` is inside of the input, and its position there.
#[cube]
pub(super) fn under(tap: &Tap, corners: &Corners, #[comptime] i: usize) -> (bool, u32) {
    let bits = corners.inside[i];
    let all = (bits >> tap.depth) & (bits >> (tap.height + AXIS_BITS)) & (bits >> (tap.width + 2 * AXIS_BITS)) & 1;
    (all == 1, corners.first[i] + tap.ahead)
}

/// The rows of a block.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Rows {
    pub first: usize,
    /// The end of the rows that the block may take.
    pub end: usize,
    /// The sample that all of them belong to; 0 where blocks may reach from one sample into the next.
    pub sample: usize,
}

/// The rows of block `row_block` of `block` rows. With `by_sample`, those of each sample are divided into `s.parts` blocks.
#[cube]
pub(super) fn rows_of_block(
    row_block: usize,
    s: &GatherNumbers,
    #[comptime] block: usize,
    #[comptime] by_sample: bool,
) -> Rows {
    let of_sample = s.count.depth * s.count.height * s.count.width;
    if comptime!(by_sample) {
        let sample = row_block / s.parts;
        let first = sample * of_sample + row_block % s.parts * block;
        Rows { first, end: (sample + 1) * of_sample, sample }
    } else {
        Rows { first: row_block * block, end: s.batch * of_sample, sample: 0usize.runtime() }
    }
}
