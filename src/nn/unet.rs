//! nnU-Net's PlainConvUNet: an encoder of stages of (convolution, instance norm, leaky ReLU) blocks, a decoder that
//! upsamples, concatenates with the encoder's skip and convolves, and a 1x1x1 segmentation head at every level.

use super::blocks::{Block, Head, Upsampling};
use super::init;
use crate::dataset::plans::ArchitectureArguments;
use crate::error::{Error, NetworkError, Result};
use crate::kernels::Context;
use crate::parameters::{ParameterBuilder, Parameters, Scope};
use crate::tape::{Tape, Var};

/// One encoder stage and the decoder stage of the same resolution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// Channels.
    pub features: usize,
    /// Taps of the stage's convolutions along depth, height, width.
    pub kernel: [usize; 3],
    /// Stride of the stage's first convolution.
    pub stride: [usize; 3],
    /// Blocks in the encoder.
    pub encoder_blocks: usize,
    /// Blocks in the decoder; 0 for the bottleneck, which has none.
    pub decoder_blocks: usize,
}

/// The shape of a [`PlainConvUNet`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UNetShape {
    /// Channels of the image.
    pub channels_in: usize,
    /// Channels of the output: classes or regions.
    pub heads: usize,
    /// From full resolution down to the bottleneck.
    pub stages: Vec<Stage>,
    /// Whether convolutions have a bias.
    pub bias: bool,
}

impl UNetShape {
    /// Reads nnU-Net's `architecture.arch_kwargs`.
    ///
    /// # Errors
    /// [`NetworkError::Architecture`](crate::error::NetworkError::Architecture) naming the field that is missing, inconsistent or not supported.
    pub fn from_plans(arguments: &ArchitectureArguments, channels_in: usize, heads: usize) -> Result<Self> {
        let wrong =
            |field: &'static str, problem: String| Error::Network(NetworkError::Architecture { field, problem });
        let n = arguments.n_stages;
        if n < 2 {
            return Err(wrong("n_stages", format!("must be at least 2, is {n}")));
        }
        let three = |field: &'static str, lists: &[Vec<usize>], stage: usize| -> Result<[usize; 3]> {
            lists
                .get(stage)
                .and_then(|list| <[usize; 3]>::try_from(list.as_slice()).ok())
                .ok_or_else(|| wrong(field, format!("needs three numbers for stage {stage}")))
        };
        let counts = arguments
            .n_conv_per_stage
            .as_ref()
            .ok_or_else(|| wrong("n_conv_per_stage", "is missing; only PlainConvUNet is supported".into()))?;
        let stages = (0..n)
            .map(|s| {
                let missing = |field| wrong(field, format!("has no entry for stage {s}"));
                let decoder_blocks = match s {
                    s if s + 1 == n => 0,
                    // nnU-Net lists decoder stages from the lowest resolution up.
                    s => arguments
                        .n_conv_per_stage_decoder
                        .of_stage(n - 2 - s)
                        .ok_or_else(|| missing("n_conv_per_stage_decoder"))?,
                };
                Ok(Stage {
                    features: *arguments.features_per_stage.get(s).ok_or_else(|| missing("features_per_stage"))?,
                    kernel: three("kernel_sizes", &arguments.kernel_sizes, s)?,
                    stride: three("strides", &arguments.strides, s)?,
                    encoder_blocks: counts.of_stage(s).ok_or_else(|| missing("n_conv_per_stage"))?,
                    decoder_blocks,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { channels_in, heads, stages, bias: arguments.conv_bias })
    }

    /// Number of outputs under deep supervision: one for every decoder level.
    pub fn levels(&self) -> usize {
        self.stages.len().saturating_sub(1)
    }

    /// What the extents of a patch must be multiples of.
    pub fn divisor(&self) -> [usize; 3] {
        std::array::from_fn(|a| self.stages.iter().map(|stage| stage.stride[a]).product())
    }
}

/// The decoder at one resolution.
#[derive(Debug)]
struct DecoderStage {
    upsampling: Upsampling,
    blocks: Vec<Block>,
    head: Head,
}

/// nnU-Net's plain convolutional U-Net with its parameters on a device.
#[derive(Debug)]
pub struct PlainConvUNet {
    shape: UNetShape,
    parameters: Parameters,
    encoder: Vec<Vec<Block>>,
    /// From the lowest resolution up.
    decoder: Vec<DecoderStage>,
}

impl PlainConvUNet {
    /// Allocates the network and initialises it from a seed.
    ///
    /// # Errors
    /// [`NetworkError::Architecture`](crate::error::NetworkError::Architecture) for less than two stages, or if the device is out of memory.
    pub fn new(context: &Context, shape: UNetShape, seed: u64) -> Result<Self> {
        if shape.stages.len() < 2 {
            let problem = format!("must be at least 2, is {}", shape.stages.len());
            return Err(Error::Network(NetworkError::Architecture { field: "n_stages", problem }));
        }
        let mut builder = ParameterBuilder::default();
        let encoder = encoder(&mut builder.root().within("encoder.stages"), &shape);
        let decoder = decoder(&mut builder.root().within("decoder"), &shape);
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
        let (dims, divisor) = (x.shape().dims, self.shape.divisor());
        if (0..3).any(|a| dims[a] % divisor[a] != 0) {
            let problem = format!("{dims:?} must be a multiple of {divisor:?}, the product of the strides");
            return Err(Error::Network(NetworkError::Architecture { field: "patch_size", problem }));
        }
        let parameters = &self.parameters;
        let mut skips = Vec::with_capacity(self.encoder.len());
        let mut x = x.clone();
        for stage in &self.encoder {
            for block in stage {
                x = block.forward(parameters, tape, &x, None)?;
            }
            skips.push(x.clone());
        }
        skips.pop();
        let mut outputs = Vec::with_capacity(levels);
        for (d, stage) in self.decoder.iter().enumerate() {
            x = stage.upsampling.forward(parameters, tape, &x)?;
            // The skip is taken by the first block, and its tensor dropped behind it.
            let mut skip = skips.pop();
            for block in &stage.blocks {
                x = block.forward(parameters, tape, &x, skip.take().as_ref())?;
            }
            if self.decoder.len() - d <= levels {
                outputs.push(stage.head.forward(parameters, tape, &x)?);
            }
        }
        outputs.reverse();
        Ok(outputs)
    }
}

fn encoder(stages: &mut Scope, shape: &UNetShape) -> Vec<Vec<Block>> {
    let mut inputs = shape.channels_in;
    let mut encoder = Vec::with_capacity(shape.stages.len());
    for (s, stage) in shape.stages.iter().enumerate() {
        let mut module = stages.within(format_args!("{s}.0"));
        encoder.push(Block::several(&mut module, stage, stage.encoder_blocks, inputs, stage.stride, shape.bias));
        inputs = stage.features;
    }
    encoder
}

/// Stages from the lowest resolution up. PyTorch lists the blocks of all stages first, then what upsamples, then the heads.
fn decoder(module: &mut Scope, shape: &UNetShape) -> Vec<DecoderStage> {
    // The stage below and the stage itself.
    let pairs: Vec<(&Stage, &Stage)> = shape.stages.windows(2).rev().map(|pair| (&pair[1], &pair[0])).collect();
    let mut blocks = Vec::with_capacity(pairs.len());
    for (d, (_, here)) in pairs.iter().enumerate() {
        let mut stage = module.within(format_args!("stages.{d}"));
        blocks.push(Block::several(&mut stage, here, here.decoder_blocks, 2 * here.features, [1; 3], shape.bias));
    }
    let mut upsamplings = Vec::with_capacity(pairs.len());
    for (d, (below, here)) in pairs.iter().enumerate() {
        let mut stage = module.within(format_args!("transpconvs.{d}"));
        upsamplings.push(Upsampling::new(&mut stage, below, here.features, shape.bias));
    }
    let mut stages = Vec::with_capacity(pairs.len());
    for (d, ((_, here), (blocks, upsampling))) in pairs.iter().zip(blocks.into_iter().zip(upsamplings)).enumerate() {
        let mut layer = module.within(format_args!("seg_layers.{d}"));
        // The deepest head has weight 0 in the loss and never learns, unless it is the only one.
        if d == 0 && pairs.len() > 1 {
            layer = layer.untrained();
        }
        stages.push(DecoderStage { upsampling, blocks, head: Head::new(&mut layer, here.features, shape.heads) });
    }
    stages
}
