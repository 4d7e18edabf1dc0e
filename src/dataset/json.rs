//! `dataset.json`: what the channels and labels of a dataset mean.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::case_files::CaseFiles;
use crate::error::{DatasetError, Error, FileError, Result};
use crate::io;

/// Value of an entry of `labels`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelEntry {
    /// One label value.
    Label(i64),
    /// Several label values that together are one region.
    Region(Vec<i64>),
}

/// A parsed `dataset.json`. Only shape and types are checked here; what the labels may be is
/// [`LabelManager`](super::LabelManager)'s business.
#[derive(Debug, Clone)]
pub struct DatasetJson {
    /// Where it was read from; errors about its content name this path.
    pub path: PathBuf,
    /// Names of the channels in channel order; a name selects the normalisation.
    pub channel_names: Vec<String>,
    /// Entries of `labels` in the file's order, which decides the order of regions.
    pub labels: Vec<(String, LabelEntry)>,
    /// Label to write for each region.
    pub regions_class_order: Option<Vec<i64>>,
    /// Number of training cases.
    pub num_training: usize,
    /// Ending of image and label files, dot included.
    pub file_ending: String,
    source: Map<String, Value>,
}

impl DatasetJson {
    /// Reads a `dataset.json`.
    ///
    /// # Errors
    /// [`FileError::Io`], [`FileError::Json`], or [`FileError::Field`] for a missing or mistyped field.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io(path, "read"))?;
        Self::parse(path, &text)
    }

    /// Parses the text of a `dataset.json`; `path` is for error messages.
    ///
    /// # Errors
    /// As [`DatasetJson::read`].
    pub fn parse(path: &Path, text: &str) -> Result<Self> {
        let source: Map<String, Value> =
            serde_json::from_str(text).map_err(|source| Error::File(FileError::Json { path: path.into(), source }))?;
        let fields = Fields { path, source: &source };
        let mut faults = Vec::new();
        // A field that is wrong does not hide what is wrong with the next one.
        let (channel_names, labels) = (kept(fields.channel_names(), &mut faults), kept(fields.labels(), &mut faults));
        let regions_class_order = kept(fields.regions_class_order(), &mut faults);
        let num_training = kept(fields.num_training(), &mut faults);
        let file_ending = kept(fields.file_ending(), &mut faults);
        kept(fields.reader(), &mut faults);
        Error::all(faults)?;
        Ok(DatasetJson {
            channel_names,
            labels,
            regions_class_order,
            num_training,
            file_ending,
            path: path.into(),
            source,
        })
    }

    /// The whole file as read, unknown keys and key order included; for copying it beside results.
    pub fn source(&self) -> &Map<String, Value> {
        &self.source
    }

    /// Cases listed in the optional key `dataset` (`{case: {"images": [...], "label": ...}}`), sorted by name. Relative
    /// paths start at the dataset folder; `$NAME` and `${NAME}` are replaced by environment variables.
    pub(super) fn listed_cases(&self, folder: &Path) -> Result<Option<Vec<CaseFiles>>> {
        let fields = Fields { path: &self.path, source: &self.source };
        let Some(listed) = self.source.get("dataset") else {
            return Ok(None);
        };
        let listed = listed
            .as_object()
            .filter(|cases| !cases.is_empty())
            .ok_or_else(|| fields.error("dataset", "expected an object with one entry per case"))?;
        let (mut cases, mut faults) = (Vec::with_capacity(listed.len()), Vec::new());
        for (name, entry) in listed {
            match self.listed_case(&fields, folder, name, entry) {
                Ok(case) => cases.push(case),
                Err(fault) => faults.push(fault),
            }
        }
        Error::all(faults)?;
        cases.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Some(cases))
    }

    fn listed_case(&self, fields: &Fields, folder: &Path, name: &str, entry: &Value) -> Result<CaseFiles> {
        let field = format!("dataset.{name}");
        // Preprocessed cases, predictions and pictures are files of this name.
        if !io::is_file_name(name) {
            return Err(Error::File(FileError::UnsafeName {
                path: self.path.clone(),
                field: "dataset".into(),
                name: name.into(),
            }));
        }
        let file = |value: &Value| -> Result<PathBuf> {
            let text = value.as_str().ok_or_else(|| fields.error(&field, "expected file names as strings"))?;
            Ok(folder.join(expand_environment(text)))
        };
        let images = entry
            .get("images")
            .and_then(Value::as_array)
            .ok_or_else(|| fields.error(&field, "expected a list `images`"))?;
        if images.len() != self.channel_names.len() {
            return Err(fields.error(
                &field,
                &format!("`images` has {} files for {} channels", images.len(), self.channel_names.len()),
            ));
        }
        let label = entry.get("label").ok_or_else(|| fields.error(&field, "`label` is missing"))?;
        let images = images.iter().map(file).collect::<Result<_>>()?;
        Ok(CaseFiles { name: name.into(), images, label: Some(file(label)?) })
    }
}

/// A field's value, or a placeholder beside the fault.
fn kept<T: Default>(field: Result<T>, faults: &mut Vec<Error>) -> T {
    field.unwrap_or_else(|fault| {
        faults.push(fault);
        T::default()
    })
}

/// Typed access to the fields of one file.
struct Fields<'a> {
    path: &'a Path,
    source: &'a Map<String, Value>,
}

impl Fields<'_> {
    fn error(&self, field: &str, problem: &str) -> Error {
        Error::File(FileError::Field { path: self.path.into(), field: field.into(), problem: problem.into() })
    }

    fn required(&self, field: &str) -> Result<&Value> {
        self.source.get(field).ok_or_else(|| self.error(field, "missing; dataset.json needs it"))
    }

    /// `channel_names`, or its name before version 2, `modality`: an object `{"0": name, "1": name, ...}`.
    fn channel_names(&self) -> Result<Vec<String>> {
        let field = if self.source.contains_key("channel_names") {
            "channel_names"
        } else if self.source.contains_key("modality") {
            "modality"
        } else {
            return Err(self.error("channel_names", "missing; dataset.json needs it"));
        };
        let object = self
            .required(field)?
            .as_object()
            .filter(|names| !names.is_empty())
            .ok_or_else(|| self.error(field, "expected an object such as {\"0\": \"T1\", \"1\": \"T2\"}"))?;
        (0..object.len())
            .map(|channel| {
                object.get(&channel.to_string()).and_then(Value::as_str).map(str::to_owned).ok_or_else(|| {
                    self.error(
                        field,
                        &format!("no name under key \"{channel}\"; keys must run from \"0\" without gaps"),
                    )
                })
            })
            .collect()
    }

    fn num_training(&self) -> Result<usize> {
        let number = self.required("numTraining")?.as_u64().and_then(|number| usize::try_from(number).ok());
        number.ok_or_else(|| self.error("numTraining", "expected a number of cases"))
    }

    fn labels(&self) -> Result<Vec<(String, LabelEntry)>> {
        let object = self
            .required("labels")?
            .as_object()
            .ok_or_else(|| self.error("labels", "expected an object such as {\"background\": 0, \"tumor\": 1}"))?;
        if let Some(corrected) = reversed(object) {
            return Err(Error::Dataset(DatasetError::LabelsReversed { path: self.path.into(), corrected }));
        }
        object
            .iter()
            .map(|(name, value)| {
                let entry = match value {
                    Value::Array(members) if !members.is_empty() => {
                        members.iter().map(Value::as_i64).collect::<Option<_>>().map(LabelEntry::Region)
                    }
                    other => other.as_i64().map(LabelEntry::Label),
                };
                let entry = entry.ok_or_else(|| {
                    self.error(&format!("labels.{name}"), "expected an integer or a list of integers")
                })?;
                Ok((name.clone(), entry))
            })
            .collect()
    }

    fn regions_class_order(&self) -> Result<Option<Vec<i64>>> {
        match self.source.get("regions_class_order") {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value
                .as_array()
                .and_then(|labels| labels.iter().map(Value::as_i64).collect())
                .map(Some)
                .ok_or_else(|| self.error("regions_class_order", "expected a list of integers")),
        }
    }

    /// `overwrite_image_reader_writer`: the readers of NIfTI that leave the axes as they are stored are ours.
    fn reader(&self) -> Result<()> {
        match self.source.get("overwrite_image_reader_writer") {
            None | Some(Value::Null) => Ok(()),
            Some(Value::String(name)) if ["None", "SimpleITKIO", "NibabelIO"].contains(&name.as_str()) => Ok(()),
            Some(other) => Err(self.error(
                "overwrite_image_reader_writer",
                &format!("{other} is not supported: expected SimpleITKIO or NibabelIO, or leave the field out"),
            )),
        }
    }

    fn file_ending(&self) -> Result<String> {
        match self.required("file_ending")?.as_str() {
            Some(ending @ (".nii.gz" | ".nii")) => Ok(ending.into()),
            _ => Err(self.error("file_ending", "expected \".nii.gz\" or \".nii\"")),
        }
    }
}

/// The block `labels` as it should be, where every key is a value and every value a name.
fn reversed(labels: &Map<String, Value>) -> Option<String> {
    let pairs: Option<Vec<(i64, &str)>> =
        labels.iter().map(|(key, value)| Some((key.trim().parse().ok()?, value.as_str()?))).collect();
    let pairs = pairs.filter(|pairs| !pairs.is_empty())?;
    let lines: Vec<String> = pairs.iter().map(|(value, name)| format!("    {}: {value}", Value::from(*name))).collect();
    Some(format!("\"labels\": {{\n{}\n}}", lines.join(",\n")))
}

/// Replaces `$NAME` and `${NAME}`; unknown variables stay as written, so that the missing file's name shows them.
fn expand_environment(text: &str) -> String {
    let mut expanded = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let (name, whole) = match after.strip_prefix('{').and_then(|a| a.split_once('}')) {
            Some((name, _)) => (name, name.len() + 2),
            None => {
                let end = after.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).unwrap_or(after.len());
                (&after[..end], end)
            }
        };
        // Names that the system's functions would not accept are no variables.
        let usable = !name.is_empty() && !name.contains(['=', '\0']);
        match usable.then(|| std::env::var(name)) {
            Some(Ok(value)) => expanded.push_str(&value),
            _ => {
                expanded.push('$');
                expanded.push_str(&after[..whole]);
            }
        }
        rest = &after[whole..];
    }
    expanded + rest
}
