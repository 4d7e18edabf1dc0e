//! The gradient of the weights: a register tile of a few `row` channels times a few vectors of `column`
//! channels, summed over output positions.
//!
//! `dw[tap, r, c] = sum over outputs j of strided[j * step + tap - pad, r] * dense[j, c]`
//!
//! For a convolution `strided` is the input and `dense` the output's gradient; for a transposed convolution
//! it is the other way round, and the result is stored transposed.
//!
//! The sums run over `chunk`s of rows that stay in a core's cache while all tiles pass over them. Where
//! tiles are fewer than units, the rows are split; each split sums into a part of its own, and a second
//! launch adds the parts in a fixed order.

use crate::block::strip;
use crate::conv3d::gather::widest_vector;
use crate::{Buffer, Context, Dtype, KernelError};
use cubecl::prelude::*;

const OPERATION: &str = "weight gradient";

/// What is compiled into one instance of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Plan {
    taps: [usize; 3],
    step: [usize; 3],
    pad: [usize; 3],
    /// Channels of the strided tensor in a tile.
    rows: usize,
    /// Vectors of channels of the dense tensor in a tile.
    vectors: usize,
}

/// One weight gradient. Axes are depth, height, width.
pub(crate) struct WeightGradient<'a> {
    pub batch: usize,
    /// `[batch, in_dims, rows]`.
    pub strided: &'a Buffer,
    pub rows: usize,
    pub in_dims: [usize; 3],
    /// `[batch, out_dims, columns]`.
    pub dense: &'a Buffer,
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
    /// Rows of outputs: batch * depth * height.
    out_rows: usize,
    /// Rows that pass through the cache together.
    chunk: usize,
    splits: usize,
    /// Units that share the tiles of one split.
    groups: usize,
    /// Length of one split's part.
    part: usize,
    first: usize,
    tap_stride: usize,
    row_stride: usize,
    column_stride: usize,
}

#[cube(launch)]
fn weight_gradient_kernel<E: Float, N: Size>(
    strided: &[E],
    dense: &[Vector<E, N>],
    gradient: &mut [f32],
    s: Shape,
    #[comptime] plan: Plan,
    #[define(E)] _dtype: ElemType,
) {
    let vectors = comptime!(plan.vectors);
    let tile_rows = comptime!(plan.rows);
    let lanes = N::value();
    let taps = comptime!(plan.taps[0] * plan.taps[1] * plan.taps[2]);
    let row_blocks = s.rows.div_ceil(tile_rows);
    let column_blocks = s.columns / (lanes * vectors);
    let tiles = taps * row_blocks * column_blocks;

    if ABSOLUTE_POS < s.splits * s.groups {
        let split = ABSOLUTE_POS / s.groups;
        let group = ABSOLUTE_POS % s.groups;
        let tiles_each = tiles.div_ceil(s.groups);
        let first_tile = (group * tiles_each).min(tiles);
        let last_tile = (first_tile + tiles_each).min(tiles);
        let rows_each = s.out_rows.div_ceil(s.splits);
        let first_row = (split * rows_each).min(s.out_rows);
        let last_row = (first_row + rows_each).min(s.out_rows);
        let chunks = (last_row - first_row).div_ceil(s.chunk).max(1);

        for chunk in 0..chunks {
            let from = first_row + chunk * s.chunk;
            let to = (from + s.chunk).min(last_row);
            for tile in first_tile..last_tile {
                let column_block = tile % column_blocks;
                let rest = tile / column_blocks;
                let r0 = rest % row_blocks * tile_rows;
                let tap = rest / row_blocks;
                let tw = tap % comptime!(plan.taps[2]);
                let th = tap / comptime!(plan.taps[2]) % comptime!(plan.taps[1]);
                let td = tap / comptime!(plan.taps[2] * plan.taps[1]);

                // Outputs whose strided position lies inside along the width.
                let step = comptime!(plan.step[2]);
                let pad = comptime!(plan.pad[2]);
                let low = select(tw >= pad, 0usize, (pad - tw).div_ceil(step));
                let high = ((s.in_width + pad + step - 1 - tw) / step).min(s.out_width);

                let mut sums = Array::<Vector<f32, N>>::new(comptime!(tile_rows * vectors));
                for row in from..to {
                    let oh = row % s.out_height;
                    let plane = row / s.out_height;
                    let od = plane % s.out_depth;
                    let n = plane / s.out_depth;
                    let id = od * comptime!(plan.step[0]) + td;
                    let ih = oh * comptime!(plan.step[1]) + th;
                    let valid = id >= comptime!(plan.pad[0])
                        && id < s.in_depth + comptime!(plan.pad[0])
                        && ih >= comptime!(plan.pad[1])
                        && ih < s.in_height + comptime!(plan.pad[1]);
                    if valid {
                        let plane = n * s.in_depth + id - comptime!(plan.pad[0]);
                        let in_row = (plane * s.in_height + ih - comptime!(plan.pad[1])) * s.in_width;
                        for ow in low..high {
                            let position = (in_row + ow * step + tw - pad) * s.rows;
                            let d = (row * s.out_width + ow) * (s.columns / lanes) + column_block * vectors;
                            #[unroll]
                            for r in 0..tile_rows {
                                // The last tile repeats the last channel; its surplus sums are not stored.
                                let value = f32::cast_from(strided[position + (r0 + r).min(s.rows - 1)]);
                                #[unroll]
                                for v in 0..vectors {
                                    sums[r * vectors + v] =
                                        fma(Vector::new(value), Vector::cast_from(dense[d + v]), sums[r * vectors + v]);
                                }
                            }
                        }
                    }
                }

                let base = s.first + split * s.part + tap * s.tap_stride;
                #[unroll]
                for r in 0..tile_rows {
                    if r0 + r < s.rows {
                        #[unroll]
                        for v in 0..vectors {
                            #[unroll]
                            for l in 0..lanes {
                                let column = (column_block * vectors + v) * lanes + l;
                                let i = base + (r0 + r) * s.row_stride + column * s.column_stride;
                                let sum = sums[r * vectors + v].extract(l);
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

/// Adds the parts of all splits into the part that was asked for.
#[cube(launch)]
fn add_parts_kernel(parts: &[f32], gradient: &mut [f32], s: Shape, taps: usize) {
    let (low, high) = strip(taps * s.rows * s.columns);
    for i in low..high {
        let column = i % s.columns;
        let row = i / s.columns % s.rows;
        let tap = i / s.columns / s.rows;
        let at = s.first + tap * s.tap_stride + row * s.row_stride + column * s.column_stride;
        let mut sum = 0.0f32;
        for split in 0..s.splits {
            sum += parts[split * s.part + at];
        }
        gradient[at] = sum;
    }
}

impl WeightGradient<'_> {
    /// Bytes of both tensors that a chunk of rows may take of a core's second-level cache.
    const CHUNK_BYTES: usize = 192 << 10;

    /// Launches the kernel, and the sum over splits where there are any.
    pub fn launch(&self, context: &Context) -> Result<(), KernelError> {
        let caps = context.caps();
        let lanes = widest_vector(caps, self.columns);
        let blocks = self.columns / lanes;
        let vectors = match blocks {
            b if b % 2 == 0 => 2,
            b if b % 3 == 0 => 3,
            _ => 1,
        };
        let rows = (caps.registers / 2 / vectors).min(self.rows.next_power_of_two()).clamp(1, 8);
        let taps: usize = self.taps.iter().product();
        let out_rows = self.batch * self.out_dims[0] * self.out_dims[1];
        let tiles = taps * self.rows.div_ceil(rows) * (blocks / vectors);
        if tiles == 0 {
            return Ok(());
        }
        let (groups, splits) = match caps.cores {
            Some(cores) => {
                let groups = tiles.min(cores as usize);
                (groups, (cores as usize / groups).min(out_rows).max(1))
            }
            None => (tiles, 4096usize.div_ceil(tiles).min(out_rows).max(1)),
        };
        let size = self.dense.dtype().size();
        let row_bytes =
            (self.in_dims[2] * self.step[0] * self.step[1] * self.rows + self.out_dims[2] * self.columns) * size;
        let chunk = match caps.cores {
            Some(_) => (Self::CHUNK_BYTES / row_bytes.max(1)).clamp(1, out_rows.max(1)),
            None => out_rows.max(1),
        };
        let part = self.gradient.len();
        let parts = if splits > 1 { Some(context.empty(splits * part, Dtype::F32)?) } else { None };
        let plan = Plan { taps: self.taps, step: self.step, pad: self.pad, rows, vectors };
        let shape = || {
            ShapeLaunch::new(
                self.rows,
                self.columns,
                self.in_dims[0],
                self.in_dims[1],
                self.in_dims[2],
                self.out_dims[0],
                self.out_dims[1],
                self.out_dims[2],
                out_rows,
                chunk,
                splits,
                groups,
                part,
                self.first,
                self.tap_stride,
                self.row_stride,
                self.column_stride,
            )
        };
        let units = caps.cube_units();
        weight_gradient_kernel::launch(
            context.client(),
            context.grid(OPERATION, groups * splits, units)?,
            CubeDim::new_1d(units),
            lanes,
            self.strided.arg(),
            self.dense.arg(),
            parts.as_ref().unwrap_or(self.gradient).arg(),
            shape(),
            plan,
            self.dense.dtype().elem(),
        );
        context.launched();
        if let Some(parts) = parts {
            add_parts_kernel::launch(
                context.client(),
                context.grid(OPERATION, caps.strips(taps * self.rows * self.columns, 4), units)?,
                CubeDim::new_1d(units),
                parts.arg(),
                self.gradient.arg(),
                shape(),
                taps,
            );
            context.launched();
        }
        Ok(())
    }
}
