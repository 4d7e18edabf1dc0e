//! Cross-validation splits, equal to scikit-learn's as nnU-Net uses it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::{Error, FileError, PlanError, Result};
use crate::io;
use crate::numpy_random::NumpyRandom;

const SEED: u32 = 12345;
/// Number of folds nnU-Net makes.
pub const FOLDS: usize = 5;

/// Case names to train and to validate on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Split {
    /// Training cases.
    pub train: Vec<String>,
    /// Validation cases.
    pub val: Vec<String>,
}

/// Which part of a dataset a training run uses; written as `all` or the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Fold {
    /// Everything, for training and validation alike.
    All,
    /// One split by index.
    Index(usize),
}

impl FromStr for Fold {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "all" => Ok(Fold::All),
            number => number.parse().map(Fold::Index).map_err(|_| Error::Setting {
                setting: "fold",
                value: text.into(),
                expected: "expected `all` or a number from 0",
            }),
        }
    }
}

impl TryFrom<String> for Fold {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Fold> for String {
    fn from(fold: Fold) -> Self {
        fold.to_string()
    }
}

impl std::fmt::Display for Fold {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Fold::All => f.write_str("all"),
            Fold::Index(index) => write!(f, "{index}"),
        }
    }
}

/// Five shuffled folds over the sorted cases: scikit-learn's `KFold(5, shuffle=True, random_state=12345)`.
///
/// Ten cases give the validation cases 0 7 | 3 9 | 4 6 | 1 8 | 2 5.
///
/// # Errors
/// [`PlanError::TooFewCases`] for fewer cases than folds.
pub fn k_fold(cases: &[String]) -> Result<Vec<Split>> {
    let cases = sorted(cases);
    if cases.len() < FOLDS {
        return Err(Error::Plan(PlanError::TooFewCases { cases: cases.len(), folds: FOLDS }));
    }
    let mut order: Vec<usize> = (0..cases.len()).collect();
    NumpyRandom::new(SEED).shuffle(&mut order);
    let (size, larger) = (cases.len() / FOLDS, cases.len() % FOLDS);
    let mut start = 0;
    let fold = |index: usize| {
        let end = start + size + usize::from(index < larger);
        let chosen: BTreeSet<usize> = order[start..end].iter().copied().collect();
        start = end;
        split_by(&cases, |case| chosen.contains(&case))
    };
    Ok((0..FOLDS).map(fold).collect())
}

/// The cases of a fold. An index beyond the file gives nnU-Net's seeded random 80:20 split.
///
/// # Errors
/// [`PlanError::TooFewCases`] if the 80:20 split leaves a side empty.
pub fn cases_of_fold(splits: &[Split], fold: Fold, cases: &[String]) -> Result<Split> {
    let cases = sorted(cases);
    match fold {
        Fold::All => Ok(Split { train: cases.clone(), val: cases }),
        Fold::Index(index) if index < splits.len() => Ok(splits[index].clone()),
        Fold::Index(index) => {
            let count = (cases.len() as f64 * 0.8) as usize;
            if count == 0 || count == cases.len() {
                return Err(Error::Plan(PlanError::TooFewCases { cases: cases.len(), folds: FOLDS }));
            }
            let chosen = NumpyRandom::new(SEED.wrapping_add(index as u32)).choice(cases.len() as u32, count);
            let mut split = split_by(&cases, |case| !chosen.contains(&(case as u32)));
            // Upstream keeps the drawn order of the training cases.
            split.train = chosen.iter().map(|&i| cases[i as usize].clone()).collect();
            Ok(split)
        }
    }
}

/// Reads `splits_final.json` and checks it against the dataset's cases.
///
/// # Errors
/// [`PlanError::SplitUnknownCase`], [`PlanError::SplitEmpty`], [`PlanError::SplitOverlap`], or the errors of reading JSON.
pub fn read(path: &Path, cases: &[String]) -> Result<Vec<Split>> {
    let text = fs::read_to_string(path).map_err(Error::io(path, "read"))?;
    let splits: Vec<Split> =
        serde_json::from_str(&text).map_err(|source| Error::File(FileError::Json { path: path.into(), source }))?;
    let known: BTreeSet<&String> = cases.iter().collect();
    for (fold, split) in splits.iter().enumerate() {
        for (part, names) in [("training", &split.train), ("validation", &split.val)] {
            if names.is_empty() {
                return Err(Error::Plan(PlanError::SplitEmpty { path: path.into(), fold, part }));
            }
        }
        let unknown: Vec<&str> =
            split.train.iter().chain(&split.val).filter(|name| !known.contains(name)).map(String::as_str).collect();
        if !unknown.is_empty() {
            return Err(Error::Plan(PlanError::SplitUnknownCase { path: path.into(), fold, case: unknown.join(", ") }));
        }
        let training: BTreeSet<&String> = split.train.iter().collect();
        if let Some(case) = split.val.iter().find(|name| training.contains(name)) {
            return Err(Error::Plan(PlanError::SplitOverlap { path: path.into(), fold, case: case.clone() }));
        }
    }
    Ok(splits)
}

/// Cases that no fold trains or validates on: those that came after the splits were made.
pub fn without_fold(splits: &[Split], cases: &[String]) -> Vec<String> {
    let known: BTreeSet<&String> = splits.iter().flat_map(|split| split.train.iter().chain(&split.val)).collect();
    cases.iter().filter(|case| !splits.is_empty() && !known.contains(case)).cloned().collect()
}

/// Writes `splits_final.json`, byte for byte as nnU-Net does.
///
/// # Errors
/// [`FileError::Io`].
pub fn write(path: &Path, splits: &[Split]) -> Result<()> {
    io::write_json(path, splits)
}

fn sorted(cases: &[String]) -> Vec<String> {
    let mut cases = cases.to_vec();
    cases.sort();
    cases
}

fn split_by(cases: &[String], validates: impl Fn(usize) -> bool) -> Split {
    let pick = |wanted: bool| {
        let indices = (0..cases.len()).filter(|&case| validates(case) == wanted);
        indices.map(|case| cases[case].clone()).collect()
    };
    Split { train: pick(false), val: pick(true) }
}
