//! A dataset folder in nnU-Net's layout: `dataset.json`, `imagesTr`, `labelsTr`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

mod budget;
pub mod fingerprint;
pub mod folders;
pub mod json;
pub mod labels;
pub mod planner;
pub mod plans;
pub mod splits;
pub mod topology;
pub mod verify;

pub use json::DatasetJson;
pub use labels::{LabelGroup, LabelManager};

use crate::error::{Error, Result};

/// Files of one case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaseFiles {
    /// Case identifier: the file name without channel number and ending.
    pub name: String,
    /// One image per channel, in channel order.
    pub images: Vec<PathBuf>,
    /// The label map; absent for test cases.
    pub label: Option<PathBuf>,
}

/// An opened dataset: its description and the files of its training cases.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// The folder.
    pub folder: PathBuf,
    /// The parsed `dataset.json`.
    pub json: DatasetJson,
    /// Label rules derived from it.
    pub labels: LabelManager,
    /// Training cases, sorted by name.
    pub cases: Vec<CaseFiles>,
}

impl Dataset {
    /// Opens a dataset and checks that every training case is complete.
    ///
    /// # Errors
    /// [`Error::DatasetEmpty`], [`Error::NumTraining`], [`Error::ChannelMissing`], [`Error::ChannelUndeclared`],
    /// [`Error::LabelMissing`], and all errors of [`DatasetJson::read`] and [`LabelManager::new`].
    pub fn open(folder: &Path) -> Result<Self> {
        let (dataset, failures) = Self::inspect(folder)?;
        match failures.into_iter().next() {
            None => Ok(dataset),
            Some(first) => Err(first),
        }
    }

    /// Opens a dataset and lists everything that is wrong with its files by their names alone. Cases that lack a file
    /// are left out of the dataset.
    ///
    /// # Errors
    /// What makes it impossible to list cases: an unreadable or wrong `dataset.json`, no images.
    pub fn inspect(folder: &Path) -> Result<(Self, Vec<Error>)> {
        let path = folder.join("dataset.json");
        let json = DatasetJson::read(&path)?;
        let labels = LabelManager::new(&json)?;
        let (cases, mut failures) = match json.listed_cases(folder)? {
            Some(cases) => (cases, Vec::new()),
            None => {
                let labels = folder.join("labelsTr");
                list_cases(&folder.join("imagesTr"), Some(&labels), &json)?
            }
        };
        let found = cases.len() + failures.iter().filter(|e| matches!(e, Error::ChannelMissing { .. })).count();
        let (cases, unlabelled): (Vec<_>, Vec<_>) =
            cases.into_iter().partition(|case| case.label.as_ref().is_none_or(|file| file.is_file()));
        failures.extend(unlabelled.into_iter().filter_map(|case| {
            let path = case.label?;
            Some(Error::LabelMissing { case: case.name, path })
        }));
        if found != json.num_training {
            failures.push(Error::NumTraining { path, declared: json.num_training, found });
        }
        Ok((Dataset { folder: folder.into(), json, labels, cases }, failures))
    }

    /// Names of the training cases, sorted.
    pub fn case_names(&self) -> Vec<String> {
        self.cases.iter().map(|case| case.name.clone()).collect()
    }
}

/// Cases of an image folder, sorted by name, with the label file each must have in `labels`.
///
/// nnU-Net's rule: a case is everything before `_` + four digits + ending. Label files are not looked for here.
///
/// # Errors
/// [`Error::DatasetEmpty`], [`Error::ChannelMissing`], [`Error::ChannelUndeclared`].
pub fn cases_in(images: &Path, labels: Option<&Path>, json: &DatasetJson) -> Result<Vec<CaseFiles>> {
    let (cases, failures) = list_cases(images, labels, json)?;
    match failures.into_iter().next() {
        None => Ok(cases),
        Some(first) => Err(first),
    }
}

/// The complete cases of an image folder, and what is wrong with the others.
fn list_cases(images: &Path, labels: Option<&Path>, json: &DatasetJson) -> Result<(Vec<CaseFiles>, Vec<Error>)> {
    let ending = &json.file_ending;
    let mut files = BTreeSet::new();
    for entry in fs::read_dir(images).map_err(Error::io(images, "list"))? {
        let entry = entry.map_err(Error::io(images, "list"))?;
        if let Ok(name) = entry.file_name().into_string() {
            files.insert(name);
        }
    }
    let names: BTreeSet<&str> = files.iter().filter_map(|file| Some(channel_file(file, ending)?.0)).collect();
    if names.is_empty() {
        return Err(Error::DatasetEmpty { path: images.into(), ending: ending.clone() });
    }
    let declared = json.channel_names.len();
    let surplus = files.iter().filter_map(|file| {
        let (case, channel) = channel_file(file, ending)?;
        let error = Error::ChannelUndeclared { case: case.into(), path: images.join(file), declared };
        (channel >= declared).then_some(error)
    });
    let mut failures: Vec<Error> = surplus.collect();
    let mut cases = Vec::with_capacity(names.len());
    for name in names {
        let file = |channel: usize| format!("{name}_{channel:04}{ending}");
        let missing = (0..declared).find(|&channel| !files.contains(&file(channel)));
        match missing {
            Some(channel) => failures.push(Error::ChannelMissing {
                case: name.into(),
                channel,
                name: json.channel_names[channel].clone(),
                path: images.join(file(channel)),
            }),
            None => cases.push(CaseFiles {
                name: name.into(),
                images: (0..declared).map(|channel| images.join(file(channel))).collect(),
                label: labels.map(|folder| folder.join(format!("{name}{ending}"))),
            }),
        }
    }
    Ok((cases, failures))
}

/// Splits `case_0001.nii.gz` into the case and its channel number.
fn channel_file<'a>(file: &'a str, ending: &str) -> Option<(&'a str, usize)> {
    let (case, channel) = file.strip_suffix(ending)?.rsplit_once('_')?;
    let four_digits = channel.len() == 4 && channel.bytes().all(|b| b.is_ascii_digit());
    if case.is_empty() || !four_digits {
        return None;
    }
    Some((case, channel.parse().ok()?))
}
