//! The gradient of the weights: the products of both tensors' points, summed over tiles, and `Gᵀ` of the sums.
//!
//! Each split of the tiles has sums of its own, which a second launch adds in a fixed order while it transforms them.

use super::grid::{A, A2, B, B2, Extents, OF_A, OF_B, OF_ZERO, PLANE, POINTS, TileGrid, WIDE_POINTS, vectors_of};
use super::scratch::GradientScratch;
use super::tiles::{Transfer, Window, transform};
use crate::block::strip;
use crate::conv3d::gather::WeightGradient;
use crate::{Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

const OPERATION: &str = "winograd weight gradient";

/// What is compiled into one instance of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct GradientPlan {
    /// Input channels that one product holds in registers; they divide the number of input channels.
    rows: usize,
    /// Vectors of output channels that one product holds in registers.
    vectors: usize,
    /// Whether the kernel has three taps along the depth, else one.
    deep: bool,
    /// Whether a second input continues the channels of the first.
    second_input: bool,
}

#[derive(CubeType, CubeLaunch)]
struct GradientNumbers {
    /// Vectors of channels of the inputs.
    vectors_first: usize,
    vectors_second: usize,
    channels_in: usize,
    /// Vectors of channels of the output.
    vectors_out: usize,
    /// Parts of the output channels that units work on apart.
    groups: usize,
    /// Parts of the tiles that units sum up apart.
    splits: usize,
    tiles: usize,
    /// Tiles of a block, and blocks.
    block: usize,
    blocks: usize,
    /// Distances of points in vectors: of the input, of the gradient, of the sums.
    input_stride: usize,
    gradient_stride: usize,
    sums_stride: usize,
}

/// `sums` is `[split, point, channel in, vector out]`. One unit sums one split for one group of output channels.
#[cube(launch)]
fn weight_sums_kernel<I: Size, O: Size>(
    x: &[Vector<f32, I>],
    second: &[Vector<f32, I>],
    dy: &[Vector<f32, O>],
    input_points: &mut [Vector<f32, I>],
    gradient_points: &mut [Vector<f32, O>],
    sums: &mut [Vector<f32, O>],
    grid: TileGrid,
    s: GradientNumbers,
    #[comptime] plan: GradientPlan,
) {
    if ABSOLUTE_POS < s.splits * s.groups {
        let depth_points = comptime!(if plan.deep { POINTS } else { 1usize });
        let split = ABSOLUTE_POS / s.groups;
        let group_vectors = s.vectors_out / s.groups;
        let first_vector = ABSOLUTE_POS % s.groups * group_vectors;
        let input_base = ABSOLUTE_POS * PLANE * s.input_stride;
        let gradient_base = ABSOLUTE_POS * PLANE * s.gradient_stride;
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
        let gradient = Transfer {
            vectors: s.vectors_out,
            first: first_vector,
            count: group_vectors,
            base: gradient_base,
            point_stride: s.gradient_stride,
            tile_stride: group_vectors,
        };
        let first_block = split * s.blocks / s.splits;
        let last_block = (split + 1) * s.blocks / s.splits;
        for block in first_block..last_block {
            let low = block * s.block;
            let high = (low + s.block).min(s.tiles);
            for depth_point in 0..depth_points {
                transform::<I>(x, input_points, &grid, depth_point, low, high, &first, Window::Input, plan.deep);
                if comptime!(plan.second_input) {
                    transform::<I>(
                        second,
                        input_points,
                        &grid,
                        depth_point,
                        low,
                        high,
                        &behind,
                        Window::Input,
                        plan.deep,
                    );
                }
                transform::<O>(
                    dy,
                    gradient_points,
                    &grid,
                    depth_point,
                    low,
                    high,
                    &gradient,
                    Window::Gradient,
                    plan.deep,
                );
                let sums_base = (split * depth_points + depth_point) * PLANE * s.sums_stride + first_vector;
                add_products::<I, O>(
                    &*input_points,
                    &*gradient_points,
                    sums,
                    &s,
                    input_base,
                    gradient_base,
                    sums_base,
                    high - low,
                    block == first_block,
                    plan,
                );
            }
        }
    }
}

/// At each point of one point along the depth, `[channels in, tiles] x [tiles, channels out of the group]`, added to the
/// sums, or stored as the first of them.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn add_products<I: Size, O: Size>(
    input_points: &[Vector<f32, I>],
    gradient_points: &[Vector<f32, O>],
    sums: &mut [Vector<f32, O>],
    s: &GradientNumbers,
    input_base: usize,
    gradient_base: usize,
    sums_base: usize,
    tiles: usize,
    is_first: bool,
    #[comptime] plan: GradientPlan,
) {
    let rows = comptime!(plan.rows);
    let vectors = comptime!(plan.vectors);
    let scalars = input_points.with_vector_size::<Const<1>>();
    let group_vectors = s.vectors_out / s.groups;
    for point in 0..PLANE {
        for block in 0..group_vectors / vectors {
            let gradient = gradient_base + point * s.gradient_stride + block * vectors;
            for c in range_stepped(0, s.channels_in, rows) {
                let input = (input_base + point * s.input_stride) * I::value() + c;
                let mut products = Array::<Vector<f32, O>>::new(comptime!(rows * vectors));
                for tile in 0..tiles {
                    #[unroll]
                    for r in 0..rows {
                        let value = scalars[input + tile * s.channels_in + r].extract(0usize);
                        #[unroll]
                        for v in 0..vectors {
                            products[r * vectors + v] = fma(
                                Vector::new(value),
                                gradient_points[gradient + tile * group_vectors + v],
                                products[r * vectors + v],
                            );
                        }
                    }
                }
                let to = sums_base + point * s.sums_stride + c * s.vectors_out + block * vectors;
                #[unroll]
                for r in 0..rows {
                    #[unroll]
                    for v in 0..vectors {
                        let at = to + r * s.vectors_out + v;
                        if is_first {
                            sums[at] = products[r * vectors + v];
                        } else {
                            sums[at] += products[r * vectors + v];
                        }
                    }
                }
            }
        }
    }
}

/// Adds the splits' sums and applies `Gᵀ`: to `[tap, channel in, vector out]`. One unit computes a strip of (channel in,
/// vector out) pairs.
#[cube(launch)]
fn weights_of_sums_kernel<N: Size>(
    sums: &[Vector<f32, N>],
    gradient: &mut [Vector<f32, N>],
    pairs: usize,
    splits: usize,
    stride: usize,
    #[comptime] deep: bool,
) {
    let depth_points = comptime!(if deep { POINTS } else { 1usize });
    let taps = comptime!(if deep { 27usize } else { 9usize });
    let half = Vector::<f32, N>::new(0.5f32);
    let (low, high) = strip(pairs);
    for pair in low..high {
        let mut weights = Array::<Vector<f32, N>>::new(taps);
        for depth_point in 0..depth_points {
            // Along the width, for each point along the height; then along the height.
            let mut rows = Array::<Vector<f32, N>>::new(12usize);
            #[unroll]
            for h in 0..POINTS {
                let mut m = Array::<Vector<f32, N>>::new(WIDE_POINTS);
                for split in 0..splits {
                    #[unroll]
                    for w in 0..WIDE_POINTS {
                        let point = (split * depth_points + depth_point) * PLANE + h * WIDE_POINTS + w;
                        m[w] += sums[point * stride + pair];
                    }
                }
                let near = (m[1] + m[2]) * Vector::new(OF_A);
                let far = (m[3] + m[4]) * Vector::new(OF_B);
                let slope = (m[3] - m[4]) * Vector::new(B * OF_B);
                rows[h * 3] = fma(m[0], Vector::new(OF_ZERO), near + far);
                rows[h * 3 + 1] = fma(m[1] - m[2], Vector::new(A * OF_A), slope);
                rows[h * 3 + 2] = fma(Vector::new(A2), near, fma(Vector::new(B2), far, m[5]));
            }
            let mut plane = Array::<Vector<f32, N>>::new(9usize);
            #[unroll]
            for w in 0..3usize {
                let outer = (rows[3 + w] + rows[6 + w]) * half;
                plane[w] = rows[w] + outer;
                plane[3 + w] = (rows[3 + w] - rows[6 + w]) * half;
                plane[6 + w] = rows[9 + w] + outer;
            }
            if comptime!(deep) {
                let inner = depth_point == 1 || depth_point == 2;
                let first = select(inner, 0.5f32, select(depth_point == 0, 1.0f32, 0.0f32));
                let middle = select(inner, select(depth_point == 1, 0.5f32, -0.5f32), 0.0f32);
                let last = select(inner, 0.5f32, select(depth_point == 3, 1.0f32, 0.0f32));
                #[unroll]
                for k in 0..9usize {
                    weights[k] = fma(Vector::new(first), plane[k], weights[k]);
                    weights[k + 9] = fma(Vector::new(middle), plane[k], weights[k + 9]);
                    weights[k + 18] = fma(Vector::new(last), plane[k], weights[k + 18]);
                }
            } else {
                #[unroll]
                for k in 0..9usize {
                    weights[k] = plane[k];
                }
            }
        }
        #[unroll]
        for k in 0..taps {
            gradient[k * pairs + pair] = weights[k];
        }
    }
}

/// Launches the kernels for an operation with stride 1 and "same" padding.
pub(crate) fn launch(context: &Context, gradient: &WeightGradient) -> Result<(), KernelError> {
    let caps = context.caps();
    let deep = gradient.taps[0] == 3;
    let extents = Extents::new(gradient.batch, gradient.in_dims, deep);
    let (second, second_channels) = gradient.second.unwrap_or((gradient.strided, 0));
    let scratch = GradientScratch::of(gradient, caps);
    let GradientScratch { lanes_in, lanes_out, units, splits, .. } = scratch;
    let channels_in = gradient.rows + second_channels;
    let vectors_out = gradient.columns / lanes_out;
    let vectors = vectors_of(vectors_out);
    let plan = GradientPlan {
        // Eight divides the channels: see `fits`.
        rows: if caps.registers >= 32 && vectors <= 2 { 8 } else { 4 },
        vectors,
        deep,
        second_input: gradient.second.is_some(),
    };
    let pairs = channels_in * vectors_out;
    let input_points = context.empty(scratch.input_len(), Dtype::F32)?;
    let gradient_points = context.empty(scratch.gradient_len(), Dtype::F32)?;
    let sums = context.empty(scratch.sums_len(), Dtype::F32)?;
    let work = Work::units(units, units as u32).of_flops(gradient.flops());
    context.launch(OPERATION, work, |client, count, dim| {
        let numbers = GradientNumbersLaunch::new(
            gradient.rows / lanes_in,
            second_channels / lanes_in,
            channels_in,
            vectors_out,
            scratch.groups,
            splits,
            extents.count(),
            scratch.block,
            extents.count().div_ceil(scratch.block),
            scratch.input_stride,
            scratch.gradient_stride,
            scratch.sums_stride,
        );
        weight_sums_kernel::launch(
            client,
            count,
            dim,
            lanes_in,
            lanes_out,
            gradient.strided.arg(),
            second.arg(),
            gradient.dense.arg(),
            input_points.arg(),
            gradient_points.arg(),
            sums.arg(),
            extents.launch(),
            numbers,
            plan,
        );
    })?;
    context.launch(OPERATION, Work::units(caps.strips(pairs, 1), units as u32), |client, count, dim| {
        let (sums, into, stride) = (sums.arg(), gradient.gradient.arg(), scratch.sums_stride);
        weights_of_sums_kernel::launch(client, count, dim, lanes_out, sums, into, pairs, splits, stride, deep);
    })
}
