//! What `voxgrad train` trains: from what was typed and, where a training goes on, from its checkpoint.

use super::typed::Train;
use super::verify;
use anyhow::Context as _;
use std::path::{Path, PathBuf};
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::splits::{self, Fold, Split};
use voxgrad::dataset::{CaseFiles, Dataset, DatasetJson, LabelManager};
use voxgrad::error::TrainError;
use voxgrad::preprocess::{OWN_FOLDER, case_path, cases_folder, stored_names};
use voxgrad::train::{Asked, Checkpoint, Model, Settings, run};
use voxgrad::{Compat, Error, io};

/// This program's name in the place of nnU-Net's trainer class.
const TRAINER: &str = "voxgradTrainer";
/// Configuration and fold of a training that begins, unless others are typed.
const CONFIGURATION: &str = "3d_fullres";
const FOLD: &str = "0";

/// Where a dataset's files are.
struct Source {
    /// The raw dataset, if it is there.
    raw: Option<PathBuf>,
    /// The folder of plans, splits and preprocessed cases: the same one unless the dataset has been prepared.
    prepared: PathBuf,
    /// Where results go unless an output folder is given.
    results: Option<PathBuf>,
}

/// Everything that is settled before the first case is read.
pub struct Job {
    /// The network and what it is for.
    pub model: Model,
    /// How it trains.
    pub settings: Settings,
    /// On which cases.
    pub fold: Fold,
    /// As training has them.
    pub split: Split,
    /// How they must have been preprocessed.
    pub compat: Option<Compat>,
    /// The state to go on from.
    pub checkpoint: Option<Checkpoint>,
    /// The dataset; without raw files its cases have names only.
    pub dataset: Dataset,
    /// The folder of plans, splits and preprocessed cases.
    pub prepared: PathBuf,
    /// The folder of the results.
    pub output: PathBuf,
    /// In nnU-Net's layout the folder above it, and the plans to copy there.
    shared: Option<(PathBuf, PathBuf)>,
}

impl Job {
    /// Settles everything; nothing is written.
    pub fn new(typed: &Train) -> anyhow::Result<Self> {
        let asked = typed.asked()?;
        let source = source(typed)?;
        let plans = plans_path(typed, &source.prepared);
        let (output, shared) = output(typed, &source, &plans)?;
        let checkpoint = checkpoint(typed, &output)?;
        let (model, settings, compat) = match &checkpoint {
            None => (begun(typed, &source, &plans)?, asked.settings(), typed.compat()),
            Some((path, checkpoint)) => {
                let settings = continued(typed, &asked, &source, &plans, path, checkpoint)?;
                (checkpoint.model.clone(), settings, checkpoint.cases.as_ref().map(|cases| cases.compat))
            }
        };
        model.check()?;
        let dataset = dataset(&source, &model)?;
        let (fold, split) = split(typed, &source, &dataset, checkpoint.as_ref())?;
        check_cases(&dataset, &split)?;
        let checkpoint = checkpoint.map(|(_, mut checkpoint)| {
            checkpoint.settings = settings;
            checkpoint
        });
        let prepared = source.prepared;
        Ok(Job { model, settings, fold, split, compat, checkpoint, dataset, prepared, output, shared })
    }

    /// Makes the output folder. In nnU-Net's layout the folder above it holds what all folds share.
    pub fn make_output(&self) -> anyhow::Result<()> {
        std::fs::create_dir_all(&self.output).with_context(|| format!("creating {}", self.output.display()))?;
        let Some((folder, plans)) = &self.shared else { return Ok(()) };
        // A training that goes on keeps the plans that it was begun with, whatever has become of the file.
        let copy = folder.join("plans.json");
        if self.checkpoint.is_none() || !copy.exists() {
            let plans = std::fs::read(plans).with_context(|| format!("reading {}", plans.display()))?;
            io::write_atomically(&copy, &plans)?;
        }
        io::write_json(&folder.join("dataset.json"), self.model.dataset.source())?;
        let fingerprint = self.prepared.join("dataset_fingerprint.json");
        if let Ok(bytes) = std::fs::read(&fingerprint) {
            io::write_atomically(&folder.join("dataset_fingerprint.json"), &bytes)?;
        }
        println!("results: {}", self.output.display());
        Ok(())
    }

    /// Where voxgrad's own preprocessed case would be.
    pub fn stored(&self, case: &CaseFiles) -> PathBuf {
        case_path(&cases_folder(&self.prepared, &self.model.configuration.data_identifier), &case.name)
    }

    /// The files of cases; all of a split's are there.
    pub fn files(&self, names: &[String]) -> Vec<&CaseFiles> {
        names.iter().filter_map(|name| self.dataset.cases.iter().find(|case| case.name == *name)).collect()
    }
}

/// The cases in a folder of plans, raw or preprocessed ones, and how fold 0 divides them.
pub(super) fn cases_beside(plans: &Path, model: &Model) -> anyhow::Result<(Dataset, Split)> {
    let raw = plans.join("imagesTr").is_dir().then(|| plans.to_path_buf());
    let source = Source { raw, prepared: plans.into(), results: None };
    let dataset = dataset(&source, model)?;
    let split = split_now(&source, &dataset, Fold::Index(0))?;
    check_cases(&dataset, &split)?;
    Ok((dataset, split))
}

fn check_cases(dataset: &Dataset, split: &Split) -> anyhow::Result<()> {
    let missing: Vec<String> = [&split.train, &split.val]
        .into_iter()
        .flatten()
        .filter(|name| dataset.cases.iter().all(|case| case.name != **name))
        .cloned()
        .collect();
    if !missing.is_empty() {
        let (cases, folder) = (missing.join(", "), dataset.folder.clone());
        return Err(Error::Train(TrainError::SplitCasesMissing { cases, folder }).into());
    }
    Ok(())
}

fn source(typed: &Train) -> anyhow::Result<Source> {
    match (&typed.id, &typed.dataset) {
        (Some(id), _) => {
            let folders = typed.folders.folders();
            let located = folders.locate(id)?;
            let prepared = folders.preprocessed_of(&located.name)?;
            let results = match typed.output {
                None => Some(folders.results_of(&located.name)?),
                Some(_) => None,
            };
            let raw = located.raw.filter(|raw| raw.join("dataset.json").is_file());
            Ok(Source { raw, prepared, results })
        }
        (None, Some(folder)) => Ok(Source { raw: Some(folder.clone()), prepared: folder.clone(), results: None }),
        (None, None) => anyhow::bail!("name a dataset: its number, its name, or with -o its folder"),
    }
}

fn plans_path(typed: &Train, prepared: &Path) -> PathBuf {
    match &typed.plans {
        Some(name) if typed.id.is_some() && !name.is_file() => prepared.join(format!("{}.json", name.display())),
        Some(file) => file.clone(),
        None => prepared.join("nnUNetPlans.json"),
    }
}

fn read_plans(path: &Path) -> anyhow::Result<Plans> {
    Plans::read(path).context("reading the plans (--plans FILE names another file)")
}

/// The output folder, and in nnU-Net's layout the one above it with the plans that belong there.
fn output(typed: &Train, source: &Source, plans: &Path) -> anyhow::Result<(PathBuf, Option<(PathBuf, PathBuf)>)> {
    if let Some(given) = &typed.output {
        return Ok((given.clone(), None));
    }
    let results = source.results.as_ref().context("name an output folder with -o")?;
    let configuration = typed.configuration.as_deref().unwrap_or(CONFIGURATION);
    let fold: Fold = typed.fold.as_deref().unwrap_or(FOLD).parse()?;
    // A name that the plans do not have is refused before it becomes a folder's.
    let read = read_plans(plans)?;
    read.configuration(configuration)?;
    // nnUNetTrainer_250epochs is voxgradTrainer_250epochs here.
    let suffix = typed.trainer.as_deref().and_then(|name| name.strip_prefix("nnUNetTrainer")).unwrap_or("");
    let folder = results.join(format!("{TRAINER}{suffix}__{}__{configuration}", read.plans_name));
    Ok((folder.join(format!("fold_{fold}")), Some((folder, plans.to_owned()))))
}

/// The checkpoint to go on from or to validate with, if that was asked for.
fn checkpoint(typed: &Train, output: &Path) -> anyhow::Result<Option<(PathBuf, Checkpoint)>> {
    if typed.val {
        let path = output.join(if typed.val_best { run::BEST } else { run::FINAL });
        let option = if typed.val_best { "--val --val-best" } else { "--val" };
        anyhow::ensure!(
            path.is_file(),
            "{option} needs {}, which is not there{}{}",
            path.display(),
            if run::saved(output).is_empty() { "" } else { ": training has not ended; --continue goes on with it" },
            beside(typed, output)
        );
        if !typed.val_best
            && let Some(newer) = run::saved(output).first().filter(|newer| **newer != path)
        {
            eprintln!("warning: {} has come farther than {}, which is validated", newer.display(), path.display());
        }
        return Ok(Some((path.clone(), Checkpoint::read(&path)?)));
    }
    let saved = run::saved(output);
    match (saved.first(), typed.resume) {
        (Some(path), false) => anyhow::bail!(
            "{} is there already; use --continue to go on with it, or choose another --output",
            path.display()
        ),
        (Some(_), true) => {
            let found = run::newest(output).context("no checkpoint is whole: move them away to begin again")?;
            Ok(found.map(|run::Newest { path, checkpoint, damaged }| {
                damaged.iter().for_each(|error| eprintln!("warning: {error}; passed over"));
                println!("continuing from {}", path.display());
                (path, checkpoint)
            }))
        }
        (None, true) => {
            let others = beside(typed, output);
            anyhow::ensure!(others.is_empty(), "{} has no checkpoint to continue from{others}", output.display(),);
            println!("no checkpoint in {}: beginning", output.display());
            Ok(None)
        }
        (None, false) => Ok(None),
    }
}

/// In nnU-Net's layout the fold is part of the place that was looked at: those that were trained, unless it was typed.
fn beside(typed: &Train, output: &Path) -> String {
    let folds = if typed.fold.is_none() && typed.output.is_none() { begun_folds(output) } else { Vec::new() };
    match folds.is_empty() {
        true => String::new(),
        false => format!(", but {} beside it have: name the fold with --fold", folds.join(", ")),
    }
}

/// Folds beside a fold's folder that have a checkpoint.
fn begun_folds(output: &Path) -> Vec<String> {
    let entries = output.parent().and_then(|folder| std::fs::read_dir(folder).ok());
    let folders = entries.into_iter().flatten().flatten().filter(|entry| !run::saved(&entry.path()).is_empty());
    let mut names: Vec<String> = folders.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// What a training that begins trains.
fn begun(typed: &Train, source: &Source, plans: &Path) -> anyhow::Result<Model> {
    let plans = read_plans(plans)?;
    let dataset = DatasetJson::read(&description(source))?;
    Ok(Model::new(plans, typed.configuration.as_deref().unwrap_or(CONFIGURATION), dataset)?)
}

fn description(source: &Source) -> PathBuf {
    source.raw.as_ref().unwrap_or(&source.prepared).join("dataset.json")
}

/// The settings of a training that goes on: those of its checkpoint, with what may change changed. Everything that was
/// typed, or that lies in the dataset, and that contradicts the checkpoint is refused together.
fn continued(
    typed: &Train,
    asked: &Asked,
    source: &Source,
    plans: &Path,
    path: &Path,
    checkpoint: &Checkpoint,
) -> anyhow::Result<Settings> {
    let model = &checkpoint.model;
    let mut differences = asked.differences(&checkpoint.settings, &checkpoint.progress);
    if let Some(typed) = typed.configuration.as_ref().filter(|typed| **typed != model.configuration_name) {
        differences.push(format!("--configuration is {typed}, it was {}", model.configuration_name));
    }
    if let (Some(typed), Some(cases)) = (&typed.fold, &checkpoint.cases)
        && typed.parse::<Fold>()? != cases.fold
    {
        differences.push(format!("--fold is {typed}, it was {}", cases.fold));
    }
    if typed.plans.is_some() || plans.exists() {
        let present = read_plans(plans)?;
        // Other configurations of the plans are of no matter.
        let same = present.transpose_forward == model.plans.transpose_forward
            && present.foreground_intensity_properties_per_channel
                == model.plans.foreground_intensity_properties_per_channel
            && present.configuration(&model.configuration_name).is_ok_and(|c| c == model.configuration);
        match (same, typed.plans.is_some()) {
            (true, _) => {}
            (false, true) => differences.push(format!("--plans {} differ from the plans it has", plans.display())),
            (false, false) => eprintln!(
                "note: {} has changed since training began; it goes on with the plans in the checkpoint",
                plans.display()
            ),
        }
    }
    let description = description(source);
    let present = DatasetJson::read(&description)?;
    for field in ["labels", "regions_class_order", "channel_names", "modality", "file_ending"] {
        let [now, then] = [&present, &model.dataset].map(|dataset| dataset.source().get(field));
        if now != then {
            differences.push(format!("`{field}` in {} has changed", description.display()));
        }
    }
    if !differences.is_empty() {
        return Err(
            Error::Train(TrainError::Continuation { path: path.into(), differences: differences.join("; ") }).into()
        );
    }
    let mut settings = checkpoint.settings;
    let said = asked.apply(&mut settings);
    if !said.is_empty() {
        println!("from here on: {}", said.join(", "));
    }
    Ok(settings)
}

/// The dataset, checked by the names and headers of its files; without raw files the cases that have been preprocessed.
fn dataset(source: &Source, model: &Model) -> anyhow::Result<Dataset> {
    let Some(raw) = &source.raw else {
        eprintln!(
            "note: the raw files are not there: training on the preprocessed cases in {} as they are",
            source.prepared.display()
        );
        return prepared_dataset(&source.prepared, model);
    };
    let dataset = verify::quickly(raw)?;
    Ok(dataset)
}

fn prepared_dataset(prepared: &Path, model: &Model) -> anyhow::Result<Dataset> {
    let identifier = &model.configuration.data_identifier;
    let mut names = stored_names(&cases_folder(prepared, identifier))?;
    // nnU-Net's, or those of an earlier version.
    for entry in std::fs::read_dir(prepared.join(identifier)).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let stems = [".b2nd", ".npz", ".vxg"].iter().filter_map(|ending| name.strip_suffix(ending));
        names.extend(stems.filter(|stem| !stem.ends_with("_seg")).map(String::from));
    }
    names.sort();
    names.dedup();
    anyhow::ensure!(
        !names.is_empty(),
        "no preprocessed case in {} or {}, and no raw files: name the folder of raw datasets with --raw",
        prepared.join(OWN_FOLDER).join(identifier).display(),
        prepared.join(identifier).display(),
    );
    let case = |name: String| CaseFiles { name, images: Vec::new(), label: None };
    Ok(Dataset {
        folder: prepared.into(),
        json: model.dataset.clone(),
        labels: LabelManager::new(&model.dataset)?,
        cases: names.into_iter().map(case).collect(),
        notes: Vec::new(),
    })
}

/// The fold and its cases; those of the checkpoint where training goes on, whatever a splits file says now.
fn split(
    typed: &Train,
    source: &Source,
    dataset: &Dataset,
    checkpoint: Option<&(PathBuf, Checkpoint)>,
) -> anyhow::Result<(Fold, Split)> {
    let now = |fold: Fold| split_now(source, dataset, fold);
    match checkpoint {
        Some((_, Checkpoint { cases: Some(cases), .. })) => {
            let (fold, split) = (cases.fold, cases.split.clone());
            match now(fold) {
                Ok(present) if present == split => {}
                _ => eprintln!(
                    "note: fold {fold} is not what it was when training began: it goes on with the {} training and {} \
                     validation cases in the checkpoint",
                    split.train.len(),
                    split.val.len()
                ),
            }
            Ok((fold, split))
        }
        Some((path, _)) => {
            let typed =
                typed.fold.as_ref().ok_or_else(|| Error::Train(TrainError::SplitUnknown { path: path.clone() }))?;
            eprintln!(
                "note: {} does not say which cases it was trained on: taking fold {typed} as typed",
                path.display()
            );
            let fold = typed.parse()?;
            Ok((fold, now(fold)?))
        }
        None => {
            let fold = typed.fold.as_deref().unwrap_or(FOLD).parse()?;
            Ok((fold, now(fold)?))
        }
    }
}

/// What the splits file says of a fold, or nnU-Net's own split without one.
fn split_now(source: &Source, dataset: &Dataset, fold: Fold) -> anyhow::Result<Split> {
    let names = dataset.case_names();
    let file = source.prepared.join("splits_final.json");
    let (splits, whose) = match (fold, file.exists()) {
        (Fold::All, _) => (Vec::new(), String::new()),
        (_, true) => (splits::read(&file, &names)?, file.display().to_string()),
        (_, false) => (splits::k_fold(&names)?, "nnU-Net's own split".into()),
    };
    let without = splits::without_fold(&splits, &names);
    if !without.is_empty() {
        eprintln!(
            "warning: no fold of {whose} has {}: not trained and not validated on. Add them there, or delete the file to \
             have it made again",
            without.join(", ")
        );
    }
    if let Fold::Index(index) = fold
        && index >= splits.len()
    {
        return Err(Error::Train(TrainError::FoldUnknown { fold: index, known: splits.len(), whose }).into());
    }
    Ok(splits::cases_of_fold(&splits, fold, &names)?)
}
