//! The weighted mean of overlapping patches, slice by slice.

use super::window::{SlidingWindow, check_length, importance_map};
use crate::error::{Error, Result};

/// Mean logits of overlapping patches. Patches come in order of their depth; slices that no later patch reaches are handed
/// on at once, so that only as many slices are held as a patch is deep.
#[derive(Debug, Clone)]
pub struct Accumulator {
    window: SlidingWindow,
    channels: usize,
    importance: Vec<f32>,
    /// The first slice held, in the padded volume.
    first: usize,
    /// Logits times weights, `[patch depth, padded height, padded width, channels]`.
    sums: Vec<f32>,
    weights: Vec<f32>,
}

impl Accumulator {
    /// An empty accumulator for logits of `channels` heads.
    pub fn new(window: SlidingWindow, channels: usize) -> Self {
        let [_, height, width] = window.padded;
        let voxels = window.patch[0] * height * width;
        Accumulator {
            importance: importance_map(window.patch),
            first: 0,
            sums: vec![0.0; voxels * channels],
            weights: vec![0.0; voxels],
            window,
            channels,
        }
    }

    /// Adds the logits `[depth, height, width, channels]` of the patch at `start`, one of the window's starts in their
    /// order. `consume` is given the slices that are complete by then, `[height, width, channels]` of the volume without
    /// its padding, in order.
    ///
    /// # Errors
    /// [`Error::BufferLength`] for another length, [`Error::Setting`] for a start outside the volume or out of order, and
    /// what `consume` returns.
    pub fn add(&mut self, start: [usize; 3], logits: &[f32], consume: impl FnMut(&[f32]) -> Result<()>) -> Result<()> {
        let [depth, height, width] = self.window.patch;
        let [_, padded_height, padded_width] = self.window.padded;
        let channels = self.channels;
        check_length("patch of logits", logits.len(), self.window.patch_voxels() * channels)?;
        let inside = (0..3).all(|axis| start[axis] + self.window.patch[axis] <= self.window.padded[axis]);
        if !inside || start[0] < self.first {
            return Err(Error::Setting {
                setting: "patch start",
                value: format!("{start:?}"),
                expected: "the patch must lie inside the padded volume and behind the patches before it",
            });
        }
        self.advance(start[0], consume)?;
        for z in 0..depth {
            for y in 0..height {
                let row = (z * height + y) * width;
                let importance = &self.importance[row..row + width];
                let logits = &logits[row * channels..(row + width) * channels];
                let first = (z * padded_height + start[1] + y) * padded_width + start[2];
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

    /// Hands on all slices that are left; their logits are 0 where no patch was added.
    ///
    /// # Errors
    /// What `consume` returns.
    pub fn finish(mut self, mut consume: impl FnMut(&[f32]) -> Result<()>) -> Result<()> {
        let end = self.window.padded[0];
        // In steps of what is held: there may be more slices, if the last patches were not added.
        while self.first < end {
            let to = end.min(self.first + self.window.patch[0]);
            self.advance(to, &mut consume)?;
        }
        Ok(())
    }

    /// Hands on the slices before `to`, at most as many as are held, and makes room for as many behind them.
    fn advance(&mut self, to: usize, mut consume: impl FnMut(&[f32]) -> Result<()>) -> Result<()> {
        let [_, padded_height, padded_width] = self.window.padded;
        let [depth, height, width] = self.window.image;
        let [before_z, before_y, before_x] = self.window.before;
        let channels = self.channels;
        let slice = padded_height * padded_width;
        let complete = (to - self.first).min(self.window.patch[0]);
        for held in 0..complete {
            if !(before_z..before_z + depth).contains(&(self.first + held)) {
                continue;
            }
            let sums = &mut self.sums[held * slice * channels..(held + 1) * slice * channels];
            let weights = &self.weights[held * slice..(held + 1) * slice];
            for y in 0..height {
                // Rows move to the front of the slice, over padding and rows that have been moved.
                let from = (before_y + y) * padded_width + before_x;
                sums.copy_within(from * channels..(from + width) * channels, y * width * channels);
                let row = &mut sums[y * width * channels..(y + 1) * width * channels];
                for (sum, &weight) in row.chunks_exact_mut(channels).zip(&weights[from..from + width]) {
                    let divisor = weight.max(f32::MIN_POSITIVE);
                    sum.iter_mut().for_each(|sum| *sum /= divisor);
                }
            }
            consume(&sums[..height * width * channels])?;
        }
        let kept = self.window.patch[0] - complete;
        self.sums.copy_within(complete * slice * channels.., 0);
        self.sums[kept * slice * channels..].fill(0.0);
        self.weights.copy_within(complete * slice.., 0);
        self.weights[kept * slice..].fill(0.0);
        self.first = to;
        Ok(())
    }
}
