//! nnU-Net's training: epochs of SGD iterations on random patches, a validation of random patches after each, and a
//! state that can be saved between any two iterations and continued to the same bits.

mod asked;
mod checkpoint;
mod data;
mod memory;
mod precision;
mod pretrained;
pub mod run;
mod step;

pub use asked::Asked;
pub use checkpoint::{Checkpoint, Model, TrainingCases};
pub use data::{Case, DataSource, TrainingData};
use memory::smaller;
pub use memory::{MemoryPlan, planned_memory};
pub use precision::Precision;
pub use pretrained::Pretrained;
pub use step::Step;

use crate::augment::{Augmenter, Recipe};
use crate::compat::Compat;
use crate::error::{Error, NetworkError, Result, TrainError};
use crate::eval::PseudoDice;
use crate::history::{EpochRecord, History};
use crate::kernels::conv3d::Policy;
use crate::kernels::{Buffer, Context, Dtype, LossScale, LossScaleState};
use crate::loss::NetworkLoss;
use crate::nn::{Network, UNetShape};
use crate::optim::{Optimizer, poly_learning_rate};
use crate::sample::{Batch, PatchSampler, PatchSource, RandomState, RawBatch};
use crate::tape::{Fusion, Tape, Var};
use crate::tensor::{Shape, Tensor};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use std::time::{SystemTime, UNIX_EPOCH};

/// Losses are read back after this many iterations: the device never waits for the host in between.
const ITERATIONS_PER_READ: usize = 10;
/// So many steps in a row without a finite loss and gradient end a training that has no loss scale to lower.
const MOST_NOT_FINITE_IN_A_ROW: usize = 20;
/// A gradient that overflows f16 without being scaled up is no matter of the scale any more.
const LOWEST_LOSS_SCALE: f32 = 1.0;

/// How long to train. The defaults are nnU-Net's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Epochs.
    pub epochs: usize,
    /// SGD iterations of an epoch.
    pub iterations: usize,
    /// Validation batches after an epoch.
    pub validation_iterations: usize,
    /// Learning rate of the first epoch.
    pub learning_rate: f64,
    /// Share of SGD's momentum that is kept from step to step.
    pub momentum: f32,
    /// Axes (depth, height, width) along which patches are mirrored at random, and predictions averaged over mirrored
    /// copies. Leave out an axis along which left and right mean different labels.
    pub mirror: [bool; 3],
    /// What else is done to training patches. What earlier versions did, mirroring, stands for a missing value.
    #[serde(default = "mirroring")]
    pub augmentation: Recipe,
    /// Type of activations and their gradients. nnU-Net: f16 on GPUs.
    #[serde(default)]
    pub precision: Precision,
    /// Whether convolutions add up the products of the definition only, see [`Policy::with_exact`]: slower, and rounded a
    /// little less.
    #[serde(default)]
    pub exact: bool,
    /// Seed of initial weights, patches and mirroring.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            epochs: 1000,
            iterations: 250,
            validation_iterations: 50,
            learning_rate: 0.01,
            momentum: Optimizer::default().momentum,
            mirror: [true; 3],
            augmentation: Recipe::default(),
            precision: Precision::F32,
            exact: false,
            seed: 0,
        }
    }
}

fn mirroring() -> Recipe {
    Recipe::MIRROR
}

/// Where training stands: everything that a later continuation needs beside weights and momenta.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The current epoch, from 0.
    pub epoch: usize,
    /// Iterations done in it.
    pub iteration: usize,
    /// Their losses, as far as they are finite.
    pub losses: Vec<f32>,
    /// How many of them had a loss or gradient that is not finite: such a gradient changes nothing.
    #[serde(default)]
    pub not_finite: usize,
    /// Such iterations since the last usable one, of this epoch or earlier.
    #[serde(default)]
    pub not_finite_in_a_row: usize,
    /// Start of the epoch, seconds since 1970.
    pub started: f64,
    /// Generator of training patches.
    pub random: RandomState,
    /// Loss scale and usable steps since it last changed, where the precision needs one and training has begun.
    #[serde(default)]
    pub loss_scale: Option<(f32, u32)>,
    /// The finished epochs.
    pub history: History,
}

/// What an observer is told after every iteration.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Report {
    /// Epoch, from 0.
    pub epoch: usize,
    /// Training or validation iterations done in this epoch.
    pub iteration: usize,
    /// Whether it was a validation iteration.
    pub validation: bool,
    /// Mean loss of the last iterations that were read back.
    pub loss: Option<f32>,
}

/// What an iteration leaves on the device, to be read later.
struct Unread {
    loss: Buffer,
    /// `[norm, 1 if not finite]` of the gradient.
    norm: Buffer,
}

/// How an epoch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is finished; `best` if the moving average of the pseudo Dice has never been higher.
    Finished {
        /// Whether this is the best epoch so far.
        best: bool,
    },
    /// The observer asked to stop. [`Trainer::checkpoint`] saves the exact place.
    Interrupted,
}

/// A network in training.
pub struct Trainer {
    context: Context,
    model: Model,
    settings: Settings,
    step: Step,
    sampler: PatchSampler,
    augmenter: Augmenter,
    random: ChaCha8Rng,
    progress: Progress,
    raw: RawBatch,
    batch: Batch,
}

impl Trainer {
    /// A fresh network.
    ///
    /// # Errors
    /// [`NetworkError::Architecture`](crate::error::NetworkError::Architecture) if plans and network do not fit,
    /// [`TrainError::TrainingMemory`](crate::error::TrainError::TrainingMemory) if the device is too
    /// small.
    pub fn new(context: &Context, model: Model, settings: Settings) -> Result<Self> {
        let architecture = model.architecture()?;
        check_memory(context, &model, &architecture, &settings)?;
        let network = Network::new(context, architecture, settings.seed)?;
        let random = ChaCha8Rng::seed_from_u64(settings.seed);
        let progress = Progress {
            epoch: 0,
            iteration: 0,
            losses: Vec::new(),
            not_finite: 0,
            not_finite_in_a_row: 0,
            started: now(),
            random: RandomState::of(&random),
            loss_scale: None,
            history: History::default(),
        };
        Self::assemble(context, model, settings, network, progress)
    }

    /// A network that begins with the weights of another one, but for the layers that make the segmentation.
    ///
    /// # Errors
    /// As [`Trainer::new`], and [`TrainError::Pretrained`](crate::error::TrainError::Pretrained) if the weights are of another architecture.
    pub fn pretrained(context: &Context, model: Model, settings: Settings, weights: &Pretrained) -> Result<Self> {
        let trainer = Self::new(context, model, settings)?;
        weights.load_into(&trainer.context, trainer.network().parameters())?;
        Ok(trainer)
    }

    /// Continues from a checkpoint.
    ///
    /// # Errors
    /// As [`Trainer::new`], and [`NetworkError::State`](crate::error::NetworkError::State) if the checkpoint does not fit its own plans.
    pub fn resume(context: &Context, checkpoint: Checkpoint) -> Result<Self> {
        let architecture = checkpoint.model.architecture()?;
        check_memory(context, &checkpoint.model, &architecture, &checkpoint.settings)?;
        let network = Network::new(context, architecture, checkpoint.settings.seed)?;
        checkpoint.load_into(context, network.parameters())?;
        let Checkpoint { model, settings, progress, .. } = checkpoint;
        Self::assemble(context, model, settings, network, progress)
    }

    fn assemble(
        context: &Context,
        model: Model,
        settings: Settings,
        network: Network,
        progress: Progress,
    ) -> Result<Self> {
        settings.precision.check(context.caps())?;
        let (patch, _) = model.configuration.three_dimensional()?;
        let saved = progress.loss_scale.map(|(scale, good_steps)| LossScaleState { scale, good_steps });
        let loss_scale = (settings.precision.needs_loss_scale())
            .then(|| LossScale::new(context, saved.unwrap_or_default()))
            .transpose()?;
        let policy = Policy::of(context).clone();
        let exact = settings.exact || policy.is_exact();
        let context = &policy.with_exact(exact).on(context);
        let batch_size = model.configuration.batch_size;
        let batch_dice = model.configuration.batch_dice;
        let loss = NetworkLoss::new(context, &model.labels, network.shape(), batch_size, patch, batch_dice)?;
        let optimizer = Optimizer { momentum: settings.momentum, ..Default::default() };
        Ok(Self {
            context: context.clone(),
            sampler: PatchSampler::new(batch_size, patch),
            augmenter: augmenter(&model, patch, &settings),
            random: progress.random.restore(),
            raw: RawBatch::default(),
            batch: Batch::default(),
            model,
            settings,
            step: Step::new(context, network, loss, optimizer).with_loss_scale(loss_scale),
            progress,
        })
    }

    /// Where it is trained: the device, with the settings that validation should have too.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// The network as it is now.
    pub fn network(&self) -> &Network {
        self.step.network()
    }

    /// What is being trained.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// How long.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Where training stands.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Whether all epochs are done.
    pub fn is_finished(&self) -> bool {
        self.progress.epoch >= self.settings.epochs
    }

    /// The whole state, to be continued with [`Trainer::resume`].
    ///
    /// # Errors
    /// If the device has failed.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        let state = self.step.loss_scale().map(|scale| scale.state(&self.context)).transpose()?;
        let loss_scale = state.map(|state| (state.scale, state.good_steps));
        let progress = Progress { random: RandomState::of(&self.random), loss_scale, ..self.progress.clone() };
        Checkpoint::of(&self.context, self.network().parameters(), self.model.clone(), self.settings, progress)
    }

    /// Trains the rest of the current epoch and validates. The observer is called after every iteration.
    ///
    /// # Errors
    /// [`TrainError::NoCases`](crate::error::TrainError::NoCases) without training cases, or what the device reports. [`TrainError::Diverged`](crate::error::TrainError::Diverged) once the loss scale
    /// cannot be lowered any more, or, without one, after twenty steps in a row without a finite loss and gradient.
    pub fn epoch<S: PatchSource>(
        &mut self,
        training: &[S],
        validation: &[S],
        mut observe: impl FnMut(Report) -> ControlFlow<()>,
    ) -> Result<Outcome> {
        let epoch = self.progress.epoch;
        if self.progress.iteration == 0 {
            self.progress.started = now();
            self.progress.not_finite = 0;
        }
        let learning_rate = poly_learning_rate(self.settings.learning_rate, epoch, self.settings.epochs);
        let mut unread: Vec<Unread> = Vec::with_capacity(ITERATIONS_PER_READ);
        while self.progress.iteration < self.settings.iterations {
            unread.push(self.iteration(training, learning_rate as f32)?);
            self.progress.iteration += 1;
            let last = self.progress.iteration == self.settings.iterations;
            let mut loss = None;
            if unread.len() == ITERATIONS_PER_READ || last {
                loss = self.read(&mut unread)?;
            }
            let report = Report { epoch, iteration: self.progress.iteration, validation: false, loss };
            if observe(report).is_break() {
                self.read(&mut unread)?;
                return Ok(Outcome::Interrupted);
            }
        }

        let cases = if validation.is_empty() { training } else { validation };
        let Some((val_loss, dice)) = self.validate(cases, &mut observe)? else { return Ok(Outcome::Interrupted) };
        let losses = std::mem::take(&mut self.progress.losses);
        let record = EpochRecord {
            train_loss: mean(&losses),
            val_loss,
            dice_per_class: dice,
            learning_rate,
            started: self.progress.started,
            ended: now(),
        };
        let best = self.progress.history.push(record, Compat::Corrected);
        self.progress.epoch += 1;
        self.progress.iteration = 0;
        Ok(Outcome::Finished { best })
    }

    /// One SGD step on one random batch; loss and norm of the gradient stay on the device.
    fn iteration<S: PatchSource>(&mut self, cases: &[S], learning_rate: f32) -> Result<Unread> {
        let sampler = PatchSampler { patch: self.augmenter.geometry().initial, ..self.sampler.clone() };
        sampler.fill_raw(cases, &mut self.random, &mut self.raw)?;
        let (x, target) = self.augmenter.batch(&self.context, &self.raw, &mut self.random)?;
        let loss = self.step.gradients(&x, &target)?;
        let norm = self.step.update(learning_rate)?;
        Ok(Unread { loss, norm })
    }

    /// Moves losses from the device to the record and returns the mean of those that are finite.
    fn read(&mut self, unread: &mut Vec<Unread>) -> Result<Option<f32>> {
        let before = self.progress.losses.len();
        let mut any_not_finite = false;
        for Unread { loss, norm } in unread.drain(..) {
            let loss = self.context.download_f32(&loss)?.first().copied().unwrap_or(f32::NAN);
            let taken = self.context.download_f32(&norm)?.get(1) == Some(&0.0);
            if loss.is_finite() {
                self.progress.losses.push(loss);
            }
            if loss.is_finite() && taken {
                self.progress.not_finite_in_a_row = 0;
            } else {
                self.progress.not_finite += 1;
                self.progress.not_finite_in_a_row += 1;
                any_not_finite = true;
            }
        }
        if any_not_finite {
            self.check_divergence()?;
        }
        let read = &self.progress.losses[before..];
        Ok((!read.is_empty()).then(|| mean(read) as f32))
    }

    /// Whether it makes sense to go on after steps that could not be taken.
    fn check_divergence(&self) -> Result<()> {
        let in_a_row = self.progress.not_finite_in_a_row;
        let scale = self.step.loss_scale().map(|scale| scale.state(&self.context)).transpose()?;
        let diverged = match scale {
            Some(state) => state.scale < LOWEST_LOSS_SCALE,
            None => in_a_row >= MOST_NOT_FINITE_IN_A_ROW,
        };
        match diverged {
            true => Err(Error::Train(TrainError::Diverged { epoch: self.progress.epoch, in_a_row })),
            false => Ok(()),
        }
    }

    /// Mean loss and pseudo Dice of random validation patches; `None` if interrupted. The patches of an epoch are the
    /// same however often training was interrupted before.
    fn validate<S: PatchSource>(
        &mut self,
        cases: &[S],
        observe: &mut impl FnMut(Report) -> ControlFlow<()>,
    ) -> Result<Option<(f64, Vec<f64>)>> {
        let epoch = self.progress.epoch;
        let mut random = ChaCha8Rng::seed_from_u64(self.settings.seed);
        random.set_stream(1 + epoch as u64);
        let mut dice = PseudoDice::new(&self.model.labels);
        let mut losses = Vec::with_capacity(self.settings.validation_iterations);
        for iteration in 0..self.settings.validation_iterations {
            self.sampler.fill(cases, &mut random, &mut self.batch)?;
            let (x, target) = upload(&self.context, &self.batch, self.settings.precision)?;
            let (network, loss) = (self.step.network(), self.step.loss());
            let outputs = network.forward(&mut Tape::inference(&self.context), &Var::data(x), loss.levels())?;
            let loss = loss.value(&self.context, &target, &outputs)?;
            if let Some(finest) = outputs.first() {
                dice.add_logits(&finest.value().download(&self.context)?, &self.batch.target)?;
            }
            losses.push(self.context.download_f32(&loss)?.first().copied().unwrap_or(f32::NAN));
            let report = Report { epoch, iteration: iteration + 1, validation: true, loss: losses.last().copied() };
            if observe(report).is_break() {
                return Ok(None);
            }
        }
        Ok(Some((mean(&losses), dice.per_class())))
    }
}

/// Refuses a patch or batch that the device cannot train on, before anything is launched, and says what would fit.
fn check_memory(context: &Context, model: &Model, architecture: &UNetShape, settings: &Settings) -> Result<()> {
    let (patch, _) = model.configuration.three_dimensional()?;
    let batch = model.configuration.batch_size;
    let policy = Policy::of(context).clone();
    let exact = settings.exact || policy.is_exact();
    let context = &policy.with_exact(exact).on(context);
    let dtype = settings.precision.dtype();
    let check = |patch, batch| -> Result<()> {
        let plan = planned_memory(context, &model.labels, architecture, batch, patch, dtype, Fusion::default())?;
        // Augmentation is over before the step begins.
        let augmentation = augmenter(model, patch, settings).bytes(batch, architecture.channels_in);
        let before = plan.parameters + plan.batch + augmentation;
        MemoryPlan { total: plan.total.max(before), ..plan }.check(context.caps())
    };
    match check(patch, batch) {
        Err(problem @ Error::Network(NetworkError::DeviceMemory { .. })) => {
            let fits = smaller(patch, batch, architecture.divisor(), |patch, batch| check(patch, batch).is_ok());
            Err(TrainError::TrainingMemory { problem: Box::new(problem), fits }.into())
        }
        checked => checked,
    }
}

fn augmenter(model: &Model, patch: [usize; 3], settings: &Settings) -> Augmenter {
    let masked = &model.configuration.use_mask_for_norm;
    let largest_label = model.labels.expected_labels().into_iter().max().unwrap_or(0);
    let dtype = settings.precision.dtype();
    Augmenter::new(settings.augmentation, patch, settings.mirror, masked, largest_label, dtype)
}

/// A batch on the device: the image, and the label map.
fn upload(context: &Context, batch: &Batch, precision: Precision) -> Result<(Tensor, Buffer)> {
    let shape = Shape { batch: batch.size, dims: batch.patch, channels: batch.channels };
    let image = Tensor::upload(context, shape, &batch.image)?.cast(context, precision.dtype())?;
    Ok((image, context.upload(&batch.target, Dtype::U8)?))
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}
