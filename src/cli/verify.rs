//! `voxgrad verify`.

use super::options::{Shown, Which};
use super::summary;
use anyhow::Context as _;
use std::path::Path;
use voxgrad::dataset::folders::{Folders, Located};
use voxgrad::dataset::splits::{self, Split};
use voxgrad::dataset::{Dataset, LabelManager};
use voxgrad::error::PlanError;
use voxgrad::plan::verify::{self, Verification};
use voxgrad::preprocess::CaseReport;

/// What was typed.
#[derive(clap::Args)]
pub struct Verify {
    #[command(flatten)]
    which: Which,
    /// Cases that are read, and kept in memory, at a time; all processor cores unless given. Fewer need less memory.
    #[arg(long, visible_alias = "np", value_name = "N")]
    workers: Option<usize>,
    #[command(flatten)]
    shown: Shown,
}

impl Verify {
    /// Checks all datasets before it complains about any.
    pub fn run(self) -> anyhow::Result<()> {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let workers = self.workers.filter(|&n| n > 0).unwrap_or_else(cores);
        let (mut bad, folders) = (0, self.which.folders.folders());
        for located in self.which.located()? {
            bad += usize::from(check(&located, &folders, workers, &self.shown)? > 0);
        }
        anyhow::ensure!(bad == 0, "{bad} of {} datasets cannot be used as they are", self.which.count());
        Ok(())
    }
}

/// Opens a dataset that passes what can be said without reading voxels; prints what looks odd.
pub fn quickly(raw: &Path) -> anyhow::Result<Dataset> {
    let (dataset, warnings) = verify::quick(raw)?.passed().with_context(|| {
        format!("{} cannot be used as it is; `voxgrad verify` looks into the files too", raw.display())
    })?;
    dataset.notes.iter().for_each(|note| eprintln!("note: {note}"));
    warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    Ok(dataset)
}

/// Reads a whole dataset, prints what is wrong with it and what is annotated, and returns the number of failures.
pub fn check(located: &Located, folders: &Folders, workers: usize, shown: &Shown) -> anyhow::Result<usize> {
    let raw = located.raw()?;
    let bar = shown.bar("verifying", 0);
    bar.set_length(Dataset::inspect(raw).map_or(0, |(dataset, _)| dataset.cases.len() as u64));
    let result = verify::verify(raw, workers, |case| shown.done(&bar, "read", case));
    bar.finish_and_clear();
    let mut found = match result {
        Ok(found) => found,
        Err(error) => {
            eprintln!("{}: {error}", located.name);
            return Ok(1);
        }
    };
    describe(&located.name, &mut found, raw, folders);
    found.dataset.notes.iter().for_each(|note| eprintln!("note: {note}"));
    found.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    found.failures.iter().for_each(|failure| eprintln!("{}: {failure}", located.name));
    let complete = found.dataset.cases.len();
    match found.failures.len() {
        0 => println!("{}: {complete} cases, nothing wrong", located.name),
        failures => {
            let meant = complete.max(found.dataset.json.num_training);
            println!("{}: {failures} failures; {} of {meant} cases have nothing wrong", located.name, found.sound);
        }
    }
    Ok(found.failures.len())
}

/// Prints what the cases hold, and adds what follows from it to the warnings and failures.
fn describe(name: &str, found: &mut Verification, raw: &Path, folders: &Folders) {
    let labels = found.dataset.labels.clone();
    regions(&labels);
    let reports: Vec<CaseReport> = found
        .annotations
        .iter()
        .map(|annotation| CaseReport {
            name: annotation.case.clone(),
            label_counts: annotation.label_counts.clone(),
            resumed: false,
            warnings: Vec::new(),
        })
        .collect();
    if reports.is_empty() {
        return;
    }
    println!("{name}: what is annotated");
    summary::table(&labels, &reports);
    found.warnings.extend(summary::warnings(&labels, &reports));
    // Which folds lack a class can be said only where every case was counted.
    if !found.failures.is_empty() {
        return;
    }
    match folds(&found.dataset.case_names(), raw, name, folders) {
        Ok((splits, source)) => {
            println!("  folds: {source}");
            found.warnings.extend(verify::fold_warnings(&splits, &found.annotations, &labels));
        }
        Err(error @ voxgrad::Error::Plan(PlanError::TooFewCases { .. })) => found.warnings.push(error.to_string()),
        Err(error) => found.failures.push(error),
    }
}

/// The splits that training would use, and where they come from.
fn folds(cases: &[String], raw: &Path, name: &str, folders: &Folders) -> voxgrad::Result<(Vec<Split>, String)> {
    let prepared = folders.preprocessed_of(name).ok().map(|folder| folder.join("splits_final.json"));
    let beside = raw.join("splits_final.json");
    match prepared.into_iter().chain([beside]).find(|file| file.exists()) {
        Some(file) => Ok((splits::read(&file, cases)?, format!("those of {}", file.display()))),
        None => Ok((splits::k_fold(cases)?, "nnU-Net's five (there is no splits_final.json)".into())),
    }
}

/// What is written for each region.
fn regions(labels: &LabelManager) {
    let regions = labels.written_regions();
    if regions.is_empty() {
        return;
    }
    println!("region -> value written (in this order, later ones over earlier ones)");
    for (name, group, value) in regions {
        println!("  {name} {group} -> {value}");
    }
}
