//! Prediction of whole cases: the network over sliding windows, logits averaged with Gaussian weights and over mirrored
//! copies and over the networks of several folds, then decoded into labels on the raw image's grid.
//!
//! All of that happens on the device, and what leaves it is labels (or resampled logits, where these or probabilities are
//! wanted), if the case and a window's depth of sums fit there. Else windows are cut and added up on the host.

use crate::augment::flip;
use crate::dataset::LabelManager;
use crate::device::host_memory;
use crate::error::{Error, PredictError, Result};
use crate::infer::export::Exporter;
use crate::infer::memory::{planned_case, planned_host, planned_probabilities};
use crate::infer::{Accumulator, DeviceSums, Prediction, Resolved, SlidingWindow, Wanted, mirror_subsets};
use crate::kernels::{Context, Dtype};
use crate::nn::{Network, PredictionMemory, UNetShape, planned_prediction};
use crate::preprocess::resample::{Grid, Taps};
use crate::preprocess::{PreprocessedCase, Preprocessor};
use crate::tape::{Tape, Var};
use crate::tensor::{Shape, Tensor};
use ndarray::{Array3, Array4};

/// Settings of a prediction. The defaults are nnU-Net's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Distance of neighbouring windows as a share of the patch, in (0, 1].
    pub step_size: f64,
    /// Axes along which mirrored copies are predicted too: up to 8 passes a window.
    pub mirror: [bool; 3],
    /// Type of activations. Logits are added up in f32 in any case. nnU-Net: f16 on GPUs.
    pub dtype: Dtype,
}

impl Default for Settings {
    fn default() -> Self {
        Self { step_size: 0.5, mirror: [true; 3], dtype: Dtype::F32 }
    }
}

/// Logits `[depth, height, width, heads]` of a preprocessed case, on its own grid: the mean of those of all networks, which
/// have one shape. `observe` is called with the passes done and to do.
///
/// # Errors
/// [`PredictError::PredictionMemory`] before anything is launched if the case is too large, [`PredictError::NonFiniteLogits`], or if
/// the patch does not fit the network, or the device fails.
pub fn logits(
    context: &Context,
    networks: &[Network],
    case: &PreprocessedCase,
    patch: [usize; 3],
    settings: &Settings,
    observe: impl FnMut(usize, usize),
) -> Result<Vec<f32>> {
    let job = Job { context, networks, case, patch, settings };
    let shape = case.seg.dim().into();
    let mut logits = Vec::with_capacity(case.seg.len() * first(networks)?.shape().heads);
    let grid = Grid::between(shape, shape, [1.0; 3], [1.0; 3])?;
    let taps = std::array::from_fn(|axis| grid.taps(axis));
    let plan = job.plan(&taps, Wanted::Logits, logits.capacity() as u64 * 4)?;
    match plan.at_once {
        Some(at_once) => {
            let collect = |resolved| {
                if let Resolved::Logits(part) = resolved {
                    logits.extend(part);
                }
                Ok(())
            };
            job.on_device(plan.window, &taps, Wanted::Logits, at_once, observe, collect)?;
        }
        None => job.on_host(plan.window, observe, |slice| {
            logits.extend_from_slice(slice);
            Ok(())
        })?,
    }
    Ok(logits)
}

/// Labels of a case on the grid of its raw image, `(z, y, x)`. Logits are decoded as soon as they are complete: no more
/// slices of them are held than a patch is deep, and one.
///
/// # Errors
/// As [`logits`], and if the logits cannot be resampled.
pub fn segmentation(
    context: &Context,
    networks: &[Network],
    case: &PreprocessedCase,
    preprocessor: &Preprocessor,
    patch: [usize; 3],
    settings: &Settings,
    observe: impl FnMut(usize, usize),
) -> Result<Array3<u16>> {
    let job = Job { context, networks, case, patch, settings };
    let exporter = Exporter::new(case.seg.dim().into(), &case.properties, preprocessor)?;
    job.export(exporter, Wanted::Labels(&preprocessor.labels), 0, observe)?.finish()
}

/// Labels and probabilities of a case on the grid of its raw image, `(z, y, x)` and `(head, z, y, x)`. Probabilities are
/// held whole, 4 bytes for each head of each voxel; [`write_npz_array`](crate::io::write_npz_array) keeps them as nnU-Net
/// does, under the name [`PROBABILITIES`].
///
/// # Errors
/// As [`segmentation`].
pub fn prediction(
    context: &Context,
    networks: &[Network],
    case: &PreprocessedCase,
    preprocessor: &Preprocessor,
    patch: [usize; 3],
    settings: &Settings,
    observe: impl FnMut(usize, usize),
) -> Result<Prediction> {
    let heads = first(networks)?.shape().heads;
    let probabilities = planned_probabilities(heads, case.properties.shape_before_cropping);
    let job = Job { context, networks, case, patch, settings };
    let exporter = Exporter::new(case.seg.dim().into(), &case.properties, preprocessor)?;
    job.export(exporter, Wanted::Logits, probabilities, observe)?.prediction()
}

/// Launches on a context that compiles ([`Context::compiling`]) what the prediction of a case launches: a pass of the network over
/// a window; and, where `has_time` still says so, what cuts windows and adds them up. Of logits where there are no `labels`.
///
/// # Errors
/// If the patch does not fit the network.
pub fn compile(
    compiling: &Context,
    shape: &UNetShape,
    labels: Option<&LabelManager>,
    patch: [usize; 3],
    settings: &Settings,
    has_time: &dyn Fn() -> bool,
) -> Result<()> {
    let (channels, heads) = (shape.channels_in, shape.heads);
    let network = Network::new(compiling, shape.clone(), 0)?;
    let windows = Tensor::empty(compiling, Shape { batch: 1, dims: patch, channels }, settings.dtype)?;
    let outputs = network.forward(&mut Tape::inference(compiling), &Var::data(windows.clone()), 1)?;
    if !has_time() {
        return Ok(());
    }
    let case = Array4::zeros((channels, patch[0], patch[1], patch[2]));
    let grid = Grid::between(patch, patch, [1.0; 3], [1.0; 3])?;
    let taps = std::array::from_fn(|axis| grid.taps(axis));
    let window = SlidingWindow::new(patch, patch, settings.step_size)?;
    let wanted = labels.map_or(Wanted::Logits, Wanted::Labels);
    let sums = DeviceSums::new(compiling, window, case.view(), heads, &taps, wanted)?;
    let (starts, mirror) = ([[0; 3]], [false; 3]);
    sums.count(&starts)?;
    sums.cut(&starts, mirror, windows.buffer())?;
    for output in outputs {
        sums.add(output.value().buffer(), &starts, mirror, 1.0)?;
    }
    // There is nothing to read back, which ends it.
    let _ = sums.finish(&mut |_| Ok(()));
    Ok(())
}

/// Name of the array in nnU-Net's files of probabilities, `CASE.npz`.
pub const PROBABILITIES: &str = "probabilities";

/// The network that stands for all in shape.
fn first(networks: &[Network]) -> Result<&Network> {
    networks.first().ok_or(Error::Setting {
        setting: "networks",
        value: "none".into(),
        expected: "expected at least one fold",
    })
}

/// Windows of one pass on a GPU, where small ones leave units idle; on a CPU one keeps all cores busy, and the caches warm.
const MOST_AT_ONCE: usize = 4;

/// A case to be predicted.
#[derive(Clone, Copy)]
struct Job<'a> {
    context: &'a Context,
    networks: &'a [Network],
    case: &'a PreprocessedCase,
    patch: [usize; 3],
    settings: &'a Settings,
}

/// Where and in which windows a case is predicted.
struct Plan {
    window: SlidingWindow,
    /// Windows of one pass if all happens on the device; `None` where they are cut and added up on the host.
    at_once: Option<usize>,
}

impl Job<'_> {
    fn heads(&self) -> usize {
        self.networks.first().map_or(0, |network| network.shape().heads)
    }

    /// Chooses a plan that fits into memory with `beside` bytes more on the host.
    fn plan(&self, taps: &[Vec<Taps>; 3], wanted: Wanted<'_>, beside: u64) -> Result<Plan> {
        let Job { context, networks, case, patch, settings } = *self;
        let shape = first(networks)?.shape();
        let window = SlidingWindow::new(case.seg.dim().into(), patch, settings.step_size)?;
        let (caps, raw) = (context.caps(), case.properties.shape_before_cropping);
        // The other folds lie on the device too: weights, and room for gradients and momenta that every network has.
        let others = (networks.len() as u64 - 1).saturating_mul(first(networks)?.parameters().count() as u64 * 3 * 4);
        let fewest = |at_once: &usize| *at_once == 1 || *at_once < 2 * window.starts.len();
        for at_once in if caps.cores.is_some() { vec![1] } else { vec![MOST_AT_ONCE, 2, 1] }.into_iter().filter(fewest)
        {
            let Ok(mut plan) = self.planned_on_device(&window, taps, wanted, at_once) else { continue };
            let host = planned_case(window.image, case.data.dim().0, raw);
            plan.host = plan.host.saturating_add(host).saturating_add(beside);
            plan.device = plan.device.saturating_add(others);
            // Others use the device too, and its memory is counted whole: several windows leave a quarter of it.
            let room = if at_once > 1 { plan.device / 3 } else { 0 };
            let padded = PredictionMemory { device: plan.device.saturating_add(room), ..plan };
            if padded.check(caps, host_memory()).is_ok() {
                return Ok(Plan { window, at_once: Some(at_once) });
            }
        }
        let threads = rayon::current_num_threads();
        let host = planned_host(&window, case.data.dim().0, shape.heads, raw, threads).saturating_add(beside);
        let mut plan = planned_prediction(context, shape, patch, settings.dtype, host)?;
        plan.device = plan.device.saturating_add(others);
        plan.check(caps, host_memory())?;
        Ok(Plan { window, at_once: None })
    }

    /// What a pass over so many windows and all that lies beside it take, on a dry context.
    fn planned_on_device(
        &self,
        window: &SlidingWindow,
        taps: &[Vec<Taps>; 3],
        wanted: Wanted<'_>,
        at_once: usize,
    ) -> Result<PredictionMemory> {
        let dry = self.context.dry();
        let network = Network::new(&dry, first(self.networks)?.shape().clone(), 0)?;
        let sums = DeviceSums::new(&dry, window.clone(), self.case.data.view(), self.heads(), taps, wanted)?;
        let starts = vec![[0; 3]; at_once];
        self.pass(&dry, &sums, std::slice::from_ref(&network), &starts, [false; 3], 1.0)?;
        let results = sums.result_bytes();
        let device = dry.peak_bytes().saturating_add(results);
        Ok(PredictionMemory { device, largest_buffer: dry.largest_bytes().max(results), host: results })
    }

    /// Adds up the logits of some windows, mirrored, of all networks.
    fn pass(
        &self,
        context: &Context,
        sums: &DeviceSums,
        networks: &[Network],
        starts: &[[usize; 3]],
        mirror: [bool; 3],
        share: f32,
    ) -> Result<()> {
        let shape = Shape { batch: starts.len(), dims: self.patch, channels: self.case.data.dim().0 };
        let windows = Tensor::empty(context, shape, self.settings.dtype)?;
        sums.cut(starts, mirror, windows.buffer())?;
        let x = Var::data(windows);
        for network in networks {
            for output in network.forward(&mut Tape::inference(context), &x, 1)? {
                sums.add(output.value().buffer(), starts, mirror, share)?;
            }
        }
        Ok(())
    }

    /// Predicts onto the raw image's grid.
    fn export<'e>(
        &self,
        mut exporter: Exporter<'e>,
        wanted: Wanted<'_>,
        probabilities: u64,
        observe: impl FnMut(usize, usize),
    ) -> Result<Exporter<'e>> {
        if let Wanted::Labels(labels) = wanted
            && labels.num_segmentation_heads() != self.heads()
        {
            let (found, expected) = (self.heads(), labels.num_segmentation_heads());
            return Err(Error::BufferLength { what: "heads of the network", found, expected });
        }
        let taps = exporter.taps();
        let plan = self.plan(&taps, wanted, probabilities)?;
        if matches!(wanted, Wanted::Logits) {
            exporter = exporter.with_probabilities();
        }
        match plan.at_once {
            Some(at_once) => {
                let consume = |resolved| match resolved {
                    Resolved::Labels(labels) => exporter.push_labels(&labels),
                    Resolved::Logits(mut logits) => exporter.push_resampled(&mut logits),
                };
                self.on_device(plan.window, &taps, wanted, at_once, observe, consume)?;
            }
            None => self.on_host(plan.window, observe, |slice| exporter.push(slice))?,
        }
        Ok(exporter)
    }

    /// Predicts a case on the device, `at_once` windows a pass. `consume` is given slices of what is wanted, in order.
    fn on_device(
        &self,
        window: SlidingWindow,
        taps: &[Vec<Taps>; 3],
        wanted: Wanted<'_>,
        at_once: usize,
        mut observe: impl FnMut(usize, usize),
        mut consume: impl FnMut(Resolved) -> Result<()>,
    ) -> Result<()> {
        let subsets = mirror_subsets(self.settings.mirror);
        let passes = subsets.len() * self.networks.len();
        let (mut done, all) = (0, window.starts.len() * passes);
        let case = self.case.data.view();
        let mut sums = DeviceSums::new(self.context, window.clone(), case, self.heads(), taps, wanted)?;
        // Those that begin in one slice need the same slices of sums.
        for beginning in window.starts.chunk_by(|a, b| a[0] == b[0]) {
            if !sums.advance(beginning[0][0], &mut consume)? {
                drop(sums);
                return Err(self.blame(&window));
            }
            for starts in beginning.chunks(at_once) {
                sums.count(starts)?;
                for &mirror in &subsets {
                    self.pass(self.context, &sums, self.networks, starts, mirror, 1.0 / passes as f32)?;
                    // The queue holds no more than this, and progress is what has been done.
                    sums.wait()?;
                    done += starts.len() * self.networks.len();
                    observe(done, all);
                }
            }
        }
        match sums.finish(&mut consume)? {
            true => Ok(()),
            false => Err(self.blame(&window)),
        }
    }

    /// The error that a mean which is infinite or no number comes to. Its window is found by predicting them once more.
    fn blame(&self, window: &SlidingWindow) -> Error {
        let searched = self.each_window(
            window,
            |_, _| (),
            |start, logits| match first_not_finite(logits) {
                Some(value) => Err(self.not_finite(window, start, value)),
                None => Ok(()),
            },
        );
        match searched {
            Err(error @ Error::Predict(_)) => error,
            // The device fails in another way now, or not at all: the case is known in any event.
            _ => self.not_finite(window, window.starts[0], f32::NAN),
        }
    }

    fn not_finite(&self, window: &SlidingWindow, start: [usize; 3], value: f32) -> Error {
        Error::Predict(PredictError::NonFiniteLogits {
            case: self.case.name.clone(),
            value,
            start: std::array::from_fn(|axis| start[axis] as isize - window.before[axis] as isize),
            patch: window.patch,
            dtype: self.settings.dtype,
        })
    }

    /// Predicts a case window by window and adds up on the host. `consume` is given its slices of logits,
    /// `[height, width, heads]`, in order.
    fn on_host(
        &self,
        window: SlidingWindow,
        observe: impl FnMut(usize, usize),
        mut consume: impl FnMut(&[f32]) -> Result<()>,
    ) -> Result<()> {
        let mut accumulator = Accumulator::new(window.clone(), self.heads());
        self.each_window(&window, observe, |start, logits| match first_not_finite(logits) {
            // Infinity or NaN would lose to every number, and become background.
            Some(value) => Err(self.not_finite(&window, start, value)),
            None => accumulator.add(start, logits, &mut consume),
        })?;
        accumulator.finish(consume)
    }

    /// Gives `consume` the logits of each window, averaged over mirrored copies and networks.
    fn each_window(
        &self,
        window: &SlidingWindow,
        mut observe: impl FnMut(usize, usize),
        mut consume: impl FnMut([usize; 3], &[f32]) -> Result<()>,
    ) -> Result<()> {
        let Job { context, networks, case, patch, settings } = *self;
        let (channels, heads) = (case.data.dim().0, self.heads());
        let subsets = mirror_subsets(settings.mirror);
        let passes = (subsets.len() * networks.len()) as f32;
        let mut input = vec![0.0; window.patch_voxels() * channels];
        let mut mirrored = vec![0.0; input.len()];
        let mut sum = vec![0.0; window.patch_voxels() * heads];
        let shape = Shape { batch: 1, dims: patch, channels };
        let (mut done, all) = (0, window.starts.len() * subsets.len() * networks.len());
        for &start in &window.starts {
            window.extract(case.data.view(), start, &mut input)?;
            sum.fill(0.0);
            for &axes in &subsets {
                mirrored.copy_from_slice(&input);
                flip(&mut mirrored, patch, channels, axes);
                let x = Var::data(Tensor::upload(context, shape, &mirrored)?.cast(context, settings.dtype)?);
                for network in networks {
                    let outputs = network.forward(&mut Tape::inference(context), &x, 1)?;
                    for output in &outputs {
                        let mut logits = output.value().download(context)?;
                        flip(&mut logits, patch, heads, axes);
                        sum.iter_mut().zip(&logits).for_each(|(s, l)| *s += l / passes);
                    }
                    done += 1;
                    observe(done, all);
                }
            }
            consume(start, &sum)?;
        }
        Ok(())
    }
}

fn first_not_finite(values: &[f32]) -> Option<f32> {
    values.iter().copied().find(|value| !value.is_finite())
}
