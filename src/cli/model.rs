//! Which trained model is meant: a folder, a dataset whose results have it, or one checkpoint.

use super::options::FolderArguments;
use std::path::{Path, PathBuf};
use voxgrad::dataset::splits::Fold;
use voxgrad::exchange::{CHECKPOINTS, TrainedModel, folds_in};

/// Trainers whose folders are looked for unless one is named: nnU-Net's and this program's.
const TRAINERS: [&str; 2] = ["nnUNetTrainer", "voxgradTrainer"];

/// A model in a folder or among the results of a dataset.
#[derive(clap::Args)]
pub struct ModelArguments {
    /// Model folder, nnU-Net's or voxgrad's: plans.json, dataset.json, fold_0, fold_1, ...
    #[arg(short, long, value_name = "FOLDER", conflicts_with_all = ["model_dataset", "configuration", "trainer", "plans"])]
    pub model: Option<PathBuf>,
    /// Number or name of a dataset, whose model lies in the folder of results.
    #[arg(short, long = "dataset", id = "model_dataset", value_name = "DATASET", requires = "configuration")]
    pub dataset: Option<String>,
    /// Configuration of that model, such as 3d_fullres.
    #[arg(short, long, value_name = "CONFIGURATION", requires = "model_dataset")]
    pub configuration: Option<String>,
    /// Trainer of that model; nnUNetTrainer or voxgradTrainer, whichever has results, unless given.
    #[arg(long, value_name = "TRAINER", requires = "model_dataset")]
    pub trainer: Option<String>,
    /// Name of that model's plans.
    #[arg(short, long, value_name = "PLANS", requires = "model_dataset")]
    pub plans: Option<String>,
    /// Folds, such as 0 1 2, or all; those with a number that are there unless given.
    #[arg(short, long = "folds", value_name = "FOLD", num_args = 1..)]
    pub folds: Vec<String>,
    /// Name of the checkpoints in the folders of the folds; checkpoint_final.pth or checkpoint_final.safetensors unless
    /// given.
    #[arg(long, value_name = "NAME")]
    pub checkpoint_name: Option<String>,
    #[command(flatten)]
    pub folders: FolderArguments,
}

impl ModelArguments {
    /// The folds that were named.
    pub fn folds(&self) -> anyhow::Result<Vec<Fold>> {
        let mut folds = Vec::with_capacity(self.folds.len());
        for text in &self.folds {
            let fold: Fold = text.parse()?;
            // It would count twice in the mean.
            anyhow::ensure!(!folds.contains(&fold), "-f names fold {fold} twice");
            folds.push(fold);
        }
        Ok(folds)
    }

    /// The folder of the model, if one was meant.
    pub fn folder(&self) -> anyhow::Result<Option<PathBuf>> {
        if self.model.is_some() {
            return Ok(self.model.clone());
        }
        let (Some(dataset), Some(configuration)) = (&self.dataset, &self.configuration) else { return Ok(None) };
        let folders = self.folders.folders();
        let results = folders.results_of(&folders.locate(dataset)?.name)?;
        let plans = self.plans.as_deref().unwrap_or("nnUNetPlans");
        // What was trained here as one of nnU-Net's classes has a name of its own.
        let trainers = match self.trainer.as_deref() {
            None => TRAINERS.map(String::from).to_vec(),
            Some(name) => match name.strip_prefix("nnUNetTrainer") {
                Some(variant) => vec![name.into(), format!("voxgradTrainer{variant}")],
                None => vec![name.into()],
            },
        };
        let names: Vec<PathBuf> =
            trainers.iter().map(|trainer| results.join(format!("{trainer}__{plans}__{configuration}"))).collect();
        let there: Vec<&PathBuf> = match (&self.trainer, names.first()) {
            // Exactly what was named.
            (Some(_), Some(named)) if named.is_dir() => vec![named],
            _ => names.iter().filter(|folder| folder.is_dir()).collect(),
        };
        let shown = |folders: &[&PathBuf]| {
            folders.iter().map(|folder| folder.display().to_string()).collect::<Vec<_>>().join(" and ")
        };
        match there.as_slice() {
            [folder] => Ok(Some(folder.to_path_buf())),
            [] => anyhow::bail!(
                "no trained model: {} {}; -tr names the trainer, -p the plans",
                shown(&names.iter().collect::<Vec<_>>()),
                if names.len() == 1 { "does not exist" } else { "do not exist" }
            ),
            several => anyhow::bail!("there are {}: name the trainer with -tr", shown(several)),
        }
    }

    /// Reads the model of a folder.
    pub fn open(&self, folder: &Path, momenta: bool) -> anyhow::Result<TrainedModel> {
        Ok(TrainedModel::open(folder, &self.folds()?, self.checkpoint_name.as_deref(), momenta)?)
    }

    /// The folds that were named, or all with numbers in a folder.
    pub fn folds_of(&self, folder: &Path) -> anyhow::Result<Vec<Fold>> {
        let named = self.folds()?;
        if !named.is_empty() {
            return Ok(named);
        }
        let names = self.checkpoint_name.as_deref().map_or(CHECKPOINTS.to_vec(), |name| vec![name]);
        let mut folds = folds_in(folder, &names)?;
        folds.retain(|fold| *fold != Fold::All);
        anyhow::ensure!(!folds.is_empty(), "{}: no fold has {}", folder.display(), names.join(" or "));
        Ok(folds)
    }
}
