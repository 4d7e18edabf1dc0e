//! The memory of a training step, as a step on a dry context counts it.

use super::checkpoint::Model;
use super::settings::Settings;
use super::step::Step;
use crate::augment::Augmenter;
use crate::dataset::LabelManager;
use crate::error::{Error, NetworkError, Result, TrainError};
use crate::kernels::conv3d::Policy;
use crate::kernels::{Caps, Context, Dtype, LossScale, LossScaleState};
use crate::loss::NetworkLoss;
use crate::nn::{Network, UNetShape};
use crate::optim::Optimizer;
use crate::tape::{Fusion, Tape, Var};
use crate::tensor::{Shape, Tensor};

/// Bytes of one training step. All but `parameters` are gone when the step is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights, their gradients and momenta.
    pub parameters: u64,
    /// The image and the label map.
    pub batch: u64,
    /// What forward keeps for backward.
    pub activations: u64,
    /// What the fullest moment holds beyond these: gradients, values computed again, packed weights, partial sums.
    pub temporaries: u64,
    /// Of the temporaries, what kernels have for themselves: packed weights, partial sums, points of Winograd's algorithm. The
    /// rest are gradients of activations and activations computed again.
    pub scratch: u64,
    /// The largest single buffer.
    pub largest_buffer: u64,
    /// The most that is held at once.
    pub total: u64,
}

impl MemoryPlan {
    /// Refuses what the device cannot hold, before anything is launched.
    ///
    /// # Errors
    /// [`NetworkError::DeviceMemory`].
    pub fn check(&self, caps: &Caps) -> Result<()> {
        let too_large = |what, needed, limit| Err(Error::Network(NetworkError::DeviceMemory { what, needed, limit }));
        if self.largest_buffer > caps.max_buffer {
            return too_large("its largest tensor", self.largest_buffer, caps.max_buffer);
        }
        match caps.memory {
            Some(memory) if self.total > memory => too_large("a training step", self.total, memory),
            _ => Ok(()),
        }
    }
}

/// The memory of a training step on `batch` patches of `patch` voxels (depth, height, width) with activations of type
/// `dtype`, with the algorithms that `context` chooses. Nothing is launched or allocated.
///
/// # Errors
/// If the network cannot be run on such a patch, or a tensor has more elements than the kernels count.
pub fn planned_memory(
    context: &Context,
    labels: &LabelManager,
    shape: &UNetShape,
    batch: usize,
    patch: [usize; 3],
    dtype: Dtype,
    fusion: Fusion,
) -> Result<MemoryPlan> {
    let dry = context.dry();
    let network = Network::new(&dry, shape.clone(), 0)?;
    let parameters = dry.held_bytes();
    let loss = NetworkLoss::new(&dry, labels, shape, batch, patch, false)?;
    let scale = (dtype == Dtype::F16).then(|| LossScale::new(&dry, LossScaleState::default())).transpose()?;
    let step = Step::new(&dry, network, loss, Optimizer::default()).with_loss_scale(scale).with_fusion(fusion);

    let before = dry.held_bytes();
    let input = Shape { batch, dims: patch, channels: shape.channels_in };
    let image = Tensor::empty(&dry, input, Dtype::F32)?.cast(&dry, dtype)?;
    let beyond_a_byte = labels.expected_labels().iter().any(|&label| label > 255);
    let target = dry.empty(input.voxels(), if beyond_a_byte { Dtype::U16 } else { Dtype::U8 })?;
    let batch = dry.held_bytes() - before;
    let (activations, no_tensors) = kept_by_forward(&dry, &step, &image, fusion)?;

    step.gradients(&image, &target)?;
    step.update(0.0)?;
    let total = dry.peak_bytes();
    let temporaries = total - parameters - batch - activations;
    let scratch = (total - dry.tensor_bytes_at_peak()).saturating_sub(no_tensors).min(temporaries);
    let largest_buffer = dry.largest_bytes();
    Ok(MemoryPlan { parameters, batch, activations, temporaries, scratch, largest_buffer, total })
}

/// The largest training step below `batch` patches of `patch` voxels that fits, by a search that first takes patches out
/// of the batch, down to two, and then shortens the longest axis by `divisor`, what the network's strides divide it by.
pub(super) fn smaller(
    mut patch: [usize; 3],
    mut batch: usize,
    divisor: [usize; 3],
    fits: impl Fn([usize; 3], usize) -> bool,
) -> Option<([usize; 3], usize)> {
    loop {
        let longest = (0..3).filter(|&axis| patch[axis] >= 3 * divisor[axis]).max_by_key(|&axis| patch[axis]);
        match longest {
            _ if batch > 2 => batch -= 1,
            Some(axis) => patch[axis] -= divisor[axis],
            None if batch > 1 => batch -= 1,
            None => return None,
        }
        if fits(patch, batch) {
            return Some((patch, batch));
        }
    }
}

/// Bytes that a forward pass leaves behind for backward, without the logits; and what is then held, of the parameters and the
/// batch too, that is no tensor.
fn kept_by_forward(dry: &Context, step: &Step, image: &Tensor, fusion: Fusion) -> Result<(u64, u64)> {
    let before = dry.held_bytes();
    let mut tape = Tape::new(dry).with_fusion(fusion);
    let outputs = step.network().forward(&mut tape, &Var::data(image.clone()), step.loss().levels())?;
    let logits: usize = outputs.iter().map(|output| output.shape().len() * output.dtype().size()).sum();
    Ok((dry.held_bytes() - before - logits as u64, dry.held_bytes() - dry.tensor_bytes()))
}

/// How a step is computed so that it fits: with nothing computed again that a step within `budget` bytes need not, beyond what
/// always is. Without a budget nothing more is.
///
/// Refuses a patch or batch that the device cannot train on, before anything is launched, and says what would fit.
pub(super) fn fitting(
    context: &Context,
    model: &Model,
    architecture: &UNetShape,
    settings: &Settings,
    budget: Option<u64>,
) -> Result<(Fusion, MemoryPlan)> {
    let (patch, _) = model.configuration.three_dimensional()?;
    let batch = model.configuration.batch_size;
    let policy = Policy::of(context).clone();
    let exact = settings.exact || policy.is_exact();
    let context = &policy.with_exact(exact).on(context);
    let dtype = settings.precision.dtype();
    let planned = |patch, batch, fusion| -> Result<MemoryPlan> {
        let plan = planned_memory(context, &model.labels, architecture, batch, patch, dtype, fusion)?;
        // Augmentation is over before the step begins.
        let augmentation = augmenter(model, patch, settings).bytes(architecture.channels_in);
        let before = plan.parameters + plan.batch + augmentation;
        Ok(MemoryPlan { total: plan.total.max(before), ..plan })
    };
    let recomputing = |recompute_stages| Fusion { recompute_stages, ..Fusion::default() };
    let stages = 0..=if budget.is_some() { architecture.stages.len() } else { 0 };
    let within = |plan: &MemoryPlan| budget.is_none_or(|budget| plan.total <= budget);
    let mut least = u64::MAX;
    let mut refused = None;
    for fusion in stages.clone().map(recomputing) {
        let plan = planned(patch, batch, fusion)?;
        let checked = plan.check(context.caps());
        if checked.is_ok() && within(&plan) {
            return Ok((fusion, plan));
        }
        least = least.min(plan.total);
        // The more is computed again the less is held: what refuses the last of them refuses all.
        refused = checked.err();
    }
    match (refused, budget) {
        (Some(Error::Network(problem @ NetworkError::DeviceMemory { .. })), _) => {
            let last = recomputing(*stages.end());
            let check = |patch, batch| {
                planned(patch, batch, last).is_ok_and(|plan| plan.check(context.caps()).is_ok() && within(&plan))
            };
            let fits = smaller(patch, batch, architecture.divisor(), check);
            Err(TrainError::TrainingMemory { problem: Box::new(problem), fits }.into())
        }
        (Some(error), _) => Err(error),
        (None, budget) => Err(TrainError::MemoryBudget { budget: budget.unwrap_or_default(), least }.into()),
    }
}

/// What a training augments its patches with.
pub(super) fn augmenter(model: &Model, patch: [usize; 3], settings: &Settings) -> Augmenter {
    let masked = &model.configuration.use_mask_for_norm;
    let largest_label = model.labels.expected_labels().into_iter().max().unwrap_or(0);
    let dtype = settings.precision.dtype();
    Augmenter::new(settings.augmentation, patch, settings.mirror, masked, largest_label, dtype)
}
