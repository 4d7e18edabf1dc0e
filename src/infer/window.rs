//! Where the patches of a volume lie, and how much each of their voxels counts.

use ndarray::ArrayView4;

use crate::error::{Error, Result};
use crate::patch::copy_image;

/// Smallest weight of a voxel: upstream keeps weights in half precision, where the corners of the Gaussian underflow and
/// are replaced by the smallest number above zero.
pub const SMALLEST_WEIGHT: f32 = 5.960_464_5e-8; // 2^-24
/// Weight of a patch's centre.
const LARGEST_WEIGHT: f64 = 10.0;

/// Where the patches of a volume lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlidingWindow {
    /// Shape of the volume.
    pub image: [usize; 3],
    /// Shape of a patch.
    pub patch: [usize; 3],
    /// Shape of the volume padded to at least one patch.
    pub padded: [usize; 3],
    /// Padding before the volume along each axis; the rest of it follows the volume.
    pub before: [usize; 3],
    /// First voxel of each patch in the padded volume, the last axis running fastest.
    pub starts: Vec<[usize; 3]>,
}

impl SlidingWindow {
    /// Patches that overlap by `1 - step` (nnU-Net: step 0.5).
    ///
    /// # Errors
    /// [`Error::Setting`] for a step outside (0, 1] or an empty patch.
    pub fn new(image: [usize; 3], patch: [usize; 3], step: f64) -> Result<Self> {
        if !(step > 0.0 && step <= 1.0) {
            return Err(Error::Setting {
                setting: "step size",
                value: step.to_string(),
                expected: "expected a share of the patch in (0, 1]",
            });
        }
        if patch.contains(&0) {
            return Err(Error::Setting {
                setting: "patch size",
                value: format!("{patch:?}"),
                expected: "axes must be positive",
            });
        }
        let padded = std::array::from_fn(|axis| image[axis].max(patch[axis]));
        let before = std::array::from_fn(|axis| patch[axis].saturating_sub(image[axis]) / 2);
        let along = |axis: usize| axis_starts(padded[axis], patch[axis], step);
        let [zs, ys, xs] = [along(0), along(1), along(2)];
        let mut starts = Vec::with_capacity(zs.len() * ys.len() * xs.len());
        for &z in &zs {
            for &y in &ys {
                starts.extend(xs.iter().map(|&x| [z, y, x]));
            }
        }
        Ok(SlidingWindow { image, patch, padded, before, starts })
    }

    /// Voxels of a patch.
    pub fn patch_voxels(&self) -> usize {
        self.patch.iter().product()
    }

    /// Copies the patch at `start` of `(c, z, y, x)` into a channels-last buffer, zeros where the volume is padded.
    ///
    /// # Errors
    /// [`Error::BufferLength`].
    pub fn extract(&self, data: ArrayView4<f32>, start: [usize; 3], out: &mut [f32]) -> Result<()> {
        check_length("patch", out.len(), self.patch_voxels() * data.dim().0)?;
        let start = std::array::from_fn(|axis| start[axis] as isize - self.before[axis] as isize);
        copy_image(data, start, self.patch, out);
        Ok(())
    }
}

/// Starts along one axis, evenly spread: 110 voxels, patch 64, step 0.5 give 0, 23, 46.
///
/// `image` must be at least `patch`.
///
/// ```
/// use voxgrad::infer::window::axis_starts;
/// assert_eq!(axis_starts(110, 64, 0.5), [0, 23, 46]);
/// ```
pub fn axis_starts(image: usize, patch: usize, step: f64) -> Vec<usize> {
    let room = image.saturating_sub(patch) as f64;
    let steps = (room / (patch as f64 * step)).ceil();
    let distance = if steps > 0.0 { room / steps } else { 0.0 };
    (0..=steps as usize).map(|i| (distance * i as f64).round_ties_even() as usize).collect()
}

/// Weights of a patch's voxels, `[depth, height, width]`: a Gaussian around `patch / 2` with a deviation of an eighth of
/// the patch, 10 at its centre and at least [`SMALLEST_WEIGHT`] everywhere.
pub fn importance_map(patch: [usize; 3]) -> Vec<f32> {
    let axis = |length: usize| -> Vec<f64> {
        let (centre, deviation) = ((length / 2) as f64, length as f64 / 8.0);
        let exponent = |i: usize| -0.5 * ((i as f64 - centre) / deviation).powi(2);
        (0..length).map(|i| exponent(i).exp()).collect()
    };
    let [zs, ys, xs] = patch.map(axis);
    let mut map = Vec::with_capacity(patch.iter().product());
    for z in &zs {
        for y in &ys {
            let row = LARGEST_WEIGHT * z * y;
            map.extend(xs.iter().map(|x| ((row * x) as f32).max(SMALLEST_WEIGHT)));
        }
    }
    map
}

pub(super) fn check_length(what: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::BufferLength { what, found, expected })
}
