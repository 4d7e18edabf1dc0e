//! Sums over the rows of a channels-last array, in a fixed order and without atomics.
//!
//! Stage 1: every task walks the rows of one part of one sample and writes one partial sum per channel.
//! Stage 2: the partial sums of a sample's parts are added. Only the first stage reads the activations: each
//! cache line once.
//!
//! A single f32 sum over 10^7 rows would lose four digits. So rows are summed in blocks in registers, and the
//! blocks' sums are added to the task's partial sum, which stays in the first-level cache.
//!
//! Rows narrower than a few vectors waste lanes, and channel counts such as 3 fit no vector at all. So
//! consecutive voxels are read as one longer row: with 3 channels and chunks of 32 elements, 32 voxels are one
//! row of 96 elements, element `e` of which belongs to channel `e % 3`. Stage 2 folds them.

use crate::block::{only, strip};
use crate::{Buffer, Caps, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// Vectors of a row that a CPU core sums at the same time: 4 hide the latency of additions and are two cache
/// lines with AVX2. Units of a GPU are many, one vector each.
const TILE: usize = 4;
/// Rows that are summed in registers at a stretch, at most.
const BLOCK_ROWS: usize = 256;
/// Elements of a block on the CPU: f32 rows of them fill half of a 64 KiB piece of the second-level cache.
const BLOCK_ELEMENTS: usize = 8192;
/// Rows that a GPU's unit should have, and how many units keep a GPU busy.
const GPU_ROWS: usize = 32;
const GPU_UNITS: usize = 1 << 16;
/// Partial sums that one unit adds up in a row.
const FAN_IN: usize = 64;

/// How `[batch, voxels, channels]` is read: rows of `width` elements, every sample's rows divided into `parts`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Walk {
    pub batch: usize,
    /// Rows of a sample.
    pub rows: usize,
    /// Elements of a row: `channels` of one or several consecutive voxels.
    pub width: usize,
    /// Elements of a vector, and vectors that a unit works on at a time. `lanes * tile` divides `width`.
    pub lanes: usize,
    pub tile: usize,
    /// Tasks of a sample.
    pub parts: usize,
    /// Rows of a block.
    pub block: usize,
    /// CPU: tasks own contiguous rows and all of their elements. GPU: neighbouring tasks own neighbouring rows,
    /// and each unit one vector of them, so that neighbouring units read neighbouring memory.
    pub chunked: bool,
}

impl Walk {
    /// `streams` is the number of arrays that are read together.
    pub fn new(batch: usize, voxels: usize, channels: usize, streams: usize, caps: &Caps) -> Self {
        let chunked = caps.cores.is_some();
        let lanes_max = 1 << caps.lanes.ilog2();
        let mut chunk = if chunked { TILE * lanes_max } else { lanes_max };
        while !voxels.is_multiple_of(voxels_per_row(channels, chunk)) {
            chunk /= 2;
        }
        let merged = voxels_per_row(channels, chunk);
        let (rows, width) = (voxels / merged, channels * merged);
        let lanes = chunk.min(lanes_max);
        let parts = match caps.cores {
            Some(cores) => cores as usize,
            None => rows.div_ceil(GPU_ROWS).min(GPU_UNITS.div_ceil(batch * (width / lanes))),
        };
        // No part without rows.
        let parts = rows.div_ceil(rows.div_ceil(parts.clamp(1, rows)));
        let block = (BLOCK_ELEMENTS / (width * streams)).clamp(16, BLOCK_ROWS);
        Self { batch, rows, width, lanes, tile: chunk / lanes, parts, block, chunked }
    }

    /// The same with `times` the rows in a block.
    pub fn with_longer_blocks(self, times: usize) -> Self {
        Self { block: self.block * times, ..self }
    }

    pub fn tasks(&self) -> usize {
        self.batch * self.parts
    }

    /// Whether a row is more than one voxel, so that its elements belong to channels cyclically.
    pub fn cyclic(&self, channels: usize) -> bool {
        self.width != channels
    }

    pub fn arg(&self) -> PathLaunch {
        PathLaunch::new(self.tasks(), self.parts, self.rows, self.width / self.lanes, self.block)
    }

    /// On the CPU the units of one cube share the tasks.
    pub fn work(&self) -> Work {
        Work::Items(if self.chunked { 1 } else { self.tasks() * (self.width / self.lanes / self.tile) })
    }
}

/// Voxels of a row that is to be a multiple of `chunk` elements; `chunk` is a power of two.
fn voxels_per_row(channels: usize, chunk: usize) -> usize {
    chunk / chunk.min(1 << channels.trailing_zeros())
}

/// GPUs count elements with 32 bits, and rounding up must not wrap either.
pub(crate) fn check_count(context: &Context, operation: &'static str, elements: usize) -> Result<(), KernelError> {
    let (actual, limit) = (elements as u64, u64::from(u32::MAX / 2));
    if context.caps().cores.is_none() && actual > limit {
        return Err(KernelError::Limit { operation, what: "number of elements", actual, limit });
    }
    Ok(())
}

// ------------------------------------------------------------------------------------------------ kernels

/// [`Walk`] inside of kernels. `groups` is the number of vectors of a row.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Path {
    pub tasks: usize,
    pub parts: usize,
    pub rows: usize,
    pub groups: usize,
    pub block: usize,
}

/// What this unit owns: tasks `.0 .. .1`, and of their rows the tiles `.2 .. .3`. Surplus units of a GPU end here.
#[cube]
pub(crate) fn share(path: &Path, #[comptime] tile: usize, #[comptime] chunked: bool) -> (usize, usize, usize, usize) {
    let tiles = path.groups / tile;
    if comptime!(chunked) {
        let (low, high) = strip(path.tasks);
        (low, high, 0usize.runtime(), tiles)
    } else {
        let (low, high) = only(ABSOLUTE_POS / tiles, path.tasks);
        let at = ABSOLUTE_POS % tiles;
        (low, high, at, at + 1)
    }
}

/// The rows of a task: first row (counted over all samples), distance between rows, number of rows (at least one).
#[cube]
pub(crate) fn rows_of(task: usize, path: &Path, #[comptime] chunked: bool) -> (usize, usize, usize) {
    let part = task % path.parts;
    let base = task / path.parts * path.rows;
    if comptime!(chunked) {
        let each = (path.rows + path.parts - 1) / path.parts;
        let low = (part * each).min(path.rows);
        (base + low, 1usize.runtime(), (low + each).min(path.rows) - low)
    } else {
        (base + part, path.parts, (path.rows - part + path.parts - 1) / path.parts)
    }
}

/// `partial` is `[tasks, width]`.
#[cube(launch_unchecked)]
fn channel_sum_kernel<E: Float, N: Size>(
    x: &[Vector<E, N>],
    partial: &mut [Vector<f32, N>],
    path: &Path,
    #[comptime] tile: usize,
    #[comptime] chunked: bool,
    #[define(E)] _dtype: ElemType,
) {
    let (task_low, task_high, tile_low, tile_high) = share(path, tile, chunked);
    for task in task_low..task_high {
        let (first, step, count) = rows_of(task, path, chunked);
        for g in tile_low * tile..tile_high * tile {
            partial[task * path.groups + g] = Vector::zeroed();
        }
        for low in range_stepped(0, count, path.block) {
            let high = (low + path.block).min(count);
            for at in tile_low..tile_high {
                let mut sum = Array::<Vector<f32, N>>::new(tile);
                for i in low..high {
                    let from = (first + i * step) * path.groups + at * tile;
                    #[unroll]
                    for t in 0..tile {
                        sum[t] += Vector::cast_from(x[from + t]);
                    }
                }
                let to = task * path.groups + at * tile;
                #[unroll]
                for t in 0..tile {
                    partial[to + t] += sum[t];
                }
            }
        }
    }
}

/// `[outer, parts, width]` -> `[outer, ceil(parts / fan), width]`: adds `fan` neighbouring parts.
#[cube(launch_unchecked)]
fn add_parts_kernel(
    partial: &[f32],
    out: &mut [f32],
    outer: usize,
    parts: usize,
    width: usize,
    #[comptime] fan: usize,
) {
    let kept = (parts + fan - 1) / fan;
    let (low, high) = strip(outer * kept * width);
    for i in low..high {
        let row = i / width;
        let first = row % kept * fan;
        let base = row / kept * parts;
        let mut sum = 0.0f32;
        for part in first..(first + fan).min(parts) {
            sum += partial[(base + part) * width + i % width];
        }
        out[i] = sum;
    }
}

/// `[parts, width]` -> `[channels]`.
#[cube(launch_unchecked)]
fn fold_kernel(partial: &[f32], out: &mut [f32], parts: usize, width: usize, channels: usize) {
    let (low, high) = strip(channels);
    for channel in low..high {
        let mut sum = 0.0f32;
        for part in 0..parts {
            for e in range_stepped(channel, width, channels) {
                sum += partial[part * width + e];
            }
        }
        out[channel] = sum;
    }
}

// ----------------------------------------------------------------------------------------------- launches

/// Adds neighbouring parts of `partial [batch, parts, width]` until no more than 64 are left (on a GPU there are
/// thousands). Returns them and their number.
pub(crate) fn gather_parts(
    context: &Context,
    operation: &'static str,
    mut partial: Buffer,
    batch: usize,
    mut parts: usize,
    width: usize,
) -> Result<(Buffer, usize), KernelError> {
    while parts > FAN_IN {
        let kept = parts.div_ceil(FAN_IN);
        let out = context.empty(batch * kept * width, Dtype::F32)?;
        context.launch(operation, Work::Items(out.len()), |client, count, dim| {
            // SAFETY: `partial` and `out` have the lengths that the kernel derives from the same scalars.
            unsafe {
                add_parts_kernel::launch_unchecked(
                    client,
                    count,
                    dim,
                    partial.arg(),
                    out.arg(),
                    batch,
                    parts,
                    width,
                    FAN_IN,
                )
            }
        })?;
        (partial, parts) = (out, kept);
    }
    Ok((partial, parts))
}

/// `out[channel] = sum of x[row, channel] over rows`: the gradient of a bias.
///
/// `x` is `[rows, channels]` in f32, f16 or bf16, `out` f32 `[channels]`.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if the buffers do not fit, [`KernelError::Limit`] beyond the
/// device's index range.
pub fn channel_sum(
    context: &Context,
    rows: usize,
    channels: usize,
    x: &Buffer,
    out: &Buffer,
) -> Result<(), KernelError> {
    const OPERATION: &str = "channel sum";
    if rows == 0 || channels == 0 {
        return Err(KernelError::shape(OPERATION, "rows and channels", "at least 1", (rows, channels)));
    }
    if !x.dtype().is_float() {
        return Err(KernelError::Dtype { operation: OPERATION, what: "x", expected: "floats", actual: x.dtype() });
    }
    x.check(OPERATION, "x", rows * channels, x.dtype())?;
    out.check(OPERATION, "out", channels, Dtype::F32)?;
    check_count(context, OPERATION, x.len())?;

    let walk = Walk::new(1, rows, channels, 1, context.caps());
    let partial = context.empty(walk.parts * walk.width, Dtype::F32)?;
    context.launch(OPERATION, walk.work(), |client, count, dim| {
        // SAFETY: the walk covers `rows * channels` elements of `x` and `parts * width` of `partial`, their lengths.
        unsafe {
            channel_sum_kernel::launch_unchecked(
                client,
                count,
                dim,
                walk.lanes,
                x.arg(),
                partial.arg(),
                walk.arg(),
                walk.tile,
                walk.chunked,
                x.dtype().elem(),
            )
        }
    })?;
    let (partial, parts) = gather_parts(context, OPERATION, partial, 1, walk.parts, walk.width)?;
    context.launch(OPERATION, Work::Items(channels), |client, count, dim| {
        // SAFETY: `partial` holds `parts * width` elements and `out` `channels`.
        unsafe {
            fold_kernel::launch_unchecked(client, count, dim, partial.arg(), out.arg(), parts, walk.width, channels)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_merged_until_a_chunk_divides_them() {
        assert_eq!(voxels_per_row(32, 32), 1);
        assert_eq!(voxels_per_row(320, 32), 1);
        assert_eq!(voxels_per_row(3, 32), 32);
        assert_eq!(voxels_per_row(12, 32), 8);
        assert_eq!(voxels_per_row(33, 1), 1);
    }

    fn caps(cores: Option<u32>, lanes: usize) -> Caps {
        Caps {
            cores,
            lanes,
            registers: 16,
            plane: None,
            shared_memory: 0,
            max_units: 1024,
            max_cubes: [65535; 2],
            max_buffer: 1 << 40,
            memory: None,
            f16: false,
            bf16: false,
            tensor_cores: vec![],
        }
    }

    #[test]
    fn walks_cover_the_array_and_every_part_has_rows() {
        for caps in [caps(Some(1), 8), caps(Some(7), 16), caps(Some(96), 8), caps(None, 4)] {
            for channels in [1, 2, 3, 5, 12, 20, 32, 33, 320] {
                for voxels in (1..100).chain([4096, 4097, 1 << 21]) {
                    let walk = Walk::new(2, voxels, channels, 2, &caps);
                    assert_eq!(walk.rows * walk.width, voxels * channels, "{walk:?}");
                    assert_eq!(walk.width % (walk.lanes * walk.tile), 0, "{walk:?}");
                    assert_eq!(walk.width % channels, 0, "{walk:?}");
                    assert!(walk.parts >= 1 && walk.block >= 1 && walk.lanes <= caps.lanes, "{walk:?}");
                    let each = walk.rows.div_ceil(walk.parts);
                    assert!((walk.parts - 1) * each < walk.rows, "a part without rows: {walk:?}");
                }
            }
        }
        let walk = Walk::new(1, 36_864, 32, 1, &caps(Some(2), 8));
        assert_eq!((walk.rows, walk.width, walk.lanes, walk.tile, walk.parts), (36_864, 32, 8, 4, 2));
        let walk = Walk::new(1, 1 << 18, 3, 1, &caps(Some(2), 8));
        assert_eq!((walk.rows, walk.width, walk.lanes, walk.tile), (1 << 13, 96, 8, 4));
    }
}
