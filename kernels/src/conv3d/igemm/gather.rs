//! The matrix product of everything that gathers (see [`Gather`]): rows are output voxels, columns output channels, and
//! the sums run over inputs, taps and channels, in the order of the packed weights.

use super::{OUTSIDE, Plan, SKEW, load_lanes, load_vector, multiply, place, plane_place, zero_sums};
use crate::conv3d::fused::Form;
use crate::conv3d::gather::{Gather, OPERATION, Shape};
use crate::instance_norm::Operand;
use crate::instance_norm::epilogue::{Merged, Take, gradient_terms, merge, slope_of};
use crate::instance_norm::prologue::{Load, RSTD, coefficients_at};
use crate::{Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// One cube computes one block. Blocks of the same voxels follow each other, so that their input stays in the cache. Where a
/// norm is part of the `form`, the voxels of a block are of one sample, of `blocks_of_sample`, and the block is a part of
/// what is taken of the outputs.
///
/// For a gradient that is loaded through a norm, `second` is what the norm read. `norm_of_output` and `raw_output` serve the
/// sums of the norm whose output the gradient `y` belongs to; their vectors have one element.
#[cube(launch)]
#[allow(clippy::collapsible_if, reason = "the outer condition is decided when the kernel is compiled")]
fn tensor_core_gather_kernel<E: Float, A: Size, B: Size, O: Size>(
    x: &[Vector<E, A>],
    second: &[Vector<E, A>],
    norm: &[Vector<f32, A>],
    second_norm: &[Vector<f32, A>],
    weights: &[Vector<E, B>],
    bias: &[f32],
    y: &mut [E],
    raw_output: &[Vector<E, O>],
    norm_of_output: &[Vector<f32, O>],
    parts: &mut [f32],
    slope: f32,
    blocks_of_sample: usize,
    s: Shape,
    #[comptime] plan: Plan,
    #[comptime] form: Form,
    #[define(E)] _dtype: ElemType,
) {
    let all_rows = s.batch * s.count_depth * s.count_height * s.count_width;
    let column_blocks = s.channels_out.div_ceil(comptime!(plan.columns()));
    let row_block = CUBE_POS / column_blocks;
    // The block's first row, and the end of the rows that it may take.
    let mut first_row = row_block * comptime!(plan.rows());
    let mut rows = all_rows;
    let mut sample = 0usize.runtime();
    if comptime!(form.by_sample()) {
        sample = row_block / blocks_of_sample;
        rows = (sample + 1) * (s.count_depth * s.count_height * s.count_width);
        first_row = sample * (s.count_depth * s.count_height * s.count_width)
            + row_block % blocks_of_sample * comptime!(plan.rows());
    }
    if first_row >= all_rows {
        terminate!();
    }
    let first_column = CUBE_POS % column_blocks * comptime!(plan.columns());

    let a_lanes = A::value();
    let b_lanes = B::value();
    let mut left = Shared::<[Vector<E, A>]>::new_aligned_slice(comptime!(plan.left_len(false) / a_lanes), 32usize);
    let mut right = Shared::<[Vector<E, B>]>::new_aligned_slice(comptime!(plan.right_len() / b_lanes), 32usize);
    let mut staging = Shared::<[f32]>::new_aligned_slice(comptime!(plan.staging_len()), 32usize);
    let mut positions = Shared::<[u32]>::new_slice(comptime!(plan.rows()));
    let sums = zero_sums(plan);
    let rows_of_unit = rows_of_unit(&s, first_row, rows, plan);

    let taps = s.taps_depth * s.taps_height * s.taps_width;
    add_input::<E, A, B>(
        &sums,
        x,
        second,
        norm,
        sample,
        slope,
        weights,
        &mut left,
        &mut right,
        &mut positions,
        &rows_of_unit,
        &s,
        s.channels,
        0usize,
        first_column,
        plan,
        form.load,
    );
    if comptime!(form.second_input) {
        add_input::<E, A, B>(
            &sums,
            second,
            second,
            second_norm,
            sample,
            slope,
            weights,
            &mut left,
            &mut right,
            &mut positions,
            &rows_of_unit,
            &s,
            s.second_channels,
            taps * s.channels,
            first_column,
            plan,
            form.second_load,
        );
    }

    // Where the block's voxels lie in the output.
    let mut row = UNIT_POS as usize;
    while row < comptime!(plan.rows()) {
        let (n, jd, jh, jw) = place(first_row + row, s.count_depth, s.count_height, s.count_width);
        let od = jd * s.out_step_depth + s.out_offset_depth;
        let oh = jh * s.out_step_height + s.out_offset_height;
        let ow = jw * s.out_step_width + s.out_offset_width;
        let position = ((n * s.out_depth + od) * s.out_height + oh) * s.out_width + ow;
        positions[row] = select(first_row + row < rows, position as u32, OUTSIDE);
        row += comptime!(plan.units());
    }
    let plane = UNIT_POS_Y as usize;
    let (plane_row, plane_column) = plane_place(plan);
    let area = comptime!(plan.m * plan.n);
    #[unroll]
    for j in 0..comptime!(plan.fragments[1]) {
        let first_of_plane = first_column + (plane_column * plan.fragments[1] + j) * plan.n;
        // Of the rows of one column that this unit stores.
        let mut moments = Merged { mean: 0.0f32.runtime(), square: 0.0f32.runtime(), count: 0.0f32.runtime() };
        let mut sum_dz = Vector::<f32, O>::zeroed();
        let mut sum_by_centred = Vector::<f32, O>::zeroed();
        let of_unit = (first_of_plane + UNIT_POS_X as usize % plan.n).min(s.channels_out - 1);
        let norm = coefficients_at::<O>(norm_of_output, sample, s.channels_out, of_unit, form.take.load());
        #[unroll]
        for i in 0..comptime!(plan.fragments[0]) {
            cmma::store(
                &mut staging[plane * area..plane * area + area],
                &sums[comptime!(i * plan.fragments[1] + j)],
                comptime!(plan.n as u32),
                cmma::MatrixLayout::RowMajor,
            );
            sync_cube();
            let mut shift = 0.0f32.runtime();
            let mut sum = 0.0f32.runtime();
            let mut square = 0.0f32.runtime();
            let mut count = 0.0f32.runtime();
            let mut e = UNIT_POS_X as usize;
            while e < area {
                let position = positions[(plane_row * plan.fragments[0] + i) * plan.m + e / plan.n];
                let column = first_of_plane + e % plan.n;
                if position != OUTSIDE && column < s.channels_out {
                    let mut value = staging[plane * area + e];
                    if comptime!(form.bias) {
                        value += bias[column];
                    }
                    let stored = E::cast_from(value);
                    let at = position as usize * s.channels_out + column;
                    y[at] = stored;
                    let stored = f32::cast_from(stored);
                    if comptime!(form.take == Take::Moments) {
                        if count == 0.0f32 {
                            shift = stored;
                        }
                        let difference = stored - shift;
                        sum += difference;
                        square += difference * difference;
                        count += 1.0f32;
                    }
                    if comptime!(form.take == Take::GradientSums) {
                        let raw = Vector::<f32, O>::cast_from(raw_output[at]);
                        let gradient = Vector::<f32, O>::new(stored);
                        let (dz, by_centred) = gradient_terms::<O>(gradient, raw, &norm, Vector::new(slope));
                        sum_dz += dz;
                        sum_by_centred += by_centred;
                    }
                }
                e += comptime!(plan.plane);
            }
            if comptime!(form.take == Take::Moments) {
                if count > 0.0f32 {
                    let offset = sum / count;
                    merge(&mut moments, shift + offset, square - sum * offset, count);
                }
            }
            sync_cube();
        }
        if comptime!(form.take != Take::Nothing) {
            // Units of a plane at a distance of `n` have the same column, and so have planes of other rows. The place of the
            // sums on their way out serves again.
            let unit = UNIT_POS as usize;
            let third = comptime!(plan.units());
            if comptime!(form.take == Take::Moments) {
                staging[unit] = moments.mean;
                staging[third + unit] = moments.square;
                staging[2 * third + unit] = moments.count;
            } else {
                staging[unit] = sum_dz.extract(0usize);
                staging[third + unit] = sum_by_centred.extract(0usize);
            }
            sync_cube();
            let lane = UNIT_POS_X as usize;
            if plane_row == 0 && lane < plan.n && first_of_plane + lane < s.channels_out {
                let mut merged = Merged { mean: 0.0f32.runtime(), square: 0.0f32.runtime(), count: 0.0f32.runtime() };
                let mut dz = 0.0f32.runtime();
                let mut by_centred = 0.0f32.runtime();
                for row in 0..comptime!(plan.planes[0]) {
                    let first = (row * plan.planes[1] + plane_column) * plan.plane;
                    for other in range_stepped(lane, plan.plane, plan.n) {
                        let from = first + other;
                        if comptime!(form.take == Take::Moments) {
                            merge(&mut merged, staging[from], staging[third + from], staging[2 * third + from]);
                        } else {
                            dz += staging[from];
                            by_centred += staging[third + from];
                        }
                    }
                }
                let to = row_block * comptime!(form.take.rows()) * s.channels_out + first_of_plane + lane;
                if comptime!(form.take == Take::Moments) {
                    parts[to] = merged.mean;
                    parts[to + s.channels_out] = 0.0f32;
                    parts[to + 2 * s.channels_out] = merged.square;
                    parts[to + 3 * s.channels_out] = merged.count;
                } else {
                    parts[to] = dz;
                    parts[to + s.channels_out] = by_centred * norm[RSTD].extract(0usize);
                }
            }
            sync_cube();
        }
    }
}

/// Taps along an axis, at most.
const AXIS_BITS: u32 = 3;

/// What a unit knows of those of the block's rows whose positions it computes: all divisions are done here, once.
#[derive(CubeType)]
struct RowsOfUnit {
    /// Position of the input voxel under the first tap, as if there were voxels all around: it may be below zero, and
    /// wraps around.
    corner: Array<u32>,
    /// For each axis [`AXIS_BITS`] bits: whether a tap's voxel is inside along it.
    inside: Array<u32>,
}

#[cube]
fn rows_of_unit(s: &Shape, first_row: usize, rows: usize, #[comptime] plan: Plan) -> RowsOfUnit {
    let count = comptime!(plan.rows().div_ceil(plan.units()));
    let mut corner = Array::<u32>::new(count);
    let mut inside = Array::<u32>::new(count);
    #[unroll]
    for i in 0..count {
        let row = first_row + UNIT_POS as usize + comptime!(i * plan.units());
        let (n, jd, jh, jw) = place(row, s.count_depth, s.count_height, s.count_width);
        let id = (jd * s.in_step_depth) as u32 - s.pad_depth as u32;
        let ih = (jh * s.in_step_height) as u32 - s.pad_height as u32;
        let iw = (jw * s.in_step_width) as u32 - s.pad_width as u32;
        let plane = (n * s.in_depth) as u32 + id;
        corner[i] = (plane * s.in_height as u32 + ih) * s.in_width as u32 + iw;
        let mut bits = 0u32.runtime();
        #[unroll]
        for tap in 0..AXIS_BITS {
            // What is below zero has wrapped around, beyond any extent.
            bits |= u32::cast_from(id + tap < s.in_depth as u32) << tap;
            bits |= u32::cast_from(ih + tap < s.in_height as u32) << (tap + AXIS_BITS);
            bits |= u32::cast_from(iw + tap < s.in_width as u32) << (tap + 2 * AXIS_BITS);
        }
        inside[i] = select(row < rows, bits, 0u32);
    }
    RowsOfUnit { corner, inside }
}

/// Adds the products of one input of `channels` channels, whose weights begin at row `first_weight`, to the sums.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel; a struct of slices is no kernel argument")]
fn add_input<E: Float, A: Size, B: Size>(
    sums: &Sequence<cmma::Matrix<f32>>,
    x: &[Vector<E, A>],
    raw: &[Vector<E, A>],
    norm: &[Vector<f32, A>],
    sample: usize,
    slope: f32,
    weights: &[Vector<E, B>],
    left: &mut [Vector<E, A>],
    right: &mut [Vector<E, B>],
    positions: &mut [u32],
    rows_of_unit: &RowsOfUnit,
    s: &Shape,
    channels: usize,
    first_weight: usize,
    first_column: usize,
    #[comptime] plan: Plan,
    #[comptime] load: Load,
) {
    let unit = UNIT_POS as usize;
    let units = comptime!(plan.units());
    let a_lanes = A::value();
    let b_lanes = B::value();
    let left_vectors = comptime!(plan.depth / a_lanes);
    let left_stride = comptime!(plan.left_stride(false) / a_lanes);
    let right_vectors = comptime!(plan.columns() / b_lanes);
    let right_stride = comptime!(plan.right_stride() / b_lanes);
    let taps = s.taps_depth * s.taps_height * s.taps_width;
    for tap in 0..taps {
        // The input voxel of each of the block's rows.
        let tw = (tap % s.taps_width) as u32;
        let th = (tap / s.taps_width % s.taps_height) as u32;
        let td = (tap / s.taps_width / s.taps_height) as u32;
        let ahead = (td * s.in_height as u32 + th) * s.in_width as u32 + tw;
        #[unroll]
        for i in 0..comptime!(plan.rows().div_ceil(plan.units())) {
            let row = unit + comptime!(i * plan.units());
            let inside = rows_of_unit.inside[i];
            let all = (inside >> td) & (inside >> (th + AXIS_BITS)) & (inside >> (tw + 2 * AXIS_BITS)) & 1;
            if row < comptime!(plan.rows()) {
                positions[row] = select(all == 1, rows_of_unit.corner[i] + ahead, OUTSIDE);
            }
        }
        sync_cube();

        let mut channel = 0usize.runtime();
        while channel < channels {
            // A unit loads the same channels of every row. Those behind the last are not loaded.
            let vectors = channels / a_lanes;
            let of_unit = ((channel / a_lanes) + unit % left_vectors).min(vectors - 1);
            let norm = coefficients_at::<A>(norm, sample, vectors, of_unit, load);
            let mut slot = unit;
            while slot < comptime!(plan.rows() * left_vectors) {
                let row = slot / left_vectors;
                let v = slot % left_vectors;
                let c = channel + v * a_lanes;
                let position = positions[row];
                let mut value = Vector::<E, A>::zeroed();
                if position != OUTSIDE && c < channels {
                    let at = (position as usize * channels + c) / a_lanes;
                    value = load_vector::<E, A>(x, raw, at, &norm, slope, load);
                }
                left[row * left_stride + v] = value;
                slot += units;
            }
            let mut slot = unit;
            while slot < comptime!(plan.depth * right_vectors) {
                let row = slot / right_vectors;
                let v = slot % right_vectors;
                let column = first_column + v * b_lanes;
                let mut value = Vector::<E, B>::zeroed();
                if channel + row < channels && column < s.channels_out {
                    let weight = first_weight + tap * channels + channel + row;
                    value = weights[(weight * s.channels_out + column) / b_lanes];
                }
                right[row * right_stride + v] = value;
                slot += units;
            }
            sync_cube();

            multiply(sums, &*left, &*right, plan, false);
            sync_cube();
            channel += comptime!(plan.depth);
        }
    }
}

/// Launches the kernel.
pub(crate) fn launch(gather: &Gather, plan: Plan, context: &Context) -> Result<(), KernelError> {
    let form = Form::of(gather);
    let rows: usize = gather.count.iter().product();
    let blocks_of_sample = plan.row_blocks(rows);
    let row_blocks = match form.by_sample() {
        true => gather.batch * blocks_of_sample,
        false => plan.row_blocks(gather.batch * rows),
    };
    let blocks = row_blocks * gather.channels_out.div_ceil(plan.columns());
    if blocks == 0 {
        return Ok(());
    }
    let (second, second_channels) = gather.second.unwrap_or((Operand::Stored(gather.input.raw()), 0));
    let nothing = context.empty(SKEW, Dtype::F32)?;
    let norm = |operand: &Operand| operand.coefficients().map_or(&nothing, |by| &by.values).arg();
    let [parts, raw_output, norm_of_output] = gather.epilogue.buffers(&nothing);
    let slope = slope_of(OPERATION, [Some(&gather.input), Some(&second), None], &gather.epilogue)?;
    context.launch(OPERATION, Work::Cubes(blocks, plan.cube()), |client, count, dim| {
        tensor_core_gather_kernel::launch(
            client,
            count,
            dim,
            load_lanes(context.caps(), &[gather.channels_in, second_channels]),
            load_lanes(context.caps(), &[gather.channels_out]),
            1,
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
