//! What training has recorded so far: one value per epoch in each of nnU-Net's eight lists.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::compat::Compat;

/// Weight of the past in the moving average of the pseudo Dice.
const EMA_DECAY: f64 = 0.9;

/// Results of one epoch.
#[derive(Debug, Clone, PartialEq)]
pub struct EpochRecord {
    /// Mean training loss.
    pub train_loss: f64,
    /// Mean validation loss.
    pub val_loss: f64,
    /// Pseudo Dice of each foreground label or region; NaN where undefined.
    pub dice_per_class: Vec<f64>,
    /// Learning rate.
    pub learning_rate: f64,
    /// Seconds since the Unix epoch at the start.
    pub started: f64,
    /// Seconds since the Unix epoch at the end.
    pub ended: f64,
    /// Where the time between went.
    pub times: EpochTimes,
}

/// The lists, under nnU-Net's names. NaN is stored as JSON's null.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct History {
    /// Mean pseudo Dice of the foreground.
    #[serde(serialize_with = "write_list", deserialize_with = "read_list")]
    pub mean_fg_dice: Vec<f64>,
    /// Its exponential moving average, which decides on the best checkpoint.
    #[serde(serialize_with = "write_list", deserialize_with = "read_list")]
    pub ema_fg_dice: Vec<f64>,
    /// Pseudo Dice of each class.
    #[serde(serialize_with = "write_lists", deserialize_with = "read_lists")]
    pub dice_per_class_or_region: Vec<Vec<f64>>,
    /// Mean training loss.
    #[serde(serialize_with = "write_list", deserialize_with = "read_list")]
    pub train_losses: Vec<f64>,
    /// Mean validation loss.
    #[serde(serialize_with = "write_list", deserialize_with = "read_list")]
    pub val_losses: Vec<f64>,
    /// Learning rate.
    #[serde(serialize_with = "write_list", deserialize_with = "read_list")]
    pub lrs: Vec<f64>,
    /// Start of the epoch, seconds since the Unix epoch.
    #[serde(serialize_with = "write_list", deserialize_with = "read_list")]
    pub epoch_start_timestamps: Vec<f64>,
    /// End of the epoch.
    #[serde(serialize_with = "write_list", deserialize_with = "read_list")]
    pub epoch_end_timestamps: Vec<f64>,
    /// Where the time of each epoch went, which nnU-Net does not record; none of epochs of earlier versions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub times: Vec<Option<EpochTimes>>,
}

impl History {
    /// Number of recorded epochs.
    pub fn epochs(&self) -> usize {
        self.train_losses.len()
    }

    /// Appends an epoch and returns whether its moving average is the best so far.
    pub fn push(&mut self, epoch: EpochRecord, compat: Compat) -> bool {
        let best_before = self.best_ema();
        let defined = epoch.dice_per_class.iter().filter(|dice| !dice.is_nan());
        let (sum, count) = defined.fold((0.0, 0.0), |(sum, count), dice| (sum + dice, count + 1.0));
        let mean: f64 = sum / count;
        let ema = match self.ema_fg_dice.last() {
            None => mean,
            Some(old) if compat == Compat::Nnunet => EMA_DECAY * old + (1.0 - EMA_DECAY) * mean,
            // An epoch whose patches show no foreground says nothing about the model.
            Some(old) if mean.is_nan() => *old,
            Some(old) if old.is_nan() => mean,
            Some(old) => EMA_DECAY * old + (1.0 - EMA_DECAY) * mean,
        };
        self.mean_fg_dice.push(mean);
        self.ema_fg_dice.push(ema);
        self.dice_per_class_or_region.push(epoch.dice_per_class);
        self.train_losses.push(epoch.train_loss);
        self.val_losses.push(epoch.val_loss);
        self.lrs.push(epoch.learning_rate);
        self.epoch_start_timestamps.push(epoch.started);
        self.epoch_end_timestamps.push(epoch.ended);
        // Earlier versions have not recorded any.
        self.times.resize(self.epoch_end_timestamps.len() - 1, None);
        self.times.push(Some(epoch.times));
        best_before.is_none_or(|best| ema > best)
    }

    /// The best moving average so far, if one is defined.
    pub fn best_ema(&self) -> Option<f64> {
        let defined = self.ema_fg_dice.iter().copied().filter(|ema| !ema.is_nan());
        defined.reduce(f64::max)
    }
}

fn nullable(values: &[f64]) -> Vec<Option<f64>> {
    values.iter().map(|v| v.is_finite().then_some(*v)).collect()
}

fn with_nan(values: Vec<Option<f64>>) -> Vec<f64> {
    values.into_iter().map(|v| v.unwrap_or(f64::NAN)).collect()
}

fn write_list<S: Serializer>(values: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
    nullable(values).serialize(serializer)
}

fn read_list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
    Vec::deserialize(deserializer).map(with_nan)
}

fn write_lists<S: Serializer>(values: &[Vec<f64>], serializer: S) -> Result<S::Ok, S::Error> {
    let lists: Vec<_> = values.iter().map(|list| nullable(list)).collect();
    lists.serialize(serializer)
}

fn read_lists<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Vec<f64>>, D::Error> {
    let lists = Vec::deserialize(deserializer)?;
    Ok(lists.into_iter().map(with_nan).collect())
}

/// Seconds of an epoch, validation included, without those between a stop and a continuation. `augment`, `step` and `idle` are
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
