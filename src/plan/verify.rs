//! Everything that is wrong with a raw dataset, found in one go.

use std::collections::BTreeMap;
use std::path::Path;

use ndarray::Axis;

use super::fingerprint::percentile;
use crate::dataset::splits::Split;
use crate::dataset::{CaseFiles, Dataset, DatasetJson, LabelManager};
use crate::error::{DatasetError, Error, Result};
use crate::preprocess::{CaseHeaders, Normalization, RawCase, in_parallel, label_counts};

/// What was found in a dataset.
#[derive(Debug)]
pub struct Verification {
    /// The dataset, without the cases that lack a file.
    pub dataset: Dataset,
    /// What makes it unusable: first what concerns names, then case by case.
    pub failures: Vec<Error>,
    /// What looks odd but does not stop anything.
    pub warnings: Vec<String>,
    /// Number of cases with nothing wrong.
    pub sound: usize,
    /// What is annotated in each of these, sorted by name; empty after a [`quick`] look.
    pub annotations: Vec<CaseLabels>,
}

/// The labels of one case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaseLabels {
    /// Case identifier.
    pub case: String,
    /// How many voxels of the raw label map have each label that occurs.
    pub label_counts: BTreeMap<i16, u64>,
}

impl Verification {
    /// The dataset and the warnings, if nothing is wrong.
    ///
    /// # Errors
    /// All failures in one error.
    pub fn passed(self) -> Result<(Dataset, Vec<String>)> {
        Error::all(self.failures)?;
        Ok((self.dataset, self.warnings))
    }
}

/// What can be said without reading voxels: names of files, headers, and whether the grids of a case agree. Fast enough to
/// be done before any work on a dataset.
///
/// # Errors
/// As [`verify`].
pub fn quick(folder: &Path) -> Result<Verification> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    look(folder, workers, |files, _| {
        let headers = CaseHeaders::read(files);
        Looked { shape: shape(&headers), failures: headers.failures, warnings: headers.warnings, label_counts: None }
    })
}

/// Reads every file of a dataset and reports all failures together. At most `workers` cases are in memory at a time;
/// `on_case` is called after each, from several threads.
///
/// # Errors
/// What makes it impossible to look further: an unreadable `dataset.json`, wrong labels, no images at all.
pub fn verify(folder: &Path, workers: usize, on_case: impl Fn(&str) + Sync) -> Result<Verification> {
    look(folder, workers, |files, Dataset { labels, json, .. }| {
        let headers = CaseHeaders::read(files);
        let (raw, mut failures) = RawCase::inspect(files, labels);
        if let Some(raw) = &raw {
            failures.extend(not_rgb(raw, files, json));
        }
        let label_counts = raw.and_then(|raw| Some(label_counts(raw.labels?.view())));
        on_case(&files.name);
        Looked { shape: shape(&headers), failures, warnings: headers.warnings, label_counts }
    })
}

/// What one case contributes.
struct Looked {
    shape: Option<[usize; 3]>,
    failures: Vec<Error>,
    warnings: Vec<String>,
    label_counts: Option<BTreeMap<i16, u64>>,
}

fn shape(headers: &CaseHeaders) -> Option<[usize; 3]> {
    headers.grid.as_ref().map(|(_, shape)| *shape)
}

fn look(folder: &Path, workers: usize, at: impl Fn(&CaseFiles, &Dataset) -> Looked + Sync) -> Result<Verification> {
    let (dataset, mut failures) = Dataset::inspect(folder)?;
    let mut warnings = dataset.labels.region_warnings();
    let (mut annotations, mut shapes, mut sound) = (Vec::new(), Vec::new(), 0);
    let looked = in_parallel(&dataset.cases, workers, |files| at(files, &dataset));
    for (files, mut case) in dataset.cases.iter().zip(looked) {
        sound += usize::from(case.failures.is_empty());
        failures.append(&mut case.failures);
        warnings.append(&mut case.warnings);
        shapes.extend(case.shape);
        annotations
            .extend(case.label_counts.map(|counts| CaseLabels { case: files.name.clone(), label_counts: counts }));
    }
    failures.extend(two_dimensional(folder, &shapes));
    if !annotations.is_empty() && failures.is_empty() {
        failures.extend(nothing_annotated(folder, &dataset.labels, &annotations));
    }
    Ok(Verification { dataset, failures, warnings, sound, annotations })
}

/// The normalisation of RGB channels refuses other values.
fn not_rgb(raw: &RawCase, files: &CaseFiles, json: &DatasetJson) -> Vec<Error> {
    let channels = raw.data.axis_iter(Axis(0)).zip(&files.images).zip(&json.channel_names).enumerate();
    channels
        .filter(|(_, (_, name))| Normalization::of_channel_name(name) == Normalization::RgbTo01)
        .filter_map(|(channel, ((data, path), _))| {
            let value = *data.iter().find(|value| !(0.0..=255.0).contains(*value))?;
            Some(Error::Dataset(DatasetError::NotRgbImage {
                case: raw.name.clone(),
                path: path.clone(),
                channel,
                value,
            }))
        })
        .collect()
}

/// A dataset without a voxel of any class teaches nothing, and has no intensities to measure.
fn nothing_annotated(folder: &Path, labels: &LabelManager, annotations: &[CaseLabels]) -> Option<Error> {
    let foreground = labels.foreground();
    let occurs = |label: &i16| foreground.iter().any(|group| group.contains(*label));
    let found = annotations.iter().any(|annotation| annotation.label_counts.keys().any(occurs));
    (!found).then(|| Error::Dataset(DatasetError::NothingAnnotated { folder: folder.into(), cases: annotations.len() }))
}

/// nnU-Net plans no 3-D network for a median image of one slice; here that holds for every direction.
fn two_dimensional(folder: &Path, shapes: &[[usize; 3]]) -> Option<Error> {
    let median = [0, 1, 2].map(|axis| {
        let along: Vec<f64> = shapes.iter().map(|shape| shape[axis] as f64).collect();
        percentile(&along, 50.0).round_ties_even() as usize
    });
    (!shapes.is_empty() && median.contains(&1))
        .then(|| Error::Dataset(DatasetError::TwoDimensional { folder: folder.into(), shape: median }))
}

/// Classes that no training case of a fold has, and cannot be learned there, or no validation case, so that nothing can be
/// said about them there. What no case has at all is not repeated for every fold.
pub fn fold_warnings(splits: &[Split], annotations: &[CaseLabels], labels: &LabelManager) -> Vec<String> {
    let groups = labels.foreground();
    let mut warnings = Vec::new();
    for (name, group) in labels.foreground_names().into_iter().zip(&groups) {
        let occurs = |annotation: &&CaseLabels| annotation.label_counts.keys().any(|&label| group.contains(label));
        let with: Vec<&str> = annotations.iter().filter(occurs).map(|annotation| annotation.case.as_str()).collect();
        if with.is_empty() {
            continue;
        }
        let without = |cases: &dyn Fn(&Split) -> &[String]| -> Vec<String> {
            let lacks = |split: &Split| !cases(split).iter().any(|case| with.contains(&case.as_str()));
            splits.iter().enumerate().filter(|(_, split)| lacks(split)).map(|(fold, _)| fold.to_string()).collect()
        };
        let training = without(&|split| &split.train);
        if !training.is_empty() {
            let folds = training.join(", ");
            warnings.push(format!("class {name} is in no training case of fold {folds}: it cannot be learned there"));
        }
        let validation = without(&|split| &split.val);
        if !validation.is_empty() {
            let folds = validation.join(", ");
            warnings.push(format!(
                "class {name} is in no validation case of fold {folds}: its pseudo Dice and scores are NaN there"
            ));
        }
    }
    warnings
}
