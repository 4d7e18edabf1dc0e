//! nnU-Net's three folders and the datasets in them: `nnUNet_raw`, `nnUNet_preprocessed`, `nnUNet_results`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{DatasetError, Error, Result};

/// Where datasets, preprocessed data and results lie; a folder that nobody named is `None`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Folders {
    /// Holds `DatasetXXX_Name/{dataset.json, imagesTr, labelsTr}`.
    pub raw: Option<PathBuf>,
    /// Holds what planning and preprocessing write.
    pub preprocessed: Option<PathBuf>,
    /// Holds what training writes.
    pub results: Option<PathBuf>,
}

/// A dataset that was asked for by id, name or path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// `DatasetXXX_Name`, or the last part of a path.
    pub name: String,
    /// Its raw folder, whether or not that exists; `None` if no raw folder is known.
    pub raw: Option<PathBuf>,
}

impl Folders {
    /// The folders given, else those that nnU-Net's environment variables name.
    pub fn or_environment(raw: Option<PathBuf>, preprocessed: Option<PathBuf>, results: Option<PathBuf>) -> Self {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Folders {
            raw: raw.or_else(|| variable("nnUNet_raw")),
            preprocessed: preprocessed.or_else(|| variable("nnUNet_preprocessed")),
            results: results.or_else(|| variable("nnUNet_results")),
        }
    }

    /// Finds a dataset by its number (`4`, `004`), its name (`Dataset004_Hippocampus`) or the path of its raw folder.
    ///
    /// # Errors
    /// [`DatasetError::DatasetNotFound`] or [`DatasetError::DatasetAmbiguous`], which list what was found; [`FileError::Io`](crate::error::FileError::Io).
    pub fn locate(&self, wanted: &str) -> Result<Located> {
        let path = Path::new(wanted);
        if path.components().count() > 1 || path.join("dataset.json").is_file() {
            let full = path.canonicalize().map_err(Error::io(path, "open"))?;
            let name = full.file_name().unwrap_or_default().to_string_lossy().into_owned();
            return Ok(Located { name, raw: Some(full) });
        }
        let present = self.datasets()?;
        let matches: Vec<&String> = match wanted.parse::<u16>() {
            Ok(id) => present.iter().filter(|name| id_of(name) == Some(id)).collect(),
            Err(_) => present.iter().filter(|name| *name == wanted).collect(),
        };
        match matches.as_slice() {
            [name] => {
                let raw = self.raw.as_ref().map(|folder| folder.join(name));
                Ok(Located { name: name.to_string(), raw })
            }
            [] => Err(Error::Dataset(DatasetError::DatasetNotFound {
                wanted: wanted.into(),
                searched: self.known().map(|folder| folder.display().to_string()).collect(),
                found: present.into_iter().collect(),
            })),
            several => Err(Error::Dataset(DatasetError::DatasetAmbiguous {
                wanted: wanted.into(),
                found: several.iter().map(|name| name.to_string()).collect(),
            })),
        }
    }

    /// Names of all datasets in any of the folders.
    fn datasets(&self) -> Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        // Results and preprocessed data may not exist before the first run.
        for folder in self.known().filter(|folder| folder.is_dir()) {
            for entry in fs::read_dir(folder).map_err(Error::io(folder, "list"))? {
                let entry = entry.map_err(Error::io(folder, "list"))?;
                if let Some(name) = entry.file_name().to_str().filter(|name| id_of(name).is_some())
                    && entry.path().is_dir()
                {
                    names.insert(name.to_owned());
                }
            }
        }
        Ok(names)
    }

    fn known(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.raw, &self.preprocessed, &self.results].into_iter().flatten()
    }

    /// Folder of a dataset's preprocessed data.
    ///
    /// # Errors
    /// [`DatasetError::FolderUnknown`] if neither the caller nor the environment names the place.
    pub fn preprocessed_of(&self, name: &str) -> Result<PathBuf> {
        let folder = self.preprocessed.as_ref();
        folder.map(|folder| folder.join(name)).ok_or(Error::Dataset(DatasetError::FolderUnknown {
            variable: "nnUNet_preprocessed",
            what: "preprocessed datasets",
        }))
    }

    /// Folder of a dataset's results.
    ///
    /// # Errors
    /// As [`preprocessed_of`](Self::preprocessed_of).
    pub fn results_of(&self, name: &str) -> Result<PathBuf> {
        let folder = self.results.as_ref();
        folder
            .map(|folder| folder.join(name))
            .ok_or(Error::Dataset(DatasetError::FolderUnknown { variable: "nnUNet_results", what: "results" }))
    }
}

impl Located {
    /// The raw folder.
    ///
    /// # Errors
    /// [`DatasetError::FolderUnknown`] if neither the caller nor the environment names the place.
    pub fn raw(&self) -> Result<&Path> {
        self.raw
            .as_deref()
            .ok_or(Error::Dataset(DatasetError::FolderUnknown { variable: "nnUNet_raw", what: "raw datasets" }))
    }
}

/// Whether a folder of this name holds a dataset: `Dataset004_Hippocampus`.
pub fn is_dataset_name(name: &str) -> bool {
    id_of(name).is_some()
}

/// The number in `Dataset004_Hippocampus`.
fn id_of(name: &str) -> Option<u16> {
    let (digits, _) = name.strip_prefix("Dataset")?.split_once('_')?;
    let three = digits.len() == 3 && digits.bytes().all(|b| b.is_ascii_digit());
    three.then(|| digits.parse().ok())?
}
