//! A Gaussian blur along one axis, with taps of its own for every channel. Reads each value once from memory and the
//! neighbours from the caches, and writes it to another buffer.

use super::patch::{Extent, OPERATION, Patch, rows_and_voxels};
use crate::elementwise::lanes_of;
use crate::{Buffer, Context, Dtype, KernelError, Work};
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
fn reflected(i: isize, size: usize) -> u32 {
    let last = size as isize - 1;
    // Volumes of a few voxels are crossed more than once.
    let period = (2 * last).max(1);
    let i = i.abs() % period;
    (if i > last { period - i } else { i }) as u32
}

/// Along depth or height: whole rows are added up. `taps` is `[count, period, lanes]`, where lanes and vectors have the taps of
/// their channels; `places` is `[size, count]`: which voxel along the axis a tap of a voxel belongs to.
#[cube(launch_unchecked)]
fn blur_rows_kernel<N: Size>(
    x: &[Vector<f32, N>],
    y: &mut [Vector<f32, N>],
    taps: &[Vector<f32, N>],
    places: &[u32],
    count: usize,
    period: usize,
    vectors: usize,
    extent: &Extent,
    #[comptime] along_depth: bool,
    #[comptime] by_row: bool,
) {
    let (row_low, row_high, low, high) = rows_and_voxels(extent.depth * extent.height, vectors, by_row);
    for row in row_low..row_high {
        let z = row / extent.height;
        let h = row % extent.height;
        let first = if comptime!(along_depth) { z * count } else { h * count };
        for at in low..high {
            let phase = at % period;
            let mut sum = Vector::<f32, N>::new(0.0);
            for t in 0..count {
                let place = usize::cast_from(places[first + t]);
                let from = if comptime!(along_depth) { place * extent.height + h } else { z * extent.height + place };
                sum += taps[t * period + phase] * x[from * vectors + at];
            }
            y[row * vectors + at] = sum;
        }
    }
}

/// Along width. `taps` is `[count, channels]`, `places` as above; a voxel has `vectors` vectors of channels.
#[cube(launch_unchecked)]
fn blur_width_kernel<N: Size>(
    x: &[Vector<f32, N>],
    y: &mut [Vector<f32, N>],
    taps: &[Vector<f32, N>],
    places: &[u32],
    count: usize,
    vectors: usize,
    extent: &Extent,
    #[comptime] by_row: bool,
) {
    let (row_low, row_high, x_low, x_high) = rows_and_voxels(extent.depth * extent.height, extent.width, by_row);
    for row in row_low..row_high {
        let first = row * extent.width;
        for at in x_low..x_high {
            for v in 0..vectors {
                let mut sum = Vector::<f32, N>::new(0.0);
                for t in 0..count {
                    let from = first + usize::cast_from(places[at * count + t]);
                    sum += taps[t * vectors + v] * x[from * vectors + v];
                }
                y[(first + at) * vectors + v] = sum;
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
    let count = 2 * radius + 1;
    let tap = |c: usize, t: usize| (t + taps[c].len() / 2).checked_sub(radius).and_then(|t| taps[c].get(t)).copied();
    let size = patch.dims[axis];
    let place = |at: usize, t: usize| reflected((at + t) as isize - radius as isize, size);
    let places: Vec<u32> = (0..size * count).map(|i| place(i / count, i % count)).collect();
    let places = context.upload(&places, Dtype::U32)?;
    // Lanes are channels, over and over: the same ones again after a whole number of vectors.
    let row = patch.dims[2] * patch.channels;
    let lanes = lanes_of(context, if axis < 2 { row } else { patch.channels });
    let period =
        (1..=patch.channels).find(|period| (period * lanes).is_multiple_of(patch.channels)).unwrap_or(patch.channels);
    let table = (0..count * period * lanes).map(|i| tap(i % (period * lanes) % patch.channels, i / (period * lanes)));
    let table = context.upload_f32(&table.map(Option::unwrap_or_default).collect::<Vec<_>>())?;
    let by_row = context.caps().cores.is_some();
    let work = Work::Items(if by_row {
        patch.rows()
    } else {
        if axis < 2 { patch.elements() / lanes } else { patch.voxels() }
    });
    context.launch(OPERATION, work, |client, cubes, dim| {
        // SAFETY: `x` and `y` hold the patch, whose rows or voxels are whole vectors; places lie on the axis, and the table holds the
        // taps of the channels of `period` vectors.
        unsafe {
            if axis == 2 {
                blur_width_kernel::launch_unchecked(
                    client,
                    cubes,
                    dim,
                    lanes,
                    x.arg(),
                    y.arg(),
                    table.arg(),
                    places.arg(),
                    count,
                    period,
                    patch.extent(),
                    by_row,
                )
            } else {
                blur_rows_kernel::launch_unchecked(
                    client,
                    cubes,
                    dim,
                    lanes,
                    x.arg(),
                    y.arg(),
                    table.arg(),
                    places.arg(),
                    count,
                    period,
                    row / lanes,
                    patch.extent(),
                    axis == 0,
                    by_row,
                )
            }
        }
    })
}
