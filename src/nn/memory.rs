//! The memory of a prediction, as a pass over a window on a dry context counts it, and what PyTorch keeps for training.

use super::network::Network;
use super::shape::{Encoder, UNetShape};
use crate::error::{Error, PredictError, Result};
use crate::kernels::{Caps, Context, Dtype};
use crate::tape::{Tape, Var};
use crate::tensor::{Shape, Tensor};

/// Bytes that predicting one case takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PredictionMemory {
    /// The most that the device holds at once: weights, and one pass over a window.
    pub device: u64,
    /// The largest single buffer of the device.
    pub largest_buffer: u64,
    /// The most that the host holds at once, see [`planned_host`](crate::infer::memory::planned_host).
    pub host: u64,
}

impl PredictionMemory {
    /// Refuses what the device, or the host with `host_memory` bytes, cannot hold. A CPU shares its memory with the host.
    ///
    /// # Errors
    /// [`PredictError::PredictionMemory`], which says what to reduce.
    pub fn check(&self, caps: &Caps, host_memory: Option<u64>) -> Result<()> {
        let too_large = |what, needed, limit, remedy, in_16_bits| {
            Err(Error::Predict(PredictError::PredictionMemory { what, needed, limit, remedy, in_16_bits }))
        };
        let window = "a configuration with a smaller patch, activations of 16 bits, or another device";
        if self.largest_buffer > caps.max_buffer {
            return too_large("the largest tensor of a window", self.largest_buffer, caps.max_buffer, window, true);
        }
        if let Some(memory) = caps.memory.filter(|&memory| self.device > memory) {
            return too_large("a window", self.device, memory, window, true);
        }
        let remedy =
            "fewer classes, a smaller patch, a configuration with a larger voxel spacing, or an image cut into parts";
        let (what, held, memory) = match (caps.cores, caps.memory) {
            (Some(_), Some(memory)) => {
                ("a window and the slices of logits around it", self.device.saturating_add(self.host), Some(memory))
            }
            _ => ("the slices of logits around a window", self.host, host_memory),
        };
        if let Some(memory) = memory.filter(|&memory| held > memory) {
            // What lies on the host is f32 in any case.
            return too_large(what, held, memory, remedy, held - self.host > self.host);
        }
        Ok(())
    }
}

/// The memory of predicting in windows of `patch` voxels with activations of type `dtype`, where the host holds `host` bytes
/// for the whole case: a pass over one window, run on a dry context.
///
/// # Errors
/// If the network cannot be run on such a window, or a tensor has more elements than the kernels count.
pub fn planned_prediction(
    context: &Context,
    shape: &UNetShape,
    patch: [usize; 3],
    dtype: Dtype,
    host: u64,
) -> Result<PredictionMemory> {
    let dry = context.dry();
    let network = Network::new(&dry, shape.clone(), 0)?;
    let window = Shape { batch: 1, dims: patch, channels: shape.channels_in };
    let x = Var::data(Tensor::empty(&dry, window, Dtype::F32)?.cast(&dry, dtype)?);
    for output in network.forward(&mut Tape::inference(&dry), &x, 1)? {
        // As a download does.
        output.value().cast(&dry, Dtype::F32)?;
    }
    Ok(PredictionMemory { device: dry.peak_bytes(), largest_buffer: dry.largest_bytes(), host })
}

/// Bytes that PyTorch keeps for the backward pass of the same network, counted by its rules: a convolution saves its
/// input; an instance norm saves its input, the convolution's output; the leaky ReLU works in place and saves its output,
/// which is the next convolution's input; the decoder's concatenation is a tensor of its own, behind which the upsampled
/// half is dropped. A residual block is two such pairs, and with a projection what its convolution and its norm read; the
/// addition saves nothing. `element` is the size of an activation in bytes: 4, or 2 under mixed precision. Logits are left out,
/// on both sides.
pub fn pytorch_kept_bytes(shape: &UNetShape, batch: usize, patch: [usize; 3], element: usize) -> u64 {
    let sizes = Sizes { batch, element };
    let mut dims = patch;
    let mut kept = 0;
    let mut inputs = shape.stages.first().map_or(0, |stage| stage.features);
    if shape.encoder == Encoder::Residual {
        kept += 2 * sizes.tensor(dims, inputs);
    }
    for (s, stage) in shape.stages.iter().enumerate() {
        dims = std::array::from_fn(|a| dims[a].div_ceil(stage.stride[a]));
        let tensor = sizes.tensor(dims, stage.features);
        kept += match shape.encoder {
            Encoder::Plain => 2 * tensor * stage.encoder_blocks as u64,
            Encoder::Residual => 4 * tensor * stage.encoder_blocks as u64,
        };
        if shape.encoder == Encoder::Residual && inputs != stage.features {
            let pooled = if stage.stride == [1; 3] { 0 } else { sizes.tensor(dims, inputs) };
            kept += pooled + tensor;
        }
        inputs = stage.features;
        if s < shape.levels() {
            kept += 2 * tensor * (1 + stage.decoder_blocks as u64);
        }
    }
    kept
}

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    element: usize,
}

impl Sizes {
    fn tensor(&self, dims: [usize; 3], channels: usize) -> u64 {
        // No plan, however absurd, may overflow a sum of a network's tensors.
        let product = |bytes: u64, factor: usize| bytes.saturating_mul(factor as u64);
        let bytes = dims.into_iter().chain([self.batch, channels, self.element]).fold(1, product);
        bytes.min(u64::MAX >> 20)
    }
}
