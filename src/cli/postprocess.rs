//! `voxgrad determine-postprocessing` and `voxgrad apply-postprocessing`.

use super::evaluate::{count, on_workers, tell};
use super::progress::progress_bar;
use anyhow::Context as _;
use std::path::{Path, PathBuf};
use voxgrad::dataset::{DatasetJson, LabelManager};
use voxgrad::eval::crossval::{check_results, clear_results};
use voxgrad::eval::postprocess::determine;
use voxgrad::eval::{Determined, file_ending_of};
use voxgrad::exchange::{read_postprocessing, write_postprocessing};
use voxgrad::io;

/// What was typed for `voxgrad determine-postprocessing`.
#[derive(clap::Args)]
pub struct DeterminePostprocessing {
    /// Folder of the predictions of a cross-validation. postprocessing.json and postprocessing.pkl are written there.
    #[arg(short, long, value_name = "FOLDER")]
    input: PathBuf,
    /// Folder of the references, files of the same names. nnU-Net's -ref.
    #[arg(long, value_name = "FOLDER")]
    references: PathBuf,
    /// The dataset's description; dataset.json beside the predictions unless given.
    #[arg(long, value_name = "FILE")]
    dataset_json: Option<PathBuf>,
    /// nnU-Net's plans, which have no use here.
    #[arg(long, value_name = "FILE", hide = true)]
    plans: Option<PathBuf>,
    /// Do not keep the postprocessed predictions, which go to the folder `postprocessed` inside of the input; those of an
    /// earlier run are removed.
    #[arg(long)]
    remove_postprocessed: bool,
    /// Cases that are worked on at a time; all processor cores unless given. nnU-Net's -np.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
}

/// What was typed for `voxgrad apply-postprocessing`.
#[derive(clap::Args)]
pub struct ApplyPostprocessing {
    /// Folder of the predictions.
    #[arg(short, long, value_name = "FOLDER")]
    input: PathBuf,
    /// Folder for the postprocessed predictions.
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// postprocessing.json or postprocessing.pkl, voxgrad's or nnU-Net's. nnU-Net's -pp_pkl_file.
    #[arg(long, value_name = "FILE")]
    postprocessing: PathBuf,
    /// The dataset's description, for the ending of the files; dataset.json beside the predictions, or what the files show,
    /// unless given.
    #[arg(long, value_name = "FILE")]
    dataset_json: Option<PathBuf>,
    /// nnU-Net's plans, which have no use here.
    #[arg(long, value_name = "FILE", hide = true)]
    plans: Option<PathBuf>,
    /// Replace files in the output that are there already.
    #[arg(long)]
    overwrite: bool,
    /// Cases that are worked on at a time; all processor cores unless given. nnU-Net's -np.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    workers: Option<u16>,
}

fn without_plans(plans: Option<&PathBuf>) {
    if plans.is_some() {
        eprintln!("note: -plans_json has no effect here: nnU-Net takes the reader of files from the plans");
    }
}

impl DeterminePostprocessing {
    /// Decides, and writes what was decided.
    pub fn run(self) -> anyhow::Result<()> {
        without_plans(self.plans.as_ref());
        let description = self.dataset_json.clone().unwrap_or_else(|| self.input.join("dataset.json"));
        let dataset = DatasetJson::read(&description)?;
        let labels = LabelManager::new(&dataset)?;
        on_workers(self.workers, || {
            let found =
                decide(&self.references, &self.input, &dataset.file_ending, &labels, !self.remove_postprocessed)?;
            let summary = self.input.join("summary.json");
            found.before.write(&summary)?;
            println!("wrote {}", summary.display());
            Ok(())
        })
    }
}

/// Decides by the predictions of a folder, prints what was tried, and writes `postprocessing.json`, `postprocessing.pkl` and,
/// if they are to be kept, the postprocessed predictions into it.
pub fn decide(
    references: &Path,
    predictions: &Path,
    file_ending: &str,
    labels: &LabelManager,
    keep: bool,
) -> anyhow::Result<Determined> {
    let folder = predictions.join("postprocessed");
    check_results(&folder, file_ending)?;
    let bar = progress_bar("trying", 0);
    let found = determine(references, predictions, file_ending, labels, &|steps| count(&bar, steps))?;
    bar.finish_and_clear();
    tell(&found.before);
    if found.missing > 0 {
        eprintln!(
            "warning: {} references in {} have no prediction: postprocessing should be decided on by all cases",
            found.missing,
            references.display()
        );
    }
    for trial in &found.trials {
        let name = labels.foreground().iter().position(|group| *group == trial.group);
        let what = match name.and_then(|place| labels.foreground_names().get(place).copied()) {
            Some(name) => format!("{name} ({})", trial.group),
            None => "all foreground".into(),
        };
        let decision = if trial.accepted { "taken" } else { "not taken" };
        println!("largest component of {what}: Dice {:.5} -> {:.5}, {decision}", trial.before, trial.after);
    }
    let after = found.after.foreground_dice();
    println!("mean foreground Dice {:.5} before, {after:.5} after postprocessing", found.before.foreground_dice());
    // What an earlier decision has left there is none of this one's.
    clear_results(&folder, file_ending)?;
    if !keep && folder.is_dir() {
        std::fs::remove_dir(&folder).with_context(|| format!("removing {}", folder.display()))?;
        println!("removed {}, which was of an earlier decision", folder.display());
    }
    if keep {
        let bar = progress_bar("writing", 0);
        found.postprocessing.apply_to_folder(predictions, &folder, file_ending, false, &|files| count(&bar, files))?;
        bar.finish_and_clear();
        found.after_in(&folder).write(&folder.join("summary.json"))?;
        println!("wrote {}", folder.display());
    }
    let [json, pickle] = ["json", "pkl"].map(|ending| predictions.join(format!("postprocessing.{ending}")));
    io::write_atomically(&json, found.to_json().as_bytes())?;
    write_postprocessing(&pickle, &found.postprocessing)?;
    println!("wrote {} and {}", json.display(), pickle.display());
    Ok(found)
}

impl ApplyPostprocessing {
    /// Does it.
    pub fn run(self) -> anyhow::Result<()> {
        without_plans(self.plans.as_ref());
        let postprocessing = read_postprocessing(&self.postprocessing)?;
        let beside = self.input.join("dataset.json");
        let description = self.dataset_json.clone().or_else(|| beside.is_file().then_some(beside));
        let ending = match description {
            Some(path) => DatasetJson::read(&path)?.file_ending,
            None => file_ending_of(&self.input)?.to_owned(),
        };
        std::fs::create_dir_all(&self.output).with_context(|| format!("creating {}", self.output.display()))?;
        let real = |path: &Path| path.canonicalize().with_context(|| format!("opening {}", path.display()));
        anyhow::ensure!(
            real(&self.input)? != real(&self.output)?,
            "{} is input and output: the predictions would be lost; name another output",
            self.input.display()
        );
        let groups: Vec<String> = postprocessing.keep_largest.iter().map(|group| group.to_string()).collect();
        let what = if groups.is_empty() { "nothing: files are copied".into() } else { groups.join(", then ") };
        println!("largest component of: {what}");
        on_workers(self.workers, || {
            let bar = progress_bar("writing", 0);
            let observe = |files| count(&bar, files);
            let files = postprocessing.apply_to_folder(&self.input, &self.output, &ending, self.overwrite, &observe)?;
            bar.finish_and_clear();
            println!("segmentations in {}: {files}", self.output.display());
            Ok(())
        })
    }
}
