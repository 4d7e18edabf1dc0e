//! Brightness, contrast and gamma: changes of each value by itself, with coefficients of the channel.
//!
//! What they need to know of the image stays on the device: its mean and deviation (instance norm's statistics), and its
//! range. A small kernel turns that and the drawn parameters into five coefficients a channel:
//!
//! ```text
//! affine   y = clamp((x - c0) c1 + c2, c3, c4)
//! power    y = ((x - c0) c1)^c2 c3 + c4
//! ```
//!
//! Bytes: brightness moves the image twice, contrast four times (mean, range, read, write), gamma seven times (deviation,
//! range, read, write, deviation, read, write).

use super::patch::{OPERATION, Patch};
use super::range::range;
use crate::block::strip;
use crate::instance_norm::{self, of_channels};
use crate::reduce::{Path, Walk, check_count, rows_of, share};
use crate::vector_math::{exp, ln};
use crate::{Buffer, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// Where upstream divides by a range or a deviation, it is at least this.
const LEAST_DIVISOR: f32 = 1e-7;
const COEFFICIENTS: usize = 5;

/// What a table of coefficients is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Change {
    /// `y = factor x`.
    Brightness,
    /// `y = clamp(factor (x - mean) + mean, min, max)`.
    Contrast,
    /// `y = ((s x - min) / (max - min))^exponent (max - min) + min`, of the image with the sign s.
    Power,
    /// The mean and deviation of before, and the sign undone.
    Restore,
}

/// `before` and `after` are instance norm's statistics `[2, channels]`, `bounds` is `[2, channels]`; what a change does
/// not need is not read. `table` is `[5, channels]`.
#[cube(launch_unchecked)]
fn table_kernel(
    parameters: &[f32],
    before: &[f32],
    after: &[f32],
    bounds: &[f32],
    table: &mut [f32],
    channels: usize,
    voxels: f32,
    sign: f32,
    #[comptime] change: Change,
) {
    let (low, high) = strip(channels);
    for c in low..high {
        if comptime!(change == Change::Brightness) {
            table[c] = 0.0;
            table[channels + c] = parameters[c];
            table[2 * channels + c] = 0.0;
            table[3 * channels + c] = f32::NEG_INFINITY;
            table[4 * channels + c] = f32::INFINITY;
        }
        if comptime!(change == Change::Contrast) {
            table[c] = before[c];
            table[channels + c] = parameters[c];
            table[2 * channels + c] = before[c];
            table[3 * channels + c] = bounds[c];
            table[4 * channels + c] = bounds[channels + c];
        }
        if comptime!(change == Change::Power) {
            // Of the image with its sign.
            let least = select(sign > 0.0f32, bounds[c], -bounds[channels + c]);
            let range = bounds[channels + c] - bounds[c];
            table[c] = least * sign;
            table[channels + c] = sign / max(range, LEAST_DIVISOR);
            table[2 * channels + c] = parameters[c];
            table[3 * channels + c] = range;
            table[4 * channels + c] = least;
        }
        if comptime!(change == Change::Restore) {
            // Deviations with n - 1 in the denominator; a constant channel's inverse deviation is infinite.
            let unbiased = (voxels / (voxels - 1.0f32)).sqrt();
            let deviation_before = unbiased / before[channels + c];
            let deviation_after = unbiased / after[channels + c];
            table[c] = after[c];
            table[channels + c] = sign * (deviation_before / max(deviation_after, LEAST_DIVISOR));
            table[2 * channels + c] = before[c];
            table[3 * channels + c] = f32::NEG_INFINITY;
            table[4 * channels + c] = f32::INFINITY;
        }
    }
}

#[cube(launch_unchecked)]
fn change_kernel<N: Size>(
    x: &mut [Vector<f32, N>],
    table: &[f32],
    channels: usize,
    path: &Path,
    #[comptime] power: bool,
    #[comptime] polynomials: bool,
    #[comptime] tile: usize,
    #[comptime] chunked: bool,
    #[comptime] cyclic: bool,
) {
    let (task_low, task_high, tile_low, tile_high) = share(path, tile, chunked);
    for task in task_low..task_high {
        let (first, step, count) = rows_of(task, path, chunked);
        for low in range_stepped(0, count, path.block) {
            let high = (low + path.block).min(count);
            for at in tile_low..tile_high {
                let mut coefficients = Array::<Vector<f32, N>>::new(comptime!(tile * COEFFICIENTS));
                #[unroll]
                for t in 0..tile {
                    let e = (at * tile + t) * N::value();
                    #[unroll]
                    for k in 0..COEFFICIENTS {
                        coefficients[t * COEFFICIENTS + k] = of_channels::<N>(table, k * channels, e, channels, cyclic);
                    }
                }
                for i in low..high {
                    let here = (first + i * step) * path.groups + at * tile;
                    #[unroll]
                    for t in 0..tile {
                        let k = t * COEFFICIENTS;
                        let scaled = (x[here + t] - coefficients[k]) * coefficients[k + 1];
                        if comptime!(power) {
                            let raised = raise::<N>(scaled, coefficients[k + 2], polynomials);
                            x[here + t] = raised * coefficients[k + 3] + coefficients[k + 4];
                        } else {
                            let value = scaled + coefficients[k + 2];
                            x[here + t] = min(max(value, coefficients[k + 3]), coefficients[k + 4]);
                        }
                    }
                }
            }
        }
    }
}

/// `base^exponent` for bases in [0, 1] and exponents above 0. The polynomials are made for a CPU's vectors.
#[cube]
fn raise<N: Size>(base: Vector<f32, N>, exponent: Vector<f32, N>, #[comptime] polynomials: bool) -> Vector<f32, N> {
    let least = Vector::<f32, N>::new(f32::MIN_POSITIVE);
    let normal = max(base, least);
    let value =
        if comptime!(polynomials) { exp::<N>(exponent * ln::<N>(normal)) } else { (exponent * normal.ln()).exp() };
    select_many(base.less_than(&least), Vector::new(0.0f32), value)
}

// ----------------------------------------------------------------------------------------------- launches

/// What a table is made of.
struct Known<'a> {
    before: &'a Buffer,
    after: &'a Buffer,
    bounds: &'a Buffer,
}

fn apply(
    context: &Context,
    patch: &Patch,
    image: &Buffer,
    change: Change,
    parameters: &Buffer,
    known: Known,
    sign: f32,
) -> Result<(), KernelError> {
    check_count(context, OPERATION, image.len())?;
    let table = context.empty(COEFFICIENTS * patch.channels, Dtype::F32)?;
    context.launch(OPERATION, Work::Items(patch.channels), |client, count, dim| {
        // SAFETY: the table has five, what the change reads of the others at least two elements a channel, parameters one.
        unsafe {
            table_kernel::launch_unchecked(
                client,
                count,
                dim,
                parameters.arg(),
                known.before.arg(),
                known.after.arg(),
                known.bounds.arg(),
                table.arg(),
                patch.channels,
                patch.voxels() as f32,
                sign,
                change,
            )
        }
    })?;
    let walk = Walk::new(1, patch.voxels(), patch.channels, 1, context.caps());
    // As many coefficients as fit the registers; a tile is a power of two.
    let walk = Walk { tile: 1, ..walk }.with_longer_blocks(4);
    context.launch(OPERATION, walk.work(), |client, count, dim| {
        // SAFETY: the walk covers the elements of the image; the table has five elements a channel.
        unsafe {
            change_kernel::launch_unchecked(
                client,
                count,
                dim,
                walk.lanes,
                image.arg(),
                table.arg(),
                patch.channels,
                walk.arg(),
                change == Change::Power,
                context.caps().cores.is_some(),
                walk.tile,
                walk.chunked,
                walk.cyclic(patch.channels),
            )
        }
    })
}

/// Mean and inverse deviation `[2, channels]`.
fn statistics(context: &Context, patch: &Patch, image: &Buffer) -> Result<Buffer, KernelError> {
    let problem = instance_norm::Problem::new(1, patch.voxels(), patch.channels, Dtype::F32, None)?.with_epsilon(0.0);
    let statistics = context.empty(problem.statistics_len(), Dtype::F32)?;
    instance_norm::statistics(context, &problem, image, &statistics)?;
    Ok(statistics)
}

/// Multiplies every channel by its factor, in place.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if the image is not one of the patch or there are not as many parameters
/// as channels, [`KernelError::Limit`] beyond the device's index range. So it is for all functions here.
pub fn brightness(context: &Context, patch: &Patch, image: &Buffer, factors: &[f32]) -> Result<(), KernelError> {
    patch.check_image("image", image)?;
    patch.check_parameters("factors", factors)?;
    let factors = context.upload_f32(factors)?;
    let known = Known { before: &factors, after: &factors, bounds: &factors };
    apply(context, patch, image, Change::Brightness, &factors, known, 1.0)
}

/// Multiplies every channel's differences from its mean by its factor, in place, and keeps to its range.
#[allow(clippy::missing_errors_doc, reason = "see brightness")]
pub fn contrast(context: &Context, patch: &Patch, image: &Buffer, factors: &[f32]) -> Result<(), KernelError> {
    patch.check_image("image", image)?;
    patch.check_parameters("factors", factors)?;
    let factors = context.upload_f32(factors)?;
    let (before, bounds) = (statistics(context, patch, image)?, range(context, patch, image)?);
    let known = Known { before: &before, after: &before, bounds: &bounds };
    apply(context, patch, image, Change::Contrast, &factors, known, 1.0)
}

/// Raises every channel, scaled to 0 to 1, to its exponent (above 0), in place, and gives it its former mean and deviation.
/// `inverted` does so with the image times -1. A constant channel stays what it is.
#[allow(clippy::missing_errors_doc, reason = "see brightness")]
pub fn gamma(
    context: &Context,
    patch: &Patch,
    image: &Buffer,
    exponents: &[f32],
    inverted: bool,
) -> Result<(), KernelError> {
    patch.check_image("image", image)?;
    patch.check_parameters("exponents", exponents)?;
    if patch.voxels() == 1 {
        // Nothing but its own mean; the deviation of one value is not defined.
        return Ok(());
    }
    let sign = if inverted { -1.0 } else { 1.0 };
    let exponents = context.upload_f32(exponents)?;
    let (before, bounds) = (statistics(context, patch, image)?, range(context, patch, image)?);
    let known = Known { before: &before, after: &before, bounds: &bounds };
    apply(context, patch, image, Change::Power, &exponents, known, sign)?;
    let after = statistics(context, patch, image)?;
    let known = Known { before: &before, after: &after, bounds: &bounds };
    apply(context, patch, image, Change::Restore, &exponents, known, sign)
}
