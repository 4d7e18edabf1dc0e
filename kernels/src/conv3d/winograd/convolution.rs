//! The convolution itself: for each block of tiles the input's points, their products with the weights' points, and the
//! outputs. Serves the forward pass and, with flipped and transposed weights, the gradient of the input.

use super::grid::{
    A, A2, B, B2, Extents, OUTPUTS, PLANE, POINTS, PointsNumbers, PointsNumbersLaunch, WIDE_OUTPUTS, WIDE_POINTS,
    place_of,
};
use super::scratch::Scratch;
use super::take::{NormOfOutput, NormOfOutputLaunch, take_parts};
use super::tiles::{Transfer, Window, transform};
use super::weights::WeightPoints;
use crate::block::strip;
use crate::conv3d::gather::Gather;
use crate::instance_norm::epilogue::{Take, clear_parts};
use crate::{Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

const OPERATION: &str = "winograd convolution";

/// What is compiled into one instance of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct PointsPlan {
    /// Tiles that one product holds in registers.
    rows: usize,
    /// Vectors of output channels that one product holds in registers.
    vectors: usize,
    /// Whether the kernel has three taps along the depth, else one.
    deep: bool,
    /// Whether a second input continues the channels of the first.
    second_input: bool,
    bias: bool,
    /// What is taken of the outputs on their way to memory: a part of every sample for each unit.
    take: Take,
}

/// One unit computes a strip of (group of output channels, block of tiles) pairs, with scratch of its own.
/// `norm_of_output` serves the sums of the norm whose output the gradient `y` belongs to.
#[cube(launch)]
fn convolution_kernel<I: Size, O: Size>(
    x: &[Vector<f32, I>],
    second: &[Vector<f32, I>],
    weights: &[Vector<f32, O>],
    bias: &[Vector<f32, O>],
    y: &mut [Vector<f32, O>],
    input_points: &mut [Vector<f32, I>],
    products: &mut [Vector<f32, O>],
    sums: &mut [Vector<f32, O>],
    parts: &mut [Vector<f32, O>],
    norm_of_output: NormOfOutput<Vector<f32, O>>,
    s: PointsNumbers,
    #[comptime] plan: PointsPlan,
) {
    if comptime!(plan.take != Take::Nothing) {
        clear_parts(parts, ABSOLUTE_POS, s.units, s.batch, comptime!(plan.take.rows()) * s.vectors_out);
    }
    let depth_points = comptime!(if plan.deep { POINTS } else { 1usize });
    let group_vectors = s.vectors_out / s.groups;
    let input_base = ABSOLUTE_POS * PLANE * s.input_stride;
    let product_base = ABSOLUTE_POS * PLANE * s.product_stride;
    let sums_base = ABSOLUTE_POS * s.sums_stride;
    let first = Transfer {
        vectors: s.vectors_first,
        first: 0usize.runtime(),
        count: s.vectors_first,
        base: input_base,
        point_stride: s.input_stride,
        tile_stride: s.vectors_first + s.vectors_second,
    };
    let behind = Transfer {
        vectors: s.vectors_second,
        first: 0usize.runtime(),
        count: s.vectors_second,
        base: input_base + s.vectors_first,
        point_stride: s.input_stride,
        tile_stride: s.vectors_first + s.vectors_second,
    };

    let (low, high) = strip(s.groups * s.blocks);
    for item in low..high {
        let first_vector = item / s.blocks * group_vectors;
        let first_tile = item % s.blocks * s.block;
        let last_tile = (first_tile + s.block).min(s.tiles);
        for depth_point in 0..depth_points {
            transform::<I>(
                x,
                input_points,
                &s.grid,
                depth_point,
                first_tile,
                last_tile,
                &first,
                Window::Input,
                plan.deep,
            );
            if comptime!(plan.second_input) {
                transform::<I>(
                    second,
                    input_points,
                    &s.grid,
                    depth_point,
                    first_tile,
                    last_tile,
                    &behind,
                    Window::Input,
                    plan.deep,
                );
            }
            multiply::<I, O>(
                &*input_points,
                weights,
                products,
                &s,
                input_base,
                product_base,
                depth_point,
                first_vector,
                last_tile - first_tile,
                plan,
            );
            finish::<O>(
                &*products,
                sums,
                bias,
                y,
                parts,
                &norm_of_output,
                &s,
                product_base,
                sums_base,
                depth_point,
                first_vector,
                first_tile,
                last_tile,
                plan,
            );
        }
    }
}

/// At each point of one point along the depth, `[tiles, channels in] x [channels in, channels out of the group]`.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn multiply<I: Size, O: Size>(
    input_points: &[Vector<f32, I>],
    weights: &[Vector<f32, O>],
    products: &mut [Vector<f32, O>],
    s: &PointsNumbers,
    input_base: usize,
    product_base: usize,
    depth_point: usize,
    first_vector: usize,
    tiles: usize,
    #[comptime] plan: PointsPlan,
) {
    let rows = comptime!(plan.rows);
    let vectors = comptime!(plan.vectors);
    let depth_points = comptime!(if plan.deep { POINTS } else { 1usize });
    let scalars = input_points.with_vector_size::<Const<1>>();
    let group_vectors = s.vectors_out / s.groups;
    for point in 0..PLANE {
        let points = (input_base + point * s.input_stride) * I::value();
        for block in 0..group_vectors / vectors {
            let weight_block = first_vector / vectors + block;
            let weight = ((weight_block * depth_points + depth_point) * PLANE + point) * s.weight_stride;
            let to = product_base + point * s.product_stride + block * vectors;
            // The last rows of a block's last product belong to no tile: there is room for them, and nobody reads them.
            for first in range_stepped(0, tiles, rows) {
                let from = points + first * s.channels_in;
                let mut sums = Array::<Vector<f32, O>>::new(comptime!(rows * vectors));
                for c in 0..s.channels_in {
                    #[unroll]
                    for r in 0..rows {
                        let value = scalars[from + r * s.channels_in + c].extract(0usize);
                        #[unroll]
                        for v in 0..vectors {
                            sums[r * vectors + v] =
                                fma(Vector::new(value), weights[weight + c * vectors + v], sums[r * vectors + v]);
                        }
                    }
                }
                #[unroll]
                for r in 0..rows {
                    #[unroll]
                    for v in 0..vectors {
                        products[to + (first + r) * group_vectors + v] = sums[r * vectors + v];
                    }
                }
            }
        }
    }
}

/// From products to outputs: along the width and the height at once; along the depth, the sums of a tile's near outputs
/// are complete after three points, those of its far ones after four.
#[cube]
#[allow(clippy::collapsible_if, reason = "the outer condition is decided when the kernel is compiled")]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn finish<O: Size>(
    products: &[Vector<f32, O>],
    sums: &mut [Vector<f32, O>],
    bias: &[Vector<f32, O>],
    y: &mut [Vector<f32, O>],
    parts: &mut [Vector<f32, O>],
    norm_of_output: &NormOfOutput<Vector<f32, O>>,
    s: &PointsNumbers,
    product_base: usize,
    sums_base: usize,
    depth_point: usize,
    first_vector: usize,
    first_tile: usize,
    last_tile: usize,
    #[comptime] plan: PointsPlan,
) {
    let group_vectors = s.vectors_out / s.groups;
    let mut tile = first_tile;
    while tile < last_tile {
        let first = tile % s.grid.tiles_width;
        let row = tile / s.grid.tiles_width;
        let (n, tile_depth, tile_height) = place_of(row, &s.grid);
        let oh = tile_height * 2;
        let run = (s.grid.tiles_width - first).min(last_tile - tile);
        let mut od = tile_depth;
        let mut complete = true.runtime();
        if comptime!(plan.deep) {
            od = tile_depth * 2 + depth_point - 2;
            complete = depth_point >= 2 && od < s.grid.depth;
        }

        for i in 0..run {
            for vector in 0..group_vectors {
                let in_block = (tile - first_tile + i) * group_vectors + vector;
                let plane = plane_of_outputs::<O>(products, product_base + in_block, s.product_stride);
                let outputs =
                    outputs_of_depth::<O>(&plane, sums, sums_base + in_block * (2 * OUTPUTS), depth_point, plan);
                if complete {
                    let mut bias_here = Vector::<f32, O>::zeroed();
                    if comptime!(plan.bias) {
                        bias_here = bias[first_vector + vector];
                    }
                    let row = (n * s.grid.depth + od) * s.grid.height;
                    store_outputs::<O>(
                        &outputs,
                        bias_here,
                        y,
                        row,
                        oh,
                        (first + i) * WIDE_OUTPUTS,
                        first_vector + vector,
                        s,
                    );
                }
            }
        }
        if comptime!(plan.take != Take::Nothing) {
            if complete {
                let row = ((n * s.grid.depth + od) * s.grid.height + oh) * s.grid.width + first * WIDE_OUTPUTS;
                let columns = ((first + run) * WIDE_OUTPUTS).min(s.grid.width) - first * WIDE_OUTPUTS;
                let rows = (s.grid.height - oh).min(2);
                take_parts::<O>(
                    &*y,
                    parts,
                    norm_of_output,
                    s,
                    n,
                    first_vector,
                    row,
                    rows,
                    columns,
                    s.grid.width,
                    plan.take,
                );
            }
        }
        tile += run;
    }
}

/// Adds a point along the depth to the sums of a tile's near outputs at `near`, and of its far ones behind them; what it
/// completes is returned.
#[cube]
fn outputs_of_depth<O: Size>(
    plane: &Array<Vector<f32, O>>,
    sums: &mut [Vector<f32, O>],
    near: usize,
    depth_point: usize,
    #[comptime] plan: PointsPlan,
) -> Array<Vector<f32, O>> {
    let mut complete = Array::<Vector<f32, O>>::new(OUTPUTS);
    let far = near + OUTPUTS;
    #[unroll]
    for k in 0..OUTPUTS {
        if comptime!(plan.deep) {
            if depth_point == 0 {
                sums[near + k] = plane[k];
            } else if depth_point == 1 {
                sums[near + k] += plane[k];
                sums[far + k] = plane[k];
            } else if depth_point == 2 {
                complete[k] = sums[near + k] + plane[k];
                sums[far + k] -= plane[k];
            } else {
                complete[k] = sums[far + k] - plane[k];
            }
        } else {
            complete[k] = plane[k];
        }
    }
    complete
}

/// Stores a vector of channels of a tile's outputs at height `oh` and width `ow`, as far as they lie inside; `row` is the
/// row of voxels at height 0.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn store_outputs<O: Size>(
    outputs: &Array<Vector<f32, O>>,
    bias: Vector<f32, O>,
    y: &mut [Vector<f32, O>],
    row: usize,
    oh: usize,
    ow: usize,
    vector: usize,
    s: &PointsNumbers,
) {
    #[unroll]
    for k in 0..OUTPUTS {
        let h = oh + comptime!(k / WIDE_OUTPUTS);
        let w = ow + comptime!(k % WIDE_OUTPUTS);
        if h < s.grid.height && w < s.grid.width {
            let position = (row + h) * s.grid.width + w;
            y[position * s.vectors_out + vector] = outputs[k] + bias;
        }
    }
}

/// `Aᵀ` along the width and the height: `[height, width]` of 2 x 4 outputs.
#[cube]
fn plane_of_outputs<O: Size>(products: &[Vector<f32, O>], from: usize, point_stride: usize) -> Array<Vector<f32, O>> {
    let mut rows = Array::<Vector<f32, O>>::new(comptime!(POINTS * WIDE_OUTPUTS));
    #[unroll]
    for h in 0..POINTS {
        let from = from + h * WIDE_POINTS * point_stride;
        let m1 = products[from + point_stride];
        let m2 = products[from + 2 * point_stride];
        let m3 = products[from + 3 * point_stride];
        let m4 = products[from + 4 * point_stride];
        let near_sum = m1 + m2;
        let near_difference = m1 - m2;
        let far_sum = m3 + m4;
        let far_difference = m3 - m4;
        let row = comptime!(h * WIDE_OUTPUTS);
        rows[row] = products[from] + (near_sum + far_sum);
        rows[row + 1] = fma(Vector::new(B), far_difference, Vector::new(A) * near_difference);
        rows[row + 2] = fma(Vector::new(B2), far_sum, Vector::new(A2) * near_sum);
        let last = fma(Vector::new(A2 * A), near_difference, products[from + 5 * point_stride]);
        rows[row + 3] = fma(Vector::new(B2 * B), far_difference, last);
    }
    let mut plane = Array::<Vector<f32, O>>::new(OUTPUTS);
    #[unroll]
    for w in 0..WIDE_OUTPUTS {
        let second = rows[WIDE_OUTPUTS + w];
        let third = rows[2 * WIDE_OUTPUTS + w];
        plane[w] = rows[w] + (second + third);
        plane[WIDE_OUTPUTS + w] = (second - third) - rows[3 * WIDE_OUTPUTS + w];
    }
    plane
}

/// Launches the kernels for an operation with stride 1 and "same" padding.
pub(crate) fn launch(context: &Context, gather: &Gather) -> Result<(), KernelError> {
    let caps = context.caps();
    let deep = gather.taps[0] == 3;
    let extents = Extents::new(gather.batch, gather.in_dims, deep);
    if extents.count() == 0 {
        return Ok(());
    }
    let [first, second] = gather.gathered();
    let scratch = Scratch::of(gather, caps);
    let Scratch { lanes_in, lanes_out, vectors, .. } = scratch;
    let vectors_out = gather.channels_out / lanes_out;
    let (points, weight_stride) =
        WeightPoints { weights: gather.weights, lanes: lanes_out, vectors, deep }.run(context)?;
    let input_points = context.empty(scratch.input_len(), Dtype::F32)?;
    let products = context.empty(scratch.products_len(), Dtype::F32)?;
    let sums = context.empty(scratch.sums_len().max(1), Dtype::F32)?;
    let plan = PointsPlan {
        rows: scratch.rows,
        vectors,
        deep,
        second_input: gather.second.is_some(),
        bias: gather.bias.is_some(),
        take: gather.epilogue.take(),
    };
    let nothing = context.empty(lanes_in.max(lanes_out), Dtype::F32)?;
    let [parts, raw_output, norm_of_output] = gather.epilogue.buffers(&nothing);
    let work = Work::units(scratch.units, scratch.units as u32).of_flops(gather.flops());
    context.launch(OPERATION, work, |client, count, dim| {
        let numbers = PointsNumbersLaunch::new(
            first / lanes_in,
            second / lanes_in,
            first + second,
            vectors_out,
            scratch.groups,
            extents.count(),
            scratch.block,
            extents.count().div_ceil(scratch.block),
            scratch.input_stride,
            scratch.product_stride,
            scratch.sums_stride,
            weight_stride,
            gather.batch,
            scratch.units,
            gather.epilogue.slope(),
            extents.launch(),
        );
        convolution_kernel::launch(
            client,
            count,
            dim,
            lanes_in,
            lanes_out,
            gather.input.arg(),
            gather.second_or_input().arg(),
            points.arg(),
            gather.bias.unwrap_or(&points).arg(),
            gather.output.arg(),
            input_points.arg(),
            products.arg(),
            sums.arg(),
            parts.arg(),
            NormOfOutputLaunch::new(raw_output.arg(), norm_of_output.arg()),
            numbers,
            plan,
        );
    })
}
