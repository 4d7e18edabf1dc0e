//! Epochs of SGD iterations on random patches, a validation of random patches after each, and a state that can be saved
//! between any two iterations and continued to the same bits.

use super::checkpoint::{Checkpoint, Model};
use super::loader::{Loader, LoaderWork, Loading, Purpose};
use super::memory::{MemoryPlan, augmenter, fitting};
use super::progress::{Outcome, Progress, Report};
use super::settings::Settings;
use super::step::Step;
use crate::augment::Augmenter;
use crate::error::{Error, Result, TrainError};
use crate::eval::PseudoDice;
use crate::history::{EpochRecord, EpochTimes, History};
use crate::kernels::conv3d::Policy;
use crate::kernels::{Buffer, Context, LossScale, LossScaleState};
use crate::loss::NetworkLoss;
use crate::nn::Network;
use crate::optim::{Optimizer, poly_learning_rate};
use crate::sample::{Batch, PatchSampler, PatchSource, Pool, Unreadable};
use crate::tape::{Fusion, Tape, Var};
use crate::tensor::{Shape, Tensor};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Losses are read back after this many iterations: the device never waits for the host in between.
pub(crate) const ITERATIONS_PER_READ: usize = 10;
/// So many steps in a row without a finite loss and gradient end a training that has no loss scale to lower.
const MOST_NOT_FINITE_IN_A_ROW: usize = 20;
/// A gradient that overflows f16 without being scaled up is no matter of the scale any more.
const LOWEST_LOSS_SCALE: f32 = 1.0;

/// What an iteration leaves on the device, to be read later.
struct Unread {
    loss: Buffer,
    /// `[norm, 1 if not finite]` of the gradient.
    norm: Buffer,
}

/// A network in training.
pub struct Trainer {
    context: Context,
    model: Model,
    settings: Settings,
    step: Step,
    recomputed: (usize, u64),
    sampler: PatchSampler,
    augmenter: Augmenter,
    loading: Loading,
    unreadable: Arc<Unreadable>,
    progress: Progress,
}

/// A batch on the device: images, and the label map.
type Ready = (Tensor, Buffer);

impl Trainer {
    /// A fresh network.
    ///
    /// # Errors
    /// [`NetworkError::Architecture`](crate::error::NetworkError::Architecture) if plans and network do not fit,
    /// [`TrainError::TrainingMemory`] if the device is too
    /// small.
    pub fn new(context: &Context, model: Model, settings: Settings) -> Result<Self> {
        Self::within(context, model, settings, None)
    }

    /// A fresh network whose steps take no more than `budget` bytes of the device's memory, if one is given: convolutions are then
    /// computed again for backward, of as few stages as that takes. The weights are the same, bit for bit.
    ///
    /// # Errors
    /// As [`Trainer::new`]; [`TrainError::MemoryBudget`] if all stages are not enough.
    pub fn within(context: &Context, model: Model, settings: Settings, budget: Option<u64>) -> Result<Self> {
        let architecture = model.architecture()?;
        let fitting = fitting(context, &model, &architecture, &settings, budget)?;
        let network = Network::new(context, architecture, settings.seed)?;
        let progress = Progress {
            epoch: 0,
            iteration: 0,
            losses: Vec::new(),
            not_finite: 0,
            not_finite_in_a_row: 0,
            started: now(),
            times: EpochTimes::default(),
            loss_scale: None,
            history: History::default(),
        };
        Self::assemble(context, model, settings, network, progress, fitting)
    }

    /// Continues from a checkpoint.
    ///
    /// # Errors
    /// As [`Trainer::new`], and [`NetworkError::State`](crate::error::NetworkError::State) if the checkpoint does not fit its own plans.
    pub fn resume(context: &Context, checkpoint: Checkpoint) -> Result<Self> {
        Self::resume_within(context, checkpoint, None)
    }

    /// As [`Trainer::resume`], with steps as [`Trainer::within`] a budget, whatever it was before.
    ///
    /// # Errors
    /// As [`Trainer::resume`] and [`Trainer::within`].
    pub fn resume_within(context: &Context, checkpoint: Checkpoint, budget: Option<u64>) -> Result<Self> {
        let architecture = checkpoint.model.architecture()?;
        let fitting = fitting(context, &checkpoint.model, &architecture, &checkpoint.settings, budget)?;
        let network = Network::new(context, architecture, checkpoint.settings.seed)?;
        checkpoint.load_into(context, network.parameters())?;
        let Checkpoint { model, settings, progress, .. } = checkpoint;
        Self::assemble(context, model, settings, network, progress, fitting)
    }

    fn assemble(
        context: &Context,
        model: Model,
        settings: Settings,
        network: Network,
        progress: Progress,
        (fusion, planned): (Fusion, MemoryPlan),
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
        let oversampling = settings.sampling.oversampling;
        let loss = NetworkLoss::new(context, &model.labels, network.shape(), batch_size, patch, batch_dice)?;
        let optimizer = Optimizer { momentum: settings.momentum, ..Default::default() };
        Ok(Self {
            context: context.clone(),
            sampler: PatchSampler { oversampling, compat: settings.compat, ..PatchSampler::new(batch_size, patch) },
            augmenter: augmenter(&model, patch, &settings),
            loading: Loading::default(),
            unreadable: Arc::default(),
            model,
            settings,
            step: Step::new(context, network, loss, optimizer).with_loss_scale(loss_scale).with_fusion(fusion),
            recomputed: (fusion.recompute_stages, planned.total),
            progress,
        })
    }

    /// The same with other threads to cut patches, or another way with unreadable cases.
    pub fn with_loading(self, loading: Loading) -> Self {
        Self { loading, ..self }
    }

    /// How many threads cut patches, and the bytes of host memory that their batches take at most.
    pub fn prefetch(&self) -> (usize, u64) {
        let channels = self.network().shape().channels_in;
        let bytes = Batch::bytes(self.sampler.batch_size, self.augmenter.geometry().initial, channels);
        (self.loading.threads_for(bytes), self.loading.memory(bytes))
    }

    /// Of how many stages convolutions are computed again, and the bytes that a step takes, see [`Trainer::within`].
    pub fn recomputed(&self) -> (usize, u64) {
        self.recomputed
    }

    /// Cases that could not be read since this trainer was made, with the reasons. It goes on without them.
    pub fn unreadable(&self) -> BTreeMap<String, String> {
        self.unreadable.all()
    }

    /// Where the time of the current or last epoch went.
    pub fn times(&self) -> EpochTimes {
        self.progress.times
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
        let progress = Progress { loss_scale, ..self.progress.clone() };
        Checkpoint::of(&self.context, self.network().parameters(), self.model.clone(), self.settings, progress)
    }

    /// Trains the rest of the current epoch and validates. The observer is called after every iteration.
    ///
    /// # Errors
    /// [`DatasetError::NoCases`](crate::error::DatasetError::NoCases) without training cases, those of [`PatchSampler::fill`], or what the device reports.
    /// [`TrainError::Diverged`] once the loss scale cannot be lowered any more, or, without one, after twenty steps in a
    /// row without a finite loss and gradient.
    pub fn epoch<S: PatchSource + Sync>(
        &mut self,
        training: &[S],
        validation: &[S],
        mut observe: impl FnMut(Report) -> ControlFlow<()>,
    ) -> Result<Outcome> {
        let began = Instant::now();
        if self.progress.iteration == 0 {
            self.progress.times = EpochTimes::default();
            self.progress.not_finite = 0;
        }
        self.progress.started = now() - self.progress.times.wall;
        let validated = self.train_and_validate(training, validation, &mut observe);
        self.progress.times.wall += began.elapsed().as_secs_f64();
        let Some((val_loss, dice)) = validated? else { return Ok(Outcome::Interrupted) };
        let losses = std::mem::take(&mut self.progress.losses);
        let record = EpochRecord {
            train_loss: mean(&losses),
            val_loss,
            dice_per_class: dice,
            learning_rate: self.learning_rate(),
            started: self.progress.started,
            ended: now(),
            times: self.progress.times,
        };
        let best = self.progress.history.push(record, self.settings.compat);
        self.progress.epoch += 1;
        self.progress.iteration = 0;
        Ok(Outcome::Finished { best })
    }

    /// Mean loss and pseudo Dice of the validation; `None` if interrupted.
    fn train_and_validate<S: PatchSource + Sync>(
        &mut self,
        training: &[S],
        validation: &[S],
        observe: &mut impl FnMut(Report) -> ControlFlow<()>,
    ) -> Result<Option<(f64, Vec<f64>)>> {
        if self.train(training, observe)?.is_break() {
            return Ok(None);
        }
        self.validate(if validation.is_empty() { training } else { validation }, observe)
    }

    fn learning_rate(&self) -> f64 {
        poly_learning_rate(self.settings.learning_rate, self.progress.epoch, self.settings.epochs)
    }

    /// The remaining iterations of the current epoch, unless the observer breaks off.
    fn train<S: PatchSource + Sync>(
        &mut self,
        cases: &[S],
        observe: &mut impl FnMut(Report) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        let sampler = PatchSampler { patch: self.augmenter.geometry().initial, ..self.sampler.clone() };
        let unreadable = self.unreadable.clone();
        let pool = match self.settings.sampling.by_annotation {
            true => Pool::by_annotation(cases, self.model.labels.ignore_label())?,
            false => Pool::new(cases),
        };
        let work = self.work(pool, &unreadable, sampler, Purpose::Training);
        let (first, end) = (self.progress.iteration, self.settings.iterations);
        std::thread::scope(|scope| {
            let mut loader = Loader::start(scope, &work, first..end, self.prefetch().0)?;
            let mut unread: Vec<Unread> = Vec::with_capacity(ITERATIONS_PER_READ);
            let mut ready = (first < end).then(|| self.ready(&mut loader));
            while let Some(batch) = ready.take() {
                let (x, target) = match batch {
                    Ok(batch) => batch,
                    Err(error) => {
                        // What was trained before counts, so that a checkpoint can be made of it.
                        self.read(&mut unread)?;
                        return Err(error);
                    }
                };
                unread.push(self.iteration(x, target)?);
                self.progress.iteration += 1;
                let iteration = self.progress.iteration;
                // The next batch is on its way to the device before losses are waited for.
                ready = (iteration < end).then(|| self.ready(&mut loader));
                let mut loss = None;
                if unread.len() == ITERATIONS_PER_READ || iteration == end {
                    loss = self.read(&mut unread)?;
                }
                if observe(Report { epoch: self.progress.epoch, iteration, validation: false, loss }).is_break() {
                    self.read(&mut unread)?;
                    return Ok(ControlFlow::Break(()));
                }
            }
            Ok(ControlFlow::Continue(()))
        })
    }

    /// What the loader's threads have to do in this epoch.
    fn work<'a, S: PatchSource>(
        &self,
        pool: Pool<'a, S>,
        unreadable: &'a Unreadable,
        sampler: PatchSampler,
        purpose: Purpose,
    ) -> LoaderWork<'a, S> {
        let (seed, epoch) = (self.settings.seed, self.progress.epoch);
        let augmenter = (purpose == Purpose::Training).then(|| self.augmenter.clone());
        let pool = if self.loading.skip_unreadable { pool.without_unreadable(unreadable) } else { pool };
        LoaderWork { pool, sampler, augmenter, seed, purpose, epoch }
    }

    /// The next batch of training, uploaded and augmented.
    fn ready(&mut self, loader: &mut Loader) -> Result<Ready> {
        let waited = Instant::now();
        let loaded = loader.next()?;
        self.progress.times.idle += waited.elapsed().as_secs_f64();
        self.progress.times.load += loaded.seconds;
        let began = Instant::now();
        let ready = self.augmenter.apply(&self.context, &loaded.batch, &loaded.draws)?;
        self.progress.times.augment += began.elapsed().as_secs_f64();
        loader.give_back(loaded.batch);
        Ok(ready)
    }

    /// One SGD step; loss and norm of the gradient stay on the device.
    fn iteration(&mut self, x: Tensor, target: Buffer) -> Result<Unread> {
        let began = Instant::now();
        let loss = self.step.gradients(&x, &target)?;
        let norm = self.step.update(self.learning_rate() as f32)?;
        self.progress.times.step += began.elapsed().as_secs_f64();
        Ok(Unread { loss, norm })
    }

    /// Moves losses from the device to the record and returns the mean of those that are finite.
    fn read(&mut self, unread: &mut Vec<Unread>) -> Result<Option<f32>> {
        let began = Instant::now();
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
        self.progress.times.step += began.elapsed().as_secs_f64();
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
    fn validate<S: PatchSource + Sync>(
        &mut self,
        cases: &[S],
        observe: &mut impl FnMut(Report) -> ControlFlow<()>,
    ) -> Result<Option<(f64, Vec<f64>)>> {
        let (epoch, iterations) = (self.progress.epoch, self.settings.validation_iterations);
        let mut dice = PseudoDice::new(&self.model.labels);
        let mut losses = Vec::with_capacity(iterations);
        let unreadable = self.unreadable.clone();
        let work = self.work(Pool::new(cases), &unreadable, self.sampler.clone(), Purpose::Validation);
        let interrupted = std::thread::scope(|scope| -> Result<bool> {
            let mut loader = Loader::start(scope, &work, 0..iterations, self.prefetch().0)?;
            for iteration in 0..iterations {
                let waited = Instant::now();
                let loaded = loader.next()?;
                self.progress.times.idle += waited.elapsed().as_secs_f64();
                self.progress.times.load += loaded.seconds;
                let began = Instant::now();
                losses.push(self.validation_loss(&loaded.batch, &mut dice)?);
                self.progress.times.step += began.elapsed().as_secs_f64();
                loader.give_back(loaded.batch);
                let loss = losses.last().copied();
                if observe(Report { epoch, iteration: iteration + 1, validation: true, loss }).is_break() {
                    return Ok(true);
                }
            }
            Ok(false)
        })?;
        Ok((!interrupted).then(|| (mean(&losses), dice.per_class())))
    }

    /// The loss of a batch without augmentation, whose voxels are counted for the pseudo Dice.
    fn validation_loss(&self, batch: &Batch, dice: &mut PseudoDice) -> Result<f32> {
        // Where there is no image is background.
        let target: Vec<i16> = batch.labels.iter().map(|&label| label.max(0)).collect();
        let shape = Shape { batch: batch.size, dims: batch.patch, channels: batch.channels };
        let image = Tensor::upload(&self.context, shape, &batch.image)?;
        let image = image.cast(&self.context, self.settings.precision.dtype())?;
        let labels = self.augmenter.upload_labels(&self.context, &target)?;
        let (network, loss) = (self.step.network(), self.step.loss());
        let outputs = network.forward(&mut Tape::inference(&self.context), &Var::data(image), loss.levels())?;
        let value = loss.value(&self.context, &labels, &outputs)?;
        if let Some(finest) = outputs.first() {
            dice.add_logits(&finest.value().download(&self.context)?, &target)?;
        }
        Ok(self.context.download_f32(&value)?.first().copied().unwrap_or(f32::NAN))
    }
}

fn mean(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}
