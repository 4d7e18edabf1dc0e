//! The direct convolution: everything that gathers (see [`Gather`]), on a register [`Tile`].
//!
//! The weights are packed beforehand into the order in which a tile reads them, which also flips and transposes them.
//! Positions outside of `x` count as zero; whole rows outside are skipped.
//!
//! Bytes: `x` is read once per block of output channels from cache, `y` is written once. Arithmetic bound:
//! with `width * vectors` independent sums a core's multiply-add units stay busy.

use super::taps::{Axis, From, TapsPlan, add_taps};
use super::tile::Tile;
use crate::block::strip;
use crate::conv3d::gather::{GATHER, Gather, GatherNumbers, Walk};
use crate::instance_norm::epilogue::{Take, add_moments, clear_parts};
use crate::{Buffer, Caps, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// Units that keep a GPU busy.
const GPU_UNITS: usize = 1 << 16;

/// Quotient and remainder for a step of one or two. Without a division, since compilers move one that is used in a loop only
/// into that loop, and cannot move it out again.
#[cube]
fn by_step(j: usize, step: usize) -> (usize, usize) {
    (j >> (step - 1), j & (step - 1))
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

/// What is computed between two looks at the moments: a run of tiles along one row of outputs, of one block of channels.
#[derive(CubeType)]
struct Segment {
    from: From,
    block: usize,
    /// Tiles of the row.
    first_tile: usize,
    last_tile: usize,
    /// Where the row begins inside the step along the width, and its outputs.
    offset_width: usize,
    count_width: usize,
    /// Its number among the segments of a sample and block.
    number: usize,
}

/// The segment number `item`. A unit's chunk of rows is computed for one block of channels after the other: the rows' inputs
/// stay in its cache.
#[cube]
fn segment_of(item: usize, shape: &GatherNumbers, blocks: usize, #[comptime] plan: TapsPlan) -> Segment {
    // Positions inside the step along the width, each with a row of tiles of its own.
    let positions = if comptime!(plan.spread) { shape.out_step.width } else { 1usize.runtime() };
    let segments = segments_of_row(shape, positions, plan);
    let pieces = positions * segments;
    let rows = shape.batch * shape.count.depth * shape.count.height;
    let chunk_items = shape.chunk * blocks * pieces;

    let first_row = item / chunk_items * shape.chunk;
    let rows_here = shape.chunk.min(rows - first_row);
    let rest = item % chunk_items;
    let segment = rest % segments;
    let rest = rest / segments;
    let (rest, position) = by_step(rest, positions);
    let block = rest / rows_here;
    let row = first_row + rest % rows_here;
    let jh = row % shape.count.height;
    let row = row / shape.count.height;
    let jd = row % shape.count.depth;
    let n = row / shape.count.depth;

    let (step, offset, even, taps) = (&shape.out_step, &shape.out_offset, &shape.even, &shape.taps);
    let depth = axis(jd, step.depth, offset.depth, even.depth, taps.depth, plan.spread);
    let height = axis(jh, step.height, offset.height, even.height, taps.height, plan.spread);
    let mut first_tap = 0usize.runtime();
    let mut taps_width = taps.width;
    let mut offset_width = offset.width;
    let mut count_width = shape.count.width;
    if comptime!(plan.spread) {
        first_tap = position * even.width;
        taps_width = select(position == 0, even.width, taps.width - even.width);
        offset_width = position;
        let (here, _) = by_step(shape.count.width + positions - 1 - position, positions);
        count_width = here;
    }
    let first_tile = segment * shape.tiles_in_segment;
    let last_tile = (first_tile + shape.tiles_in_segment).min(count_width.div_ceil(comptime!(plan.width)));
    Segment {
        from: From { n, depth, height, first_tap, taps_width },
        block,
        first_tile,
        last_tile,
        offset_width,
        count_width,
        number: (jd * shape.count.height + jh) * segments + segment,
    }
}

#[cube]
fn segments_of_row(shape: &GatherNumbers, positions: usize, #[comptime] plan: TapsPlan) -> usize {
    shape.count.width.div_ceil(positions).div_ceil(comptime!(plan.width)).div_ceil(shape.tiles_in_segment)
}

/// The sums of a tile from output `j0` of the segment's row on, over the taps and channels of both inputs.
#[cube]
fn tile_sums<E: Float, N: Size, K: Size>(
    x: &[Vector<E, K>],
    second: &[Vector<E, K>],
    weights: &[Vector<f32, N>],
    shape: &GatherNumbers,
    segment: &Segment,
    j0: usize,
    #[comptime] plan: TapsPlan,
) -> Array<Vector<f32, N>> {
    let vectors = comptime!(plan.vectors);
    let taps = shape.taps.depth * shape.taps.height * shape.taps.width;
    let in_channels = shape.channels + shape.second_channels;
    let first_weight = segment.block * taps * (in_channels / plan.split) * vectors;
    let from = &segment.from;
    let mut sums = Array::<Vector<f32, N>>::new(comptime!(plan.width * vectors));
    // Not what the array begins with: CubeCL's constant propagation stumbles over the cast of such zeros to f16.
    #[unroll]
    for i in 0..comptime!(plan.width * vectors) {
        sums[i] = Vector::new(0.0f32);
    }
    add_taps::<E, N, K>(&mut sums, x, weights, shape, shape.channels, first_weight, from, j0, 0usize, plan);
    if comptime!(plan.second_input) {
        let first_weight = first_weight + taps * (shape.channels / plan.split) * vectors;
        let channels = shape.second_channels;
        add_taps::<E, N, K>(&mut sums, second, weights, shape, channels, first_weight, from, j0, 1usize, plan);
    }
    sums
}

/// One unit computes a strip of segments.
#[cube(launch)]
fn gather_kernel<E: Float, N: Size, K: Size, G: Size>(
    x: &[Vector<E, K>],
    second: &[Vector<E, K>],
    weights: &[Vector<f32, N>],
    bias: &[Vector<f32, G>],
    y: &mut [Vector<E, G>],
    moments: &mut [Vector<f32, G>],
    shape: GatherNumbers,
    #[comptime] plan: TapsPlan,
    #[define(E)] _dtype: ElemType,
) {
    let width = comptime!(plan.width);
    let vectors = comptime!(plan.vectors);
    let lanes = G::value();
    let blocks = shape.channels_out / (lanes * vectors);
    let vectors_out = shape.channels_out / lanes;
    let positions = if comptime!(plan.spread) { shape.out_step.width } else { 1usize.runtime() };
    let pieces = positions * segments_of_row(&shape, positions, plan);
    let rows = shape.batch * shape.count.depth * shape.count.height;
    if comptime!(plan.moments && plan.chunked) {
        clear_parts(moments, ABSOLUTE_POS, shape.parts, shape.batch, 4 * vectors_out);
    }
    let (low, high) = strip(rows * blocks * pieces);
    for item in low..high {
        let segment = segment_of(item, &shape, blocks, plan);
        let from = &segment.from;
        let out_row = ((from.n * shape.output.depth + from.depth.out) * shape.output.height + from.height.out)
            * shape.output.width;
        let first_vector = segment.block * vectors;

        // Sums over the segment: of differences from the part's mean before it, and of their squares.
        let mut shift = Array::<Vector<f32, G>>::new(vectors);
        let mut sum = Array::<Vector<f32, G>>::new(vectors);
        let mut square = Array::<Vector<f32, G>>::new(vectors);
        let mut part = first_vector;
        let mut fresh = true.runtime();
        if comptime!(plan.moments) {
            if comptime!(plan.chunked) {
                part += (from.n * shape.parts + ABSOLUTE_POS) * 4 * vectors_out;
                fresh = moments[part + 3 * vectors_out].extract(0usize) == 0.0f32;
                #[unroll]
                for v in 0..vectors {
                    shift[v] = moments[part + v] + moments[part + vectors_out + v];
                }
            } else {
                part += (from.n * shape.parts + segment.number) * 4 * vectors_out;
            }
        }
        for tile in segment.first_tile..segment.last_tile {
            // The last tile of a row is moved back inside it, and computes some outputs a second time: no output of a
            // tile ever lies outside.
            let j0 = (tile * width).min(segment.count_width - width);
            let sums = tile_sums::<E, N, K>(x, second, weights, &shape, &segment, j0, plan);
            store_tile::<E, N, G>(
                &sums,
                bias,
                y,
                &mut shift,
                &mut sum,
                &mut square,
                (out_row + j0 * shape.out_step.width + segment.offset_width) * vectors_out + first_vector,
                shape.out_step.width * vectors_out,
                first_vector,
                // Outputs that the tile before has in common with the last one.
                tile * width - j0,
                fresh && tile == segment.first_tile,
                plan,
            );
        }
        if comptime!(plan.moments) {
            let last = (segment.last_tile * width).min(segment.count_width);
            let here = f32::cast_from(last - segment.first_tile * width);
            add_part::<G>(moments, part, vectors_out, fresh, &shift, &sum, &square, here, plan);
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

/// Stores a tile, its first output at vector `first` of `y` and the next ones `step` vectors apart, and adds all but the
/// `repeated` first outputs to the segment's moments.
#[cube]
#[allow(clippy::collapsible_if, reason = "the outer condition is decided when the kernel is compiled")]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn store_tile<E: Float, N: Size, G: Size>(
    sums: &Array<Vector<f32, N>>,
    bias: &[Vector<f32, G>],
    y: &mut [Vector<E, G>],
    shift: &mut Array<Vector<f32, G>>,
    sum: &mut Array<Vector<f32, G>>,
    square: &mut Array<Vector<f32, G>>,
    first: usize,
    step: usize,
    first_bias: usize,
    repeated: usize,
    sets_shift: bool,
    #[comptime] plan: TapsPlan,
) {
    let vectors = comptime!(plan.vectors);
    #[unroll]
    for i in 0..plan.width {
        #[unroll]
        for v in 0..vectors {
            let mut value = add_split::<N, G>(sums[i * vectors + v], plan.split);
            if comptime!(plan.bias) {
                value += bias[first_bias + v];
            }
            let stored = Vector::<E, G>::cast_from(value);
            y[first + i * step + v] = stored;
            if comptime!(plan.moments) {
                let stored = Vector::<f32, G>::cast_from(stored);
                if comptime!(i == 0) {
                    if sets_shift {
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

/// Adds the moments of a segment of `here` outputs to its part, which they begin where it is `fresh`.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn add_part<G: Size>(
    moments: &mut [Vector<f32, G>],
    part: usize,
    vectors_out: usize,
    fresh: bool,
    shift: &Array<Vector<f32, G>>,
    sum: &Array<Vector<f32, G>>,
    square: &Array<Vector<f32, G>>,
    here: f32,
    #[comptime] plan: TapsPlan,
) {
    let vectors = comptime!(plan.vectors);
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

/// Launches the kernel.
pub(crate) fn launch(context: &Context, gather: &Gather, weights: &Buffer) -> Result<(), KernelError> {
    let caps = context.caps();
    let tile = Tile::of(gather, caps);
    let (rows, tiles) = (gather.batch * gather.count[0] * gather.count[1], tiles(gather, tile));
    let blocks = gather.channels_out / tile.channels();
    if rows * tiles == 0 {
        return Ok(());
    }
    let moments = gather.epilogue.take() == Take::Moments;
    let tiles_in_segment = tiles_in_segment(gather, tile, moments, caps);
    let items = match caps.cores {
        Some(cores) => cores as usize,
        None => rows * blocks * gather.positions() * tiles.div_ceil(tiles_in_segment),
    };
    let plan = TapsPlan {
        width: tile.width,
        vectors: tile.vectors,
        split: tile.split,
        second_input: gather.second.is_some(),
        bias: gather.bias.is_some(),
        moments,
        chunked: caps.cores.is_some(),
        strides: gather.gathered().map(|channels| channels / tile.split * gather.in_step[2]),
        spread: gather.spread.is_some(),
        shared: caps.cores.is_some()
            && (tile.vectors == 1 || gather.channels_in < 4 && tile.vectors * tile.width <= 20)
            && [gather.taps[2], gather.in_step[2], gather.pad[2]] == [3, 1, 1]
            && (gather.spread.is_none() || gather.out_step[2] == 1),
    };
    let chunk = match caps.cores {
        Some(_) => chunk(gather, weights, rows, blocks),
        None => rows,
    };
    let nothing = context.empty(tile.lanes, Dtype::F32)?;
    let [parts, ..] = gather.epilogue.buffers(&nothing);
    let work = Work::units(items, caps.cube_units()).of_flops(gather.flops());
    context.launch(GATHER, work, |client, count, dim| {
        gather_kernel::launch(
            client,
            count,
            dim,
            tile.lanes * tile.split,
            tile.split,
            tile.lanes,
            gather.input.arg(),
            gather.second_or_input().arg(),
            weights.arg(),
            gather.bias.unwrap_or(weights).arg(),
            gather.output.arg(),
            parts.arg(),
            gather.numbers(Walk { chunk, tiles_in_segment, parts: gather.epilogue.parts() }),
            plan,
            gather.output.dtype().elem(),
        );
    })
}

/// Parts of the moments of each sample: one of every unit on a CPU, of every segment on a GPU.
pub(crate) fn moment_parts(gather: &Gather, caps: &Caps) -> usize {
    match caps.cores {
        Some(cores) => cores as usize,
        None => {
            let tile = Tile::of(gather, caps);
            let segment = tiles_in_segment(gather, tile, true, caps);
            gather.count[0] * gather.count[1] * tiles(gather, tile).div_ceil(segment)
        }
    }
}

/// A CPU core walks whole rows. On a GPU each tile is a unit's; where moments are taken, a unit walks as many as leave
/// enough units, so that there are fewer moments.
fn tiles_in_segment(gather: &Gather, tile: Tile, moments: bool, caps: &Caps) -> usize {
    let tiles = tiles(gather, tile);
    let all = gather.batch * (gather.channels_out / tile.channels()) * gather.count[0] * gather.count[1] * tiles;
    match (caps.cores, moments) {
        (Some(_), _) => tiles,
        (None, false) => 1,
        (None, true) => (all / GPU_UNITS).clamp(1, tiles.max(1)),
    }
}

/// Tiles of a row, of one position inside the step.
fn tiles(gather: &Gather, tile: Tile) -> usize {
    gather.count[2].div_ceil(gather.positions()).div_ceil(tile.width)
}

/// Bytes of input that a chunk of rows gathers.
const CHUNK_BYTES: usize = 192 << 10;
/// Weights of so many bytes stay in a core's second-level cache.
const CACHED_WEIGHTS: usize = 512 << 10;

/// How many rows a CPU's core computes for one block of channels after the other: as many as gather [`CHUNK_BYTES`], or all,
/// where reading all of the input once a block costs less than all of the weights once a chunk.
fn chunk(gather: &Gather, weights: &Buffer, rows: usize, blocks: usize) -> usize {
    let channels: usize = gather.gathered().iter().sum();
    let input = gather.batch * gather.in_dims.iter().product::<usize>() * channels * gather.output.dtype().size();
    let weights = weights.len() * weights.dtype().size();
    let chunk = (CHUNK_BYTES * rows / input.max(1)).clamp(1, rows);
    let weights_again = if weights <= CACHED_WEIGHTS { 0 } else { weights * (rows / chunk) };
    if blocks * input <= weights_again { rows } else { chunk }
}
