//! How much of what is annotated.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use ndarray::{ArrayView3, Axis};
use serde::Serialize;

use super::drawn::Drawn;
use crate::dataset::{Dataset, LabelManager};
use crate::error::{Error, Result};
use crate::io;
use crate::preprocess::in_parallel;

/// The annotation of a case.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CaseReport {
    /// Case identifier.
    pub case: String,
    /// What was done to it.
    pub scheme: &'static str,
    /// Extent (z, y, x).
    pub shape: [usize; 3],
    /// Voxels with a label.
    pub annotated: u64,
    /// Background and classes.
    pub classes: Vec<ClassReport>,
}

/// The annotation of a class in a case.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ClassReport {
    /// Name, with the regions that hold the label where the dataset has regions.
    pub name: String,
    /// Label value.
    pub label: i16,
    /// Voxels in the dense reference.
    pub voxels: u64,
    /// Voxels of these that are annotated.
    pub annotated: u64,
    /// Slices across z in which some are annotated.
    pub slices: u64,
    /// Strokes that drawing the annotation would take, roughly: connected pieces of scribbles, or of what is annotated in
    /// the slices that were drawn on.
    pub strokes: u64,
}

impl CaseReport {
    /// All voxels of the volume.
    pub fn voxels(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64
    }

    /// Share of the voxels with a label.
    pub fn share(&self) -> f64 {
        self.annotated as f64 / self.voxels().max(1) as f64
    }

    pub(crate) fn new(
        case: &str,
        scheme: &'static str,
        dense: ArrayView3<i16>,
        annotation: &Drawn,
        names: &[(i16, String)],
    ) -> Self {
        let counts = |volume: ArrayView3<i16>| {
            let mut counts: BTreeMap<i16, u64> = BTreeMap::new();
            volume.iter().for_each(|&label| *counts.entry(label).or_default() += 1);
            counts
        };
        let (all, annotated) = (counts(dense), counts(annotation.labels.view()));
        let mut slices: BTreeMap<i16, u64> = BTreeMap::new();
        for plane in annotation.labels.axis_iter(Axis(0)) {
            let present: BTreeSet<i16> = plane.iter().copied().collect();
            present.into_iter().for_each(|label| *slices.entry(label).or_default() += 1);
        }
        let of = |counts: &BTreeMap<i16, u64>, label: i16| counts.get(&label).copied().unwrap_or(0);
        let classes: Vec<ClassReport> = names
            .iter()
            .map(|(label, name)| ClassReport {
                name: name.clone(),
                label: *label,
                voxels: of(&all, *label),
                annotated: of(&annotated, *label),
                slices: of(&slices, *label),
                strokes: of(&annotation.strokes, *label),
            })
            .collect();
        CaseReport {
            case: case.into(),
            scheme,
            shape: dense.dim().into(),
            annotated: classes.iter().map(|class| class.annotated).sum(),
            classes,
        }
    }
}

/// What a dense dataset has annotated, as [`sparsify_dataset`](super::sparsify_dataset) reports it of a sparse one.
///
/// # Errors
/// Those of reading label files, all of them.
pub fn report_dense(dataset: &Dataset, workers: usize) -> Result<Vec<CaseReport>> {
    let names = label_names(&dataset.labels);
    let ignore =
        dataset.labels.ignore_label().or_else(|| dataset.labels.all_labels().last().map(|highest| highest + 1));
    let ignore = ignore.unwrap_or(0);
    let reports = in_parallel(&dataset.cases, workers, |case| -> Result<CaseReport> {
        let path = case.label.as_deref().unwrap_or(Path::new(""));
        let dense = io::read_labels(path)?.data;
        let annotation = Drawn::whole(dense.clone(), ignore);
        Ok(CaseReport::new(&case.name, "dense", dense.view(), &annotation, &names))
    });
    let (mut cases, mut failures) = (Vec::with_capacity(reports.len()), Vec::new());
    for report in reports {
        match report {
            Ok(case) => cases.push(case),
            Err(failure) => failures.push(failure),
        }
    }
    Error::all(failures)?;
    Ok(cases)
}

/// Names for label values, background included; where there are regions, of the regions that hold each label.
pub(crate) fn label_names(labels: &LabelManager) -> Vec<(i16, String)> {
    let (groups, names) = (labels.foreground(), labels.foreground_names());
    let name = |label: i16| {
        let holding: Vec<&str> =
            groups.iter().zip(&names).filter(|(group, _)| group.contains(label)).map(|(_, name)| *name).collect();
        match (label, holding[..].is_empty()) {
            (0, _) => "background".to_owned(),
            (_, true) => format!("label {label}"),
            _ if labels.has_regions() => format!("{label} ({})", holding.join(", ")),
            _ => holding.join(", "),
        }
    };
    labels.all_labels().iter().map(|&label| (label, name(label))).collect()
}

/// Classes and cases from which nothing can be learned.
pub(crate) fn warnings(cases: &[CaseReport]) -> Vec<String> {
    let mut found = Vec::new();
    let bare: Vec<&str> = cases.iter().filter(|c| c.annotated == 0).map(|c| c.case.as_str()).collect();
    if !bare.is_empty() {
        found.push(format!(
            "{} without any annotation, nothing is learned from them: {}",
            count(bare.len()),
            some(&bare)
        ));
    }
    let Some(first) = cases.first() else { return found };
    for (index, class) in first.classes.iter().enumerate() {
        let holding = || cases.iter().filter(|case| case.classes[index].voxels > 0);
        let missing: Vec<&str> = holding()
            .filter(|case| case.annotated > 0 && case.classes[index].annotated == 0)
            .map(|case| case.case.as_str())
            .collect();
        let name = &class.name;
        if holding().all(|case| case.classes[index].annotated == 0) {
            found.push(match class.label {
                0 => "background is annotated nowhere: nothing tells the network where the classes end; annotate some \
                      background too"
                    .into(),
                _ => format!("{name} is annotated nowhere: it cannot be learned"),
            });
        } else if !missing.is_empty() {
            let without = count(missing.len());
            found.push(format!("{name} is there but not annotated in {without}: {}", some(&missing)));
        }
    }
    found
}

fn count(cases: usize) -> String {
    if cases == 1 { "1 case".into() } else { format!("{cases} cases") }
}

/// The first few names.
fn some(names: &[&str]) -> String {
    const SHOWN: usize = 8;
    let list = names[..names.len().min(SHOWN)].join(", ");
    if names.len() > SHOWN { format!("{list}, ...") } else { list }
}

/// A line for every class, over all cases, and one for every case.
pub fn table(cases: &[CaseReport]) -> String {
    let mut text = String::new();
    let Some(first) = cases.first() else { return text };
    let percent = |part: u64, whole: u64| 100.0 * part as f64 / whole.max(1) as f64;
    let width = first.classes.iter().map(|class| class.name.len()).max().unwrap_or(0).max(10);
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "{:<width$}  {:>13}  {:>13}  {:>8}  {:>9}  {:>9}",
        "class", "voxels", "annotated", "% of it", "slices", "strokes"
    );
    for index in 0..first.classes.len() {
        let sum = |value: fn(&ClassReport) -> u64| cases.iter().map(|case| value(&case.classes[index])).sum::<u64>();
        let (voxels, annotated) = (sum(|class| class.voxels), sum(|class| class.annotated));
        let _ = writeln!(
            text,
            "{:<width$}  {voxels:>13}  {annotated:>13}  {:>8.3}  {:>9}  {:>9}",
            first.classes[index].name,
            percent(annotated, voxels),
            sum(|class| class.slices),
            sum(|class| class.strokes),
        );
    }
    let width = cases.iter().map(|case| case.case.len()).max().unwrap_or(0).max(10);
    let headings: String = first.classes.iter().map(|class| format!("  {:>12}", class.name)).collect();
    let _ = writeln!(text, "\n{:<width$}  {:<9}  {:>9}  {:>7}{headings}", "case", "scheme", "annotated", "strokes");
    for case in cases {
        let shares: String = case
            .classes
            .iter()
            .map(|class| match class.voxels {
                0 => format!("  {:>1$}", "-", class.name.len().max(12)),
                voxels => format!("  {:>1$.3} %", percent(class.annotated, voxels), class.name.len().max(12) - 2),
            })
            .collect();
        let strokes: u64 = case.classes.iter().map(|class| class.strokes).sum();
        let _ = writeln!(
            text,
            "{:<width$}  {:<9}  {:>7.3} %  {strokes:>7}{shares}",
            case.case,
            case.scheme,
            100.0 * case.share(),
        );
    }
    text
}
