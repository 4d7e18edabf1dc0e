//! What training writes beside its checkpoints: nnU-Net's text log and `debug.json`, a line of JSON for every epoch,
//! TensorBoard's events.

use serde_json::json;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
use voxgrad::history::History;
use voxgrad::report::EventFile;
use voxgrad::train::Trainer;
use voxgrad::train::run::Epoch;
use voxgrad::{Error, Result, io};

/// What a person wants to know who asks later how a network was trained.
pub const ABOUT: &str = "debug.json";

/// A file that lines are added to.
struct Lines {
    path: PathBuf,
    file: File,
}

impl Lines {
    fn open(path: PathBuf) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(&path).map_err(Error::io(&path, "open"))?;
        Ok(Self { path, file })
    }

    fn add(&mut self, text: &str) -> Result<()> {
        self.file.write_all(text.as_bytes()).map_err(Error::io(&self.path, "write"))
    }
}

/// The files of a training.
pub struct Records {
    log: Lines,
    epochs: Lines,
    events: EventFile,
    /// Names of the classes or regions that have a pseudo Dice.
    classes: Vec<String>,
}

impl Records {
    /// Opens them; `about` becomes debug.json. What was recorded of epochs after the checkpoint that a training goes on
    /// from, which are trained once more, is not kept.
    pub fn begin(output: &Path, trainer: &Trainer, about: serde_json::Value) -> Result<Self> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64());
        let [year, month, day, hour, minute, second] = utc(now as u64);
        let name = format!("training_log_{year}_{month}_{day}_{hour:02}_{minute:02}_{second:02}.txt");
        io::write_json(&output.join(ABOUT), &about)?;
        let history = &trainer.progress().history;
        let epochs = output.join("epochs.jsonl");
        let known: String = (0..history.epochs()).map(|epoch| json_line(history, epoch)).collect();
        io::write_atomically(&epochs, known.as_bytes())?;
        let mut records = Self {
            log: Lines::open(output.join(name))?,
            epochs: Lines::open(epochs)?,
            events: EventFile::create(&output.join("tensorboard"), now, history.epochs())?,
            classes: trainer.model().labels.foreground_names().into_iter().map(String::from).collect(),
        };
        records.say(&[
            format!("voxgrad {}; times are UTC", env!("CARGO_PKG_VERSION")),
            format!("settings: {}", json!(trainer.settings())),
            format!("this is where training begins: epoch {}", trainer.progress().epoch),
        ])?;
        Ok(records)
    }

    /// Adds lines to the text log.
    pub fn say(&mut self, lines: &[String]) -> Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let [year, month, day, hour, minute, second] = utc(now.as_secs());
        let micros = now.subsec_micros();
        let stamp = format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{micros:06}");
        let text: String = lines.iter().map(|line| format!("{stamp}: {line}\n")).collect();
        self.log.add(&text)
    }

    /// Adds the epoch that has ended.
    pub fn epoch(&mut self, epoch: &Epoch) -> Result<()> {
        let history = &epoch.trainer.progress().history;
        let Some(number) = history.epochs().checked_sub(1) else { return Ok(()) };
        self.epochs.add(&json_line(history, number))?;
        let (dice, seconds) = (&history.dice_per_class_or_region[number], seconds(history, number));
        // nnU-Net's words, for programs that read its logs.
        let listed: Vec<String> = dice.iter().map(|dice| format!("{dice:.4}")).collect();
        let mut lines = vec![
            String::new(),
            format!("Epoch {number}"),
            format!("Current learning rate: {:.5}", history.lrs[number]),
            format!("train_loss {:.4}", history.train_losses[number]),
            format!("val_loss {:.4}", history.val_losses[number]),
            format!("Pseudo dice [{}]", listed.join(", ")),
            format!("Epoch time: {seconds:.2} s"),
            format!("Where the time went: {}", epoch.trainer.times()),
        ];
        let unreadable = epoch.trainer.unreadable();
        lines.extend(unreadable.iter().map(|(case, reason)| format!("left out, cannot be read: {case}: {reason}")));
        if epoch.best {
            lines.push(format!("Yayy! New best EMA pseudo Dice: {:.4}", history.ema_fg_dice[number]));
        }
        if epoch.not_finite > 0 {
            lines.push(format!("{} steps not taken: loss or gradient not finite", epoch.not_finite));
        }
        self.say(&lines)?;
        let mut scalars = vec![
            ("loss/training".to_string(), history.train_losses[number]),
            ("loss/validation".to_string(), history.val_losses[number]),
            ("pseudo_dice/mean".to_string(), history.mean_fg_dice[number]),
            ("pseudo_dice/moving_average".to_string(), history.ema_fg_dice[number]),
            ("learning_rate".to_string(), history.lrs[number]),
            ("epoch_seconds".to_string(), seconds),
            ("steps_not_taken".to_string(), epoch.not_finite as f64),
        ];
        scalars.extend(self.classes.iter().zip(dice).map(|(class, &dice)| (format!("pseudo_dice/{class}"), dice)));
        self.events.add(history.epoch_end_timestamps[number], number, &scalars)
    }
}

fn seconds(history: &History, epoch: usize) -> f64 {
    history.epoch_end_timestamps[epoch] - history.epoch_start_timestamps[epoch]
}

/// An epoch of the history under nnU-Net's names, as a line; what is no number is null.
fn json_line(history: &History, epoch: usize) -> String {
    let line = json!({
        "epoch": epoch,
        "train_loss": history.train_losses[epoch],
        "val_loss": history.val_losses[epoch],
        "mean_fg_dice": history.mean_fg_dice[epoch],
        "ema_fg_dice": history.ema_fg_dice[epoch],
        "dice_per_class_or_region": history.dice_per_class_or_region[epoch],
        "lr": history.lrs[epoch],
        "epoch_start_timestamp": history.epoch_start_timestamps[epoch],
        "epoch_end_timestamp": history.epoch_end_timestamps[epoch],
        "times": history.times.get(epoch),
    });
    format!("{line}\n")
}

/// Year, month, day, hour, minute and second of so many seconds since 1970, by Howard Hinnant's `civil_from_days`.
fn utc(seconds: u64) -> [u64; 6] {
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Eras of 400 years from 1 March of the year 0.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    [year, month, day, of_day / 3600, of_day / 60 % 60, of_day % 60]
}
