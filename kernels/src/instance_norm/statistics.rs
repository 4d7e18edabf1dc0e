//! Mean and inverse deviation of every sample and channel.

use super::epilogue::{Coefficients, Moments, add_moments, write_coefficients};
use super::problem::{Norm, OPERATION, Problem};
use crate::block::strip;
use crate::reduce::{Path, rows_of, share};
use crate::{Buffer, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// Partial moments that one unit merges in a row.
const FAN_IN: usize = 64;

/// `partial` is `[tasks, 4, width]`, see [`Moments`].
#[cube(launch_unchecked)]
fn moments_kernel<E: Float, N: Size>(
    x: &[Vector<E, N>],
    partial: &mut [Vector<f32, N>],
    path: &Path,
    #[comptime] tile: usize,
    #[comptime] chunked: bool,
    #[define(E)] _dtype: ElemType,
) {
    let groups = path.groups;
    let (task_low, task_high, tile_low, tile_high) = share(path, tile, chunked);
    for task in task_low..task_high {
        let (first, step, count) = rows_of(task, path, chunked);
        let state = task * 4 * groups;
        for g in tile_low * tile..tile_high * tile {
            partial[state + g] = Vector::cast_from(x[first * groups + g]);
            partial[state + groups + g] = Vector::zeroed();
            partial[state + 2 * groups + g] = Vector::zeroed();
            partial[state + 3 * groups + g] = Vector::new(f32::cast_from(count));
        }
        for low in range_stepped(0, count, path.block) {
            let high = (low + path.block).min(count);
            let (before, here) = (f32::cast_from(low), f32::cast_from(high - low));
            for at in tile_low..tile_high {
                let to = state + at * tile;
                let mut shift = Array::<Vector<f32, N>>::new(tile);
                let mut sum = Array::<Vector<f32, N>>::new(tile);
                let mut square = Array::<Vector<f32, N>>::new(tile);
                #[unroll]
                for t in 0..tile {
                    shift[t] = partial[to + t] + partial[to + groups + t];
                }
                for i in low..high {
                    let from = (first + i * step) * groups + at * tile;
                    #[unroll]
                    for t in 0..tile {
                        let difference = Vector::<f32, N>::cast_from(x[from + t]) - shift[t];
                        sum[t] += difference;
                        square[t] += difference * difference;
                    }
                }
                #[unroll]
                for t in 0..tile {
                    add_moments(partial, to + t, groups, shift[t], sum[t], square[t], Vector::new(before), here);
                }
            }
        }
    }
}

/// Merges the moments of the rows `low .. high` of `partial [.., 4, width]`, and in them of the elements
/// `element, element + step ..`: pivot, mean - pivot, sum of squared deviations, count. A part may be empty.
#[cube]
fn merged(partial: &[f32], low: usize, high: usize, width: usize, element: usize, step: usize) -> (f32, f32, f32, f32) {
    let mut pivot = 0.0f32;
    let mut offset = 0.0f32;
    let mut square = 0.0f32;
    let mut count = 0.0f32;
    for row in low..high {
        for e in range_stepped(element, width, step) {
            let at = row * 4 * width + e;
            let more = partial[at + 3 * width];
            if more > 0.0f32 {
                if count == 0.0f32 {
                    pivot = partial[at];
                }
                let delta = (partial[at] - pivot) + (partial[at + width] - offset);
                let share_of_more = more / (count + more);
                offset += delta * share_of_more;
                square += partial[at + 2 * width] + delta * delta * count * share_of_more;
                count += more;
            }
        }
    }
    (pivot, offset, square, count)
}

/// `[batch, parts, 4, width]` -> `[batch, ceil(parts / fan), 4, width]`.
#[cube(launch_unchecked)]
fn merge_parts_kernel(
    partial: &[f32],
    out: &mut [f32],
    batch: usize,
    parts: usize,
    width: usize,
    #[comptime] fan: usize,
) {
    let kept = (parts + fan - 1) / fan;
    let (low, high) = strip(batch * kept * width);
    for i in low..high {
        let row = i / width;
        let e = i % width;
        let first = row % kept * fan;
        let base = row / kept * parts;
        let last = (first + fan).min(parts);
        let (pivot, offset, square, count) = merged(partial, base + first, base + last, width, e, width);
        let to = row * 4 * width + e;
        out[to] = pivot;
        out[to + width] = offset;
        out[to + 2 * width] = square;
        out[to + 3 * width] = count;
    }
}

/// `partial [batch, parts, 4, width]` -> `statistics [batch, 2, channels]`, and coefficients where asked for.
#[cube(launch_unchecked)]
fn statistics_kernel(
    partial: &[f32],
    gamma: &[f32],
    beta: &[f32],
    statistics: &mut [f32],
    coefficients: &mut [f32],
    batch: usize,
    parts: usize,
    width: usize,
    channels: usize,
    epsilon: f32,
    #[comptime] with_coefficients: bool,
) {
    let (low, high) = strip(batch * channels);
    for i in low..high {
        let n = i / channels;
        let c = i % channels;
        let (pivot, offset, square, count) = merged(partial, n * parts, (n + 1) * parts, width, c, channels);
        let variance = square / count;
        // Rounding can leave it a little below zero. Not max(): that would hide a NaN.
        let variance = select(variance < 0.0f32, 0.0f32, variance);
        let mean = pivot + offset;
        let rstd = 1.0f32 / (variance + epsilon).sqrt();
        statistics[n * 2 * channels + c] = mean;
        statistics[(n * 2 + 1) * channels + c] = rstd;
        if comptime!(with_coefficients) {
            let (g, b) = (gamma[c], beta[c]);
            write_coefficients(coefficients, n, c, channels, mean, rstd, g, b);
        }
    }
}

// ----------------------------------------------------------------------------------------------- launches

/// Writes `statistics [batch, 2, channels]`: mean and 1 / sqrt(variance + epsilon) of every sample and channel.
#[allow(clippy::missing_errors_doc, reason = "see forward")]
pub fn statistics(context: &Context, problem: &Problem, x: &Buffer, statistics: &Buffer) -> Result<(), KernelError> {
    statistics_of_moments(context, problem, moments(context, problem, x)?, statistics)
}

/// The moments of `x`: the pass over it.
#[allow(clippy::missing_errors_doc, reason = "see forward")]
pub fn moments(context: &Context, problem: &Problem, x: &Buffer) -> Result<Moments, KernelError> {
    x.check(OPERATION, "x", problem.elements(), problem.dtype)?;
    let walk = problem.walk(context, 1)?;
    let moments = Moments::new(context, walk.batch, walk.parts, walk.width)?;
    context.launch(OPERATION, walk.work(), |client, count, dim| {
        // SAFETY: the walk covers the elements of `x`, and `tasks * 4 * width` of the moments: their lengths.
        unsafe {
            moments_kernel::launch_unchecked(
                client,
                count,
                dim,
                walk.lanes,
                x.arg(),
                moments.partial.arg(),
                walk.arg(),
                walk.tile,
                walk.chunked,
                problem.dtype.elem(),
            )
        }
    })?;
    Ok(moments)
}

/// Merges moments, in a fixed order, and writes `statistics` as [`statistics`] does.
#[allow(clippy::missing_errors_doc, reason = "see forward")]
pub fn statistics_of_moments(
    context: &Context,
    problem: &Problem,
    moments: Moments,
    statistics: &Buffer,
) -> Result<(), KernelError> {
    merge_all(context, problem, moments, statistics, None)
}

/// The same into the statistics of `norm`, which are an output, together with the coefficients for a convolution that takes the
/// sums of a gradient.
#[allow(clippy::missing_errors_doc, reason = "see forward")]
pub fn coefficients(
    context: &Context,
    problem: &Problem,
    moments: Moments,
    norm: &Norm,
) -> Result<Coefficients, KernelError> {
    problem.expect_norm(norm)?;
    let coefficients = Coefficients::new(context, problem)?;
    let and = Some((norm.gamma, norm.beta, &coefficients.values));
    merge_all(context, problem, moments, norm.statistics, and)?;
    Ok(coefficients)
}

/// `and`: gamma, beta, and where coefficients go.
fn merge_all(
    context: &Context,
    problem: &Problem,
    moments: Moments,
    statistics: &Buffer,
    and: Option<(&Buffer, &Buffer, &Buffer)>,
) -> Result<(), KernelError> {
    statistics.check(OPERATION, "statistics", problem.statistics_len(), Dtype::F32)?;
    let Moments { mut partial, batch, mut parts, width } = moments;
    if batch != problem.batch || !width.is_multiple_of(problem.channels) {
        let expected = (problem.batch, problem.channels);
        return Err(KernelError::shape(OPERATION, "batch and channels of moments", expected, (batch, width)));
    }
    while parts > FAN_IN {
        let kept = parts.div_ceil(FAN_IN);
        let out = context.empty(batch * kept * 4 * width, Dtype::F32)?;
        context.launch(OPERATION, Work::Items(batch * kept * width), |client, count, dim| {
            // SAFETY: `partial` and `out` have the lengths that the kernel derives from the same scalars.
            unsafe {
                merge_parts_kernel::launch_unchecked(
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
    let with_coefficients = and.is_some();
    let nothing = context.empty(1, Dtype::F32)?;
    let (gamma, beta, coefficients) = and.unwrap_or((&partial, &partial, &nothing));
    context.launch(OPERATION, Work::Items(batch * problem.channels), |client, count, dim| {
        // SAFETY: `partial` holds `batch * parts * 4 * width` elements, `statistics` `batch * 2 * channels`, `gamma` and `beta`
        // `channels`, and the coefficients `batch * 4 * channels`.
        unsafe {
            statistics_kernel::launch_unchecked(
                client,
                count,
                dim,
                partial.arg(),
                gamma.arg(),
                beta.arg(),
                statistics.arg(),
                coefficients.arg(),
                batch,
                parts,
                width,
                problem.channels,
                problem.epsilon,
                with_coefficients,
            )
        }
    })
}
