//! How units walk over the voxels of all levels, and how they read what is known about a group of voxels.

use super::plan::{Plan, TAIL, Weighting};
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
pub(super) struct Grid {
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
    /// Voxels of all levels and samples.
    pub(super) voxels: usize,
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

/// The level that holds an item, by the number of items before each.
#[cube]
fn level_of(grid: &Grid, item: usize, #[comptime] word: usize, #[comptime] levels: usize) -> usize {
    let mut level = 0usize;
    #[unroll]
    for later in 1..levels {
        let first = grid.levels[comptime!(later * LEVEL_WORDS + word)] as usize;
        level = select(item >= first, later, level);
    }
    level
}

#[cube]
fn place(grid: &Grid, level: usize, sample: usize, start: usize, end: usize) -> Place {
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
pub(super) fn chunk_place(grid: &Grid, item: usize, #[comptime] plan: Plan) -> Place {
    let level = level_of(grid, item, FIRST_CHUNK, plan.levels);
    let row = level * LEVEL_WORDS;
    let in_level = item - grid.levels[row + FIRST_CHUNK] as usize;
    let chunks = grid.levels[row + 2] as usize;
    let start = (in_level % chunks) * plan.chunk;
    let end = (start + plan.chunk).min(grid.levels[row + 3] as usize);
    place(grid, level, in_level / chunks, start, end)
}

/// The `item`-th voxel.
#[cube]
pub(super) fn voxel_place(grid: &Grid, item: usize, #[comptime] plan: Plan) -> Place {
    let level = level_of(grid, item, FIRST_VOXEL, plan.levels);
    let row = level * LEVEL_WORDS;
    let in_level = item - grid.levels[row + FIRST_VOXEL] as usize;
    let voxels = grid.levels[row + 3] as usize;
    let start = in_level % voxels;
    place(grid, level, in_level / voxels, start, start + 1)
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
    grid: &Grid,
    place: &Place,
    voxel: usize,
    #[comptime] plan: Plan,
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
pub(super) fn any_counts<N: Size>(label: Vector<u32, N>, #[comptime] plan: Plan) -> bool {
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

/// Reads all channels of `N` neighbouring voxels in f32, zeros where a voxel does not count (a select and not a
/// product: what an ignored voxel holds may be NaN), and returns the largest. `first` is the first logit.
#[cube]
pub(super) fn load_group<E: Float, N: Size>(
    logits: &Sequence<Box<[E]>>,
    level: usize,
    first: usize,
    counts: Vector<bool, N>,
    values: &mut Array<Vector<f32, N>>,
    #[comptime] plan: Plan,
) -> Vector<f32, N> {
    let lanes = N::value();
    let mut top = Vector::<f32, N>::new(f32::MIN);
    #[unroll]
    for candidate in 0..plan.levels {
        if comptime!(plan.levels == 1) || level == candidate {
            let buffer = &logits[candidate];
            if comptime!(lanes == 1) {
                #[unroll(plan.unroll)]
                for channel in 0..plan.classes {
                    let stored = Vector::<E, N>::new(buffer[first + channel]);
                    let z = select_many(counts, Vector::cast_from(stored), Vector::new(0.0f32));
                    values[channel] = z;
                    top = select_many(z.greater_than(&top), z, top);
                }
            } else if comptime!(plan.classes <= BLOCK) {
                load_span::<E, N>(buffer, first, values, plan.classes);
            } else {
                for block in 0..comptime!(plan.classes.div_ceil(BLOCK)) {
                    let channel = (block * BLOCK).min(comptime!(plan.classes - BLOCK));
                    load_block::<E, N>(buffer, first + channel, values, channel, plan.classes);
                }
            }
        }
    }
    if comptime!(lanes > 1) {
        #[unroll(plan.unroll)]
        for channel in 0..plan.classes {
            let z = select_many(counts, values[channel], Vector::new(0.0f32));
            values[channel] = z;
            top = select_many(z.greater_than(&top), z, top);
        }
    }
    top
}

/// Stores all channels of `N` neighbouring voxels.
#[cube]
pub(super) fn store_group<E: Float, N: Size>(
    gradients: &mut Sequence<Box<[E]>>,
    level: usize,
    first: usize,
    values: &mut Array<Vector<f32, N>>,
    #[comptime] plan: Plan,
) {
    let lanes = N::value();
    #[unroll]
    for candidate in 0..plan.levels {
        if comptime!(plan.levels == 1) || level == candidate {
            let buffer = &mut gradients[candidate];
            if comptime!(lanes == 1) {
                #[unroll(plan.unroll)]
                for channel in 0..plan.classes {
                    buffer[first + channel] = E::cast_from(values[channel].extract(0usize));
                }
            } else if comptime!(plan.classes <= BLOCK) {
                store_span::<E, N>(buffer, first, values, plan.classes);
            } else {
                for block in 0..comptime!(plan.classes.div_ceil(BLOCK)) {
                    let channel = (block * BLOCK).min(comptime!(plan.classes - BLOCK));
                    store_block::<E, N>(buffer, first + channel, values, channel, plan.classes);
                }
            }
        }
    }
}

/// Reads the `N` voxels of a group whose few channels fill whole vectors: `channels` aligned loads, and shuffles.
#[cube]
fn load_span<E: Float, N: Size>(
    buffer: &[E],
    first: usize,
    values: &mut Array<Vector<f32, N>>,
    #[comptime] channels: usize,
) {
    let lanes = N::value();
    let vectors = buffer.as_vectorized().with_vector_size::<N>();
    let mut span = Array::<Vector<f32, N>>::new(channels);
    #[unroll]
    for part in 0..channels {
        span[part] = Vector::cast_from(vectors[first / lanes + part]);
    }
    #[unroll]
    for channel in 0..channels {
        let mut value = Vector::<f32, N>::empty();
        #[unroll]
        for lane in 0..lanes {
            let place = comptime!(lane * channels + channel);
            value.insert(lane, span[comptime!(place / lanes)].extract(comptime!(place % lanes)));
        }
        values[channel] = value;
    }
}

/// The reverse of `load_span`.
#[cube]
fn store_span<E: Float, N: Size>(
    buffer: &mut [E],
    first: usize,
    values: &mut Array<Vector<f32, N>>,
    #[comptime] channels: usize,
) {
    let lanes = N::value();
    let size!(Two) = comptime!(2 * lanes);
    let size!(Four) = comptime!(4 * lanes);
    let buffer = buffer.as_vectorized_mut();
    if comptime!(channels == 1) {
        buffer.with_vector_size_mut::<N>()[first / lanes] = Vector::cast_from(values[0]);
    } else if comptime!(channels == 2) {
        let both = join::<N, Two>(values[0], values[1]);
        buffer.with_vector_size_mut::<Two>()[first / comptime!(2 * lanes)] = Vector::cast_from(both);
    } else {
        // With a fourth channel that is left out again if there are three.
        let fourth = values[comptime!(channels - 1)];
        let quads = join_four::<N, Two, Four>(values[0], values[1], values[2], fourth);
        if comptime!(channels == 4) {
            buffer.with_vector_size_mut::<Four>()[first / comptime!(4 * lanes)] = Vector::cast_from(quads);
        } else {
            let vectors = buffer.with_vector_size_mut::<N>();
            #[unroll]
            for part in 0..channels {
                let mut span = Vector::<f32, N>::empty();
                #[unroll]
                for lane in 0..lanes {
                    let place = comptime!(part * lanes + lane);
                    span.insert(lane, quads.extract(comptime!(place / channels * 4 + place % channels)));
                }
                vectors[first / lanes + part] = Vector::cast_from(span);
            }
        }
    }
}

/// Channels that a group of many is read and stored by: a load for each voxel, instead of one for each value.
const BLOCK: usize = 4;

/// Reads `BLOCK` neighbouring channels of `N` voxels, of which `first` is the first value, into `values` from `channel`
/// on.
#[cube]
fn load_block<E: Float, N: Size>(
    buffer: &[E],
    first: usize,
    values: &mut Array<Vector<f32, N>>,
    channel: usize,
    #[comptime] channels: usize,
) {
    let lanes = N::value();
    let size!(All) = comptime!(BLOCK * lanes);
    let size!(Half) = comptime!(BLOCK / 2 * lanes);
    let mut stored = Vector::<E, All>::empty();
    #[unroll]
    for lane in 0..lanes {
        #[unroll]
        for i in 0..BLOCK {
            stored.insert(comptime!(lane * BLOCK + i), buffer[first + comptime!(lane * channels + i)]);
        }
    }
    let (even, odd) = split::<All, Half>(Vector::cast_from(stored));
    let (zero, two) = split::<Half, N>(even);
    let (one, three) = split::<Half, N>(odd);
    values[channel] = zero;
    values[channel + 1] = one;
    values[channel + 2] = two;
    values[channel + 3] = three;
}

/// The reverse of `load_block`.
#[cube]
fn store_block<E: Float, N: Size>(
    buffer: &mut [E],
    first: usize,
    values: &mut Array<Vector<f32, N>>,
    channel: usize,
    #[comptime] channels: usize,
) {
    let lanes = N::value();
    let size!(All) = comptime!(BLOCK * lanes);
    let size!(Half) = comptime!(BLOCK / 2 * lanes);
    let quads =
        join_four::<N, Half, All>(values[channel], values[channel + 1], values[channel + 2], values[channel + 3]);
    let stored = Vector::<E, All>::cast_from(quads);
    #[unroll]
    for lane in 0..lanes {
        #[unroll]
        for i in 0..BLOCK {
            buffer[first + comptime!(lane * channels + i)] = stored.extract(comptime!(lane * BLOCK + i));
        }
    }
}

/// The even and the odd lanes. Shifts and narrowing say so in few operations, which an extraction of every lane does
/// not.
#[cube]
fn split<Both: Size, One: Size>(v: Vector<f32, Both>) -> (Vector<f32, One>, Vector<f32, One>) {
    let pairs = Vector::<u64, One>::reinterpret(v);
    let even = Vector::<u32, One>::cast_from(pairs);
    let odd = Vector::<u32, One>::cast_from(pairs >> Vector::new(32u64));
    (Vector::reinterpret(even), Vector::reinterpret(odd))
}

/// The reverse of `split`.
#[cube]
fn join<One: Size, Both: Size>(even: Vector<f32, One>, odd: Vector<f32, One>) -> Vector<f32, Both> {
    let even = Vector::<u64, One>::cast_from(Vector::<u32, One>::reinterpret(even));
    let odd = Vector::<u64, One>::cast_from(Vector::<u32, One>::reinterpret(odd));
    Vector::reinterpret(even | (odd << Vector::new(32u64)))
}

/// Four channels of each voxel side by side.
#[cube]
fn join_four<N: Size, Two: Size, Four: Size>(
    zero: Vector<f32, N>,
    one: Vector<f32, N>,
    two: Vector<f32, N>,
    three: Vector<f32, N>,
) -> Vector<f32, Four> {
    join::<Two, Four>(join::<N, Two>(zero, two), join::<N, Two>(one, three))
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

/// Zeroes `len` values of a gradient.
#[cube]
pub(super) fn clear<E: Float>(
    gradients: &mut Sequence<Box<[E]>>,
    level: usize,
    first: usize,
    #[comptime] len: usize,
    #[comptime] plan: Plan,
) {
    #[unroll]
    for candidate in 0..plan.levels {
        if comptime!(plan.levels == 1) || level == candidate {
            let buffer = &mut gradients[candidate];
            for i in 0..len {
                buffer[first + i] = E::from_int(0);
            }
        }
    }
}

/// One logit.
#[cube]
pub(super) fn load_one<E: Float>(
    logits: &Sequence<Box<[E]>>,
    level: usize,
    index: usize,
    #[comptime] plan: Plan,
) -> f32 {
    let mut value = 0.0f32;
    #[unroll]
    for candidate in 0..plan.levels {
        if comptime!(plan.levels == 1) || level == candidate {
            value = f32::cast_from(logits[candidate][index]);
        }
    }
    value
}

/// One value of a gradient.
#[cube]
pub(super) fn store_one<E: Float>(
    gradients: &mut Sequence<Box<[E]>>,
    level: usize,
    index: usize,
    value: f32,
    #[comptime] plan: Plan,
) {
    #[unroll]
    for candidate in 0..plan.levels {
        if comptime!(plan.levels == 1) || level == candidate {
            let buffer = &mut gradients[candidate];
            buffer[index] = E::cast_from(value);
        }
    }
}

/// Where the coefficients of a level's gradient begin.
#[cube]
pub(super) fn coefficients_of(batch: usize, level: usize, #[comptime] plan: Plan) -> usize {
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
    #[comptime] plan: Plan,
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
