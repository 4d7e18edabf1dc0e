//! A dataset folder in nnU-Net's layout: `dataset.json`, `imagesTr`, `labelsTr`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

mod budget;
pub mod fingerprint;
pub mod json;
pub mod labels;
pub mod planner;
pub mod plans;
pub mod sparsify;
pub mod splits;
pub mod topology;

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
        let path = folder.join("dataset.json");
        let json = DatasetJson::read(&path)?;
        let labels = LabelManager::new(&json)?;
        let cases = match json.listed_cases(folder)? {
            Some(cases) => cases,
            None => {
                let labels = folder.join("labelsTr");
                cases_in(&folder.join("imagesTr"), Some(&labels), &json)?
            }
        };
        for file in cases.iter().filter_map(|case| case.label.as_ref()) {
            if !file.is_file() {
                let case = case_of(file, &json.file_ending);
                return Err(Error::LabelMissing { case, path: file.clone() });
            }
        }
        if cases.len() != json.num_training {
            return Err(Error::NumTraining { path, declared: json.num_training, found: cases.len() });
        }
        Ok(Dataset { folder: folder.into(), json, labels, cases })
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
    if let Some((file, case)) = files.iter().find_map(|file| {
        let (case, channel) = channel_file(file, ending)?;
        (channel >= declared).then_some((file, case))
    }) {
        return Err(Error::ChannelUndeclared { case: case.into(), path: images.join(file), declared });
    }
    let case = |name: &str| -> Result<CaseFiles> {
        let mut paths = Vec::with_capacity(declared);
        for (channel, label) in json.channel_names.iter().enumerate() {
            let file = format!("{name}_{channel:04}{ending}");
            let path = images.join(&file);
            if !files.contains(&file) {
                return Err(Error::ChannelMissing { case: name.into(), channel, name: label.clone(), path });
            }
            paths.push(path);
        }
        Ok(CaseFiles {
            name: name.into(),
            images: paths,
            label: labels.map(|folder| folder.join(format!("{name}{ending}"))),
        })
    };
    names.into_iter().map(case).collect()
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

fn case_of(file: &Path, ending: &str) -> String {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    name.strip_suffix(ending).unwrap_or(&name).to_owned()
}
