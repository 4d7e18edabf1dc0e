//! Whether two volumes lie on one grid.

use super::geometry::{Geometry, SPACING_TOLERANCE};

/// What sets the grid of a label map apart from the one that it should lie on, in words: shape (z, y, x), spacing, or the
/// place of its voxels in the world to a tenth of a voxel. `None` if nothing does.
pub fn grid_difference(found: (&Geometry, [usize; 3]), expected: (&Geometry, [usize; 3])) -> Option<String> {
    let ((geometry, shape), (expected_geometry, expected_shape)) = (found, expected);
    if shape != expected_shape {
        return Some(format!("shape (z, y, x) {shape:?} instead of {expected_shape:?}"));
    }
    let (spacing, expected_spacing) = (geometry.spacing, expected_geometry.spacing);
    if spacing.iter().zip(expected_spacing).any(|(a, b)| (a - b).abs() > SPACING_TOLERANCE * b) {
        return Some(format!("spacing (z, y, x) {spacing:?} mm instead of {expected_spacing:?} mm"));
    }
    if geometry.same_placement(expected_geometry, shape) {
        return None;
    }
    let corners =
        |geometry: &Geometry| [[0; 3], shape.map(|n| n.saturating_sub(1))].map(|voxel| world(geometry, voxel));
    let ([first, last], [expected_first, expected_last]) = (corners(geometry), corners(expected_geometry));
    Some(format!(
        "its first and last voxel lie at {first:.1?} and {last:.1?} (x, y, z) instead of {expected_first:.1?} and \
         {expected_last:.1?}"
    ))
}

/// Where a voxel (z, y, x) lies, (x, y, z).
fn world(geometry: &Geometry, [z, y, x]: [usize; 3]) -> [f64; 3] {
    let index = [x as f64, y as f64, z as f64, 1.0];
    geometry.affine().map(|row| row.iter().zip(index).map(|(a, i)| a * i).sum())
}
