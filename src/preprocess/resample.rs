//! Resampling between grids, as nnU-Net does it.
//!
//! Images: cubic B-spline interpolation along each axis of the signal extended by its edge values, clamped to the range
//! of the input. Label maps: linear interpolation of each label's 0/1 mask, cut at one half. Sample `i` of `out` lies at
//! `(i + 0.5) * in / out - 0.5`, so that both grids cover the same extent.
//!
//! Strongly anisotropic volumes are resampled slice by slice, and between slices by the nearest one, because
//! interpolating across thick slices invents anatomy.

use ndarray::{Array3, Array4, ArrayView1, ArrayViewMut1, Axis, Zip};
use rayon::prelude::*;

use crate::error::{Error, Result};

/// Spacing ratio from which slices are resampled separately.
const ANISOTROPY_THRESHOLD: f64 = 3.0;
/// More voxels than any scanner makes: a broken spacing would otherwise ask for terabytes.
const MOST_VOXELS: usize = 1 << 31;
/// Edge padding of a line before the spline's recursive filter, as in scipy.
const PADDING: usize = 12;
/// Pole of the cubic B-spline's prefilter.
const POLE: f64 = -0.267_949_192_431_122_7;

/// From which shape to which, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Shape before.
    pub from: [usize; 3],
    /// Shape after.
    pub to: [usize; 3],
    /// The axis between slices that are resampled separately.
    pub separate_axis: Option<usize>,
}

impl Grid {
    /// The grid of a target spacing: 100 voxels of 1.5 mm become 150 of 1 mm.
    ///
    /// ```
    /// use voxgrad::preprocess::resample::Grid;
    /// let grid = Grid::new([30, 100, 100], [5.0, 1.5, 1.5], [4.0, 1.0, 1.0])?;
    /// assert_eq!(grid.to, [38, 150, 150]); // 37.5 rounds to even
    /// assert_eq!(grid.separate_axis, Some(0)); // slices are more than three times as far apart as voxels in them
    /// # Ok::<(), voxgrad::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::ResampledTooLarge`].
    pub fn new(from: [usize; 3], spacing: [f64; 3], target: [f64; 3]) -> Result<Self> {
        let to = std::array::from_fn(|axis| {
            let length = spacing[axis] / target[axis] * from[axis] as f64;
            (length.round_ties_even() as usize).max(1)
        });
        Self::between(from, to, spacing, target)
    }

    /// The grid of a target shape, as the way back needs it.
    ///
    /// # Errors
    /// [`Error::ResampledTooLarge`].
    pub fn between(from: [usize; 3], to: [usize; 3], spacing: [f64; 3], target: [f64; 3]) -> Result<Self> {
        let voxels = to.iter().try_fold(1usize, |n, &axis| n.checked_mul(axis));
        if voxels.is_none_or(|voxels| voxels > MOST_VOXELS) {
            return Err(Error::ResampledTooLarge { from, to, limit: MOST_VOXELS });
        }
        Ok(Grid { from, to, separate_axis: separate_axis(spacing, target) })
    }

    fn is_identity(&self) -> bool {
        self.from == self.to
    }

    /// Axes along which slices or the volume are interpolated.
    fn interpolated_axes(&self) -> impl Iterator<Item = usize> + '_ {
        (0..3).filter(|&axis| Some(axis) != self.separate_axis && self.from[axis] != self.to[axis])
    }
}

/// The one axis that is much coarser than the finest, in the present or else the target spacing; ties mean none.
fn separate_axis(spacing: [f64; 3], target: [f64; 3]) -> Option<usize> {
    let coarse = |spacing: &[f64; 3]| {
        let largest = spacing.iter().copied().fold(0.0, f64::max);
        let smallest = spacing.iter().copied().fold(f64::INFINITY, f64::min);
        (largest / smallest > ANISOTROPY_THRESHOLD).then_some(largest)
    };
    let (decisive, largest) = [spacing, target].into_iter().find_map(|spacing| Some((spacing, coarse(&spacing)?)))?;
    let mut axes = (0..3).filter(|&axis| decisive[axis] == largest);
    axes.next().filter(|_| axes.next().is_none())
}

#[derive(Clone, Copy, PartialEq)]
enum Order {
    Linear,
    Cubic,
}

/// Resamples channels `(c, z, y, x)` with cubic splines.
pub fn image(data: Array4<f32>, grid: &Grid) -> Array4<f32> {
    channels(data, grid, Order::Cubic)
}

/// Resamples logits or probabilities `(c, z, y, x)` linearly.
pub fn logits(data: Array4<f32>, grid: &Grid) -> Array4<f32> {
    channels(data, grid, Order::Linear)
}

fn channels(data: Array4<f32>, grid: &Grid, order: Order) -> Array4<f32> {
    if grid.is_identity() {
        return data;
    }
    let [depth, height, width] = grid.to;
    let mut resampled = Array4::zeros((data.dim().0, depth, height, width));
    let from: Vec<_> = data.axis_iter(Axis(0)).collect();
    let to: Vec<_> = resampled.axis_iter_mut(Axis(0)).collect();
    from.into_par_iter().zip(to).for_each(|(channel, mut target)| {
        let mut volume = interpolate(channel.mapv(f64::from), grid, order);
        if order == Order::Cubic {
            clamp_to_range(&mut volume, channel, grid.separate_axis);
        }
        target.assign(&nearest_between_slices(volume, grid).mapv(|v| v as f32));
    });
    resampled
}

/// Resamples a label map. On exact ties the larger label wins; where no label reaches one half the result is 0.
pub fn segmentation(seg: Array3<i16>, grid: &Grid) -> Array3<i16> {
    if grid.is_identity() {
        return seg;
    }
    let mut labels: Vec<i16> = seg.iter().copied().collect();
    labels.sort_unstable();
    labels.dedup();
    let mut shape = grid.to;
    if let Some(axis) = grid.separate_axis {
        shape[axis] = grid.from[axis];
    }
    let mut resampled = Array3::zeros(shape);
    for label in labels {
        let mask = seg.mapv(|value| if value == label { 1.0 } else { 0.0 });
        let mask = interpolate(mask, grid, Order::Linear);
        resampled.zip_mut_with(&mask, |value, &share| {
            if share >= 0.5 {
                *value = label;
            }
        });
    }
    nearest_between_slices(resampled, grid)
}

fn interpolate(mut volume: Array3<f64>, grid: &Grid, order: Order) -> Array3<f64> {
    for axis in grid.interpolated_axes() {
        volume = along_axis(volume, axis, grid.to[axis], order);
    }
    volume
}

fn along_axis(volume: Array3<f64>, axis: usize, length: usize, order: Order) -> Array3<f64> {
    let from = volume.len_of(Axis(axis));
    let mut shape: [usize; 3] = volume.dim().into();
    shape[axis] = length;
    let mut resampled = Array3::zeros(shape);
    let positions: Vec<f64> = (0..length).map(|i| (i as f64 + 0.5) * (from as f64 / length as f64) - 0.5).collect();
    let lines = Zip::from(resampled.lanes_mut(Axis(axis))).and(volume.lanes(Axis(axis)));
    match order {
        Order::Linear => {
            let taps: Vec<_> = positions.iter().map(|&p| linear_taps(p, from)).collect();
            lines.for_each(|mut to, from| {
                for (value, [(a, wa), (b, wb)]) in to.iter_mut().zip(&taps) {
                    *value = wa * from[*a] + wb * from[*b];
                }
            });
        }
        Order::Cubic => {
            let taps: Vec<_> = positions.iter().map(|&p| cubic_taps(p)).collect();
            let mut padded = vec![0.0; from + 2 * PADDING];
            lines.for_each(|to, from| cubic_line(to, from, &taps, &mut padded));
        }
    }
    resampled
}

fn linear_taps(position: f64, length: usize) -> [(usize, f64); 2] {
    let position = position.clamp(0.0, (length - 1) as f64);
    let first = position.floor();
    let share = position - first;
    let first = first as usize;
    [(first, 1.0 - share), ((first + 1).min(length - 1), share)]
}

/// First of four coefficients in the padded line, and their weights: the cubic B-spline at distances 1+t, t, 1-t, 2-t.
fn cubic_taps(position: f64) -> (usize, [f64; 4]) {
    let first = position.floor();
    let t = position - first;
    let u = 1.0 - t;
    let near = |d: f64| 2.0 / 3.0 - d * d * (1.0 - d / 2.0);
    let weights = [u * u * u / 6.0, near(t), near(u), t * t * t / 6.0];
    ((first + (PADDING - 1) as f64) as usize, weights)
}

fn cubic_line(mut to: ArrayViewMut1<f64>, from: ArrayView1<f64>, taps: &[(usize, [f64; 4])], padded: &mut [f64]) {
    let last = from.len() - 1;
    for (i, value) in padded.iter_mut().enumerate() {
        *value = from[i.saturating_sub(PADDING).min(last)];
    }
    spline_coefficients(padded);
    for (value, (first, weights)) in to.iter_mut().zip(taps) {
        let near = &padded[*first..*first + 4];
        *value = near.iter().zip(weights).map(|(c, w)| c * w).sum();
    }
}

/// Coefficients of the cubic B-spline through the values, with mirrored ends: one causal and one anticausal pass.
fn spline_coefficients(line: &mut [f64]) {
    let last = line.len() - 1;
    // The mirrored signal's geometric sum in closed form.
    let mut first = line[0] + POLE.powi(last as i32) * line[last];
    let (mut forward, mut backward) = (POLE, POLE.powi(2 * last as i32 - 1));
    for &value in &line[1..last] {
        first += (forward + backward) * value;
        forward *= POLE;
        backward /= POLE;
    }
    line[0] = first / (1.0 - POLE.powi(2 * last as i32));
    for i in 1..=last {
        line[i] += POLE * line[i - 1];
    }
    line[last] = POLE / (POLE * POLE - 1.0) * (line[last] + POLE * line[last - 1]);
    for i in (0..last).rev() {
        line[i] = POLE * (line[i + 1] - line[i]);
    }
    for value in line {
        *value *= 6.0;
    }
}

/// A spline overshoots at edges; upstream clamps to the input's range, of each slice where slices are separate.
fn clamp_to_range(volume: &mut Array3<f64>, input: ndarray::ArrayView3<f32>, separate_axis: Option<usize>) {
    let range = |values: &mut dyn Iterator<Item = &f32>| {
        values
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &v| (low.min(f64::from(v)), high.max(f64::from(v))))
    };
    match separate_axis {
        None => {
            let (low, high) = range(&mut input.iter());
            volume.mapv_inplace(|v| v.max(low).min(high));
        }
        Some(axis) => {
            let slices = volume.axis_iter_mut(Axis(axis));
            for (mut slice, input) in slices.zip(input.axis_iter(Axis(axis))) {
                let (low, high) = range(&mut input.iter());
                slice.mapv_inplace(|v| v.max(low).min(high));
            }
        }
    }
}

/// The nearest slice, halves up, along the separate axis.
fn nearest_between_slices<T: Copy>(volume: Array3<T>, grid: &Grid) -> Array3<T> {
    let Some(axis) = grid.separate_axis else {
        return volume;
    };
    let (from, to) = (grid.from[axis], grid.to[axis]);
    if from == to {
        return volume;
    }
    let slices: Vec<usize> = (0..to)
        .map(|i| {
            let position = (i as f64 + 0.5) * (from as f64 / to as f64) - 0.5;
            ((position + 0.5).floor().max(0.0) as usize).min(from - 1)
        })
        .collect();
    volume.select(Axis(axis), &slices)
}
