//! All cases of a dataset to a folder, in parallel, with bounded memory, and resumable.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::UNIX_EPOCH;

use super::store::{self, StoredCase};
use super::{Preprocessor, RawCase};
use crate::compat::Compat;
use crate::dataset::{CaseFiles, Dataset, LabelManager};
use crate::error::{Error, Result};

/// What is known about a preprocessed case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaseReport {
    /// Case identifier.
    pub name: String,
    /// How many voxels have each label that occurs, after preprocessing; -1 is air outside the image.
    pub label_counts: BTreeMap<i16, u64>,
    /// Whether an earlier run had finished the case.
    pub resumed: bool,
    /// What looks odd about the raw files.
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
/// [`Error::Io`] if the folder cannot be made.
pub fn preprocess_folder(
    dataset: &Dataset,
    preprocessor: &Preprocessor,
    folder: &Path,
    workers: usize,
    on_case: impl Fn(&str) + Sync,
) -> Result<Vec<Result<CaseReport>>> {
    fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
    let next = AtomicUsize::new(0);
    let reports: Mutex<Vec<Option<Result<CaseReport>>>> = Mutex::new(dataset.cases.iter().map(|_| None).collect());
    // Plain threads and not a parallel iterator: a thread of rayon's that waits for the channels of its case would start
    // another case meanwhile, and memory would grow with the depth of that.
    std::thread::scope(|scope| {
        for _ in 0..workers.clamp(1, dataset.cases.len().max(1)) {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    let Some(files) = dataset.cases.get(index) else { return };
                    let report = preprocess_case(files, dataset, preprocessor, folder);
                    if let Some(slot) = reports.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_mut(index)
                    {
                        *slot = Some(report);
                    }
                    on_case(&files.name);
                }
            });
        }
    });
    let reports = reports.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    Ok(reports.into_iter().flatten().collect())
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
    let raw = RawCase::read(files, &dataset.labels)?;
    let warnings = raw.warnings.clone();
    let case = preprocessor.run(raw)?;
    store::write(&path, &case, &recipe)?;
    Ok(CaseReport { name: case.name, label_counts: store::label_counts(case.seg.view()), resumed: false, warnings })
}

/// Whether a stored case was made with these settings, with or without nnU-Net's defects.
pub fn made_with(stored: &StoredCase, preprocessor: &Preprocessor) -> bool {
    [Compat::Corrected, Compat::Nnunet].into_iter().any(|compat| {
        let settings = format!("{:?}; ", Preprocessor { compat, ..preprocessor.clone() });
        stored.recipe().starts_with(&settings)
    })
}

/// Settings, and size and time of every raw file: a case made from the same is still good.
fn recipe(files: &CaseFiles, preprocessor: &Preprocessor) -> Result<String> {
    let mut recipe = format!("{preprocessor:?}");
    for path in files.images.iter().chain(&files.label) {
        let metadata = fs::metadata(path).map_err(Error::io(path, "read"))?;
        let modified = metadata.modified().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let nanoseconds = modified.map_or(0, |time| time.as_nanos());
        recipe.push_str(&format!("; {name} {} bytes {nanoseconds}", metadata.len()));
    }
    Ok(recipe)
}
