//! `voxgrad export`, `voxgrad export-zip`, `voxgrad install-zip`.

use super::model::ModelArguments;
use super::options::FolderArguments;
use anyhow::Context as _;
use std::path::PathBuf;
use voxgrad::exchange::{Bundle, Format, TrainedModel, export_zip, install_zip};

/// What was typed for `voxgrad export`.
#[derive(clap::Args)]
pub struct Export {
    /// Model folder, or a single checkpoint, of voxgrad or nnU-Net.
    #[arg(value_name = "MODEL")]
    source: PathBuf,
    /// nnunet: a model folder that nnUNetv2_predict_from_modelfolder reads. safetensors: one of voxgrad's own.
    #[arg(long, value_name = "FORMAT", value_parser = ["nnunet", "safetensors"])]
    to: String,
    /// The folder to make.
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
    /// Folds, such as 0 1 2, or all; those with a number that are there unless given. For a single checkpoint, the one
    /// fold that it becomes.
    #[arg(short, long = "folds", value_name = "FOLD", num_args = 1..)]
    folds: Vec<String>,
    /// Name of the checkpoints in the folders of the folds.
    #[arg(long, value_name = "NAME")]
    checkpoint_name: Option<String>,
}

impl Export {
    /// Writes the model once more.
    pub fn run(self) -> anyhow::Result<()> {
        let folds = self.folds.iter().map(|fold| fold.parse()).collect::<Result<Vec<_>, _>>()?;
        let model = if self.source.is_dir() {
            TrainedModel::open(&self.source, &folds, self.checkpoint_name.as_deref(), true)?
        } else {
            anyhow::ensure!(
                self.checkpoint_name.is_none(),
                "-chk is for model folders; {} is a file",
                self.source.display()
            );
            let mut model = TrainedModel::of_file(&self.source, true)?;
            match folds.as_slice() {
                [] => {}
                [fold] => model.folds.iter_mut().for_each(|one| one.fold = *fold),
                _ => anyhow::bail!("{} is one fold; -f names {}", self.source.display(), folds.len()),
            }
            model
        };
        let format = if self.to == "nnunet" { Format::Nnunet } else { Format::Safetensors };
        let notes = model.write(&self.output, format)?;
        model.notes.iter().chain(&notes).for_each(|note| eprintln!("note: {note}"));
        let folds: Vec<String> = model.folds.iter().map(|fold| fold.fold.to_string()).collect();
        println!("{}: {}, folds {}", self.output.display(), model.model.configuration_name, folds.join(", "));
        Ok(())
    }
}

/// What was typed for `voxgrad export-zip`.
#[derive(clap::Args)]
pub struct ExportZip {
    /// The archive to make.
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    model: ModelArguments,
    /// Pack the predictions of the validation cases too.
    #[arg(long, alias = "exp_cv_preds")]
    exp_cv_preds: bool,
}

impl ExportZip {
    /// Packs a model.
    pub fn run(self) -> anyhow::Result<()> {
        let model = self.model.folder()?.context("name the model: -d DATASET -c CONFIGURATION, or -m FOLDER")?;
        let model = model.canonicalize().with_context(|| format!("opening {}", model.display()))?;
        let folds = self.model.folds_of(&model)?;
        // RESULTS/DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION
        let results = model.ancestors().nth(2).context("a model folder lies in RESULTS/DATASET/")?.to_path_buf();
        let listed: Vec<String> = folds.iter().map(|fold| fold.to_string()).collect();
        let checkpoints = self.model.checkpoint_name.iter().cloned().collect();
        let bundle = Bundle { models: vec![model.clone()], folds, checkpoints, predictions: self.exp_cv_preds };
        let files = export_zip(&self.output, &results, &bundle)?;
        println!("{}: {files} files of {}, folds {}", self.output.display(), model.display(), listed.join(", "));
        Ok(())
    }
}

/// What was typed for `voxgrad install-zip`.
#[derive(clap::Args)]
pub struct InstallZip {
    /// The archive.
    #[arg(value_name = "FILE")]
    archive: PathBuf,
    /// Replace files that are there already.
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    folders: FolderArguments,
}

impl InstallZip {
    /// Unpacks models into the folder of results.
    pub fn run(self) -> anyhow::Result<()> {
        let results = self.folders.folders().results;
        let results = results.context("no folder of results: name it with --results, or set nnUNet_results")?;
        let installed = install_zip(&self.archive, &results, self.overwrite)?;
        for model in &installed.models {
            println!("installed {}", model.display());
        }
        println!("{} files", installed.files);
        Ok(())
    }
}
