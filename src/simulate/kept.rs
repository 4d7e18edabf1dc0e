//! What a run leaves in its folder: the settings that it is made with, and in the end its outcome.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::annotate::Annotated;
use crate::error::{Error, FileError, Result};
use crate::io;

/// File of the settings; it is written first.
const SETTINGS: &str = "run.json";
/// File of the outcome; it is written last.
const OUTCOME: &str = "result.json";

/// What came out of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Name of the strategy, with its share.
    pub strategy: String,
    /// Name of its scheme.
    pub scheme: String,
    /// Seed of annotation, initial weights and patches.
    pub seed: u64,
    /// What was annotated.
    pub annotated: Annotated,
    /// Class or region, and its mean Dice over the held-out cases where it is predicted or true; none if it never is.
    pub dice: Vec<(String, Option<f64>)>,
    /// Mean of these; none if one is missing.
    pub mean_dice: Option<f64>,
    /// Cases it was evaluated on.
    pub cases: usize,
    /// Seconds of training, in all calls together.
    pub training_seconds: f64,
    /// Version of this program.
    pub voxgrad: String,
}

impl Outcome {
    /// The outcome of a run, if it is finished.
    ///
    /// # Errors
    /// [`FileError::Io`], [`FileError::Json`].
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        read(&folder.join(OUTCOME))
    }

    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        io::write_json(&folder.join(OUTCOME), self)
    }
}

/// Whether a run is finished.
pub(super) fn finished(folder: &Path) -> bool {
    folder.join(OUTCOME).is_file()
}

/// Keeps the settings of a run that begins.
pub(super) fn write_settings(folder: &Path, settings: &Value) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
    io::write_json(&folder.join(SETTINGS), settings)
}

/// In what the settings of a run that is there differ from those asked for, both values; nothing if there is none.
pub(super) fn differences(folder: &Path, asked: &Value) -> Result<Vec<String>> {
    let Some(found) = read::<Value>(&folder.join(SETTINGS))? else {
        return Ok(match finished(folder) {
            true => vec![format!("{SETTINGS} is not there, which says how it was made")],
            false => Vec::new(),
        });
    };
    let mut differences = Vec::new();
    compare("", &found, asked, &mut differences);
    Ok(differences)
}

/// Objects are compared field by field.
fn compare(name: &str, found: &Value, asked: &Value, differences: &mut Vec<String>) {
    if let (Value::Object(found), Value::Object(asked)) = (found, asked) {
        let names = found.keys().chain(asked.keys().filter(|name| !found.contains_key(*name)));
        for field in names {
            let [found, asked] = [found, asked].map(|object| object.get(field).unwrap_or(&Value::Null));
            let place = if name.is_empty() { field.clone() } else { format!("{name}.{field}") };
            compare(&place, found, asked, differences);
        }
        return;
    }
    if found == asked {
        return;
    }
    const LONGEST: usize = 60;
    let [found, asked] = [found, asked].map(Value::to_string);
    differences.push(match found.len().max(asked.len()) > LONGEST {
        true => format!("{name} is another"),
        false => format!("{name} was {found}, is now {asked}"),
    });
}

fn read<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        read => read.map_err(Error::io(path, "read"))?,
    };
    let value = serde_json::from_str(&text);
    value.map(Some).map_err(|source| Error::File(FileError::Json { path: path.into(), source }))
}
