//! The folder of a new dataset: it appears under its name when everything in it is there.

use std::fs;
use std::path::{Path, PathBuf};

use crate::dataset::{CaseFiles, DatasetJson, LabelManager};
use crate::error::{Error, FileError, Result};
use serde_json::{Map, Value};

/// Everything that is ever written into such a folder; what else lies there is somebody's work.
const OWN: [&str; 10] = [
    "dataset.json",
    "sparsify.json",
    "import.json",
    "complete.json",
    "confidence",
    "imagesTr",
    "labelsTr",
    "imagesTs",
    "labelsTs",
    "splits_final.json",
];

/// A dataset folder that is being written beside its final place.
pub(crate) struct NewDataset {
    target: PathBuf,
    staging: PathBuf,
    committed: bool,
}

/// How image files came into the new dataset.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Transfer {
    /// Files that are the source's under a second name; they need no space.
    pub linked: usize,
    /// Files with bytes of their own.
    pub copied: usize,
}

impl std::ops::AddAssign for Transfer {
    fn add_assign(&mut self, other: Self) {
        self.linked += other.linked;
        self.copied += other.copied;
    }
}

impl NewDataset {
    /// Makes the folder that everything is written into first; `report` is the file that tells who made it.
    ///
    /// # Errors
    /// [`FileError::OutputExists`] if the target is there and may not be replaced: without `overwrite`; if it is, holds or lies
    /// in `source`; if it holds anything that this program did not write. [`FileError::Io`].
    pub(crate) fn begin(target: &Path, source: &Path, report: &str, overwrite: bool) -> Result<Self> {
        let refused = |problem: String| Error::File(FileError::OutputExists { path: target.into(), problem });
        let name = target.file_name().ok_or_else(|| refused("it has no name; name a new folder".into()))?;
        let parent = match target.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::create_dir_all(parent).map_err(Error::io(parent, "create"))?;
        let parent = fs::canonicalize(parent).map_err(Error::io(parent, "find"))?;
        let place = parent.join(name);
        let source = fs::canonicalize(source).map_err(Error::io(source, "find"))?;
        let place = fs::canonicalize(&place).unwrap_or(place);
        if place.starts_with(&source) || source.starts_with(&place) {
            return Err(refused(format!(
                "it is, holds or lies in the source {}; name another folder",
                source.display()
            )));
        }
        if place.exists() {
            let mut entries = Vec::new();
            for entry in fs::read_dir(&place).map_err(Error::io(&place, "list"))? {
                entries.push(entry.map_err(Error::io(&place, "list"))?.file_name().to_string_lossy().into_owned());
            }
            entries.sort();
            let strangers: Vec<&String> = entries.iter().filter(|name| !OWN.contains(&name.as_str())).collect();
            let ours = entries.iter().any(|name| name == report);
            if !entries.is_empty() && !overwrite {
                return Err(refused("it exists; name another folder, or ask for it to be replaced".into()));
            }
            if !strangers.is_empty() {
                return Err(refused(format!("it also holds {strangers:?}, which would be lost; move them away first")));
            }
            if !entries.is_empty() && !ours {
                return Err(refused("it is no dataset that this command made; delete it yourself if it may go".into()));
            }
        }
        let staging = parent.join(format!("writing-{}-{}", std::process::id(), name.to_string_lossy()));
        fs::create_dir(&staging).map_err(Error::io(&staging, "create"))?;
        let begun = NewDataset { target: place, staging, committed: false };
        for folder in ["imagesTr", "labelsTr"] {
            let folder = begun.path(folder);
            fs::create_dir(&folder).map_err(Error::io(folder, "create"))?;
        }
        Ok(begun)
    }

    /// Where a file of the dataset is written for now.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.staging.join(name)
    }

    /// Brings the images of a case along.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub(crate) fn take_images(&self, case: &CaseFiles, ending: &str, copy: bool) -> Result<Transfer> {
        let mut transfer = Transfer::default();
        for (channel, image) in case.images.iter().enumerate() {
            let name = format!("imagesTr/{}_{channel:04}{ending}", case.name);
            transfer += take(image, &self.path(&name), copy)?;
        }
        Ok(transfer)
    }

    /// Brings test cases and splits along, if the source has any.
    ///
    /// # Errors
    /// [`FileError::Io`].
    pub(crate) fn take_the_rest(&self, source: &Path, copy: bool) -> Result<Transfer> {
        let mut transfer = Transfer::default();
        for folder in ["imagesTs", "labelsTs"] {
            let from = source.join(folder);
            if !from.is_dir() {
                continue;
            }
            let to = self.path(folder);
            fs::create_dir(&to).map_err(Error::io(&to, "create"))?;
            for entry in fs::read_dir(&from).map_err(Error::io(&from, "list"))? {
                let file = entry.map_err(Error::io(&from, "list"))?.path();
                if let (true, Some(name)) = (file.is_file(), file.file_name()) {
                    transfer += take(&file, &to.join(name), copy)?;
                }
            }
        }
        let splits = source.join("splits_final.json");
        if splits.is_file() {
            // A file of its own: people edit their splits.
            take(&splits, &self.path("splits_final.json"), true)?;
        }
        Ok(transfer)
    }

    /// Puts the folder in its place.
    ///
    /// # Errors
    /// [`FileError::Io`]; what was there before is then still there.
    pub(crate) fn commit(mut self) -> Result<()> {
        let replaced = self.staging.with_file_name(format!(
            "replaced-{}-{}",
            std::process::id(),
            self.target.file_name().unwrap_or_default().to_string_lossy()
        ));
        let there = self.target.exists();
        if there {
            fs::rename(&self.target, &replaced).map_err(Error::io(&self.target, "rename"))?;
        }
        if let Err(error) = fs::rename(&self.staging, &self.target) {
            if there {
                // Best effort: the error that matters is the first one.
                let _ = fs::rename(&replaced, &self.target);
            }
            return Err(Error::io(&self.target, "rename to")(error));
        }
        self.committed = true;
        if there {
            fs::remove_dir_all(&replaced).map_err(Error::io(&replaced, "remove"))?;
        }
        Ok(())
    }
}

impl Drop for NewDataset {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_dir_all(&self.staging);
        }
    }
}

/// A second name for a file, or its copy where the file system gives it none.
fn take(from: &Path, to: &Path, copy: bool) -> Result<Transfer> {
    // A link to a symbolic link would point nowhere from elsewhere.
    let from = fs::canonicalize(from).map_err(Error::io(from, "find"))?;
    if !copy && fs::hard_link(&from, to).is_ok() {
        return Ok(Transfer { linked: 1, copied: 0 });
    }
    fs::copy(&from, to).map_err(Error::io(to, "write"))?;
    Ok(Transfer { linked: 0, copied: 1 })
}

/// A dataset's description with an ignore label.
pub(crate) fn with_ignore(described: &DatasetJson, ignore: i16) -> Result<Map<String, Value>> {
    let mut json = described.source().clone();
    if let Some(labels) = json.get_mut("labels").and_then(Value::as_object_mut) {
        labels.insert("ignore".into(), ignore.into());
    }
    // Files are where the layout has them now.
    json.remove("dataset");
    let path = &described.path;
    let text =
        serde_json::to_string(&json).map_err(|source| Error::File(FileError::Json { path: path.clone(), source }))?;
    LabelManager::new(&DatasetJson::parse(path, &text)?)?;
    Ok(json)
}
