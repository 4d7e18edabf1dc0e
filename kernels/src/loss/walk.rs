//! How units walk over the voxels, and how they read the labels of a group of voxels.

use crate::block::strip;
use cubecl::prelude::*;

/// Voxels in a chunk. A chunk lies in one sample and is what one partial sum covers: short enough that its f32
/// sums lose nothing (256 terms a lane with eight lanes), long enough that the partial sums are few.
pub(super) const CHUNK: usize = 2048;

/// Sizes of one level, and which labels count.
#[derive(CubeLaunch, CubeType)]
pub(super) struct Extent {
    /// Number of samples.
    pub(super) batch: usize,
    /// Voxels of a sample at this level.
    pub(super) voxels: usize,
    /// Voxels of a sample of the label map.
    pub(super) label_voxels: usize,
    pub(super) depth: u32,
    pub(super) height: u32,
    pub(super) width: u32,
    /// Labels from here on are treated as ignored.
    pub(super) labels: u32,
    /// The ignored label, or a number that no label is.
    pub(super) ignore: u32,
}

/// Number of chunks in a sample.
#[cube]
pub(super) fn chunks_of(voxels: usize) -> usize {
    (voxels + CHUNK - 1) / CHUNK
}

/// The chunks of this unit: a contiguous run of them where units are threads, else the one of its cube.
#[cube]
pub(super) fn my_chunks(chunks: usize, #[comptime] walkers: usize) -> (usize, usize) {
    if comptime!(walkers == 1) {
        strip(chunks)
    } else {
        let low = CUBE_POS.min(chunks);
        (low, (low + 1).min(chunks))
    }
}

/// This unit's place among those that share a chunk.
#[cube]
pub(super) fn my_place(#[comptime] walkers: usize) -> usize {
    if comptime!(walkers == 1) { 0usize.runtime() } else { UNIT_POS as usize }
}

/// Labels of the `N` voxels from `voxel` of `sample` on; ignored and undeclared ones become `none`.
///
/// A level that is coarser than the label map reads the voxel that nearest-exact interpolation takes: `axes`
/// holds, for every coordinate along depth, height and width, the share of the label's index.
#[cube]
pub(super) fn read_labels<N: Size>(
    labels: &[u8],
    axes: &[u32],
    extent: &Extent,
    sample: usize,
    voxel: usize,
    none: u32,
    #[comptime] full: bool,
) -> Vector<u32, N> {
    let first = sample * extent.label_voxels;
    let mut label = Vector::<u32, N>::empty();
    if comptime!(full) {
        #[unroll]
        for lane in 0..N::value() {
            label.insert(lane, u32::cast_from(labels[first + voxel + lane]));
        }
    } else {
        let row = voxel as u32 / extent.width;
        let mut x = voxel as u32 % extent.width;
        let mut y = row % extent.height;
        let mut z = row / extent.height;
        #[unroll]
        for lane in 0..N::value() {
            let behind_depth = extent.depth + y;
            let behind_height = extent.depth + extent.height + x;
            let index = axes[z as usize] + axes[behind_depth as usize] + axes[behind_height as usize];
            label.insert(lane, u32::cast_from(labels[first + index as usize]));
            // Selects: branches here would triple the time that the kernel takes to compile.
            let row_ends = x + 1 == extent.width;
            x = select(row_ends, 0, x + 1);
            y = select(row_ends, y + 1, y);
            let slice_ends = y == extent.height;
            y = select(slice_ends, 0, y);
            z = select(slice_ends, z + 1, z);
        }
    }
    let declared = label.less_than(&Vector::new(extent.labels));
    let counts = declared.vec_and(label.not_equal(&Vector::new(extent.ignore)));
    select_many(counts, label, Vector::new(none))
}

/// Whether any lane holds something else than `none`, which is larger than everything else.
#[cube]
pub(super) fn any_below<N: Size>(label: Vector<u32, N>, none: u32) -> bool {
    let mut least = label.extract(0usize);
    #[unroll]
    for lane in 1..N::value() {
        least = least.min(label.extract(lane));
    }
    least < none
}

/// One channel of `N` neighbouring voxels, in f32. `first` is that channel of the first voxel.
#[cube]
pub(super) fn gather<E: Float, N: Size>(logits: &[E], first: usize, #[comptime] channels: usize) -> Vector<f32, N> {
    let mut stored = Vector::<E, N>::empty();
    #[unroll]
    for lane in 0..N::value() {
        stored.insert(lane, logits[first + lane * channels]);
    }
    Vector::cast_from(stored)
}

/// Stores all channels of `N` neighbouring voxels. Voxel by voxel, so that memory is written in order: storing
/// channel by channel took up to twice as long.
#[cube]
pub(super) fn store_group<E: Float, N: Size>(
    gradient: &mut [E],
    first: usize,
    values: &mut Array<Vector<f32, N>>,
    #[comptime] channels: usize,
    #[comptime] unroll: bool,
) {
    #[unroll]
    for lane in 0..N::value() {
        #[unroll(unroll)]
        for channel in 0..channels {
            gradient[first + lane * channels + channel] = E::cast_from(values[channel].extract(lane));
        }
    }
}

/// Zeroes the gradient of `N` neighbouring voxels.
#[cube]
pub(super) fn clear<E: Float>(gradient: &mut [E], first: usize, #[comptime] len: usize) {
    for i in 0..len {
        gradient[first + i] = E::from_int(0);
    }
}

/// Sum of the lanes.
#[cube]
pub(super) fn lane_sum<N: Size>(v: Vector<f32, N>) -> f32 {
    let mut sum = v.extract(0usize);
    #[unroll]
    for lane in 1..N::value() {
        sum += v.extract(lane);
    }
    sum
}

/// Sum of the lanes.
#[cube]
pub(super) fn lane_count<N: Size>(v: Vector<u32, N>) -> u32 {
    let mut sum = v.extract(0usize);
    #[unroll]
    for lane in 1..N::value() {
        sum += v.extract(lane);
    }
    sum
}

/// Adds what a unit has summed over its part of a chunk to its row of partial sums: the lanes of the wide
/// groups and the voxels behind the last of them.
#[cube]
pub(super) fn write_row<N: Size>(
    wide: &Array<Vector<f32, N>>,
    rest: &Array<Vector<f32, Const<1>>>,
    row: &mut [f32],
    first: usize,
    #[comptime] len: usize,
) {
    for slot in 0..len {
        row[first + slot] = lane_sum::<N>(wide[slot]) + rest[slot].extract(0usize);
    }
}

/// [`write_row`] for counts.
#[cube]
pub(super) fn write_count_row<N: Size>(
    wide: &Array<Vector<u32, N>>,
    rest: &Array<Vector<u32, Const<1>>>,
    row: &mut [u32],
    first: usize,
    #[comptime] len: usize,
) {
    for slot in 0..len {
        row[first + slot] = lane_count::<N>(wide[slot]) + rest[slot].extract(0usize);
    }
}
