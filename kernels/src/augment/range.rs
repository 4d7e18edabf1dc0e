//! The least and the largest value of every channel: reads the image once, in a fixed division.

use super::patch::{OPERATION, Patch};
use crate::block::strip;
use crate::reduce::{Path, Walk, check_count, rows_of, share};
use crate::{Buffer, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// Parts that one unit looks through in a row.
const FAN_IN: usize = 64;

/// `partial` is `[tasks, 2, width]`: minimum, maximum.
#[cube(launch_unchecked)]
fn range_kernel<N: Size>(
    x: &[Vector<f32, N>],
    partial: &mut [Vector<f32, N>],
    path: &Path,
    #[comptime] tile: usize,
    #[comptime] chunked: bool,
) {
    let (task_low, task_high, tile_low, tile_high) = share(path, tile, chunked);
    for task in task_low..task_high {
        let (first, step, count) = rows_of(task, path, chunked);
        for at in tile_low..tile_high {
            let mut least = Array::<Vector<f32, N>>::new(tile);
            let mut largest = Array::<Vector<f32, N>>::new(tile);
            #[unroll]
            for t in 0..tile {
                least[t] = x[first * path.groups + at * tile + t];
                largest[t] = least[t];
            }
            for i in 1..count {
                let from = (first + i * step) * path.groups + at * tile;
                #[unroll]
                for t in 0..tile {
                    least[t] = min(least[t], x[from + t]);
                    largest[t] = max(largest[t], x[from + t]);
                }
            }
            let to = task * 2 * path.groups + at * tile;
            #[unroll]
            for t in 0..tile {
                partial[to + t] = least[t];
                partial[to + path.groups + t] = largest[t];
            }
        }
    }
}

/// `[parts, 2, width]` -> `[ceil(parts / fan), 2, channels]`.
#[cube(launch_unchecked)]
fn fold_range_kernel(
    partial: &[f32],
    out: &mut [f32],
    parts: usize,
    width: usize,
    channels: usize,
    #[comptime] fan: usize,
) {
    let kept = (parts + fan - 1) / fan;
    let (low, high) = strip(kept * channels);
    for i in low..high {
        let (row, c) = (i / channels, i % channels);
        let first = row * fan;
        let mut least = partial[first * 2 * width + c];
        let mut largest = partial[(first * 2 + 1) * width + c];
        for part in first..(first + fan).min(parts) {
            for e in range_stepped(c, width, channels) {
                least = min(least, partial[part * 2 * width + e]);
                largest = max(largest, partial[(part * 2 + 1) * width + e]);
            }
        }
        out[row * 2 * channels + c] = least;
        out[(row * 2 + 1) * channels + c] = largest;
    }
}

/// `[2, channels]`: minimum and maximum of every channel.
pub(super) fn range(context: &Context, patch: &Patch, image: &Buffer) -> Result<Buffer, KernelError> {
    patch.check_image("image", image)?;
    check_count(context, OPERATION, image.len())?;
    let walk = Walk::new(1, patch.voxels(), patch.channels, 1, context.caps());
    let mut partial = context.empty(walk.parts * 2 * walk.width, Dtype::F32)?;
    context.launch(OPERATION, walk.work(), |client, count, dim| {
        // SAFETY: the walk covers the elements of the image, and `parts * 2 * width` of the partial results: their lengths.
        unsafe {
            range_kernel::launch_unchecked(
                client,
                count,
                dim,
                walk.lanes,
                image.arg(),
                partial.arg(),
                walk.arg(),
                walk.tile,
                walk.chunked,
            )
        }
    })?;
    let (mut parts, mut width) = (walk.parts, walk.width);
    loop {
        let kept = parts.div_ceil(FAN_IN);
        let out = context.empty(kept * 2 * patch.channels, Dtype::F32)?;
        context.launch(OPERATION, Work::Items(kept * patch.channels), |client, count, dim| {
            // SAFETY: `partial` and `out` have the lengths that the kernel derives from the same scalars.
            unsafe {
                fold_range_kernel::launch_unchecked(
                    client,
                    count,
                    dim,
                    partial.arg(),
                    out.arg(),
                    parts,
                    width,
                    patch.channels,
                    FAN_IN,
                )
            }
        })?;
        if kept == 1 {
            return Ok(out);
        }
        (partial, parts, width) = (out, kept, patch.channels);
    }
}
