//! The sums that the gradients need, and the gradient of the input.

use super::apply::{APPLY_BLOCKS, affine, leak, of_channels};
use super::prologue::{Load, write_coefficients};
use super::{Coefficients, GradientParts, Norm, NormGradient, OPERATION, Problem};
use crate::block::strip;
use crate::reduce::{Path, gather_parts, rows_of, share};
use crate::{Buffer, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// `partial` is `[tasks, 2, width]`: sum dz, sum dz * xhat.
#[cube(launch_unchecked)]
fn backward_parts_kernel<E: Float, N: Size>(
    x: &[Vector<E, N>],
    dy: &[Vector<E, N>],
    statistics: &[f32],
    gamma: &[f32],
    beta: &[f32],
    partial: &mut [Vector<f32, N>],
    channels: usize,
    slope: f32,
    path: &Path,
    #[comptime] tile: usize,
    #[comptime] chunked: bool,
    #[comptime] cyclic: bool,
    #[define(E)] _dtype: ElemType,
) {
    let slope = Vector::<f32, N>::new(slope);
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
                    mean[t] = of_channels(statistics, means, e, channels, cyclic);
                    rstd[t] = of_channels(statistics, means + channels, e, channels, cyclic);
                    scale[t] = rstd[t] * of_channels::<N>(gamma, 0usize, e, channels, cyclic);
                    shift[t] = of_channels(beta, 0usize, e, channels, cyclic);
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

/// `partial [batch, parts, 2, width]` -> `sums [batch, 2, channels]` and their totals over the batch; coefficients instead of
/// sums where asked for.
#[cube(launch_unchecked)]
fn backward_sums_kernel(
    partial: &[f32],
    statistics: &[f32],
    gamma: &[f32],
    beta: &[f32],
    out: &mut [f32],
    dgamma: &mut [f32],
    dbeta: &mut [f32],
    batch: usize,
    parts: usize,
    width: usize,
    channels: usize,
    inverse_voxels: f32,
    #[comptime] to_coefficients: bool,
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
            if comptime!(to_coefficients) {
                let (mean, rstd) = (statistics[n * 2 * channels + c], statistics[(n * 2 + 1) * channels + c]);
                write_coefficients(
                    out,
                    n,
                    c,
                    channels,
                    mean,
                    rstd,
                    gamma[c],
                    beta[c],
                    sum,
                    product,
                    inverse_voxels,
                    Load::NormGradient,
                );
            } else {
                out[n * 2 * channels + c] = sum;
                out[(n * 2 + 1) * channels + c] = product;
            }
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
    statistics: &[f32],
    gamma: &[f32],
    beta: &[f32],
    sums: &[f32],
    dx: &mut [Vector<E, N>],
    channels: usize,
    slope: f32,
    inverse_voxels: f32,
    path: &Path,
    #[comptime] tile: usize,
    #[comptime] chunked: bool,
    #[comptime] cyclic: bool,
    #[define(E)] _dtype: ElemType,
) {
    let slope = Vector::<f32, N>::new(slope);
    let inverse_voxels = Vector::<f32, N>::new(inverse_voxels);
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
                    mean[t] = of_channels(statistics, means, e, channels, cyclic);
                    let rstd = of_channels::<N>(statistics, means + channels, e, channels, cyclic);
                    scale[t] = rstd * of_channels::<N>(gamma, 0usize, e, channels, cyclic);
                    shift[t] = of_channels(beta, 0usize, e, channels, cyclic);
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
    add_parts(context, problem, parts, norm, sums, false, gradient)
}

/// The same from `parts`, taken by the convolution that has stored `dy` or by [`gradient_parts`].
#[allow(clippy::missing_errors_doc, reason = "see forward")]
pub fn backward_sums_of_parts(
    context: &Context,
    problem: &Problem,
    parts: GradientParts,
    norm: &Norm,
    sums: &Buffer,
    gradient: &NormGradient,
) -> Result<(), KernelError> {
    sums.check(OPERATION, "sums", problem.statistics_len(), Dtype::F32)?;
    add_parts(context, problem, parts, norm, sums, false, gradient)
}

/// The coefficients for [`Operand::NormGradient`](super::Operand::NormGradient) instead of sums.
#[allow(clippy::missing_errors_doc, reason = "see forward")]
pub fn gradient_coefficients(
    context: &Context,
    problem: &Problem,
    parts: GradientParts,
    norm: &Norm,
    gradient: &NormGradient,
) -> Result<Coefficients, KernelError> {
    let coefficients = Coefficients::new(context, problem, Load::NormGradient)?;
    add_parts(context, problem, parts, norm, &coefficients.values, true, gradient)?;
    Ok(coefficients)
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
                norm.statistics.arg(),
                norm.gamma.arg(),
                norm.beta.arg(),
                parts.partial.arg(),
                problem.channels,
                problem.slope,
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

/// Adds the parts in a fixed order; `out` takes sums or coefficients.
fn add_parts(
    context: &Context,
    problem: &Problem,
    parts: GradientParts,
    norm: &Norm,
    out: &Buffer,
    to_coefficients: bool,
    gradient: &NormGradient,
) -> Result<(), KernelError> {
    problem.expect_norm(norm)?;
    gradient.gamma.check(OPERATION, "dgamma", problem.channels, Dtype::F32)?;
    gradient.beta.check(OPERATION, "dbeta", problem.channels, Dtype::F32)?;
    let GradientParts { partial, batch, parts, width } = parts;
    if batch != problem.batch || !width.is_multiple_of(problem.channels) {
        let expected = (problem.batch, problem.channels);
        return Err(KernelError::shape(OPERATION, "batch and channels of gradient parts", expected, (batch, width)));
    }
    let (partial, parts) = gather_parts(context, OPERATION, partial, batch, parts, 2 * width)?;
    context.launch(OPERATION, Work::Items(problem.channels), |client, count, dim| {
        // SAFETY: `partial` holds `batch * parts * 2 * width` elements, the statistics `batch * 2 * channels`, `out` as many, or
        // `batch * 6 * channels` as coefficients, the others `channels`.
        unsafe {
            backward_sums_kernel::launch_unchecked(
                client,
                count,
                dim,
                partial.arg(),
                norm.statistics.arg(),
                norm.gamma.arg(),
                norm.beta.arg(),
                out.arg(),
                gradient.gamma.arg(),
                gradient.beta.arg(),
                batch,
                parts,
                width,
                problem.channels,
                1.0 / problem.voxels as f32,
                to_coefficients,
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
                norm.statistics.arg(),
                norm.gamma.arg(),
                norm.beta.arg(),
                sums.arg(),
                dx.arg(),
                problem.channels,
                problem.slope,
                1.0 / problem.voxels as f32,
                walk.arg(),
                walk.tile,
                walk.chunked,
                walk.cyclic(problem.channels),
                problem.dtype.elem(),
            )
        }
    })
}
