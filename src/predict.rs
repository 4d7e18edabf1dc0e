//! Prediction of whole cases: the network over sliding windows, logits averaged with Gaussian weights and over mirrored
//! copies, then decoded into labels on the raw image's grid.

use crate::augment::flip;
use crate::error::Result;
use crate::infer::{Accumulator, SlidingWindow, export, mirror_subsets};
use crate::kernels::{Context, Dtype};
use crate::nn::{PlainConvUNet, planned_prediction};
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

/// Logits `[depth, height, width, heads]` of a preprocessed case, on its own grid. `observe` is called with the passes
/// done and to do.
///
/// # Errors
/// [`Error::PredictionMemory`](crate::Error::PredictionMemory) before anything is launched if the case is too large, or if
/// the patch does not fit the network, or the device fails.
pub fn logits(
    context: &Context,
    network: &PlainConvUNet,
    case: &PreprocessedCase,
    patch: [usize; 3],
    settings: &Settings,
    mut observe: impl FnMut(usize, usize),
) -> Result<Vec<f32>> {
    let (channels, depth, height, width) = case.data.dim();
    let window = SlidingWindow::new([depth, height, width], patch, settings.step_size)?;
    planned_prediction(context, network.shape(), window.image, patch, settings.dtype).check(context.caps())?;
    let starts = window.starts.clone();
    let subsets = mirror_subsets(settings.mirror);
    let heads = network.shape().heads;
    let mut input = vec![0.0; window.patch_voxels() * channels];
    let mut mirrored = vec![0.0; input.len()];
    let mut sum = vec![0.0; window.patch_voxels() * heads];
    let shape = Shape { batch: 1, dims: patch, channels };
    let mut accumulator = Accumulator::new(window.clone(), heads);
    let (mut done, all) = (0, starts.len() * subsets.len());
    for start in starts {
        window.extract(case.data.view(), start, &mut input)?;
        sum.fill(0.0);
        for &axes in &subsets {
            mirrored.copy_from_slice(&input);
            flip(&mut mirrored, patch, channels, axes);
            let x = Var::data(Tensor::upload(context, shape, &mirrored)?.cast(context, settings.dtype)?);
            let outputs = network.forward(&mut Tape::inference(context), &x, 1)?;
            for output in &outputs {
                let mut logits = output.value().download(context)?;
                flip(&mut logits, patch, heads, axes);
                sum.iter_mut().zip(&logits).for_each(|(s, l)| *s += l / subsets.len() as f32);
            }
            done += 1;
            observe(done, all);
        }
        accumulator.add(start, &sum)?;
    }
    Ok(accumulator.finish())
}

/// Labels of a case on the grid of its raw image, `(z, y, x)`.
///
/// # Errors
/// As [`logits`], and if the logits cannot be resampled.
pub fn segmentation(
    context: &Context,
    network: &PlainConvUNet,
    case: &PreprocessedCase,
    preprocessor: &Preprocessor,
    patch: [usize; 3],
    settings: &Settings,
    observe: impl FnMut(usize, usize),
) -> Result<Array3<u8>> {
    let logits = logits(context, network, case, patch, settings, observe)?;
    let (_, depth, height, width) = case.data.dim();
    export::segmentation(logits, [depth, height, width], &case.properties, preprocessor)
}
