//! nnU-Net's loss of a network's outputs: Dice plus (binary) cross-entropy at every deep-supervision level.

use crate::dataset::LabelManager;
use crate::error::Result;
use crate::kernels::loss::{self, Gradient, Level, LossSettings, Problem, Target};
use crate::kernels::{Buffer, Context, Dtype, Scale};
use crate::nn::UNetShape;
use crate::tape::Var;
use crate::tensor::Tensor;

/// Weights of `levels` outputs, full resolution first: halved from level to level, the last 0, then scaled to sum 1.
/// A single output has weight 1 (where nnU-Net's own rule divides 0 by 0).
pub fn deep_supervision_weights(levels: usize) -> Vec<f32> {
    if levels == 1 {
        return vec![1.0];
    }
    let raw: Vec<f64> = (0..levels).map(|i| if i + 1 == levels { 0.0 } else { 0.5f64.powi(i as i32) }).collect();
    let sum: f64 = raw.iter().sum();
    raw.iter().map(|w| (w / sum) as f32).collect()
}

/// The loss of one network on patches of one size.
#[derive(Debug)]
pub struct NetworkLoss {
    problem: Problem,
    levels: usize,
}

impl NetworkLoss {
    /// The loss of `labels` for batches of `batch` patches of `patch` voxels.
    ///
    /// # Errors
    /// If the labels have more classes or regions than the loss kernels count.
    pub fn new(
        context: &Context,
        labels: &LabelManager,
        network: &UNetShape,
        batch: usize,
        patch: [usize; 3],
        batch_dice: bool,
    ) -> Result<Self> {
        let target = if labels.has_regions() {
            let members = |group: &crate::dataset::LabelGroup| group.members().iter().map(|&l| l as u16).collect();
            Target::Regions {
                labels: labels.all_labels().len(),
                regions: labels.foreground().iter().map(members).collect(),
            }
        } else {
            Target::Labels { classes: labels.all_labels().len() }
        };
        let ignore = labels.ignore_label().map(|label| label as u16);
        let settings = LossSettings::new(target, ignore, batch_dice);
        let weights = deep_supervision_weights(network.levels());
        // The last one or more levels of weight 0 are not computed at all.
        let levels = weights.iter().filter(|&&w| w > 0.0).count();
        let mut dims = patch;
        let mut described = Vec::with_capacity(levels);
        for (stage, &weight) in network.stages.iter().zip(&weights).take(levels) {
            dims = std::array::from_fn(|a| dims[a] / stage.stride[a]);
            described.push(Level { dims, weight });
        }
        Ok(Self { problem: Problem::new(context, &settings, batch, patch, &described)?, levels })
    }

    /// Number of outputs that the network has to compute.
    pub fn levels(&self) -> usize {
        self.levels
    }

    /// Loss and the gradients of the outputs, these times `scale`. `target` is the label map `[batch, depth, height, width]` in
    /// u8, or u16 where labels exceed 255. The loss stays on the device: `[total, (B)CE, Dice, Dice of each class.., (B)CE part of each channel..]`.
    ///
    /// # Errors
    /// If outputs or target have other shapes than the loss was made for.
    pub fn value_and_gradient(
        &self,
        context: &Context,
        target: &Buffer,
        outputs: Vec<Var>,
        scale: Scale,
    ) -> Result<(Buffer, Vec<(Var, Tensor)>)> {
        let value = context.empty(self.problem.loss_len(), Dtype::F32)?;
        let logits: Vec<&Buffer> = outputs.iter().map(|output| output.value().buffer()).collect();
        let gradients = (outputs.iter())
            .map(|output| Tensor::empty(context, output.shape(), output.dtype()))
            .collect::<Result<Vec<_>>>()?;
        let into: Vec<Gradient> = gradients.iter().map(|g| Gradient::Into(g.buffer())).collect();
        loss::value_and_gradient(context, &self.problem, &target.into(), &logits, &into, scale, &value)?;
        Ok((value, outputs.into_iter().zip(gradients).collect()))
    }

    /// The loss alone, laid out as in [`NetworkLoss::value_and_gradient`].
    ///
    /// # Errors
    /// If outputs or target have other shapes than the loss was made for.
    pub fn value(&self, context: &Context, target: &Buffer, outputs: &[Var]) -> Result<Buffer> {
        let value = context.empty(self.problem.loss_len(), Dtype::F32)?;
        let logits: Vec<&Buffer> = outputs.iter().map(|output| output.value().buffer()).collect();
        loss::value(context, &self.problem, &target.into(), &logits, &value)?;
        Ok(value)
    }
}
