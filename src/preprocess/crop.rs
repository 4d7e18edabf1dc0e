//! Cropping to the part of the image that is not zero.
//!
//! Skull-stripped and masked images are mostly zeros. Zeros enclosed by tissue (ventricles) belong to the image, so
//! holes are filled before the box is taken.

use ndarray::{Array3, ArrayView4, Axis};

/// Half-open range of voxels along each axis: `[start, end)`.
pub type BoundingBox = [[usize; 2]; 3];

/// Voxels that are non-zero in any channel of `(c, z, y, x)`, with enclosed holes filled. A hole is a set of zero voxels
/// from which no path through faces leads to the border.
pub fn nonzero_mask(data: ArrayView4<f32>) -> Array3<bool> {
    let (_, depth, height, width) = data.dim();
    let mut mask = Array3::from_elem((depth, height, width), false);
    for channel in data.axis_iter(Axis(0)) {
        mask.zip_mut_with(&channel, |inside, &value| *inside |= value != 0.0);
    }
    let outside = outside(&mask);
    mask.zip_mut_with(&outside, |inside, &outside| *inside = !outside);
    mask
}

/// Zero voxels connected to the border, by flood fill.
fn outside(mask: &Array3<bool>) -> Array3<bool> {
    let (depth, height, width) = mask.dim();
    let mut outside = Array3::from_elem(mask.dim(), false);
    let mut pending = Vec::new();
    let reach = |z: usize, y: usize, x: usize, outside: &mut Array3<bool>| {
        let new = !mask[[z, y, x]] && !outside[[z, y, x]];
        if new {
            outside[[z, y, x]] = true;
        }
        new
    };
    for z in 0..depth {
        for y in 0..height {
            let edge_row = z == 0 || z + 1 == depth || y == 0 || y + 1 == height;
            // Inside, only the ends of a row touch the border.
            let step = if edge_row { 1 } else { (width - 1).max(1) };
            for x in (0..width).step_by(step) {
                if reach(z, y, x, &mut outside) {
                    pending.push([z, y, x]);
                }
            }
        }
    }
    while let Some([z, y, x]) = pending.pop() {
        let neighbours = [
            (z > 0).then(|| [z - 1, y, x]),
            (z + 1 < depth).then(|| [z + 1, y, x]),
            (y > 0).then(|| [z, y - 1, x]),
            (y + 1 < height).then(|| [z, y + 1, x]),
            (x > 0).then(|| [z, y, x - 1]),
            (x + 1 < width).then(|| [z, y, x + 1]),
        ];
        for voxel @ [z, y, x] in neighbours.into_iter().flatten() {
            if reach(z, y, x, &mut outside) {
                pending.push(voxel);
            }
        }
    }
    outside
}

/// The smallest box that holds all true voxels; the whole volume if there is none.
pub fn crop_to_nonzero(mask: &Array3<bool>) -> BoundingBox {
    let shape: [usize; 3] = mask.dim().into();
    let range = |axis: usize| {
        let mut slices = mask.axis_iter(Axis(axis));
        let start = slices.position(|slice| slice.iter().any(|&v| v))?;
        let last = mask.axis_iter(Axis(axis)).rposition(|slice| slice.iter().any(|&v| v))?;
        Some([start, last + 1])
    };
    std::array::from_fn(|axis| range(axis).unwrap_or([0, shape[axis]]))
}
