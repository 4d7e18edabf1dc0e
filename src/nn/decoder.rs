//! The decoder of a U-Net: at every resolution it upsamples, concatenates with the encoder's skip and convolves, and a 1x1x1
//! segmentation head follows.

use super::blocks::{Block, Head, Upsampling};
use super::shape::{Stage, UNetShape};
use crate::error::Result;
use crate::parameters::{Parameters, Scope};
use crate::tape::{Tape, Var};

/// The decoder at one resolution.
#[derive(Debug)]
struct DecoderStage {
    upsampling: Upsampling,
    blocks: Vec<Block>,
    head: Head,
}

/// The decoder, from the lowest resolution up.
#[derive(Debug)]
pub(super) struct Decoder(Vec<DecoderStage>);

impl Decoder {
    /// PyTorch lists the blocks of all stages first, then what upsamples, then the heads.
    pub(super) fn new(module: &mut Scope, shape: &UNetShape) -> Self {
        // The stage below and the stage itself.
        let pairs: Vec<(&Stage, &Stage)> = shape.stages.windows(2).rev().map(|pair| (&pair[1], &pair[0])).collect();
        let mut blocks = Vec::with_capacity(pairs.len());
        for (d, (_, here)) in pairs.iter().enumerate() {
            let mut stage = module.within(format_args!("stages.{d}"));
            let (number, inputs) = (pairs.len() - 1 - d, 2 * here.features);
            blocks.push(Block::several(&mut stage, (number, here), here.decoder_blocks, inputs, [1; 3], shape.bias));
        }
        let mut upsamplings = Vec::with_capacity(pairs.len());
        for (d, (below, here)) in pairs.iter().enumerate() {
            let mut stage = module.within(format_args!("transpconvs.{d}"));
            upsamplings.push(Upsampling::new(&mut stage, below, here.features, shape.bias));
        }
        let mut stages = Vec::with_capacity(pairs.len());
        for (d, ((_, here), (blocks, upsampling))) in pairs.iter().zip(blocks.into_iter().zip(upsamplings)).enumerate()
        {
            let mut layer = module.within(format_args!("seg_layers.{d}"));
            // The deepest head has weight 0 in the loss and never learns, unless it is the only one.
            if d == 0 && pairs.len() > 1 {
                layer = layer.untrained();
            }
            stages.push(DecoderStage { upsampling, blocks, head: Head::new(&mut layer, here.features, shape.heads) });
        }
        Self(stages)
    }

    /// Logits of the `levels` finest resolutions, full resolution first, from the outputs of the encoder's stages, full
    /// resolution first too.
    pub(super) fn forward(
        &self,
        parameters: &Parameters,
        tape: &mut Tape,
        mut skips: Vec<Var>,
        levels: usize,
    ) -> Result<Vec<Var>> {
        let mut outputs = Vec::with_capacity(levels);
        // The lowest stage has no skip: it is what is decoded.
        let Some(mut x) = skips.pop() else { return Ok(outputs) };
        for (d, stage) in self.0.iter().enumerate() {
            x = stage.upsampling.forward(parameters, tape, &x)?;
            // The skip is taken by the first block, and its tensor dropped behind it.
            let mut skip = skips.pop();
            for block in &stage.blocks {
                x = block.forward(parameters, tape, &x, skip.take().as_ref())?;
            }
            if self.0.len() - d <= levels {
                outputs.push(stage.head.forward(parameters, tape, &x)?);
            }
        }
        outputs.reverse();
        Ok(outputs)
    }
}
