//! The weighted mean of overlapping windows on the device: the case lies there, windows are cut from it, logits added up, and
//! only what is made of the means leaves it.

use super::window::{SlidingWindow, importance_map};
use crate::dataset::LabelManager;
use crate::error::Result;
use crate::kernels::window::{self, NOT_FINITE, Output, Problem, Resampling};
use crate::kernels::{Buffer, Context, Dtype, elementwise};
use crate::nn::Network;
use crate::preprocess::resample::Taps;
use crate::tape::{Tape, Var};
use crate::tensor::{Shape, Tensor};

/// Bytes of results that leave the device at a time, or one slice.
const RESULTS_AT_ONCE: usize = 64 << 20;

/// What is made of the mean logits of a case.
#[derive(Debug, Clone, Copy)]
pub enum Wanted<'a> {
    /// Themselves.
    Logits,
    /// Labels, by these rules.
    Labels(&'a LabelManager),
}

/// Slices of the resampled grid, in order.
#[derive(Debug)]
pub enum Resolved {
    /// `[slices, height, width, heads]`.
    Logits(Vec<f32>),
    /// `[slices, height, width]`.
    Labels(Vec<u32>),
}

/// Sums of logits and of their weights on a device. As with an [`Accumulator`](super::Accumulator), windows come in order of
/// their depth, and no more slices are held than a window is deep, and one.
#[derive(Debug)]
pub struct DeviceSums<'a> {
    context: &'a Context,
    window: SlidingWindow,
    problem: Problem,
    /// The case, `[channels, depth, height, width]`.
    case: Buffer,
    importance: Buffer,
    /// As if they were logits, whose sums are those of the weights.
    ones: Buffer,
    sums: Buffer,
    weights: Buffer,
    resampling: Resampling,
    along_depth: Vec<Taps>,
    /// The label of each head, and whether heads are regions.
    values: Option<(Buffer, bool)>,
    /// The first slice held, in the padded volume.
    first: usize,
    /// Slices of the resampled grid that have been handed on.
    resolved: usize,
}

impl<'a> DeviceSums<'a> {
    /// Takes a case `[channels, depth, height, width]` with the number of its channels, of which `heads` heads are made. What
    /// comes out is resampled by `taps`, of depth, height and width.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::Error::Kernel) if the device cannot hold that much, or cannot count it.
    pub(crate) fn new(
        context: &'a Context,
        window: SlidingWindow,
        (case, channels): (Buffer, usize),
        heads: usize,
        taps: &[Vec<Taps>; 3],
        wanted: Wanted<'_>,
    ) -> Result<Self> {
        let slices = (window.patch[0] + 1).min(window.padded[0]);
        let volume = (window.image, window.before, window.padded);
        let problem = Problem::new(volume, window.patch, channels, heads, slices)?;
        let neighbours = taps.each_ref().map(|along| along.iter().map(Taps::neighbours).collect::<Vec<_>>());
        let values = match wanted {
            Wanted::Logits => None,
            Wanted::Labels(labels) => {
                let order = labels.regions_class_order();
                let value = |head: usize| order.map_or(head as u32, |order| order[head] as u32);
                let values: Vec<u32> = (0..heads).map(value).collect();
                Some((context.upload(&values, Dtype::U32)?, order.is_some()))
            }
        };
        let ones = context.empty(problem.weights_len(), Dtype::F32)?;
        elementwise::fill(context, &ones, 1.0)?;
        let sums = context.empty(problem.sums_len(), Dtype::F32)?;
        window::clear(context, &problem, 0..slices, &sums)?;
        let weights = context.empty(problem.of_weights().sums_len(), Dtype::F32)?;
        window::clear(context, &problem.of_weights(), 0..slices, &weights)?;
        let resampling = Resampling::new(context, &problem, neighbours.each_ref().map(Vec::as_slice))?;
        Ok(Self {
            context,
            importance: context.upload_f32(&importance_map(window.patch))?,
            along_depth: taps[0].clone(),
            window,
            problem,
            case,
            ones,
            sums,
            weights,
            resampling,
            values,
            first: 0,
            resolved: 0,
        })
    }

    /// Bytes of results that lie on the device, and on the host, at a time.
    pub(crate) fn result_bytes(&self) -> u64 {
        (self.slices_at_once() * self.slice_bytes()) as u64
    }

    fn slice_bytes(&self) -> usize {
        let [_, height, width] = self.resampling.extents();
        4 * height
            * width
            * if self.values.is_some() { 1 } else { self.problem.logits_len() / self.problem.weights_len() }
    }

    fn slices_at_once(&self) -> usize {
        (RESULTS_AT_ONCE / self.slice_bytes()).clamp(1, self.along_depth.len())
    }

    /// Cuts the windows that begin at `starts`, mirrored along the axes of `mirror`, into `windows`,
    /// `[windows, depth, height, width, channels]`.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::Error::Kernel) if the buffer or a start does not fit.
    pub fn cut(&self, starts: &[[usize; 3]], mirror: [bool; 3], windows: &Buffer) -> Result<()> {
        Ok(window::cut(self.context, &self.problem, &self.case, starts, mirror, windows)?)
    }

    /// Adds the weights of windows: once for each window, however often its logits are added.
    ///
    /// # Errors
    /// As [`cut`](Self::cut).
    pub fn count(&self, starts: &[[usize; 3]]) -> Result<()> {
        let (problem, weight) = (self.problem.of_weights(), (&self.importance, 1.0));
        for &start in starts {
            window::add(self.context, &problem, &self.ones, 0, start, [false; 3], weight, &self.weights)?;
        }
        Ok(())
    }

    /// Adds `share` times the logits `[windows, depth, height, width, heads]` of windows that were mirrored along the axes of
    /// `mirror`.
    ///
    /// # Errors
    /// As [`cut`](Self::cut).
    pub fn add(&self, logits: &Buffer, starts: &[[usize; 3]], mirror: [bool; 3], share: f32) -> Result<()> {
        let weight = (&self.importance, share);
        for (sample, &start) in starts.iter().enumerate() {
            window::add(self.context, &self.problem, logits, sample, start, mirror, weight, &self.sums)?;
        }
        Ok(())
    }

    /// Adds up `share` times the logits of some windows, mirrored along the axes of `mirror`, of all networks, with activations
    /// of type `dtype`.
    ///
    /// # Errors
    /// As [`cut`](Self::cut), and if the windows do not fit the networks.
    pub fn pass(
        &self,
        networks: &[Network],
        starts: &[[usize; 3]],
        mirror: [bool; 3],
        share: f32,
        dtype: Dtype,
    ) -> Result<()> {
        let channels = self.problem.window_len() / self.problem.weights_len();
        let windows =
            Tensor::empty(self.context, Shape { batch: starts.len(), dims: self.window.patch, channels }, dtype)?;
        self.cut(starts, mirror, windows.buffer())?;
        let x = Var::data(windows);
        for network in networks {
            for output in network.forward(&mut Tape::inference(self.context), &x, 1)? {
                self.add(output.value().buffer(), starts, mirror, share)?;
            }
        }
        Ok(())
    }

    /// Waits until everything has been added.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::Error::Kernel) if the device failed.
    pub fn wait(&self) -> Result<()> {
        Ok(self.context.finish([&self.sums, &self.weights])?)
    }

    /// Hands on what is complete when no further window begins before slice `to` of the padded volume, and makes room for as
    /// much. Returns whether all of it is finite; what is not, is not handed on.
    ///
    /// # Errors
    /// [`Error::Kernel`](crate::Error::Kernel) if the device failed, and what `consume` returns.
    pub fn advance(&mut self, to: usize, consume: &mut impl FnMut(Resolved) -> Result<()>) -> Result<bool> {
        let [before, image, padded] = [self.window.before[0], self.window.image[0], self.window.padded[0]];
        let complete = to.saturating_sub(before).min(image);
        let end = self.along_depth.partition_point(|taps| taps.second < complete);
        while self.resolved < end {
            let slices = self.resolved..end.min(self.resolved + self.slices_at_once());
            let result = self.resolve(slices.clone())?;
            let is_finite = match &result {
                Resolved::Logits(logits) => logits.iter().all(|logit| logit.is_finite()),
                Resolved::Labels(labels) => !labels.contains(&NOT_FINITE),
            };
            if !is_finite {
                return Ok(false);
            }
            consume(result)?;
            self.resolved = slices.end;
        }
        let needed = self.along_depth.get(end).map_or(padded, |taps| before + taps.first).min(to);
        if self.first < needed {
            window::clear(self.context, &self.problem, self.first..needed, &self.sums)?;
            window::clear(self.context, &self.problem.of_weights(), self.first..needed, &self.weights)?;
            self.first = needed;
        }
        Ok(true)
    }

    /// Hands on everything that is left, as [`advance`](Self::advance) does.
    ///
    /// # Errors
    /// As [`advance`](Self::advance).
    pub fn finish(mut self, consume: &mut impl FnMut(Resolved) -> Result<()>) -> Result<bool> {
        let to = self.window.padded[0];
        self.advance(to, consume)
    }

    fn resolve(&self, slices: std::ops::Range<usize>) -> Result<Resolved> {
        let elements = slices.len() * self.slice_bytes() / 4;
        let sums = (&self.sums, &self.weights);
        let resolve = |output| window::resolve(self.context, &self.problem, sums, &self.resampling, slices, output);
        Ok(match &self.values {
            None => {
                let logits = self.context.empty(elements, Dtype::F32)?;
                resolve(Output::Logits(&logits))?;
                Resolved::Logits(self.context.download_f32(&logits)?)
            }
            Some((values, is_regions)) => {
                let labels = &self.context.empty(elements, Dtype::U32)?;
                resolve(match is_regions {
                    true => Output::LastPositive { values, labels },
                    false => Output::Largest { values, labels },
                })?;
                Resolved::Labels(self.context.download(labels)?)
            }
        })
    }
}
