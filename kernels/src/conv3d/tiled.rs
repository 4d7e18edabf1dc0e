//! Everything that gathers (see [`Gather`]) on GPUs without tensor cores for the type, as an implicit matrix product in f32:
//! rows are output voxels, columns output channels, and the sums run over inputs, taps and channels, in the order of the
//! packed weights.
//!
//! A cube computes a block of 128 voxels by 64 channels, or 256 by 32. Of both factors it puts [`DEPTH`] channels of one tap
//! into shared memory at a time, so that each number is read from global memory once a block and tap, by whole
//! sectors; each unit then multiplies 8 voxels by 8 channels in registers, of which it reads 16 numbers for 64 products.
//!
//! The direct kernel reads global memory for each tap of each unit instead, and neighbouring units read from addresses a tile
//! apart.

use super::gather::{Form, GATHER, Gather, GatherNumbers, Walk};
use super::patch::{Corners, Rows, corners, output_position, rows_of_block, tap_of, under};
use crate::instance_norm::epilogue::{RSTD, Take, coefficients_at, gradient_terms};
use crate::{Buffer, Caps, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// Units of a cube.
const UNITS: usize = 128;
/// Voxels of a unit, and its vectors of [`LANES`] channels.
const VOXELS: usize = 8;
const VECTORS: usize = 2;
const LANES: usize = 4;
/// Channels of the sums between two barriers.
const DEPTH: usize = 8;

/// What is compiled into one instance of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct TiledPlan {
    /// Units along the columns of a block.
    across: usize,
}

impl TiledPlan {
    /// `None` on CPUs, where shared memory or a cube is too small, and where channels do not fill vectors or half of a block.
    pub fn choose(caps: &Caps, gathered: [usize; 2], channels_out: usize) -> Option<Self> {
        let columns = if channels_out.is_multiple_of(64) || channels_out > 96 { 64 } else { 32 };
        let plan = Self { across: columns / (VECTORS * LANES) };
        let fits = caps.cores.is_none()
            && caps.lanes >= LANES
            && caps.max_units as usize >= UNITS
            && plan.shared_bytes() <= caps.shared_memory
            && gathered.iter().all(|channels| channels.is_multiple_of(LANES))
            && channels_out.is_multiple_of(LANES)
            && channels_out >= 16;
        fits.then_some(plan)
    }

    /// The plan of an operation.
    pub fn of(gather: &Gather, caps: &Caps) -> Option<Self> {
        Self::choose(caps, gather.gathered(), gather.channels_out)
    }

    fn down(&self) -> usize {
        UNITS / self.across
    }

    /// Blocks that cover `rows` rows.
    pub fn row_blocks(&self, rows: usize) -> usize {
        rows.div_ceil(self.rows())
    }

    fn rows(&self) -> usize {
        self.down() * VOXELS
    }

    fn columns(&self) -> usize {
        self.across * VECTORS * LANES
    }

    fn shared_bytes(&self) -> usize {
        DEPTH * (self.rows() + self.columns()) * 4
    }
}

/// One cube computes one block. Blocks of the same voxels follow each other, so that their input stays in the cache. Where
/// something is taken of the outputs, the voxels of a block are of one sample, and the block is a part of it.
///
/// `norm_of_output` and `raw_output` serve the sums of the norm whose output the gradient `y` belongs to.
#[cube(launch)]
fn tiled_kernel<E: Float, N: Size>(
    x: &[Vector<E, N>],
    second: &[Vector<E, N>],
    weights: &[Vector<f32, N>],
    bias: &[Vector<f32, N>],
    y: &mut [Vector<E, N>],
    raw_output: &[Vector<E, N>],
    norm_of_output: &[Vector<f32, N>],
    parts: &mut [f32],
    s: GatherNumbers,
    #[comptime] plan: TiledPlan,
    #[comptime] form: Form,
    #[define(E)] _dtype: ElemType,
) {
    let column_blocks = s.channels_out.div_ceil(comptime!(plan.columns()));
    let row_block = CUBE_POS / column_blocks;
    let rows = rows_of_block(row_block, &s, comptime!(plan.rows()), comptime!(form.by_sample()));
    let first_column = CUBE_POS % column_blocks * comptime!(plan.columns());
    if rows.first >= s.batch * s.count.depth * s.count.height * s.count.width {
        terminate!();
    }
    let mut left = Shared::<[f32]>::new_slice(comptime!(DEPTH * plan.rows()));
    let mut right = Shared::<[Vector<f32, N>]>::new_aligned_slice(comptime!(DEPTH * plan.columns() / LANES), 16usize);
    let mut sums = Array::<Vector<f32, N>>::new(comptime!(VOXELS * VECTORS));
    #[unroll]
    for i in 0..comptime!(VOXELS * VECTORS) {
        sums[i] = Vector::new(0.0f32);
    }
    let corners = corners(&s, rows.first, rows.end, comptime!(plan.rows() / UNITS), UNITS);

    add_input::<E, N>(
        &mut sums,
        x,
        weights,
        &mut left,
        &mut right,
        &corners,
        &s,
        s.channels,
        0usize,
        first_column,
        plan,
    );
    if comptime!(form.second_input) {
        add_input::<E, N>(
            &mut sums,
            second,
            weights,
            &mut left,
            &mut right,
            &corners,
            &s,
            s.second_channels,
            s.taps.depth * s.taps.height * s.taps.width * s.channels,
            first_column,
            plan,
        );
    }

    // Where the unit's voxels lie in the output.
    let unit_row = UNIT_POS as usize / plan.across;
    let mut positions = Array::<usize>::new(VOXELS);
    #[unroll]
    for i in 0..VOXELS {
        positions[i] = output_position(rows.first + unit_row + comptime!(i * plan.down()), &s);
    }
    #[unroll]
    for v in 0..VECTORS {
        store_columns::<E, N>(
            &mut sums,
            bias,
            y,
            raw_output,
            norm_of_output,
            parts,
            &mut left,
            &mut right,
            &positions,
            &s,
            &rows,
            row_block,
            first_column,
            v,
            plan,
            form,
        );
    }
}

/// Adds the products of one input of `channels` channels, whose weights begin at row `first_weight`, to the sums.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn add_input<E: Float, N: Size>(
    sums: &mut Array<Vector<f32, N>>,
    x: &[Vector<E, N>],
    weights: &[Vector<f32, N>],
    left: &mut [f32],
    right: &mut [Vector<f32, N>],
    corners: &Corners,
    s: &GatherNumbers,
    channels: usize,
    first_weight: usize,
    first_column: usize,
    #[comptime] plan: TiledPlan,
) {
    for tap in 0..s.taps.depth * s.taps.height * s.taps.width {
        for channel in range_stepped(0usize, channels, DEPTH) {
            load_patch::<E, N>(left, x, corners, s, tap, channels, channel, plan);
            let first_row = first_weight + tap * channels + channel;
            load_weights::<N>(right, weights, first_row, channels - channel, first_column, s.channels_out, plan);
            // The factors are complete before anybody multiplies, and used before anybody overwrites them.
            sync_cube();
            multiply::<N>(sums, &*left, &*right, plan);
            sync_cube();
        }
    }
}

/// Loads [`DEPTH`] channels from `channel` on of every row's voxel, `[channel, row]`: units that read neighbouring numbers of a
/// channel then read neighbouring banks. What lies outside, and channels behind the last, are zero.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn load_patch<E: Float, N: Size>(
    left: &mut [f32],
    x: &[Vector<E, N>],
    corners: &Corners,
    s: &GatherNumbers,
    tap: usize,
    channels: usize,
    channel: usize,
    #[comptime] plan: TiledPlan,
) {
    let rows = comptime!(plan.rows());
    let vectors = channels / LANES;
    let tap = tap_of(tap, s);
    #[unroll]
    for v in 0..comptime!(DEPTH / LANES) {
        let vector = channel / LANES + v;
        #[unroll]
        for i in 0..comptime!(plan.rows() / UNITS) {
            let (inside, position) = under(&tap, corners, i);
            let mut value = Vector::<f32, N>::new(0.0f32);
            if inside && vector < vectors {
                value = Vector::cast_from(x[position as usize * vectors + vector]);
            }
            #[unroll]
            for lane in 0..LANES {
                left[comptime!((v * LANES + lane) * rows + i * UNITS) + UNIT_POS as usize] = value.extract(lane);
            }
        }
    }
}

/// Loads [`DEPTH`] rows of weights from `first_row` on, of which `rows` there are, and the block's columns.
#[cube]
fn load_weights<N: Size>(
    right: &mut [Vector<f32, N>],
    weights: &[Vector<f32, N>],
    first_row: usize,
    rows: usize,
    first_column: usize,
    channels_out: usize,
    #[comptime] plan: TiledPlan,
) {
    let columns = comptime!(plan.columns() / LANES);
    let mut slot = UNIT_POS as usize;
    while slot < comptime!(DEPTH * columns) {
        let row = slot / columns;
        let column = first_column / LANES + slot % columns;
        let mut value = Vector::<f32, N>::new(0.0f32);
        if row < rows && column < channels_out / LANES {
            value = weights[(first_row + row) * (channels_out / LANES) + column];
        }
        right[slot] = value;
        slot += UNITS;
    }
}

/// Adds the products of both factors in shared memory: each unit's voxels and vectors lie a step apart, so that neighbouring
/// units read the same voxel and neighbouring vectors.
#[cube]
fn multiply<N: Size>(
    sums: &mut Array<Vector<f32, N>>,
    left: &[f32],
    right: &[Vector<f32, N>],
    #[comptime] plan: TiledPlan,
) {
    let unit_row = UNIT_POS as usize / plan.across;
    let unit_column = UNIT_POS as usize % plan.across;
    let rows = comptime!(plan.rows());
    let columns = comptime!(plan.columns() / LANES);
    for d in 0..DEPTH {
        let mut factors = Array::<Vector<f32, N>>::new(VECTORS);
        #[unroll]
        for v in 0..VECTORS {
            factors[v] = right[d * columns + unit_column + comptime!(v * plan.across)];
        }
        #[unroll]
        for i in 0..VOXELS {
            let value = Vector::<f32, N>::new(left[d * rows + unit_row + comptime!(i * plan.down())]);
            #[unroll]
            for v in 0..VECTORS {
                let sum = comptime!(i * VECTORS + v);
                sums[sum] = fma(value, factors[v], sums[sum]);
            }
        }
    }
}

/// Stores vector number `v` of each unit, and takes what there is to take of it. The place of both factors serves again: all
/// units have passed the last product's barrier.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn store_columns<E: Float, N: Size>(
    sums: &mut Array<Vector<f32, N>>,
    bias: &[Vector<f32, N>],
    y: &mut [Vector<E, N>],
    raw_output: &[Vector<E, N>],
    norm_of_output: &[Vector<f32, N>],
    parts: &mut [f32],
    left: &mut [f32],
    right: &mut [Vector<f32, N>],
    positions: &Array<usize>,
    s: &GatherNumbers,
    rows: &Rows,
    row_block: usize,
    first_column: usize,
    #[comptime] v: usize,
    #[comptime] plan: TiledPlan,
    #[comptime] form: Form,
) {
    let unit = UNIT_POS as usize;
    let unit_row = unit / plan.across;
    let unit_column = unit % plan.across;
    let vectors_out = s.channels_out / LANES;
    let column = first_column / LANES + unit_column + comptime!(v * plan.across);
    let norm = coefficients_at::<N>(norm_of_output, rows.sample, vectors_out, column.min(vectors_out - 1), form.take);
    if comptime!(form.bias) {
        #[unroll]
        for i in 0..VOXELS {
            sums[comptime!(i * VECTORS + v)] += bias[column.min(vectors_out - 1)];
        }
    }
    let mut pivot = Vector::<f32, N>::zeroed();
    if comptime!(form.take == Take::Moments) {
        // Every block has a row: the first units have one.
        if unit_row == 0 {
            right[unit_column] = mean_of_unit::<N>(&*sums, rows.first, rows.end, v, plan);
        }
        sync_cube();
        pivot = right[unit_column];
    }
    let mut sum = Vector::<f32, N>::zeroed();
    let mut product = Vector::<f32, N>::zeroed();
    #[unroll]
    for i in 0..VOXELS {
        if rows.first + unit_row + comptime!(i * plan.down()) < rows.end && column < vectors_out {
            let stored = Vector::<E, N>::cast_from(sums[comptime!(i * VECTORS + v)]);
            let at = positions[i] * vectors_out + column;
            y[at] = stored;
            let stored = Vector::<f32, N>::cast_from(stored);
            if comptime!(form.take == Take::Moments) {
                let difference = stored - pivot;
                sum += difference;
                product += difference * difference;
            }
            if comptime!(form.take == Take::GradientSums) {
                let raw = Vector::<f32, N>::cast_from(raw_output[at]);
                let (dz, by_centred) = gradient_terms::<N>(stored, raw, &norm, Vector::new(s.slope));
                sum += dz;
                product += by_centred * norm[RSTD];
            }
        }
    }
    if comptime!(form.take != Take::Nothing) {
        #[unroll]
        for lane in 0..LANES {
            left[comptime!(lane * UNITS) + unit] = sum.extract(lane);
            left[comptime!((LANES + lane) * UNITS) + unit] = product.extract(lane);
        }
        sync_cube();
        let column = first_column + comptime!(v * plan.across * LANES) + unit;
        if unit < comptime!(plan.across * LANES) && column < s.channels_out {
            let mut pivot = 0.0f32.runtime();
            if comptime!(form.take == Take::Moments) {
                pivot = right[unit / LANES].extract_dynamic(unit % LANES);
            }
            merge_column(&*left, pivot, parts, s, rows, row_block, column, plan, form.take);
        }
        sync_cube();
    }
}

/// Adds what the units have put into `left` of one column, and stores it as the block's part.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn merge_column(
    left: &[f32],
    pivot: f32,
    parts: &mut [f32],
    s: &GatherNumbers,
    rows: &Rows,
    row_block: usize,
    column: usize,
    #[comptime] plan: TiledPlan,
    #[comptime] take: Take,
) {
    let unit = UNIT_POS as usize;
    let mut sum = 0.0f32.runtime();
    let mut product = 0.0f32.runtime();
    for row in 0..comptime!(plan.down()) {
        let from = unit % LANES * UNITS + row * plan.across + unit / LANES;
        sum += left[from];
        product += left[LANES * UNITS + from];
    }
    let to = row_block * comptime!(take.rows()) * s.channels_out + column;
    if comptime!(take == Take::Moments) {
        let count = f32::cast_from((rows.end - rows.first).min(comptime!(plan.rows())));
        let offset = sum / count;
        parts[to] = pivot;
        parts[to + s.channels_out] = offset;
        parts[to + 2 * s.channels_out] = product - sum * offset;
        parts[to + 3 * s.channels_out] = count;
    } else {
        parts[to] = sum;
        parts[to + s.channels_out] = product;
    }
}

/// The mean of a vector of columns over the rows of the unit whose first row is `first`.
#[cube]
fn mean_of_unit<N: Size>(
    sums: &Array<Vector<f32, N>>,
    first: usize,
    rows: usize,
    #[comptime] v: usize,
    #[comptime] plan: TiledPlan,
) -> Vector<f32, N> {
    let mut sum = Vector::<f32, N>::zeroed();
    let mut count = 0.0f32.runtime();
    #[unroll]
    for i in 0..VOXELS {
        if first + comptime!(i * plan.down()) < rows {
            sum += sums[comptime!(i * VECTORS + v)];
            count += 1.0f32;
        }
    }
    sum / Vector::new(count)
}

/// Launches the kernel.
pub(crate) fn launch(context: &Context, gather: &Gather, weights: &Buffer) -> Result<(), KernelError> {
    const UNSUPPORTED: KernelError =
        KernelError::Unsupported { operation: GATHER, feature: "shared memory for this operation" };
    let plan = TiledPlan::of(gather, context.caps()).ok_or(UNSUPPORTED)?;
    let form = Form::of(gather);
    let blocks_of_sample = plan.row_blocks(gather.outputs());
    let row_blocks = match form.by_sample() {
        true => gather.batch * blocks_of_sample,
        false => plan.row_blocks(gather.batch * gather.outputs()),
    };
    let blocks = row_blocks * gather.channels_out.div_ceil(plan.columns());
    if blocks == 0 {
        return Ok(());
    }
    let nothing = context.empty(LANES, Dtype::F32)?;
    let [parts, raw_output, norm_of_output] = gather.epilogue.buffers(&nothing);
    let work = Work::Cubes(blocks, CubeDim::new_1d(UNITS as u32)).of_flops(gather.flops());
    context.launch(GATHER, work, |client, count, dim| {
        tiled_kernel::launch(
            client,
            count,
            dim,
            LANES,
            gather.input.arg(),
            gather.second_or_input().arg(),
            weights.arg(),
            gather.bias.unwrap_or(weights).arg(),
            gather.output.arg(),
            raw_output.arg(),
            norm_of_output.arg(),
            parts.arg(),
            gather.numbers(Walk::by_block(blocks_of_sample)),
            plan,
            form,
            gather.input.dtype().elem(),
        );
    })
}
