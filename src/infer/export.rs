//! From logits back to a label map, and probabilities, on the raw image's grid, slice by slice.

use ndarray::{Array3, Array4, ArrayViewMut1, ArrayViewMut2, Axis, s};
use rayon::prelude::*;
use std::sync::Arc;

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
    taps: Arc<[Vec<Taps>; 3]>,
    /// The slice before the one that came last.
    previous: Vec<f32>,
    /// Slices that have come, and slices of the cropped image that have been decoded.
    arrived: usize,
    decoded: usize,
    /// In the raw image's axis order; probabilities have no heads unless they are asked for.
    raw: Prediction,
}

/// A case on the grid of its raw image.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// Labels, `(z, y, x)`.
    pub labels: Array3<u16>,
    /// Probabilities, `(head, z, y, x)`: softmax of the resampled logits of classes, or the sigmoid of each region's. Where
    /// the image was cropped the background has 1, and every region 0.
    pub probabilities: Array4<f32>,
}

impl<'a> Exporter<'a> {
    /// Waits for logits of `shape` voxels.
    ///
    /// # Errors
    /// [`PreprocessError::ResampledTooLarge`](crate::error::PreprocessError::ResampledTooLarge).
    pub fn new(shape: [usize; 3], properties: &'a Properties, preprocessor: &'a Preprocessor) -> Result<Self> {
        let raw_spacing = preprocessor.transpose_forward.map(|axis| properties.spacing[axis]);
        let grid = Grid::between(shape, properties.shape_after_cropping, preprocessor.spacing, raw_spacing)?;
        let raw_shape = backward(preprocessor.transpose_forward).map(|axis| properties.shape_before_cropping[axis]);
        Ok(Exporter {
            labels: &preprocessor.labels,
            properties,
            transpose_forward: preprocessor.transpose_forward,
            from: shape,
            taps: Arc::new(std::array::from_fn(|axis| grid.taps(axis))),
            previous: Vec::new(),
            arrived: 0,
            decoded: 0,
            raw: Prediction { labels: Array3::zeros(raw_shape), probabilities: Array4::zeros((0, 0, 0, 0)) },
        })
    }

    /// Keeps probabilities too: 4 bytes for each head of each voxel of the raw image.
    pub fn with_probabilities(mut self) -> Self {
        let (depth, height, width) = self.raw.labels.dim();
        let mut probabilities = Array4::zeros((self.labels.num_segmentation_heads(), depth, height, width));
        if !self.labels.has_regions() {
            probabilities.index_axis_mut(Axis(0), 0).fill(1.0);
        }
        self.raw.probabilities = probabilities;
        self
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

    /// Where the slices of the cropped image lie between those of the logits, along each axis.
    pub(crate) fn taps(&self) -> Arc<[Vec<Taps>; 3]> {
        self.taps.clone()
    }

    /// Takes the next slices as they have been resampled elsewhere, `[slices, height, width, heads]` of the cropped image.
    ///
    /// # Errors
    /// [`Error::BufferLength`] for parts of slices, or more slices than the cropped image has.
    pub fn push_resampled(&mut self, logits: &mut [f32]) -> Result<()> {
        let heads = self.labels.num_segmentation_heads();
        let row_length = self.taps[2].len() * heads;
        for slice in logits.chunks_mut(self.taps[1].len() * row_length) {
            let labels = self.labels;
            let rows = self.rows(self.decoded, slice.len() / heads)?;
            rows.into_par_iter()
                .zip(slice.par_chunks_mut(row_length))
                .try_for_each(|(row, logits)| row.fill(logits, labels))?;
            self.decoded += 1;
        }
        self.arrive_with_the_last();
        Ok(())
    }

    /// Takes the next slices as labels, `[slices, height, width]` of the cropped image.
    ///
    /// # Errors
    /// As [`push_resampled`](Self::push_resampled).
    pub fn push_labels(&mut self, labels: &[u32]) -> Result<()> {
        let width = self.taps[2].len();
        for slice in labels.chunks(self.taps[1].len() * width) {
            for (row, labels) in self.rows(self.decoded, slice.len())?.into_iter().zip(slice.chunks(width)) {
                let Row { labels: mut target, .. } = row;
                target.iter_mut().zip(labels).for_each(|(target, &label)| *target = label as u16);
            }
            self.decoded += 1;
        }
        self.arrive_with_the_last();
        Ok(())
    }

    /// Where resampled slices come, those of the logits have all come with the last.
    fn arrive_with_the_last(&mut self) {
        if self.decoded == self.taps[0].len() {
            self.arrived = self.from[0];
        }
    }

    /// The rows of a slice of the cropped image in the raw image, which is to get `voxels` voxels.
    fn rows(&mut self, at: usize, voxels: usize) -> Result<Vec<Row<'_>>> {
        let [z, y, x] = self.properties.bbox.map(|[start, end]| start..end);
        let expected = if at < z.len() { y.len() * x.len() } else { 0 };
        if voxels != expected || (y.len(), x.len()) != (self.taps[1].len(), self.taps[2].len()) {
            return Err(Error::BufferLength { what: "slice of the cropped image", found: voxels, expected });
        }
        let forward = self.transpose_forward;
        let labels = self.raw.labels.view_mut().permuted_axes(forward);
        let labels = labels.slice_move(s![z.start + at, y.clone(), x.clone()]);
        let [a, b, c] = forward.map(|axis| axis + 1);
        let probabilities = self.raw.probabilities.view_mut().permuted_axes([0, a, b, c]);
        let mut probabilities = match probabilities.is_empty() {
            true => None,
            false => Some(probabilities.slice_move(s![.., z.start + at, y, x])),
        };
        let mut rows = Vec::with_capacity(labels.dim().0);
        let mut rest = labels;
        while rest.dim().0 > 0 {
            let (row, others) = rest.split_at(Axis(0), 1);
            let beside = probabilities.take().map(|volume| volume.split_at(Axis(1), 1));
            let (beside, others_beside) = beside.map_or((None, None), |(row, others)| (Some(row), Some(others)));
            rows.push(Row {
                labels: row.index_axis_move(Axis(0), 0),
                probabilities: beside.map(|row| row.index_axis_move(Axis(1), 0)),
            });
            (rest, probabilities) = (others, others_beside);
        }
        Ok(rows)
    }

    /// Decodes a slice of the cropped image, which lies between the previous slice of logits and the present one.
    fn decode(&mut self, at: usize, between: Taps, present: &[f32]) -> Result<()> {
        let heads = self.labels.num_segmentation_heads();
        let (labels, taps, row_length) = (self.labels, self.taps.clone(), self.from[2] * heads);
        let previous = std::mem::take(&mut self.previous);
        let slice = |index: usize| if index == self.arrived { present } else { previous.as_slice() };
        let (first, second) = (slice(between.first), slice(between.second));
        let [_, rows, columns] = &*taps;
        let buffers = || (vec![0.0; row_length], vec![0.0; columns.len() * heads]);
        let targets = self.rows(at, rows.len() * columns.len())?;
        targets.into_par_iter().zip(rows).try_for_each_init(buffers, |(line, row), (target, taps)| {
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
            target.fill(row, labels)
        })?;
        self.previous = previous;
        Ok(())
    }

    /// The labels in the raw image's axis order, background where it was cropped.
    ///
    /// # Errors
    /// [`Error::BufferLength`] if slices are missing.
    pub fn finish(self) -> Result<Array3<u16>> {
        self.prediction().map(|prediction| prediction.labels)
    }

    /// Labels and, [if they are kept](Self::with_probabilities), probabilities; else these have no heads.
    ///
    /// # Errors
    /// As [`finish`](Self::finish).
    pub fn prediction(self) -> Result<Prediction> {
        if self.arrived != self.from[0] {
            return Err(Error::BufferLength { what: "slices of logits", found: self.arrived, expected: self.from[0] });
        }
        Ok(self.raw)
    }
}

/// A row of the cropped image in the raw image: labels `(x)`, and `(head, x)` if probabilities are kept.
struct Row<'a> {
    labels: ArrayViewMut1<'a, u16>,
    probabilities: Option<ArrayViewMut2<'a, f32>>,
}

impl Row<'_> {
    /// Takes the resampled logits `[x, heads]`, which become probabilities if these are kept.
    fn fill(mut self, logits: &mut [f32], labels: &LabelManager) -> Result<()> {
        let decoded = labels.segmentation_from_logits(logits)?;
        self.labels.iter_mut().zip(decoded).for_each(|(target, label)| *target = label);
        if let Some(mut probabilities) = self.probabilities {
            labels.probabilities_from_logits(logits)?;
            let voxels = logits.chunks_exact(labels.num_segmentation_heads());
            for (mut voxel, values) in probabilities.axis_iter_mut(Axis(1)).zip(voxels) {
                voxel.iter_mut().zip(values).for_each(|(target, value)| *target = *value);
            }
        }
        Ok(())
    }
}

/// The raw axis `i` is the transposed axis `backward(forward)[i]`.
fn backward(forward: [usize; 3]) -> [usize; 3] {
    let mut backward = [0; 3];
    for (transposed, &raw) in forward.iter().enumerate() {
        backward[raw] = transposed;
    }
    backward
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

/// Labels and probabilities of such logits.
///
/// # Errors
/// As [`segmentation`].
pub fn prediction(
    logits: &[f32],
    shape: [usize; 3],
    properties: &Properties,
    preprocessor: &Preprocessor,
) -> Result<Prediction> {
    let mut exporter = Exporter::new(shape, properties, preprocessor)?.with_probabilities();
    let slice = shape[1] * shape[2] * preprocessor.labels.num_segmentation_heads();
    logits.chunks(slice.max(1)).try_for_each(|slice| exporter.push(slice))?;
    exporter.prediction()
}
