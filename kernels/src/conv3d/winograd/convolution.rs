//! The convolution itself: for each block of tiles the input's points, their products with the weights' points, and the
//! outputs. Serves the forward pass and, with flipped and transposed weights, the gradient of the input.

use super::tiles::{Route, Window, transform};
use super::weights::WeightPoints;
use super::{A, A2, B, B2, BLOCK_BYTES, Extents, FEW_TILES, Grid, PLANE, POINTS, WIDE_OUTPUTS, WIDE_POINTS};
use super::{block_of, place_of, vectors_of};
use crate::block::strip;
use crate::conv3d::gather::widest_vector;
use crate::conv3d::pack::Packing;
use crate::instance_norm::Operand;
use crate::instance_norm::epilogue::{Epilogue, Take, add_moments, clear_parts, gradient_terms, slope_of};
use crate::instance_norm::prologue::{Load, RSTD, coefficients_at};
use crate::{Buffer, Caps, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

const OPERATION: &str = "winograd convolution";

/// What is compiled into one instance of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Plan {
    /// Tiles that one product holds in registers.
    rows: usize,
    /// Vectors of output channels that one product holds in registers.
    vectors: usize,
    /// Whether the kernel has three taps along the depth, else one.
    deep: bool,
    /// Whether a second input continues the channels of the first.
    second_input: bool,
    bias: bool,
    /// How both inputs are loaded.
    load: Load,
    second_load: Load,
    /// What is taken of the outputs on their way to memory: a part of every sample for each unit.
    take: Take,
}

#[derive(CubeType, CubeLaunch)]
struct Shape {
    /// Vectors of channels of the inputs.
    vectors_first: usize,
    vectors_second: usize,
    channels_in: usize,
    /// Vectors of channels of the output.
    vectors_out: usize,
    /// Parts of the output channels that are worked on apart.
    groups: usize,
    tiles: usize,
    /// Tiles of a block, and blocks.
    block: usize,
    blocks: usize,
    /// Distance of points and of units in the scratch of the input's points, and of the products, in vectors.
    input_stride: usize,
    product_stride: usize,
    sums_stride: usize,
    /// Distance of points of the weights, in vectors.
    weight_stride: usize,
    batch: usize,
    units: usize,
}

/// One unit computes a strip of (group of output channels, block of tiles) pairs, with scratch of its own. For a gradient that
/// is loaded through a norm, `second` is what the norm read; `norm_of_output` and `raw_output` serve the sums of the norm whose
/// output the gradient `y` belongs to.
#[cube(launch)]
fn convolution_kernel<I: Size, O: Size>(
    x: &[Vector<f32, I>],
    second: &[Vector<f32, I>],
    norm: &[Vector<f32, I>],
    second_norm: &[Vector<f32, I>],
    weights: &[Vector<f32, O>],
    bias: &[Vector<f32, O>],
    y: &mut [Vector<f32, O>],
    input_points: &mut [Vector<f32, I>],
    products: &mut [Vector<f32, O>],
    sums: &mut [Vector<f32, O>],
    raw_output: &[Vector<f32, O>],
    norm_of_output: &[Vector<f32, O>],
    parts: &mut [Vector<f32, O>],
    slope: f32,
    grid: Grid,
    s: Shape,
    #[comptime] plan: Plan,
) {
    if comptime!(plan.take != Take::Nothing) {
        clear_parts(parts, ABSOLUTE_POS, s.units, s.batch, comptime!(plan.take.rows()) * s.vectors_out);
    }
    let depth_points = comptime!(if plan.deep { POINTS } else { 1usize });
    let group_vectors = s.vectors_out / s.groups;
    let input_base = ABSOLUTE_POS * PLANE * s.input_stride;
    let product_base = ABSOLUTE_POS * PLANE * s.product_stride;
    let sums_base = ABSOLUTE_POS * s.sums_stride;
    let first = Route {
        vectors: s.vectors_first,
        first: 0usize.runtime(),
        count: s.vectors_first,
        base: input_base,
        point_stride: s.input_stride,
        tile_stride: s.vectors_first + s.vectors_second,
    };
    let behind = Route {
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
                second,
                norm,
                slope,
                input_points,
                &grid,
                depth_point,
                first_tile,
                last_tile,
                &first,
                plan.load,
                Window::Input,
                plan.deep,
            );
            if comptime!(plan.second_input) {
                transform::<I>(
                    second,
                    second,
                    second_norm,
                    slope,
                    input_points,
                    &grid,
                    depth_point,
                    first_tile,
                    last_tile,
                    &behind,
                    plan.second_load,
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
                raw_output,
                norm_of_output,
                parts,
                slope,
                &grid,
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
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel; a struct of slices is no kernel argument")]
fn multiply<I: Size, O: Size>(
    input_points: &[Vector<f32, I>],
    weights: &[Vector<f32, O>],
    products: &mut [Vector<f32, O>],
    s: &Shape,
    input_base: usize,
    product_base: usize,
    depth_point: usize,
    first_vector: usize,
    tiles: usize,
    #[comptime] plan: Plan,
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
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel; a struct of slices is no kernel argument")]
fn finish<O: Size>(
    products: &[Vector<f32, O>],
    sums: &mut [Vector<f32, O>],
    bias: &[Vector<f32, O>],
    y: &mut [Vector<f32, O>],
    raw_output: &[Vector<f32, O>],
    norm_of_output: &[Vector<f32, O>],
    parts: &mut [Vector<f32, O>],
    slope: f32,
    grid: &Grid,
    s: &Shape,
    product_base: usize,
    sums_base: usize,
    depth_point: usize,
    first_vector: usize,
    first_tile: usize,
    last_tile: usize,
    #[comptime] plan: Plan,
) {
    let group_vectors = s.vectors_out / s.groups;
    let mut tile = first_tile;
    while tile < last_tile {
        let first = tile % grid.tiles_width;
        let row = tile / grid.tiles_width;
        let (n, tile_depth, tile_height) = place_of(row, grid);
        let oh = tile_height * 2;
        let run = (grid.tiles_width - first).min(last_tile - tile);
        let mut od = tile_depth;
        let mut complete = true.runtime();
        if comptime!(plan.deep) {
            od = tile_depth * 2 + depth_point - 2;
            complete = depth_point >= 2 && od < grid.depth;
        }

        for i in 0..run {
            for vector in 0..group_vectors {
                let from = product_base + (tile - first_tile + i) * group_vectors + vector;
                let plane = plane_of_outputs::<O>(products, from, s.product_stride);
                let mut to_store = Array::<Vector<f32, O>>::new(OUTPUTS);
                if comptime!(plan.deep) {
                    let near = sums_base + ((tile - first_tile + i) * group_vectors + vector) * (2 * OUTPUTS);
                    let far = near + OUTPUTS;
                    #[unroll]
                    for k in 0..OUTPUTS {
                        if depth_point == 0 {
                            sums[near + k] = plane[k];
                        } else if depth_point == 1 {
                            sums[near + k] += plane[k];
                            sums[far + k] = plane[k];
                        } else if depth_point == 2 {
                            to_store[k] = sums[near + k] + plane[k];
                            sums[far + k] -= plane[k];
                        } else {
                            to_store[k] = sums[far + k] - plane[k];
                        }
                    }
                } else {
                    #[unroll]
                    for k in 0..OUTPUTS {
                        to_store[k] = plane[k];
                    }
                }
                if complete {
                    let mut bias_here = Vector::<f32, O>::zeroed();
                    if comptime!(plan.bias) {
                        bias_here = bias[first_vector + vector];
                    }
                    let ow = (first + i) * WIDE_OUTPUTS;
                    #[unroll]
                    for k in 0..OUTPUTS {
                        let h = oh + comptime!(k / WIDE_OUTPUTS);
                        let w = ow + comptime!(k % WIDE_OUTPUTS);
                        if h < grid.height && w < grid.width {
                            let position = ((n * grid.depth + od) * grid.height + h) * grid.width + w;
                            let value = to_store[k] + bias_here;
                            y[position * s.vectors_out + first_vector + vector] = value;
                        }
                    }
                }
            }
        }
        if comptime!(plan.take != Take::Nothing) {
            if complete {
                let row = ((n * grid.depth + od) * grid.height + oh) * grid.width + first * WIDE_OUTPUTS;
                let columns = ((first + run) * WIDE_OUTPUTS).min(grid.width) - first * WIDE_OUTPUTS;
                let rows = (grid.height - oh).min(2);
                take_parts::<O>(
                    &*y,
                    raw_output,
                    norm_of_output,
                    parts,
                    slope,
                    s,
                    n,
                    first_vector,
                    row,
                    rows,
                    columns,
                    grid.width,
                    plan.take,
                );
            }
        }
        tile += run;
    }
}

/// Outputs that are added up at the same time, to hide the latency of additions.
const ABREAST: usize = 4;

/// Takes what [`Take`] says of outputs that were just stored and are still in the first-level cache: `rows` rows of `columns`
/// positions from position `row` on, of sample `n`. A loop of its own, since the transforms need all registers.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel; a struct of slices is no kernel argument")]
fn take_parts<O: Size>(
    y: &[Vector<f32, O>],
    raw_output: &[Vector<f32, O>],
    norm_of_output: &[Vector<f32, O>],
    parts: &mut [Vector<f32, O>],
    slope: f32,
    s: &Shape,
    n: usize,
    first_vector: usize,
    row: usize,
    rows: usize,
    columns: usize,
    width: usize,
    #[comptime] take: Take,
) {
    let all = s.vectors_out;
    for vector in first_vector..first_vector + all / s.groups {
        let to = (n * s.units + ABSOLUTE_POS) * comptime!(take.rows()) * all + vector;
        let norm = coefficients_at::<O>(norm_of_output, n, all, vector, take.load());
        let mut shift = Vector::<f32, O>::zeroed();
        let mut before = Vector::<f32, O>::zeroed();
        if comptime!(take == Take::Moments) {
            before = parts[to + 3 * all];
            if before.extract(0usize) == 0.0f32 {
                parts[to] = y[row * all + vector];
            }
            shift = parts[to] + parts[to + all];
        }
        let mut sum = Array::<Vector<f32, O>>::new(ABREAST);
        let mut product = Array::<Vector<f32, O>>::new(ABREAST);
        for r in 0..rows {
            let from = (row + r * width) * all + vector;
            for group in 0..columns / ABREAST {
                #[unroll]
                for i in 0..ABREAST {
                    let at = from + (group * ABREAST + i) * all;
                    let (one, other) = terms::<O>(y[at], raw_output, at, shift, &norm, slope, take);
                    sum[i] += one;
                    product[i] += other;
                }
            }
            for column in columns / ABREAST * ABREAST..columns {
                let at = from + column * all;
                let (one, other) = terms::<O>(y[at], raw_output, at, shift, &norm, slope, take);
                sum[0] += one;
                product[0] += other;
            }
        }
        let sum = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        let product = (product[0] + product[1]) + (product[2] + product[3]);
        if comptime!(take == Take::Moments) {
            let here = f32::cast_from(rows * columns);
            add_moments(parts, to, all, shift, sum, product, before, here);
            parts[to + 3 * all] = before + Vector::new(here);
        } else {
            parts[to] += sum;
            parts[to + all] += product * norm[RSTD];
        }
    }
}

/// What one output adds to both sums.
#[cube]
fn terms<O: Size>(
    value: Vector<f32, O>,
    raw_output: &[Vector<f32, O>],
    at: usize,
    shift: Vector<f32, O>,
    norm: &Array<Vector<f32, O>>,
    slope: f32,
    #[comptime] take: Take,
) -> (Vector<f32, O>, Vector<f32, O>) {
    if comptime!(take == Take::Moments) {
        let difference = value - shift;
        (difference, difference * difference)
    } else {
        gradient_terms::<O>(value, raw_output[at], norm, Vector::new(slope))
    }
}

/// Outputs of a tile at one position along the depth.
pub(super) const OUTPUTS: usize = 2 * WIDE_OUTPUTS;

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

/// One convolution of stride 1 with "same" padding, all f32. Axes are depth, height, width.
pub(crate) struct Convolution<'a> {
    pub batch: usize,
    pub dims: [usize; 3],
    /// `[batch, dims, channels_in]`; the channels of the second input continue the first's.
    pub input: Operand<'a>,
    pub channels_in: usize,
    pub second: Option<(Operand<'a>, usize)>,
    /// Whether the kernel has three taps along the depth, else one.
    pub deep: bool,
    pub bias: Option<&'a Buffer>,
    pub output: &'a Buffer,
    pub channels_out: usize,
    /// Taken in as many parts as cubes have units.
    pub epilogue: Epilogue<'a>,
}

impl Convolution<'_> {
    /// Launches the kernels. `packing` says how to pack `weights`; its block is set here, and the channels of both inputs follow
    /// each other.
    pub fn launch(&self, context: &Context, weights: &Buffer, packing: Packing) -> Result<(), KernelError> {
        let caps = context.caps();
        let extents = Extents::new(self.batch, self.dims, self.deep);
        let tiles = extents.count();
        if tiles == 0 {
            return Ok(());
        }
        let (second, second_channels) = self.second.unwrap_or((Operand::Stored(self.input.buffer()), 0));
        let channels_in = self.channels_in + second_channels;
        let lanes_in = widest_vector(caps, self.channels_in).min(widest_vector(caps, second_channels));
        let lanes_out = widest_vector(caps, self.channels_out);
        let vectors_out = self.channels_out / lanes_out;
        let vectors = vectors_of(vectors_out);
        let (points, weight_stride) =
            WeightPoints { weights, packing, lanes: lanes_out, vectors, deep: self.deep }.run(context)?;

        let units = caps.cube_units() as usize;
        // Where tiles are few, units share the output channels instead: each reads fewer of the weights' points.
        let groups = match vectors_out / vectors {
            blocks if blocks.is_multiple_of(units) && tiles < units * FEW_TILES => units,
            _ => 1,
        };
        let bytes_of_tile =
            (PLANE * (channels_in + self.channels_out / groups) + 2 * OUTPUTS * self.channels_out / groups) * 4;
        let block = block_of(tiles, units / groups, (BLOCK_BYTES / bytes_of_tile).clamp(FEW_TILES, 192));
        let blocks = tiles.div_ceil(block);
        let rows = rows_of(caps, vectors, block);
        let room = block.next_multiple_of(rows);
        // One vector more than is needed: points at a distance of a large power of two would share few lines of a cache.
        let input_stride = room * (channels_in / lanes_in) + 1;
        let product_stride = room * (vectors_out / groups) + 1;
        let sums_stride = if self.deep { block * (vectors_out / groups) * 2 * OUTPUTS } else { 0 };
        let input_points = context.empty(units * PLANE * input_stride * lanes_in, Dtype::F32)?;
        let products = context.empty(units * PLANE * product_stride * lanes_out, Dtype::F32)?;
        let sums = context.empty((units * sums_stride * lanes_out).max(1), Dtype::F32)?;
        let plan = Plan {
            rows,
            vectors,
            deep: self.deep,
            second_input: self.second.is_some(),
            bias: self.bias.is_some(),
            load: self.input.load(),
            second_load: second.load(),
            take: self.epilogue.take(),
        };
        let shape = ShapeLaunch::new(
            self.channels_in / lanes_in,
            second_channels / lanes_in,
            channels_in,
            vectors_out,
            groups,
            tiles,
            block,
            blocks,
            input_stride,
            product_stride,
            sums_stride,
            weight_stride,
            self.batch,
            units,
        );
        let nothing = context.empty(lanes_in.max(lanes_out), Dtype::F32)?;
        let [parts, raw_output, norm_of_output] = self.epilogue.buffers(&nothing);
        let slope = slope_of(OPERATION, [Some(&self.input), Some(&second), None], &self.epilogue)?;
        let norm = |operand: &Operand| operand.coefficients().map_or(&nothing, |by| &by.values).arg();
        context.launch(OPERATION, Work::units(units, units as u32), |client, count, dim| {
            convolution_kernel::launch(
                client,
                count,
                dim,
                lanes_in,
                lanes_out,
                self.input.buffer().arg(),
                if self.second.is_some() { second.buffer() } else { self.input.raw() }.arg(),
                norm(&self.input),
                norm(&second),
                points.arg(),
                self.bias.unwrap_or(&points).arg(),
                self.output.arg(),
                input_points.arg(),
                products.arg(),
                sums.arg(),
                raw_output.arg(),
                norm_of_output.arg(),
                parts.arg(),
                slope,
                extents.launch(),
                shape,
                plan,
            )
        })
    }
}

/// Tiles in a product: as many sums as registers hold, and few rows without a tile.
fn rows_of(caps: &Caps, vectors: usize, block: usize) -> usize {
    let most = ((caps.registers * 3 / 4).min(16) / vectors).clamp(1, 12);
    let cost = |rows: usize| block.div_ceil(rows) * (rows * vectors).max(10);
    (1..=most).rev().min_by_key(|&rows| cost(rows)).unwrap_or(1)
}
