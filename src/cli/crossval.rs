//! `voxgrad accumulate-crossval` and `voxgrad ensemble`.

use super::evaluate::{count, on_workers, tell};
use super::model::ModelArguments;
use super::options::FolderArguments;
use super::progress::progress_bar;
use super::scores;
use anyhow::Context as _;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use voxgrad::dataset::folders::Folders;
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::splits::Fold;
use voxgrad::dataset::{DatasetJson, LabelManager};
use voxgrad::error::FileError;
use voxgrad::eval::crossval::{
    check_folds, clear_results, folds_name, references, score, validation_files, write_results,
};
use voxgrad::eval::{Classes, Summary, ensemble};
use voxgrad::{Error, io};

/// What was typed for `voxgrad accumulate-crossval`.
#[derive(clap::Args)]
pub struct AccumulateCrossval {
    /// Number or name of the dataset.
    dataset: String,
    /// Configuration, such as 3d_fullres.
    #[arg(short, long, value_name = "CONFIGURATION")]
    configuration: String,
    /// Trainer of the model; nnUNetTrainer or voxgradTrainer, whichever has results, unless given.
    #[arg(long, value_name = "TRAINER")]
    trainer: Option<String>,
    /// Name of the model's plans; nnUNetPlans unless given.
    #[arg(short, long, value_name = "PLANS")]
    plans: Option<String>,
    /// Folds; 0 1 2 3 4 unless given.
    #[arg(short, long = "folds", value_name = "FOLD", num_args = 1..)]
    folds: Vec<Fold>,
    /// Folder for the results, which must be empty; crossval_results_folds_0_1_2_3_4 in the model's folder, made anew,
    /// unless given.
    #[arg(short, long, value_name = "FOLDER")]
    output: Option<PathBuf>,
    #[command(flatten)]
    folders: FolderArguments,
    /// Cases that are compared at a time; all processor cores unless given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
}

/// The folds that were named, each once; nnU-Net's five unless any was.
pub fn five_unless(named: &[Fold]) -> anyhow::Result<Vec<Fold>> {
    let twice = named.iter().enumerate().find(|(place, fold)| named[..*place].contains(fold));
    anyhow::ensure!(twice.is_none(), "-f names a fold twice");
    Ok(if named.is_empty() { (0..5).map(Fold::Index).collect() } else { named.to_vec() })
}

impl AccumulateCrossval {
    /// Collects and scores.
    pub fn run(self) -> anyhow::Result<()> {
        let folds = five_unless(&self.folds)?;
        let model = ModelArguments {
            model: None,
            dataset: Some(self.dataset),
            configuration: Some(self.configuration),
            trainer: self.trainer,
            plans: self.plans,
            folds: Vec::new(),
            checkpoint_name: None,
            folders: self.folders,
        };
        let folder = model.folder()?.context("no model")?;
        if let Some(output) = &self.output
            && output.is_dir()
            && !io::list_folder(output)?.names.is_empty()
        {
            let problem = "is not empty; name another folder for the results".into();
            return Err(Error::from(FileError::OutputExists { path: output.clone(), problem }).into());
        }
        let output = self.output.unwrap_or_else(|| folder.join(results_name(&folds)));
        on_workers(self.workers, || {
            let summary = accumulate(&folder, &folds, &output, &model.folders.folders())?;
            scores::print(&summary, None);
            println!("wrote {}", output.display());
            Ok(())
        })
    }
}

/// Name of the folder in which the results of these folds are collected.
pub fn results_name(folds: &[Fold]) -> String {
    format!("crossval_results_folds_{}", folds_name(folds))
}

/// A trained model, and what its predictions are scored with.
pub struct Reference {
    pub json: DatasetJson,
    pub labels: LabelManager,
    /// References of all cases by their names.
    pub files: BTreeMap<String, PathBuf>,
    /// What the dataset's folds are, if that is written down.
    splits: Option<PathBuf>,
}

impl Reference {
    /// Of a model folder.
    pub fn of(model: &Path, folders: &Folders) -> anyhow::Result<Self> {
        let json = DatasetJson::read(&model.join("dataset.json"))?;
        let labels = LabelManager::new(&json)?;
        let plans = Plans::read(&model.join("plans.json"))?;
        let dataset = folders.locate(&plans.dataset_name)?;
        let preprocessed = folders.preprocessed.as_ref().map(|folder| folder.join(&dataset.name));
        let files = references(&dataset, preprocessed.as_deref(), &json)?;
        let places = preprocessed.iter().chain(&dataset.raw).map(|folder| folder.join("splits_final.json"));
        let splits = places.into_iter().find(|file| file.is_file());
        Ok(Self { json, labels, files, splits })
    }

    /// The validation predictions of these folds of a model, each fold's of the cases that it is to validate.
    fn predictions(&self, model: &Path, folds: &[Fold]) -> anyhow::Result<BTreeMap<String, PathBuf>> {
        let ending = &self.json.file_ending;
        let found = validation_files(model, folds, ending)?;
        match &self.splits {
            Some(file) => {
                let cases: Vec<String> =
                    self.files.keys().filter_map(|name| name.strip_suffix(ending.as_str())).map(String::from).collect();
                check_folds(model, folds, ending, file, &cases)?;
            }
            None => eprintln!(
                "note: there is no splits_final.json: whether the folds of {} have predicted their own cases is not known",
                model.display()
            ),
        }
        Ok(found)
    }

    /// Scores predictions, by their names, and says what looks odd.
    pub fn score(&self, predictions: &BTreeMap<String, PathBuf>) -> anyhow::Result<Summary> {
        let bar = progress_bar("comparing", 0);
        let summary = score(predictions, &self.files, &Classes::of(&self.labels), &|cases| count(&bar, cases))?;
        bar.finish_and_clear();
        tell(&summary);
        let without = self.files.keys().filter(|name| !predictions.contains_key(*name)).count();
        if without > 0 {
            eprintln!("note: {without} of {} cases of the dataset have no prediction in these folds", self.files.len());
        }
        Ok(summary)
    }
}

/// Collects the validation predictions of a model and scores them.
pub fn accumulate(model: &Path, folds: &[Fold], output: &Path, folders: &Folders) -> anyhow::Result<Summary> {
    let reference = Reference::of(model, folders)?;
    let ending = &reference.json.file_ending;
    let predictions = reference.predictions(model, folds)?;
    let summary = reference.score(&predictions)?;
    clear_results(output, ending)?;
    Ok(write_results(&predictions, &summary, model, output)?)
}

/// What was typed for `voxgrad ensemble`.
#[derive(clap::Args)]
pub struct Ensemble {
    /// Folders of predictions with their probabilities, of the same cases.
    #[arg(short, long, value_name = "FOLDER", num_args = 1.., required = true)]
    input: Vec<PathBuf>,
    /// Folder for the segmentations of the mean.
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// Write the mean probabilities too.
    #[arg(long)]
    save_npz: bool,
    /// The dataset's description; dataset.json in the first folder unless given.
    #[arg(long, value_name = "FILE")]
    dataset_json: Option<PathBuf>,
    /// Replace files in the output that are there already.
    #[arg(long)]
    overwrite: bool,
    /// Cases that are averaged at a time, of which each holds two models' probabilities; 1 unless given. nnU-Net's -np.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024), default_value_t = 1)]
    workers: u16,
}

impl Ensemble {
    /// Averages and writes.
    pub fn run(self) -> anyhow::Result<()> {
        let beside = self.input.iter().map(|folder| folder.join("dataset.json"));
        let descriptions: Vec<PathBuf> = beside.filter(|path| path.is_file()).collect();
        let first = self.dataset_json.as_ref().or(descriptions.first());
        let first = first.context("no dataset.json in any input; --dataset-json names it")?;
        let json = DatasetJson::read(first)?;
        let labels = LabelManager::new(&json)?;
        for path in &descriptions {
            let other = LabelManager::new(&DatasetJson::read(path)?)?;
            anyhow::ensure!(
                other == labels,
                "{} and {} declare other labels: their probabilities cannot be averaged",
                path.display(),
                first.display()
            );
        }
        let folders: Vec<Vec<PathBuf>> = self.input.iter().map(|folder| vec![folder.clone()]).collect();
        let cases = ensemble::members(&folders)?;
        // Probabilities of another mean would be taken for those of this one.
        let endings = [json.file_ending.as_str(), ".npz"];
        let targets = cases.keys().flat_map(|case| endings.iter().map(move |ending| format!("{case}{ending}")));
        let there = targets.map(|name| self.output.join(name)).filter(|path| path.symlink_metadata().is_ok());
        let exists = |path| FileError::OutputExists { path, problem: "is there already".into() }.into();
        if !self.overwrite {
            Error::all(there.map(exists).collect())?;
        }
        let same = |folder: &PathBuf| folder.canonicalize().ok() == self.output.canonicalize().ok();
        anyhow::ensure!(
            !(self.output.is_dir() && self.input.iter().any(same)),
            "{} is an input too: its files would be replaced by the mean; name another folder",
            self.output.display()
        );
        let written = average(&cases, &self.output, &json.file_ending, &labels, self.save_npz, Some(self.workers))?;
        io::write_json(&self.output.join("dataset.json"), json.source())?;
        println!("segmentations in {}: {} of {} models", self.output.display(), written.len(), self.input.len());
        if self.save_npz {
            eprintln!("note: nnU-Net's .pkl files beside probabilities are not written, and not needed here");
        }
        Ok(())
    }
}

/// Writes the segmentations of mean probabilities into a folder, where probabilities of other ones do not stay; returns them
/// by their names.
pub fn average(
    cases: &BTreeMap<String, Vec<PathBuf>>,
    output: &Path,
    ending: &str,
    labels: &LabelManager,
    save: bool,
    workers: Option<u16>,
) -> anyhow::Result<BTreeMap<String, PathBuf>> {
    std::fs::create_dir_all(output).with_context(|| format!("creating {}", output.display()))?;
    let bar = progress_bar("averaging", cases.len());
    let one = |(case, members): (&String, &Vec<PathBuf>)| -> voxgrad::Result<(String, PathBuf)> {
        let merged = ensemble::merge(members, ending, labels)?;
        let name = format!("{case}{ending}");
        let path = output.join(&name);
        io::write_segmentation(&path, merged.segmentation.view(), &merged.geometry)?;
        let file = output.join(format!("{case}.npz"));
        match save {
            true => io::write_npz_array(&file, "probabilities", merged.probabilities.view())?,
            false => _ = io::remove_if_there(&file)?,
        }
        bar.inc(1);
        Ok((name, path))
    };
    let done = on_workers(workers, || Ok(cases.par_iter().map(one).collect::<Vec<_>>()))?;
    bar.finish_and_clear();
    let (mut written, mut faults) = (BTreeMap::new(), Vec::new());
    for result in done {
        match result {
            Ok((name, path)) => _ = written.insert(name, path),
            Err(error) => faults.push(error),
        }
    }
    Error::all(faults)?;
    Ok(written)
}
