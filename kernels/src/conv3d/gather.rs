//! The direct convolution: a register tile of a few outputs along the width times a few vectors of output
//! channels. One kernel serves six operations, since all of them *gather*:
//!
//! `y[j * out_step + out_offset, o] = bias[o] + sum over taps t, channels c of x[j * in_step + t - pad, c] * w[t, c, o]`
//!
//! | operation | gathers from | `in_step` | `out_step` |
//! |---|---|---|---|
//! | convolution, forward | input | stride | 1 |
//! | its data gradient, stride 1 | gradient | 1 | 1 |
//! | its data gradient, stride 2 | gradient, once per parity of the input position | 1 | 2 |
//! | transposed convolution, forward | input, once per position inside the stride | 1 | stride |
//! | its data gradient | gradient | stride | 1 |
//!
//! The weights are packed beforehand (`pack.rs`) into the order in which a tile reads them, which also
//! flips and transposes them. Positions outside of `x` count as zero; whole rows outside are skipped.
//!
//! Where a result has fewer channels than a register has lanes, a register holds several partial sums of each: `split`
//! neighbouring gathered values are loaded at once and repeated over the channels, lane `g * split + k` sums the products
//! of channel `g` with every `split`-th value from the `k`-th on, and the lanes of a channel are added at the end.
//!
//! Bytes: `x` is read once per block of output channels from cache, `y` is written once. Arithmetic bound:
//! with `width * vectors` independent sums a core's multiply-add units stay busy.

use crate::block::strip;
use crate::conv3d::{igemm, tiled};
use crate::instance_norm::Operand;
use crate::instance_norm::epilogue::{Epilogue, Take, add_moments, clear_parts};
use crate::{Buffer, Caps, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

pub(super) const OPERATION: &str = "convolution";

/// Units that keep a GPU busy.
const GPU_UNITS: usize = 1 << 16;

/// What is compiled into one instance of the kernel. Taps, steps and paddings are run-time numbers: compiled in, they make
/// the loops no faster (LLVM unrolls short ones, which was measured at half the speed), and every mix would be compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Plan {
    /// Outputs along the width that one tile holds in registers.
    width: usize,
    /// Vectors of output channels that one tile holds in registers.
    vectors: usize,
    /// Partial sums of a channel in a vector.
    split: usize,
    /// Whether a second input continues the channels of the first.
    second_input: bool,
    bias: bool,
    /// Whether the moments of the outputs are taken.
    moments: bool,
    /// Whether a unit has one part of each sample's moments for all of its segments, on CPUs; else each segment is a part.
    chunked: bool,
    /// Groups of `split` values between what neighbouring outputs gather from each input: compiled in, since a register for
    /// each output's address is more than a CPU has.
    strides: [usize; 2],
    /// Whether outputs at all positions inside the step are computed.
    spread: bool,
    /// Whether a gathered value is loaded once for three neighbouring outputs: with three taps along the width, one apart.
    shared: bool,
}

/// Vector width and tile for `channels_out`, and for rows of `count` outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tile {
    /// Channels in a vector.
    pub lanes: usize,
    /// Vectors of channels in a tile.
    pub vectors: usize,
    /// Outputs along the width in a tile.
    pub width: usize,
    /// Partial sums of each channel in a register of `lanes * split` lanes.
    pub split: usize,
}

impl Tile {
    /// Chooses the tile. Measured on CPUs: with 16 registers (AVX2) 6 x 2 vectors is the fastest, more sums than about 12
    /// spill; with 32 (AVX-512) it is 12 x 2, or what divides the row best below that, while single vectors gain nothing
    /// beyond 12. Fewer than 8 sums leave the multiply-add units waiting for each other. A GPU has registers for 8 x 4 vectors of 4,
    /// which need half the loads of 6 x 2: 2.7 times as fast on Mesa's software driver.
    ///
    /// `gathered` are the channels of each input: a split has to divide all of them.
    pub fn choose(caps: &Caps, channels_out: usize, count: usize, gathered: [usize; 2]) -> Self {
        let lanes = widest_vector(caps, channels_out);
        let sums = if caps.cores.is_some() { (caps.registers * 3 / 4).min(24) } else { 32 };
        let blocks = channels_out / lanes;
        let vectors = match blocks {
            b if b % 4 == 0 && caps.cores.is_none() => 4,
            b if b % 2 == 0 => 2,
            b if b % 3 == 0 => 3,
            _ => 1,
        };
        // Estimated cycles of one row: the outputs that its last two tiles share are computed twice.
        let cost = |width: usize| count.div_ceil(width) * (width * vectors).max(8);
        let widest = (sums / vectors).clamp(1, count.max(1));
        let width = (1..=widest).rev().min_by_key(|&w| cost(w)).unwrap_or(1);
        Self { lanes, vectors, width, split: split_for(caps, lanes, gathered) }
    }

    /// Channels in a tile.
    pub fn channels(&self) -> usize {
        self.lanes * self.vectors
    }
}

/// How outputs are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// On register tiles, in f32.
    Direct(Tile),
    /// On tensor cores, from 16-bit factors.
    TensorCores(igemm::Plan),
    /// On register tiles of a cube that shares its input, in f32.
    Tiled(tiled::Plan),
}

impl Method {
    /// Tensor cores where [`igemm::Plan::choose`] allows them for sums over the gathered channels. Arguments as in
    /// [`Tile::choose`].
    pub fn choose(caps: &Caps, dtype: Dtype, gathered: [usize; 2], channels_out: usize, count: usize) -> Self {
        let channels_in = gathered[0].max(gathered[1]);
        let (layout, voxels) = (igemm::VOXELS_BY_CHANNELS, usize::MAX);
        if let Some(plan) = igemm::Plan::choose(caps, dtype, layout, voxels, channels_in, channels_out) {
            return Self::TensorCores(plan);
        }
        match tiled::Plan::choose(caps, gathered, channels_out) {
            Some(plan) => Self::Tiled(plan),
            None => Self::Direct(Tile::choose(caps, channels_out, count, gathered)),
        }
    }

    /// Result channels of a block of packed weights, of `channels_out` in all, their partial sums, and the weights' type.
    pub fn packing(&self, dtype: Dtype, channels_out: usize) -> (usize, usize, Dtype) {
        match self {
            Self::Direct(tile) => (tile.channels(), tile.split, Dtype::F32),
            Self::TensorCores(_) => (channels_out, 1, dtype),
            Self::Tiled(_) => (channels_out, 1, Dtype::F32),
        }
    }
}

/// The widest vector that divides a number of channels and that the device loads at once.
pub(crate) fn widest_vector(caps: &Caps, channels: usize) -> usize {
    let mut lanes = caps.lanes.next_power_of_two();
    while !channels.is_multiple_of(lanes) {
        lanes /= 2;
    }
    lanes
}

/// How many channels of the other tensor a vector of `lanes` channels is filled up with, so that it is a whole register:
/// as many as divide all of `channels`. Only on CPUs; a GPU has no lanes to fill.
pub(crate) fn split_for(caps: &Caps, lanes: usize, channels: [usize; 2]) -> usize {
    let mut split = if caps.cores.is_some() { caps.lanes.next_power_of_two() / lanes } else { 1 };
    while channels.iter().any(|count| !count.is_multiple_of(split)) {
        split /= 2;
    }
    split
}

/// One launch of the kernel. Axes are depth, height, width.
pub(crate) struct Gather<'a> {
    pub batch: usize,
    /// `[batch, depth, height, width, channels]`; the channels of the second input continue the first's.
    pub input: Operand<'a>,
    pub channels_in: usize,
    pub second: Option<(Operand<'a>, usize)>,
    pub in_dims: [usize; 3],
    pub weights: &'a Buffer,
    pub bias: Option<&'a Buffer>,
    pub output: &'a Buffer,
    pub out_dims: [usize; 3],
    pub channels_out: usize,
    pub taps: [usize; 3],
    pub in_step: [usize; 3],
    pub pad: [usize; 3],
    /// Number of outputs that this launch computes along each axis.
    pub count: [usize; 3],
    pub out_step: [usize; 3],
    pub out_offset: [usize; 3],
    /// Set where one launch computes the outputs at all positions inside `out_step`, for [`Method::Direct`] only; `count` are
    /// all outputs then. Along each axis, this many of the packed taps belong to even outputs, the rest to odd ones.
    pub spread: Option<[usize; 3]>,
    pub method: Method,
    /// Taken in [`Gather::parts`] parts.
    pub epilogue: Epilogue<'a>,
}

#[derive(CubeType, CubeLaunch)]
pub(super) struct Shape {
    pub(super) batch: usize,
    pub(super) channels: usize,
    pub(super) second_channels: usize,
    pub(super) channels_out: usize,
    pub(super) in_depth: usize,
    pub(super) in_height: usize,
    pub(super) in_width: usize,
    pub(super) out_depth: usize,
    pub(super) out_height: usize,
    pub(super) out_width: usize,
    pub(super) count_depth: usize,
    pub(super) count_height: usize,
    pub(super) count_width: usize,
    pub(super) out_step_depth: usize,
    pub(super) out_step_height: usize,
    pub(super) out_step_width: usize,
    pub(super) out_offset_depth: usize,
    pub(super) out_offset_height: usize,
    pub(super) out_offset_width: usize,
    pub(super) taps_depth: usize,
    pub(super) taps_height: usize,
    pub(super) taps_width: usize,
    pub(super) in_step_depth: usize,
    pub(super) in_step_height: usize,
    pub(super) in_step_width: usize,
    pub(super) pad_depth: usize,
    pub(super) pad_height: usize,
    pub(super) pad_width: usize,
    pub(super) even_depth: usize,
    pub(super) even_height: usize,
    pub(super) even_width: usize,
    /// Rows of outputs that are computed for all channels before the next: their inputs stay in a core's cache.
    pub(super) chunk: usize,
    /// Tiles of one row that one unit computes in a piece.
    pub(super) tiles_in_segment: usize,
    /// Parts of the moments of each sample.
    pub(super) parts: usize,
}

/// Quotient and remainder for a step of one or two. Without a division, since compilers move one that is used in a loop only
/// into that loop, and cannot move it out again.
#[cube]
fn by_step(j: usize, step: usize) -> (usize, usize) {
    (j >> (step - 1), j & (step - 1))
}

/// Where a row of outputs lies along one axis, and what it gathers there.
#[derive(CubeType)]
struct Axis {
    out: usize,
    /// The output's number among those at the same position inside the step.
    j: usize,
    first_tap: usize,
    taps: usize,
}

/// Row `j`, of those of one position inside the step, or of all where they are `spread`: then positions are 0 and 1 at
/// most, and the first `even` taps belong to position 0.
#[cube]
fn axis(j: usize, step: usize, offset: usize, even: usize, taps: usize, #[comptime] spread: bool) -> Axis {
    if comptime!(spread) {
        let (quotient, position) = by_step(j, step);
        let taps = select(position == 0, even, taps - even);
        Axis { out: j, j: quotient, first_tap: position * even, taps }
    } else {
        Axis { out: j * step + offset, j, first_tap: 0usize.runtime(), taps }
    }
}

/// Where a row of outputs gathers from.
#[derive(CubeType)]
struct From {
    n: usize,
    depth: Axis,
    height: Axis,
    first_tap: usize,
    taps_width: usize,
}

/// One unit computes a strip of segments; a segment is a run of tiles along one row of outputs.
#[cube(launch)]
#[allow(clippy::collapsible_if, reason = "the outer condition is decided when the kernel is compiled")]
fn gather_kernel<E: Float, N: Size, K: Size, G: Size>(
    x: &[Vector<E, K>],
    second: &[Vector<E, K>],
    weights: &[Vector<f32, N>],
    bias: &[Vector<f32, G>],
    y: &mut [Vector<E, G>],
    moments: &mut [Vector<f32, G>],
    shape: Shape,
    #[comptime] plan: Plan,
    #[define(E)] _dtype: ElemType,
) {
    let width = comptime!(plan.width);
    let vectors = comptime!(plan.vectors);
    let lanes = G::value();
    let in_channels = shape.channels + shape.second_channels;
    let taps = shape.taps_depth * shape.taps_height * shape.taps_width;
    let blocks = shape.channels_out / (lanes * vectors);
    // Positions inside the step along the width, each with a row of tiles of its own.
    let positions = if comptime!(plan.spread) { shape.out_step_width } else { 1usize.runtime() };
    let tiles = shape.count_width.div_ceil(positions).div_ceil(width);
    let segments = tiles.div_ceil(shape.tiles_in_segment);
    let pieces = positions * segments;
    let rows = shape.batch * shape.count_depth * shape.count_height;
    let chunk_items = shape.chunk * blocks * pieces;

    let vectors_out = shape.channels_out / lanes;
    if comptime!(plan.moments && plan.chunked) {
        clear_parts(moments, ABSOLUTE_POS, shape.parts, shape.batch, 4 * vectors_out);
    }
    let (low, high) = strip(rows * blocks * pieces);
    for item in low..high {
        let first_row = item / chunk_items * shape.chunk;
        let rows_here = shape.chunk.min(rows - first_row);
        let rest = item % chunk_items;
        let segment = rest % segments;
        let rest = rest / segments;
        let (rest, position) = by_step(rest, positions);
        let block = rest / rows_here;
        let row = first_row + rest % rows_here;
        let jh = row % shape.count_height;
        let row = row / shape.count_height;
        let jd = row % shape.count_depth;
        let n = row / shape.count_depth;

        let depth =
            axis(jd, shape.out_step_depth, shape.out_offset_depth, shape.even_depth, shape.taps_depth, plan.spread);
        let height =
            axis(jh, shape.out_step_height, shape.out_offset_height, shape.even_height, shape.taps_height, plan.spread);
        let mut first_tap = 0usize.runtime();
        let mut taps_width = shape.taps_width;
        let mut offset_width = shape.out_offset_width;
        let mut count_width = shape.count_width;
        if comptime!(plan.spread) {
            first_tap = position * shape.even_width;
            taps_width = select(position == 0, shape.even_width, shape.taps_width - shape.even_width);
            offset_width = position;
            let (here, _) = by_step(shape.count_width + positions - 1 - position, positions);
            count_width = here;
        }
        let from = From { n, depth, height, first_tap, taps_width };
        let out_row = ((n * shape.out_depth + from.depth.out) * shape.out_height + from.height.out) * shape.out_width;
        let first_weight = block * taps * (in_channels / plan.split) * vectors;

        let first_tile = segment * shape.tiles_in_segment;
        let last_tile = (first_tile + shape.tiles_in_segment).min(count_width.div_ceil(width));

        // Sums over the segment: of differences from the part's mean before it, and of their squares.
        let mut shift = Array::<Vector<f32, G>>::new(vectors);
        let mut sum = Array::<Vector<f32, G>>::new(vectors);
        let mut square = Array::<Vector<f32, G>>::new(vectors);
        let mut part = block * vectors;
        let mut fresh = true.runtime();
        if comptime!(plan.moments) {
            if comptime!(plan.chunked) {
                part += (n * shape.parts + ABSOLUTE_POS) * 4 * vectors_out;
                fresh = moments[part + 3 * vectors_out].extract(0usize) == 0.0f32;
                #[unroll]
                for v in 0..vectors {
                    shift[v] = moments[part + v] + moments[part + vectors_out + v];
                }
            } else {
                part += (n * shape.parts + (jd * shape.count_height + jh) * segments + segment) * 4 * vectors_out;
            }
        }
        for tile in first_tile..last_tile {
            // The last tile of a row is moved back inside it, and computes some outputs a second time: no output of a
            // tile ever lies outside.
            let j0 = (tile * width).min(count_width - width);
            let mut sums = Array::<Vector<f32, N>>::new(comptime!(width * vectors));
            // Not what the array begins with: CubeCL's constant propagation stumbles over the cast of such zeros to f16.
            #[unroll]
            for i in 0..comptime!(width * vectors) {
                sums[i] = Vector::new(0.0f32);
            }

            add_taps::<E, N, K>(&mut sums, x, weights, &shape, shape.channels, first_weight, &from, j0, 0usize, plan);
            if comptime!(plan.second_input) {
                let second_weight = first_weight + taps * (shape.channels / plan.split) * vectors;
                let channels = shape.second_channels;
                add_taps::<E, N, K>(
                    &mut sums,
                    second,
                    weights,
                    &shape,
                    channels,
                    second_weight,
                    &from,
                    j0,
                    1usize,
                    plan,
                );
            }

            // Outputs that the tile before has in common with the last one.
            let repeated = tile * width - j0;
            #[unroll]
            for i in 0..width {
                let ow = (j0 + i) * shape.out_step_width + offset_width;
                let first = (out_row + ow) * (shape.channels_out / lanes) + block * vectors;
                #[unroll]
                for v in 0..vectors {
                    let mut value = add_split::<N, G>(sums[i * vectors + v], plan.split);
                    if comptime!(plan.bias) {
                        value += bias[block * vectors + v];
                    }
                    let stored = Vector::<E, G>::cast_from(value);
                    y[first + v] = stored;
                    if comptime!(plan.moments) {
                        let stored = Vector::<f32, G>::cast_from(stored);
                        if comptime!(i == 0) {
                            if fresh && tile == first_tile {
                                shift[v] = stored;
                            }
                        }
                        if i >= repeated {
                            let difference = stored - shift[v];
                            sum[v] += difference;
                            square[v] += difference * difference;
                        }
                    }
                }
            }
        }
        if comptime!(plan.moments) {
            let here = f32::cast_from((last_tile * width).min(count_width) - first_tile * width);
            #[unroll]
            for v in 0..vectors {
                let to = part + v;
                if fresh {
                    moments[to] = shift[v];
                    moments[to + vectors_out] = Vector::zeroed();
                    moments[to + 2 * vectors_out] = Vector::zeroed();
                    moments[to + 3 * vectors_out] = Vector::zeroed();
                }
                let before = moments[to + 3 * vectors_out];
                add_moments(moments, to, vectors_out, shift[v], sum[v], square[v], before, here);
                moments[to + 3 * vectors_out] = before + Vector::new(here);
            }
        }
    }
}

/// `[g, k]` to `[g]`: the sum of each channel's `split` lanes.
#[cube]
fn add_split<N: Size, G: Size>(partial: Vector<f32, N>, #[comptime] split: usize) -> Vector<f32, G> {
    let mut sum = Vector::<f32, G>::new(0.0f32);
    #[unroll]
    for k in 0..split {
        let mut part = Vector::<f32, G>::empty();
        #[unroll]
        for g in 0..G::value() {
            part.insert(g, partial.extract(g * split + k));
        }
        sum += part;
    }
    sum
}

/// `[k]` to `[g, k]`: the values once for each channel.
#[cube]
pub(crate) fn repeat<E: Float, N: Size, K: Size>(values: Vector<E, K>, #[comptime] split: usize) -> Vector<f32, N> {
    if comptime!(split == 1) {
        Vector::new(f32::cast_from(values.extract(0usize)))
    } else {
        let values = Vector::<f32, K>::cast_from(values);
        let mut repeated = Vector::<f32, N>::empty();
        #[unroll]
        for lane in 0..N::value() {
            repeated.insert(lane, values.extract(comptime!(lane % split)));
        }
        repeated
    }
}

/// Adds the products of one input of `channels` channels, whose weights begin at `first_weight`, to the tile's sums.
///
/// Along the width, taps and channels are one run in memory, of the input as of the weights: output `i` reads from
/// `base + i * step * channels` on. Only the first and the last output of a tile can reach out of the row.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel; a struct of slices is no kernel argument")]
fn add_taps<E: Float, N: Size, K: Size>(
    sums: &mut Array<Vector<f32, N>>,
    x: &[Vector<E, K>],
    weights: &[Vector<f32, N>],
    shape: &Shape,
    channels: usize,
    first_weight: usize,
    from: &From,
    j0: usize,
    #[comptime] input: usize,
    #[comptime] plan: Plan,
) {
    let width = comptime!(plan.width);
    let vectors = comptime!(plan.vectors);
    let stride = comptime!(plan.strides[input]);
    let taps = from.taps_width;
    let step = shape.in_step_width;
    let pad = shape.pad_width;
    // From here on everything is counted in groups of `split` values.
    let channels = channels / plan.split;
    let run = taps * channels;

    // The part of the run that is inside the row, for the first and the last output. Positions are counted from the
    // first padded one, so that they stay unsigned.
    let start = j0 * step;
    let end = start + (width - 1) * step;
    let first_low = select(start >= pad, 0usize, pad - start) * channels;
    let last_high = (shape.in_width + pad - end).min(taps) * channels;
    let inside = first_low == 0 && last_high == run;

    for td in 0..from.depth.taps {
        let id = from.depth.j * shape.in_step_depth + td;
        if id >= shape.pad_depth && id < shape.in_depth + shape.pad_depth {
            for th in 0..from.height.taps {
                let ih = from.height.j * shape.in_step_height + th;
                if ih >= shape.pad_height && ih < shape.in_height + shape.pad_height {
                    let plane = from.n * shape.in_depth + id - shape.pad_depth;
                    let row = (plane * shape.in_height + ih - shape.pad_height) * shape.in_width * channels;
                    let tap = (from.depth.first_tap + td) * shape.taps_height + from.height.first_tap + th;
                    let weight = first_weight + (tap * shape.taps_width + from.first_tap) * channels * vectors;
                    if comptime!(plan.shared) {
                        let row = row + j0 * channels;
                        let (left, right) = (first_low == 0, last_high == run);
                        add_shared::<E, N, K>(sums, x, weights, channels, row, weight, left, right, input, plan);
                    } else if inside {
                        let base = row + (start - pad) * channels;
                        for e in 0..run {
                            #[unroll]
                            for i in 0..width {
                                let value = repeat::<E, N, K>(x[base + e + comptime!(i * stride)], plan.split);
                                #[unroll]
                                for v in 0..vectors {
                                    sums[i * vectors + v] =
                                        fma(value, weights[weight + e * vectors + v], sums[i * vectors + v]);
                                }
                            }
                        }
                    } else {
                        let base = row + start * channels;
                        for e in 0..run {
                            #[unroll]
                            for i in 0..width {
                                let mut valid = true.runtime();
                                if comptime!(i == 0) {
                                    valid = e >= first_low;
                                }
                                if comptime!(i + 1 == plan.width) {
                                    valid = valid && e < last_high;
                                }
                                let mut value = Vector::<f32, N>::new(0.0f32);
                                if valid {
                                    let at = base + e + comptime!(i * stride) - pad * channels;
                                    value = repeat::<E, N, K>(x[at], plan.split);
                                }
                                #[unroll]
                                for v in 0..vectors {
                                    sums[i * vectors + v] =
                                        fma(value, weights[weight + e * vectors + v], sums[i * vectors + v]);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Three taps along the width, one apart, padded by one: a value is loaded once for the three outputs that it belongs to.
/// `base` is where the middle tap of the first output reads; `left` and `right` tell whether its neighbours before the first
/// and behind the last output are inside the row.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn add_shared<E: Float, N: Size, K: Size>(
    sums: &mut Array<Vector<f32, N>>,
    x: &[Vector<E, K>],
    weights: &[Vector<f32, N>],
    channels: usize,
    base: usize,
    weight: usize,
    left: bool,
    right: bool,
    #[comptime] input: usize,
    #[comptime] plan: Plan,
) {
    let width = comptime!(plan.width);
    let vectors = comptime!(plan.vectors);
    let stride = comptime!(plan.strides[input]);
    // What lies outside is read from elsewhere and replaced.
    let first = select(left, base - stride, base);
    let last = select(right, base + width * stride, base);
    for c in 0..channels {
        let mut taps = Array::<Vector<f32, N>>::new(comptime!(3 * vectors));
        #[unroll]
        for t in 0..3usize {
            #[unroll]
            for v in 0..vectors {
                taps[t * vectors + v] = weights[weight + (t * channels + c) * vectors + v];
            }
        }
        #[unroll]
        for p in 0..comptime!(width + 2) {
            let mut value = Vector::<f32, N>::new(0.0f32);
            if comptime!(p == 0) {
                value = select(left, repeat::<E, N, K>(x[first + c], plan.split), value);
            } else if comptime!(p == width + 1) {
                value = select(right, repeat::<E, N, K>(x[last + c], plan.split), value);
            } else {
                value = repeat::<E, N, K>(x[base + c + comptime!((p - 1) * stride)], plan.split);
            }
            #[unroll]
            for t in 0..3usize {
                if comptime!(p >= t && p - t < width) {
                    #[unroll]
                    for v in 0..vectors {
                        let i = comptime!((p - t) * vectors + v);
                        sums[i] = fma(value, taps[t * vectors + v], sums[i]);
                    }
                }
            }
        }
    }
}

impl Gather<'_> {
    /// Launches the kernel.
    pub fn launch(&self, context: &Context) -> Result<(), KernelError> {
        let tile = match self.method {
            Method::Direct(tile) => tile,
            Method::TensorCores(plan) => return igemm::gather::launch(self, plan, context),
            Method::Tiled(plan) => return tiled::launch(self, plan, context),
        };
        let (rows, tiles) = (self.batch * self.count[0] * self.count[1], self.tiles(tile));
        let blocks = self.channels_out / tile.channels();
        if rows * tiles == 0 {
            return Ok(());
        }
        let units = context.caps().cube_units();
        let tiles_in_segment = self.tiles_in_segment(context, tile, self.epilogue.take() == Take::Moments);
        let items = match context.caps().cores {
            Some(cores) => cores as usize,
            None => rows * blocks * self.positions() * tiles.div_ceil(tiles_in_segment),
        };
        let plan = Plan {
            width: tile.width,
            vectors: tile.vectors,
            split: tile.split,
            second_input: self.second.is_some(),
            bias: self.bias.is_some(),
            moments: self.epilogue.take() == Take::Moments,
            chunked: context.caps().cores.is_some(),
            strides: [self.channels_in, self.second.map_or(0, |(_, channels)| channels)]
                .map(|channels| channels / tile.split * self.in_step[2]),
            spread: self.spread.is_some(),
            shared: context.caps().cores.is_some()
                && (tile.vectors == 1 || self.channels_in < 4 && tile.vectors * tile.width <= 20)
                && [self.taps[2], self.in_step[2], self.pad[2]] == [3, 1, 1]
                && (self.spread.is_none() || self.out_step[2] == 1),
        };
        let chunk = match context.caps().cores {
            Some(_) => self.chunk(rows, blocks),
            None => rows,
        };
        let nothing = context.empty(tile.lanes, Dtype::F32)?;
        let (second, _) = self.second.unwrap_or((self.input, 0));
        let [moments, ..] = self.epilogue.buffers(&nothing);
        context.launch(OPERATION, Work::units(items, units), |client, count, dim| {
            gather_kernel::launch(
                client,
                count,
                dim,
                tile.lanes * tile.split,
                tile.split,
                tile.lanes,
                self.input.buffer().arg(),
                second.buffer().arg(),
                self.weights.arg(),
                self.bias.unwrap_or(self.weights).arg(),
                self.output.arg(),
                moments.arg(),
                self.shape_in_chunks(chunk, tiles_in_segment),
                plan,
                self.output.dtype().elem(),
            )
        })
    }

    /// Parts of the moments of each sample: one of every unit on a CPU, of every segment or cube on a GPU.
    pub fn parts(&self, context: &Context) -> usize {
        match (self.method, context.caps().cores) {
            (Method::TensorCores(plan), _) => plan.row_blocks(self.count.iter().product()),
            (Method::Tiled(plan), _) => plan.row_blocks(self.count.iter().product()),
            (Method::Direct(_), Some(cores)) => cores as usize,
            (Method::Direct(tile), None) => {
                let tiles = self.tiles(tile);
                self.count[0] * self.count[1] * tiles.div_ceil(self.tiles_in_segment(context, tile, true))
            }
        }
    }

    /// A CPU core walks whole rows. On a GPU each tile is a unit's; where moments are taken, a unit walks as many as leave
    /// enough units, so that there are fewer moments.
    fn tiles_in_segment(&self, context: &Context, tile: Tile, moments: bool) -> usize {
        let tiles = self.tiles(tile);
        let all = self.batch * (self.channels_out / tile.channels()) * self.count[0] * self.count[1] * tiles;
        match (context.caps().cores, moments) {
            (Some(_), _) => tiles,
            (None, false) => 1,
            (None, true) => (all / GPU_UNITS).clamp(1, tiles.max(1)),
        }
    }

    /// Positions inside the step along the width that one launch computes.
    fn positions(&self) -> usize {
        if self.spread.is_some() { self.out_step[2] } else { 1 }
    }

    /// Tiles of a row, of one position inside the step.
    fn tiles(&self, tile: Tile) -> usize {
        self.count[2].div_ceil(self.positions()).div_ceil(tile.width)
    }

    /// How many rows a CPU's core computes for one block of channels after the other: as many as gather [`Self::CHUNK_BYTES`],
    /// or all, where reading all of the input once a block costs less than all of the weights once a chunk.
    fn chunk(&self, rows: usize, blocks: usize) -> usize {
        let channels = self.channels_in + self.second.map_or(0, |(_, channels)| channels);
        let input = self.batch * self.in_dims.iter().product::<usize>() * channels * self.output.dtype().size();
        let weights = self.weights.len() * self.weights.dtype().size();
        let chunk = (Self::CHUNK_BYTES * rows / input.max(1)).clamp(1, rows);
        let weights_again = if weights <= Self::CACHED_WEIGHTS { 0 } else { weights * (rows / chunk) };
        if blocks * input <= weights_again { rows } else { chunk }
    }

    /// Bytes of input that a chunk of rows gathers.
    const CHUNK_BYTES: usize = 192 << 10;
    /// Weights of so many bytes stay in a core's second-level cache.
    const CACHED_WEIGHTS: usize = 512 << 10;

    /// The kernel's numbers.
    pub(super) fn shape(&self, tiles_in_segment: usize) -> ShapeLaunch {
        self.shape_in_chunks(1, tiles_in_segment)
    }

    fn shape_in_chunks(&self, chunk: usize, tiles_in_segment: usize) -> ShapeLaunch {
        let even = self.spread.unwrap_or(self.taps);
        ShapeLaunch::new(
            self.batch,
            self.channels_in,
            self.second.map_or(0, |(_, channels)| channels),
            self.channels_out,
            self.in_dims[0],
            self.in_dims[1],
            self.in_dims[2],
            self.out_dims[0],
            self.out_dims[1],
            self.out_dims[2],
            self.count[0],
            self.count[1],
            self.count[2],
            self.out_step[0],
            self.out_step[1],
            self.out_step[2],
            self.out_offset[0],
            self.out_offset[1],
            self.out_offset[2],
            self.taps[0],
            self.taps[1],
            self.taps[2],
            self.in_step[0],
            self.in_step[1],
            self.in_step[2],
            self.pad[0],
            self.pad[1],
            self.pad[2],
            even[0],
            even[1],
            even[2],
            chunk,
            tiles_in_segment,
            self.epilogue.parts(),
        )
    }
}
