//! Dense labels for cases that are annotated in part: what was annotated stays, a trained model fills in the rest.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ndarray::{Array3, ArrayView3, Zip};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{Assessment, Ensemble, Event, Folds, Lookers, check_same_dataset, lookers};
use crate::dataset::splits::Split;
use crate::dataset::{CaseFiles, Dataset, LabelManager};
use crate::error::{AnnotationError, DatasetError, Error, Result};
use crate::io::{self, LabelMap};
use crate::preprocess::{CaseHeaders, undeclared};
use crate::sparsify::Transfer;
use crate::sparsify::output::NewDataset;
use crate::sparsify::report::label_names;

/// How to complete a dataset.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CompletionSettings {
    /// Voxels of a smaller margin stay ignored; `None` completes all.
    pub least_margin: Option<f32>,
    /// Which folds complete a case.
    pub folds: Folds,
    /// Give images bytes of their own instead of a second name.
    #[serde(skip)]
    pub copy_images: bool,
    /// Replace a dataset that this program made before.
    #[serde(skip)]
    pub overwrite: bool,
}

/// What was completed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Completion {
    /// Version of this program.
    pub voxgrad: &'static str,
    /// The dataset that was annotated in part.
    pub source: PathBuf,
    /// The checkpoints.
    pub model: Vec<PathBuf>,
    /// What was asked for.
    pub settings: CompletionSettings,
    /// How images came along.
    pub images: Transfer,
    /// What looks odd.
    pub warnings: Vec<String>,
    /// Cases in the order of their names.
    pub cases: Vec<CompletedCase>,
}

/// What was completed of a case.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CompletedCase {
    /// Case identifier.
    pub case: String,
    /// The folds that completed it; none if everything was annotated.
    pub folds: Vec<String>,
    /// Whether none of them trained on it.
    pub held_out: bool,
    /// Mean margin of the voxels that were not annotated.
    pub mean_margin: Option<f64>,
    /// Their mean disagreement in nats.
    pub mean_disagreement: Option<f64>,
    /// Background and classes.
    pub classes: Vec<CompletedClass>,
}

/// What was completed of a class in a case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CompletedClass {
    /// Name, with the regions that hold the label where the dataset has regions.
    pub name: String,
    /// Label value.
    pub label: i16,
    /// Annotated voxels, which are kept.
    pub kept: u64,
    /// Of these, those that the model would have labelled alike; `None` if it did not look at the case.
    pub agreeing: Option<u64>,
    /// Voxels that were not annotated and now have this label.
    pub completed: u64,
    /// Voxels that would have it, but stay ignored.
    pub ignored: u64,
}

/// Completes the labels of a dataset in `target`, which becomes a dataset of its own: labels, `dataset.json`, images, test
/// cases and splits, `complete.json` with the report, and in the folder `confidence` the margin and the disagreement of every
/// voxel of each case (`CASE_margin`, `CASE_disagreement`), annotated or not, as images of 32-bit floats. The ignore label
/// stays declared if a least margin is given. `None`, and nothing in `target`, if `observe` breaks off.
///
/// # Errors
/// [`AnnotationError::NothingToComplete`], [`AnnotationError::OtherDataset`], [`AnnotationError::NotHeldOut`], all that is
/// wrong with label files, [`FileError::OutputExists`](crate::error::FileError::OutputExists); those of
/// [`Ensemble::assess_files`]. Nothing is left in `target` then.
pub fn complete_dataset(
    dataset: &Dataset,
    target: &Path,
    ensemble: &Ensemble,
    splits: Option<&[Split]>,
    settings: &CompletionSettings,
    mut observe: impl FnMut(Event) -> ControlFlow<()>,
) -> Result<Option<Completion>> {
    let labels = &dataset.labels;
    check(dataset, ensemble, settings)?;
    let ignore = labels.ignore_label().ok_or_else(|| nothing_to_complete(dataset))?;
    let mut failures = Vec::new();
    let mut open = Vec::new();
    for case in &dataset.cases {
        match read_annotation(case, labels) {
            Ok(map) if map.data.iter().any(|&label| label == ignore) => open.push(case.name.clone()),
            Ok(_) => {}
            Err(failure) => failures.push(failure),
        }
    }
    Error::all(failures)?;
    if open.is_empty() {
        return Err(nothing_to_complete(dataset));
    }
    let looking: BTreeMap<&String, Lookers> =
        open.iter().zip(lookers(ensemble.model, splits, &open, settings.folds)?).collect();

    let new = NewDataset::begin(target, &dataset.folder, "complete.json", settings.overwrite)?;
    let confidence = new.path("confidence");
    std::fs::create_dir(&confidence).map_err(Error::io(&confidence, "create"))?;
    let mut report = Completion {
        voxgrad: env!("CARGO_PKG_VERSION"),
        source: dataset.folder.clone(),
        model: ensemble.model.folds.iter().map(|fold| fold.path.clone()).collect(),
        settings: settings.clone(),
        images: Transfer::default(),
        warnings: labels.region_warnings(),
        cases: Vec::with_capacity(dataset.cases.len()),
    };
    let ending = &dataset.json.file_ending;
    for case in &dataset.cases {
        let map = read_annotation(case, labels)?;
        let assessment = match looking.get(&case.name) {
            None => None,
            Some(lookers) => match ensemble.assess_files(case, &lookers.folds, &mut observe)? {
                Some((assessment, warnings)) => {
                    report.warnings.extend(warnings);
                    Some((lookers, assessment))
                }
                None => return Ok(None),
            },
        };
        let completed = match &assessment {
            Some((_, assessment)) => {
                for (name, volume) in [("margin", &assessment.margin), ("disagreement", &assessment.disagreement)] {
                    let path = confidence.join(format!("{}_{name}{ending}", case.name));
                    io::write_image(&path, volume.view(), &map.geometry)?;
                }
                completed_labels(map.data.view(), assessment, ignore, settings.least_margin)
            }
            None => map.data.clone(),
        };
        let path = new.path(&format!("labelsTr/{}{ending}", case.name));
        io::write_labels_as_stored(&path, completed.view(), &map.geometry)?;
        report.images += new.take_images(case, ending, settings.copy_images)?;
        report.cases.push(CompletedCase::new(case, &map, &completed, assessment.as_ref(), ensemble, labels));
        if observe(Event::Case(&case.name)).is_break() {
            return Ok(None);
        }
    }
    report.images += new.take_the_rest(&dataset.folder, settings.copy_images)?;
    io::write_json(&new.path("dataset.json"), &description(dataset, settings))?;
    io::write_json(&new.path("complete.json"), &report)?;
    new.commit()?;
    Ok(Some(report))
}

fn nothing_to_complete(dataset: &Dataset) -> Error {
    let path = dataset.json.path.clone();
    Error::Annotation(AnnotationError::NothingToComplete { path, ignore: dataset.labels.ignore_label() })
}

fn check(dataset: &Dataset, ensemble: &Ensemble, settings: &CompletionSettings) -> Result<()> {
    check_same_dataset(&ensemble.model.model, &dataset.json, &dataset.labels)?;
    match settings.least_margin {
        Some(margin) if !(margin > 0.0 && margin <= 1.0) => Err(Error::Setting {
            setting: "least margin",
            value: margin.to_string(),
            expected: "expected a difference of probabilities above 0 and up to 1",
        }),
        _ => Ok(()),
    }
}

/// Reads the label map of a case: declared labels only, on the grid of the images.
pub(super) fn read_annotation(case: &CaseFiles, labels: &LabelManager) -> Result<LabelMap> {
    Error::all(CaseHeaders::read(case).failures)?;
    let path = case.label.as_deref().ok_or_else(|| {
        Error::Dataset(DatasetError::LabelMissing { case: case.name.clone(), path: "labelsTr".into() })
    })?;
    let map = io::read_labels(path)?;
    let expected = labels.expected_labels();
    if let Some(((z, y, x), &value)) = map.data.indexed_iter().find(|(_, label)| !expected.contains(label)) {
        let (case, path, voxel) = (case.name.clone(), path.to_owned(), [z, y, x]);
        let found = undeclared(map.data.view(), &expected).into();
        let expected = expected.into();
        return Err(Error::Dataset(DatasetError::UnexpectedLabel { case, path, value, voxel, expected, found }));
    }
    Ok(map)
}

/// The annotation with its ignored voxels filled in; those whose margin is below the least one stay ignored.
///
/// # Panics
/// If annotation and assessment differ in shape.
pub fn completed_labels(
    annotation: ArrayView3<i16>,
    assessment: &Assessment,
    ignore: i16,
    least_margin: Option<f32>,
) -> Array3<i16> {
    let mut completed = annotation.to_owned();
    Zip::from(&mut completed).and(&assessment.labels).and(&assessment.margin).for_each(|label, &predicted, &margin| {
        if *label == ignore && least_margin.is_none_or(|least| margin >= least) {
            *label = predicted as i16;
        }
    });
    completed
}

/// The dataset's description: without the ignore label where nothing can be ignored any more.
fn description(dataset: &Dataset, settings: &CompletionSettings) -> Map<String, Value> {
    let mut json = dataset.json.source().clone();
    // Files are where the layout has them now.
    json.remove("dataset");
    if let (None, Some(labels)) = (settings.least_margin, json.get_mut("labels").and_then(Value::as_object_mut)) {
        // In order: that of regions means something.
        labels.shift_remove("ignore");
    }
    let rule = match settings.least_margin {
        Some(margin) => {
            format!("completed by a model where its margin is at least {margin}; annotated voxels are kept")
        }
        None => "completed by a model; annotated voxels are kept".into(),
    };
    let by = format!("voxgrad {}", env!("CARGO_PKG_VERSION"));
    json.insert("completion".into(), json!({"completed_by": by, "rule": rule}));
    json
}

impl CompletedCase {
    fn new(
        case: &CaseFiles,
        annotation: &LabelMap,
        completed: &Array3<i16>,
        assessment: Option<&(&Lookers, Assessment)>,
        ensemble: &Ensemble,
        labels: &LabelManager,
    ) -> Self {
        let looked = assessment.map(|_| 0);
        let mut classes: Vec<CompletedClass> = label_names(labels)
            .into_iter()
            .map(|(label, name)| CompletedClass { name, label, kept: 0, agreeing: looked, completed: 0, ignored: 0 })
            .collect();
        let ignore = labels.ignore_label();
        let mut count = |label: i16, add: &dyn Fn(&mut CompletedClass)| {
            if let Some(class) = classes.iter_mut().find(|class| class.label == label) {
                add(class);
            }
        };
        let (mut open, mut margin, mut disagreement) = (0u64, 0.0, 0.0);
        let Some((lookers, assessment)) = assessment else {
            annotation.data.iter().for_each(|&label| count(label, &|class| class.kept += 1));
            let (case, folds) = (case.name.clone(), Vec::new());
            return CompletedCase { case, folds, held_out: true, mean_margin: None, mean_disagreement: None, classes };
        };
        let voxels = annotation.data.iter().zip(completed).zip(&assessment.labels);
        let certainties = assessment.margin.iter().zip(&assessment.disagreement);
        for (((&annotated, &completed), &predicted), (&m, &d)) in voxels.zip(certainties) {
            let predicted = predicted as i16;
            if Some(annotated) != ignore {
                let agrees = u64::from(annotated == predicted);
                count(annotated, &|class| {
                    class.kept += 1;
                    class.agreeing = class.agreeing.map(|agreeing| agreeing + agrees);
                });
                continue;
            }
            match Some(completed) == ignore {
                true => count(predicted, &|class| class.ignored += 1),
                false => count(predicted, &|class| class.completed += 1),
            }
            open += 1;
            margin += f64::from(m);
            disagreement += f64::from(d);
        }
        let mean = |sum: f64| (open > 0).then(|| sum / open as f64);
        CompletedCase {
            case: case.name.clone(),
            folds: lookers.folds.iter().map(|&fold| ensemble.model.folds[fold].fold.to_string()).collect(),
            held_out: lookers.held_out,
            mean_margin: mean(margin),
            mean_disagreement: mean(disagreement),
            classes,
        }
    }
}

/// A line for every class, over all cases, and one for every class of every case.
pub fn completion_table(report: &Completion) -> String {
    let mut text = String::new();
    let Some(first) = report.cases.first() else { return text };
    let classes = |case: &CompletedCase| case.classes.iter().map(|class| class.name.len()).max().unwrap_or(0);
    let width = classes(first).max(10);
    let case_width = report.cases.iter().map(|case| case.case.len()).max().unwrap_or(0).max(9);
    let heading = format!(
        "{:<case_width$}  {:<5}  {:<width$}  {:>12}  {:>9}  {:>12}  {:>12}",
        "case", "folds", "class", "kept", "agreeing", "completed", "ignored"
    );
    let _ = writeln!(text, "{heading}");
    let mut line = |case: &str, folds: &str, class: &CompletedClass, looked_at: u64| {
        let agreeing = match class.agreeing {
            Some(agreeing) if looked_at > 0 => format!("{:.2} %", 100.0 * agreeing as f64 / looked_at as f64),
            _ => "-".into(),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{case:<case_width$}  {folds:<5}  {:<width$}  {:>12}  {agreeing:>9}  {:>12}  {:>12}",
            class.name, class.kept, class.completed, class.ignored
        );
    };
    for (index, class) in first.classes.iter().enumerate() {
        let mut sum = CompletedClass { kept: 0, agreeing: None, completed: 0, ignored: 0, ..class.clone() };
        let mut looked_at = 0;
        for class in report.cases.iter().filter_map(|case| case.classes.get(index)) {
            sum.kept += class.kept;
            sum.completed += class.completed;
            sum.ignored += class.ignored;
            if let Some(agreeing) = class.agreeing {
                sum.agreeing = Some(sum.agreeing.unwrap_or(0) + agreeing);
                looked_at += class.kept;
            }
        }
        line("all", "", &sum, looked_at);
    }
    for case in &report.cases {
        let folds = format!("{}{}", case.folds.join(","), if case.held_out { "" } else { "*" });
        case.classes.iter().for_each(|class| line(&case.case, &folds, class, class.kept));
    }
    if report.cases.iter().any(|case| !case.held_out) {
        let _ = writeln!(text, "*: these folds trained on the case");
    }
    text
}
