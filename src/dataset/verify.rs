//! Everything that is wrong with a raw dataset, found in one go.

use std::path::Path;
use std::sync::Mutex;

use rayon::prelude::*;

use super::Dataset;
use crate::error::{Error, Result};
use crate::preprocess::RawCase;

/// What was found in a dataset.
#[derive(Debug, Default)]
pub struct Verification {
    /// Number of complete cases, which were read.
    pub cases: usize,
    /// What makes the dataset unusable, sorted by case.
    pub failures: Vec<Error>,
    /// What looks odd but does not stop anything.
    pub warnings: Vec<String>,
}

/// Reads every file of a dataset and reports all failures together. `on_case` is called after each case, from several
/// threads.
///
/// # Errors
/// What makes it impossible to look further: an unreadable `dataset.json`, wrong labels, no images at all.
pub fn verify(folder: &Path, on_case: impl Fn(&str) + Sync) -> Result<Verification> {
    let (dataset, failures) = Dataset::inspect(folder)?;
    let found = Mutex::new(Vec::with_capacity(dataset.cases.len()));
    dataset.cases.par_iter().for_each(|files| {
        let (raw, failures) = RawCase::inspect(files, &dataset.labels);
        let warnings = raw.map_or_else(Vec::new, |raw| raw.warnings);
        found.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((&files.name, failures, warnings));
        on_case(&files.name);
    });
    let mut found = found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    found.sort_by(|a, b| a.0.cmp(b.0));
    let mut all = Verification { cases: dataset.cases.len(), failures, warnings: Vec::new() };
    for (_, failures, warnings) in found {
        all.failures.extend(failures);
        all.warnings.extend(warnings);
    }
    Ok(all)
}
