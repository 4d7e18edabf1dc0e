//! nnU-Net's PlainConvUNet: an encoder of stages of (convolution, instance norm, leaky ReLU) blocks.

use super::blocks::Block;
use super::decoder::Decoder;
use super::init;
use super::shape::UNetShape;
use crate::error::Result;
use crate::kernels::Context;
use crate::parameters::{ParameterBuilder, Parameters, Scope};
use crate::tape::{Tape, Var};

/// nnU-Net's plain convolutional U-Net with its parameters on a device.
#[derive(Debug)]
pub struct PlainConvUNet {
    shape: UNetShape,
    parameters: Parameters,
    encoder: Vec<Vec<Block>>,
    decoder: Decoder,
}

impl PlainConvUNet {
    /// Allocates the network and initialises it from a seed.
    ///
    /// # Errors
    /// [`NetworkError::Architecture`](crate::error::NetworkError::Architecture) for less than two stages, or if the device is out of memory.
    pub fn new(context: &Context, shape: UNetShape, seed: u64) -> Result<Self> {
        shape.check()?;
        let mut builder = ParameterBuilder::default();
        let encoder = encoder(&mut builder.root().within("encoder.stages"), &shape);
        let decoder = Decoder::new(&mut builder.root().within("decoder"), &shape);
        let parameters = builder.build(context)?;
        init::he_normal(context, &parameters, seed)?;
        Ok(Self { shape, parameters, encoder, decoder })
    }

    /// The network's shape.
    pub fn shape(&self) -> &UNetShape {
        &self.shape
    }

    /// The parameters under nnU-Net's names.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Logits of the `levels` finest resolutions, full resolution first: `[batch, depth, height, width, heads]`.
    ///
    /// # Errors
    /// [`NetworkError::Architecture`](crate::error::NetworkError::Architecture) if an extent of `x` is no multiple of [`UNetShape::divisor`].
    pub fn forward(&self, tape: &mut Tape, x: &Var, levels: usize) -> Result<Vec<Var>> {
        self.shape.check_patch(x.shape().dims)?;
        let mut skips = Vec::with_capacity(self.encoder.len());
        let mut x = x.clone();
        for stage in &self.encoder {
            for block in stage {
                x = block.forward(&self.parameters, tape, &x, None)?;
            }
            skips.push(x.clone());
        }
        drop(x);
        self.decoder.forward(&self.parameters, tape, skips, levels)
    }
}

fn encoder(stages: &mut Scope, shape: &UNetShape) -> Vec<Vec<Block>> {
    let mut inputs = shape.channels_in;
    let mut encoder = Vec::with_capacity(shape.stages.len());
    for (s, stage) in shape.stages.iter().enumerate() {
        let mut module = stages.within(format_args!("{s}.0"));
        encoder.push(Block::several(&mut module, (s, stage), stage.encoder_blocks, inputs, stage.stride, shape.bias));
        inputs = stage.features;
    }
    encoder
}
