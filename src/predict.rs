//! Prediction of whole cases: the network over sliding windows, logits averaged with Gaussian weights and over mirrored
//! copies and over the networks of several folds, then decoded into labels on the raw image's grid.

use crate::augment::flip;
use crate::device::host_memory;
use crate::error::{Error, PredictError, Result};
use crate::infer::export::Exporter;
use crate::infer::memory::{planned_host, planned_probabilities};
use crate::infer::{Accumulator, Prediction, SlidingWindow, mirror_subsets};
use crate::kernels::{Context, Dtype};
use crate::nn::{Network, planned_prediction};
use crate::preprocess::{PreprocessedCase, Preprocessor};
use crate::tape::{Tape, Var};
use crate::tensor::{Shape, Tensor};
use ndarray::Array3;

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
    let window = window(context, networks, case, patch, settings, 0)?;
    let mut logits = Vec::with_capacity(case.seg.len() * first(networks)?.shape().heads);
    let collect = |slice: &[f32]| {
        logits.extend_from_slice(slice);
        Ok(())
    };
    slices(context, networks, case, window, settings, observe, collect)?;
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
    let window = window(context, networks, case, patch, settings, 0)?;
    let mut exporter = Exporter::new(case.seg.dim().into(), &case.properties, preprocessor)?;
    slices(context, networks, case, window, settings, observe, |slice| exporter.push(slice))?;
    exporter.finish()
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
    let window = window(context, networks, case, patch, settings, probabilities)?;
    let mut exporter = Exporter::new(case.seg.dim().into(), &case.properties, preprocessor)?.with_probabilities();
    slices(context, networks, case, window, settings, observe, |slice| exporter.push(slice))?;
    exporter.prediction()
}

/// Name of the array in nnU-Net's files of probabilities, `CASE.npz`.
pub const PROBABILITIES: &str = "probabilities";

/// The windows over a case, if predicting it, and `beside` bytes on the host, fit into memory.
fn window(
    context: &Context,
    networks: &[Network],
    case: &PreprocessedCase,
    patch: [usize; 3],
    settings: &Settings,
    beside: u64,
) -> Result<SlidingWindow> {
    let network = first(networks)?;
    let window = SlidingWindow::new(case.seg.dim().into(), patch, settings.step_size)?;
    let (raw, threads) = (case.properties.shape_before_cropping, rayon::current_num_threads());
    let host = planned_host(&window, case.data.dim().0, network.shape().heads, raw, threads).saturating_add(beside);
    let mut plan = planned_prediction(context, network.shape(), patch, settings.dtype, host)?;
    // The other folds lie on the device too: weights, and room for gradients and momenta that every network has.
    let others = (networks.len() as u64 - 1).saturating_mul(network.parameters().count() as u64 * 3 * 4);
    plan.device = plan.device.saturating_add(others);
    plan.check(context.caps(), host_memory())?;
    Ok(window)
}

/// The network that stands for all in shape.
fn first(networks: &[Network]) -> Result<&Network> {
    networks.first().ok_or(Error::Setting {
        setting: "networks",
        value: "none".into(),
        expected: "expected at least one fold",
    })
}

/// Predicts a case window by window. `consume` is given its slices of logits, `[height, width, heads]`, in order.
fn slices(
    context: &Context,
    networks: &[Network],
    case: &PreprocessedCase,
    window: SlidingWindow,
    settings: &Settings,
    mut observe: impl FnMut(usize, usize),
    mut consume: impl FnMut(&[f32]) -> Result<()>,
) -> Result<()> {
    let (channels, patch, heads) = (case.data.dim().0, window.patch, first(networks)?.shape().heads);
    let subsets = mirror_subsets(settings.mirror);
    let passes = (subsets.len() * networks.len()) as f32;
    let mut input = vec![0.0; window.patch_voxels() * channels];
    let mut mirrored = vec![0.0; input.len()];
    let mut sum = vec![0.0; window.patch_voxels() * heads];
    let shape = Shape { batch: 1, dims: patch, channels };
    let mut accumulator = Accumulator::new(window.clone(), heads);
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
        // Infinity or NaN would lose to every number, and become background.
        if let Some(&value) = sum.iter().find(|value| !value.is_finite()) {
            let start = std::array::from_fn(|axis| start[axis] as isize - window.before[axis] as isize);
            return Err(Error::Predict(PredictError::NonFiniteLogits {
                case: case.name.clone(),
                value,
                start,
                patch,
                dtype: settings.dtype,
            }));
        }
        accumulator.add(start, &sum, &mut consume)?;
    }
    accumulator.finish(consume)
}
