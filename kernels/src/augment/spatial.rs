//! Rotation and scaling about the centre, from a larger patch to a smaller one, in one pass.
//!
//! Of the larger patch only the box that is touched has to be on the device ([`Region::touched`]). Reads of it what the eight
//! corners touch, writes the destination once. The vote: every label's indicator is
//! interpolated as the image is, outside counts as label -1, and the largest wins; scores are compared as upstream compares
//! them, times 1000 and rounded to 11 bits (half precision). A tie goes to the nearest voxel's label if that is among the
//! tied ones, else to the smallest of them.

use super::patch::{Extent, OPERATION, Patch, Sample, row_work, rows_and_voxels};
use crate::elementwise::lanes_of;
use crate::{Buffer, Context, KernelError};
use cubecl::prelude::*;

/// How labels are interpolated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LabelRule {
    /// The label whose linearly interpolated indicator is the largest.
    Vote,
    /// The nearest voxel's label.
    Nearest,
}

/// How a patch lies in a volume.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Movement {
    /// From voxels of the patch to voxels of the volume, about the centres of both: rows for depth, height, width.
    pub matrix: [[f32; 3]; 3],
    /// The part of the volume that is on the device; it has to hold what [`Region::touched`] says.
    pub region: Region,
    /// How labels are interpolated.
    pub rule: LabelRule,
}

/// A box of a larger volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Depth, height, width of the volume.
    pub volume: [usize; 3],
    /// Where the box begins in it.
    pub start: [usize; 3],
    /// Depth, height, width of the box.
    pub dims: [usize; 3],
}

impl Region {
    /// The whole of a volume.
    pub fn whole(volume: [usize; 3]) -> Self {
        Self { volume, start: [0; 3], dims: volume }
    }

    /// The box of `dims` in the middle of a volume: begins at half of the one minus half of the other, both rounded down.
    /// `None` if it does not fit.
    pub fn centre(volume: [usize; 3], dims: [usize; 3]) -> Option<Self> {
        let fits = (0..3).all(|axis| dims[axis] <= volume[axis]);
        fits.then(|| Self { volume, start: std::array::from_fn(|axis| volume[axis] / 2 - dims[axis] / 2), dims })
    }

    /// All voxels of `volume` that [`spatial`] reads to make a patch of `dims` with this matrix, and perhaps some more.
    pub fn touched(volume: [usize; 3], matrix: [[f32; 3]; 3], dims: [usize; 3]) -> Self {
        let mut region = Self::whole(volume);
        for axis in 0..3 {
            let reach: f64 =
                (0..3).map(|k| f64::from(matrix[axis][k]).abs() * dims[k].saturating_sub(1) as f64 / 2.0).sum();
            let last = volume[axis].saturating_sub(1) as f64;
            let centre = last / 2.0;
            // A hundredth of a voxel is more than what f32 rounds on the device.
            let low = (centre - reach - 0.01).floor().clamp(0.0, last) as usize;
            let high = ((centre + reach + 0.01).floor() + 1.0).clamp(0.0, last) as usize;
            (region.start[axis], region.dims[axis]) = (low, high - low + 1);
        }
        region
    }
}

/// The two voxels along an axis that a position lies between.
#[derive(CubeType, Clone, Copy)]
struct Ends {
    /// Indices in the box, moved into it.
    low: usize,
    high: usize,
    /// Linear weight of the higher one.
    share: f32,
    low_inside: bool,
    high_inside: bool,
    /// Whether the higher one is the nearer one; halves go to the even index.
    high_is_near: bool,
}

/// `start` is where the box of `size` voxels begins: what is outside of the box is outside of the volume.
#[cube]
fn ends(position: f32, start: f32, size: usize) -> Ends {
    let whole = position.floor();
    let share = position - whole;
    let low = i32::cast_from(whole - start);
    let last = i32::cast_from(size) - 1i32;
    let odd = (i32::cast_from(whole) & 1i32) == 1i32;
    Ends {
        low: usize::cast_from(clamp(low, 0i32, last)),
        high: usize::cast_from(clamp(low + 1i32, 0i32, last)),
        share,
        low_inside: low >= 0i32 && low <= last,
        high_inside: low + 1i32 >= 0i32 && low < last,
        high_is_near: share > 0.5f32 || (share == 0.5f32 && odd),
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

/// The code with the most weight among eight corners that carry `codes[0]` and one other.
#[cube]
fn winner_of_two(codes: &Array<u32>, weights: &Array<f32>, other: u32, near: usize) -> u32 {
    let first = codes[0];
    let mut of_first = 0.0f32;
    let mut of_other = 0.0f32;
    #[unroll]
    for j in 0..8usize {
        of_first += select(codes[j] == first, weights[j], 0.0f32);
        of_other += select(codes[j] == other, weights[j], 0.0f32);
    }
    let of_first = rounded_to_half(of_first * 1000.0f32);
    let of_other = rounded_to_half(of_other * 1000.0f32);
    let winner = select(of_first > of_other, first, other);
    select(of_first == of_other, codes[near], winner)
}

/// Linear weight of one of the two ends, and whether it is inside.
#[cube]
fn end(ends: &Ends, #[comptime] high: bool) -> (f32, bool) {
    if comptime!(high) { (ends.share, ends.high_inside) } else { (1.0f32 - ends.share, ends.low_inside) }
}

/// The weight of one of the two ends in the image, which is 0 outside.
#[cube]
fn weight_in_image(ends: &Ends, #[comptime] high: bool) -> f32 {
    let (weight, inside) = end(ends, high);
    select(inside, weight, 0.0f32)
}

/// The code that eight corners vote for; corner `k` is at the higher end along depth if bit 2 of `k` is set, along height if
/// bit 1 is, along width if bit 0 is.
#[cube]
fn voted(codes: &Array<u32>, other: u32, ez: &Ends, ey: &Ends, ex: &Ends, near: usize) -> u32 {
    let mut weights = Array::<f32>::new(8usize);
    let mut third = false.runtime();
    #[unroll]
    for k in 0..8usize {
        let (wz, _inside_z) = end(ez, comptime!(k >= 4));
        let (wy, _inside_y) = end(ey, comptime!(k % 4 >= 2));
        let (wx, _inside_x) = end(ex, comptime!(k % 2 == 1));
        weights[k] = wz * wy * wx;
        third = third || (codes[k] != codes[0] && codes[k] != other);
    }
    let mut code = 0u32.runtime();
    if third {
        code += winner(codes, &weights, near);
    } else {
        code += winner_of_two(codes, &weights, other, near);
    }
    code
}

/// `map` holds the matrix, row by row, the centre of the volume, and where the box on the device begins. The sample's voxels
/// begin at `first`, and have `vectors` vectors of channels each.
#[cube(launch_unchecked)]
fn spatial_kernel<L: Int, N: Size>(
    image: &[Vector<f32, N>],
    labels: &[L],
    image_out: &mut [Vector<f32, N>],
    labels_out: &mut [L],
    map: &[f32],
    first: usize,
    vectors: usize,
    from: &Extent,
    to: &Extent,
    #[comptime] by_row: bool,
    #[comptime] vote: bool,
    #[define(L)] _dtype: ElemType,
) {
    let half_z = f32::cast_from(to.depth - 1) * 0.5f32;
    let half_y = f32::cast_from(to.height - 1) * 0.5f32;
    let half_x = f32::cast_from(to.width - 1) * 0.5f32;
    let (row_low, row_high, x_low, x_high) = rows_and_voxels(to.depth * to.height, to.width, by_row);
    for row in row_low..row_high {
        let z = f32::cast_from(row / to.height) - half_z;
        let y = f32::cast_from(row % to.height) - half_y;
        for at in x_low..x_high {
            let x = f32::cast_from(at) - half_x;
            let ez = ends(map[0] * z + map[1] * y + map[2] * x + map[9], map[12], from.depth);
            let ey = ends(map[3] * z + map[4] * y + map[5] * x + map[10], map[13], from.height);
            let ex = ends(map[6] * z + map[7] * y + map[8] * x + map[11], map[14], from.width);
            // From the lowest corner to the others: nothing where the volume ends.
            let lowest = first + (ez.low * from.height + ey.low) * from.width + ex.low;
            let step_z = (ez.high - ez.low) * from.height * from.width;
            let step_y = (ey.high - ey.low) * from.width;
            let step_x = ex.high - ex.low;
            let mut voxels = Array::<usize>::new(8usize);
            let mut codes = Array::<u32>::new(8usize);
            #[unroll]
            for k in 0..8usize {
                let mut voxel = lowest;
                if comptime!(k >= 4) {
                    voxel += step_z;
                }
                if comptime!(k % 4 >= 2) {
                    voxel += step_y;
                }
                if comptime!(k % 2 == 1) {
                    voxel += step_x;
                }
                voxels[k] = voxel;
                codes[k] = u32::cast_from(labels[voxel]);
            }
            let inside_z = ez.low_inside && ez.high_inside;
            let inside_y = ey.low_inside && ey.high_inside;
            let inside_x = ex.low_inside && ex.high_inside;
            if !(inside_z && inside_y && inside_x) {
                #[unroll]
                for k in 0..8usize {
                    let (_wz, inside_z) = end(&ez, comptime!(k >= 4));
                    let (_wy, inside_y) = end(&ey, comptime!(k % 4 >= 2));
                    let (_wx, inside_x) = end(&ex, comptime!(k % 2 == 1));
                    codes[k] = select(inside_z && inside_y && inside_x, codes[k], 0u32);
                }
            }
            // A code that is not the first corner's, where there is one.
            let mut other = codes[0];
            #[unroll]
            for k in 1..8usize {
                other = select(codes[k] != codes[0], codes[k], other);
            }
            let to_voxel = row * to.width + at;
            let mut code = codes[0];
            if other != codes[0] {
                let mut near = 0usize.runtime();
                near += select(ez.high_is_near, 4usize, 0usize);
                near += select(ey.high_is_near, 2usize, 0usize);
                near += select(ex.high_is_near, 1usize, 0usize);
                if comptime!(vote) {
                    code = voted(&codes, other, &ez, &ey, &ex, near);
                } else {
                    code = codes[near];
                }
            }
            labels_out[to_voxel] = L::cast_from(code);
            let mut weights = Array::<f32>::new(8usize);
            #[unroll]
            for k in 0..8usize {
                weights[k] = weight_in_image(&ez, comptime!(k >= 4))
                    * weight_in_image(&ey, comptime!(k % 4 >= 2))
                    * weight_in_image(&ex, comptime!(k % 2 == 1));
            }
            for v in 0..vectors {
                let mut sum = Vector::<f32, N>::new(0.0);
                #[unroll]
                for k in 0..8usize {
                    sum += Vector::new(weights[k]) * image[voxels[k] * vectors + v];
                }
                image_out[to_voxel * vectors + v] = sum;
            }
        }
    }
}

/// Samples a volume at `matrix * (i - (size - 1) / 2) + (volume size - 1) / 2` for every voxel `i` of `patch`: (depth,
/// height, width) vectors, in voxels. `source` holds the region that `movement` names; `image` and `codes` take one sample.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if buffers do not fit or the region is too small, [`KernelError::Limit`]
/// beyond the device's index range.
pub fn spatial(
    context: &Context,
    source: &Sample,
    movement: &Movement,
    patch: &Patch,
    image: &Buffer,
    codes: &Buffer,
) -> Result<(), KernelError> {
    let Movement { matrix, region, rule } = *movement;
    source.check_f32(context)?;
    if source.patch.channels != patch.channels {
        return Err(KernelError::shape(OPERATION, "channels", source.patch.channels, patch.channels));
    }
    if region.volume.contains(&0) {
        return Err(KernelError::shape(OPERATION, "volume", "at least 1 voxel along every axis", region.volume));
    }
    let needed = Region::touched(region.volume, matrix, patch.dims);
    let ends = |region: Region, axis: usize| (region.start[axis], region.start[axis] + region.dims[axis]);
    let holds = |axis| {
        let ((low, high), (needed_low, needed_high)) = (ends(region, axis), ends(needed, axis));
        low <= needed_low && needed_high <= high && high <= region.volume[axis]
    };
    if source.patch.dims != region.dims || !(0..3).all(holds) {
        return Err(KernelError::shape(OPERATION, "region", format_args!("one that holds {needed:?}"), region));
    }
    patch.check_image("image", image)?;
    codes.check(OPERATION, "codes", patch.voxels(), source.labels.dtype())?;
    let centre = region.volume.map(|n| (n - 1) as f32 * 0.5);
    let map = [matrix.as_flattened(), &centre, &region.start.map(|n| n as f32)].concat();
    let map = context.upload_f32(&map)?;
    let (work, by_row) = row_work(context, patch);
    let lanes = lanes_of(context, patch.channels);
    context.launch(OPERATION, work, |client, count, dim| {
        // SAFETY: the source holds the sample at `first`, whose voxels all indices are moved into; the destination holds the
        // rows of `patch`, and the map fifteen values.
        unsafe {
            spatial_kernel::launch_unchecked(
                client,
                count,
                dim,
                lanes,
                source.image.arg(),
                source.labels.arg(),
                image.arg(),
                codes.arg(),
                map.arg(),
                source.first_voxel(),
                patch.channels / lanes,
                source.patch.extent(),
                patch.extent(),
                by_row,
                rule == LabelRule::Vote,
                codes.dtype().elem(),
            )
        }
    })
}
