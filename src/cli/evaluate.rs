//! `voxgrad evaluate`.

use anyhow::Context as _;
use std::path::{Path, PathBuf};
use voxgrad::dataset::{DatasetJson, LabelManager};
use voxgrad::eval::{CaseMeasures, Lesions, Measures, Summary, evaluate_folder};
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
    /// Measure surface distances, volumes and lesions too, and write them to this CSV file, a line for each case and class.
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Tolerance of the normalised surface Dice, in millimetres.
    #[arg(long, default_value_t = 1.0, value_name = "MM", requires = "csv")]
    tolerance: f64,
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
        if let Some(file) = &self.csv {
            let measures = summary.measure(&labels, self.tolerance)?;
            io::write_atomically(file, summary.csv(&labels, &measures, self.tolerance).as_bytes())?;
            print_measures(&measures, &labels, self.tolerance);
            println!("wrote {}", file.display());
        }
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

/// Prints distances and lesions of every class, and how much of the images the references say anything about.
fn print_measures(measures: &[CaseMeasures], labels: &LabelManager, tolerance: f64) {
    for (group, name) in labels.foreground_names().iter().enumerate() {
        let of = |unit: &str, measure: fn(&Measures) -> f64| {
            let values = measures.iter().filter_map(|case| case.groups.get(group)).map(measure);
            let finite: Vec<f64> = values.filter(|value| value.is_finite()).collect();
            let mean = finite.iter().sum::<f64>() / finite.len() as f64;
            match finite.len() {
                0 => "in no case".to_string(),
                count => format!("{mean:.3}{unit} in {count} of {} cases", measures.len()),
            }
        };
        let count = |lesions: fn(&Lesions) -> usize| {
            measures.iter().filter_map(|case| case.groups.get(group)).map(|m| lesions(&m.lesions)).sum::<usize>()
        };
        println!(
            "  {name}: HD95 {}; ASSD {}; NSD at {tolerance} mm {}; lesions: {} of {} found, {} of {} predicted invented",
            of(" mm", |m| m.surfaces.hausdorff_95),
            of(" mm", |m| m.surfaces.average),
            of("", |m| m.surfaces.within_tolerance),
            count(|l| l.found),
            count(|l| l.reference),
            count(|l| l.invented),
            count(|l| l.predicted),
        );
    }
    let annotated = measures.iter().map(|case| case.annotated).sum::<f64>() / measures.len().max(1) as f64;
    println!("  all measures look at annotated voxels only: {:.1} % of the references", 100.0 * annotated);
}
