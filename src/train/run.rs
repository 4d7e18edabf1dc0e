//! A training from its first epoch to its last, with its checkpoints in a folder.

use super::checkpoint::{Checkpoint, TrainingCases, is_whole};
use super::progress::{Outcome, Report};
use super::trainer::Trainer;
use crate::error::{Error, NetworkError, Result, TrainError};
use crate::io::{remove_if_there, write_atomically};
use crate::sample::PatchSource;
use std::io::ErrorKind;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// The state after so many epochs, or where training was stopped.
pub const LATEST: &str = "checkpoint_latest.safetensors";
/// What the latest checkpoint was before.
pub const PREVIOUS: &str = "checkpoint_previous.safetensors";
/// The state after the epoch with the best moving average of the pseudo Dice.
pub const BEST: &str = "checkpoint_best.safetensors";
/// The trained network.
pub const FINAL: &str = "checkpoint_final.safetensors";

/// Which checkpoints are written. The default is nnU-Net's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Saving {
    /// The latest after every so many epochs and on a stop, the best whenever there is a better one, the final one.
    Every(usize),
    /// None at all.
    Never,
}

impl Default for Saving {
    fn default() -> Self {
        Saving::Every(50)
    }
}

/// How a training ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All epochs are done; this is the final checkpoint, unless none are written.
    Finished(Option<PathBuf>),
    /// The observer asked to stop; this checkpoint goes on from there, unless none are written.
    Stopped(Option<PathBuf>),
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

/// The checkpoint that a training goes on from.
pub struct Newest {
    /// Its file.
    pub path: PathBuf,
    /// What it holds.
    pub checkpoint: Checkpoint,
    /// Files that could not be read and are passed over, each with its reason.
    pub damaged: Vec<Error>,
}

/// The checkpoints in a folder, those that training has come farthest with first. A file whose header cannot be read may
/// have been the newest.
pub fn saved(folder: &Path) -> Vec<PathBuf> {
    let all = [FINAL, LATEST, BEST, PREVIOUS].map(|name| folder.join(name));
    let mut present: Vec<PathBuf> = all.into_iter().filter(|path| path.exists()).collect();
    let place = |path: &PathBuf| Checkpoint::place(path).unwrap_or((usize::MAX, usize::MAX));
    present.sort_by_key(|path| std::cmp::Reverse(place(path)));
    present
}

/// The checkpoint in the folder that training goes on from: the one that it has come farthest with, of those that are
/// whole.
///
/// # Errors
/// If there are checkpoints, and none of them is whole: with what is wrong with each. If one cannot be read for another
/// reason than damage, such as the operating system's.
pub fn newest(folder: &Path) -> Result<Option<Newest>> {
    let mut damaged = Vec::new();
    for path in saved(folder) {
        match Checkpoint::read(&path) {
            Ok(checkpoint) => return Ok(Some(Newest { path, checkpoint, damaged })),
            Err(error @ Error::Network(NetworkError::Checkpoint { .. })) => damaged.push(error),
            // Not damaged, but not readable now: an older one in its place would be the end of it.
            Err(error) => return Err(error),
        }
    }
    Error::all(damaged).map(|()| None)
}

/// Trains all remaining epochs. `on_iteration` is told of every iteration and may stop, `on_epoch` of every epoch.
///
/// # Errors
/// Those of [`Trainer::epoch`] and [`Checkpoint::write`], and what `on_epoch` returns. The checkpoints in the folder are
/// then those that were written before; the latest is that of the last iteration unless the device failed or training
/// diverged.
pub fn train<S: PatchSource + Sync>(
    trainer: &mut Trainer,
    cases: &TrainingCases,
    folder: &Path,
    saving: Saving,
    [training, validation]: [&[S]; 2],
    mut on_iteration: impl FnMut(Report) -> ControlFlow<()>,
    mut on_epoch: impl FnMut(Epoch) -> Result<()>,
) -> Result<Ended> {
    let files = Files { folder, saving, cases };
    while !trainer.is_finished() {
        let outcome = match trainer.epoch(training, validation, &mut on_iteration) {
            // What was trained before is lost with the device, or is what diverged.
            Err(error @ (Error::Kernel(_) | Error::Train(TrainError::Diverged { .. }))) => return Err(error),
            outcome => or_saved(outcome, &files, trainer)?,
        };
        match outcome {
            Outcome::Interrupted => return Ok(Ended::Stopped(files.latest(trainer)?)),
            Outcome::Finished { best } => {
                files.after_epoch(trainer, best)?;
                let told = on_epoch(Epoch { trainer, best, not_finite: trainer.progress().not_finite });
                or_saved(told, &files, trainer)?;
            }
        }
    }
    Ok(Ended::Finished(files.last(trainer)?))
}

/// Saves the state before an error is passed on that has nothing to do with it: up to as many epochs as there are between
/// two savings would be lost. On a full disk that fails too; the first error is the cause.
fn or_saved<T>(result: Result<T>, files: &Files, trainer: &Trainer) -> Result<T> {
    if result.is_err() {
        let _ = files.latest(trainer);
    }
    result
}

/// The checkpoints of one training.
struct Files<'a> {
    folder: &'a Path,
    saving: Saving,
    cases: &'a TrainingCases,
}

impl Files<'_> {
    fn state(&self, trainer: &Trainer) -> Result<Checkpoint> {
        let mut state = trainer.checkpoint()?;
        state.cases = Some(self.cases.clone());
        Ok(state)
    }

    fn after_epoch(&self, trainer: &Trainer, best: bool) -> Result<()> {
        let Saving::Every(epochs) = self.saving else { return Ok(()) };
        if trainer.progress().epoch.is_multiple_of(epochs.max(1)) && !trainer.is_finished() {
            self.latest(trainer)?;
        }
        if best {
            self.state(trainer)?.write(&self.folder.join(BEST))?;
        }
        Ok(())
    }

    fn latest(&self, trainer: &Trainer) -> Result<Option<PathBuf>> {
        if self.saving == Saving::Never {
            return Ok(None);
        }
        let latest = self.folder.join(LATEST);
        // Before the previous one is given up: the device may have failed.
        let state = self.state(trainer)?;
        keep_previous(&latest, &self.folder.join(PREVIOUS))?;
        state.write(&latest)?;
        Ok(Some(latest))
    }

    fn last(&self, trainer: &Trainer) -> Result<Option<PathBuf>> {
        if self.saving == Saving::Never {
            return Ok(None);
        }
        let last = self.folder.join(FINAL);
        self.state(trainer)?.write(&last)?;
        // As nnU-Net does: what the final checkpoint holds is not kept twice.
        for name in [PREVIOUS, LATEST] {
            remove_if_there(&self.folder.join(name))?;
        }
        Ok(Some(last))
    }
}

/// Gives the latest checkpoint a second name, under which it stays when a newer one takes the first. One that is damaged
/// does not push out a whole one.
fn keep_previous(latest: &Path, previous: &Path) -> Result<()> {
    let bytes = match std::fs::read(latest) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        read => read.map_err(Error::io(latest, "read"))?,
    };
    if !is_whole(bytes) {
        return Ok(());
    }
    remove_if_there(previous)?;
    // Not every file system has second names.
    if std::fs::hard_link(latest, previous).is_err() {
        let bytes = std::fs::read(latest).map_err(Error::io(latest, "read"))?;
        write_atomically(previous, &bytes)?;
    }
    Ok(())
}
