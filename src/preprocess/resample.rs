//! Resampling between grids, as nnU-Net does it.
//!
//! Images: cubic B-spline interpolation along each axis of the signal extended by its edge values, clamped to the range
//! of the input. Label maps: linear interpolation of each label's 0/1 mask, cut at one half. Sample `i` of `out` lies at
//! `(i + 0.5) * in / out - 0.5`, so that both grids cover the same extent.
//!
//! Strongly anisotropic volumes are resampled slice by slice, and between slices by the nearest one, because
//! interpolating across thick slices invents anatomy.

use ndarray::{Array3, Array4, Axis};
use rayon::prelude::*;

use crate::error::{Error, PreprocessError, Result};

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
    /// [`PreprocessError::ResampledTooLarge`].
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
    /// [`PreprocessError::ResampledTooLarge`].
    pub fn between(from: [usize; 3], to: [usize; 3], spacing: [f64; 3], target: [f64; 3]) -> Result<Self> {
        let voxels = to.iter().try_fold(1usize, |n, &axis| n.checked_mul(axis));
        if voxels.is_none_or(|voxels| voxels > MOST_VOXELS) {
            return Err(Error::Preprocess(PreprocessError::ResampledTooLarge { from, to, limit: MOST_VOXELS }));
        }
        Ok(Grid { from, to, separate_axis: separate_axis(spacing, target) })
    }

    fn is_identity(&self) -> bool {
        self.from == self.to
    }

    /// For every place along an axis of the shape after, its neighbours in the shape before and their weights: linear, or
    /// the nearest slice along the separate axis.
    pub(crate) fn taps(&self, axis: usize) -> Vec<Taps> {
        let (from, to) = (self.from[axis], self.to[axis]);
        if self.separate_axis == Some(axis) || from == to {
            return nearest(from, to).into_iter().map(Taps::exactly).collect();
        }
        positions(from, to)
            .map(|position| match linear_taps(position, from) {
                [(first, _), (_, 0.0)] => Taps::exactly(first),
                [(first, first_weight), (second, second_weight)] => Taps { first, second, first_weight, second_weight },
            })
            .collect()
    }

    /// Axes along which slices or the volume are interpolated.
    fn interpolated_axes(&self) -> impl Iterator<Item = usize> + '_ {
        (0..3).filter(|&axis| Some(axis) != self.separate_axis && self.from[axis] != self.to[axis])
    }
}

/// Two neighbours along an axis, and the share of each.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Taps {
    pub first: usize,
    pub second: usize,
    first_weight: f64,
    second_weight: f64,
}

impl Taps {
    fn exactly(place: usize) -> Self {
        Taps { first: place, second: place, first_weight: 1.0, second_weight: 0.0 }
    }

    /// Whether the first neighbour is all that counts.
    pub fn is_exact(&self) -> bool {
        self.second_weight == 0.0
    }

    /// Both neighbours and the share of each, the second of which may be 0.
    pub fn neighbours(&self) -> [(usize, f32); 2] {
        [(self.first, self.first_weight as f32), (self.second, self.second_weight as f32)]
    }

    pub fn mean(&self, first: f64, second: f64) -> f64 {
        if self.is_exact() { first } else { self.first_weight * first + self.second_weight * second }
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

/// Lines that are interpolated together, so that the recursive filter keeps the processor's vectors full.
const LINES: usize = 16;

fn along_axis(volume: Array3<f64>, axis: usize, length: usize, order: Order) -> Array3<f64> {
    let mut shape: [usize; 3] = volume.dim().into();
    let from = shape[axis];
    // In memory: for every index before the axis, for every index along it, `inner` values.
    let inner: usize = shape[axis + 1..].iter().product();
    let lines = shape[..axis].iter().product::<usize>() * inner;
    shape[axis] = length;
    let mut resampled = Array3::zeros(shape);
    let linear: Vec<_> = positions(from, length).map(|p| linear_taps(p, from)).collect();
    let cubic: Vec<_> = positions(from, length).map(cubic_taps).collect();
    let padding = if order == Order::Cubic { PADDING } else { 0 };
    let mut padded = vec![[0.0; LINES]; from + 2 * padding];
    let volume = volume.as_standard_layout();
    let (Some(source), Some(target)) = (volume.as_slice(), resampled.as_slice_mut()) else {
        return resampled; // both are in standard layout
    };
    for first in (0..lines).step_by(LINES) {
        let count = LINES.min(lines - first);
        let start = |line: usize, length: usize| (first + line) / inner * length * inner + (first + line) % inner;
        for line in 0..count {
            let values = source[start(line, from)..].iter().step_by(inner).take(from);
            padded[padding..].iter_mut().zip(values).for_each(|(row, value)| row[line] = *value);
        }
        let mut put = |at: usize, values: [f64; LINES]| {
            for (line, value) in values[..count].iter().enumerate() {
                target[start(line, length) + at * inner] = *value;
            }
        };
        match order {
            Order::Linear => {
                for (at, [(a, wa), (b, wb)]) in linear.iter().enumerate() {
                    let (a, b) = (&padded[*a], &padded[*b]);
                    put(at, std::array::from_fn(|line| wa * a[line] + wb * b[line]));
                }
            }
            Order::Cubic => {
                let (low, high) = (padded[padding], padded[padding + from - 1]);
                padded[..padding].fill(low);
                padded[padding + from..].fill(high);
                spline_coefficients(&mut padded);
                for (at, (first, weights)) in cubic.iter().enumerate() {
                    let near = &padded[*first..*first + 4];
                    let mut sums = [0.0; LINES];
                    for (coefficients, weight) in near.iter().zip(weights) {
                        (0..LINES).for_each(|line| sums[line] += coefficients[line] * weight);
                    }
                    put(at, sums);
                }
            }
        }
    }
    resampled
}

/// Where the voxels after resampling lie among those before it.
fn positions(from: usize, to: usize) -> impl Iterator<Item = f64> {
    (0..to).map(move |i| (i as f64 + 0.5) * (from as f64 / to as f64) - 0.5)
}

/// The nearest voxel before resampling, halves up.
fn nearest(from: usize, to: usize) -> Vec<usize> {
    positions(from, to).map(|p| ((p + 0.5).floor().max(0.0) as usize).min(from - 1)).collect()
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

/// Coefficients of the cubic B-splines through the values of every line, with mirrored ends: one causal and one anticausal
/// pass.
fn spline_coefficients(lines: &mut [[f64; LINES]]) {
    let last = lines.len() - 1;
    // The mirrored signal's geometric sum in closed form.
    let end = POLE.powi(last as i32);
    let mut first = std::array::from_fn::<f64, LINES, _>(|line| lines[0][line] + end * lines[last][line]);
    let (mut forward, mut backward) = (POLE, POLE.powi(2 * last as i32 - 1));
    for row in &lines[1..last] {
        (0..LINES).for_each(|line| first[line] += (forward + backward) * row[line]);
        forward *= POLE;
        backward /= POLE;
    }
    let divisor = 1.0 - POLE.powi(2 * last as i32);
    lines[0] = first.map(|value| value / divisor);
    for i in 1..=last {
        let before = lines[i - 1];
        (0..LINES).for_each(|line| lines[i][line] += POLE * before[line]);
    }
    let before = lines[last - 1];
    let factor = POLE / (POLE * POLE - 1.0);
    lines[last] = std::array::from_fn(|line| factor * (lines[last][line] + POLE * before[line]));
    for i in (0..last).rev() {
        let after = lines[i + 1];
        (0..LINES).for_each(|line| lines[i][line] = POLE * (after[line] - lines[i][line]));
    }
    lines.iter_mut().flatten().for_each(|value| *value *= 6.0);
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
    volume.select(Axis(axis), &nearest(from, to))
}
