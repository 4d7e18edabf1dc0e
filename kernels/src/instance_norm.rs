//! Instance normalisation with a leaky ReLU behind it, forward and backward.
//!
//! ```text
//! xhat = (x - mean) * rstd            mean, variance (biased) per sample and channel, rstd = 1 / sqrt(variance + eps)
//! z    = gamma * xhat + beta          y = z where z > 0, slope * z elsewhere
//! dz   = dy * (1 where z > 0, slope elsewhere)
//! dbeta = sum dz,  dgamma = sum dz * xhat             over samples and voxels
//! dx   = gamma * rstd * (dz - mean(dz) - xhat * mean(dz * xhat))     means over the voxels of a sample
//! ```
//!
//! These are `torch.nn.InstanceNorm3d(eps=1e-5, affine=True)` and `LeakyReLU(0.01)`, as nnU-Net has them after every
//! convolution.
//!
//! Layouts: activations `[batch, voxels, channels]` in f32, f16 or bf16; `gamma`, `beta` f32 `[channels]`;
//! `statistics` f32 `[batch, 2, channels]` (mean, rstd); `sums` f32 `[batch, 2, channels]` (sum dz, sum dz * xhat).
//!
//! Passes, with the bytes that they move per element of storage size s: statistics read s, apply reads and writes 2s;
//! backward sums read 2s, backward apply moves 3s. Backward keeps `x` and the statistics; `z` is computed again, which
//! is cheaper than reading it.
//!
//! The statistics stay right where the mean is a thousand times the deviation: each task sums blocks of
//! differences from its running mean (at first: from its first row), and blocks and tasks are merged with Chan's formula
//! (Chan, Golub, LeVeque 1979: Updating formulae and a pairwise algorithm for computing sample variances).

use crate::block::strip;
use crate::reduce::{Path, Walk, check_count, cubes, gather_parts, rows_of, share};
use crate::{Buffer, Context, Dtype, KernelError};
use cubecl::prelude::*;

const OPERATION: &str = "instance norm";
/// Partial moments that one unit merges in a row.
const FAN_IN: usize = 64;
/// The passes that do not sum can work on longer blocks, and prepare their coefficients less often.
const APPLY_BLOCKS: usize = 4;

/// Shapes and settings of one normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Problem {
    batch: usize,
    voxels: usize,
    channels: usize,
    dtype: Dtype,
    slope: f32,
    epsilon: f32,
}

impl Problem {
    /// Activations `[batch, voxels, channels]` of type `dtype`, `voxels = depth * height * width`. `activation` is
    /// the slope of a leaky ReLU (nnU-Net: 0.01); `None` leaves it out. Epsilon is 1e-5.
    ///
    /// # Errors
    /// [`KernelError::Shape`] for empty shapes, [`KernelError::Dtype`] for integers.
    pub fn new(
        batch: usize,
        voxels: usize,
        channels: usize,
        dtype: Dtype,
        activation: Option<f32>,
    ) -> Result<Self, KernelError> {
        if batch == 0 || voxels == 0 || channels == 0 {
            return Err(KernelError::shape(OPERATION, "shape", "at least 1 everywhere", (batch, voxels, channels)));
        }
        if batch.checked_mul(voxels).and_then(|rows| rows.checked_mul(channels)).is_none() {
            return Err(KernelError::shape(OPERATION, "shape", "countable", (batch, voxels, channels)));
        }
        if !dtype.is_float() {
            return Err(KernelError::Dtype { operation: OPERATION, what: "x", expected: "floats", actual: dtype });
        }
        Ok(Self { batch, voxels, channels, dtype, slope: activation.unwrap_or(1.0), epsilon: 1e-5 })
    }

    /// The same with another epsilon.
    pub fn with_epsilon(self, epsilon: f32) -> Self {
        Self { epsilon, ..self }
    }

    /// Elements of `x`, `y`, `dx`, `dy`.
    pub fn elements(&self) -> usize {
        self.batch * self.voxels * self.channels
    }

    /// Elements of `statistics` and of `sums`.
    pub fn statistics_len(&self) -> usize {
        self.batch * 2 * self.channels
    }

    fn walk(&self, context: &Context, streams: usize) -> Result<Walk, KernelError> {
        check_count(context, OPERATION, self.elements())?;
        Ok(Walk::new(self.batch, self.voxels, self.channels, streams, context.caps()))
    }

    fn expect_norm(&self, norm: &Norm) -> Result<(), KernelError> {
        norm.statistics.expect(OPERATION, "statistics", self.statistics_len(), Dtype::F32)?;
        norm.gamma.expect(OPERATION, "gamma", self.channels, Dtype::F32)?;
        norm.beta.expect(OPERATION, "beta", self.channels, Dtype::F32)
    }
}

/// What normalises: f32 buffers.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// `[batch, 2, channels]`: mean and 1 / sqrt(variance + epsilon).
    pub statistics: &'a Buffer,
    /// `[channels]`.
    pub gamma: &'a Buffer,
    /// `[channels]`.
    pub beta: &'a Buffer,
}

/// Where the gradients of the parameters go: f32 `[channels]` each, overwritten.
#[derive(Clone, Copy, Debug)]
pub struct NormGradient<'a> {
    /// `dgamma`.
    pub gamma: &'a Buffer,
    /// `dbeta`.
    pub beta: &'a Buffer,
}

// --------------------------------------------------------------------------------------------- statistics

/// `partial` is `[tasks, 4, width]`: a pivot close to the mean, mean - pivot, sum of squared deviations from the mean,
/// number of rows.
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
            let share_of_here = here / (before + here);
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
                    // Exact: what rounding took from the shift. It makes the mean a sum of two floats, so that
                    // thousands of updates do not wear it down.
                    let offset = (partial[to + t] - shift[t]) + partial[to + groups + t];
                    let mean = sum[t] * Vector::new(1.0f32 / here);
                    let delta = mean - offset;
                    partial[to + t] = shift[t];
                    partial[to + groups + t] = offset + delta * Vector::new(share_of_here);
                    partial[to + 2 * groups + t] +=
                        square[t] - sum[t] * mean + delta * delta * Vector::new(before * share_of_here);
                }
            }
        }
    }
}

/// Merges the moments of the rows `low .. high` of `partial [.., 4, width]`, and in them of the elements
/// `element, element + step ..`: pivot, mean - pivot, sum of squared deviations, count.
#[cube]
fn merged(partial: &[f32], low: usize, high: usize, width: usize, element: usize, step: usize) -> (f32, f32, f32, f32) {
    let pivot = partial[low * 4 * width + element];
    let mut offset = 0.0f32;
    let mut square = 0.0f32;
    let mut count = 0.0f32;
    for row in low..high {
        for e in range_stepped(element, width, step) {
            let at = row * 4 * width + e;
            let more = partial[at + 3 * width];
            let delta = (partial[at] - pivot) + (partial[at + width] - offset);
            let share_of_more = more / (count + more);
            offset += delta * share_of_more;
            square += partial[at + 2 * width] + delta * delta * count * share_of_more;
            count += more;
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

/// `partial [batch, parts, 4, width]` -> `statistics [batch, 2, channels]`.
#[cube(launch_unchecked)]
fn statistics_kernel(
    partial: &[f32],
    statistics: &mut [f32],
    batch: usize,
    parts: usize,
    width: usize,
    channels: usize,
    epsilon: f32,
) {
    let (low, high) = strip(batch * channels);
    for i in low..high {
        let n = i / channels;
        let c = i % channels;
        let (pivot, offset, square, count) = merged(partial, n * parts, (n + 1) * parts, width, c, channels);
        let variance = square / count;
        // Rounding can leave it a little below zero. Not max(): that would hide a NaN.
        let variance = select(variance < 0.0f32, 0.0f32, variance);
        statistics[n * 2 * channels + c] = pivot + offset;
        statistics[(n * 2 + 1) * channels + c] = 1.0f32 / (variance + epsilon).sqrt();
    }
}

// ------------------------------------------------------------------------------------------ element passes

/// `values[base + channel]` for the elements `element ..` of a row. Rows of several voxels repeat the channels.
#[cube]
fn of_channels<N: Size>(
    values: &[f32],
    base: usize,
    element: usize,
    channels: usize,
    #[comptime] cyclic: bool,
) -> Vector<f32, N> {
    let mut out = Vector::<f32, N>::empty();
    #[unroll]
    for l in 0..N::value() {
        let channel = if comptime!(cyclic) { (element + l) % channels } else { element + l };
        out.insert(l, values[base + channel]);
    }
    out
}

/// Every pass computes z with this function, so that all agree on its sign.
#[cube]
fn affine<N: Size>(centred: Vector<f32, N>, scale: Vector<f32, N>, beta: Vector<f32, N>) -> Vector<f32, N> {
    fma(centred, scale, beta)
}

/// `a` where `z > 0`, `slope * a` elsewhere: the leaky ReLU of z, or its derivative times dy.
#[cube]
fn leak<N: Size>(z: Vector<f32, N>, a: Vector<f32, N>, slope: Vector<f32, N>) -> Vector<f32, N> {
    select_many(z.greater_than(&Vector::new(0.0f32)), a, a * slope)
}

#[cube(launch_unchecked)]
fn apply_kernel<E: Float, N: Size>(
    x: &[Vector<E, N>],
    statistics: &[f32],
    gamma: &[f32],
    beta: &[f32],
    y: &mut [Vector<E, N>],
    channels: usize,
    slope: f32,
    path: &Path,
    #[comptime] tile: usize,
    #[comptime] chunked: bool,
    #[comptime] cyclic: bool,
    #[define(E)] _dtype: ElemType,
) {
    let slope = Vector::<f32, N>::new(slope);
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
                    mean[t] = of_channels(statistics, means, e, channels, cyclic);
                    let rstd = of_channels::<N>(statistics, means + channels, e, channels, cyclic);
                    scale[t] = rstd * of_channels::<N>(gamma, 0usize, e, channels, cyclic);
                    shift[t] = of_channels(beta, 0usize, e, channels, cyclic);
                }
                for i in low..high {
                    let here = (first + i * step) * path.groups + at * tile;
                    #[unroll]
                    for t in 0..tile {
                        let centred = Vector::<f32, N>::cast_from(x[here + t]) - mean[t];
                        let z = affine(centred, scale[t], shift[t]);
                        y[here + t] = Vector::cast_from(leak(z, z, slope));
                    }
                }
            }
        }
    }
}

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

/// Writes `statistics` and `y`. `norm.statistics` is an output.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if a buffer does not fit the problem, [`KernelError::Limit`]
/// beyond the device's index range. The same holds for all functions of this module.
pub fn forward(context: &Context, problem: &Problem, x: &Buffer, norm: &Norm, y: &Buffer) -> Result<(), KernelError> {
    statistics(context, problem, x, norm.statistics)?;
    apply(context, problem, x, norm, y)
}

/// Writes `statistics [batch, 2, channels]`: mean and 1 / sqrt(variance + epsilon) of every sample and channel.
#[allow(clippy::missing_errors_doc, reason = "see forward")]
pub fn statistics(context: &Context, problem: &Problem, x: &Buffer, statistics: &Buffer) -> Result<(), KernelError> {
    x.expect(OPERATION, "x", problem.elements(), problem.dtype)?;
    statistics.expect(OPERATION, "statistics", problem.statistics_len(), Dtype::F32)?;
    let walk = problem.walk(context, 1)?;
    let mut partial = context.empty(walk.tasks() * 4 * walk.width, Dtype::F32)?;
    let (count, dim) = walk.cubes(context, OPERATION)?;
    // SAFETY: the walk covers the elements of `x`, and `tasks * 4 * width` of `partial`: their lengths.
    unsafe {
        moments_kernel::launch_unchecked(
            context.client(),
            count,
            dim,
            walk.lanes,
            x.arg(),
            partial.arg(),
            walk.arg(),
            walk.tile,
            walk.chunked,
            problem.dtype.elem(),
        );
    }
    context.launched();

    let mut parts = walk.parts;
    while parts > FAN_IN {
        let kept = parts.div_ceil(FAN_IN);
        let out = context.empty(walk.batch * kept * 4 * walk.width, Dtype::F32)?;
        let (count, dim) = cubes(context, OPERATION, walk.batch * kept * walk.width)?;
        // SAFETY: `partial` and `out` have the lengths that the kernel derives from the same scalars.
        unsafe {
            merge_parts_kernel::launch_unchecked(
                context.client(),
                count,
                dim,
                partial.arg(),
                out.arg(),
                walk.batch,
                parts,
                walk.width,
                FAN_IN,
            );
        }
        context.launched();
        (partial, parts) = (out, kept);
    }
    let (count, dim) = cubes(context, OPERATION, walk.batch * problem.channels)?;
    // SAFETY: `partial` holds `batch * parts * 4 * width` elements, `statistics` `batch * 2 * channels`.
    unsafe {
        statistics_kernel::launch_unchecked(
            context.client(),
            count,
            dim,
            partial.arg(),
            statistics.arg(),
            walk.batch,
            parts,
            walk.width,
            problem.channels,
            problem.epsilon,
        );
    }
    context.launched();
    Ok(())
}

/// Writes `y = leaky_relu(gamma * (x - mean) * rstd + beta)`.
#[allow(clippy::missing_errors_doc, reason = "see forward")]
pub fn apply(context: &Context, problem: &Problem, x: &Buffer, norm: &Norm, y: &Buffer) -> Result<(), KernelError> {
    x.expect(OPERATION, "x", problem.elements(), problem.dtype)?;
    y.expect(OPERATION, "y", problem.elements(), problem.dtype)?;
    problem.expect_norm(norm)?;
    let walk = problem.walk(context, 2)?.with_longer_blocks(APPLY_BLOCKS);
    let (count, dim) = walk.cubes(context, OPERATION)?;
    // SAFETY: the walk covers the elements of `x` and `y`; the parameters have `channels`, and the statistics
    // `batch * 2 * channels` elements.
    unsafe {
        apply_kernel::launch_unchecked(
            context.client(),
            count,
            dim,
            walk.lanes,
            x.arg(),
            norm.statistics.arg(),
            norm.gamma.arg(),
            norm.beta.arg(),
            y.arg(),
            problem.channels,
            problem.slope,
            walk.arg(),
            walk.tile,
            walk.chunked,
            walk.cyclic(problem.channels),
            problem.dtype.elem(),
        );
    }
    context.launched();
    Ok(())
}

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
    x.expect(OPERATION, "x", problem.elements(), problem.dtype)?;
    dy.expect(OPERATION, "dy", problem.elements(), problem.dtype)?;
    sums.expect(OPERATION, "sums", problem.statistics_len(), Dtype::F32)?;
    gradient.gamma.expect(OPERATION, "dgamma", problem.channels, Dtype::F32)?;
    gradient.beta.expect(OPERATION, "dbeta", problem.channels, Dtype::F32)?;
    problem.expect_norm(norm)?;
    let walk = problem.walk(context, 2)?;
    let partial = context.empty(walk.tasks() * 2 * walk.width, Dtype::F32)?;
    let (count, dim) = walk.cubes(context, OPERATION)?;
    // SAFETY: the walk covers the elements of `x` and `dy`, and `tasks * 2 * width` of `partial`; the parameters have
    // `channels`, and the statistics `batch * 2 * channels` elements.
    unsafe {
        backward_parts_kernel::launch_unchecked(
            context.client(),
            count,
            dim,
            walk.lanes,
            x.arg(),
            dy.arg(),
            norm.statistics.arg(),
            norm.gamma.arg(),
            norm.beta.arg(),
            partial.arg(),
            problem.channels,
            problem.slope,
            walk.arg(),
            walk.tile,
            walk.chunked,
            walk.cyclic(problem.channels),
            problem.dtype.elem(),
        );
    }
    context.launched();
    let (partial, parts) = gather_parts(context, OPERATION, partial, walk.batch, walk.parts, 2 * walk.width)?;
    let (count, dim) = cubes(context, OPERATION, problem.channels)?;
    // SAFETY: `partial` holds `batch * parts * 2 * width` elements, `sums` `batch * 2 * channels`, the others `channels`.
    unsafe {
        backward_sums_kernel::launch_unchecked(
            context.client(),
            count,
            dim,
            partial.arg(),
            sums.arg(),
            gradient.gamma.arg(),
            gradient.beta.arg(),
            walk.batch,
            parts,
            walk.width,
            problem.channels,
        );
    }
    context.launched();
    Ok(())
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
    x.expect(OPERATION, "x", problem.elements(), problem.dtype)?;
    dy.expect(OPERATION, "dy", problem.elements(), problem.dtype)?;
    dx.expect(OPERATION, "dx", problem.elements(), problem.dtype)?;
    sums.expect(OPERATION, "sums", problem.statistics_len(), Dtype::F32)?;
    problem.expect_norm(norm)?;
    let walk = problem.walk(context, 3)?.with_longer_blocks(APPLY_BLOCKS);
    let (count, dim) = walk.cubes(context, OPERATION)?;
    // SAFETY: the walk covers the elements of `x`, `dy` and `dx`; the parameters have `channels`, statistics and sums
    // `batch * 2 * channels` elements.
    unsafe {
        backward_apply_kernel::launch_unchecked(
            context.client(),
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
        );
    }
    context.launched();
    Ok(())
}
