//! A Gaussian blur along one axis, with taps of its own for every channel. Reads each value once from memory and the
//! neighbours from the caches, and writes it to another buffer.

use super::patch::{Extent, OPERATION, Patch, row_work, rows_and_voxels};
use crate::{Buffer, Context, KernelError};
use cubecl::prelude::*;

/// Taps of a normalised Gaussian kernel of standard deviation `sigma` voxels. Their number is the odd number nearest to
/// `6 sigma + 0.5`, as batchgeneratorsv2 rounds.
pub fn gaussian_taps(sigma: f64) -> Vec<f32> {
    let wanted = 6.0 * sigma + 0.5;
    let even = wanted.round_ties_even();
    let count = match even as usize {
        odd if odd % 2 == 1 => odd,
        even_count if wanted >= even => even_count + 1,
        even_count => even_count.saturating_sub(1).max(1),
    };
    let centre = (count - 1) as f64 / 2.0;
    let values: Vec<f64> = (0..count).map(|k| (-0.5 * ((k as f64 - centre) / sigma).powi(2)).exp()).collect();
    let sum: f64 = values.iter().sum();
    values.iter().map(|value| (value / sum) as f32).collect()
}

/// `i` where it is one of `0..size`, else reflected at the first and the last voxel.
#[cube]
fn reflected(i: i32, size: usize) -> usize {
    let last = i32::cast_from(size) - 1i32;
    // Volumes of a few voxels are crossed more than once.
    let period = max(2i32 * last, 1i32);
    let i = select(i < 0i32, -i, i) % period;
    usize::cast_from(select(i > last, period - i, i))
}

/// `taps` is `[channels, 2 * radius + 1]`.
#[cube(launch_unchecked)]
fn blur_kernel(
    x: &[f32],
    y: &mut [f32],
    taps: &[f32],
    radius: usize,
    channels: usize,
    extent: &Extent,
    #[comptime] axis: usize,
    #[comptime] by_row: bool,
) {
    let count = 2 * radius + 1;
    let row_values = extent.width * channels;
    let (row_low, row_high, x_low, x_high) = rows_and_voxels(extent.depth * extent.height, extent.width, by_row);
    for row in row_low..row_high {
        let z = row / extent.height;
        let h = row % extent.height;
        for at in x_low..x_high {
            for c in 0..channels {
                let mut sum = 0.0f32;
                for t in 0..count {
                    let step = i32::cast_from(t) - i32::cast_from(radius);
                    let from = if comptime!(axis == 0) {
                        let z = reflected(i32::cast_from(z) + step, extent.depth);
                        (z * extent.height + h) * row_values + at * channels
                    } else if comptime!(axis == 1) {
                        let h = reflected(i32::cast_from(h) + step, extent.height);
                        (z * extent.height + h) * row_values + at * channels
                    } else {
                        row * row_values + reflected(i32::cast_from(at) + step, extent.width) * channels
                    };
                    sum += taps[c * count + t] * x[from + c];
                }
                y[row * row_values + at * channels + c] = sum;
            }
        }
    }
}

/// Writes to `y` the image `x`, blurred along `axis` (0 depth, 1 height, 2 width) with the taps of every channel. A
/// channel with a single tap of 1 is copied.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if buffers do not fit, there are not taps for every channel, or their
/// number is even, [`KernelError::Limit`] beyond the device's index range.
pub fn blur(
    context: &Context,
    patch: &Patch,
    x: &Buffer,
    y: &Buffer,
    axis: usize,
    taps: &[Vec<f32>],
) -> Result<(), KernelError> {
    patch.check_image("x", x)?;
    patch.check_image("y", y)?;
    patch.check_parameters("taps", taps)?;
    if axis > 2 {
        return Err(KernelError::shape(OPERATION, "axis", "0, 1 or 2", axis));
    }
    if let Some(even) = taps.iter().find(|taps| taps.len() % 2 == 0) {
        return Err(KernelError::shape(OPERATION, "number of taps", "odd", even.len()));
    }
    let radius = taps.iter().map(|taps| taps.len() / 2).max().unwrap_or(0);
    let mut table = vec![0.0f32; patch.channels * (2 * radius + 1)];
    for (row, taps) in table.chunks_exact_mut(2 * radius + 1).zip(taps) {
        row[radius - taps.len() / 2..][..taps.len()].copy_from_slice(taps);
    }
    let table = context.upload_f32(&table)?;
    let (work, by_row) = row_work(context, patch);
    context.launch(OPERATION, work, |client, count, dim| {
        // SAFETY: `x` and `y` hold the patch, into which all indices are reflected; the table holds the taps of its channels.
        unsafe {
            blur_kernel::launch_unchecked(
                client,
                count,
                dim,
                x.arg(),
                y.arg(),
                table.arg(),
                radius,
                patch.channels,
                patch.extent(),
                axis,
                by_row,
            )
        }
    })
}
