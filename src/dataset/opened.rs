//! A dataset folder that has been looked through.

use super::case_files::CaseFiles;
use super::cases::{Cases, list_cases};
use super::json::DatasetJson;
use super::labels::LabelManager;
use std::path::{Path, PathBuf};

use crate::error::{DatasetError, Error, Result};

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
    /// What was ignored in the folders, to be told to the user.
    pub notes: Vec<String>,
}

impl Dataset {
    /// Opens a dataset and checks that every training case is complete.
    ///
    /// # Errors
    /// Everything that [`inspect`](Self::inspect) finds, in one error.
    pub fn open(folder: &Path) -> Result<Self> {
        let (dataset, failures) = Self::inspect(folder)?;
        Error::all(failures)?;
        Ok(dataset)
    }

    /// Opens a dataset and lists everything that is wrong with its files by their names alone: `Channel*`, `Label*`,
    /// [`DatasetError::ImageNames`], [`DatasetError::OtherEnding`], [`DatasetError::NumTraining`]. Cases that lack a file are left out of the
    /// dataset.
    ///
    /// # Errors
    /// What makes it impossible to list cases: an unreadable or wrong `dataset.json`, no images.
    pub fn inspect(folder: &Path) -> Result<(Self, Vec<Error>)> {
        let path = folder.join("dataset.json");
        let json = DatasetJson::read(&path)?;
        let labels = LabelManager::new(&json)?;
        let found = match json.listed_cases(folder)? {
            Some(listed) => with_files(listed, &json),
            None => list_cases(&folder.join("imagesTr"), Some(&folder.join("labelsTr")), &json)?,
        };
        let mut failures = found.failures;
        if found.meant != json.num_training {
            failures.push(Error::Dataset(DatasetError::NumTraining {
                path,
                declared: json.num_training,
                found: found.meant,
            }));
        }
        Ok((Dataset { folder: folder.into(), json, labels, cases: found.complete, notes: found.notes }, failures))
    }

    /// Names of the training cases, sorted.
    pub fn case_names(&self) -> Vec<String> {
        self.cases.iter().map(|case| case.name.clone()).collect()
    }
}

/// Of the cases that `dataset.json` lists, those whose files exist.
fn with_files(listed: Vec<CaseFiles>, json: &DatasetJson) -> Cases {
    let mut found = Cases { meant: listed.len(), ..Cases::default() };
    for case in listed {
        let before = found.failures.len();
        for (channel, path) in case.images.iter().enumerate().filter(|(_, path)| !path.is_file()) {
            let (name, path) = (json.channel_names[channel].clone(), path.clone());
            found.failures.push(Error::Dataset(DatasetError::ChannelMissing {
                case: case.name.clone(),
                channel,
                name,
                path,
            }));
        }
        if let Some(path) = case.label.clone().filter(|path| !path.is_file()) {
            found.failures.push(Error::Dataset(DatasetError::LabelMissing { case: case.name.clone(), path }));
        }
        if found.failures.len() == before {
            found.complete.push(case);
        }
    }
    found
}
