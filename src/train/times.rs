//! Where the time of an epoch went.

use serde::{Deserialize, Serialize};

/// Seconds of an epoch, validation included, as far as this process has trained it. `augment`, `step` and `idle` are
/// those of the trainer's thread; what they lack to `wall` is the observer's. On devices that work on a queue a part's
/// time is that of filling it, and of waiting for what is in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EpochTimes {
    /// All.
    pub wall: f64,
    /// Reading and cutting patches, in all loader threads together: beside the others, not among them.
    pub load: f64,
    /// Uploading patches and augmenting them.
    pub augment: f64,
    /// Forward and backward passes, updates, and waiting for their losses.
    pub step: f64,
    /// Waiting for patches.
    pub idle: f64,
}

impl std::fmt::Display for EpochTimes {
    /// Shares of the wall time.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [load, augment, step, idle] =
            [self.load, self.augment, self.step, self.idle].map(|part| 100.0 * part / self.wall.max(f64::MIN_POSITIVE));
        write!(f, "load {load:.0} % (beside), augment {augment:.0} %, step {step:.0} %, idle {idle:.1} %")
    }
}
