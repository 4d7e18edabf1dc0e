//! The gradient of the weights: a register tile of a few `row` channels times a few vectors of `column`
//! channels, summed over output positions.
//!
//! `dw[tap, r, c] = sum over outputs j of strided[j * step + tap - pad, r] * dense[j, c]`
//!
//! For a convolution `strided` is the input and `dense` the output's gradient; for a transposed convolution
//! it is the other way round, and a second launch stores the result transposed.
//!
//! Where the dense tensor has fewer channels than a register has lanes, a register holds the products of several row
//! channels: `split` neighbouring ones are loaded at once, and lane `c * split + r` belongs to column `c` and row `r`.
//!
//! Three taps along the width, one apart, share a tile: see `Plan::window`.
//!
//! The sums run over `chunk`s of rows that stay in a core's cache while all tiles pass over them. Where
//! tiles are fewer than units, the rows are split; each split sums into a part of its own, and the second
//! launch adds the parts in a fixed order.

use crate::block::strip;
use crate::conv3d::gather::{repeat, split_for, widest_vector};
use crate::conv3d::igemm;
use crate::instance_norm::Operand;
use crate::{Buffer, Context, Dtype, KernelError, Work, elementwise};
use cubecl::prelude::*;

pub(super) const OPERATION: &str = "weight gradient";

/// What is compiled into one instance of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Plan {
    /// Groups of `split` channels of the strided tensor in a tile.
    rows: usize,
    /// Channels of the strided tensor in a vector.
    split: usize,
    /// Vectors of channels of the dense tensor in a tile.
    vectors: usize,
    /// Outputs along the width that are summed apart and added at the end: enough independent sums to keep the
    /// multiply-add units busy where a tile is small.
    apart: usize,
    /// Taps along the width in a tile: three, one apart, or one. With three, each value of the strided tensor is loaded once
    /// for all of them, and the dense tensor's values pass through a window of registers.
    window: usize,
    /// Whether the last tile has fewer channels of the strided tensor.
    ragged: bool,
    /// Whether a unit sums one tile over one chunk only, as on a GPU: no loops there, whose state would take registers.
    single: bool,
}

/// One weight gradient. Axes are depth, height, width.
pub(crate) struct WeightGradient<'a> {
    pub batch: usize,
    /// `[batch, in_dims, rows]`.
    pub strided: Operand<'a>,
    pub rows: usize,
    pub in_dims: [usize; 3],
    /// `[batch, out_dims, columns]`.
    pub dense: Operand<'a>,
    pub columns: usize,
    pub out_dims: [usize; 3],
    pub taps: [usize; 3],
    pub step: [usize; 3],
    pub pad: [usize; 3],
    /// f32 `[taps, ...]` with this distance between taps, row channels and column channels, from `first` on.
    pub gradient: &'a Buffer,
    pub first: usize,
    pub tap_stride: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

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
    /// Rows of outputs: batch * depth * height.
    out_rows: usize,
    /// Rows that pass through the cache together.
    chunk: usize,
    splits: usize,
    /// Units that share the tiles of one split.
    groups: usize,
    /// Length of one split's part, in vectors.
    part: usize,
    first: usize,
    tap_stride: usize,
    row_stride: usize,
}

#[cube(launch)]
fn weight_gradient_kernel<E: Float, N: Size, K: Size, G: Size>(
    strided: &[Vector<E, K>],
    dense: &[Vector<E, G>],
    gradient: &mut [Vector<f32, G>],
    s: Shape,
    #[comptime] plan: Plan,
    #[define(E)] _dtype: ElemType,
) {
    let vectors = comptime!(plan.vectors);
    let tile_rows = comptime!(plan.rows);
    let lanes = G::value();
    let row_groups = s.rows / plan.split;
    let window = comptime!(plan.window);
    let taps = s.taps_depth * s.taps_height * (s.taps_width / window);
    let row_blocks = row_groups.div_ceil(tile_rows);
    let column_blocks = s.columns / (lanes * vectors);
    let tiles = taps * row_blocks * column_blocks;

    if ABSOLUTE_POS < s.splits * s.groups {
        let split = ABSOLUTE_POS / s.groups;
        let group = ABSOLUTE_POS % s.groups;
        let tiles_each = tiles.div_ceil(s.groups);
        let first_tile = (group * tiles_each).min(tiles);
        let last_tile = if comptime!(plan.single) { first_tile + 1 } else { (first_tile + tiles_each).min(tiles) };
        let rows_each = s.out_rows.div_ceil(s.splits);
        let first_row = (split * rows_each).min(s.out_rows);
        let last_row = (first_row + rows_each).min(s.out_rows);
        let chunks =
            if comptime!(plan.single) { 1usize.runtime() } else { (last_row - first_row).div_ceil(s.chunk).max(1) };

        for chunk in 0..chunks {
            let from = first_row + chunk * s.chunk;
            let to = (from + s.chunk).min(last_row);
            for tile in first_tile..last_tile {
                let column_block = tile % column_blocks;
                let rest = tile / column_blocks;
                let r0 = rest % row_blocks * tile_rows;
                let tap = rest / row_blocks * window;
                let tw = tap % s.taps_width;
                let th = tap / s.taps_width % s.taps_height;
                let td = tap / (s.taps_width * s.taps_height);

                // Outputs whose strided position lies inside along the width.
                let step = s.step_width;
                let pad = s.pad_width;
                let low = select(tw >= pad, 0usize, (pad - tw).div_ceil(step));
                let high = ((s.in_width + pad + step - 1 - tw) / step).min(s.out_width);

                let apart = comptime!(plan.apart);
                let mut sums = Array::<Vector<f32, N>>::new(comptime!(plan.apart * plan.window * tile_rows * vectors));
                // Counted along instead of divided out of the row's number.
                let mut oh = from % s.out_height;
                let mut od = from / s.out_height % s.out_depth;
                let mut n = from / s.out_height / s.out_depth;
                for row in from..to {
                    let id = od * s.step_depth + td;
                    let ih = oh * s.step_height + th;
                    let valid = id >= s.pad_depth
                        && id < s.in_depth + s.pad_depth
                        && ih >= s.pad_height
                        && ih < s.in_height + s.pad_height;
                    if valid {
                        let plane = n * s.in_depth + id - s.pad_depth;
                        let in_row = (plane * s.in_height + ih - s.pad_height) * s.in_width;
                        if comptime!(plan.window == 3) {
                            let position = in_row * row_groups;
                            let d = row * s.out_width * (s.columns / lanes) + column_block * vectors;
                            add_row::<E, N, K, G>(
                                &mut sums,
                                strided,
                                dense,
                                position,
                                d,
                                r0,
                                row_groups,
                                s.columns / lanes,
                                s.out_width,
                                plan,
                            );
                        } else {
                            let position = (in_row + low * step + tw - pad) * row_groups;
                            let d = (row * s.out_width + low) * (s.columns / lanes) + column_block * vectors;
                            let outputs = high - low;
                            let groups = outputs / apart;
                            for group in 0..groups {
                                #[unroll]
                                for a in 0..apart {
                                    let j = group * apart + a;
                                    add_output::<E, N, K, G>(
                                        &mut sums,
                                        strided,
                                        dense,
                                        position + j * step * row_groups,
                                        d + j * (s.columns / lanes),
                                        r0,
                                        row_groups,
                                        a,
                                        plan,
                                    );
                                }
                            }
                            if comptime!(plan.apart > 1) {
                                for j in groups * apart..outputs {
                                    add_output::<E, N, K, G>(
                                        &mut sums,
                                        strided,
                                        dense,
                                        position + j * step * row_groups,
                                        d + j * (s.columns / lanes),
                                        r0,
                                        row_groups,
                                        0usize,
                                        plan,
                                    );
                                }
                            }
                        }
                    }
                    oh += 1;
                    if oh == s.out_height {
                        oh = 0usize.runtime();
                        od += 1;
                        if od == s.out_depth {
                            od = 0usize.runtime();
                            n += 1;
                        }
                    }
                }

                let base = split * s.part + (s.first + tap * s.tap_stride) / lanes + column_block * vectors;
                #[unroll]
                for r in 0..tile_rows {
                    if r0 + r < row_groups {
                        #[unroll]
                        for t in 0..window {
                            #[unroll]
                            for v in 0..vectors {
                                let mut sum = sums[(t * tile_rows + r) * vectors + v];
                                #[unroll]
                                for a in 1..apart {
                                    sum += sums[((a * window + t) * tile_rows + r) * vectors + v];
                                }
                                #[unroll]
                                for k in 0..plan.split {
                                    let row = (r0 + r) * plan.split + k;
                                    let i = base + t * (s.tap_stride / lanes) + row * (s.row_stride / lanes) + v;
                                    let sum = take_lanes::<N, G>(sum, k, plan.split);
                                    if chunk == 0 {
                                        gradient[i] = sum;
                                    } else {
                                        gradient[i] += sum;
                                    }
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// `[c, k]` to `[c]`: the lanes of row `k`.
#[cube]
fn take_lanes<N: Size, G: Size>(
    sums: Vector<f32, N>,
    #[comptime] k: usize,
    #[comptime] split: usize,
) -> Vector<f32, G> {
    let mut taken = Vector::<f32, G>::empty();
    #[unroll]
    for c in 0..G::value() {
        taken.insert(c, sums.extract(c * split + k));
    }
    taken
}

/// `[c]` to `[c, k]`: each value `split` times.
#[cube]
fn stretch<E: Float, N: Size, G: Size>(values: Vector<E, G>, #[comptime] split: usize) -> Vector<f32, N> {
    let values = Vector::<f32, G>::cast_from(values);
    let mut stretched = Vector::<f32, N>::empty();
    #[unroll]
    for lane in 0..N::value() {
        stretched.insert(lane, values.extract(comptime!(lane / split)));
    }
    stretched
}

/// Adds the products of a row of `width` positions with the outputs one before, at, and one behind each of them, which belong
/// to the last, the middle and the first of three taps.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel; a struct of slices is no kernel argument")]
fn add_row<E: Float, N: Size, K: Size, G: Size>(
    sums: &mut Array<Vector<f32, N>>,
    strided: &[Vector<E, K>],
    dense: &[Vector<E, G>],
    position: usize,
    d: usize,
    r0: usize,
    rows: usize,
    columns: usize,
    width: usize,
    #[comptime] plan: Plan,
) {
    let vectors = comptime!(plan.vectors);
    let apart = comptime!(plan.apart);
    // Three vectors each: behind, at and before the position.
    let mut outputs = Array::<Vector<f32, N>>::new(comptime!(3 * plan.vectors));
    #[unroll]
    for v in 0..vectors {
        outputs[vectors + v] = stretch::<E, N, G>(dense[d + v], plan.split);
        outputs[2 * vectors + v] = Vector::new(0.0f32);
    }
    let groups = (width - 1) / apart;
    for group in 0..groups {
        #[unroll]
        for a in 0..apart {
            let j = group * apart + a;
            let behind = d + (j + 1) * columns;
            #[unroll]
            for v in 0..vectors {
                outputs[v] = stretch::<E, N, G>(dense[behind + v], plan.split);
            }
            add_position::<E, N, K>(sums, &mut outputs, strided, position + j * rows, r0, rows, a, plan);
        }
    }
    if comptime!(plan.apart > 1) {
        for j in groups * apart..width - 1 {
            let behind = d + (j + 1) * columns;
            #[unroll]
            for v in 0..vectors {
                outputs[v] = stretch::<E, N, G>(dense[behind + v], plan.split);
            }
            add_position::<E, N, K>(sums, &mut outputs, strided, position + j * rows, r0, rows, 0usize, plan);
        }
    }
    #[unroll]
    for v in 0..vectors {
        outputs[v] = Vector::new(0.0f32);
    }
    add_position::<E, N, K>(sums, &mut outputs, strided, position + (width - 1) * rows, r0, rows, 0usize, plan);
}

/// Adds one position's products to the sums of number `a`, and moves the window on.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn add_position<E: Float, N: Size, K: Size>(
    sums: &mut Array<Vector<f32, N>>,
    outputs: &mut Array<Vector<f32, N>>,
    strided: &[Vector<E, K>],
    position: usize,
    r0: usize,
    rows: usize,
    #[comptime] a: usize,
    #[comptime] plan: Plan,
) {
    let vectors = comptime!(plan.vectors);
    let tile_rows = comptime!(plan.rows);
    #[unroll]
    for r in 0..tile_rows {
        let mut channel = r0 + r;
        if comptime!(plan.ragged) {
            // The last tile repeats the last channel; its surplus sums are not stored.
            channel = channel.min(rows - 1);
        }
        let value = repeat::<E, N, K>(strided[position + channel], plan.split);
        #[unroll]
        for t in 0..3usize {
            #[unroll]
            for v in 0..vectors {
                let i = comptime!(((a * 3 + t) * tile_rows + r) * vectors + v);
                sums[i] = fma(value, outputs[t * vectors + v], sums[i]);
            }
        }
    }
    #[unroll]
    for v in 0..vectors {
        outputs[2 * vectors + v] = outputs[vectors + v];
        outputs[vectors + v] = outputs[v];
    }
}

/// Adds one output's products to the sums of number `a`.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel; a struct of slices is no kernel argument")]
fn add_output<E: Float, N: Size, K: Size, G: Size>(
    sums: &mut Array<Vector<f32, N>>,
    strided: &[Vector<E, K>],
    dense: &[Vector<E, G>],
    position: usize,
    d: usize,
    r0: usize,
    rows: usize,
    #[comptime] a: usize,
    #[comptime] plan: Plan,
) {
    let vectors = comptime!(plan.vectors);
    let tile_rows = comptime!(plan.rows);
    let mut columns = Array::<Vector<f32, N>>::new(vectors);
    #[unroll]
    for v in 0..vectors {
        columns[v] = stretch::<E, N, G>(dense[d + v], plan.split);
    }
    #[unroll]
    for r in 0..tile_rows {
        let mut channel = r0 + r;
        if comptime!(plan.ragged) {
            // The last tile repeats the last channel; its surplus sums are not stored.
            channel = channel.min(rows - 1);
        }
        let value = repeat::<E, N, K>(strided[position + channel], plan.split);
        #[unroll]
        for v in 0..vectors {
            let i = comptime!((a * tile_rows + r) * vectors + v);
            sums[i] = fma(value, columns[v], sums[i]);
        }
    }
}

/// Adds the parts `[split, tap, row, column]` in order and stores the sums where they belong.
#[cube(launch)]
fn add_parts_kernel(
    parts: &[f32],
    gradient: &mut [f32],
    taps: usize,
    rows: usize,
    columns: usize,
    splits: usize,
    first: usize,
    tap_stride: usize,
    row_stride: usize,
    column_stride: usize,
) {
    let part = taps * rows * columns;
    let (low, high) = strip(taps * rows);
    for i in low..high {
        let to = first + i / rows * tap_stride + i % rows * row_stride;
        for column in 0..columns {
            let mut sum = 0.0f32;
            for split in 0..splits {
                sum += parts[split * part + i * columns + column];
            }
            gradient[to + column * column_stride] = sum;
        }
    }
}

impl WeightGradient<'_> {
    /// Bytes of both tensors that a chunk of rows may take of a core's second-level cache.
    const CHUNK_BYTES: usize = 192 << 10;

    /// Elements of a gradient whose parts are added in next to no time.
    const SMALL_GRADIENT: usize = 1 << 15;

    /// Launches the kernel, and the sum over splits where there are any.
    pub fn launch(&self, context: &Context) -> Result<(), KernelError> {
        let caps = context.caps();
        let (dtype, layout) = (self.dense.buffer().dtype(), igemm::CHANNELS_BY_CHANNELS);
        if let Some(plan) = igemm::Plan::choose(caps, dtype, layout, self.rows, usize::MAX, self.columns) {
            let (parts, splits) = igemm::weight_gradient::launch(self, plan, context)?;
            return self.add_parts(context, &parts, splits);
        }
        if caps.cores.is_some() && dtype != Dtype::F32 {
            // A CPU spends more on converting each number as often as it is used than on a copy.
            let [strided, dense] =
                [self.strided.buffer(), self.dense.buffer()].map(|buffer| -> Result<Buffer, KernelError> {
                    let wide = context.empty(buffer.len(), Dtype::F32)?;
                    elementwise::cast(context, buffer, &wide)?;
                    Ok(wide)
                });
            return WeightGradient { strided: Operand::Stored(&strided?), dense: Operand::Stored(&dense?), ..*self }
                .launch(context);
        }
        let lanes = widest_vector(caps, self.columns);
        let blocks = self.columns / lanes;
        let vectors = match blocks {
            b if b % 2 == 0 => 2,
            b if b % 3 == 0 => 3,
            _ => 1,
        };
        let split = split_for(caps, lanes, [self.rows, 0]);
        let window = match (caps.cores, self.taps[2], self.step[2], self.pad[2]) {
            (Some(_), 3, 1, 1) => 3,
            _ => 1,
        };
        // Measured with AVX-512: twice the sums that AVX2 has registers for save a sixth of the time, and with three taps a
        // tile needs few loads for three times as many.
        let sums = match (caps.cores, caps.registers >= 32, window) {
            (Some(_), true, 3) => 24,
            (Some(_), true, _) => 16,
            (_, _, 3) => 12,
            _ => 8,
        };
        // Eight rows of three taps ran at less than half the speed of four.
        let most = if window == 3 { 4 } else { sums };
        let rows = (sums / window / vectors).min(self.rows / split).min(most).max(1);
        let apart = (if window == 3 { 12 } else { 8 } / (window * rows * vectors)).max(1);
        let taps: usize = self.taps.iter().product();
        let out_rows = self.batch * self.out_dims[0] * self.out_dims[1];
        let part = taps * self.rows * self.columns;
        let tiles = taps / window * (self.rows / split).div_ceil(rows) * (blocks / vectors);
        if tiles == 0 {
            return Ok(());
        }
        let (groups, splits) = match caps.cores {
            Some(cores) => {
                let cores = cores as usize;
                let groups = tiles.min(cores);
                // Few tiles do not share out evenly among the cores; rows do, at the price of adding the parts.
                let uneven = tiles.div_ceil(groups) * groups * 100 > tiles * 103;
                match uneven && part <= Self::SMALL_GRADIENT {
                    true => (1, cores.min(out_rows).max(1)),
                    false => (groups, (cores / groups).min(out_rows).max(1)),
                }
            }
            None => (tiles, 4096usize.div_ceil(tiles).min(out_rows).max(1)),
        };
        let size = self.dense.buffer().dtype().size();
        let row_bytes =
            (self.in_dims[2] * self.step[0] * self.step[1] * self.rows + self.out_dims[2] * self.columns) * size;
        let chunk = match caps.cores {
            Some(_) => (Self::CHUNK_BYTES / row_bytes.max(1)).clamp(1, out_rows.max(1)),
            None => out_rows.max(1),
        };
        let parts = match splits > 1 || self.column_stride != 1 {
            true => Some(context.empty(splits * part, Dtype::F32)?),
            false => None,
        };
        // Into the parts tightly, else straight to where the sums belong.
        let (first, tap_stride, row_stride) = match parts {
            Some(_) => (0, self.rows * self.columns, self.columns),
            None => (self.first, self.tap_stride, self.row_stride),
        };
        let plan = Plan {
            rows,
            split,
            vectors,
            apart,
            window,
            ragged: !(self.rows / split).is_multiple_of(rows),
            single: caps.cores.is_none(),
        };
        let shape = ShapeLaunch::new(
            self.rows,
            self.columns,
            self.in_dims[0],
            self.in_dims[1],
            self.in_dims[2],
            self.out_dims[0],
            self.out_dims[1],
            self.out_dims[2],
            self.taps[0],
            self.taps[1],
            self.taps[2],
            self.step[0],
            self.step[1],
            self.step[2],
            self.pad[0],
            self.pad[1],
            self.pad[2],
            out_rows,
            chunk,
            splits,
            groups,
            part / lanes,
            first,
            tap_stride,
            row_stride,
        );
        let units = caps.cube_units();
        context.launch(OPERATION, Work::units(groups * splits, units), |client, count, dim| {
            weight_gradient_kernel::launch(
                client,
                count,
                dim,
                lanes * split,
                split,
                lanes,
                self.strided.buffer().arg(),
                self.dense.buffer().arg(),
                parts.as_ref().unwrap_or(self.gradient).arg(),
                shape,
                plan,
                self.dense.buffer().dtype().elem(),
            )
        })?;
        match parts {
            Some(parts) => self.add_parts(context, &parts, splits),
            None => Ok(()),
        }
    }

    /// Adds `parts`, f32 `[splits, tap, row, column]`, to the gradient.
    fn add_parts(&self, context: &Context, parts: &Buffer, splits: usize) -> Result<(), KernelError> {
        let taps: usize = self.taps.iter().product();
        let units = context.caps().cube_units();
        context.launch(
            OPERATION,
            Work::units(context.caps().strips(taps * self.rows, 1), units),
            |client, count, dim| {
                add_parts_kernel::launch(
                    client,
                    count,
                    dim,
                    parts.arg(),
                    self.gradient.arg(),
                    taps,
                    self.rows,
                    self.columns,
                    splits,
                    self.first,
                    self.tap_stride,
                    self.row_stride,
                    self.column_stride,
                )
            },
        )
    }
}
