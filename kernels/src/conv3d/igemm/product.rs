//! Products of factors in shared memory.

use super::plan::BlockPlan;
use cubecl::prelude::*;

/// The position of a voxel that lies outside.
pub(super) const OUTSIDE: u32 = u32::MAX;

/// All sums of a plane, at zero: fragment `[i, j]` at `i * fragments[1] + j`.
#[cube]
pub(super) fn zero_sums(#[comptime] plan: BlockPlan) -> Sequence<cmma::Matrix<f32>> {
    let mut sums = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(plan.fragments[0] * plan.fragments[1]) {
        sums.push(cmma::Matrix::<f32>::from_value(
            cmma::MatrixIdent::Accumulator,
            plan.m,
            plan.n,
            plan.k,
            cmma::MatrixLayout::Undefined,
            0.0f32,
        ));
    }
    sums
}

/// Adds the products of the factors in shared memory to this plane's sums. The left factor is `[rows, depth]`, or
/// transposed `[depth, rows]`; the right one `[depth, columns]`.
#[cube]
pub(super) fn multiply<E: Float, A: Size, B: Size>(
    sums: &Sequence<cmma::Matrix<f32>>,
    left: &[Vector<E, A>],
    right: &[Vector<E, B>],
    #[comptime] plan: BlockPlan,
    #[comptime] transposed: bool,
) {
    let a_lanes = A::value();
    let b_lanes = B::value();
    let (plane_row, plane_column) = plane_place(plan);
    let first_row = plane_row * comptime!(plan.fragments[0] * plan.m);
    let first_column = plane_column * comptime!(plan.fragments[1] * plan.n);
    let left_stride = comptime!(plan.left_stride(transposed));
    let right_stride = comptime!(plan.right_stride());
    let layout = if comptime!(transposed) { cmma::MatrixLayout::ColMajor } else { cmma::MatrixLayout::RowMajor };
    #[unroll]
    for step in 0..comptime!(plan.depth / plan.k) {
        let mut b = Sequence::<cmma::Matrix<Vector<E, B>>>::new();
        #[unroll]
        for j in 0..comptime!(plan.fragments[1]) {
            let from = (first_column + comptime!(step * plan.k * right_stride + j * plan.n)) / b_lanes;
            let length = comptime!(((plan.k - 1) * right_stride + plan.n) / b_lanes);
            b.push(cmma::Matrix::<Vector<E, B>>::from_slice(
                cmma::MatrixIdent::B,
                plan.m,
                plan.n,
                plan.k,
                cmma::MatrixLayout::RowMajor,
                &right[from..from + length],
                comptime!(right_stride as u32),
            ));
        }
        #[unroll]
        for i in 0..comptime!(plan.fragments[0]) {
            let row = first_row + comptime!(i * plan.m);
            let depth = comptime!(step * plan.k);
            let from = if comptime!(transposed) {
                (row + comptime!(depth * left_stride)) / a_lanes
            } else {
                (row * left_stride + depth) / a_lanes
            };
            let rows = comptime!(if transposed { plan.k } else { plan.m });
            let length = comptime!(((rows - 1) * left_stride + plan.m + plan.k - rows) / a_lanes);
            let a = cmma::Matrix::<Vector<E, A>>::from_slice(
                cmma::MatrixIdent::A,
                plan.m,
                plan.n,
                plan.k,
                layout,
                &left[from..from + length],
                comptime!(left_stride as u32),
            );
            #[unroll]
            for j in 0..comptime!(plan.fragments[1]) {
                let sum = &sums[comptime!(i * plan.fragments[1] + j)];
                cmma::execute(&a, &b[j], sum, sum);
            }
        }
    }
}

/// Row and column of this plane in its cube's block.
#[cube]
pub(super) fn plane_place(#[comptime] plan: BlockPlan) -> (usize, usize) {
    let plane = UNIT_POS_Y as usize;
    (plane / comptime!(plan.planes[1]), plane % comptime!(plan.planes[1]))
}
