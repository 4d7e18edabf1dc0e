//! `voxgrad evaluate`.

use anyhow::Context as _;
use std::path::{Path, PathBuf};
use voxgrad::dataset::{DatasetJson, LabelManager};
use voxgrad::eval::{Summary, evaluate_folder};

/// What was typed.
#[derive(clap::Args)]
pub struct Evaluate {
    /// Folder of the references.
    references: PathBuf,
    /// Folder of the predictions, files of the same names.
    predictions: PathBuf,
    /// The dataset's description: labels, regions, ignore label.
    #[arg(long = "dataset-json", visible_alias = "djfile", value_name = "FILE")]
    dataset: PathBuf,
    /// Where the summary goes; summary.json beside the predictions unless given.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Accept references without a prediction.
    #[arg(long)]
    chill: bool,
}

impl Evaluate {
    /// Scores and prints.
    pub fn run(self) -> anyhow::Result<()> {
        let dataset = DatasetJson::read(&self.dataset)?;
        let labels = LabelManager::new(&dataset)?;
        let output = self.output.unwrap_or_else(|| self.predictions.join("summary.json"));
        let summary = score(&self.references, &self.predictions, &dataset.file_ending, &labels, self.chill, &output)?;
        print(&summary, &labels);
        println!("wrote {}", output.display());
        Ok(())
    }
}

/// Scores a folder and writes the summary.
pub fn score(
    references: &Path,
    predictions: &Path,
    file_ending: &str,
    labels: &LabelManager,
    chill: bool,
    output: &Path,
) -> anyhow::Result<Summary> {
    let (groups, ignore) = (labels.foreground(), labels.ignore_label());
    let summary = evaluate_folder(references, predictions, file_ending, &groups, ignore, chill)?;
    summary.write(output).context("writing the summary")?;
    Ok(summary)
}

/// Prints the mean Dice of every class.
pub fn print(summary: &Summary, labels: &LabelManager) {
    println!("mean foreground Dice {:.4} over {} cases", summary.foreground_dice(), summary.cases.len());
    for (group, name) in labels.foreground_names().iter().enumerate() {
        println!("  {name}: {:.4}", summary.mean(group)[0]);
    }
}
