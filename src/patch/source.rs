//! What patches are cut out of, and cases in memory.

use crate::error::Result;
use crate::preprocess::{ClassLocations, PreprocessedCase, label_counts};
use ndarray::{ArrayView3, ArrayView4};
use std::collections::BTreeMap;
use std::sync::Arc;

/// A case that patches can be cut out of.
pub trait PatchSource {
    /// Case identifier.
    fn name(&self) -> &str;

    /// Number of image channels.
    fn channels(&self) -> usize;

    /// Depth, height, width.
    fn shape(&self) -> [usize; 3];

    /// The sampled voxels of each class, which patches are centred on.
    fn class_locations(&self) -> &ClassLocations;

    /// How many voxels have each label that occurs, -1 (no image) and the ignore label among them.
    fn label_counts(&self) -> BTreeMap<i16, u64>;

    /// Copies a box of `patch` voxels from `start`, which may hang over the volume: the image into
    /// `[depth, height, width, channels]`, the labels into `[depth, height, width]`. What lies outside the volume is 0 in
    /// the image, and has label -1. Both buffers are written completely.
    ///
    /// # Errors
    /// If the case is read from a disk, what reading it may give.
    fn copy_patch(&self, start: [isize; 3], patch: [usize; 3], image: &mut [f32], labels: &mut [i16]) -> Result<()>;
}

impl PatchSource for PreprocessedCase {
    fn name(&self) -> &str {
        &self.name
    }

    fn channels(&self) -> usize {
        self.data.dim().0
    }

    fn shape(&self) -> [usize; 3] {
        self.seg.dim().into()
    }

    fn class_locations(&self) -> &ClassLocations {
        &self.class_locations
    }

    fn label_counts(&self) -> BTreeMap<i16, u64> {
        label_counts(self.seg.view())
    }

    fn copy_patch(&self, start: [isize; 3], patch: [usize; 3], image: &mut [f32], labels: &mut [i16]) -> Result<()> {
        copy_image(self.data.view(), start, patch, image);
        copy_labels(self.seg.view(), start, patch, labels);
        Ok(())
    }
}

impl<S: PatchSource + ?Sized> PatchSource for Arc<S> {
    fn name(&self) -> &str {
        (**self).name()
    }

    fn channels(&self) -> usize {
        (**self).channels()
    }

    fn shape(&self) -> [usize; 3] {
        (**self).shape()
    }

    fn class_locations(&self) -> &ClassLocations {
        (**self).class_locations()
    }

    fn label_counts(&self) -> BTreeMap<i16, u64> {
        (**self).label_counts()
    }

    fn copy_patch(&self, start: [isize; 3], patch: [usize; 3], image: &mut [f32], labels: &mut [i16]) -> Result<()> {
        (**self).copy_patch(start, patch, image, labels)
    }
}

/// Overlap of the range `[start, start + length)` with `[0, bound)`: offset into the range, offset into the bound, count.
pub(super) fn overlap(start: isize, length: usize, bound: usize) -> (usize, usize, usize) {
    let skip = start.min(0).unsigned_abs().min(length);
    let from = start.max(0).unsigned_abs().min(bound);
    (skip, from, (length - skip).min(bound - from))
}

/// Copies a box of `(c, z, y, x)` into a channels-last buffer `[z, y, x, c]`; what lies outside the volume is 0.
///
/// The buffer must hold `dims` voxels of all channels; it is written completely.
pub(crate) fn copy_image(data: ArrayView4<f32>, start: [isize; 3], dims: [usize; 3], out: &mut [f32]) {
    let (channels, depth, height, width) = data.dim();
    let [_, height_out, width_out] = dims;
    let (z_to, z_from, z_count) = overlap(start[0], dims[0], depth);
    let (y_to, y_from, y_count) = overlap(start[1], dims[1], height);
    let (x_to, x_from, x_count) = overlap(start[2], dims[2], width);
    if [z_count, y_count, x_count] != dims {
        out.fill(0.0);
    }
    for z in 0..z_count {
        for y in 0..y_count {
            let first = (((z_to + z) * height_out + y_to + y) * width_out + x_to) * channels;
            let row = &mut out[first..first + x_count * channels];
            for channel in 0..channels {
                let line = data.slice(ndarray::s![channel, z_from + z, y_from + y, x_from..x_from + x_count]);
                let strided = row[channel..].iter_mut().step_by(channels);
                match line.as_slice() {
                    Some(line) => strided.zip(line).for_each(|(to, from)| *to = *from),
                    None => strided.zip(line).for_each(|(to, from)| *to = *from),
                }
            }
        }
    }
}

/// Copies a box of labels into a buffer `[z, y, x]`; what lies outside the volume becomes -1.
pub(super) fn copy_labels(seg: ArrayView3<i16>, start: [isize; 3], dims: [usize; 3], out: &mut [i16]) {
    let (depth, height, width) = seg.dim();
    let [_, height_out, width_out] = dims;
    let (z_to, z_from, z_count) = overlap(start[0], dims[0], depth);
    let (y_to, y_from, y_count) = overlap(start[1], dims[1], height);
    let (x_to, x_from, x_count) = overlap(start[2], dims[2], width);
    if [z_count, y_count, x_count] != dims {
        out.fill(-1);
    }
    for z in 0..z_count {
        for y in 0..y_count {
            let first = ((z_to + z) * height_out + y_to + y) * width_out + x_to;
            let row = &mut out[first..first + x_count];
            let line = seg.slice(ndarray::s![z_from + z, y_from + y, x_from..x_from + x_count]);
            row.iter_mut().zip(line).for_each(|(to, &label)| *to = label);
        }
    }
}
