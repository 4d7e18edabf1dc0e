//! Where training stands, and what is told on the way.

use crate::history::{EpochTimes, History};
use serde::{Deserialize, Serialize};

/// Where training stands: everything that a later continuation needs beside weights and momenta. Patches and their
/// augmentation follow from the seed, the epoch and the iteration.
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
    /// Start of the epoch, seconds since 1970; where training was stopped in between, as if it had been continued at once.
    pub started: f64,
    /// Where its time went so far, without that between a stop and a continuation.
    #[serde(default)]
    pub times: EpochTimes,
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

/// How an epoch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is finished; `best` if the moving average of the pseudo Dice has never been higher.
    Finished {
        /// Whether this is the best epoch so far.
        best: bool,
    },
    /// The observer asked to stop. [`Trainer::checkpoint`](super::Trainer::checkpoint) saves the exact place.
    Interrupted,
}
