//! Sliding-window geometry and the accumulation of overlapping patches.

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

/// Weighted sum of overlapping patches of logits.
#[derive(Debug, Clone)]
pub struct Accumulator {
    window: SlidingWindow,
    channels: usize,
    importance: Vec<f32>,
    sums: Vec<f32>,
    weights: Vec<f32>,
}

impl Accumulator {
    /// An empty accumulator for logits of `channels` heads.
    pub fn new(window: SlidingWindow, channels: usize) -> Self {
        let voxels: usize = window.padded.iter().product();
        Accumulator {
            importance: importance_map(window.patch),
            sums: vec![0.0; voxels * channels],
            weights: vec![0.0; voxels],
            window,
            channels,
        }
    }

    /// Adds the logits `[depth, height, width, channels]` of the patch at `start`, one of the window's starts.
    ///
    /// # Errors
    /// [`Error::BufferLength`] for another length, [`Error::Setting`] for a start outside the volume.
    pub fn add(&mut self, start: [usize; 3], logits: &[f32]) -> Result<()> {
        let [depth, height, width] = self.window.patch;
        let [_, padded_height, padded_width] = self.window.padded;
        let channels = self.channels;
        check_length("patch of logits", logits.len(), self.window.patch_voxels() * channels)?;
        if (0..3).any(|axis| start[axis] + self.window.patch[axis] > self.window.padded[axis]) {
            return Err(Error::Setting {
                setting: "patch start",
                value: format!("{start:?}"),
                expected: "the patch must lie inside the padded volume",
            });
        }
        for z in 0..depth {
            for y in 0..height {
                let row = (z * height + y) * width;
                let importance = &self.importance[row..row + width];
                let logits = &logits[row * channels..(row + width) * channels];
                let first = ((start[0] + z) * padded_height + start[1] + y) * padded_width + start[2];
                let weights = &mut self.weights[first..first + width];
                let sums = &mut self.sums[first * channels..(first + width) * channels];
                for (weight, added) in weights.iter_mut().zip(importance) {
                    *weight += added;
                }
                let voxels = sums.chunks_exact_mut(channels).zip(logits.chunks_exact(channels));
                for ((sum, logits), weight) in voxels.zip(importance) {
                    for (sum, logit) in sum.iter_mut().zip(logits) {
                        *sum += logit * weight;
                    }
                }
            }
        }
        Ok(())
    }

    /// The mean logits of the volume without its padding, `[depth, height, width, channels]`; 0 where no patch was added.
    pub fn finish(self) -> Vec<f32> {
        let [depth, height, width] = self.window.image;
        let [_, padded_height, padded_width] = self.window.padded;
        let [before_z, before_y, before_x] = self.window.before;
        let channels = self.channels;
        let mut logits = Vec::with_capacity(depth * height * width * channels);
        for z in before_z..before_z + depth {
            for y in before_y..before_y + height {
                let first = (z * padded_height + y) * padded_width + before_x;
                let sums = &self.sums[first * channels..(first + width) * channels];
                let weights = &self.weights[first..first + width];
                for (sum, &weight) in sums.chunks_exact(channels).zip(weights) {
                    let divisor = weight.max(f32::MIN_POSITIVE);
                    logits.extend(sum.iter().map(|sum| sum / divisor));
                }
            }
        }
        logits
    }
}

fn check_length(what: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::BufferLength { what, found, expected })
}
