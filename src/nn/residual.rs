//! nnU-Net's ResidualEncoderUNet: a stem, an encoder of stages of residual blocks, and the decoder of the plain network.
//!
//! A block is `leaky_relu(norm(conv2(leaky_relu(norm(conv1(x))))) + skip(x))`, after ResNet-D (He et al. 2019: Bag of tricks for
//! image classification with convolutional neural networks). The skip is x itself, pooled where the block has a stride, and
//! projected by a 1x1x1 convolution without bias and a norm where it changes the number of channels.

use super::blocks::Block;
use super::decoder::Decoder;
use super::init;
use super::shape::{Stage, UNetShape};
use crate::error::Result;
use crate::kernels::Context;
use crate::ops::{self, ConvShape};
use crate::parameters::{ParameterBuilder, Parameters, Scope};
use crate::tape::{Tape, Var};

/// Two convolutions beside a skip.
#[derive(Debug)]
struct ResidualBlock {
    first: Block,
    second: Block,
    /// Of the skip; `None` for a stride of 1.
    pooling: Option<[usize; 3]>,
    /// Of the skip; `None` where the number of channels stays.
    projection: Option<Block>,
}

impl ResidualBlock {
    /// PyTorch lists the convolutions before the skip, in which the pooling takes place 0 where there is one.
    fn new(
        module: &mut Scope,
        (number, stage): (usize, &Stage),
        inputs: usize,
        stride: [usize; 3],
        bias: bool,
    ) -> Self {
        let (features, kernel, one) = (stage.features, stage.kernel, [1; 3]);
        let first = ConvShape { kernel, stride };
        let first = Block::new(&mut module.within("conv1"), first, inputs, features, bias).inside(number);
        let second = ConvShape { kernel, stride: one };
        let second = Block::new(&mut module.within("conv2"), second, features, features, bias);
        let pooling = (stride != one).then_some(stride);
        let projection = (inputs != features).then(|| {
            let mut place = module.within(format_args!("skip.{}", usize::from(pooling.is_some())));
            Block::new(&mut place, ConvShape { kernel: one, stride: one }, inputs, features, false)
        });
        Self { first, second, pooling, projection }
    }

    fn forward(&self, parameters: &Parameters, tape: &mut Tape, x: &Var) -> Result<Var> {
        // The skip is recorded first: on the way back its gradient, which has the small extent of the output, waits, instead
        // of one of the extent of `x`.
        let mut skip = x.clone();
        if let Some(stride) = self.pooling {
            skip = ops::average_pool(tape, &skip, stride)?;
        }
        if let Some(projection) = &self.projection {
            skip = projection.forward_linear(parameters, tape, &skip)?;
        }
        let inside = self.first.forward(parameters, tape, x, None)?;
        self.second.forward_onto(parameters, tape, &inside, &skip)
    }
}

/// nnU-Net's U-Net with a residual encoder, with its parameters on a device.
#[derive(Debug)]
pub struct ResidualEncoderUNet {
    shape: UNetShape,
    parameters: Parameters,
    stem: Block,
    encoder: Vec<Vec<ResidualBlock>>,
    decoder: Decoder,
}

impl ResidualEncoderUNet {
    /// Allocates the network and initialises it from a seed.
    ///
    /// # Errors
    /// [`NetworkError::Architecture`](crate::error::NetworkError::Architecture) for less than two stages, or if the device is
    /// out of memory.
    pub fn new(context: &Context, shape: UNetShape, seed: u64) -> Result<Self> {
        shape.check()?;
        let mut builder = ParameterBuilder::default();
        let (stem, encoder) = encoder(&mut builder.root().within("encoder"), &shape);
        let decoder = Decoder::new(&mut builder.root().within("decoder"), &shape);
        let parameters = builder.build(context)?;
        init::he_normal(context, &parameters, seed)?;
        Ok(Self { shape, parameters, stem, encoder, decoder })
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
    /// [`NetworkError::Architecture`](crate::error::NetworkError::Architecture) if an extent of `x` is no multiple of
    /// [`UNetShape::divisor`].
    pub fn forward(&self, tape: &mut Tape, x: &Var, levels: usize) -> Result<Vec<Var>> {
        self.shape.check_patch(x.shape().dims)?;
        let mut skips = Vec::with_capacity(self.encoder.len());
        let mut x = self.stem.forward(&self.parameters, tape, x, None)?;
        for stage in &self.encoder {
            for block in stage {
                x = block.forward(&self.parameters, tape, &x)?;
            }
            skips.push(x.clone());
        }
        drop(x);
        self.decoder.forward(&self.parameters, tape, skips, levels)
    }
}

/// The stem, which has the features and the kernel of the first stage, and the stages.
fn encoder(module: &mut Scope, shape: &UNetShape) -> (Block, Vec<Vec<ResidualBlock>>) {
    let stage = &shape.stages[0];
    let (mut inputs, stem) = (stage.features, ConvShape { kernel: stage.kernel, stride: [1; 3] });
    let stem = Block::new(&mut module.within("stem.convs.0"), stem, shape.channels_in, inputs, shape.bias);
    let mut stages = Vec::with_capacity(shape.stages.len());
    for (s, stage) in shape.stages.iter().enumerate() {
        let mut blocks = Vec::with_capacity(stage.encoder_blocks);
        for b in 0..stage.encoder_blocks {
            let (channels, stride) = if b == 0 { (inputs, stage.stride) } else { (stage.features, [1; 3]) };
            let mut place = module.within(format_args!("stages.{s}.blocks.{b}"));
            blocks.push(ResidualBlock::new(&mut place, (s, stage), channels, stride, shape.bias));
        }
        inputs = stage.features;
        stages.push(blocks);
    }
    (stem, stages)
}
