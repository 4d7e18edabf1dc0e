//! `voxgrad evaluate`.

use anyhow::Context as _;
use std::path::{Path, PathBuf};
use voxgrad::dataset::{DatasetJson, LabelManager};
use voxgrad::eval::{Summary, evaluate_folder};
use voxgrad::io;

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
    let summary = evaluate_folder(references, predictions, file_ending, labels, chill)?;
    if !summary.passed_over.is_empty() {
        let names: Vec<String> = summary.passed_over.iter().map(|path| path.display().to_string()).collect();
        eprintln!("note: no cases, passed over: {}", names.join(", "));
    }
    summary.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    if let Some(folder) = output.parent() {
        io::remove_leftovers(folder)?;
    }
    summary.write(output).context("writing the summary")?;
    Ok(summary)
}

/// Prints the mean Dice of every class, and in how many cases it has one.
pub fn print(summary: &Summary, labels: &LabelManager) {
    let names = labels.foreground_names();
    let cases = summary.cases.len();
    println!("mean foreground Dice {:.4} over {} classes in {cases} cases", summary.foreground_dice(), names.len());
    let mut present = Vec::new();
    for (group, name) in names.iter().enumerate() {
        match summary.cases_with(group) {
            0 => println!("  {name}: NaN: neither predicted nor true in any case"),
            some => {
                let dice = summary.mean(group)[0];
                present.push(dice);
                println!("  {name}: {dice:.4} in {some} of {cases} cases");
            }
        }
    }
    if present.len() < names.len() && !present.is_empty() {
        let mean = present.iter().sum::<f64>() / present.len() as f64;
        println!("  without the {} classes that are NaN: {mean:.4}", names.len() - present.len());
    }
}
