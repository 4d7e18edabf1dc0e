//! From logits back to a label map on the raw image's grid, slice by slice.

use ndarray::{Array3, ArrayViewMut1, Axis, s};
use rayon::prelude::*;

use crate::dataset::LabelManager;
use crate::error::{Error, Result};
use crate::preprocess::resample::{Grid, Taps};
use crate::preprocess::{Preprocessor, Properties};

/// Turns slices of the logits of a preprocessed case, as they come, into a segmentation in the raw image's axis order and
/// shape. Logits (not labels) are resampled to the spacing before preprocessing, decoded, and pasted where the image was
/// cropped. Of the logits, no more than one slice is held.
#[derive(Debug)]
pub struct Exporter<'a> {
    labels: &'a LabelManager,
    properties: &'a Properties,
    transpose_forward: [usize; 3],
    /// Shape of the logits without their heads.
    from: [usize; 3],
    /// Where a voxel of the cropped image lies between those of the logits, along each axis.
    taps: [Vec<Taps>; 3],
    /// The slice before the one that came last.
    previous: Vec<f32>,
    /// Slices that have come, and slices of the cropped image that have been decoded.
    arrived: usize,
    decoded: usize,
    /// Labels of the transposed image.
    whole: Array3<u16>,
}

impl<'a> Exporter<'a> {
    /// Waits for logits of `shape` voxels.
    ///
    /// # Errors
    /// [`PreprocessError::ResampledTooLarge`](crate::error::PreprocessError::ResampledTooLarge).
    pub fn new(shape: [usize; 3], properties: &'a Properties, preprocessor: &'a Preprocessor) -> Result<Self> {
        let raw_spacing = preprocessor.transpose_forward.map(|axis| properties.spacing[axis]);
        let grid = Grid::between(shape, properties.shape_after_cropping, preprocessor.spacing, raw_spacing)?;
        Ok(Exporter {
            labels: &preprocessor.labels,
            properties,
            transpose_forward: preprocessor.transpose_forward,
            from: shape,
            taps: std::array::from_fn(|axis| grid.taps(axis)),
            previous: Vec::new(),
            arrived: 0,
            decoded: 0,
            whole: Array3::zeros(properties.shape_before_cropping),
        })
    }

    /// Takes the next slice, `[height, width, heads]`.
    ///
    /// # Errors
    /// [`Error::BufferLength`] for another length, or more slices than the shape has.
    pub fn push(&mut self, slice: &[f32]) -> Result<()> {
        let [depth, height, width] = self.from;
        let expected = if self.arrived < depth { height * width * self.labels.num_segmentation_heads() } else { 0 };
        if slice.len() != expected {
            return Err(Error::BufferLength { what: "slice of logits", found: slice.len(), expected });
        }
        while let Some(&taps) = self.taps[0].get(self.decoded)
            && taps.second <= self.arrived
        {
            self.decode(self.decoded, taps, slice)?;
            self.decoded += 1;
        }
        self.arrived += 1;
        if self.taps[0].get(self.decoded).is_some_and(|taps| taps.first < self.arrived) {
            self.previous.clear();
            self.previous.extend_from_slice(slice);
        }
        Ok(())
    }

    /// Decodes a slice of the cropped image, which lies between the previous slice of logits and the present one.
    fn decode(&mut self, at: usize, between: Taps, present: &[f32]) -> Result<()> {
        let heads = self.labels.num_segmentation_heads();
        let (labels, [_, rows, columns], previous) = (self.labels, &self.taps, &self.previous);
        let slice = |index: usize| if index == self.arrived { present } else { previous.as_slice() };
        let (first, second) = (slice(between.first), slice(between.second));
        let row_length = self.from[2] * heads;
        let [z, y, x] = self.properties.bbox.map(|[start, end]| start..end);
        let mut target = self.whole.slice_mut(s![z.start + at, y, x]);
        if target.dim() != (rows.len(), columns.len()) {
            let expected = rows.len() * columns.len();
            return Err(Error::BufferLength { what: "cropped segmentation", found: target.len(), expected });
        }
        let targets: Vec<ArrayViewMut1<u16>> = target.axis_iter_mut(Axis(0)).collect();
        let buffers = || (vec![0.0; row_length], vec![0.0; columns.len() * heads]);
        targets.into_par_iter().zip(rows).try_for_each_init(buffers, |(line, row), (mut target, taps)| {
            // As a whole volume is resampled: along depth, then height, then width, in f64.
            let at = |y: usize| y * row_length..(y + 1) * row_length;
            let pairs = |y: usize| first[at(y)].iter().zip(&second[at(y)]);
            let along_depth = |(&first, &second): (&f32, &f32)| between.mean(first.into(), second.into());
            for ((value, low), high) in line.iter_mut().zip(pairs(taps.first)).zip(pairs(taps.second)) {
                *value = match taps.is_exact() {
                    true => along_depth(low),
                    false => taps.mean(along_depth(low), along_depth(high)),
                };
            }
            for (voxel, taps) in row.chunks_exact_mut(heads).zip(columns) {
                let (left, right) = (&line[taps.first * heads..], &line[taps.second * heads..]);
                voxel.iter_mut().zip(left).zip(right).for_each(|((v, &l), &r)| *v = taps.mean(l, r) as f32);
            }
            let decoded = labels.segmentation_from_logits(row)?;
            target.iter_mut().zip(decoded).for_each(|(target, label)| *target = label);
            Ok(())
        })
    }

    /// The labels in the raw image's axis order, background where it was cropped.
    ///
    /// # Errors
    /// [`Error::BufferLength`] if slices are missing.
    pub fn finish(self) -> Result<Array3<u16>> {
        if self.arrived != self.from[0] {
            return Err(Error::BufferLength { what: "slices of logits", found: self.arrived, expected: self.from[0] });
        }
        let mut backward = [0; 3];
        for (transposed, &raw) in self.transpose_forward.iter().enumerate() {
            backward[raw] = transposed;
        }
        let raw = self.whole.permuted_axes(backward);
        Ok(if raw.is_standard_layout() { raw } else { raw.as_standard_layout().into_owned() })
    }
}

/// Turns the logits of a preprocessed case, `[depth, height, width, heads]` with `shape` voxels, into a segmentation in
/// the raw image's axis order and shape, as an [`Exporter`] does.
///
/// # Errors
/// [`Error::BufferLength`] if logits and shape disagree, [`PreprocessError::ResampledTooLarge`](crate::error::PreprocessError::ResampledTooLarge).
pub fn segmentation(
    logits: &[f32],
    shape: [usize; 3],
    properties: &Properties,
    preprocessor: &Preprocessor,
) -> Result<Array3<u16>> {
    let mut exporter = Exporter::new(shape, properties, preprocessor)?;
    let slice = shape[1] * shape[2] * preprocessor.labels.num_segmentation_heads();
    logits.chunks(slice.max(1)).try_for_each(|slice| exporter.push(slice))?;
    exporter.finish()
}
