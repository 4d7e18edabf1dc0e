//! The validation predictions of all folds of a model, collected and scored as one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::classes::Classes;
use super::summary::{Summary, evaluate_pairs, files};
use crate::dataset::folders::Located;
use crate::dataset::splits::{self, Fold};
use crate::dataset::{Dataset, DatasetJson};
use crate::error::{Error, EvaluateError, FileError, Result};
use crate::io;

/// What lies beside the predictions in a folder of collected results.
const BESIDE: [&str; 6] =
    ["summary.json", "dataset.json", "plans.json", "postprocessing.json", "postprocessing.pkl", "postprocessed"];

/// `0_1_2_3_4`, as nnU-Net names folders after folds.
pub fn folds_name(folds: &[Fold]) -> String {
    folds.iter().map(Fold::to_string).collect::<Vec<_>>().join("_")
}

/// The files in `fold_N/validation` of a model folder whose names end so, of all these folds, by their names.
///
/// # Errors
/// [`EvaluateError::FoldsMissing`] with all folds that have no such files, [`EvaluateError::PredictedTwice`] with all cases
/// that more than one fold has, [`FileError::Io`].
pub fn validation_files(model: &Path, folds: &[Fold], ending: &str) -> Result<BTreeMap<String, PathBuf>> {
    let (mut found, mut missing, mut twice) = (BTreeMap::new(), Vec::new(), Vec::new());
    for fold in folds {
        let folder = model.join(format!("fold_{fold}")).join("validation");
        let names = if folder.is_dir() { files(&folder, ending)?.0 } else { Default::default() };
        if names.is_empty() {
            missing.push(fold.to_string());
        }
        for name in names {
            let path = folder.join(&name);
            if found.insert(name.clone(), path).is_some() {
                twice.push(name);
            }
        }
    }
    if !missing.is_empty() {
        return Err(EvaluateError::FoldsMissing { path: model.into(), folds: missing, ending: ending.into() }.into());
    }
    match twice.is_empty() {
        true => Ok(found),
        false => Err(EvaluateError::PredictedTwice { path: model.into(), files: twice }.into()),
    }
}

/// Compares the predictions in `fold_N/validation` of a model folder with the validation cases of a file of splits, for all
/// these folds; `cases` are those of the dataset.
///
/// # Errors
/// [`EvaluateError::FoldCases`] with all that is missing and all that belongs elsewhere; those of [`splits::read`].
pub fn check_folds(model: &Path, folds: &[Fold], ending: &str, file: &Path, cases: &[String]) -> Result<()> {
    let known = splits::read(file, cases)?;
    let mut faults = Vec::new();
    for &fold in folds {
        let folder = model.join(format!("fold_{fold}")).join("validation");
        let found = if folder.is_dir() { files(&folder, ending)?.0 } else { Default::default() };
        let validated = splits::cases_of_fold(&known, fold, cases)?.val.into_iter();
        let expected: BTreeSet<String> = validated.map(|case| format!("{case}{ending}")).collect();
        let missing: Vec<&str> = expected.difference(&found).map(String::as_str).collect();
        let others: Vec<&str> = found.difference(&expected).map(String::as_str).collect();
        for (what, names) in [("lacks", missing), ("holds, of other folds,", others)] {
            if !names.is_empty() {
                faults.push(format!("fold {fold} {what} {}", names.join(", ")));
            }
        }
    }
    match faults.is_empty() {
        true => Ok(()),
        false => Err(EvaluateError::FoldCases { path: model.into(), splits: file.into(), faults }.into()),
    }
}

/// The reference of every case of a dataset, by the name that predictions have: in the raw dataset's `labelsTr`, unless its
/// dataset.json lists files of any name; else, as nnU-Net does, in `gt_segmentations` beside the preprocessed cases, else
/// wherever the raw dataset.json names them.
///
/// # Errors
/// [`EvaluateError::ReferencesUnknown`] if none of these is there; those of reading and opening the raw dataset.
pub fn references(
    dataset: &Located,
    preprocessed: Option<&Path>,
    description: &DatasetJson,
) -> Result<BTreeMap<String, PathBuf>> {
    let ending = description.file_ending.as_str();
    let described = dataset.raw.as_ref().map(|raw| raw.join("dataset.json")).filter(|file| file.is_file());
    let lists_files = match &described {
        Some(file) => DatasetJson::read(file)?.source().contains_key("dataset"),
        None => false,
    };
    let labels = dataset.raw.as_ref().filter(|_| !lists_files).map(|raw| raw.join("labelsTr"));
    let copies = preprocessed.map(|folder| folder.join("gt_segmentations"));
    if let Some(folder) = [&labels, &copies].into_iter().flatten().find(|folder| folder.is_dir()) {
        let names = files(folder, ending)?.0;
        return Ok(names.into_iter().map(|name| (name.clone(), folder.join(name))).collect());
    }
    if let Some(raw) = dataset.raw.as_ref().filter(|_| described.is_some()) {
        let (dataset, _) = Dataset::inspect(raw)?;
        let labelled =
            dataset.cases.into_iter().filter_map(|case| Some((format!("{}{ending}", case.name), case.label?)));
        return Ok(labelled.collect());
    }
    let searched = [labels, copies].into_iter().flatten().collect();
    Err(EvaluateError::ReferencesUnknown { dataset: dataset.name.clone(), searched }.into())
}

/// Scores collected predictions, by name, against the references of the same names. `observe` is called after each case
/// with the number of cases.
///
/// # Errors
/// [`EvaluateError::ReferenceMissing`], [`EvaluateError::EvaluationGrid`], the errors of reading NIfTI: all of them together.
pub fn score(
    predictions: &BTreeMap<String, PathBuf>,
    references: &BTreeMap<String, PathBuf>,
    classes: &Classes,
    observe: &(dyn Fn(usize) + Sync),
) -> Result<Summary> {
    let (mut pairs, mut faults) = (Vec::with_capacity(predictions.len()), Vec::new());
    for (name, prediction) in predictions {
        match references.get(name) {
            Some(reference) => pairs.push((prediction.clone(), reference.clone())),
            // Named after the prediction, as nobody knows where its reference would be.
            None => faults.push(EvaluateError::ReferenceMissing { path: prediction.clone() }.into()),
        }
    }
    evaluate_pairs(&pairs, classes, faults, observe)
}

/// Empties a folder that an earlier run has filled with collected results.
///
/// # Errors
/// Those of [`check_results`], before anything is removed.
pub fn clear_results(folder: &Path, ending: &str) -> Result<()> {
    for path in check_results(folder, ending)? {
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.map_err(Error::io(&path, "remove"))?;
    }
    Ok(())
}

/// What is in a folder that an earlier run has filled with collected results; nothing if there is no folder.
///
/// # Errors
/// [`FileError::OutputExists`] if something else is in it; [`FileError::Io`].
pub fn check_results(folder: &Path, ending: &str) -> Result<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    io::remove_leftovers(folder)?;
    let known = |name: &str| name.ends_with(ending) || BESIDE.contains(&name);
    let listed = io::list_folder(folder)?;
    let others: Vec<&str> = listed.names.iter().map(String::as_str).filter(|name| !known(name)).collect();
    if !others.is_empty() || !listed.unreadable.is_empty() {
        let problem = format!(
            "would be made anew, but holds what is no result of this command: {}; move that away",
            others.into_iter().chain(listed.unreadable.iter().map(String::as_str)).collect::<Vec<_>>().join(", ")
        );
        return Err(FileError::OutputExists { path: folder.into(), problem }.into());
    }
    Ok(listed.names.iter().map(|name| folder.join(name)).collect())
}

/// Copies predictions, by name, into a folder, and writes their scores and the two descriptions of their model beside them.
///
/// # Errors
/// [`FileError::Io`].
pub fn write_results(
    predictions: &BTreeMap<String, PathBuf>,
    summary: &Summary,
    model: &Path,
    folder: &Path,
) -> Result<Summary> {
    fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
    let copy = |from: &Path, name: &str| -> Result<()> {
        let bytes = fs::read(from).map_err(Error::io(from, "read"))?;
        io::write_atomically(&folder.join(name), &bytes)
    };
    for (name, path) in predictions {
        copy(path, name)?;
    }
    for name in ["dataset.json", "plans.json"] {
        copy(&model.join(name), name)?;
    }
    let mut summary = summary.clone();
    for case in &mut summary.cases {
        case.prediction_file = folder.join(case.prediction_file.file_name().unwrap_or_default());
    }
    summary.write(&folder.join("summary.json"))?;
    Ok(summary)
}
