//! Everything that gathers (see [`Gather`]) on GPUs without tensor cores for the type, as an implicit matrix product in f32:
//! rows are output voxels, columns output channels, and the sums run over inputs, taps and channels, in the order of the
//! packed weights.
//!
//! A cube computes a block of 128 voxels by 64 channels, or 256 by 32. Of both factors it puts [`DEPTH`] channels of one tap
//! into shared memory at a time, so that each number is read from global memory once a block and tap, by whole
//! sectors; each unit then multiplies 8 voxels by 8 channels in registers, of which it reads 16 numbers for 64 products.
//!
//! The direct kernel reads global memory for each tap of each unit instead, and neighbouring units read from addresses a tile
//! apart.

use super::gather::{Gather, OPERATION, Shape};
use crate::{Caps, Context, KernelError};
use cubecl::prelude::*;

/// Units of a cube.
const UNITS: usize = 128;
/// Voxels of a unit, and its vectors of [`LANES`] channels.
const VOXELS: usize = 8;
const VECTORS: usize = 2;
const LANES: usize = 4;
/// Channels of the sums between two barriers.
const DEPTH: usize = 8;
/// Taps along an axis, at most.
const AXIS_BITS: u32 = 3;

/// What is compiled into one instance of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Plan {
    /// Units along the columns of a block.
    across: usize,
}

impl Plan {
    /// `None` on CPUs, where shared memory or a cube is too small, and where channels do not fill vectors or half of a block.
    pub fn choose(caps: &Caps, gathered: [usize; 2], channels_out: usize) -> Option<Self> {
        let columns = if channels_out.is_multiple_of(64) || channels_out > 96 { 64 } else { 32 };
        let plan = Self { across: columns / (VECTORS * LANES) };
        let fits = caps.cores.is_none()
            && caps.lanes >= LANES
            && caps.max_units as usize >= UNITS
            && plan.shared_bytes() <= caps.shared_memory
            && gathered.iter().all(|channels| channels.is_multiple_of(LANES))
            && channels_out.is_multiple_of(LANES)
            && channels_out >= 16;
        fits.then_some(plan)
    }

    fn down(&self) -> usize {
        UNITS / self.across
    }

    fn rows(&self) -> usize {
        self.down() * VOXELS
    }

    fn columns(&self) -> usize {
        self.across * VECTORS * LANES
    }

    fn shared_bytes(&self) -> usize {
        DEPTH * (self.rows() + self.columns()) * 4
    }
}

/// One cube computes one block. Blocks of the same voxels follow each other, so that their input stays in the cache.
#[cube(launch)]
fn tiled_kernel<E: Float, N: Size>(
    x: &[Vector<E, N>],
    second: &[Vector<E, N>],
    weights: &[Vector<f32, N>],
    bias: &[Vector<f32, N>],
    y: &mut [Vector<E, N>],
    s: Shape,
    #[comptime] plan: Plan,
    #[comptime] second_input: bool,
    #[comptime] with_bias: bool,
    #[define(E)] _dtype: ElemType,
) {
    let rows = s.batch * s.count_depth * s.count_height * s.count_width;
    let column_blocks = s.channels_out.div_ceil(comptime!(plan.columns()));
    let first_row = CUBE_POS / column_blocks * comptime!(plan.rows());
    let first_column = CUBE_POS % column_blocks * comptime!(plan.columns());
    if first_row >= rows {
        terminate!();
    }
    let mut left = Shared::<[f32]>::new_slice(comptime!(DEPTH * plan.rows()));
    let mut right = Shared::<[Vector<f32, N>]>::new_aligned_slice(comptime!(DEPTH * plan.columns() / LANES), 16usize);
    let mut sums = Array::<Vector<f32, N>>::new(comptime!(VOXELS * VECTORS));
    #[unroll]
    for i in 0..comptime!(VOXELS * VECTORS) {
        sums[i] = Vector::new(0.0f32);
    }

    // Of the rows that this unit loads: where the voxel under the first tap lies, as if there were voxels all around (below
    // zero wraps around), and for each axis which taps are inside.
    let loads = comptime!(plan.rows() / UNITS);
    let mut corner = Array::<u32>::new(loads);
    let mut inside = Array::<u32>::new(loads);
    #[unroll]
    for i in 0..loads {
        let row = first_row + UNIT_POS as usize + comptime!(i * UNITS);
        let (n, jd, jh, jw) = place(row, &s);
        let id = (jd * s.in_step_depth) as u32 - s.pad_depth as u32;
        let ih = (jh * s.in_step_height) as u32 - s.pad_height as u32;
        let iw = (jw * s.in_step_width) as u32 - s.pad_width as u32;
        let plane = (n * s.in_depth) as u32 + id;
        corner[i] = (plane * s.in_height as u32 + ih) * s.in_width as u32 + iw;
        let mut bits = 0u32.runtime();
        #[unroll]
        for tap in 0..AXIS_BITS {
            bits |= u32::cast_from(id + tap < s.in_depth as u32) << tap;
            bits |= u32::cast_from(ih + tap < s.in_height as u32) << (tap + AXIS_BITS);
            bits |= u32::cast_from(iw + tap < s.in_width as u32) << (tap + 2 * AXIS_BITS);
        }
        inside[i] = select(row < rows, bits, 0u32);
    }

    let taps = s.taps_depth * s.taps_height * s.taps_width;
    let channels = s.channels;
    add_input::<E, N>(
        &mut sums,
        x,
        weights,
        &mut left,
        &mut right,
        &corner,
        &inside,
        &s,
        channels,
        0usize,
        first_column,
        plan,
    );
    if comptime!(second_input) {
        let first_weight = taps * channels;
        let channels = s.second_channels;
        add_input::<E, N>(
            &mut sums,
            second,
            weights,
            &mut left,
            &mut right,
            &corner,
            &inside,
            &s,
            channels,
            first_weight,
            first_column,
            plan,
        );
    }

    let unit_row = UNIT_POS as usize / plan.across;
    let unit_column = UNIT_POS as usize % plan.across;
    #[unroll]
    for i in 0..VOXELS {
        let row = first_row + unit_row + comptime!(i * plan.down());
        if row < rows {
            let (n, jd, jh, jw) = place(row, &s);
            let od = jd * s.out_step_depth + s.out_offset_depth;
            let oh = jh * s.out_step_height + s.out_offset_height;
            let ow = jw * s.out_step_width + s.out_offset_width;
            let position = ((n * s.out_depth + od) * s.out_height + oh) * s.out_width + ow;
            #[unroll]
            for v in 0..VECTORS {
                let column = first_column / LANES + unit_column + comptime!(v * plan.across);
                if column < s.channels_out / LANES {
                    let mut value = sums[comptime!(i * VECTORS + v)];
                    if comptime!(with_bias) {
                        value += bias[column];
                    }
                    y[position * (s.channels_out / LANES) + column] = Vector::cast_from(value);
                }
            }
        }
    }
}

/// Sample and position of an output of this launch.
#[cube]
fn place(row: usize, s: &Shape) -> (usize, usize, usize, usize) {
    let line = row / s.count_width;
    let plane = line / s.count_height;
    (plane / s.count_depth, plane % s.count_depth, line % s.count_height, row % s.count_width)
}

/// Adds the products of one input of `channels` channels, whose weights begin at row `first_weight`, to the sums.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel; a struct of slices is no kernel argument")]
fn add_input<E: Float, N: Size>(
    sums: &mut Array<Vector<f32, N>>,
    x: &[Vector<E, N>],
    weights: &[Vector<f32, N>],
    left: &mut [f32],
    right: &mut [Vector<f32, N>],
    corner: &Array<u32>,
    inside: &Array<u32>,
    s: &Shape,
    channels: usize,
    first_weight: usize,
    first_column: usize,
    #[comptime] plan: Plan,
) {
    let unit = UNIT_POS as usize;
    let unit_row = unit / plan.across;
    let unit_column = unit % plan.across;
    let rows = comptime!(plan.rows());
    let columns = comptime!(plan.columns() / LANES);
    let taps = s.taps_depth * s.taps_height * s.taps_width;
    for tap in 0..taps {
        let tw = (tap % s.taps_width) as u32;
        let th = (tap / s.taps_width % s.taps_height) as u32;
        let td = (tap / s.taps_width / s.taps_height) as u32;
        let ahead = (td * s.in_height as u32 + th) * s.in_width as u32 + tw;
        for channel in range_stepped(0usize, channels, DEPTH) {
            #[unroll]
            for i in 0..comptime!(plan.rows() / UNITS) {
                let bits = inside[i];
                let all = (bits >> td) & (bits >> (th + AXIS_BITS)) & (bits >> (tw + 2 * AXIS_BITS)) & 1;
                let from = (corner[i] + ahead) as usize * (channels / LANES);
                #[unroll]
                for v in 0..comptime!(DEPTH / LANES) {
                    let c = channel + comptime!(v * LANES);
                    let mut value = Vector::<f32, N>::new(0.0f32);
                    if all == 1 && c < channels {
                        value = Vector::cast_from(x[from + c / LANES]);
                    }
                    #[unroll]
                    for lane in 0..LANES {
                        left[comptime!((v * LANES + lane) * rows + i * UNITS) + unit] = value.extract(lane);
                    }
                }
            }
            let mut slot = unit;
            while slot < comptime!(DEPTH * columns) {
                let c = channel + slot / columns;
                let column = first_column / LANES + slot % columns;
                let mut value = Vector::<f32, N>::new(0.0f32);
                if c < channels && column < s.channels_out / LANES {
                    value = weights[(first_weight + tap * channels + c) * (s.channels_out / LANES) + column];
                }
                right[slot] = value;
                slot += UNITS;
            }
            sync_cube();

            for d in 0..DEPTH {
                let mut factors = Array::<Vector<f32, N>>::new(VECTORS);
                #[unroll]
                for v in 0..VECTORS {
                    factors[v] = right[d * columns + unit_column + comptime!(v * plan.across)];
                }
                #[unroll]
                for i in 0..VOXELS {
                    let value = Vector::<f32, N>::new(left[d * rows + unit_row + comptime!(i * plan.down())]);
                    #[unroll]
                    for v in 0..VECTORS {
                        let sum = comptime!(i * VECTORS + v);
                        sums[sum] = fma(value, factors[v], sums[sum]);
                    }
                }
            }
            sync_cube();
        }
    }
}

/// Launches the kernel.
pub(crate) fn launch(gather: &Gather, plan: Plan, context: &Context) -> Result<(), KernelError> {
    let rows = gather.batch * gather.count.iter().product::<usize>();
    let blocks = rows.div_ceil(plan.rows()) * gather.channels_out.div_ceil(plan.columns());
    if blocks == 0 {
        return Ok(());
    }
    let (second, _) = gather.second.unwrap_or((gather.input, 0));
    tiled_kernel::launch(
        context.client(),
        context.grid(OPERATION, blocks, 1)?,
        CubeDim::new_1d(UNITS as u32),
        LANES,
        gather.input.buffer().arg(),
        second.buffer().arg(),
        gather.weights.arg(),
        gather.bias.unwrap_or(gather.weights).arg(),
        gather.output.arg(),
        gather.shape(1),
        plan,
        gather.second.is_some(),
        gather.bias.is_some(),
        gather.input.buffer().dtype().elem(),
    );
    context.launched();
    Ok(())
}
