//! Settings as a person gives them: some, and the others come from a checkpoint or are the defaults.

use super::precision::Precision;
use super::progress::Progress;
use super::settings::Settings;
use crate::augment::Recipe;
use crate::compat::Compat;
use crate::sample::{Oversampling, Sampling};

/// What was asked for; `None` for what was not.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Asked {
    /// As [`Settings::epochs`].
    pub epochs: Option<usize>,
    /// As [`Settings::iterations`].
    pub iterations: Option<usize>,
    /// As [`Settings::validation_iterations`].
    pub validation_iterations: Option<usize>,
    /// As [`Settings::learning_rate`].
    pub learning_rate: Option<f64>,
    /// As [`Settings::momentum`].
    pub momentum: Option<f32>,
    /// As [`Settings::mirror`].
    pub mirror: Option<[bool; 3]>,
    /// As [`Settings::augmentation`].
    pub augmentation: Option<Recipe>,
    /// As [`Sampling::oversampling`].
    pub oversampling: Option<Oversampling>,
    /// As [`Sampling::by_annotation`].
    pub by_annotation: Option<bool>,
    /// As [`Settings::compat`].
    pub compat: Option<Compat>,
    /// As [`Settings::precision`].
    pub precision: Option<Precision>,
    /// As [`Settings::exact`].
    pub exact: Option<bool>,
    /// As [`Settings::tuned`].
    pub tuned: Option<bool>,
    /// As [`Settings::seed`].
    pub seed: Option<u64>,
}

impl Asked {
    /// The settings of a training that begins: what was not asked for has its default.
    pub fn settings(&self) -> Settings {
        let default = Settings::default();
        Settings {
            epochs: self.epochs.unwrap_or(default.epochs),
            iterations: self.iterations.unwrap_or(default.iterations),
            validation_iterations: self.validation_iterations.unwrap_or(default.validation_iterations),
            learning_rate: self.learning_rate.unwrap_or(default.learning_rate),
            momentum: self.momentum.unwrap_or(default.momentum),
            mirror: self.mirror.unwrap_or(default.mirror),
            augmentation: self.augmentation.unwrap_or(default.augmentation),
            sampling: self.sampling(default.sampling),
            compat: self.compat.unwrap_or(default.compat),
            precision: self.precision.unwrap_or(default.precision),
            exact: self.exact.unwrap_or(default.exact),
            tuned: self.tuned.unwrap_or(default.tuned),
            seed: self.seed.unwrap_or(default.seed),
        }
    }

    fn sampling(&self, begun: Sampling) -> Sampling {
        Sampling {
            oversampling: self.oversampling.unwrap_or(begun.oversampling),
            by_annotation: self.by_annotation.unwrap_or(begun.by_annotation),
        }
    }

    /// What was asked for and a training that goes on was not begun with, each with both values. Epochs and learning
    /// rate may change on the way, unless so many epochs are done already.
    pub fn differences(&self, begun: &Settings, progress: &Progress) -> Vec<String> {
        let mut all = Differences(Vec::new());
        all.of("iterations", self.iterations, begun.iterations);
        all.of("validation iterations", self.validation_iterations, begun.validation_iterations);
        all.of("momentum", self.momentum, begun.momentum);
        all.of("mirror", self.mirror.map(axes), axes(begun.mirror));
        all.of("augmentation", self.augmentation, begun.augmentation);
        all.of("sampling", Some(self.sampling(begun.sampling)), begun.sampling);
        all.of("compat", self.compat, begun.compat);
        all.of("precision", self.precision, begun.precision);
        all.of("exact", self.exact, begun.exact);
        all.of("tune", self.tuned, begun.tuned);
        all.of("seed", self.seed, begun.seed);
        if let Some(epochs) = self.epochs.filter(|&epochs| epochs < progress.epoch) {
            all.0.push(format!("epochs is {epochs}, {} are done already", progress.epoch));
        }
        all.0
    }

    /// Changes the epochs and the learning rate to what was asked for, and says so.
    pub fn apply(&self, settings: &mut Settings) -> Vec<String> {
        let mut said = Vec::new();
        if let Some(epochs) = self.epochs.filter(|&epochs| epochs != settings.epochs) {
            said.push(format!("{epochs} epochs instead of {}", settings.epochs));
            settings.epochs = epochs;
        }
        if let Some(rate) = self.learning_rate.filter(|&rate| rate != settings.learning_rate) {
            said.push(format!("first learning rate {rate} instead of {}", settings.learning_rate));
            settings.learning_rate = rate;
        }
        said
    }
}

struct Differences(Vec<String>);

impl Differences {
    fn of<T: PartialEq + std::fmt::Display>(&mut self, option: &str, asked: Option<T>, begun: T) {
        if let Some(asked) = asked.filter(|asked| *asked != begun) {
            self.0.push(format!("{option} is {asked}, it was {begun}"));
        }
    }
}

/// Mirrored axes as they are typed.
fn axes(mirror: [bool; 3]) -> String {
    let axes: Vec<String> = (0..3).filter(|&axis| mirror[axis]).map(|axis| axis.to_string()).collect();
    if axes.is_empty() { "none".into() } else { axes.join(",") }
}
