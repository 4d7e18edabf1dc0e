//! The matrix product of everything that gathers (see [`Gather`]): rows are output voxels, columns output channels, and
//! the sums run over inputs, taps and channels, in the order of the packed weights.

use super::plan::{BlockPlan, NO_TENSOR_CORES, SKEW, load_lanes};
use super::product::{OUTSIDE, multiply, plane_place, zero_sums};
use crate::conv3d::gather::{Form, GATHER, Gather, GatherNumbers, Walk};
use crate::conv3d::patch::{Corners, Rows, corners, output_position, rows_of_block, tap_of, under};
use crate::instance_norm::epilogue::{Merged, RSTD, Take, coefficients_at, gradient_terms, merge};
use crate::{Buffer, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// One cube computes one block. Blocks of the same voxels follow each other, so that their input stays in the cache. Where
/// something is taken of the outputs, the voxels of a block are of one sample, and the block is a part of it.
///
/// `norm_of_output` and `raw_output` serve the sums of the norm whose output the gradient `y` belongs to; their vectors have
/// one element.
#[cube(launch)]
fn tensor_core_gather_kernel<E: Float, A: Size, B: Size, O: Size>(
    x: &[Vector<E, A>],
    second: &[Vector<E, A>],
    weights: &[Vector<E, B>],
    bias: &[f32],
    y: &mut [E],
    raw_output: &[Vector<E, O>],
    norm_of_output: &[Vector<f32, O>],
    parts: &mut [f32],
    s: GatherNumbers,
    #[comptime] plan: BlockPlan,
    #[comptime] form: Form,
    #[define(E)] _dtype: ElemType,
) {
    let column_blocks = s.channels_out.div_ceil(comptime!(plan.columns()));
    let row_block = CUBE_POS / column_blocks;
    let rows = rows_of_block(row_block, &s, comptime!(plan.rows()), comptime!(form.by_sample()));
    if rows.first >= s.batch * s.count.depth * s.count.height * s.count.width {
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
    let corners = corners(&s, rows.first, rows.end, comptime!(plan.rows().div_ceil(plan.units())), plan.units());

    add_input::<E, A, B>(
        &sums,
        x,
        weights,
        &mut left,
        &mut right,
        &mut positions,
        &corners,
        &s,
        s.channels,
        0usize,
        first_column,
        plan,
    );
    if comptime!(form.second_input) {
        add_input::<E, A, B>(
            &sums,
            second,
            weights,
            &mut left,
            &mut right,
            &mut positions,
            &corners,
            &s,
            s.second_channels,
            s.taps.depth * s.taps.height * s.taps.width * s.channels,
            first_column,
            plan,
        );
    }

    // Where the block's voxels lie in the output. The place of the input's positions serves again: behind the last product's
    // barrier nobody reads those.
    let mut row = UNIT_POS as usize;
    while row < comptime!(plan.rows()) {
        let position = output_position(rows.first + row, &s);
        positions[row] = select(rows.first + row < rows.end, position as u32, OUTSIDE);
        row += comptime!(plan.units());
    }
    #[unroll]
    for j in 0..comptime!(plan.fragments[1]) {
        store_columns::<E, O>(
            &sums,
            &mut staging,
            &positions,
            bias,
            y,
            raw_output,
            norm_of_output,
            parts,
            &s,
            &rows,
            row_block,
            first_column,
            j,
            plan,
            form,
        );
    }
}

/// Adds the products of one input of `channels` channels, whose weights begin at row `first_weight`, to the sums.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn add_input<E: Float, A: Size, B: Size>(
    sums: &Sequence<cmma::Matrix<f32>>,
    x: &[Vector<E, A>],
    weights: &[Vector<E, B>],
    left: &mut [Vector<E, A>],
    right: &mut [Vector<E, B>],
    positions: &mut [u32],
    corners: &Corners,
    s: &GatherNumbers,
    channels: usize,
    first_weight: usize,
    first_column: usize,
    #[comptime] plan: BlockPlan,
) {
    for tap in 0..s.taps.depth * s.taps.height * s.taps.width {
        find_voxels(positions, corners, s, tap, plan);
        // All units load voxels that others have looked for.
        sync_cube();

        let mut channel = 0usize.runtime();
        while channel < channels {
            load_patch::<E, A>(left, x, &*positions, channels, channel, plan);
            let first_row = first_weight + tap * channels + channel;
            load_weights::<E, B>(right, weights, first_row, channels - channel, first_column, s.channels_out, plan);
            // The factors are complete before anybody multiplies, and used before anybody overwrites them.
            sync_cube();

            multiply(sums, &*left, &*right, plan, false);
            sync_cube();
            channel += comptime!(plan.depth);
        }
    }
}

/// The input voxel of each of the block's rows under one tap.
#[cube]
fn find_voxels(positions: &mut [u32], corners: &Corners, s: &GatherNumbers, tap: usize, #[comptime] plan: BlockPlan) {
    let tap = tap_of(tap, s);
    #[unroll]
    for i in 0..comptime!(plan.rows().div_ceil(plan.units())) {
        let row = UNIT_POS as usize + comptime!(i * plan.units());
        let (inside, position) = under(&tap, corners, i);
        if row < comptime!(plan.rows()) {
            positions[row] = select(inside, position, OUTSIDE);
        }
    }
}

/// Loads `plan.depth` channels from `channel` on of every row's voxel: neighbouring units take neighbouring vectors of a voxel,
/// which are whole sectors of memory. What lies outside, and channels behind the last, are zero.
#[cube]
fn load_patch<E: Float, A: Size>(
    left: &mut [Vector<E, A>],
    x: &[Vector<E, A>],
    positions: &[u32],
    channels: usize,
    channel: usize,
    #[comptime] plan: BlockPlan,
) {
    let lanes = A::value();
    let vectors = comptime!(plan.depth / lanes);
    let stride = comptime!(plan.left_stride(false) / lanes);
    let mut slot = UNIT_POS as usize;
    while slot < comptime!(plan.rows() * vectors) {
        let row = slot / vectors;
        let v = slot % vectors;
        let c = channel + v * lanes;
        let position = positions[row];
        let mut value = Vector::<E, A>::zeroed();
        if position != OUTSIDE && c < channels {
            value = x[(position as usize * channels + c) / lanes];
        }
        left[row * stride + v] = value;
        slot += comptime!(plan.units());
    }
}

/// Loads `plan.depth` rows of weights from `first_row` on, of which `rows` there are, and the block's columns.
#[cube]
fn load_weights<E: Float, B: Size>(
    right: &mut [Vector<E, B>],
    weights: &[Vector<E, B>],
    first_row: usize,
    rows: usize,
    first_column: usize,
    columns: usize,
    #[comptime] plan: BlockPlan,
) {
    let lanes = B::value();
    let vectors = comptime!(plan.columns() / lanes);
    let stride = comptime!(plan.right_stride() / lanes);
    let mut slot = UNIT_POS as usize;
    while slot < comptime!(plan.depth * vectors) {
        let row = slot / vectors;
        let v = slot % vectors;
        let column = first_column + v * lanes;
        let mut value = Vector::<E, B>::zeroed();
        if row < rows && column < columns {
            value = weights[((first_row + row) * columns + column) / lanes];
        }
        right[row * stride + v] = value;
        slot += comptime!(plan.units());
    }
}

/// Stores a plane's products number `j` along the columns, and takes what there is to take of them. The sums lie in the tensor
/// cores' own order; through shared memory they come into the output's.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
#[allow(clippy::collapsible_if, reason = "the outer condition is decided when the kernel is compiled")]
fn store_columns<E: Float, O: Size>(
    sums: &Sequence<cmma::Matrix<f32>>,
    staging: &mut [f32],
    positions: &[u32],
    bias: &[f32],
    y: &mut [E],
    raw_output: &[Vector<E, O>],
    norm_of_output: &[Vector<f32, O>],
    parts: &mut [f32],
    s: &GatherNumbers,
    rows: &Rows,
    row_block: usize,
    first_column: usize,
    #[comptime] j: usize,
    #[comptime] plan: BlockPlan,
    #[comptime] form: Form,
) {
    let plane = UNIT_POS_Y as usize;
    let (plane_row, plane_column) = plane_place(plan);
    let area = comptime!(plan.m * plan.n);
    let first_of_plane = first_column + (plane_column * plan.fragments[1] + j) * plan.n;
    // Of the rows of one column that this unit stores.
    let mut moments = Merged { mean: 0.0f32.runtime(), square: 0.0f32.runtime(), count: 0.0f32.runtime() };
    let mut sum_dz = Vector::<f32, O>::zeroed();
    let mut sum_by_centred = Vector::<f32, O>::zeroed();
    let of_unit = (first_of_plane + UNIT_POS_X as usize % plan.n).min(s.channels_out - 1);
    let norm = coefficients_at::<O>(norm_of_output, rows.sample, s.channels_out, of_unit, form.take);
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
                    let (dz, by_centred) = gradient_terms::<O>(gradient, raw, &norm, Vector::new(s.slope));
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
        // The next product takes the same place.
        sync_cube();
    }
    if comptime!(form.take != Take::Nothing) {
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
        let rstd = norm[RSTD].extract(0usize);
        merge_columns(&*staging, parts, s, row_block, first_of_plane, rstd, plan, form.take);
        sync_cube();
    }
}

/// Merges what the units have put into `staging`, and stores it as the block's part. Units of a plane at a distance of `n` have
/// the same column, and so have planes of other rows.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn merge_columns(
    staging: &[f32],
    parts: &mut [f32],
    s: &GatherNumbers,
    row_block: usize,
    first_of_plane: usize,
    rstd: f32,
    #[comptime] plan: BlockPlan,
    #[comptime] take: Take,
) {
    let (plane_row, plane_column) = plane_place(plan);
    let third = comptime!(plan.units());
    let lane = UNIT_POS_X as usize;
    if plane_row == 0 && lane < plan.n && first_of_plane + lane < s.channels_out {
        let mut merged = Merged { mean: 0.0f32.runtime(), square: 0.0f32.runtime(), count: 0.0f32.runtime() };
        let mut dz = 0.0f32.runtime();
        let mut by_centred = 0.0f32.runtime();
        for row in 0..comptime!(plan.planes[0]) {
            let first = (row * plan.planes[1] + plane_column) * plan.plane;
            for other in range_stepped(lane, plan.plane, plan.n) {
                let from = first + other;
                if comptime!(take == Take::Moments) {
                    merge(&mut merged, staging[from], staging[third + from], staging[2 * third + from]);
                } else {
                    dz += staging[from];
                    by_centred += staging[third + from];
                }
            }
        }
        let to = row_block * comptime!(take.rows()) * s.channels_out + first_of_plane + lane;
        if comptime!(take == Take::Moments) {
            parts[to] = merged.mean;
            parts[to + s.channels_out] = 0.0f32;
            parts[to + 2 * s.channels_out] = merged.square;
            parts[to + 3 * s.channels_out] = merged.count;
        } else {
            parts[to] = dz;
            parts[to + s.channels_out] = by_centred * rstd;
        }
    }
}

/// Launches the kernel.
pub(crate) fn launch(context: &Context, gather: &Gather, weights: &Buffer) -> Result<(), KernelError> {
    let caps = context.caps();
    let plan = BlockPlan::of(gather, caps).ok_or(NO_TENSOR_CORES)?;
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
    let nothing = context.empty(SKEW, Dtype::F32)?;
    let [parts, raw_output, norm_of_output] = gather.epilogue.buffers(&nothing);
    let work = Work::Cubes(blocks, plan.cube()).of_flops(gather.flops());
    context.launch(GATHER, work, |client, count, dim| {
        tensor_core_gather_kernel::launch(
            client,
            count,
            dim,
            load_lanes(caps, &gather.gathered()),
            load_lanes(caps, &[gather.channels_out]),
            1,
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
