//! Rotation and scaling about the centre, from a larger patch to a smaller one, in one pass.
//!
//! Reads of the source what the eight corners touch, writes the destination once. The vote: every label's indicator is
//! interpolated as the image is, outside counts as label -1, and the largest wins; scores are compared as upstream compares
//! them, times 1000 and rounded to 11 bits (half precision). A tie goes to the nearest voxel's label if that is among the
//! tied ones, else to the smallest of them.

use super::patch::{Extent, OPERATION, Patch, Sample, row_work, rows_and_voxels};
use crate::{Buffer, Context, Dtype, KernelError};
use cubecl::prelude::*;

/// How labels are interpolated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LabelRule {
    /// The label whose linearly interpolated indicator is the largest.
    Vote,
    /// The nearest voxel's label.
    Nearest,
}

/// The two voxels along an axis that a position lies between.
#[derive(CubeType, Clone, Copy)]
struct Ends {
    /// Indices, moved into the volume.
    low: usize,
    high: usize,
    /// Linear weight of the higher one.
    share: f32,
    low_inside: bool,
    high_inside: bool,
    /// Whether the higher one is the nearer one; halves go to the even index.
    high_is_near: bool,
}

#[cube]
fn ends(position: f32, size: usize) -> Ends {
    let whole = position.floor();
    let low = i32::cast_from(whole);
    let last = i32::cast_from(size) - 1i32;
    Ends {
        low: usize::cast_from(clamp(low, 0i32, last)),
        high: usize::cast_from(clamp(low + 1i32, 0i32, last)),
        share: position - whole,
        low_inside: low >= 0i32 && low <= last,
        high_inside: low + 1i32 >= 0i32 && low < last,
        high_is_near: position.round() > whole,
    }
}

/// Rounded to the 11 bits of half precision, ties to even. For 0 and normal numbers of half precision.
#[cube]
fn rounded_to_half(score: f32) -> f32 {
    let bits = u32::reinterpret(score);
    let even = (bits >> 13u32) & 1u32;
    f32::reinterpret((bits + 0xfffu32 + even) & 0xffff_e000u32)
}

/// The code with the most weight among eight corners.
#[cube]
fn winner(codes: &Array<u32>, weights: &Array<f32>, near: usize) -> u32 {
    let mut best = (-1.0f32).runtime();
    let mut of_near = (-2.0f32).runtime();
    let mut winner = 0u32;
    for k in 0..8usize {
        let code = codes[k];
        let mut sum = 0.0f32;
        #[unroll]
        for j in 0..8usize {
            sum += select(codes[j] == code, weights[j], 0.0f32);
        }
        let score = rounded_to_half(sum * 1000.0f32);
        let better = score > best || (score == best && code < winner);
        winner = select(better, code, winner);
        best = select(better, score, best);
        of_near = select(k == near, score, of_near);
    }
    select(of_near == best, codes[near], winner)
}

/// `map` holds the matrix, row by row. The sample's voxels begin at `first`.
#[cube(launch_unchecked)]
fn spatial_kernel<L: Int>(
    image: &[f32],
    labels: &[L],
    image_out: &mut [f32],
    labels_out: &mut [L],
    map: &[f32],
    first: usize,
    channels: usize,
    from: &Extent,
    to: &Extent,
    #[comptime] by_row: bool,
    #[comptime] vote: bool,
    #[define(L)] _dtype: ElemType,
) {
    let half_z = f32::cast_from(to.depth - 1) * 0.5f32;
    let half_y = f32::cast_from(to.height - 1) * 0.5f32;
    let half_x = f32::cast_from(to.width - 1) * 0.5f32;
    let centre_z = f32::cast_from(from.depth - 1) * 0.5f32;
    let centre_y = f32::cast_from(from.height - 1) * 0.5f32;
    let centre_x = f32::cast_from(from.width - 1) * 0.5f32;
    let (row_low, row_high, x_low, x_high) = rows_and_voxels(to.depth * to.height, to.width, by_row);
    for row in row_low..row_high {
        let z = f32::cast_from(row / to.height) - half_z;
        let y = f32::cast_from(row % to.height) - half_y;
        for at in x_low..x_high {
            let x = f32::cast_from(at) - half_x;
            let ez = ends(map[0] * z + map[1] * y + map[2] * x + centre_z, from.depth);
            let ey = ends(map[3] * z + map[4] * y + map[5] * x + centre_y, from.height);
            let ex = ends(map[6] * z + map[7] * y + map[8] * x + centre_x, from.width);
            // Corner k: bit 2 is the higher end along depth, bit 1 along height, bit 0 along width.
            let mut voxels = Array::<usize>::new(8usize);
            let mut weights = Array::<f32>::new(8usize);
            let mut codes = Array::<u32>::new(8usize);
            // Not 0 where the corners differ.
            let mut spread = 0u32;
            #[unroll]
            for k in 0..8usize {
                let high_z = comptime!(k >= 4);
                let high_y = comptime!(k % 4 >= 2);
                let high_x = comptime!(k % 2 == 1);
                let (vz, wz, inside_z) = end(&ez, high_z);
                let (vy, wy, inside_y) = end(&ey, high_y);
                let (vx, wx, inside_x) = end(&ex, high_x);
                let inside = inside_z && inside_y && inside_x;
                let voxel = first + (vz * from.height + vy) * from.width + vx;
                voxels[k] = voxel;
                weights[k] = wz * wy * wx;
                codes[k] = select(inside, u32::cast_from(labels[voxel]), 0u32);
                spread |= codes[k] ^ codes[0];
            }
            let to_voxel = row * to.width + at;
            let mut near = 0usize.runtime();
            near += select(ez.high_is_near, 4usize, 0usize);
            near += select(ey.high_is_near, 2usize, 0usize);
            near += select(ex.high_is_near, 1usize, 0usize);
            let mut code = codes[0];
            if spread != 0u32 {
                if comptime!(vote) {
                    code = winner(&codes, &weights, near);
                } else {
                    code = codes[near];
                }
            }
            labels_out[to_voxel] = L::cast_from(code);
            // The image is 0 outside.
            #[unroll]
            for k in 0..8usize {
                let (_vz, _wz, inside_z) = end(&ez, comptime!(k >= 4));
                let (_vy, _wy, inside_y) = end(&ey, comptime!(k % 4 >= 2));
                let (_vx, _wx, inside_x) = end(&ex, comptime!(k % 2 == 1));
                weights[k] = select(inside_z && inside_y && inside_x, weights[k], 0.0f32);
            }
            for c in 0..channels {
                let mut sum = 0.0f32;
                #[unroll]
                for k in 0..8usize {
                    sum += weights[k] * image[voxels[k] * channels + c];
                }
                image_out[to_voxel * channels + c] = sum;
            }
        }
    }
}

/// Index, weight, and whether it is inside, of one of the two ends.
#[cube]
fn end(ends: &Ends, #[comptime] high: bool) -> (usize, f32, bool) {
    if comptime!(high) {
        (ends.high, ends.share, ends.high_inside)
    } else {
        (ends.low, 1.0f32 - ends.share, ends.low_inside)
    }
}

/// Samples `source` at `matrix * (i - (size - 1) / 2) + (source size - 1) / 2` for every voxel `i` of `patch`: (depth,
/// height, width) vectors, in voxels. `image` and `codes` take one sample.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if buffers do not fit, [`KernelError::Limit`] beyond the device's index
/// range.
pub fn spatial(
    context: &Context,
    source: &Sample,
    matrix: [[f32; 3]; 3],
    rule: LabelRule,
    patch: &Patch,
    image: &Buffer,
    codes: &Buffer,
) -> Result<(), KernelError> {
    source.check_f32(context)?;
    if source.patch.channels != patch.channels {
        return Err(KernelError::shape(OPERATION, "channels", source.patch.channels, patch.channels));
    }
    patch.check_image("image", image)?;
    codes.check(OPERATION, "codes", patch.voxels(), source.labels.dtype())?;
    let map = context.upload(matrix.as_flattened(), Dtype::F32)?;
    let (work, by_row) = row_work(context, patch);
    context.launch(OPERATION, work, |client, count, dim| {
        // SAFETY: the source holds the sample at `first`, whose voxels all indices are moved into; the destination holds the
        // rows of `patch`, and the map nine values.
        unsafe {
            spatial_kernel::launch_unchecked(
                client,
                count,
                dim,
                source.image.arg(),
                source.labels.arg(),
                image.arg(),
                codes.arg(),
                map.arg(),
                source.first_voxel(),
                patch.channels,
                source.patch.extent(),
                patch.extent(),
                by_row,
                rule == LabelRule::Vote,
                codes.dtype().elem(),
            )
        }
    })
}
