//! `summary.json`: metrics of a folder of segmentations, byte for byte in nnU-Net's layout.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use ndarray::ArrayView3;
use rayon::prelude::*;

use super::confusion::{Confusion, nan_mean};
use crate::dataset::LabelGroup;
use crate::error::{Error, Result};
use crate::io;

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

/// Compares all segmentations of a folder with the references of the same names.
///
/// # Errors
/// [`Error::NothingToEvaluate`]; [`Error::ReferenceMissing`]; [`Error::PredictionMissing`] unless `allow_missing`;
/// [`Error::EvaluationShape`]; the errors of reading NIfTI.
pub fn evaluate_folder(
    references: &Path,
    predictions: &Path,
    file_ending: &str,
    groups: &[LabelGroup],
    ignore: Option<i16>,
    allow_missing: bool,
) -> Result<Summary> {
    let predicted = files(predictions, file_ending)?;
    if predicted.is_empty() {
        return Err(Error::NothingToEvaluate { path: predictions.into(), ending: file_ending.into() });
    }
    let known = files(references, file_ending)?;
    if let Some(file) = predicted.difference(&known).next() {
        return Err(Error::ReferenceMissing { path: references.join(file) });
    }
    if let (false, Some(file)) = (allow_missing, known.difference(&predicted).next()) {
        return Err(Error::PredictionMissing { path: predictions.join(file) });
    }
    let cases = predicted
        .par_iter()
        .map(|file| {
            let (prediction_file, reference_file) = (predictions.join(file), references.join(file));
            let prediction = io::read_labels(&prediction_file)?.data;
            let reference = io::read_labels(&reference_file)?.data;
            if prediction.dim() != reference.dim() {
                return Err(Error::EvaluationShape {
                    path: prediction_file,
                    found: prediction.dim().into(),
                    expected: reference.dim().into(),
                });
            }
            Ok(CaseResult {
                counts: evaluate_case(prediction.view(), reference.view(), groups, ignore),
                prediction_file,
                reference_file,
            })
        })
        .collect::<Result<_>>()?;
    Ok(Summary { groups: groups.to_vec(), cases })
}

fn files(folder: &Path, ending: &str) -> Result<BTreeSet<String>> {
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder, "list"))? {
        let entry = entry.map_err(Error::io(folder, "list"))?;
        if let Ok(name) = entry.file_name().into_string()
            && name.ends_with(ending)
        {
            names.insert(name);
        }
    }
    Ok(names)
}

impl Summary {
    /// Mean of each metric over the cases in which it is defined, for one label or region by its index.
    pub fn mean(&self, group: usize) -> [f64; 8] {
        let per_case: Vec<[f64; 8]> =
            self.cases.iter().filter_map(|case| case.counts.get(group).map(metrics)).collect();
        std::array::from_fn(|metric| nan_mean(per_case.iter().map(|values| values[metric])))
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
    /// [`Error::Io`].
    pub fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, self.to_json()).map_err(Error::io(path, "write"))
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
