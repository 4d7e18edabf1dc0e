//! `summary.json`: metrics of a folder of segmentations, byte for byte in nnU-Net's layout.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use ndarray::ArrayView3;
use rayon::prelude::*;

use super::classes::Classes;
use super::confusion::{Confusion, JointHistogram, nan_mean};
use super::json::Json;
use crate::dataset::{LabelGroup, LabelManager};
use crate::error::{Error, EvaluateError, Result};
use crate::io;
use crate::io::grid_difference;

/// Metrics of one case, parallel to the evaluated labels or regions.
#[derive(Debug, Clone, PartialEq)]
pub struct CaseResult {
    /// Counts over annotated voxels.
    pub counts: Vec<Confusion>,
    /// Share of the voxels that the reference annotates, all of them without an ignore label. Metrics look at these only:
    /// where it is small, they say little about the whole image.
    pub annotated: f64,
    /// The prediction.
    pub prediction_file: PathBuf,
    /// What it was compared with.
    pub reference_file: PathBuf,
}

/// Metrics of many cases.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// The evaluated labels or regions.
    pub classes: Classes,
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
    let joint = JointHistogram::count(prediction, reference);
    groups.iter().map(|group| joint.confusion(group, ignore)).collect()
}

/// Compares all segmentations of a folder with the references of the same names, for the foreground of a dataset; as
/// [`evaluate_classes`].
///
/// # Errors
/// As [`evaluate_classes`].
pub fn evaluate_folder(
    references: &Path,
    predictions: &Path,
    file_ending: &str,
    labels: &LabelManager,
    allow_missing: bool,
) -> Result<Summary> {
    evaluate_classes(references, predictions, file_ending, &Classes::of(labels), allow_missing, &|_| ())
}

/// Compares all segmentations of a folder with the references of the same names. Names that begin with `._`, which macOS
/// leaves on foreign disks, are passed over. `observe` is called after each case with the number of cases.
///
/// # Errors
/// [`EvaluateError::NothingToEvaluate`]; [`EvaluateError::ReferenceMissing`]; [`EvaluateError::PredictionMissing`] unless `allow_missing`;
/// [`EvaluateError::EvaluationGrid`]; the errors of reading NIfTI; [`Error::Several`] with all of them.
pub fn evaluate_classes(
    references: &Path,
    predictions: &Path,
    file_ending: &str,
    classes: &Classes,
    allow_missing: bool,
    observe: &(dyn Fn(usize) + Sync),
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
    let both = predicted.intersection(&known).map(|file| (predictions.join(file), references.join(file)));
    let summary = evaluate_pairs(&both.collect::<Vec<_>>(), classes, faults, observe)?;
    Ok(Summary { passed_over, ..summary })
}

/// Compares predictions with their references. What is wrong with others, `faults`, is told together with what is wrong
/// with these.
pub(super) fn evaluate_pairs(
    pairs: &[(PathBuf, PathBuf)],
    classes: &Classes,
    mut faults: Vec<Error>,
    observe: &(dyn Fn(usize) + Sync),
) -> Result<Summary> {
    let compared: Vec<Result<(CaseResult, Vec<String>)>> = pairs
        .par_iter()
        .map(|(prediction, reference)| {
            let case = compare(prediction, reference, classes);
            observe(pairs.len());
            case
        })
        .collect();
    let (mut cases, mut warnings) = (Vec::with_capacity(pairs.len()), Vec::new());
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
        None => Ok(Summary { classes: classes.clone(), cases, warnings, passed_over: Vec::new() }),
    }
}

/// Reads a prediction and its reference, which must lie on one grid.
pub(super) fn read_pair(prediction_file: &Path, reference_file: &Path) -> Result<[io::LabelMap; 2]> {
    let prediction = io::read_labels(prediction_file)?;
    let reference = io::read_labels(reference_file)?;
    let grid = |map: &io::LabelMap| map.data.dim().into();
    let (found, expected) = (grid(&prediction), grid(&reference));
    match grid_difference((&prediction.geometry, found), (&reference.geometry, expected)) {
        None => Ok([prediction, reference]),
        Some(problem) => Err(EvaluateError::EvaluationGrid { path: prediction_file.into(), problem }.into()),
    }
}

/// Scores a case, and says which labels are in it that nobody declared.
fn compare(prediction_file: &Path, reference_file: &Path, classes: &Classes) -> Result<(CaseResult, Vec<String>)> {
    let [prediction, reference] = read_pair(prediction_file, reference_file)?;
    let joint = JointHistogram::count(prediction.data.view(), reference.data.view());
    let (mut predicted, mut truth) = (BTreeMap::new(), BTreeMap::new());
    for &(p, t, voxels) in joint.pairs() {
        *predicted.entry(p).or_insert(0) += voxels;
        *truth.entry(t).or_insert(0) += voxels;
    }
    let declared = |file: &Path, counts: &BTreeMap<i16, u64>, known: &[i16], may_be: &dyn Fn(i16) -> bool| {
        let undeclared = counts.iter().filter(|(label, _)| !may_be(**label));
        let told = |(label, voxels): (&i16, &u64)| {
            let file = file.display();
            format!("{file}: {voxels} voxels hold label {label}, which is none of {known:?}: they count as no class")
        };
        undeclared.map(told).collect::<Vec<String>>()
    };
    let mut warnings =
        declared(prediction_file, &predicted, classes.declared(), &|label| classes.may_be_predicted(label));
    let known: Vec<i16> = classes.declared().iter().copied().chain(classes.ignore).collect();
    warnings.extend(declared(reference_file, &truth, &known, &|label| classes.may_be_true(label)));
    let all: u64 = truth.values().sum();
    let ignored = classes.ignore.and_then(|ignore| truth.get(&ignore)).copied().unwrap_or(0);
    let case = CaseResult {
        counts: classes.groups.iter().map(|group| joint.confusion(group, classes.ignore)).collect(),
        annotated: (all - ignored) as f64 / all as f64,
        prediction_file: prediction_file.into(),
        reference_file: reference_file.into(),
    };
    Ok((case, warnings))
}

/// The ending of the label maps in a folder.
///
/// # Errors
/// [`EvaluateError::TwoEndings`], [`EvaluateError::NothingToEvaluate`], [`FileError::Io`](crate::error::FileError::Io).
pub fn file_ending_of(folder: &Path) -> Result<&'static str> {
    let has = |ending| -> Result<bool> { Ok(!files(folder, ending)?.0.is_empty()) };
    match (has(".nii.gz")?, has(".nii")?) {
        (true, false) => Ok(".nii.gz"),
        (false, true) => Ok(".nii"),
        (true, true) => Err(EvaluateError::TwoEndings { path: folder.into() }.into()),
        (false, false) => {
            Err(EvaluateError::NothingToEvaluate { path: folder.into(), ending: ".nii.gz or .nii".into() }.into())
        }
    }
}

/// Names of a folder's files with this ending, and the files that are passed over.
pub(super) fn files(folder: &Path, ending: &str) -> Result<(BTreeSet<String>, Vec<PathBuf>)> {
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
        let means: Vec<[f64; 8]> = (0..self.classes.groups.len())
            .filter(|&group| self.classes.groups[group] != LabelGroup::Label(0))
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
        let cases = self.cases.iter().map(|case| {
            let file = |path: &Path| Json::Text(path.to_string_lossy().into_owned());
            Json::object([
                ("metrics", self.by_class(|group| integer_metrics(&case.counts[group]))),
                ("prediction_file", file(&case.prediction_file)),
                ("reference_file", file(&case.reference_file)),
            ])
        });
        let mut summary = self.means();
        summary.push(("metric_per_case", Json::List(cases.collect())));
        Json::object(summary).to_text()
    }

    /// The means of all cases, as `summary.json` begins with them.
    pub(super) fn means(&self) -> Vec<(&'static str, Json)> {
        let mean = self.by_class(|group| float_metrics(self.mean(group)));
        vec![("foreground_mean", float_metrics(self.foreground_mean())), ("mean", mean)]
    }

    /// Values of every class under its key, sorted by that.
    fn by_class(&self, values: impl Fn(usize) -> Json) -> Json {
        let entries = self.classes.groups.iter().enumerate();
        let mut entries: Vec<(String, Json)> =
            entries.map(|(index, group)| (group.to_string(), values(index))).collect();
        entries.sort_by(|a, b| a.0.cmp(&b.0));
        Json::Object(entries)
    }

    /// Writes `summary.json`.
    ///
    /// # Errors
    /// [`FileError::Io`](crate::error::FileError::Io).
    pub fn write(&self, path: &Path) -> Result<()> {
        io::write_atomically(path, self.to_json().as_bytes())
    }
}

fn float_metrics(values: [f64; 8]) -> Json {
    Json::object(METRICS.into_iter().zip(values.map(Json::Float)))
}

/// Counts of a single case are integers, only their means are not.
fn integer_metrics(counts: &Confusion) -> Json {
    let entries = METRICS.into_iter().zip(metrics(counts));
    Json::object(entries.map(|(name, value)| match name {
        "Dice" | "IoU" => (name, Json::Float(value)),
        _ => (name, Json::Integer(value as u64)),
    }))
}
