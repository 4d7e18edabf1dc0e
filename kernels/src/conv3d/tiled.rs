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

use super::fused::Form;
use super::gather::{Gather, OPERATION, Shape};
use super::igemm::load_vector;
use crate::instance_norm::Operand;
use crate::instance_norm::epilogue::{Take, gradient_terms, slope_of};
use crate::instance_norm::prologue::{Load, RSTD, coefficients_at};
use crate::{Caps, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// Units of a cube.
const UNITS: usize = 128;
/// Voxels of a unit, and its vectors of [`LANES`] channels.
const VOXELS: usize = 8;
const VECTORS: usize = 2;
const LANES: usize = 4;
/// Channels of the sums between two barriers.
const DEPTH: usize = 8;
/// Taps along an axis, at most.
const AXIS_BITS: u32 = 3;

/// What is compiled into one instance of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Plan {
    /// Units along the columns of a block.
    across: usize,
}

impl Plan {
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

/// One cube computes one block. Blocks of the same voxels follow each other, so that their input stays in the cache. Where a
/// norm is part of the `form`, the voxels of a block are of one sample, of `blocks_of_sample`, and the block is a part of
/// what is taken of the outputs.
///
/// For a gradient that is loaded through a norm, `second` is what the norm read. `norm_of_output` and `raw_output` serve the
/// sums of the norm whose output the gradient `y` belongs to.
#[cube(launch)]
fn tiled_kernel<E: Float, N: Size>(
    x: &[Vector<E, N>],
    second: &[Vector<E, N>],
    norm: &[Vector<f32, N>],
    second_norm: &[Vector<f32, N>],
    weights: &[Vector<f32, N>],
    bias: &[Vector<f32, N>],
    y: &mut [Vector<E, N>],
    raw_output: &[Vector<E, N>],
    norm_of_output: &[Vector<f32, N>],
    parts: &mut [f32],
    slope: f32,
    blocks_of_sample: usize,
    s: Shape,
    #[comptime] plan: Plan,
    #[comptime] form: Form,
    #[define(E)] _dtype: ElemType,
) {
    let rows_of_sample = s.count_depth * s.count_height * s.count_width;
    let all_rows = s.batch * rows_of_sample;
    let column_blocks = s.channels_out.div_ceil(comptime!(plan.columns()));
    let row_block = CUBE_POS / column_blocks;
    // The block's first row, and the end of the rows that it may take.
    let mut first_row = row_block * comptime!(plan.rows());
    let mut rows = all_rows;
    let mut sample = 0usize.runtime();
    if comptime!(form.by_sample()) {
        sample = row_block / blocks_of_sample;
        rows = (sample + 1) * rows_of_sample;
        first_row = sample * rows_of_sample + row_block % blocks_of_sample * comptime!(plan.rows());
    }
    let first_column = CUBE_POS % column_blocks * comptime!(plan.columns());
    if first_row >= all_rows {
        terminate!();
    }
    let mut left = Shared::<[f32]>::new_slice(comptime!(DEPTH * plan.rows()));
    let mut right = Shared::<[Vector<f32, N>]>::new_aligned_slice(comptime!(DEPTH * plan.columns() / LANES), 16usize);
    let mut sums = Array::<Vector<f32, N>>::new(comptime!(VOXELS * VECTORS));
    #[unroll]
    for i in 0..comptime!(VOXELS * VECTORS) {
        sums[i] = Vector::new(0.0f32);
    }

    // Of the rows that this unit loads: where the voxel under the first tap lies, as if there were voxels all around (below
    // zero wraps around), and for each axis which taps are inside.
    let loads = comptime!(plan.rows() / UNITS);
    let mut corner = Array::<u32>::new(loads);
    let mut inside = Array::<u32>::new(loads);
    #[unroll]
    for i in 0..loads {
        let row = first_row + UNIT_POS as usize + comptime!(i * UNITS);
        let (n, jd, jh, jw) = place(row, &s);
        let id = (jd * s.in_step_depth) as u32 - s.pad_depth as u32;
        let ih = (jh * s.in_step_height) as u32 - s.pad_height as u32;
        let iw = (jw * s.in_step_width) as u32 - s.pad_width as u32;
        let plane = (n * s.in_depth) as u32 + id;
        corner[i] = (plane * s.in_height as u32 + ih) * s.in_width as u32 + iw;
        let mut bits = 0u32.runtime();
        #[unroll]
        for tap in 0..AXIS_BITS {
            bits |= u32::cast_from(id + tap < s.in_depth as u32) << tap;
            bits |= u32::cast_from(ih + tap < s.in_height as u32) << (tap + AXIS_BITS);
            bits |= u32::cast_from(iw + tap < s.in_width as u32) << (tap + 2 * AXIS_BITS);
        }
        inside[i] = select(row < rows, bits, 0u32);
    }

    let taps = s.taps_depth * s.taps_height * s.taps_width;
    let channels = s.channels;
    add_input::<E, N>(
        &mut sums,
        x,
        second,
        norm,
        sample,
        slope,
        weights,
        &mut left,
        &mut right,
        &corner,
        &inside,
        &s,
        channels,
        0usize,
        first_column,
        plan,
        form.load,
    );
    if comptime!(form.second_input) {
        let first_weight = taps * channels;
        let channels = s.second_channels;
        add_input::<E, N>(
            &mut sums,
            second,
            second,
            second_norm,
            sample,
            slope,
            weights,
            &mut left,
            &mut right,
            &corner,
            &inside,
            &s,
            channels,
            first_weight,
            first_column,
            plan,
            form.second_load,
        );
    }

    let unit = UNIT_POS as usize;
    let unit_row = unit / plan.across;
    let unit_column = unit % plan.across;
    // Where the unit's voxels lie in the output.
    let mut positions = Array::<usize>::new(VOXELS);
    #[unroll]
    for i in 0..VOXELS {
        let (n, jd, jh, jw) = place(first_row + unit_row + comptime!(i * plan.down()), &s);
        let od = jd * s.out_step_depth + s.out_offset_depth;
        let oh = jh * s.out_step_height + s.out_offset_height;
        let ow = jw * s.out_step_width + s.out_offset_width;
        positions[i] = ((n * s.out_depth + od) * s.out_height + oh) * s.out_width + ow;
    }
    let vectors_out = s.channels_out / LANES;
    #[unroll]
    for v in 0..VECTORS {
        let column = first_column / LANES + unit_column + comptime!(v * plan.across);
        let norm =
            coefficients_at::<N>(norm_of_output, sample, vectors_out, column.min(vectors_out - 1), form.take.load());
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
                right[unit_column] = mean_of_unit::<N>(&sums, first_row, rows, v, plan);
            }
            sync_cube();
            pivot = right[unit_column];
        }
        let mut sum = Vector::<f32, N>::zeroed();
        let mut product = Vector::<f32, N>::zeroed();
        #[unroll]
        for i in 0..VOXELS {
            if first_row + unit_row + comptime!(i * plan.down()) < rows && column < vectors_out {
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
                    let (dz, by_centred) = gradient_terms::<N>(stored, raw, &norm, Vector::new(slope));
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
                let mut sum = 0.0f32.runtime();
                let mut product = 0.0f32.runtime();
                for row in 0..comptime!(plan.down()) {
                    let from = unit % LANES * UNITS + row * plan.across + unit / LANES;
                    sum += left[from];
                    product += left[LANES * UNITS + from];
                }
                let to = row_block * comptime!(form.take.rows()) * s.channels_out + column;
                if comptime!(form.take == Take::Moments) {
                    let count = f32::cast_from((rows - first_row).min(comptime!(plan.rows())));
                    let offset = sum / count;
                    parts[to] = right[unit / LANES].extract_dynamic(unit % LANES);
                    parts[to + s.channels_out] = offset;
                    parts[to + 2 * s.channels_out] = product - sum * offset;
                    parts[to + 3 * s.channels_out] = count;
                } else {
                    parts[to] = sum;
                    parts[to + s.channels_out] = product;
                }
            }
            sync_cube();
        }
    }
}

/// The mean of a vector of columns over the rows of the unit whose first row is `first`.
#[cube]
fn mean_of_unit<N: Size>(
    sums: &Array<Vector<f32, N>>,
    first: usize,
    rows: usize,
    #[comptime] v: usize,
    #[comptime] plan: Plan,
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

/// Sample and position of an output of this launch.
#[cube]
fn place(row: usize, s: &Shape) -> (usize, usize, usize, usize) {
    let line = row / s.count_width;
    let plane = line / s.count_height;
    (plane / s.count_depth, plane % s.count_depth, line % s.count_height, row % s.count_width)
}

/// Adds the products of one input of `channels` channels, whose weights begin at row `first_weight`, to the sums.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel; a struct of slices is no kernel argument")]
fn add_input<E: Float, N: Size>(
    sums: &mut Array<Vector<f32, N>>,
    x: &[Vector<E, N>],
    raw: &[Vector<E, N>],
    norm: &[Vector<f32, N>],
    sample: usize,
    slope: f32,
    weights: &[Vector<f32, N>],
    left: &mut [f32],
    right: &mut [Vector<f32, N>],
    corner: &Array<u32>,
    inside: &Array<u32>,
    s: &Shape,
    channels: usize,
    first_weight: usize,
    first_column: usize,
    #[comptime] plan: Plan,
    #[comptime] load: Load,
) {
    let unit = UNIT_POS as usize;
    let unit_row = unit / plan.across;
    let unit_column = unit % plan.across;
    let rows = comptime!(plan.rows());
    let columns = comptime!(plan.columns() / LANES);
    let taps = s.taps_depth * s.taps_height * s.taps_width;
    let vectors = channels / LANES;
    for tap in 0..taps {
        let tw = (tap % s.taps_width) as u32;
        let th = (tap / s.taps_width % s.taps_height) as u32;
        let td = (tap / s.taps_width / s.taps_height) as u32;
        let ahead = (td * s.in_height as u32 + th) * s.in_width as u32 + tw;
        for channel in range_stepped(0usize, channels, DEPTH) {
            #[unroll]
            for v in 0..comptime!(DEPTH / LANES) {
                let vector = channel / LANES + v;
                let norm = coefficients_at::<N>(norm, sample, vectors, vector.min(vectors - 1), load);
                #[unroll]
                for i in 0..comptime!(plan.rows() / UNITS) {
                    let bits = inside[i];
                    let all = (bits >> td) & (bits >> (th + AXIS_BITS)) & (bits >> (tw + 2 * AXIS_BITS)) & 1;
                    let mut value = Vector::<f32, N>::new(0.0f32);
                    if all == 1 && vector < vectors {
                        let at = (corner[i] + ahead) as usize * vectors + vector;
                        value = Vector::cast_from(load_vector::<E, N>(x, raw, at, &norm, slope, load));
                    }
                    #[unroll]
                    for lane in 0..LANES {
                        left[comptime!((v * LANES + lane) * rows + i * UNITS) + unit] = value.extract(lane);
                    }
                }
            }
            let mut slot = unit;
            while slot < comptime!(DEPTH * columns) {
                let c = channel + slot / columns;
                let column = first_column / LANES + slot % columns;
                let mut value = Vector::<f32, N>::new(0.0f32);
                if c < channels && column < s.channels_out / LANES {
                    value = weights[(first_weight + tap * channels + c) * (s.channels_out / LANES) + column];
                }
                right[slot] = value;
                slot += UNITS;
            }
            sync_cube();

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
            sync_cube();
        }
    }
}

/// Launches the kernel.
pub(crate) fn launch(gather: &Gather, plan: Plan, context: &Context) -> Result<(), KernelError> {
    let form = Form::of(gather);
    let rows = gather.count.iter().product::<usize>();
    let blocks_of_sample = plan.row_blocks(rows);
    let row_blocks = match form.by_sample() {
        true => gather.batch * blocks_of_sample,
        false => plan.row_blocks(gather.batch * rows),
    };
    let blocks = row_blocks * gather.channels_out.div_ceil(plan.columns());
    if blocks == 0 {
        return Ok(());
    }
    let (second, _) = gather.second.unwrap_or((Operand::Stored(gather.input.raw()), 0));
    let nothing = context.empty(LANES, Dtype::F32)?;
    let norm = |operand: &Operand| operand.coefficients().map_or(&nothing, |by| &by.values).arg();
    let [parts, raw_output, norm_of_output] = gather.epilogue.buffers(&nothing);
    let slope = slope_of(OPERATION, [Some(&gather.input), Some(&second), None], &gather.epilogue)?;
    context.launch(OPERATION, Work::Cubes(blocks, CubeDim::new_1d(UNITS as u32)), |client, count, dim| {
        tiled_kernel::launch(
            client,
            count,
            dim,
            LANES,
            gather.input.buffer().arg(),
            second.buffer().arg(),
            norm(&gather.input),
            norm(&second),
            gather.weights.arg(),
            gather.bias.unwrap_or(gather.weights).arg(),
            gather.output.arg(),
            raw_output.arg(),
            norm_of_output.arg(),
            parts.arg(),
            slope,
            blocks_of_sample,
            gather.shape(1),
            plan,
            form,
            gather.input.buffer().dtype().elem(),
        )
    })
}
