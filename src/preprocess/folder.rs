//! All cases of a dataset to a folder, in parallel, with bounded memory, and resumable.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use super::label_counts::label_counts;
use super::parallel::in_parallel;
use super::store::{self, StoredCase};
use super::{PreprocessedCase, Preprocessor, RawCase};
use crate::compat::Compat;
use crate::dataset::{CaseFiles, Dataset, LabelManager};
use crate::error::{Error, Result};

/// The folder, beside plans and splits, of everything that no other program reads. nnU-Net's own preprocessed cases lie
/// elsewhere: it stops when it finds two kinds of file under one name.
pub const OWN_FOLDER: &str = "voxgrad";

/// The folder of the preprocessed cases of a configuration; `prepared` is that of the plans.
pub fn cases_folder(prepared: &Path, data_identifier: &str) -> PathBuf {
    prepared.join(OWN_FOLDER).join(data_identifier)
}

/// What is known about a preprocessed case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaseReport {
    /// Case identifier.
    pub name: String,
    /// How many voxels have each label that occurs, after preprocessing; -1 is air outside the image.
    pub label_counts: BTreeMap<i16, u64>,
    /// Whether an earlier run had finished the case.
    pub resumed: bool,
    /// What looks odd about the raw files, or is lost on the way.
    pub warnings: Vec<String>,
}

impl CaseReport {
    /// Share of the voxels that have a label other than the ignore label.
    pub fn annotated(&self, labels: &LabelManager) -> f64 {
        let all: u64 = self.label_counts.values().sum();
        let ignored = labels.ignore_label().and_then(|label| self.label_counts.get(&label)).copied().unwrap_or(0);
        1.0 - ignored as f64 / all.max(1) as f64
    }
}

/// File of a case in the folder of a configuration.
pub fn case_path(folder: &Path, case: &str) -> PathBuf {
    folder.join(format!("{case}{}", store::ENDING))
}

/// Preprocesses every case of a dataset into `folder`. At most `workers` cases are in memory at a time. A case whose file
/// is there, made with the same settings from the same raw files, is left as it is. `on_case` is called after each case,
/// from several threads.
///
/// Returns one result per case, so that one bad case does not hide the others.
///
/// # Errors
/// [`FileError::Io`](crate::error::FileError::Io) if the folder cannot be made.
pub fn preprocess_folder(
    dataset: &Dataset,
    preprocessor: &Preprocessor,
    folder: &Path,
    workers: usize,
    on_case: impl Fn(&str) + Sync,
) -> Result<Vec<Result<CaseReport>>> {
    fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
    Ok(in_parallel(&dataset.cases, workers, |files| {
        let report = preprocess_case(files, dataset, preprocessor, folder);
        on_case(&files.name);
        report
    }))
}

fn preprocess_case(
    files: &CaseFiles,
    dataset: &Dataset,
    preprocessor: &Preprocessor,
    folder: &Path,
) -> Result<CaseReport> {
    let path = case_path(folder, &files.name);
    let recipe = recipe(files, preprocessor)?;
    // Whatever is wrong with an earlier file, it is made again.
    if let Ok(stored) = StoredCase::open(&path)
        && stored.recipe() == recipe
    {
        return Ok(CaseReport {
            name: files.name.clone(),
            label_counts: stored.label_counts(),
            resumed: true,
            warnings: Vec::new(),
        });
    }
    let (case, warnings) = preprocess_raw(files, &dataset.labels, preprocessor)?;
    store::write(&path, &case, &recipe)?;
    Ok(CaseReport { name: case.name, label_counts: label_counts(case.seg.view()), resumed: false, warnings })
}

/// Reads and preprocesses a case, with what looks odd about it and which classes it loses.
pub(super) fn preprocess_raw(
    files: &CaseFiles,
    labels: &LabelManager,
    preprocessor: &Preprocessor,
) -> Result<(PreprocessedCase, Vec<String>)> {
    let raw = RawCase::read(files, labels)?;
    let mut warnings = raw.warnings.clone();
    let before = raw.labels.as_ref().map(|labels| label_counts(labels.view()));
    let case = preprocessor.run(raw)?;
    if let Some(before) = before {
        let after = label_counts(case.seg.view());
        let spacing = preprocessor.transpose_forward.map(|axis| case.properties.spacing[axis]);
        let resampling = format!("resampling from {spacing:?} to {:?} mm", preprocessor.spacing);
        warnings.extend(lost_classes(&case.name, labels, &before, &after, &resampling));
    }
    Ok((case, warnings))
}

/// Classes that are annotated before preprocessing and not after it.
fn lost_classes<'a>(
    case: &'a str,
    labels: &LabelManager,
    before: &'a BTreeMap<i16, u64>,
    after: &'a BTreeMap<i16, u64>,
    resampling: &'a str,
) -> impl Iterator<Item = String> {
    let names: Vec<String> = labels.foreground_names().into_iter().map(String::from).collect();
    let voxels = |counts: &BTreeMap<i16, u64>, members: &[i16]| -> u64 {
        members.iter().filter_map(|label| counts.get(label)).sum()
    };
    names.into_iter().zip(labels.foreground()).filter_map(move |(name, group)| {
        let (had, has) = (voxels(before, group.members()), voxels(after, group.members()));
        (had > 0 && has == 0).then(|| {
            format!("case {case}: {resampling} leaves none of the {had} voxels of class {name}, which is lost")
        })
    })
}

/// With which treatment of ignored voxels a stored case was made, if with these settings otherwise.
pub fn made_with(stored: &StoredCase, preprocessor: &Preprocessor) -> Option<Compat> {
    [Compat::Corrected, Compat::Nnunet].into_iter().find(|&compat| {
        let settings = format!("{:?}; ", Preprocessor { compat, ..preprocessor.clone() });
        stored.recipe().starts_with(&settings)
    })
}

/// Settings, and size and time of every raw file: a case made from the same is still good.
pub(super) fn recipe(files: &CaseFiles, preprocessor: &Preprocessor) -> Result<String> {
    Ok(format!("{preprocessor:?}{}", files_seen(files)?))
}

/// Name, size and time of change of a case's files, each behind a semicolon.
pub(crate) fn files_seen(files: &CaseFiles) -> Result<String> {
    let mut seen = String::new();
    for path in files.images.iter().chain(&files.label) {
        let metadata = fs::metadata(path).map_err(Error::io(path, "read"))?;
        let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let nanoseconds = modified.map_or(0, |time| time.as_nanos());
        seen.push_str(&format!("; {name} {} bytes {nanoseconds}", metadata.len()));
    }
    Ok(seen)
}

/// Names of the cases that are stored in a folder, sorted; none if there is no such folder.
///
/// # Errors
/// [`FileError::Io`](crate::error::FileError::Io).
pub fn stored_names(folder: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    if !folder.is_dir() {
        return Ok(names);
    }
    for entry in fs::read_dir(folder).map_err(Error::io(folder, "list"))? {
        let entry = entry.map_err(Error::io(folder, "list"))?;
        let file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if let Some(name) =
            entry.file_name().to_str().and_then(|name| name.strip_suffix(store::ENDING)).filter(|_| file)
        {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

/// Removes the cases that are stored in a folder, and the folder if nothing else is in it. Returns how many they were.
///
/// # Errors
/// [`FileError::Io`](crate::error::FileError::Io).
pub fn remove_stored(folder: &Path) -> Result<usize> {
    let names = stored_names(folder)?;
    for name in &names {
        let path = case_path(folder, name);
        fs::remove_file(&path).map_err(Error::io(path, "remove"))?;
    }
    if folder.is_dir() {
        // Fails, as it should, if somebody else's files are there.
        let _ = fs::remove_dir(folder);
    }
    Ok(names.len())
}

/// Moves the cases that an earlier version has stored among nnU-Net's to their own folder. Returns how many they were.
///
/// # Errors
/// [`FileError::Io`](crate::error::FileError::Io).
pub fn move_stored(prepared: &Path, data_identifier: &str) -> Result<usize> {
    let (from, to) = (prepared.join(data_identifier), cases_folder(prepared, data_identifier));
    let names = stored_names(&from)?;
    if names.is_empty() {
        return Ok(0);
    }
    fs::create_dir_all(&to).map_err(Error::io(&to, "create"))?;
    for name in &names {
        let (old, new) = (case_path(&from, name), case_path(&to, name));
        if new.exists() {
            fs::remove_file(&old).map_err(Error::io(old, "remove"))?;
        } else {
            fs::rename(&old, new).map_err(Error::io(old, "move"))?;
        }
    }
    let _ = fs::remove_dir(&from);
    Ok(names.len())
}
