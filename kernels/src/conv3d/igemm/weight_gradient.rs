//! The matrix product of the gradient of the weights: rows are channels of the strided tensor, columns those of the dense
//! one, and the sums run over output voxels, apart for every tap (see [`WeightGradient`]).
//!
//! Sums over millions of voxels are split, so that there are enough cubes; each split writes a part of its own, and the
//! parts are added in a fixed order.

use super::plan::{BlockPlan, NO_TENSOR_CORES, load_lanes};
use super::product::{OUTSIDE, multiply, plane_place, zero_sums};
use crate::conv3d::axes::{Axes, axes};
use crate::conv3d::gather::{WEIGHT_GRADIENT, WeightGradient};
use crate::conv3d::parts::add_parts;
use crate::conv3d::patch::place;
use crate::{Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// Cubes that keep a GPU busy, and voxels that are worth a part of their own.
const CUBES: usize = 1024;
const VOXELS_OF_A_PART: usize = 4096;

#[derive(CubeType, CubeLaunch)]
struct ProductNumbers {
    rows: usize,
    columns: usize,
    input: Axes,
    output: Axes,
    taps: Axes,
    step: Axes,
    pad: Axes,
    /// Output voxels of all samples, and of a split.
    voxels: usize,
    voxels_each: usize,
    splits: usize,
}

/// One cube computes one block of one tap, over the voxels of one split. `parts` is `[split, tap, row, column]`.
#[cube(launch)]
fn tensor_core_weight_gradient_kernel<E: Float, A: Size, B: Size>(
    strided: &[Vector<E, A>],
    dense: &[Vector<E, B>],
    parts: &mut [f32],
    s: ProductNumbers,
    #[comptime] plan: BlockPlan,
    #[define(E)] _dtype: ElemType,
) {
    let row_blocks = s.rows.div_ceil(comptime!(plan.rows()));
    let column_blocks = s.columns.div_ceil(comptime!(plan.columns()));
    let taps = s.taps.depth * s.taps.height * s.taps.width;
    if CUBE_POS >= s.splits * taps * row_blocks * column_blocks {
        terminate!();
    }
    let first_column = CUBE_POS % column_blocks * comptime!(plan.columns());
    let rest = CUBE_POS / column_blocks;
    let first_row = rest % row_blocks * comptime!(plan.rows());
    let rest = rest / row_blocks;
    let tap = rest % taps;
    let split = rest / taps;
    let low = (split * s.voxels_each).min(s.voxels);
    let high = (low + s.voxels_each).min(s.voxels);

    let a_lanes = A::value();
    let b_lanes = B::value();
    let mut left = Shared::<[Vector<E, A>]>::new_aligned_slice(comptime!(plan.left_len(true) / a_lanes), 32usize);
    let mut right = Shared::<[Vector<E, B>]>::new_aligned_slice(comptime!(plan.right_len() / b_lanes), 32usize);
    let mut staging = Shared::<[f32]>::new_aligned_slice(comptime!(plan.staging_len()), 32usize);
    let mut positions = Shared::<[u32]>::new_slice(plan.depth);
    let sums = zero_sums(plan);

    let mut voxel = low;
    while voxel < high {
        find_voxels(&mut positions, &s, tap, voxel, high, plan);
        // All units load voxels that others have looked for.
        sync_cube();
        load_strided::<E, A>(&mut left, strided, &positions, first_row, s.rows, plan);
        load_dense::<E, B>(&mut right, dense, &positions, voxel, first_column, s.columns, plan);
        // The factors are complete before anybody multiplies, and used before anybody overwrites them.
        sync_cube();
        multiply(&sums, &left, &right, plan, true);
        sync_cube();
        voxel += plan.depth;
    }
    store_part(&sums, &mut staging, parts, &s, split * taps + tap, first_row, first_column, plan);
}

/// The strided voxel that each of `plan.depth` output voxels from `voxel` on meets under a tap.
#[cube]
fn find_voxels(
    positions: &mut [u32],
    s: &ProductNumbers,
    tap: usize,
    voxel: usize,
    high: usize,
    #[comptime] plan: BlockPlan,
) {
    let tw = tap % s.taps.width;
    let th = tap / s.taps.width % s.taps.height;
    let td = tap / s.taps.width / s.taps.height;
    let mut row = UNIT_POS as usize;
    while row < plan.depth {
        let (n, od, oh, ow) = place(voxel + row, &s.output);
        // Counted from the first padded one.
        let id = od * s.step.depth + td;
        let ih = oh * s.step.height + th;
        let iw = ow * s.step.width + tw;
        let inside = voxel + row < high
            && id >= s.pad.depth
            && id < s.input.depth + s.pad.depth
            && ih >= s.pad.height
            && ih < s.input.height + s.pad.height
            && iw >= s.pad.width
            && iw < s.input.width + s.pad.width;
        let plane = n * s.input.depth + id - s.pad.depth;
        let position = (plane * s.input.height + ih - s.pad.height) * s.input.width + iw - s.pad.width;
        positions[row] = select(inside, position as u32, OUTSIDE);
        row += comptime!(plan.units());
    }
}

/// Loads the block's rows, channels of the strided tensor, of every voxel. A voxel outside counts as zero in both factors.
#[cube]
fn load_strided<E: Float, A: Size>(
    left: &mut [Vector<E, A>],
    strided: &[Vector<E, A>],
    positions: &[u32],
    first_row: usize,
    rows: usize,
    #[comptime] plan: BlockPlan,
) {
    let lanes = A::value();
    let vectors = comptime!(plan.rows() / lanes);
    let stride = comptime!(plan.left_stride(true) / lanes);
    let mut slot = UNIT_POS as usize;
    while slot < comptime!(plan.depth * vectors) {
        let position = positions[slot / vectors];
        let channel = first_row + slot % vectors * lanes;
        let mut value = Vector::<E, A>::zeroed();
        if position != OUTSIDE && channel < rows {
            value = strided[(position as usize * rows + channel) / lanes];
        }
        left[slot / vectors * stride + slot % vectors] = value;
        slot += comptime!(plan.units());
    }
}

/// Loads the block's columns, channels of the dense tensor, of every voxel from `voxel` on.
#[cube]
fn load_dense<E: Float, B: Size>(
    right: &mut [Vector<E, B>],
    dense: &[Vector<E, B>],
    positions: &[u32],
    voxel: usize,
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
        let channel = first_column + slot % vectors * lanes;
        let mut value = Vector::<E, B>::zeroed();
        if positions[row] != OUTSIDE && channel < columns {
            value = dense[((voxel + row) * columns + channel) / lanes];
        }
        right[row * stride + slot % vectors] = value;
        slot += comptime!(plan.units());
    }
}

/// Stores the block's sums as those of number `tap` of all splits' taps. They lie in the tensor cores' own order; through shared
/// memory they come into the gradient's.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn store_part(
    sums: &Sequence<cmma::Matrix<f32>>,
    staging: &mut [f32],
    parts: &mut [f32],
    s: &ProductNumbers,
    tap: usize,
    first_row: usize,
    first_column: usize,
    #[comptime] plan: BlockPlan,
) {
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
                    parts[(tap * s.rows + row) * s.columns + column] = staging[plane * area + e];
                }
                e += comptime!(plan.plane);
            }
            sync_cube();
        }
    }
}

/// Launches the kernel, and the sum over splits.
pub(crate) fn launch(context: &Context, gradient: &WeightGradient) -> Result<(), KernelError> {
    let (rows, columns) = (gradient.rows, gradient.columns);
    let plan = BlockPlan::weights(context.caps(), gradient.dense.dtype(), rows, columns).ok_or(NO_TENSOR_CORES)?;
    let voxels = gradient.batch * gradient.out_dims.iter().product::<usize>();
    let taps: usize = gradient.taps.iter().product();
    let blocks = taps * rows.div_ceil(plan.rows()) * columns.div_ceil(plan.columns());
    let splits = CUBES.div_ceil(blocks).min(voxels.div_ceil(VOXELS_OF_A_PART)).max(1);
    let voxels_each = voxels.div_ceil(splits).next_multiple_of(plan.depth);
    let parts = context.empty(splits * taps * rows * columns, Dtype::F32)?;
    let work = Work::Cubes(blocks * splits, plan.cube()).of_flops(gradient.flops());
    context.launch(WEIGHT_GRADIENT, work, |client, count, dim| {
        let numbers = ProductNumbersLaunch::new(
            rows,
            columns,
            axes(gradient.in_dims),
            axes(gradient.out_dims),
            axes(gradient.taps),
            axes(gradient.step),
            axes(gradient.pad),
            voxels,
            voxels_each,
            splits,
        );
        tensor_core_weight_gradient_kernel::launch(
            client,
            count,
            dim,
            load_lanes(context.caps(), &[rows]),
            load_lanes(context.caps(), &[columns]),
            gradient.strided.arg(),
            gradient.dense.arg(),
            parts.arg(),
            numbers,
            plan,
            gradient.dense.dtype().elem(),
        );
    })?;
    add_parts(context, gradient, &parts, splits)
}
