//! Epochs, timed.

use super::workload::Workload;
use crate::error::Result;
use crate::eval::PseudoDice;
use crate::kernels::{Buffer, Context};
use crate::sample::PatchSource;
use crate::tape::{Tape, Var};
use crate::train::{EpochTimes, ITERATIONS_PER_READ, Outcome, Report, Trainer};
use std::ops::ControlFlow;
use std::time::Instant;

/// How much is timed. The default is what nnU-Net's nnUNetTrainerBenchmark_5epochs does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Length {
    /// Epochs, of which the fastest counts.
    pub epochs: usize,
    /// SGD iterations of an epoch.
    pub iterations: usize,
    /// Validation batches after them.
    pub validation_iterations: usize,
}

impl Default for Length {
    fn default() -> Self {
        Self { epochs: 5, iterations: 250, validation_iterations: 50 }
    }
}

/// Times epochs on one batch of random images and labels that is made once, as nnU-Net's
/// nnUNetTrainerBenchmark_5epochs_noDataLoading does: steps, and validations with their loss and pseudo Dice; nothing is
/// loaded, augmented or saved. `observe` is called after every iteration and may stop; only whole epochs are returned.
///
/// # Errors
/// [`NetworkError::DeviceMemory`](crate::error::NetworkError::DeviceMemory) for what the device cannot hold, or what it reports.
pub fn without_loading(
    context: &Context,
    workload: &Workload,
    length: Length,
    mut observe: impl FnMut(Report) -> ControlFlow<()>,
) -> Result<Vec<EpochTimes>> {
    let prepared = workload.on(context)?;
    let learning_rate = crate::train::Settings::default().learning_rate as f32;
    let mut epochs = Vec::with_capacity(length.epochs);
    for epoch in 0..length.epochs {
        let began = Instant::now();
        let mut unread = Vec::with_capacity(ITERATIONS_PER_READ);
        for iteration in 1..=length.iterations {
            let loss = prepared.step.gradients(&prepared.image, &prepared.target)?;
            unread.push([loss, prepared.step.update(learning_rate)?]);
            let mut loss = None;
            if unread.len() == ITERATIONS_PER_READ || iteration == length.iterations {
                loss = read(context, &mut unread)?;
            }
            if observe(Report { epoch, iteration, validation: false, loss }).is_break() {
                return Ok(epochs);
            }
        }
        let mut dice = PseudoDice::new(&workload.labels);
        for iteration in 1..=length.validation_iterations {
            let (network, loss) = (prepared.step.network(), prepared.step.loss());
            let image = Var::data(prepared.image.clone());
            let outputs = network.forward(&mut Tape::inference(context), &image, loss.levels())?;
            let value = loss.value(context, &prepared.target, &outputs)?;
            if let Some(finest) = outputs.first() {
                dice.add_logits(&finest.value().download(context)?, &prepared.map)?;
            }
            let loss = context.download_f32(&value)?.first().copied();
            if observe(Report { epoch, iteration, validation: true, loss }).is_break() {
                return Ok(epochs);
            }
        }
        let wall = began.elapsed().as_secs_f64();
        epochs.push(EpochTimes { wall, step: wall, ..EpochTimes::default() });
    }
    Ok(epochs)
}

/// Waits for steps, as training does after every few; returns the last loss.
fn read(context: &Context, unread: &mut Vec<[Buffer; 2]>) -> Result<Option<f32>> {
    let mut last = None;
    for [loss, norm] in unread.drain(..) {
        last = context.download_f32(&loss)?.first().copied();
        context.download_f32(&norm)?;
    }
    Ok(last)
}

/// Times the epochs of a fresh trainer on real cases, with loading, augmentation, and the trainer's own validations; nothing is
/// saved. `observe` is as for [`without_loading`].
///
/// # Errors
/// Those of [`Trainer::epoch`]; [`DatasetError::NoCases`](crate::error::DatasetError::NoCases) without cases.
pub fn with_loading<S: PatchSource + Sync>(
    trainer: &mut Trainer,
    [training, validation]: [&[S]; 2],
    mut observe: impl FnMut(Report) -> ControlFlow<()>,
) -> Result<Vec<EpochTimes>> {
    let mut epochs = Vec::new();
    while !trainer.is_finished() {
        match trainer.epoch(training, validation, &mut observe)? {
            Outcome::Interrupted => break,
            Outcome::Finished { .. } => epochs.push(trainer.times()),
        }
    }
    Ok(epochs)
}
