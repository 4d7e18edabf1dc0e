//! The end of a residual block: norm, addition of the skip and leaky ReLU in one pass, and where its way back begins.

use super::apply::{APPLY_BLOCKS, NormOf, NormOfLaunch, affine, leak, of_channels};
use super::epilogue::GradientParts;
use super::problem::{Norm, OPERATION, Problem};
use crate::reduce::{Path, rows_of, share};
use crate::{Buffer, Context, KernelError};
use cubecl::prelude::*;

#[cube(launch_unchecked)]
fn apply_onto_kernel<E: Float, N: Size>(
    x: &[Vector<E, N>],
    skip: &[Vector<E, N>],
    y: &mut [Vector<E, N>],
    norm: NormOf,
    path: &Path,
    #[comptime] tile: usize,
    #[comptime] chunked: bool,
    #[comptime] cyclic: bool,
    #[define(E)] _dtype: ElemType,
) {
    let channels = norm.channels;
    let slope = Vector::<f32, N>::new(norm.slope);
    let (task_low, task_high, tile_low, tile_high) = share(path, tile, chunked);
    for task in task_low..task_high {
        let (first, step, count) = rows_of(task, path, chunked);
        let means = task / path.parts * 2 * channels;
        for low in range_stepped(0, count, path.block) {
            let high = (low + path.block).min(count);
            for at in tile_low..tile_high {
                let mut mean = Array::<Vector<f32, N>>::new(tile);
                let mut scale = Array::<Vector<f32, N>>::new(tile);
                let mut shift = Array::<Vector<f32, N>>::new(tile);
                #[unroll]
                for t in 0..tile {
                    let e = (at * tile + t) * N::value();
                    mean[t] = of_channels(&norm.statistics, means, e, channels, cyclic);
                    let rstd = of_channels::<N>(&norm.statistics, means + channels, e, channels, cyclic);
                    scale[t] = rstd * of_channels::<N>(&norm.gamma, 0usize, e, channels, cyclic);
                    shift[t] = of_channels(&norm.beta, 0usize, e, channels, cyclic);
                }
                for i in low..high {
                    let here = (first + i * step) * path.groups + at * tile;
                    #[unroll]
                    for t in 0..tile {
                        let centred = Vector::<f32, N>::cast_from(x[here + t]) - mean[t];
                        let sum = affine(centred, scale[t], shift[t]) + Vector::cast_from(skip[here + t]);
                        y[here + t] = Vector::cast_from(leak(sum, sum, slope));
                    }
                }
            }
        }
    }
}

/// `partial` is `[tasks, 2, width]`: sum d, sum d * xhat, where d is `gradient` behind the leaky ReLU, which takes its place.
#[cube(launch_unchecked)]
fn gradient_parts_onto_kernel<E: Float, N: Size>(
    x: &[Vector<E, N>],
    y: &[Vector<E, N>],
    gradient: &mut [Vector<E, N>],
    partial: &mut [Vector<f32, N>],
    norm: NormOf,
    path: &Path,
    #[comptime] tile: usize,
    #[comptime] chunked: bool,
    #[comptime] cyclic: bool,
    #[define(E)] _dtype: ElemType,
) {
    let channels = norm.channels;
    let slope = Vector::<f32, N>::new(norm.slope);
    let groups = path.groups;
    let (task_low, task_high, tile_low, tile_high) = share(path, tile, chunked);
    for task in task_low..task_high {
        let (first, step, count) = rows_of(task, path, chunked);
        let means = task / path.parts * 2 * channels;
        for g in tile_low * tile..tile_high * tile {
            partial[task * 2 * groups + g] = Vector::zeroed();
            partial[(task * 2 + 1) * groups + g] = Vector::zeroed();
        }
        for low in range_stepped(0, count, path.block) {
            let high = (low + path.block).min(count);
            for at in tile_low..tile_high {
                let mut mean = Array::<Vector<f32, N>>::new(tile);
                let mut rstd = Array::<Vector<f32, N>>::new(tile);
                let mut sum = Array::<Vector<f32, N>>::new(tile);
                let mut product = Array::<Vector<f32, N>>::new(tile);
                #[unroll]
                for t in 0..tile {
                    let e = (at * tile + t) * N::value();
                    mean[t] = of_channels(&norm.statistics, means, e, channels, cyclic);
                    rstd[t] = of_channels(&norm.statistics, means + channels, e, channels, cyclic);
                }
                for i in low..high {
                    let here = (first + i * step) * groups + at * tile;
                    #[unroll]
                    for t in 0..tile {
                        let centred = Vector::<f32, N>::cast_from(x[here + t]) - mean[t];
                        // The activation keeps signs, so what it put out tells what it took.
                        let sign = Vector::<f32, N>::cast_from(y[here + t]);
                        let d = Vector::<E, N>::cast_from(leak(sign, Vector::cast_from(gradient[here + t]), slope));
                        gradient[here + t] = d;
                        // As it was stored, so that the mean of what the norm's gradient reads is taken off of it.
                        let d = Vector::<f32, N>::cast_from(d);
                        sum[t] += d;
                        product[t] += d * centred;
                    }
                }
                let to = task * 2 * groups + at * tile;
                #[unroll]
                for t in 0..tile {
                    partial[to + t] += sum[t];
                    partial[to + groups + t] += product[t] * rstd[t];
                }
            }
        }
    }
}

// ----------------------------------------------------------------------------------------------- launches

/// Writes `y = leaky_relu(gamma * (x - mean) * rstd + beta + skip)`; the slope is the problem's activation.
#[allow(clippy::missing_errors_doc, reason = "see forward")]
pub fn apply_onto(
    context: &Context,
    problem: &Problem,
    x: &Buffer,
    norm: &Norm,
    skip: &Buffer,
    y: &Buffer,
) -> Result<(), KernelError> {
    x.check(OPERATION, "x", problem.elements(), problem.dtype)?;
    skip.check(OPERATION, "skip", problem.elements(), problem.dtype)?;
    y.check(OPERATION, "y", problem.elements(), problem.dtype)?;
    problem.expect_norm(norm)?;
    let walk = problem.walk(context, 3)?.with_longer_blocks(APPLY_BLOCKS);
    context.launch(OPERATION, walk.work(), |client, count, dim| {
        // SAFETY: the walk covers the elements of `x`, `skip` and `y`; the parameters have `channels`, and the statistics
        // `batch * 2 * channels` elements.
        unsafe {
            apply_onto_kernel::launch_unchecked(
                client,
                count,
                dim,
                walk.lanes,
                x.arg(),
                skip.arg(),
                y.arg(),
                NormOfLaunch::of(problem, norm),
                walk.arg(),
                walk.tile,
                walk.chunked,
                walk.cyclic(problem.channels),
                problem.dtype.elem(),
            )
        }
    })
}

/// The way back of [`apply_onto`], whose output was `y`, as far as its activation: `gradient` comes in as `dy` and becomes the
/// gradient of `z + skip`, of which the parts are taken. What remains, from the parts to `dx`, is the way back of
/// [`Problem::without_activation`].
#[allow(clippy::missing_errors_doc, reason = "see forward")]
pub fn gradient_parts_onto(
    context: &Context,
    problem: &Problem,
    x: &Buffer,
    norm: &Norm,
    y: &Buffer,
    gradient: &Buffer,
) -> Result<GradientParts, KernelError> {
    x.check(OPERATION, "x", problem.elements(), problem.dtype)?;
    y.check(OPERATION, "y", problem.elements(), problem.dtype)?;
    gradient.check(OPERATION, "dy", problem.elements(), problem.dtype)?;
    problem.expect_norm(norm)?;
    let walk = problem.walk(context, 3)?;
    let parts = GradientParts::new(context, walk.batch, walk.parts, walk.width)?;
    context.launch(OPERATION, walk.work(), |client, count, dim| {
        // SAFETY: the walk covers the elements of `x`, `y` and `gradient`, each once, and `tasks * 2 * width` of the parts; the
        // statistics have `batch * 2 * channels` elements.
        unsafe {
            gradient_parts_onto_kernel::launch_unchecked(
                client,
                count,
                dim,
                walk.lanes,
                x.arg(),
                y.arg(),
                gradient.arg(),
                parts.partial.arg(),
                NormOfLaunch::of(problem, norm),
                walk.arg(),
                walk.tile,
                walk.chunked,
                walk.cyclic(problem.channels),
                problem.dtype.elem(),
            )
        }
    })?;
    Ok(parts)
}
