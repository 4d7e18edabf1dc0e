//! The matrix product of everything that gathers (see [`Gather`]): rows are output voxels, columns output channels, and
//! the sums run over inputs, taps and channels, in the order of the packed weights.

use super::{OUTSIDE, Plan, load_lanes, multiply, place, plane_place, zero_sums};
use crate::conv3d::gather::{Gather, OPERATION, Shape};
use crate::instance_norm::epilogue::{Merged, Take, merge};
use crate::{Context, Dtype, KernelError};
use cubecl::prelude::*;

/// One cube computes one block. Blocks of the same voxels follow each other, so that their input stays in the cache. With
/// `moments`, the voxels of a block are of one sample, and the block is a part of its moments.
#[cube(launch)]
#[allow(clippy::collapsible_if, reason = "the outer condition is decided when the kernel is compiled")]
fn tensor_core_gather_kernel<E: Float, A: Size, B: Size>(
    x: &[Vector<E, A>],
    second: &[Vector<E, A>],
    weights: &[Vector<E, B>],
    bias: &[f32],
    y: &mut [E],
    moments: &mut [f32],
    s: Shape,
    #[comptime] plan: Plan,
    #[comptime] second_input: bool,
    #[comptime] with_bias: bool,
    #[comptime] with_moments: bool,
    #[define(E)] _dtype: ElemType,
) {
    let all_rows = s.batch * s.count_depth * s.count_height * s.count_width;
    let column_blocks = s.channels_out.div_ceil(comptime!(plan.columns()));
    let row_block = CUBE_POS / column_blocks;
    // The block's first row, and the end of the rows that it may take.
    let mut first_row = row_block * comptime!(plan.rows());
    let mut rows = all_rows;
    if comptime!(with_moments) {
        let n = row_block / s.parts;
        rows = (n + 1) * (s.count_depth * s.count_height * s.count_width);
        first_row = n * (s.count_depth * s.count_height * s.count_width) + row_block % s.parts * plan.rows();
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
    );
    if comptime!(second_input) {
        add_input::<E, A, B>(
            &sums,
            second,
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
        // Of the rows of one column that this unit stores.
        let mut moments_of_unit = Merged { mean: 0.0f32.runtime(), square: 0.0f32.runtime(), count: 0.0f32.runtime() };
        let column = first_column + (plane_column * plan.fragments[1] + j) * plan.n;
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
                let column = column + e % plan.n;
                if position != OUTSIDE && column < s.channels_out {
                    let mut value = staging[plane * area + e];
                    if comptime!(with_bias) {
                        value += bias[column];
                    }
                    let stored = E::cast_from(value);
                    y[position as usize * s.channels_out + column] = stored;
                    if comptime!(with_moments) {
                        let stored = f32::cast_from(stored);
                        if count == 0.0f32 {
                            shift = stored;
                        }
                        let difference = stored - shift;
                        sum += difference;
                        square += difference * difference;
                        count += 1.0f32;
                    }
                }
                e += comptime!(plan.plane);
            }
            if comptime!(with_moments) {
                if count > 0.0f32 {
                    let offset = sum / count;
                    merge(&mut moments_of_unit, shift + offset, square - sum * offset, count);
                }
            }
            sync_cube();
        }
        if comptime!(with_moments) {
            // Units of a plane at a distance of `n` have the same column, and so have planes of other rows. The place of the
            // sums on their way out serves again.
            let unit = UNIT_POS as usize;
            let third = comptime!(plan.units());
            staging[unit] = moments_of_unit.mean;
            staging[third + unit] = moments_of_unit.square;
            staging[2 * third + unit] = moments_of_unit.count;
            sync_cube();
            let lane = UNIT_POS_X as usize;
            if plane_row == 0 && lane < plan.n && column + lane < s.channels_out {
                let mut merged = Merged { mean: 0.0f32.runtime(), square: 0.0f32.runtime(), count: 0.0f32.runtime() };
                for row in 0..comptime!(plan.planes[0]) {
                    let first = (row * plan.planes[1] + plane_column) * plan.plane;
                    for other in range_stepped(lane, plan.plane, plan.n) {
                        let from = first + other;
                        merge(&mut merged, staging[from], staging[third + from], staging[2 * third + from]);
                    }
                }
                let to = row_block * 4 * s.channels_out + column + lane;
                moments[to] = merged.mean;
                moments[to + s.channels_out] = 0.0f32;
                moments[to + 2 * s.channels_out] = merged.square;
                moments[to + 3 * s.channels_out] = merged.count;
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
            let mut slot = unit;
            while slot < comptime!(plan.rows() * left_vectors) {
                let row = slot / left_vectors;
                let v = slot % left_vectors;
                let c = channel + v * a_lanes;
                let position = positions[row];
                let mut value = Vector::<E, A>::zeroed();
                if position != OUTSIDE && c < channels {
                    value = x[(position as usize * channels + c) / a_lanes];
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
    let rows: usize = gather.count.iter().product();
    let row_blocks = match gather.epilogue.take() {
        Take::Moments => gather.batch * plan.row_blocks(rows),
        _ => plan.row_blocks(gather.batch * rows),
    };
    let blocks = row_blocks * gather.channels_out.div_ceil(plan.columns());
    if blocks == 0 {
        return Ok(());
    }
    let (second, second_channels) = gather.second.unwrap_or((gather.input, 0));
    let nothing = context.empty(1, Dtype::F32)?;
    let [moments, ..] = gather.epilogue.buffers(&nothing);
    tensor_core_gather_kernel::launch(
        context.client(),
        context.grid(OPERATION, blocks, 1)?,
        plan.cube(),
        load_lanes(context.caps(), &[gather.channels_in, second_channels]),
        load_lanes(context.caps(), &[gather.channels_out]),
        gather.input.buffer().arg(),
        second.buffer().arg(),
        gather.weights.arg(),
        gather.bias.unwrap_or(gather.weights).arg(),
        gather.output.arg(),
        moments.arg(),
        gather.shape(1),
        plan,
        gather.second.is_some(),
        gather.bias.is_some(),
        gather.epilogue.take() == Take::Moments,
        gather.input.buffer().dtype().elem(),
    );
    context.launched();
    Ok(())
}
