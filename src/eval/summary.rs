//! `summary.json`: metrics of a folder of segmentations, byte for byte in nnU-Net's layout.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use ndarray::ArrayView3;
use rayon::prelude::*;

use super::confusion::{Confusion, nan_mean};
use crate::dataset::{LabelGroup, LabelManager};
use crate::error::{Error, EvaluateError, Result};
use crate::io;
use crate::io::grid_difference;

/// Metrics of one case, parallel to the evaluated labels or regions.
#[derive(Debug, Clone, PartialEq)]
pub struct CaseResult {
    /// Counts over annotated voxels.
    pub counts: Vec<Confusion>,
    /// The prediction.
    pub prediction_file: PathBuf,
    /// What it was compared with.
    pub reference_file: PathBuf,
}

/// Metrics of many cases.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// The evaluated labels or regions.
    pub groups: Vec<LabelGroup>,
    /// One entry per case.
    pub cases: Vec<CaseResult>,
    /// What looks odd but does not stop anything, such as labels that nobody declared.
    pub warnings: Vec<String>,
    /// Files that were taken for no case, although they end like one.
    pub passed_over: Vec<PathBuf>,
}

/// Names of the metrics in the order in which they are written.
pub const METRICS: [&str; 8] = ["Dice", "FN", "FP", "IoU", "TN", "TP", "n_pred", "n_ref"];

/// Values of [`METRICS`] for one label or region of one case.
pub fn metrics(counts: &Confusion) -> [f64; 8] {
    let (tp, fp) = (counts.true_positives, counts.false_positives);
    let (fn_, tn) = (counts.false_negatives, counts.true_negatives);
    [counts.dice(), fn_ as f64, fp as f64, counts.iou(), tn as f64, tp as f64, (tp + fp) as f64, (tp + fn_) as f64]
}

/// Counts every group in one case. Shapes must agree.
pub fn evaluate_case(
    prediction: ArrayView3<i16>,
    reference: ArrayView3<i16>,
    groups: &[LabelGroup],
    ignore: Option<i16>,
) -> Vec<Confusion> {
    groups.iter().map(|group| Confusion::count(prediction, reference, group, ignore)).collect()
}

/// Compares all segmentations of a folder with the references of the same names. Names that begin with `._`, which macOS
/// leaves on foreign disks, are passed over.
///
/// # Errors
/// [`EvaluateError::NothingToEvaluate`]; [`EvaluateError::ReferenceMissing`]; [`EvaluateError::PredictionMissing`] unless `allow_missing`;
/// [`EvaluateError::EvaluationGrid`]; the errors of reading NIfTI; [`Error::Several`] with all of them.
pub fn evaluate_folder(
    references: &Path,
    predictions: &Path,
    file_ending: &str,
    labels: &LabelManager,
    allow_missing: bool,
) -> Result<Summary> {
    let (predicted, mut passed_over) = files(predictions, file_ending)?;
    if predicted.is_empty() {
        return Err(Error::Evaluate(EvaluateError::NothingToEvaluate {
            path: predictions.into(),
            ending: file_ending.into(),
        }));
    }
    let (known, beside_references) = files(references, file_ending)?;
    passed_over.extend(beside_references);
    let without_reference = predicted
        .difference(&known)
        .map(|file| Error::Evaluate(EvaluateError::ReferenceMissing { path: references.join(file) }));
    let mut faults: Vec<Error> = without_reference.collect();
    if !allow_missing {
        let missing = known.difference(&predicted);
        faults.extend(
            missing.map(|file| Error::Evaluate(EvaluateError::PredictionMissing { path: predictions.join(file) })),
        );
    }
    let groups = labels.foreground();
    let both: Vec<&String> = predicted.intersection(&known).collect();
    let compared: Vec<Result<(CaseResult, Vec<String>)>> =
        both.par_iter().map(|file| compare(&predictions.join(file), &references.join(file), &groups, labels)).collect();
    let (mut cases, mut warnings) = (Vec::with_capacity(both.len()), Vec::new());
    for result in compared {
        match result {
            Ok((case, found)) => {
                cases.push(case);
                warnings.extend(found);
            }
            Err(error) => faults.push(error),
        }
    }
    match Error::several(faults) {
        Some(error) => Err(error),
        None => Ok(Summary { groups, cases, warnings, passed_over }),
    }
}

/// Scores a case, and says which labels are in it that nobody declared.
fn compare(
    prediction_file: &Path,
    reference_file: &Path,
    groups: &[LabelGroup],
    labels: &LabelManager,
) -> Result<(CaseResult, Vec<String>)> {
    let prediction = io::read_labels(prediction_file)?;
    let reference = io::read_labels(reference_file)?;
    let grid = |map: &io::LabelMap| map.data.dim().into();
    let (found, expected) = (grid(&prediction), grid(&reference));
    if let Some(problem) = grid_difference((&prediction.geometry, found), (&reference.geometry, expected)) {
        return Err(Error::Evaluate(EvaluateError::EvaluationGrid { path: prediction_file.into(), problem }));
    }
    let ignore = labels.ignore_label();
    let mut warnings = Vec::new();
    // The ignore label is for annotations: nothing predicts it.
    for (file, map, ignore) in [(prediction_file, &prediction, None), (reference_file, &reference, ignore)] {
        let known: Vec<i16> = labels.all_labels().iter().copied().chain(ignore).collect();
        for (label, voxels) in undeclared(map.data.view(), &known) {
            warnings.push(format!(
                "{}: {voxels} voxels hold label {label}, which is none of {known:?}: they count as no class",
                file.display()
            ));
        }
    }
    let counts = evaluate_case(prediction.data.view(), reference.data.view(), groups, ignore);
    let (prediction_file, reference_file) = (prediction_file.into(), reference_file.into());
    Ok((CaseResult { counts, prediction_file, reference_file }, warnings))
}

/// Voxels of every label that is not among the known ones.
fn undeclared(map: ArrayView3<i16>, known: &[i16]) -> BTreeMap<i16, u64> {
    let mut unknown = vec![true; 1 << 16];
    known.iter().for_each(|&label| unknown[usize::from(label as u16)] = false);
    let mut counts = BTreeMap::new();
    for &label in map.iter().filter(|&&label| unknown[usize::from(label as u16)]) {
        *counts.entry(label).or_insert(0) += 1;
    }
    counts
}

/// Names of a folder's files with this ending, and the files that are passed over.
fn files(folder: &Path, ending: &str) -> Result<(BTreeSet<String>, Vec<PathBuf>)> {
    let (mut names, mut passed_over) = (BTreeSet::new(), Vec::new());
    for entry in fs::read_dir(folder).map_err(Error::io(folder, "list"))? {
        let entry = entry.map_err(Error::io(folder, "list"))?;
        match entry.file_name().into_string() {
            Ok(name) if !name.ends_with(ending) => {}
            Ok(name) if name.starts_with("._") => passed_over.push(entry.path()),
            Ok(name) => _ = names.insert(name),
            Err(_) => passed_over.push(entry.path()),
        }
    }
    Ok((names, passed_over))
}

impl Summary {
    /// Mean of each metric over the cases in which it is defined, for one label or region by its index.
    pub fn mean(&self, group: usize) -> [f64; 8] {
        let per_case: Vec<[f64; 8]> =
            self.cases.iter().filter_map(|case| case.counts.get(group).map(metrics)).collect();
        std::array::from_fn(|metric| nan_mean(per_case.iter().map(|values| values[metric])))
    }

    /// Cases that count in the mean Dice of one label or region by its index: those in which it is predicted or true.
    pub fn cases_with(&self, group: usize) -> usize {
        let dice = self.cases.iter().filter_map(|case| case.counts.get(group).map(Confusion::dice));
        dice.filter(|dice| !dice.is_nan()).count()
    }

    /// Mean of [`mean`](Self::mean) over the foreground; NaN as soon as one label is NaN in every case, as upstream.
    pub fn foreground_mean(&self) -> [f64; 8] {
        let means: Vec<[f64; 8]> = (0..self.groups.len())
            .filter(|&group| self.groups[group] != LabelGroup::Label(0))
            .map(|group| self.mean(group))
            .collect();
        std::array::from_fn(|metric| means.iter().map(|mean| mean[metric]).sum::<f64>() / means.len() as f64)
    }

    /// Mean Dice of the foreground, the number to compare models by.
    pub fn foreground_dice(&self) -> f64 {
        self.foreground_mean()[0]
    }

    /// The text of `summary.json`: keys sorted, four spaces, NaN bare (which strict JSON readers refuse).
    pub fn to_json(&self) -> String {
        let mut order: Vec<(String, usize)> =
            self.groups.iter().enumerate().map(|(index, group)| (group.to_string(), index)).collect();
        order.sort();
        let by_group = |values: &dyn Fn(usize) -> Json<'static>| {
            let entries = order.iter().map(|(key, index)| (key.as_str(), values(*index)));
            Json::Object(entries.collect())
        };
        let cases = self.cases.iter().map(|case| {
            let file = |path: &Path| Json::Text(path.to_string_lossy().into_owned());
            Json::Object(vec![
                ("metrics", by_group(&|group| integer_metrics(&case.counts[group]))),
                ("prediction_file", file(&case.prediction_file)),
                ("reference_file", file(&case.reference_file)),
            ])
        });
        let summary = Json::Object(vec![
            ("foreground_mean", float_metrics(self.foreground_mean())),
            ("mean", by_group(&|group| float_metrics(self.mean(group)))),
            ("metric_per_case", Json::List(cases.collect())),
        ]);
        let mut text = String::new();
        summary.write(&mut text, 0);
        text
    }

    /// Writes `summary.json`.
    ///
    /// # Errors
    /// [`FileError::Io`](crate::error::FileError::Io).
    pub fn write(&self, path: &Path) -> Result<()> {
        io::write_atomically(path, self.to_json().as_bytes())
    }
}

fn float_metrics(values: [f64; 8]) -> Json<'static> {
    let entries = METRICS.into_iter().zip(values.map(Json::Float));
    Json::Object(entries.collect())
}

/// Counts of a single case are integers, only their means are not.
fn integer_metrics(counts: &Confusion) -> Json<'static> {
    let entries = METRICS.into_iter().zip(metrics(counts));
    let typed = entries.map(|(name, value)| match name {
        "Dice" | "IoU" => (name, Json::Float(value)),
        _ => (name, Json::Integer(value as u64)),
    });
    Json::Object(typed.collect())
}

/// What `serde_json` cannot write: bare NaN, and Python's way to print floats.
enum Json<'a> {
    Object(Vec<(&'a str, Json<'a>)>),
    List(Vec<Json<'a>>),
    Text(String),
    Integer(u64),
    Float(f64),
}

impl Json<'_> {
    fn write(&self, out: &mut String, depth: usize) {
        let line = |out: &mut String, depth: usize| {
            out.push('\n');
            out.extend(std::iter::repeat_n("    ", depth));
        };
        match self {
            Json::Object(entries) => {
                out.push('{');
                for (index, (key, value)) in entries.iter().enumerate() {
                    out.push_str(if index == 0 { "" } else { "," });
                    line(out, depth + 1);
                    write_text(out, key);
                    out.push_str(": ");
                    value.write(out, depth + 1);
                }
                line(out, depth);
                out.push('}');
            }
            Json::List(values) => {
                out.push('[');
                for (index, value) in values.iter().enumerate() {
                    out.push_str(if index == 0 { "" } else { "," });
                    line(out, depth + 1);
                    value.write(out, depth + 1);
                }
                line(out, depth);
                out.push(']');
            }
            Json::Text(text) => write_text(out, text),
            // Writing to a String cannot fail.
            Json::Integer(value) => _ = write!(out, "{value}"),
            Json::Float(value) => write_float(out, *value),
        }
    }
}

fn write_text(out: &mut String, text: &str) {
    out.push_str(&serde_json::Value::from(text).to_string());
}

/// As Python's `repr`: shortest digits that read back equal, exponents of at least two digits.
fn write_float(out: &mut String, value: f64) {
    if value.is_nan() {
        out.push_str("NaN");
        return;
    }
    let text = format!("{value:?}");
    match text.split_once("e-") {
        Some((digits, exponent)) if exponent.len() == 1 => {
            out.push_str(digits.trim_end_matches(".0"));
            out.push_str("e-0");
            out.push_str(exponent);
        }
        _ => out.push_str(&text),
    }
}
