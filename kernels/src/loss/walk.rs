//! How units walk over the voxels of all levels, and how they read what is known about a group of voxels.

use super::channels::split;
use super::plan::{LossPlan, TAIL, Weighting};
use cubecl::prelude::*;

/// Words of a level in the table of levels.
pub(super) const LEVEL_WORDS: usize = 9;

/// One level in the table of levels.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct LevelRow {
    /// Chunks of the levels before.
    pub(super) first_chunk: u32,
    /// Voxels of the levels before, with all samples.
    pub(super) first_voxel: u32,
    /// Chunks of a sample.
    pub(super) chunks: u32,
    /// Voxels of a sample.
    pub(super) voxels: u32,
    pub(super) dims: [u32; 3],
    /// Where its coordinates begin in the table of axes.
    pub(super) axes: u32,
    /// The level has the label map's resolution.
    pub(super) full: bool,
}

impl LevelRow {
    pub(super) fn words(&self) -> [u32; LEVEL_WORDS] {
        let [depth, height, width] = self.dims;
        let full = u32::from(self.full);
        [self.first_chunk, self.first_voxel, self.chunks, self.voxels, depth, height, width, self.axes, full]
    }
}

const FIRST_CHUNK: usize = 0;
const FIRST_VOXEL: usize = 1;

/// Sizes of a loss and its small tables.
#[derive(CubeLaunch, CubeType)]
pub(super) struct LevelGrid {
    /// [`LevelRow`] of every level.
    pub(super) levels: Box<[u32]>,
    /// Of every level: for every coordinate along depth, height and width its share of the label's index.
    pub(super) axes: Box<[u32]>,
    /// `[batch, channels + 1]`: the label (region) that a channel stands for in a sample; only read where some are
    /// missing. A missing class stands for the background, a missing region for none.
    pub(super) acting: Box<[u32]>,
    /// Bit sets of regions by label, with an empty one for ignored voxels.
    pub(super) regions: Box<[u32]>,
    /// Number of samples.
    pub(super) batch: usize,
    /// Voxels of a sample of the label map.
    pub(super) label_voxels: usize,
    /// Chunks of all levels and samples.
    pub(super) chunks: usize,
}

/// A level and a sample, and what of it is walked over.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Place {
    pub(super) level: usize,
    pub(super) sample: usize,
    /// First voxel and end of the part, in the sample.
    pub(super) start: usize,
    pub(super) end: usize,
    /// Voxels of the samples before it in the level's buffer.
    pub(super) before: usize,
    /// Voxels of the levels before.
    pub(super) first_voxel: usize,
    depth: u32,
    height: u32,
    width: u32,
    axes: usize,
    full: bool,
}

/// The level that holds a chunk.
#[cube]
fn level_of(grid: &LevelGrid, chunk: usize, #[comptime] levels: usize) -> usize {
    let mut level = 0usize;
    #[unroll]
    for later in 1..levels {
        let first = grid.levels[comptime!(later * LEVEL_WORDS + FIRST_CHUNK)] as usize;
        level = select(chunk >= first, later, level);
    }
    level
}

#[cube]
fn place(grid: &LevelGrid, level: usize, sample: usize, start: usize, end: usize) -> Place {
    let row = level * LEVEL_WORDS;
    Place {
        level,
        sample,
        start,
        end,
        before: sample * grid.levels[row + 3] as usize,
        first_voxel: grid.levels[row + FIRST_VOXEL] as usize,
        depth: grid.levels[row + 4],
        height: grid.levels[row + 5],
        width: grid.levels[row + 6],
        axes: grid.levels[row + 7] as usize,
        full: grid.levels[row + 8] != 0,
    }
}

/// The `item`-th chunk.
#[cube]
pub(super) fn chunk_place(grid: &LevelGrid, item: usize, #[comptime] plan: LossPlan) -> Place {
    let level = level_of(grid, item, plan.levels);
    let row = level * LEVEL_WORDS;
    let in_level = item - grid.levels[row + FIRST_CHUNK] as usize;
    let chunks = grid.levels[row + 2] as usize;
    let start = (in_level % chunks) * plan.chunk;
    let end = (start + plan.chunk).min(grid.levels[row + 3] as usize);
    place(grid, level, in_level / chunks, start, end)
}

/// Label and weight of the `N` voxels from `voxel` of a sample on. A voxel that does not count has the label
/// `plan.labels`, which is larger than all that do: its own is not declared, or names a class that is missing in
/// the sample, or its weight is not above 0.
///
/// A level that is coarser than the label map reads the voxel that nearest-exact interpolation takes.
#[cube]
pub(super) fn read_group<L: Int, W: Numeric, N: Size>(
    labels: &[L],
    weights: &[W],
    grid: &LevelGrid,
    place: &Place,
    voxel: usize,
    #[comptime] plan: LossPlan,
) -> (Vector<u32, N>, Vector<f32, N>) {
    let none = Vector::<u32, N>::new(comptime!(plan.labels as u32));
    let first = place.sample * grid.label_voxels;
    let mut label = Vector::<u32, N>::empty();
    let mut weight = Vector::<f32, N>::new(1.0f32);
    if comptime!(!plan.coarse) || place.full {
        let at = (first + voxel) / N::value();
        label = Vector::cast_from(labels.as_vectorized().with_vector_size::<N>()[at]);
        if comptime!(plan.weighting != Weighting::None) {
            weight = Vector::cast_from(weights.as_vectorized().with_vector_size::<N>()[at]);
        }
    } else {
        let row = voxel as u32 / place.width;
        let mut x = voxel as u32 % place.width;
        let mut y = row % place.height;
        let mut z = row / place.height;
        let rows = place.axes + place.depth as usize;
        let columns = rows + place.height as usize;
        #[unroll]
        for lane in 0..N::value() {
            let shares = grid.axes[place.axes + z as usize] + grid.axes[rows + y as usize];
            let index = (shares + grid.axes[columns + x as usize]) as usize;
            label.insert(lane, u32::cast_from(labels[first + index]));
            if comptime!(plan.weighting != Weighting::None) {
                weight.insert(lane, f32::cast_from(weights[first + index]));
            }
            // Selects: branches here would triple the time that the kernel takes to compile.
            let row_ends = x + 1 == place.width;
            x = select(row_ends, 0, x + 1);
            y = select(row_ends, y + 1, y);
            let slice_ends = y == place.height;
            y = select(slice_ends, 0, y);
            z = select(slice_ends, z + 1, z);
        }
    }
    label = select_many(label.less_than(&none), label, none);
    if comptime!(plan.missing && !plan.regions) {
        let row = place.sample * comptime!(plan.classes + 1);
        let mut acting = Vector::<u32, N>::empty();
        #[unroll]
        for lane in 0..N::value() {
            acting.insert(lane, grid.acting[row + label.extract(lane) as usize]);
        }
        label = select_many(acting.equal(&label), label, none);
    }
    if comptime!(plan.weighting != Weighting::None) {
        if comptime!(plan.weighting == Weighting::Bytes) {
            weight /= Vector::new(255.0f32);
        }
        label = select_many(weight.greater_than(&Vector::new(0.0f32)), label, none);
    }
    (label, weight)
}

/// Whether any voxel counts.
#[cube]
pub(super) fn any_counts<N: Size>(label: Vector<u32, N>, #[comptime] plan: LossPlan) -> bool {
    if comptime!(plan.skip) {
        let mut least = label.extract(0usize);
        #[unroll]
        for lane in 1..N::value() {
            least = least.min(label.extract(lane));
        }
        least < comptime!(plan.labels as u32)
    } else {
        true.runtime()
    }
}

/// Whole groups of a place: the first voxel of the first one, and their number. They begin at multiples of `N` voxels of
/// the level's buffer, so that what they hold is aligned vectors; the voxels before and behind them are walked over one
/// by one, see `voxel_beside`.
#[cube]
pub(super) fn groups_of<N: Size>(place: &Place) -> (usize, usize) {
    let lanes = N::value();
    if comptime!(lanes == 1) {
        (place.start, place.end - place.start)
    } else {
        let beyond = (place.before + place.start) % lanes;
        let start = select(beyond == 0, place.start, (place.start + lanes - beyond).min(place.end));
        (start, (place.end - start) / lanes)
    }
}

/// The `i`-th voxel of a place that is not in its groups, which cover `covered` voxels from `start` on.
#[cube]
pub(super) fn voxel_beside(place: &Place, start: usize, covered: usize, i: usize) -> usize {
    let voxel = place.start + i;
    select(voxel < start, voxel, voxel + covered)
}

/// Where the coefficients of a level's gradient begin.
#[cube]
pub(super) fn coefficients_at(batch: usize, level: usize, #[comptime] plan: LossPlan) -> usize {
    level * (2 * batch * plan.classes + TAIL)
}

/// Sum of the lanes.
#[cube]
pub(super) fn lane_sum<N: Size>(v: Vector<f32, N>) -> f32 {
    let lanes = N::value();
    let size!(Half) = comptime!((lanes / 2).max(1));
    let size!(Quarter) = comptime!((lanes / 4).max(1));
    if comptime!(lanes >= 4) {
        let (even, odd) = split::<N, Half>(v);
        let (left, right) = split::<Half, Quarter>(even + odd);
        in_order::<Quarter>(left + right)
    } else {
        in_order::<N>(v)
    }
}

#[cube]
fn in_order<N: Size>(v: Vector<f32, N>) -> f32 {
    let mut sum = v.extract(0usize);
    #[unroll]
    for lane in 1..N::value() {
        sum += v.extract(lane);
    }
    sum
}

/// Writes a row of partial sums: the lanes of `wide` and the voxels beside the groups together.
#[cube]
pub(super) fn write_row<N: Size>(
    wide: &Array<Vector<f32, N>>,
    rest: &Array<Vector<f32, Const<1>>>,
    sums: &mut [f32],
    row: usize,
    #[comptime] plan: LossPlan,
) {
    let lanes = N::value();
    if comptime!(lanes > 1 && plan.unroll) {
        // Sums that the loop below does not index stay in registers.
        let mut copies = Array::<Vector<f32, N>>::new(comptime!(plan.slots()));
        #[unroll]
        for slot in 0..comptime!(plan.slots()) {
            copies[slot] = wide[slot];
        }
        for slot in 0..comptime!(plan.slots()) {
            sums[row + slot] = lane_sum::<N>(copies[slot]) + rest[slot].extract(0usize);
        }
    } else {
        for slot in 0..comptime!(plan.slots()) {
            sums[row + slot] = lane_sum::<N>(wide[slot]) + rest[slot].extract(0usize);
        }
    }
}
