//! The matrix product of the gradient of the weights: rows are channels of the strided tensor, columns those of the dense
//! one, and the sums run over output voxels, apart for every tap (see [`WeightGradient`]).
//!
//! Sums over millions of voxels are split, so that there are enough cubes; each split writes a part of its own, and the
//! parts are added in a fixed order.

use super::{
    CHANNELS_BY_CHANNELS, OUTSIDE, Plan, SKEW, load_lanes, load_vector, multiply, place, plane_place, zero_sums,
};
use crate::conv3d::weight_gradient::{OPERATION, WeightGradient};
use crate::instance_norm::epilogue::{Epilogue, slope_of};
use crate::instance_norm::prologue::{Load, coefficients_at};
use crate::{Buffer, Caps, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// Cubes that keep a GPU busy, and voxels that are worth a part of their own.
const CUBES: usize = 1024;
const VOXELS_OF_A_PART: usize = 4096;

#[derive(CubeType, CubeLaunch)]
struct Shape {
    rows: usize,
    columns: usize,
    in_depth: usize,
    in_height: usize,
    in_width: usize,
    out_depth: usize,
    out_height: usize,
    out_width: usize,
    taps_depth: usize,
    taps_height: usize,
    taps_width: usize,
    step_depth: usize,
    step_height: usize,
    step_width: usize,
    pad_depth: usize,
    pad_height: usize,
    pad_width: usize,
    /// Output voxels of a group, which is one sample, or all samples where nothing has to be normalised.
    voxels: usize,
    /// Output voxels of a split, the splits of a group, and of all groups.
    voxels_each: usize,
    splits_each: usize,
    splits: usize,
}

/// One cube computes one block of one tap, over the voxels of one split. `parts` is `[split, tap, row, column]`, and `raw` what
/// the norm read whose gradient the dense tensor is loaded through.
#[cube(launch)]
fn tensor_core_weight_gradient_kernel<E: Float, A: Size, B: Size>(
    strided: &[Vector<E, A>],
    dense: &[Vector<E, B>],
    raw: &[Vector<E, B>],
    strided_norm: &[Vector<f32, A>],
    dense_norm: &[Vector<f32, B>],
    parts: &mut [f32],
    slope: f32,
    s: Shape,
    #[comptime] plan: Plan,
    #[comptime] strided_load: Load,
    #[comptime] dense_load: Load,
    #[define(E)] _dtype: ElemType,
) {
    let row_blocks = s.rows.div_ceil(comptime!(plan.rows()));
    let column_blocks = s.columns.div_ceil(comptime!(plan.columns()));
    let taps = s.taps_depth * s.taps_height * s.taps_width;
    if CUBE_POS >= s.splits * taps * row_blocks * column_blocks {
        terminate!();
    }
    let first_column = CUBE_POS % column_blocks * comptime!(plan.columns());
    let rest = CUBE_POS / column_blocks;
    let first_row = rest % row_blocks * comptime!(plan.rows());
    let rest = rest / row_blocks;
    let tap = rest % taps;
    let split = rest / taps;
    let tw = tap % s.taps_width;
    let th = tap / s.taps_width % s.taps_height;
    let td = tap / s.taps_width / s.taps_height;
    let group = split / s.splits_each;
    let low = group * s.voxels + (split % s.splits_each * s.voxels_each).min(s.voxels);
    let high = (low + s.voxels_each).min((group + 1) * s.voxels);

    let unit = UNIT_POS as usize;
    let units = comptime!(plan.units());
    let a_lanes = A::value();
    let b_lanes = B::value();
    let left_vectors = comptime!(plan.rows() / a_lanes);
    let left_stride = comptime!(plan.left_stride(true) / a_lanes);
    let right_vectors = comptime!(plan.columns() / b_lanes);
    let right_stride = comptime!(plan.right_stride() / b_lanes);
    let mut left = Shared::<[Vector<E, A>]>::new_aligned_slice(comptime!(plan.left_len(true) / a_lanes), 32usize);
    let mut right = Shared::<[Vector<E, B>]>::new_aligned_slice(comptime!(plan.right_len() / b_lanes), 32usize);
    let mut staging = Shared::<[f32]>::new_aligned_slice(comptime!(plan.staging_len()), 32usize);
    let mut positions = Shared::<[u32]>::new_slice(plan.depth);
    let sums = zero_sums(plan);

    // A unit loads the same channels of every voxel. Those behind the last are not loaded.
    let row_vectors = s.rows / a_lanes;
    let of_unit = (first_row / a_lanes + unit % left_vectors).min(row_vectors - 1);
    let strided_norm = coefficients_at::<A>(strided_norm, group, row_vectors, of_unit, strided_load);
    let column_vectors = s.columns / b_lanes;
    let of_unit = (first_column / b_lanes + unit % right_vectors).min(column_vectors - 1);
    let dense_norm = coefficients_at::<B>(dense_norm, group, column_vectors, of_unit, dense_load);

    let mut voxel = low;
    while voxel < high {
        // The strided voxel that each of these output voxels meets under this tap, counted from the first padded one.
        let mut row = unit;
        while row < plan.depth {
            let (n, od, oh, ow) = place(voxel + row, s.out_depth, s.out_height, s.out_width);
            let id = od * s.step_depth + td;
            let ih = oh * s.step_height + th;
            let iw = ow * s.step_width + tw;
            let inside = voxel + row < high
                && id >= s.pad_depth
                && id < s.in_depth + s.pad_depth
                && ih >= s.pad_height
                && ih < s.in_height + s.pad_height
                && iw >= s.pad_width
                && iw < s.in_width + s.pad_width;
            let plane = n * s.in_depth + id - s.pad_depth;
            let position = (plane * s.in_height + ih - s.pad_height) * s.in_width + iw - s.pad_width;
            positions[row] = select(inside, position as u32, OUTSIDE);
            row += units;
        }
        sync_cube();

        // A voxel outside counts as zero in both factors.
        let mut slot = unit;
        while slot < comptime!(plan.depth * left_vectors) {
            let position = positions[slot / left_vectors];
            let channel = first_row + slot % left_vectors * a_lanes;
            let mut value = Vector::<E, A>::zeroed();
            if position != OUTSIDE && channel < s.rows {
                let at = (position as usize * s.rows + channel) / a_lanes;
                value = load_vector::<E, A>(strided, strided, at, &strided_norm, slope, strided_load);
            }
            left[slot / left_vectors * left_stride + slot % left_vectors] = value;
            slot += units;
        }
        let mut slot = unit;
        while slot < comptime!(plan.depth * right_vectors) {
            let row = slot / right_vectors;
            let channel = first_column + slot % right_vectors * b_lanes;
            let mut value = Vector::<E, B>::zeroed();
            if positions[row] != OUTSIDE && channel < s.columns {
                let at = ((voxel + row) * s.columns + channel) / b_lanes;
                value = load_vector::<E, B>(dense, raw, at, &dense_norm, slope, dense_load);
            }
            right[row * right_stride + slot % right_vectors] = value;
            slot += units;
        }
        sync_cube();
        multiply(&sums, &left, &right, plan, true);
        sync_cube();
        voxel += plan.depth;
    }

    let plane = UNIT_POS_Y as usize;
    let (plane_row, plane_column) = plane_place(plan);
    #[unroll]
    for i in 0..comptime!(plan.fragments[0]) {
        #[unroll]
        for j in 0..comptime!(plan.fragments[1]) {
            let area = comptime!(plan.m * plan.n);
            cmma::store(
                &mut staging[plane * area..plane * area + area],
                &sums[comptime!(i * plan.fragments[1] + j)],
                comptime!(plan.n as u32),
                cmma::MatrixLayout::RowMajor,
            );
            sync_cube();
            let mut e = UNIT_POS_X as usize;
            while e < area {
                let row = first_row + (plane_row * plan.fragments[0] + i) * plan.m + e / plan.n;
                let column = first_column + (plane_column * plan.fragments[1] + j) * plan.n + e % plan.n;
                if row < s.rows && column < s.columns {
                    parts[((split * taps + tap) * s.rows + row) * s.columns + column] = staging[plane * area + e];
                }
                e += comptime!(plan.plane);
            }
            sync_cube();
        }
    }
}

/// Whether the kernel can normalise the channels of both tensors while it loads them: where units keep to their channels.
pub(crate) fn loads(caps: &Caps, dtype: Dtype, rows: usize, columns: usize) -> bool {
    let plan = Plan::choose(caps, dtype, CHANNELS_BY_CHANNELS, rows, usize::MAX, columns);
    plan.is_some_and(|plan| {
        plan.keeps_channels(plan.rows(), load_lanes(caps, &[rows]))
            && plan.keeps_channels(plan.columns(), load_lanes(caps, &[columns]))
    })
}

/// Launches the kernel; returns the parts and their number.
pub(crate) fn launch(gradient: &WeightGradient, plan: Plan, context: &Context) -> Result<(Buffer, usize), KernelError> {
    let operands = [gradient.strided, gradient.dense];
    // A unit that normalises does so for one sample.
    let groups = match operands.iter().any(|operand| operand.load() != Load::Stored) {
        true => gradient.batch,
        false => 1,
    };
    let voxels = gradient.batch / groups.max(1) * gradient.out_dims.iter().product::<usize>();
    let taps: usize = gradient.taps.iter().product();
    let blocks = taps * gradient.rows.div_ceil(plan.rows()) * gradient.columns.div_ceil(plan.columns());
    let splits_each = CUBES.div_ceil(blocks * groups.max(1)).min(voxels.div_ceil(VOXELS_OF_A_PART)).max(1);
    let voxels_each = voxels.div_ceil(splits_each).next_multiple_of(plan.depth);
    let splits = groups * splits_each;
    let part = taps * gradient.rows * gradient.columns;
    let parts = context.empty(splits * part, Dtype::F32)?;
    let ([id, ih, iw], [od, oh, ow]) = (gradient.in_dims, gradient.out_dims);
    let ([td, th, tw], [sd, sh, sw], [pd, ph, pw]) = (gradient.taps, gradient.step, gradient.pad);
    let (rows, columns) = (gradient.rows, gradient.columns);
    let shape = ShapeLaunch::new(
        rows,
        columns,
        id,
        ih,
        iw,
        od,
        oh,
        ow,
        td,
        th,
        tw,
        sd,
        sh,
        sw,
        pd,
        ph,
        pw,
        voxels,
        voxels_each,
        splits_each,
        splits,
    );
    let nothing = context.empty(SKEW, Dtype::F32)?;
    let [strided_norm, dense_norm] =
        operands.map(|operand| operand.coefficients().map_or(&nothing, |by| &by.values).arg());
    let slope = slope_of(OPERATION, [Some(&gradient.strided), Some(&gradient.dense), None], &Epilogue::Nothing)?;
    context.launch(OPERATION, Work::Cubes(blocks * splits, plan.cube()), |client, count, dim| {
        tensor_core_weight_gradient_kernel::launch(
            client,
            count,
            dim,
            load_lanes(context.caps(), &[gradient.rows]),
            load_lanes(context.caps(), &[gradient.columns]),
            gradient.strided.buffer().arg(),
            gradient.dense.buffer().arg(),
            gradient.dense.raw().arg(),
            strided_norm,
            dense_norm,
            parts.arg(),
            slope,
            shape,
            plan,
            gradient.strided.load(),
            gradient.dense.load(),
            gradient.dense.buffer().dtype().elem(),
        )
    })?;
    Ok((parts, splits))
}
