//! The sums that the gradients need, and the gradient of the input.

use super::apply::{APPLY_BLOCKS, NormOf, NormOfLaunch, affine, leak, of_channels};
use super::epilogue::GradientParts;
use super::problem::{Norm, NormGradient, OPERATION, Problem};
use crate::block::strip;
use crate::reduce::{Path, gather_parts, rows_of, share};
use crate::{Buffer, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// `partial` is `[tasks, 2, width]`: sum dz, sum dz * xhat.
#[cube(launch_unchecked)]
fn backward_parts_kernel<E: Float, N: Size>(
    x: &[Vector<E, N>],
    dy: &[Vector<E, N>],
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
                let mut scale = Array::<Vector<f32, N>>::new(tile);
                let mut shift = Array::<Vector<f32, N>>::new(tile);
                let mut sum = Array::<Vector<f32, N>>::new(tile);
                let mut product = Array::<Vector<f32, N>>::new(tile);
                #[unroll]
                for t in 0..tile {
                    let e = (at * tile + t) * N::value();
                    mean[t] = of_channels(&norm.statistics, means, e, channels, cyclic);
                    rstd[t] = of_channels(&norm.statistics, means + channels, e, channels, cyclic);
                    scale[t] = rstd[t] * of_channels::<N>(&norm.gamma, 0usize, e, channels, cyclic);
                    shift[t] = of_channels(&norm.beta, 0usize, e, channels, cyclic);
                }
                for i in low..high {
                    let here = (first + i * step) * groups + at * tile;
                    #[unroll]
                    for t in 0..tile {
                        let centred = Vector::<f32, N>::cast_from(x[here + t]) - mean[t];
                        let z = affine(centred, scale[t], shift[t]);
                        let dz = leak(z, Vector::cast_from(dy[here + t]), slope);
                        sum[t] += dz;
                        product[t] += dz * centred;
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

/// `partial [batch, parts, 2, width]` -> `sums [batch, 2, channels]` and their totals over the batch.
#[cube(launch_unchecked)]
fn backward_sums_kernel(
    partial: &[f32],
    sums: &mut [f32],
    dgamma: &mut [f32],
    dbeta: &mut [f32],
    batch: usize,
    parts: usize,
    width: usize,
    channels: usize,
) {
    let (low, high) = strip(channels);
    for c in low..high {
        let mut total = 0.0f32;
        let mut total_product = 0.0f32;
        for n in 0..batch {
            let mut sum = 0.0f32;
            let mut product = 0.0f32;
            for part in 0..parts {
                let row = (n * parts + part) * 2 * width;
                for e in range_stepped(c, width, channels) {
                    sum += partial[row + e];
                    product += partial[row + width + e];
                }
            }
            sums[n * 2 * channels + c] = sum;
            sums[(n * 2 + 1) * channels + c] = product;
            total += sum;
            total_product += product;
        }
        dbeta[c] = total;
        dgamma[c] = total_product;
    }
}

#[cube(launch_unchecked)]
fn backward_apply_kernel<E: Float, N: Size>(
    x: &[Vector<E, N>],
    dy: &[Vector<E, N>],
    sums: &[f32],
    dx: &mut [Vector<E, N>],
    norm: NormOf,
    path: &Path,
    #[comptime] tile: usize,
    #[comptime] chunked: bool,
    #[comptime] cyclic: bool,
    #[define(E)] _dtype: ElemType,
) {
    let channels = norm.channels;
    let slope = Vector::<f32, N>::new(norm.slope);
    let inverse_voxels = Vector::<f32, N>::new(norm.inverse_voxels);
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
                // dx = scale * dz - constant - slant * (x - mean)
                let mut constant = Array::<Vector<f32, N>>::new(tile);
                let mut slant = Array::<Vector<f32, N>>::new(tile);
                #[unroll]
                for t in 0..tile {
                    let e = (at * tile + t) * N::value();
                    mean[t] = of_channels(&norm.statistics, means, e, channels, cyclic);
                    let rstd = of_channels::<N>(&norm.statistics, means + channels, e, channels, cyclic);
                    scale[t] = rstd * of_channels::<N>(&norm.gamma, 0usize, e, channels, cyclic);
                    shift[t] = of_channels(&norm.beta, 0usize, e, channels, cyclic);
                    let sum = of_channels::<N>(sums, means, e, channels, cyclic);
                    let product = of_channels::<N>(sums, means + channels, e, channels, cyclic);
                    constant[t] = scale[t] * sum * inverse_voxels;
                    slant[t] = scale[t] * rstd * product * inverse_voxels;
                }
                for i in low..high {
                    let here = (first + i * step) * path.groups + at * tile;
                    #[unroll]
                    for t in 0..tile {
                        let centred = Vector::<f32, N>::cast_from(x[here + t]) - mean[t];
                        let z = affine(centred, scale[t], shift[t]);
                        let dz = leak(z, Vector::cast_from(dy[here + t]), slope);
                        let value = dz * scale[t] - constant[t] - centred * slant[t];
                        dx[here + t] = Vector::cast_from(value);
                    }
                }
            }
        }
    }
}

// ----------------------------------------------------------------------------------------------- launches

/// Writes `dx` and the gradients of the parameters.
#[allow(clippy::missing_errors_doc, reason = "see forward")]
pub fn backward(
    context: &Context,
    problem: &Problem,
    x: &Buffer,
    norm: &Norm,
    dy: &Buffer,
    dx: &Buffer,
    gradient: &NormGradient,
) -> Result<(), KernelError> {
    let sums = context.empty(problem.statistics_len(), Dtype::F32)?;
    backward_sums(context, problem, x, norm, dy, &sums, gradient)?;
    backward_apply(context, problem, x, norm, dy, &sums, dx)
}

/// Writes `sums [batch, 2, channels]` (sum dz, sum dz * xhat) and the gradients of the parameters.
#[allow(clippy::missing_errors_doc, reason = "see forward")]
pub fn backward_sums(
    context: &Context,
    problem: &Problem,
    x: &Buffer,
    norm: &Norm,
    dy: &Buffer,
    sums: &Buffer,
    gradient: &NormGradient,
) -> Result<(), KernelError> {
    sums.check(OPERATION, "sums", problem.statistics_len(), Dtype::F32)?;
    let parts = gradient_parts(context, problem, x, norm, dy)?;
    add_parts(context, problem, parts, sums, gradient)
}

/// The same from `parts`, taken by the convolution that has stored `dy` or by [`gradient_parts`].
#[allow(clippy::missing_errors_doc, reason = "see forward")]
pub fn backward_sums_of_parts(
    context: &Context,
    problem: &Problem,
    parts: GradientParts,
    sums: &Buffer,
    gradient: &NormGradient,
) -> Result<(), KernelError> {
    sums.check(OPERATION, "sums", problem.statistics_len(), Dtype::F32)?;
    add_parts(context, problem, parts, sums, gradient)
}

/// What of `dy` the gradients need: the pass over it and `x`.
#[allow(clippy::missing_errors_doc, reason = "see forward")]
pub fn gradient_parts(
    context: &Context,
    problem: &Problem,
    x: &Buffer,
    norm: &Norm,
    dy: &Buffer,
) -> Result<GradientParts, KernelError> {
    x.check(OPERATION, "x", problem.elements(), problem.dtype)?;
    dy.check(OPERATION, "dy", problem.elements(), problem.dtype)?;
    problem.expect_norm(norm)?;
    let walk = problem.walk(context, 2)?;
    let parts = GradientParts::new(context, walk.batch, walk.parts, walk.width)?;
    context.launch(OPERATION, walk.work(), |client, count, dim| {
        // SAFETY: the walk covers the elements of `x` and `dy`, and `tasks * 2 * width` of the parts; the parameters have
        // `channels`, and the statistics `batch * 2 * channels` elements.
        unsafe {
            backward_parts_kernel::launch_unchecked(
                client,
                count,
                dim,
                walk.lanes,
                x.arg(),
                dy.arg(),
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

/// Adds the parts in a fixed order.
fn add_parts(
    context: &Context,
    problem: &Problem,
    parts: GradientParts,
    sums: &Buffer,
    gradient: &NormGradient,
) -> Result<(), KernelError> {
    gradient.gamma.check(OPERATION, "dgamma", problem.channels, Dtype::F32)?;
    gradient.beta.check(OPERATION, "dbeta", problem.channels, Dtype::F32)?;
    let GradientParts { partial, batch, parts, width } = parts;
    if batch != problem.batch || !width.is_multiple_of(problem.channels) {
        let expected = (problem.batch, problem.channels);
        return Err(KernelError::shape(OPERATION, "batch and channels of gradient parts", expected, (batch, width)));
    }
    let (partial, parts) = gather_parts(context, OPERATION, partial, batch, parts, 2 * width)?;
    context.launch(OPERATION, Work::Items(problem.channels), |client, count, dim| {
        // SAFETY: `partial` holds `batch * parts * 2 * width` elements, `sums` `batch * 2 * channels`, the others `channels`.
        unsafe {
            backward_sums_kernel::launch_unchecked(
                client,
                count,
                dim,
                partial.arg(),
                sums.arg(),
                gradient.gamma.arg(),
                gradient.beta.arg(),
                batch,
                parts,
                width,
                problem.channels,
            )
        }
    })
}

/// Writes `dx` from the sums.
#[allow(clippy::missing_errors_doc, reason = "see forward")]
pub fn backward_apply(
    context: &Context,
    problem: &Problem,
    x: &Buffer,
    norm: &Norm,
    dy: &Buffer,
    sums: &Buffer,
    dx: &Buffer,
) -> Result<(), KernelError> {
    x.check(OPERATION, "x", problem.elements(), problem.dtype)?;
    dy.check(OPERATION, "dy", problem.elements(), problem.dtype)?;
    dx.check(OPERATION, "dx", problem.elements(), problem.dtype)?;
    sums.check(OPERATION, "sums", problem.statistics_len(), Dtype::F32)?;
    problem.expect_norm(norm)?;
    let walk = problem.walk(context, 3)?.with_longer_blocks(APPLY_BLOCKS);
    context.launch(OPERATION, walk.work(), |client, count, dim| {
        // SAFETY: the walk covers the elements of `x`, `dy` and `dx`; the parameters have `channels`, statistics and sums
        // `batch * 2 * channels` elements.
        unsafe {
            backward_apply_kernel::launch_unchecked(
                client,
                count,
                dim,
                walk.lanes,
                x.arg(),
                dy.arg(),
                sums.arg(),
                dx.arg(),
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
