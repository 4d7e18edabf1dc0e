//! `voxgrad find-best-configuration`.

use super::crossval::{Reference, accumulate, average, five_unless, results_name};
use super::options::FolderArguments;
use super::postprocess::decide;
use anyhow::Context as _;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use voxgrad::dataset::DatasetJson;
use voxgrad::dataset::folders::Folders;
use voxgrad::dataset::splits::Fold;
use voxgrad::eval::crossval::{clear_results, folds_name, validation_files, write_results};
use voxgrad::eval::{Determined, Json, ensemble};
use voxgrad::{Error, io};

/// What was typed.
#[derive(clap::Args)]
pub struct FindBestConfiguration {
    /// Number or name of the dataset.
    dataset: String,
    /// Names of plans; nnUNetPlans unless given.
    #[arg(short, long, value_name = "PLANS", num_args = 1.., default_values_t = ["nnUNetPlans".to_owned()])]
    plans: Vec<String>,
    /// Configurations; all 3-D ones of one stage that have results unless given.
    #[arg(short, long, value_name = "CONFIGURATION", num_args = 1..)]
    configuration: Vec<String>,
    /// Trainers; nnUNetTrainer and voxgradTrainer, as far as they have results, unless given.
    #[arg(long, value_name = "TRAINER", num_args = 1..)]
    trainer: Vec<String>,
    /// Folds; 0 1 2 3 4 unless given.
    #[arg(short, long = "folds", value_name = "FOLD", num_args = 1..)]
    folds: Vec<Fold>,
    /// Compare single models only.
    #[arg(long)]
    disable_ensembling: bool,
    /// Not offered: results are made anew, so that none is out of date.
    #[arg(long, hide = true)]
    no_overwrite: bool,
    #[command(flatten)]
    folders: FolderArguments,
    /// Cases that are worked on at a time; all processor cores unless given. nnU-Net's -np.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
}

/// One trained model.
#[derive(Clone)]
struct Model {
    trainer: String,
    plans: String,
    configuration: String,
    folder: PathBuf,
}

impl Model {
    fn name(&self) -> String {
        format!("{}__{}__{}", self.trainer, self.plans, self.configuration)
    }

    fn to_json(&self, plans_key: &'static str) -> Json {
        let text = |text: &String| Json::Text(text.clone());
        Json::object([
            ("configuration", text(&self.configuration)),
            (plans_key, text(&self.plans)),
            ("trainer", text(&self.trainer)),
        ])
    }
}

/// A model or an ensemble with its Dice in cross-validation.
struct Candidate {
    name: String,
    models: Vec<Model>,
    /// Where its predictions are.
    source: PathBuf,
    dice: f64,
}

impl FindBestConfiguration {
    /// Compares, decides on postprocessing, writes what to do.
    pub fn run(self) -> anyhow::Result<()> {
        anyhow::ensure!(
            !self.no_overwrite,
            "--no_overwrite: results are always made anew here, so that none is out of date; leave it out"
        );
        super::evaluate::on_workers(self.workers, || self.compare())
    }

    fn compare(&self) -> anyhow::Result<()> {
        let folds = five_unless(&self.folds)?;
        let folders = self.folders.folders();
        let dataset = folders.locate(&self.dataset)?.name;
        let results = folders.results_of(&dataset)?;
        let models = self.models(&results)?;
        check_same_cases(&models, &folds)?;
        let mut candidates = Vec::new();
        for model in &models {
            let source = model.folder.join(results_name(&folds));
            let dice = accumulate(&model.folder, &folds, &source, &folders)?.foreground_dice();
            println!("{}: {dice:.5}", model.name());
            candidates.push(Candidate { name: model.name(), models: vec![model.clone()], source, dice });
        }
        if !self.disable_ensembling {
            for (place, first) in models.iter().enumerate() {
                for second in &models[place + 1..] {
                    candidates.extend(ensemble_of([first, second], &results, &folds, &folders)?);
                }
            }
        }
        // The first of equals: single models come first, and are simpler.
        let mut best: Option<&Candidate> = None;
        for candidate in candidates.iter().filter(|candidate| !candidate.dice.is_nan()) {
            if best.is_none_or(|best| candidate.dice > best.dice) {
                best = Some(candidate);
            }
        }
        let best = best.context(
            "no model has a mean foreground Dice: a class has none in any case, neither predicted nor true; summary.json \
             of each shows which",
        )?;
        println!("best: {}: {:.5}", best.name, best.dice);

        let reference = Reference::of(&best.models[0].folder, &folders)?;
        let folder = reference.files.values().next().and_then(|file| file.parent()).context("no references")?;
        let in_one_folder =
            reference.files.iter().all(|(name, file)| file.parent() == Some(folder) && file.ends_with(name));
        anyhow::ensure!(
            in_one_folder,
            "the labels that dataset.json lists lie in several folders or under other names; `voxgrad preprocess` makes \
             copies in gt_segmentations, by which postprocessing is decided on"
        );
        let ending = &reference.json.file_ending;
        let determined = decide(folder, &best.source, ending, &reference.labels, true)?;
        let information = results.join("inference_information.json");
        let text = information_of(&dataset, &folds, &models, !self.disable_ensembling, &candidates, best, &determined);
        io::write_atomically(&information, text.as_bytes())?;
        let instructions = instructions_of(&folds, best)?;
        let file = results.join("inference_instructions.txt");
        io::write_atomically(&file, instructions.as_bytes())?;
        println!("\n{instructions}\nwrote {} and {}", file.display(), information.display());
        Ok(())
    }

    /// The models that are meant, all of which exist.
    fn models(&self, results: &Path) -> anyhow::Result<Vec<Model>> {
        let (mut models, mut missing) = (Vec::new(), Vec::new());
        for name in io::list_folder(results)?.names {
            let parts: Vec<&str> = name.split("__").collect();
            let [trainer, plans, configuration] = parts.as_slice() else { continue };
            let is_meant = |named: &[String], usual: &dyn Fn(&str) -> bool, name: &str| match named {
                [] => usual(name),
                named => named.iter().any(|one| one == name),
            };
            let usual = |trainer: &str| ["nnUNetTrainer", "voxgradTrainer"].contains(&trainer);
            let is_trainer = |named: &String| is_trainer(named, trainer);
            if !results.join(&name).is_dir()
                || !is_meant(&self.plans, &|_| false, plans)
                || !(self.trainer.iter().any(is_trainer) || self.trainer.is_empty() && usual(trainer))
                || !is_meant(&self.configuration, &|_| true, configuration)
            {
                continue;
            }
            if let Some(reason) = unsupported(configuration) {
                anyhow::ensure!(self.configuration.is_empty(), "{configuration}: {reason}; leave it out of -c");
                eprintln!("note: {name} is not compared: {reason}");
                continue;
            }
            let [trainer, plans, configuration] = [trainer, plans, configuration].map(|part| part.to_string());
            models.push(Model { trainer, plans, configuration, folder: results.join(&name) });
        }
        for (what, named, of) in [
            ("-c", &self.configuration, (|model| &model.configuration) as fn(&Model) -> &String),
            ("-tr", &self.trainer, |model| &model.trainer),
            ("-p", &self.plans, |model| &model.plans),
        ] {
            let is = |name: &str, model: &Model| of(model) == name || what == "-tr" && is_trainer(name, of(model));
            let absent = named.iter().filter(|name| !models.iter().any(|model| is(name, model)));
            missing.extend(absent.map(|name| format!("{what} {name}")));
        }
        anyhow::ensure!(
            missing.is_empty(),
            "no trained model in {} fits {}; train it, or leave that out",
            results.display(),
            missing.join(", ")
        );
        // As they were named; nnU-Net's order of configurations otherwise.
        let order = ["3d_fullres", "3d_lowres"];
        let place = |model: &Model| {
            let of = |list: &[String], name: &String| list.iter().position(|one| one == name).unwrap_or(list.len());
            let usual = order.iter().position(|one| *one == model.configuration).unwrap_or(order.len());
            (of(&self.trainer, &model.trainer), of(&self.configuration, &model.configuration), usual)
        };
        models.sort_by_key(place);
        Ok(models)
    }
}

/// Refuses models that have validated different cases, since their means are not of the same thing.
fn check_same_cases(models: &[Model], folds: &[Fold]) -> anyhow::Result<()> {
    let (mut predicted, mut faults) = (Vec::with_capacity(models.len()), Vec::new());
    for model in models {
        let ending = DatasetJson::read(&model.folder.join("dataset.json"))?.file_ending;
        match validation_files(&model.folder, folds, &ending) {
            Ok(files) => predicted.push(files.into_keys().collect::<BTreeSet<String>>()),
            Err(error) => faults.push(error),
        }
    }
    Error::all(faults)?;
    let all: BTreeSet<&String> = predicted.iter().flatten().collect();
    let mut lacking = Vec::new();
    for (model, files) in models.iter().zip(&predicted) {
        let missing: Vec<&str> = all.iter().filter(|name| !files.contains(**name)).map(|name| name.as_str()).collect();
        if !missing.is_empty() {
            lacking.push(format!("{} has not predicted {}", model.name(), missing.join(", ")));
        }
    }
    anyhow::ensure!(
        lacking.is_empty(),
        "models cannot be compared that have validated different cases: {}; validate them again, or leave one out with -c, \
         -tr or -p",
        lacking.join("; ")
    );
    Ok(())
}

/// Why voxgrad could not predict with a configuration that is the best.
fn unsupported(configuration: &str) -> Option<&'static str> {
    match configuration {
        "2d" => Some("voxgrad does not predict with 2-D networks"),
        name if name.contains("cascade") => Some("voxgrad does not predict with the second stage of a cascade"),
        _ => None,
    }
}

/// Whether a model's trainer is the named one, or what voxgrad calls its own form of it, as `predict -tr` takes them.
fn is_trainer(named: &str, trainer: &str) -> bool {
    let variant = named.strip_prefix("nnUNetTrainer").filter(|variant| !variant.is_empty());
    named == trainer || variant.is_some_and(|variant| trainer == format!("voxgradTrainer{variant}"))
}

/// The mean of two models, if both have kept their probabilities.
fn ensemble_of(
    pair: [&Model; 2],
    results: &Path,
    folds: &[Fold],
    folders: &Folders,
) -> anyhow::Result<Option<Candidate>> {
    let name = format!("ensemble___{}___{}___{}", pair[0].name(), pair[1].name(), folds_name(folds));
    let validation = |model: &Model| -> Vec<PathBuf> {
        folds.iter().map(|fold| model.folder.join(format!("fold_{fold}")).join("validation")).collect()
    };
    let members = pair.map(validation);
    let has_probabilities = |folders: &Vec<PathBuf>| -> anyhow::Result<bool> {
        for folder in folders {
            if !io::list_folder(folder)?.names.iter().any(|name| name.ends_with(".npz")) {
                return Ok(false);
            }
        }
        Ok(true)
    };
    for (model, folders) in pair.iter().zip(&members) {
        if !has_probabilities(folders)? {
            eprintln!("note: {name} is not compared: {} has no probabilities (.npz) of all folds", model.name());
            return Ok(None);
        }
    }
    let [first, second] = pair.map(|model| Reference::of(&model.folder, folders));
    let (reference, second) = (first?, second?);
    anyhow::ensure!(reference.labels == second.labels, "{name}: the models declare different labels");
    // A mean over other cases than those of the single models would be compared with theirs.
    let ending = &reference.json.file_ending;
    for (model, folders) in pair.iter().zip(&members) {
        let without = without_probabilities(folders, ending)?;
        if !without.is_empty() {
            eprintln!("note: {name} is not compared: {} has no probabilities of {}", model.name(), without.join(", "));
            return Ok(None);
        }
    }
    let cases = ensemble::members(&members)?;
    let source = results.join("ensembles").join(&name);
    clear_results(&source, ending)?;
    let predictions = average(&cases, &source, ending, &reference.labels, false, Some(1))?;
    let summary = reference.score(&predictions)?;
    let dice = summary.foreground_dice();
    write_results(&Default::default(), &summary, &pair[0].folder, &source)?;
    println!("{name}: {dice:.5}");
    Ok(Some(Candidate { name, models: pair.map(Model::clone).to_vec(), source, dice }))
}

/// Predicted cases that have no `.npz` beside them.
fn without_probabilities(folders: &[PathBuf], ending: &str) -> anyhow::Result<Vec<String>> {
    let mut without = Vec::new();
    for folder in folders {
        let names = io::list_folder(folder)?.names;
        let cases = names.iter().filter_map(|name| name.strip_suffix(ending));
        without.extend(cases.filter(|case| !names.contains(&format!("{case}.npz"))).map(String::from));
    }
    Ok(without)
}

/// nnU-Net's `inference_information.json`.
fn information_of(
    dataset: &str,
    folds: &[Fold],
    models: &[Model],
    ensembling: bool,
    candidates: &[Candidate],
    best: &Candidate,
    determined: &Determined,
) -> String {
    let path = |name: &str| Json::Text(best.source.join(name).to_string_lossy().into_owned());
    let fold = |fold: &Fold| match fold {
        Fold::Index(index) => Json::Integer(*index as u64),
        Fold::All => Json::Text("all".into()),
    };
    let mut all: Vec<(&str, Json)> =
        candidates.iter().map(|candidate| (candidate.name.as_str(), Json::Float(candidate.dice))).collect();
    all.sort_by_key(|(name, _)| *name);
    let selected = best.models.iter().map(|model| model.to_json("plans_identifier"));
    Json::object([
        ("all_results", Json::object(all)),
        (
            "best_model_or_ensemble",
            Json::object([
                ("postprocessing_file", path("postprocessing.pkl")),
                ("result_on_crossval_post_pp", Json::Float(determined.after.foreground_dice())),
                ("result_on_crossval_pre_pp", Json::Float(best.dice)),
                ("selected_model_or_models", Json::List(selected.collect())),
                ("some_plans_file", path("plans.json")),
            ]),
        ),
        ("considered_models", Json::List(models.iter().map(|model| model.to_json("plans")).collect())),
        ("dataset_name_or_id", Json::Text(dataset.into())),
        ("ensembling_allowed", Json::Bool(ensembling)),
        ("folds", Json::List(folds.iter().map(fold).collect())),
    ])
    .to_text()
}

/// How to predict with the best model, in commands of this program that mean the same wherever they are typed: folders are
/// named whole, so that none of them depends on this folder, on the environment, or on what was given here.
fn instructions_of(folds: &[Fold], best: &Candidate) -> anyhow::Result<String> {
    let folds = folds.iter().map(Fold::to_string).collect::<Vec<_>>().join(" ");
    let is_ensemble = best.models.len() > 1;
    let mut text = String::from("Predict like this:\n\n");
    let mut outputs = Vec::new();
    for (place, model) in best.models.iter().enumerate() {
        let output = if is_ensemble { format!("OUTPUT_FOLDER_MODEL_{}", place + 1) } else { "OUTPUT_FOLDER".into() };
        let save = if is_ensemble { " --save_probabilities" } else { "" };
        let folder = in_shell(&model.folder)?;
        // Writing to a String cannot fail.
        let _ = writeln!(text, "voxgrad predict -m {folder} -f {folds} -i INPUT_FOLDER -o {output}{save}");
        outputs.push(output);
    }
    if is_ensemble {
        let description = in_shell(&best.source.join("dataset.json"))?;
        let _ = writeln!(
            text,
            "\nThen average them:\n\nvoxgrad ensemble -i {} -o OUTPUT_FOLDER --dataset-json {description}",
            outputs.join(" ")
        );
    }
    let _ = writeln!(
        text,
        "\nThen postprocess:\n\nvoxgrad apply-postprocessing -i OUTPUT_FOLDER -o OUTPUT_FOLDER_PP -pp_pkl_file {}",
        in_shell(&best.source.join("postprocessing.json"))?
    );
    Ok(text)
}

/// A path from the root, as one word of a shell's command.
fn in_shell(path: &Path) -> anyhow::Result<String> {
    let path = std::path::absolute(path).with_context(|| format!("finding {}", path.display()))?;
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+".contains(c);
    Ok(if text.chars().all(is_plain) { text } else { format!("'{}'", text.replace('\'', r"'\''")) })
}
