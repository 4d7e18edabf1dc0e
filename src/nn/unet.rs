//! nnU-Net's PlainConvUNet: an encoder of stages of (convolution, instance norm, leaky ReLU) blocks, a decoder that
//! upsamples, concatenates with the encoder's skip and convolves, and a 1x1x1 segmentation head at every level.

use super::init;
use crate::dataset::plans::ArchitectureArguments;
use crate::error::{Error, Result};
use crate::kernels::Context;
use crate::ops::{self, ConvShape};
use crate::parameters::{Parameter, ParameterKind, Parameters};
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
    /// [`Error::Architecture`] naming the field that is missing, inconsistent or not supported.
    pub fn from_plans(arguments: &ArchitectureArguments, channels_in: usize, heads: usize) -> Result<Self> {
        let wrong = |field: &'static str, problem: String| Error::Architecture { field, problem };
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
        self.stages.len() - 1
    }

    /// What the extents of a patch must be multiples of.
    pub fn divisor(&self) -> [usize; 3] {
        std::array::from_fn(|a| self.stages.iter().map(|stage| stage.stride[a]).product())
    }

    /// Elements of every parameter.
    pub(super) fn parameter_lengths(&self) -> impl Iterator<Item = usize> {
        self.declare().into_iter().map(|(_, kind, _)| kind.len())
    }

    /// Names and kinds of all parameters in the order of PyTorch's optimiser.
    fn declare(&self) -> Vec<(String, ParameterKind, bool)> {
        let mut all = Vec::new();
        let bottleneck = self.stages.len() - 1;
        let blocks = |prefix: &str, stage: &Stage, count: usize, mut inputs: usize, all: &mut Vec<_>| {
            for i in 0..count {
                let outputs = stage.features;
                let weight = ParameterKind::ConvWeight { kernel: stage.kernel, inputs, outputs };
                all.push((format!("{prefix}.convs.{i}.conv.weight"), weight, false));
                let vector = ParameterKind::Vector { len: outputs };
                if self.bias {
                    all.push((format!("{prefix}.convs.{i}.conv.bias"), vector, false));
                }
                all.push((format!("{prefix}.convs.{i}.norm.weight"), vector, false));
                all.push((format!("{prefix}.convs.{i}.norm.bias"), vector, false));
                inputs = outputs;
            }
        };
        let mut inputs = self.channels_in;
        for (s, stage) in self.stages.iter().enumerate() {
            blocks(&format!("encoder.stages.{s}.0"), stage, stage.encoder_blocks, inputs, &mut all);
            inputs = stage.features;
        }
        for d in 0..bottleneck {
            let stage = &self.stages[bottleneck - 1 - d];
            blocks(&format!("decoder.stages.{d}"), stage, stage.decoder_blocks, 2 * stage.features, &mut all);
        }
        for d in 0..bottleneck {
            let (below, here) = (&self.stages[bottleneck - d], &self.stages[bottleneck - 1 - d]);
            let (kernel, inputs, outputs) = (below.stride, below.features, here.features);
            let weight = ParameterKind::TransposedConvWeight { kernel, inputs, outputs };
            all.push((format!("decoder.transpconvs.{d}.weight"), weight, false));
            if self.bias {
                all.push((format!("decoder.transpconvs.{d}.bias"), ParameterKind::Vector { len: outputs }, false));
            }
        }
        for d in 0..bottleneck {
            // The deepest head has weight 0 in the loss and never learns, unless it is the only one.
            let untrained = d == 0 && bottleneck > 1;
            let (inputs, outputs) = (self.stages[bottleneck - 1 - d].features, self.heads);
            let weight = ParameterKind::ConvWeight { kernel: [1; 3], inputs, outputs };
            all.push((format!("decoder.seg_layers.{d}.weight"), weight, untrained));
            all.push((format!("decoder.seg_layers.{d}.bias"), ParameterKind::Vector { len: outputs }, untrained));
        }
        all
    }
}

/// Convolution, instance norm, leaky ReLU.
struct Block {
    weight: Parameter,
    bias: Option<Parameter>,
    norm_weight: Parameter,
    norm_bias: Parameter,
    features: usize,
    shape: ConvShape,
}

impl Block {
    fn forward(&self, tape: &mut Tape, x: &Var, second: Option<&Var>) -> Result<Var> {
        let (convolution, norm) = ((&self.weight, self.bias.as_ref()), (&self.norm_weight, &self.norm_bias));
        ops::conv3d_norm_leaky_relu(tape, x, second, convolution, norm, self.features, self.shape)
    }
}

struct DecoderStage {
    up_weight: Parameter,
    up_bias: Option<Parameter>,
    up_stride: [usize; 3],
    features: usize,
    blocks: Vec<Block>,
    head_weight: Parameter,
    head_bias: Parameter,
}

/// nnU-Net's plain convolutional U-Net with its parameters on a device.
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
    /// If the device is out of memory.
    pub fn new(context: &Context, shape: UNetShape, seed: u64) -> Result<Self> {
        let parameters = Parameters::new(context, shape.declare())?;
        init::he_normal(context, &parameters, seed)?;
        let get = |name: String| {
            let missing = || Error::State { name: name.clone(), problem: "is not declared".into() };
            parameters.get(&name).cloned().ok_or_else(missing)
        };
        let blocks = |prefix: String, stage: &Stage, count: usize, stride: [usize; 3]| -> Result<Vec<Block>> {
            (0..count)
                .map(|i| {
                    let name = |part: &str| format!("{prefix}.convs.{i}.{part}");
                    Ok(Block {
                        weight: get(name("conv.weight"))?,
                        bias: shape.bias.then(|| get(name("conv.bias"))).transpose()?,
                        norm_weight: get(name("norm.weight"))?,
                        norm_bias: get(name("norm.bias"))?,
                        features: stage.features,
                        shape: ConvShape { kernel: stage.kernel, stride: if i == 0 { stride } else { [1; 3] } },
                    })
                })
                .collect()
        };
        let encoder = (shape.stages.iter().enumerate())
            .map(|(s, stage)| blocks(format!("encoder.stages.{s}.0"), stage, stage.encoder_blocks, stage.stride))
            .collect::<Result<_>>()?;
        let bottleneck = shape.stages.len() - 1;
        let decoder = (0..bottleneck)
            .map(|d| {
                let stage = &shape.stages[bottleneck - 1 - d];
                Ok(DecoderStage {
                    up_weight: get(format!("decoder.transpconvs.{d}.weight"))?,
                    up_bias: shape.bias.then(|| get(format!("decoder.transpconvs.{d}.bias"))).transpose()?,
                    up_stride: shape.stages[bottleneck - d].stride,
                    features: stage.features,
                    blocks: blocks(format!("decoder.stages.{d}"), stage, stage.decoder_blocks, [1; 3])?,
                    head_weight: get(format!("decoder.seg_layers.{d}.weight"))?,
                    head_bias: get(format!("decoder.seg_layers.{d}.bias"))?,
                })
            })
            .collect::<Result<_>>()?;
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
    /// [`Error::Architecture`] if an extent of `x` is no multiple of [`UNetShape::divisor`].
    pub fn forward(&self, tape: &mut Tape, x: &Var, levels: usize) -> Result<Vec<Var>> {
        let (dims, divisor) = (x.shape().dims, self.shape.divisor());
        if (0..3).any(|a| dims[a] % divisor[a] != 0) {
            let problem = format!("{dims:?} must be a multiple of {divisor:?}, the product of the strides");
            return Err(Error::Architecture { field: "patch_size", problem });
        }
        let mut skips = Vec::with_capacity(self.encoder.len());
        let mut x = x.clone();
        for stage in &self.encoder {
            for block in stage {
                x = block.forward(tape, &x, None)?;
            }
            skips.push(x.clone());
        }
        skips.pop();
        let mut outputs = Vec::with_capacity(levels);
        for (d, stage) in self.decoder.iter().enumerate() {
            let up = ops::conv_transpose3d(
                tape,
                &x,
                &stage.up_weight,
                stage.up_bias.as_ref(),
                stage.features,
                stage.up_stride,
            )?;
            x = up;
            // The skip is taken by the first block, and its tensor dropped behind it.
            let mut skip = skips.pop();
            for block in &stage.blocks {
                x = block.forward(tape, &x, skip.take().as_ref())?;
            }
            if self.decoder.len() - d <= levels {
                let head = ConvShape { kernel: [1; 3], stride: [1; 3] };
                let heads = self.shape.heads;
                outputs.push(ops::conv3d(tape, &x, None, &stage.head_weight, Some(&stage.head_bias), heads, head)?);
            }
        }
        outputs.reverse();
        Ok(outputs)
    }
}
