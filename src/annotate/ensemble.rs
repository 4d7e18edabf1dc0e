//! Cases as an ensemble of networks sees them: labels, and how sure it is of every voxel.

use std::ops::ControlFlow;

use ndarray::{Array3, Array4, Axis, s};
use rayon::prelude::*;

use super::voxel::{self, Certainty};
use crate::augment::flip;
use crate::compat::Compat;
use crate::dataset::{CaseFiles, LabelManager};
use crate::device::host_memory;
use crate::error::{Error, PredictError, Result};
use crate::exchange::TrainedModel;
use crate::infer::memory::planned_host;
use crate::infer::{Accumulator, SlidingWindow, mirror_subsets};
use crate::kernels::Context;
use crate::nn::{Network, planned_prediction};
use crate::predict::Settings;
use crate::preprocess::resample::{self, Grid};
use crate::preprocess::{PreprocessedCase, Preprocessor, RawCase};
use crate::tape::{Tape, Var};
use crate::tensor::{Shape, Tensor};
use crate::train::Model;

/// Voxels that one thread takes at a time.
const VOXELS: usize = 4096;

/// The networks of a trained model on a device, ready to look at cases.
pub struct Ensemble<'a> {
    /// The trained model.
    pub model: &'a TrainedModel,
    context: &'a Context,
    networks: Vec<Network>,
    preprocessor: Preprocessor,
    patch: [usize; 3],
    settings: Settings,
}

/// A case on the grid of its raw image, (z, y, x). Where preprocessing cropped it, it is background without doubt.
#[derive(Debug, Clone, PartialEq)]
pub struct Assessment {
    /// Labels, as [`predict::segmentation`](crate::predict::segmentation) of the same networks gives them.
    pub labels: Array3<u16>,
    /// See [`Certainty::margin`].
    pub margin: Array3<f32>,
    /// See [`Certainty::entropy`].
    pub entropy: Array3<f32>,
    /// See [`Certainty::disagreement`].
    pub disagreement: Array3<f32>,
}

/// What has happened while cases are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event<'a> {
    /// A network has seen one copy of a window.
    Pass,
    /// A case is done.
    Case(&'a str),
}

impl<'a> Ensemble<'a> {
    /// Brings a model onto a device.
    ///
    /// # Errors
    /// If a network does not fit the plans, the device is out of memory, or the plans ask for a preprocessing or a cascade
    /// that there is not.
    pub fn new(context: &'a Context, model: &'a TrainedModel, settings: Settings) -> Result<Self> {
        let Model { plans, configuration, labels, .. } = &model.model;
        plans.check_network(configuration)?;
        let preprocessor = Preprocessor::from_plans(plans, configuration, labels.clone(), Compat::Corrected)?;
        let (patch, _) = configuration.three_dimensional()?;
        Ok(Ensemble { model, context, networks: model.networks(context)?, preprocessor, patch, settings })
    }

    /// Reads and preprocesses the images of a case, and looks at them with some of the folds. Returns what is odd about the
    /// files too. `None` if `observe` breaks off.
    ///
    /// # Errors
    /// Those of [`RawCase::read`], [`Preprocessor::run`] and [`assess`](Self::assess).
    pub fn assess_files(
        &self,
        case: &CaseFiles,
        folds: &[usize],
        observe: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Option<(Assessment, Vec<String>)>> {
        let image_only = CaseFiles { label: None, ..case.clone() };
        let raw = RawCase::read(&image_only, &self.preprocessor.labels)?;
        let warnings = raw.warnings.clone();
        let case = self.preprocessor.run(raw)?;
        Ok(self.assess(&case, folds, observe)?.map(|assessment| (assessment, warnings)))
    }

    /// Looks at a preprocessed case with the folds at these places. `None` if `observe`, called after every pass, breaks off.
    ///
    /// # Errors
    /// As [`predict::segmentation`](crate::predict::segmentation); [`Error::Setting`] without folds.
    pub fn assess(
        &self,
        case: &PreprocessedCase,
        folds: &[usize],
        observe: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Option<Assessment>> {
        let networks: Vec<&Network> = folds.iter().filter_map(|&fold| self.networks.get(fold)).collect();
        if networks.is_empty() || networks.len() < folds.len() {
            return Err(Error::Setting {
                setting: "folds",
                value: format!("{folds:?}"),
                expected: "expected places of at least one of the model's folds",
            });
        }
        let window = SlidingWindow::new(case.seg.dim().into(), self.patch, self.settings.step_size)?;
        self.check_memory(case, &window)?;
        match self.gather(case, &networks, window, observe)? {
            ControlFlow::Continue(values) => self.on_raw_grid(case, values).map(Some),
            ControlFlow::Break(()) => Ok(None),
        }
    }

    fn check_memory(&self, case: &PreprocessedCase, window: &SlidingWindow) -> Result<()> {
        let (channels, raw) = (self.channels(), case.properties.shape_before_cropping);
        let host = planned_host(window, case.data.dim().0, channels, raw, rayon::current_num_threads());
        // What was gathered, in both orders of its axes or on both grids; and the assessment, in two orders of axes.
        let voxels = |shape: [usize; 3]| shape.into_iter().fold(1u64, |n, axis| n.saturating_mul(axis as u64));
        let gathered = voxels(window.image) + voxels(case.properties.shape_after_cropping);
        let whole = gathered.saturating_mul(4 * channels as u64).saturating_add(voxels(raw).saturating_mul(28));
        let shape = self.model.model.architecture()?;
        let host = host.saturating_add(whole);
        let mut plan = planned_prediction(self.context, &shape, self.patch, self.settings.dtype, host)?;
        // All folds lie on the device: weights, and room for gradients and momenta that every network has.
        let others = self.networks.iter().skip(1).map(|network| network.parameters().count() as u64 * 3 * 4);
        plan.device = others.fold(plan.device, u64::saturating_add);
        plan.check(self.context.caps(), host_memory())
    }

    /// Values that are kept of a voxel: mean logits and mean probabilities of all heads, and the mean entropy.
    fn channels(&self) -> usize {
        2 * self.preprocessor.labels.num_segmentation_heads() + 1
    }

    /// The means of all passes over all windows, `[depth, height, width, channels]`.
    fn gather(
        &self,
        case: &PreprocessedCase,
        networks: &[&Network],
        window: SlidingWindow,
        observe: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<ControlFlow<(), Vec<f32>>> {
        let labels = &self.preprocessor.labels;
        let (channels, heads, patch) = (case.data.dim().0, labels.num_segmentation_heads(), self.patch);
        let subsets = mirror_subsets(self.settings.mirror);
        let passes = (subsets.len() * networks.len()) as f32;
        let mut input = vec![0.0; window.patch_voxels() * channels];
        let mut mirrored = vec![0.0; input.len()];
        let mut sums = vec![0.0; window.patch_voxels() * self.channels()];
        let shape = Shape { batch: 1, dims: patch, channels };
        let mut values = Vec::with_capacity(case.seg.len() * self.channels());
        let mut collect = |slice: &[f32]| {
            values.extend_from_slice(slice);
            Ok(())
        };
        let mut accumulator = Accumulator::new(window.clone(), self.channels());
        for &start in &window.starts {
            window.extract(case.data.view(), start, &mut input)?;
            sums.fill(0.0);
            for &axes in &subsets {
                mirrored.copy_from_slice(&input);
                flip(&mut mirrored, patch, channels, axes);
                let x = Tensor::upload(self.context, shape, &mirrored)?.cast(self.context, self.settings.dtype)?;
                let x = Var::data(x);
                for network in networks {
                    for output in &network.forward(&mut Tape::inference(self.context), &x, 1)? {
                        let mut logits = output.value().download(self.context)?;
                        flip(&mut logits, patch, heads, axes);
                        add_member(labels, &logits, passes, &mut sums);
                    }
                    if observe(Event::Pass).is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                }
            }
            if let Some(&value) = sums.iter().find(|value| !value.is_finite()) {
                let start = std::array::from_fn(|axis| start[axis] as isize - window.before[axis] as isize);
                let (case, dtype) = (case.name.clone(), self.settings.dtype);
                return Err(Error::Predict(PredictError::NonFiniteLogits { case, value, start, patch, dtype }));
            }
            accumulator.add(start, &sums, &mut collect)?;
        }
        accumulator.finish(collect)?;
        Ok(ControlFlow::Continue(values))
    }

    /// Resamples what was gathered to the raw image's spacing, decodes it, and pastes it where the image was cropped.
    ///
    /// Everything is resampled with the same positive weights, so that no disagreement becomes negative.
    fn on_raw_grid(&self, case: &PreprocessedCase, values: Vec<f32>) -> Result<Assessment> {
        let (properties, labels) = (&case.properties, &self.preprocessor.labels);
        let forward = self.preprocessor.transpose_forward;
        let raw_spacing = forward.map(|axis| properties.spacing[axis]);
        let from: [usize; 3] = case.seg.dim().into();
        let grid = Grid::between(from, properties.shape_after_cropping, self.preprocessor.spacing, raw_spacing)?;
        let (found, expected) = (values.len(), from.iter().product::<usize>() * self.channels());
        let [depth, height, width] = from;
        let values = Array4::from_shape_vec((depth, height, width, self.channels()), values)
            .map_err(|_| Error::BufferLength { what: "gathered values", found, expected })?;
        let values = values.permuted_axes([3, 0, 1, 2]).as_standard_layout().into_owned();
        let values = resample::logits(values, &grid).permuted_axes([1, 2, 3, 0]);

        let heads = labels.num_segmentation_heads();
        let shape = properties.shape_before_cropping;
        let full = Certainty::FULL;
        let mut whole = Assessment {
            labels: Array3::zeros(shape),
            margin: Array3::from_elem(shape, full.margin),
            entropy: Array3::from_elem(shape, full.entropy),
            disagreement: Array3::from_elem(shape, full.disagreement),
        };
        let [z, y, x] = properties.bbox.map(|[start, end]| start..end);
        let mut row = Vec::new();
        for (at_z, plane) in values.axis_iter(Axis(0)).enumerate() {
            for (at_y, line) in plane.axis_iter(Axis(0)).enumerate() {
                row.clear();
                line.axis_iter(Axis(0)).for_each(|voxel| row.extend(voxel.iter().take(heads)));
                let place = s![z.start + at_z, y.start + at_y, x.clone()];
                let decoded = labels.segmentation_from_logits(&row)?;
                whole.labels.slice_mut(place).iter_mut().zip(decoded).for_each(|(to, label)| *to = label);
                let mut margin = whole.margin.slice_mut(place);
                let mut entropy = whole.entropy.slice_mut(place);
                let mut disagreement = whole.disagreement.slice_mut(place);
                let targets = margin.iter_mut().zip(&mut entropy).zip(&mut disagreement);
                for (voxel, ((margin, entropy), disagreement)) in line.axis_iter(Axis(0)).zip(targets) {
                    let voxel = voxel.to_vec();
                    let (logits, rest) = voxel.split_at(heads);
                    let (mean, mean_entropy) = rest.split_at(heads);
                    let certainty = Certainty::of(labels, logits, mean, mean_entropy.iter().sum());
                    *margin = certainty.margin;
                    *entropy = certainty.entropy;
                    *disagreement = certainty.disagreement;
                }
            }
        }
        Ok(whole.in_raw_order(forward))
    }
}

impl Assessment {
    fn in_raw_order(self, forward: [usize; 3]) -> Self {
        let mut backward = [0; 3];
        for (transposed, &raw) in forward.iter().enumerate() {
            backward[raw] = transposed;
        }
        Assessment {
            labels: in_order(self.labels, backward),
            margin: in_order(self.margin, backward),
            entropy: in_order(self.entropy, backward),
            disagreement: in_order(self.disagreement, backward),
        }
    }
}

fn in_order<T: Clone>(volume: Array3<T>, axes: [usize; 3]) -> Array3<T> {
    let volume = volume.permuted_axes(axes);
    if volume.is_standard_layout() { volume } else { volume.as_standard_layout().into_owned() }
}

/// Adds what one member says of a window, one of so many passes.
fn add_member(labels: &LabelManager, logits: &[f32], passes: f32, sums: &mut [f32]) {
    let heads = labels.num_segmentation_heads();
    let channels = 2 * heads + 1;
    let parts = sums.par_chunks_mut(VOXELS * channels).zip(logits.par_chunks(VOXELS * heads));
    parts.for_each_init(
        || vec![0.0; heads],
        |member, (sums, logits)| {
            for (sum, logits) in sums.chunks_exact_mut(channels).zip(logits.chunks_exact(heads)) {
                voxel::probabilities(labels, logits, member);
                let entropy = voxel::entropy(labels, member.iter().copied());
                let values = logits.iter().copied().chain(member.iter().map(|&p| p as f32)).chain([entropy as f32]);
                sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value / passes);
            }
        },
    );
}
