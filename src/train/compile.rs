//! The kernels of a training, compiled before there is a batch.

use super::checkpoint::Model;
use super::memory::{augmenter, fitting};
use super::settings::Settings;
use super::step::Step;
use crate::augment::Draw;
use crate::error::Result;
use crate::kernels::conv3d::Policy;
use crate::kernels::{Context, Dtype, LossScale, LossScaleState};
use crate::loss::NetworkLoss;
use crate::nn::Network;
use crate::optim::Optimizer;
use crate::sample::Batch;
use crate::tape::{Tape, Var};
use crate::tensor::{Shape, Tensor};

/// Launches on a context that compiles ([`Context::compiling`]) what a training of the model launches: a step; and, where
/// `has_time` still says so, all that augmentation may do, and a validation.
///
/// # Errors
/// As [`Trainer::new`](super::Trainer::new), before anything is launched: what will be refused is not compiled.
pub fn compile(compiling: &Context, model: &Model, settings: &Settings, has_time: &dyn Fn() -> bool) -> Result<()> {
    settings.precision.check(compiling.caps())?;
    fitting(compiling, model, &model.architecture()?, settings, None)?;
    let policy = Policy::of(compiling).clone();
    let exact = settings.exact || policy.is_exact();
    let context = &policy.with_exact(exact).on(compiling);
    let (dims, _) = model.configuration.three_dimensional()?;
    let (batch, batch_dice) = (model.configuration.batch_size, model.configuration.batch_dice);
    let architecture = model.architecture()?;
    let channels = architecture.channels_in;
    let loss = NetworkLoss::new(context, &model.labels, &architecture, batch, dims, batch_dice)?;
    let network = Network::new(context, architecture, settings.seed)?;
    let scale = (settings.precision.needs_loss_scale())
        .then(|| LossScale::new(context, LossScaleState::default()))
        .transpose()?;
    let optimizer = Optimizer { momentum: settings.momentum, ..Default::default() };
    let step = Step::new(context, network, loss, optimizer).with_loss_scale(scale);

    let shape = Shape { batch, dims, channels };
    let dtype = settings.precision.dtype();
    let image = Tensor::empty(context, shape, dtype)?;
    let augmenter = augmenter(model, dims, settings);
    let map = vec![0; shape.voxels()];
    let target = augmenter.upload_labels(context, &map)?;
    step.gradients(&image, &target)?;
    step.update(0.0)?;
    if has_time() {
        let patch = augmenter.geometry().initial;
        let draws = Draw::of_every_kind(settings.augmentation.transforms, augmenter.geometry(), channels);
        let voxels = draws.len() * patch.iter().product::<usize>();
        let (image, labels) = (vec![0.0; voxels * channels], vec![0; voxels]);
        augmenter.apply(context, &Batch { size: draws.len(), patch, channels, image, labels }, &draws)?;
    }
    if has_time() {
        let image = Tensor::empty(context, shape, Dtype::F32)?.cast(context, dtype)?;
        let (network, loss) = (step.network(), step.loss());
        let outputs = network.forward(&mut Tape::inference(context), &Var::data(image), loss.levels())?;
        loss.value(context, &target, &outputs)?;
        if let Some(finest) = outputs.first() {
            finest.value().cast(context, Dtype::F32)?;
        }
    }
    Ok(())
}
