//! The shape of a U-Net.

use crate::dataset::plans::ArchitectureArguments;
use crate::error::{Error, NetworkError, Result};

/// What an encoder's stages are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoder {
    /// Blocks of a convolution: PlainConvUNet.
    Plain,
    /// Residual blocks of two convolutions, behind a stem of one: ResidualEncoderUNet.
    Residual,
}

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

/// The shape of a U-Net.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UNetShape {
    /// Channels of the image.
    pub channels_in: usize,
    /// Channels of the output: classes or regions.
    pub heads: usize,
    /// What the stages of the encoder are made of.
    pub encoder: Encoder,
    /// From full resolution down to the bottleneck.
    pub stages: Vec<Stage>,
    /// Whether convolutions have a bias.
    pub bias: bool,
}

impl UNetShape {
    /// Reads nnU-Net's `architecture.arch_kwargs`.
    ///
    /// # Errors
    /// [`NetworkError::Architecture`] naming the field that is missing, inconsistent or not supported.
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
        let (encoder, field, counts) = match (&arguments.n_conv_per_stage, &arguments.n_blocks_per_stage) {
            (Some(counts), None) => (Encoder::Plain, "n_conv_per_stage", counts),
            (None, Some(counts)) => (Encoder::Residual, "n_blocks_per_stage", counts),
            (Some(_), Some(_)) => {
                return Err(wrong(
                    "n_blocks_per_stage",
                    "is of a residual encoder, n_conv_per_stage of a plain one".into(),
                ));
            }
            (None, None) => {
                return Err(wrong("n_conv_per_stage", "is missing, and so is n_blocks_per_stage".into()));
            }
        };
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
                    encoder_blocks: counts.of_stage(s).ok_or_else(|| missing(field))?,
                    decoder_blocks,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Self { channels_in, heads, encoder, stages, bias: arguments.conv_bias })
    }

    /// Number of outputs under deep supervision: one for every decoder level.
    pub fn levels(&self) -> usize {
        self.stages.len().saturating_sub(1)
    }

    /// What the extents of a patch must be multiples of.
    pub fn divisor(&self) -> [usize; 3] {
        std::array::from_fn(|a| self.stages.iter().map(|stage| stage.stride[a]).product())
    }

    /// A network has a level to decode from.
    pub(super) fn check(&self) -> Result<()> {
        if self.stages.len() < 2 {
            let problem = format!("must be at least 2, is {}", self.stages.len());
            return Err(Error::Network(NetworkError::Architecture { field: "n_stages", problem }));
        }
        Ok(())
    }

    /// Every stride divides the extents that it meets.
    pub(super) fn check_patch(&self, dims: [usize; 3]) -> Result<()> {
        let divisor = self.divisor();
        if (0..3).any(|a| !dims[a].is_multiple_of(divisor[a])) {
            let problem = format!("{dims:?} must be a multiple of {divisor:?}, the product of the strides");
            return Err(Error::Network(NetworkError::Architecture { field: "patch_size", problem }));
        }
        Ok(())
    }
}
