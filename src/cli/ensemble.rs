//! Which trained model looks at which annotated dataset, and how: what `complete` and `suggest` are told alike.

use super::device::{DeviceArgument, ExactArgument};
use super::interrupt::Interrupt;
use super::model::ModelArguments;
use super::options::Shown;
use super::verify;
use indicatif::ProgressBar;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use voxgrad::annotate::Event;
use voxgrad::dataset::Dataset;
use voxgrad::dataset::splits::{self, Fold, Split};
use voxgrad::exchange::TrainedModel;
use voxgrad::kernels::Context;
use voxgrad::kernels::conv3d::Policy;
use voxgrad::predict::Settings;
use voxgrad::train::Precision;

/// A trained model, and how it predicts.
#[derive(clap::Args)]
pub struct EnsembleArguments {
    #[command(flatten)]
    model: ModelArguments,
    /// A single checkpoint instead of a model folder, voxgrad's or nnU-Net's.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["model", "model_dataset", "folds", "checkpoint_name"])]
    checkpoint: Option<PathBuf>,
    /// The splits by which checkpoints of nnU-Net were trained, which do not say it themselves; splits_final.json of the
    /// dataset, raw or preprocessed, unless given.
    #[arg(long, value_name = "FILE")]
    splits: Option<PathBuf>,
    /// Distance of neighbouring windows as a share of the patch.
    #[arg(long = "step-size", default_value_t = 0.5)]
    step_size: f64,
    /// Do not look at mirrored copies: up to 8 times as fast, a little less accurate; a single fold then disagrees with
    /// itself only where windows overlap.
    #[arg(long = "disable-tta")]
    disable_tta: bool,
    /// Type of activations: f32, f16 or bf16; that of training unless given, where the device has it.
    #[arg(long)]
    precision: Option<Precision>,
    #[command(flatten)]
    exact: ExactArgument,
    #[command(flatten)]
    device: DeviceArgument,
    #[command(flatten)]
    pub shown: Shown,
}

impl EnsembleArguments {
    /// Reads the model.
    pub fn model(&self) -> anyhow::Result<TrainedModel> {
        let trained = match (&self.checkpoint, self.model.folder()?) {
            (Some(file), _) => TrainedModel::of_file(file, false)?,
            (None, Some(folder)) => self.model.open(&folder, false)?,
            (None, None) => {
                anyhow::bail!("name the model: -m FOLDER, -d DATASET -c CONFIGURATION, or --checkpoint FILE")
            }
        };
        trained.notes.iter().for_each(|note| eprintln!("note: {note}"));
        Ok(trained)
    }

    /// Opens the dataset given, or the raw one of the model that `-d` names.
    pub fn dataset(&self, given: Option<&Path>) -> anyhow::Result<Dataset> {
        if let Some(folder) = given {
            return verify::quickly(folder);
        }
        let Some(dataset) = &self.model.dataset else {
            anyhow::bail!("name the dataset: its folder, or with -d its number or name");
        };
        verify::quickly(self.model.folders.folders().locate(dataset)?.raw()?)
    }

    /// The splits of folds whose checkpoints do not know their cases; `None` if all do, or if there is no file.
    pub fn splits(&self, trained: &TrainedModel, dataset: &Dataset) -> anyhow::Result<Option<Vec<Split>>> {
        let without =
            |fold: &&voxgrad::exchange::TrainedFold| fold.checkpoint.cases.is_none() && fold.fold != Fold::All;
        let unknown: Vec<String> = trained.folds.iter().filter(without).map(|fold| fold.fold.to_string()).collect();
        if unknown.is_empty() {
            if let Some(file) = &self.splits {
                eprintln!("note: {} is not read: the checkpoints say which cases they had", file.display());
            }
            return Ok(None);
        }
        let file = match &self.splits {
            Some(file) => Some(file.clone()),
            None => {
                let name = dataset.folder.canonicalize().ok();
                let name = name.as_deref().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
                let prepared = name.and_then(|name| self.model.folders.folders().preprocessed_of(&name).ok());
                // Training takes the preprocessed dataset's.
                let places = [prepared, Some(dataset.folder.clone())];
                let files = places.into_iter().flatten().map(|folder| folder.join("splits_final.json"));
                files.into_iter().find(|file| file.is_file())
            }
        };
        let Some(file) = file else { return Ok(None) };
        let read = splits::read(&file, &dataset.case_names())?;
        println!("folds {} do not say which cases they had: taking {}", unknown.join(", "), file.display());
        Ok(Some(read))
    }

    /// The device, and how to predict on it.
    pub fn settings(&self, trained: &TrainedModel) -> anyhow::Result<(Context, Settings)> {
        let trained_with = trained.folds.iter().map(|fold| &fold.checkpoint.settings);
        let exact = self.exact.exact || trained_with.clone().any(|settings| settings.exact);
        let context = Policy::default().with_exact(exact).on(&self.device.open()?.context);
        let of_training = trained_with.map(|settings| settings.precision).next().unwrap_or_default();
        let precision = match self.precision {
            Some(asked) => asked,
            None if of_training.check(context.caps()).is_ok() => of_training,
            None => Precision::F32,
        };
        precision.check(context.caps())?;
        let mirror = if self.disable_tta { [false; 3] } else { trained.mirror };
        Ok((context, Settings { step_size: self.step_size, mirror, dtype: precision.dtype() }))
    }
}

/// Shows what an ensemble has looked at, until somebody asks to stop.
pub struct Watch<'a> {
    shown: &'a Shown,
    bar: ProgressBar,
    interrupt: Interrupt,
    done: &'static str,
}

impl<'a> Watch<'a> {
    /// Begins to listen for signals.
    pub fn begin(shown: &'a Shown, doing: &'static str, done: &'static str, cases: usize) -> anyhow::Result<Self> {
        Ok(Watch { shown, bar: shown.bar(doing, cases), interrupt: Interrupt::install()?, done })
    }

    /// To be called at every event.
    pub fn see(&self, event: Event) -> ControlFlow<()> {
        match event {
            Event::Pass => self.bar.tick(),
            Event::Case(case) => self.shown.done(&self.bar, self.done, case),
        }
        match self.interrupt.asked() {
            Some(_) => ControlFlow::Break(()),
            None => ControlFlow::Continue(()),
        }
    }

    /// What came out, unless it was stopped.
    pub fn end<T>(self, made: Option<T>) -> anyhow::Result<T> {
        self.bar.finish_and_clear();
        self.interrupt.end_at_once();
        match (made, self.interrupt.asked()) {
            (Some(made), _) => Ok(made),
            (None, Some(interrupted)) => {
                eprintln!("stopped; nothing was written");
                Err(interrupted.into())
            }
            (None, None) => anyhow::bail!("stopped before anything was written"),
        }
    }
}
