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

/// Zero voxels connected to the border, by flood fill, a run along x at a time.
fn outside(mask: &Array3<bool>) -> Array3<bool> {
    let (depth, height, width) = mask.dim();
    // What is inside, or has been filled.
    let mut closed: Vec<bool> = mask.iter().copied().collect();
    let mut pending = Vec::new();
    for z in 0..depth {
        for y in 0..height {
            let edge_row = z == 0 || z + 1 == depth || y == 0 || y + 1 == height;
            // Inside, only the ends of a row touch the border.
            let step = if edge_row { 1 } else { (width - 1).max(1) };
            pending.extend((0..width).step_by(step).map(|x| (z, y, x)));
            // Each row's border at once: the list stays short.
            while let Some((z, y, x)) = pending.pop() {
                fill_run(&mut closed, [depth, height, width], [z, y, x], &mut pending);
            }
        }
    }
    let mut outside = Array3::from_elem(mask.dim(), false);
    for ((outside, closed), inside) in outside.iter_mut().zip(closed).zip(mask) {
        *outside = closed && !inside;
    }
    outside
}

/// Fills the run of open voxels around one, and lists where runs begin beside it in the four rows around.
fn fill_run(
    closed: &mut [bool],
    [depth, height, width]: [usize; 3],
    [z, y, x]: [usize; 3],
    pending: &mut Vec<(usize, usize, usize)>,
) {
    let first = (z * height + y) * width;
    let row = &mut closed[first..first + width];
    if row[x] {
        return;
    }
    let start = row[..x].iter().rposition(|&closed| closed).map_or(0, |at| at + 1);
    let end = row[x..].iter().position(|&closed| closed).map_or(width, |at| x + at);
    row[start..end].fill(true);
    let rows = [
        (z > 0).then(|| (z - 1, y)),
        (z + 1 < depth).then(|| (z + 1, y)),
        (y > 0).then(|| (z, y - 1)),
        (y + 1 < height).then(|| (z, y + 1)),
    ];
    for (z, y) in rows.into_iter().flatten() {
        let first = (z * height + y) * width;
        let row = &closed[first..first + width];
        pending.extend((start..end).filter(|&x| !row[x] && (x == start || row[x - 1])).map(|x| (z, y, x)));
    }
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
