//! A training from its first epoch to its last, with its checkpoints in a folder.

use super::{Checkpoint, Outcome, Report, Trainer, TrainingCases};
use crate::error::{Error, Result, TrainError};
use crate::sample::PatchSource;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// The state after the last finished epoch, or where training was stopped.
pub const LATEST: &str = "checkpoint_latest.safetensors";
/// The state after the epoch with the best moving average of the pseudo Dice.
pub const BEST: &str = "checkpoint_best.safetensors";
/// The trained network.
pub const FINAL: &str = "checkpoint_final.safetensors";

/// How a training ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All epochs are done; this is the final checkpoint.
    Finished(PathBuf),
    /// The observer asked to stop; this checkpoint goes on from there.
    Stopped(PathBuf),
}

/// An epoch that has ended.
#[derive(Clone, Copy)]
pub struct Epoch<'a> {
    /// The trainer; its history ends with this epoch.
    pub trainer: &'a Trainer,
    /// Whether it is the best so far.
    pub best: bool,
    /// Its steps that were not taken because their loss or gradient was not finite.
    pub not_finite: usize,
}

/// The checkpoint that a training in this folder goes on from.
pub fn saved(folder: &Path) -> Option<PathBuf> {
    // A training that was given more epochs has a final checkpoint of its earlier end beside the latest one.
    [LATEST, FINAL, BEST].map(|name| folder.join(name)).into_iter().find(|path| path.exists())
}

/// Trains all remaining epochs. `on_iteration` is told of every iteration and may stop, `on_epoch` of every epoch.
///
/// # Errors
/// Those of [`Trainer::epoch`] and [`Checkpoint::write`], and what `on_epoch` returns. The checkpoints in the folder are
/// then those of the last finished epoch; after [`TrainError::CaseUnreadable`] the latest is that of the last iteration.
pub fn train<S: PatchSource + Sync>(
    trainer: &mut Trainer,
    cases: &TrainingCases,
    folder: &Path,
    [training, validation]: [&[S]; 2],
    mut on_iteration: impl FnMut(Report) -> ControlFlow<()>,
    mut on_epoch: impl FnMut(Epoch) -> Result<()>,
) -> Result<Ended> {
    let checkpoint = |trainer: &Trainer| -> Result<Checkpoint> {
        let mut state = trainer.checkpoint()?;
        state.cases = Some(cases.clone());
        Ok(state)
    };
    let latest = folder.join(LATEST);
    while !trainer.is_finished() {
        let outcome = match trainer.epoch(training, validation, &mut on_iteration) {
            // Nothing is wrong with what was trained before.
            Err(
                error @ (Error::Train(TrainError::CaseUnreadable { .. })
                | Error::Train(TrainError::NoReadableCase { .. })),
            ) => {
                checkpoint(trainer)?.write(&latest)?;
                return Err(error);
            }
            outcome => outcome?,
        };
        let state = checkpoint(trainer)?;
        state.write(&latest)?;
        match outcome {
            Outcome::Interrupted => return Ok(Ended::Stopped(latest)),
            Outcome::Finished { best } => {
                if best {
                    state.write(&folder.join(BEST))?;
                }
                on_epoch(Epoch { trainer, best, not_finite: trainer.progress().not_finite })?;
            }
        }
    }
    let last = folder.join(FINAL);
    checkpoint(trainer)?.write(&last)?;
    // As nnU-Net does: what the final checkpoint holds is not kept twice.
    match std::fs::remove_file(&latest) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io(latest, "remove")(error)),
        _ => Ok(Ended::Finished(last)),
    }
}
