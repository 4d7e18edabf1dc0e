//! Average pooling whose window is its stride (1 or 2 per axis), as nnU-Net's residual encoder reduces the skip of a strided
//! block: `torch.nn.AvgPool3d(stride, stride)`.
//!
//! ```text
//! y[o]  = mean over positions k inside the stride of x[o * stride + k]
//! dx[i] = dy[i / stride] / (positions inside the stride)
//! ```
//!
//! What an extent has beyond a multiple of its stride is left out: no output sees it, and its gradient is 0.
//!
//! Activations are `[batch, depth, height, width, channels]` in f32, f16 or bf16; sums are f32 and are rounded once. Each pass
//! reads and writes every element once. A CPU's unit walks whole rows of what it writes, a GPU's unit one vector of it.

use crate::block::strip;
use crate::conv3d::axes::{Axes, axes};
use crate::reduce::check_count;
use crate::{Buffer, Context, KernelError, Work};
use cubecl::prelude::*;

const OPERATION: &str = "average pooling";

/// The shapes of one pooling. Axes are depth, height, width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Problem {
    batch: usize,
    in_dims: [usize; 3],
    channels: usize,
    stride: [usize; 3],
}

impl Problem {
    /// Reduces `[batch, in_dims, channels]` by `stride`.
    ///
    /// # Errors
    /// [`KernelError::Shape`] for a stride other than 1 and 2, or where no output is left.
    pub fn new(batch: usize, in_dims: [usize; 3], channels: usize, stride: [usize; 3]) -> Result<Self, KernelError> {
        if stride.iter().any(|s| ![1, 2].contains(s)) {
            return Err(KernelError::shape(OPERATION, "stride", "1 or 2 along each axis", stride));
        }
        let problem = Self { batch, in_dims, channels, stride };
        if batch == 0 || channels == 0 || problem.out_dims().contains(&0) {
            let shape = (batch, in_dims, channels);
            return Err(KernelError::shape(OPERATION, "shape", "at least the stride, and 1", shape));
        }
        let elements = in_dims.into_iter().chain([channels]).try_fold(batch, usize::checked_mul);
        match elements {
            Some(_) => Ok(problem),
            None => Err(KernelError::shape(OPERATION, "shape", "countable", (batch, in_dims, channels))),
        }
    }

    /// Extent of the output: `input / stride`, rounded down.
    pub fn out_dims(&self) -> [usize; 3] {
        std::array::from_fn(|a| self.in_dims[a] / self.stride[a])
    }

    /// Elements of the input `[batch, depth, height, width, channels]`.
    pub fn input_len(&self) -> usize {
        self.batch * self.in_dims.iter().product::<usize>() * self.channels
    }

    /// Elements of the output `[batch, depth, height, width, channels]`.
    pub fn output_len(&self) -> usize {
        self.batch * self.out_dims().iter().product::<usize>() * self.channels
    }

    fn check(&self, context: &Context, x: &Buffer, y: &Buffer) -> Result<(), KernelError> {
        if !x.dtype().is_float() {
            let actual = x.dtype();
            return Err(KernelError::Dtype { operation: OPERATION, what: "input", expected: "floats", actual });
        }
        x.check(OPERATION, "input or its gradient", self.input_len(), x.dtype())?;
        y.check(OPERATION, "output or its gradient", self.output_len(), x.dtype())?;
        check_count(context, OPERATION, self.input_len())
    }

    /// Over what is written, an array of these extents.
    fn plan(&self, context: &Context, written: [usize; 3]) -> PoolPlan {
        let lanes = context.caps().widest_vector(self.channels);
        let vectors = self.channels / lanes;
        let by_row = context.caps().cores.is_some();
        let rows = self.batch * written[0] * written[1];
        PoolPlan { lanes, vectors, by_row, items: if by_row { rows } else { rows * written[2] * vectors } }
    }
}

/// How a kernel passes over what it writes.
struct PoolPlan {
    /// Elements of a vector, and vectors of a voxel.
    lanes: usize,
    vectors: usize,
    /// Whether an item is a row of voxels, or one vector.
    by_row: bool,
    items: usize,
}

// ------------------------------------------------------------------------------------------------ kernels

/// One row of voxels of `dims`, or the part of it that an item is.
#[derive(CubeType)]
struct Row {
    sample: usize,
    depth: usize,
    height: usize,
    /// Voxels `low .. high`, and of each the vectors `first .. end`.
    low: usize,
    high: usize,
    first: usize,
    end: usize,
}

#[cube]
fn row_of(item: usize, dims: &Axes, vectors: usize, #[comptime] by_row: bool) -> Row {
    let mut row = item;
    let mut low = 0usize;
    let mut high = dims.width;
    let mut first = 0usize;
    let mut end = vectors;
    if comptime!(!by_row) {
        let voxel = item / vectors;
        first = item % vectors;
        end = first + 1;
        low = voxel % dims.width;
        high = low + 1;
        row = voxel / dims.width;
    }
    let slice = row / dims.height;
    Row { sample: slice / dims.depth, depth: slice % dims.depth, height: row % dims.height, low, high, first, end }
}

#[cube(launch_unchecked)]
fn forward_kernel<E: Float, N: Size>(
    x: &[Vector<E, N>],
    y: &mut [Vector<E, N>],
    in_dims: &Axes,
    out_dims: &Axes,
    vectors: usize,
    items: usize,
    #[comptime] stride: [usize; 3],
    #[comptime] by_row: bool,
    #[define(E)] _dtype: ElemType,
) {
    let share = Vector::<f32, N>::new(comptime!(1.0 / stride.iter().product::<usize>() as f32));
    let (low, high) = strip(items);
    for item in low..high {
        let row = row_of(item, out_dims, vectors, by_row);
        let to = ((row.sample * out_dims.depth + row.depth) * out_dims.height + row.height) * out_dims.width;
        for w in row.low..row.high {
            for v in row.first..row.end {
                let mut sum = Vector::<f32, N>::zeroed();
                #[unroll]
                for kd in 0..comptime!(stride[0]) {
                    #[unroll]
                    for kh in 0..comptime!(stride[1]) {
                        let depth = row.sample * in_dims.depth + row.depth * comptime!(stride[0]) + kd;
                        let height = depth * in_dims.height + row.height * comptime!(stride[1]) + kh;
                        let from = height * in_dims.width + w * comptime!(stride[2]);
                        #[unroll]
                        for kw in 0..comptime!(stride[2]) {
                            sum += Vector::cast_from(x[(from + kw) * vectors + v]);
                        }
                    }
                }
                y[(to + w) * vectors + v] = Vector::cast_from(sum * share);
            }
        }
    }
}

#[cube(launch_unchecked)]
fn backward_kernel<E: Float, N: Size>(
    dy: &[Vector<E, N>],
    dx: &mut [Vector<E, N>],
    in_dims: &Axes,
    out_dims: &Axes,
    vectors: usize,
    items: usize,
    #[comptime] stride: [usize; 3],
    #[comptime] by_row: bool,
    #[define(E)] _dtype: ElemType,
) {
    let share = Vector::<f32, N>::new(comptime!(1.0 / stride.iter().product::<usize>() as f32));
    let (low, high) = strip(items);
    for item in low..high {
        let row = row_of(item, in_dims, vectors, by_row);
        let to = ((row.sample * in_dims.depth + row.depth) * in_dims.height + row.height) * in_dims.width;
        let (depth, height) = (row.depth / comptime!(stride[0]), row.height / comptime!(stride[1]));
        let from = ((row.sample * out_dims.depth + depth) * out_dims.height + height) * out_dims.width;
        let is_seen = depth < out_dims.depth && height < out_dims.height;
        for w in row.low..row.high {
            let from_w = w / comptime!(stride[2]);
            for v in row.first..row.end {
                let mut gradient = Vector::<f32, N>::zeroed();
                if is_seen && from_w < out_dims.width {
                    gradient = Vector::<f32, N>::cast_from(dy[(from + from_w) * vectors + v]) * share;
                }
                dx[(to + w) * vectors + v] = Vector::cast_from(gradient);
            }
        }
    }
}

// ----------------------------------------------------------------------------------------------- launches

/// `y = average_pool(x)`. `x`: `[batch, in_dims, channels]`, `y`: `[batch, out_dims, channels]`, of one type.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if a buffer does not fit the problem, [`KernelError::Limit`] beyond the
/// device's index range.
pub fn forward(context: &Context, problem: &Problem, x: &Buffer, y: &Buffer) -> Result<(), KernelError> {
    problem.check(context, x, y)?;
    let plan = problem.plan(context, problem.out_dims());
    context.launch(OPERATION, Work::Items(plan.items), |client, count, dim| {
        // SAFETY: the items cover the elements of `y`, whose windows lie inside of `x`.
        unsafe {
            forward_kernel::launch_unchecked(
                client,
                count,
                dim,
                plan.lanes,
                x.arg(),
                y.arg(),
                axes(problem.in_dims),
                axes(problem.out_dims()),
                plan.vectors,
                plan.items,
                problem.stride,
                plan.by_row,
                x.dtype().elem(),
            )
        }
    })
}

/// The gradient of the input, `dx`: `[batch, in_dims, channels]`, from `dy`: `[batch, out_dims, channels]`.
///
/// # Errors
/// As [`forward`].
pub fn backward(context: &Context, problem: &Problem, dy: &Buffer, dx: &Buffer) -> Result<(), KernelError> {
    problem.check(context, dx, dy)?;
    let plan = problem.plan(context, problem.in_dims);
    context.launch(OPERATION, Work::Items(plan.items), |client, count, dim| {
        // SAFETY: the items cover the elements of `dx`; of `dy` positions inside its extents are read.
        unsafe {
            backward_kernel::launch_unchecked(
                client,
                count,
                dim,
                plan.lanes,
                dy.arg(),
                dx.arg(),
                axes(problem.in_dims),
                axes(problem.out_dims()),
                plan.vectors,
                plan.items,
                problem.stride,
                plan.by_row,
                dx.dtype().elem(),
            )
        }
    })
}
