//! Simulates an image of lower resolution: the nearest voxels of a coarse grid, interpolated linearly.
//!
//! The coarse image is never stored: each value interpolates the eight voxels of the fine image that stand for its coarse
//! neighbours, which small tables list for every axis. PyTorch's `interpolate` twice: `nearest-exact` down, `trilinear` with
//! `align_corners=False` up.

use super::patch::{Extent, OPERATION, Patch, row_work, rows_and_voxels};
use crate::{Buffer, Context, Dtype, KernelError};
use cubecl::prelude::*;

/// For one coordinate of the fine grid: the two fine coordinates whose values are mixed, and the share of the second.
type Mix = (u32, u32, f32);

/// The mixes of an axis of `fine` voxels that is reduced to `coarse`.
fn mixes(fine: usize, coarse: usize) -> Vec<Mix> {
    // In f32, as PyTorch computes them: another rounding would choose other voxels where a coarse one lies between two.
    let down = fine as f32 / coarse as f32;
    let up = coarse as f32 / fine as f32;
    let stands_for = |k: usize| (((k as f32 + 0.5) * down).floor() as usize).min(fine - 1) as u32;
    (0..fine)
        .map(|i| {
            let position = (up * (i as f32 + 0.5) - 0.5).max(0.0);
            let low = (position as usize).min(coarse - 1);
            let high = (low + 1).min(coarse - 1);
            (stands_for(low), stands_for(high), (position - low as f32).clamp(0.0, 1.0))
        })
        .collect()
}

/// `places` is `[channels, depth + height + width, 2]`, `shares` without the last axis.
#[cube(launch_unchecked)]
fn low_resolution_kernel(
    x: &[f32],
    y: &mut [f32],
    places: &[u32],
    shares: &[f32],
    channels: usize,
    extent: &Extent,
    #[comptime] by_row: bool,
) {
    let entries = extent.depth + extent.height + extent.width;
    let (row_low, row_high, x_low, x_high) = rows_and_voxels(extent.depth * extent.height, extent.width, by_row);
    for row in row_low..row_high {
        for c in 0..channels {
            let z = c * entries + row / extent.height;
            let h = c * entries + extent.depth + row % extent.height;
            let w = c * entries + extent.depth + extent.height;
            let z0 = usize::cast_from(places[2 * z]) * extent.height;
            let z1 = usize::cast_from(places[2 * z + 1]) * extent.height;
            let h0 = usize::cast_from(places[2 * h]);
            let h1 = usize::cast_from(places[2 * h + 1]);
            let share_z = shares[z];
            let share_h = shares[h];
            let row00 = (z0 + h0) * extent.width;
            let row01 = (z0 + h1) * extent.width;
            let row10 = (z1 + h0) * extent.width;
            let row11 = (z1 + h1) * extent.width;
            for at in x_low..x_high {
                let w0 = usize::cast_from(places[2 * (w + at)]);
                let w1 = usize::cast_from(places[2 * (w + at) + 1]);
                let share = shares[w + at];
                let v00 = mix(x[(row00 + w0) * channels + c], x[(row00 + w1) * channels + c], share);
                let v01 = mix(x[(row01 + w0) * channels + c], x[(row01 + w1) * channels + c], share);
                let v10 = mix(x[(row10 + w0) * channels + c], x[(row10 + w1) * channels + c], share);
                let v11 = mix(x[(row11 + w0) * channels + c], x[(row11 + w1) * channels + c], share);
                let value = mix(mix(v00, v01, share_h), mix(v10, v11, share_h), share_z);
                y[(row * extent.width + at) * channels + c] = value;
            }
        }
    }
}

/// Exactly `low` where the share is 0.
#[cube]
fn mix(low: f32, high: f32, share: f32) -> f32 {
    (1.0f32 - share) * low + share * high
}

/// Writes to `y` the image `x` as if each channel had been measured with `coarse` voxels along (depth, height, width).
/// `None` copies the channel.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if buffers do not fit, or a channel is to have no voxels or more than
/// there are, [`KernelError::Limit`] beyond the device's index range.
pub fn low_resolution(
    context: &Context,
    patch: &Patch,
    x: &Buffer,
    y: &Buffer,
    coarse: &[Option<[usize; 3]>],
) -> Result<(), KernelError> {
    patch.check_image("x", x)?;
    patch.check_image("y", y)?;
    patch.check_parameters("resolutions", coarse)?;
    let (mut places, mut shares) = (Vec::new(), Vec::new());
    for coarse in coarse {
        for (axis, &fine) in patch.dims.iter().enumerate() {
            let coarse = coarse.map_or(fine, |coarse| coarse[axis]);
            if coarse == 0 || coarse > fine {
                let expected = format_args!("1 to {fine} voxels");
                return Err(KernelError::shape(OPERATION, "resolution", expected, coarse));
            }
            for (low, high, share) in mixes(fine, coarse) {
                places.extend([low, high]);
                shares.push(share);
            }
        }
    }
    let places = context.upload(&places, Dtype::U32)?;
    let shares = context.upload_f32(&shares)?;
    let (work, by_row) = row_work(context, patch);
    context.launch(OPERATION, work, |client, count, dim| {
        // SAFETY: `x` and `y` hold the patch; the tables have entries for every coordinate of every channel, all inside of it.
        unsafe {
            low_resolution_kernel::launch_unchecked(
                client,
                count,
                dim,
                x.arg(),
                y.arg(),
                places.arg(),
                shares.arg(),
                patch.channels,
                patch.extent(),
                by_row,
            )
        }
    })
}

#[cfg(test)]
mod tests {
    use super::mixes;

    #[test]
    fn an_axis_of_the_same_length_stays_what_it_is() {
        for fine in [1, 2, 7, 40, 129] {
            for (i, (low, _, share)) in mixes(fine, fine).into_iter().enumerate() {
                assert!(low as usize == i && share < 1e-4, "{i} of {fine}: {low}, {share}");
            }
        }
    }

    #[test]
    fn coarse_voxels_stand_for_the_middle_of_their_part() {
        // Coarse voxels 0 and 1 of 4 are the fine voxels 1 and 3; coarse positions are -0.25 -> 0, 0.25, 0.75, 1.25 -> 1.
        assert_eq!(mixes(4, 2), [(1, 3, 0.0), (1, 3, 0.25), (1, 3, 0.75), (3, 3, 0.25)]);
        // One coarse voxel stands for all, whatever the share.
        assert!(mixes(3, 1).iter().all(|&(low, high, _)| (low, high) == (1, 1)));
    }
}
