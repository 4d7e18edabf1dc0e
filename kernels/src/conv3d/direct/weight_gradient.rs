//! The gradient of the weights (see [`WeightGradient`]): a register tile of a few `row` channels times a few vectors of
//! `column` channels, summed over output positions.
//!
//! Where the dense tensor has fewer channels than a register has lanes, a register holds the products of several row
//! channels: `split` neighbouring ones are loaded at once, and lane `c * split + r` belongs to column `c` and row `r`.
//!
//! Three taps along the width, one apart, share a tile: see [`RowsPlan::window`].
//!
//! The sums run over `chunk`s of rows that stay in a core's cache while all tiles pass over them. Where
//! tiles are fewer than units, the rows are split; each split sums into a part of its own, and the second
//! launch adds the parts in a fixed order.

use super::rows::{RowsPlan, add_output, add_row, take_lanes};
use super::tile::split_for;
use crate::conv3d::axes::{Axes, axes};
use crate::conv3d::gather::{WEIGHT_GRADIENT, WeightGradient};
use crate::conv3d::parts::add_parts;
use crate::{Buffer, Caps, Context, Dtype, KernelError, Work, elementwise};
use cubecl::prelude::*;

#[derive(CubeType, CubeLaunch)]
struct RowsNumbers {
    rows: usize,
    columns: usize,
    input: Axes,
    output: Axes,
    taps: Axes,
    step: Axes,
    pad: Axes,
    /// Rows of outputs: batch * depth * height.
    out_rows: usize,
    /// Rows that pass through the cache together.
    chunk: usize,
    splits: usize,
    /// Units that share the tiles of one split.
    groups: usize,
    /// Length of one split's part, in vectors.
    part: usize,
    first: usize,
    tap_stride: usize,
    row_stride: usize,
}

/// A register tile: which taps, row channels and columns, and for which outputs along the width their position is inside.
#[derive(CubeType)]
struct GradientTile {
    /// First group of row channels.
    r0: usize,
    /// First vector of column channels.
    column: usize,
    tap: usize,
    td: usize,
    th: usize,
    tw: usize,
    low: usize,
    high: usize,
}

#[cube]
fn tile_of(
    tile: usize,
    row_blocks: usize,
    column_blocks: usize,
    s: &RowsNumbers,
    #[comptime] plan: RowsPlan,
) -> GradientTile {
    let rest = tile / column_blocks;
    let tap = rest / row_blocks * comptime!(plan.window);
    let tw = tap % s.taps.width;
    let (step, pad) = (s.step.width, s.pad.width);
    GradientTile {
        r0: rest % row_blocks * comptime!(plan.rows),
        column: tile % column_blocks * comptime!(plan.vectors),
        tap,
        td: tap / (s.taps.width * s.taps.height),
        th: tap / s.taps.width % s.taps.height,
        tw,
        low: select(tw >= pad, 0usize, (pad - tw).div_ceil(step)),
        high: ((s.input.width + pad + step - 1 - tw) / step).min(s.output.width),
    }
}

/// A unit computes some tiles over some rows of outputs, chunk after chunk.
#[cube(launch)]
fn weight_gradient_kernel<E: Float, N: Size, K: Size, G: Size>(
    strided: &[Vector<E, K>],
    dense: &[Vector<E, G>],
    gradient: &mut [Vector<f32, G>],
    s: RowsNumbers,
    #[comptime] plan: RowsPlan,
    #[define(E)] _dtype: ElemType,
) {
    let vectors = comptime!(plan.vectors);
    let lanes = G::value();
    let row_groups = s.rows / plan.split;
    let taps = s.taps.depth * s.taps.height * (s.taps.width / comptime!(plan.window));
    let row_blocks = row_groups.div_ceil(comptime!(plan.rows));
    let column_blocks = s.columns / (lanes * vectors);
    let tiles = taps * row_blocks * column_blocks;

    if ABSOLUTE_POS < s.splits * s.groups {
        let split = ABSOLUTE_POS / s.groups;
        let group = ABSOLUTE_POS % s.groups;
        let tiles_each = tiles.div_ceil(s.groups);
        let first_tile = (group * tiles_each).min(tiles);
        let last_tile = if comptime!(plan.single) { first_tile + 1 } else { (first_tile + tiles_each).min(tiles) };
        let rows_each = s.out_rows.div_ceil(s.splits);
        let first_row = (split * rows_each).min(s.out_rows);
        let last_row = (first_row + rows_each).min(s.out_rows);
        let chunks =
            if comptime!(plan.single) { 1usize.runtime() } else { (last_row - first_row).div_ceil(s.chunk).max(1) };

        for chunk in 0..chunks {
            let from = first_row + chunk * s.chunk;
            let to = (from + s.chunk).min(last_row);
            for number in first_tile..last_tile {
                let tile = tile_of(number, row_blocks, column_blocks, &s, plan);
                let sums = sums_over_rows::<E, N, K, G>(strided, dense, &tile, from, to, row_groups, &s, plan);
                let base = split * s.part + (s.first + tile.tap * s.tap_stride) / lanes + tile.column;
                store_sums::<N, G>(&sums, gradient, base, tile.r0, row_groups, chunk == 0, &s, plan);
            }
        }
    }
}

/// The sums of a tile over rows `from..to` of outputs, of which it leaves out those whose taps lie outside.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn sums_over_rows<E: Float, N: Size, K: Size, G: Size>(
    strided: &[Vector<E, K>],
    dense: &[Vector<E, G>],
    tile: &GradientTile,
    from: usize,
    to: usize,
    row_groups: usize,
    s: &RowsNumbers,
    #[comptime] plan: RowsPlan,
) -> Array<Vector<f32, N>> {
    let mut sums = Array::<Vector<f32, N>>::new(comptime!(plan.apart * plan.window * plan.rows * plan.vectors));
    // Counted along instead of divided out of the row's number.
    let mut oh = from % s.output.height;
    let mut od = from / s.output.height % s.output.depth;
    let mut n = from / s.output.height / s.output.depth;
    for row in from..to {
        let id = od * s.step.depth + tile.td;
        let ih = oh * s.step.height + tile.th;
        let valid = id >= s.pad.depth
            && id < s.input.depth + s.pad.depth
            && ih >= s.pad.height
            && ih < s.input.height + s.pad.height;
        if valid {
            let plane = n * s.input.depth + id - s.pad.depth;
            let in_row = (plane * s.input.height + ih - s.pad.height) * s.input.width;
            add_row_of_outputs::<E, N, K, G>(&mut sums, strided, dense, tile, in_row, row, row_groups, s, plan);
        }
        oh += 1;
        if oh == s.output.height {
            oh = 0usize.runtime();
            od += 1;
            if od == s.output.depth {
                od = 0usize.runtime();
                n += 1;
            }
        }
    }
    sums
}

/// Adds the products of one row of outputs and the row of the strided tensor that begins at voxel `in_row`.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn add_row_of_outputs<E: Float, N: Size, K: Size, G: Size>(
    sums: &mut Array<Vector<f32, N>>,
    strided: &[Vector<E, K>],
    dense: &[Vector<E, G>],
    tile: &GradientTile,
    in_row: usize,
    row: usize,
    row_groups: usize,
    s: &RowsNumbers,
    #[comptime] plan: RowsPlan,
) {
    let apart = comptime!(plan.apart);
    let vectors_out = s.columns / G::value();
    let r0 = tile.r0;
    if comptime!(plan.window == 3) {
        let position = in_row * row_groups;
        let d = row * s.output.width * vectors_out + tile.column;
        let width = s.output.width;
        add_row::<E, N, K, G>(sums, strided, dense, position, d, r0, row_groups, vectors_out, width, plan);
    } else {
        let step = s.step.width;
        let position = (in_row + tile.low * step + tile.tw - s.pad.width) * row_groups;
        let d = (row * s.output.width + tile.low) * vectors_out + tile.column;
        let outputs = tile.high - tile.low;
        let groups = outputs / apart;
        for group in 0..groups {
            #[unroll]
            for a in 0..apart {
                let j = group * apart + a;
                let (position, d) = (position + j * step * row_groups, d + j * vectors_out);
                add_output::<E, N, K, G>(sums, strided, dense, position, d, r0, row_groups, a, plan);
            }
        }
        if comptime!(plan.apart > 1) {
            for j in groups * apart..outputs {
                let (position, d) = (position + j * step * row_groups, d + j * vectors_out);
                add_output::<E, N, K, G>(sums, strided, dense, position, d, r0, row_groups, 0usize, plan);
            }
        }
    }
}

/// Stores a tile's sums from vector `base` on, or adds them to those of the chunks before.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn store_sums<N: Size, G: Size>(
    sums: &Array<Vector<f32, N>>,
    gradient: &mut [Vector<f32, G>],
    base: usize,
    r0: usize,
    row_groups: usize,
    is_first: bool,
    s: &RowsNumbers,
    #[comptime] plan: RowsPlan,
) {
    let vectors = comptime!(plan.vectors);
    let tile_rows = comptime!(plan.rows);
    let window = comptime!(plan.window);
    let apart = comptime!(plan.apart);
    let lanes = G::value();
    #[unroll]
    for r in 0..tile_rows {
        if r0 + r < row_groups {
            #[unroll]
            for t in 0..window {
                #[unroll]
                for v in 0..vectors {
                    let mut sum = sums[(t * tile_rows + r) * vectors + v];
                    #[unroll]
                    for a in 1..apart {
                        sum += sums[((a * window + t) * tile_rows + r) * vectors + v];
                    }
                    #[unroll]
                    for k in 0..plan.split {
                        let row = (r0 + r) * plan.split + k;
                        let i = base + t * (s.tap_stride / lanes) + row * (s.row_stride / lanes) + v;
                        let sum = take_lanes::<N, G>(sum, k, plan.split);
                        if is_first {
                            gradient[i] = sum;
                        } else {
                            gradient[i] += sum;
                        }
                    }
                }
            }
        }
    }
}

/// Bytes of both tensors that a chunk of rows may take of a core's second-level cache.
const CHUNK_BYTES: usize = 192 << 10;

/// Elements of a gradient whose parts are added in next to no time.
const SMALL_GRADIENT: usize = 1 << 15;

/// Launches the kernel, and the sum over splits where there are any.
pub(crate) fn launch(context: &Context, gradient: &WeightGradient) -> Result<(), KernelError> {
    let caps = context.caps();
    let dtype = gradient.dense.dtype();
    if caps.cores.is_some() && dtype != Dtype::F32 {
        // A CPU spends more on converting each number as often as it is used than on a copy.
        let widened = |buffer: &Buffer| -> Result<Buffer, KernelError> {
            let wide = context.empty(buffer.len(), Dtype::F32)?;
            elementwise::cast(context, buffer, &wide)?;
            Ok(wide)
        };
        let (strided, dense) = (&widened(gradient.strided)?, &widened(gradient.dense)?);
        return launch(context, &WeightGradient { strided, dense, ..*gradient });
    }
    let (lanes, plan) = tile(gradient, caps);
    let taps: usize = gradient.taps.iter().product();
    let out_rows = gradient.batch * gradient.out_dims[0] * gradient.out_dims[1];
    let part = taps * gradient.rows * gradient.columns;
    let row_blocks = (gradient.rows / plan.split).div_ceil(plan.rows);
    let tiles = taps / plan.window * row_blocks * (gradient.columns / lanes / plan.vectors);
    if tiles == 0 {
        return Ok(());
    }
    let (groups, splits) = shares(tiles, out_rows, part, caps);
    let size = gradient.dense.dtype().size();
    let row_bytes = (gradient.in_dims[2] * gradient.step[0] * gradient.step[1] * gradient.rows
        + gradient.out_dims[2] * gradient.columns)
        * size;
    let chunk = match caps.cores {
        Some(_) => (CHUNK_BYTES / row_bytes.max(1)).clamp(1, out_rows.max(1)),
        None => out_rows.max(1),
    };
    let parts = match splits > 1 || gradient.column_stride != 1 {
        true => Some(context.empty(splits * part, Dtype::F32)?),
        false => None,
    };
    // Into the parts tightly, else straight to where the sums belong.
    let (first, tap_stride, row_stride) = match parts {
        Some(_) => (0, gradient.rows * gradient.columns, gradient.columns),
        None => (gradient.first, gradient.tap_stride, gradient.row_stride),
    };
    let numbers = RowsNumbersLaunch::new(
        gradient.rows,
        gradient.columns,
        axes(gradient.in_dims),
        axes(gradient.out_dims),
        axes(gradient.taps),
        axes(gradient.step),
        axes(gradient.pad),
        out_rows,
        chunk,
        splits,
        groups,
        part / lanes,
        first,
        tap_stride,
        row_stride,
    );
    let units = caps.cube_units();
    let work = Work::units(groups * splits, units).of_flops(gradient.flops());
    context.launch(WEIGHT_GRADIENT, work, |client, count, dim| {
        weight_gradient_kernel::launch(
            client,
            count,
            dim,
            lanes * plan.split,
            plan.split,
            lanes,
            gradient.strided.arg(),
            gradient.dense.arg(),
            parts.as_ref().unwrap_or(gradient.gradient).arg(),
            numbers,
            plan,
            gradient.dense.dtype().elem(),
        )
    })?;
    match parts {
        Some(parts) => add_parts(context, gradient, &parts, splits),
        None => Ok(()),
    }
}

/// Vector width and tile.
fn tile(gradient: &WeightGradient, caps: &Caps) -> (usize, RowsPlan) {
    let lanes = caps.widest_vector(gradient.columns);
    let blocks = gradient.columns / lanes;
    let vectors = match blocks {
        b if b % 2 == 0 => 2,
        b if b % 3 == 0 => 3,
        _ => 1,
    };
    let split = split_for(caps, lanes, [gradient.rows, 0]);
    let window = match (caps.cores, gradient.taps[2], gradient.step[2], gradient.pad[2]) {
        (Some(_), 3, 1, 1) => 3,
        _ => 1,
    };
    // Measured with AVX-512: twice the sums that AVX2 has registers for save a sixth of the time, and with three taps a
    // tile needs few loads for three times as many.
    let sums = match (caps.cores, caps.registers >= 32, window) {
        (Some(_), true, 3) => 24,
        (Some(_), true, _) => 16,
        (_, _, 3) => 12,
        _ => 8,
    };
    // Eight rows of three taps ran at less than half the speed of four.
    let most = if window == 3 { 4 } else { sums };
    let rows = (sums / window / vectors).min(gradient.rows / split).min(most).max(1);
    let apart = (if window == 3 { 12 } else { 8 } / (window * rows * vectors)).max(1);
    let plan = RowsPlan {
        rows,
        split,
        vectors,
        apart,
        window,
        ragged: !(gradient.rows / split).is_multiple_of(rows),
        single: caps.cores.is_none(),
    };
    (lanes, plan)
}

/// Into how many groups `tiles` are divided, and into how many splits `rows` of outputs, so that all units are busy; `part` are
/// the elements of the gradient.
fn shares(tiles: usize, rows: usize, part: usize, caps: &Caps) -> (usize, usize) {
    let Some(cores) = caps.cores else { return (tiles, 4096usize.div_ceil(tiles).min(rows).max(1)) };
    let cores = cores as usize;
    let groups = tiles.min(cores);
    // Few tiles do not share out evenly among the cores; rows do, at the price of adding the parts.
    let uneven = tiles.div_ceil(groups) * groups * 100 > tiles * 103;
    match uneven && part <= SMALL_GRADIENT {
        true => (1, cores.min(rows).max(1)),
        false => (groups, (cores / groups).min(rows).max(1)),
    }
}
