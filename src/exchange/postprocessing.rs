//! nnU-Net's `postprocessing.pkl`: the pickle of a list of functions and one of their arguments. No function is called by
//! it here; the only one that is known stands for its name.

use super::pickle::{self, Value};
use crate::dataset::LabelGroup;
use crate::error::{Error, ExchangeError, Result};
use crate::eval::Postprocessing;
use crate::io::write_atomically;
use std::fs;
use std::path::Path;

/// Reads the postprocessing that nnU-Net or this program has determined, `postprocessing.pkl` or `postprocessing.json`.
///
/// # Errors
/// [`FileError::Io`](crate::error::FileError::Io); [`ExchangeError::PickleGlobal`] for a pickle that names anything but
/// nnU-Net's function that keeps the largest component; [`ExchangeError::Postprocessing`] for one that is damaged or holds
/// anything but labels; those of [`Postprocessing::read`].
pub fn read_postprocessing(path: &Path) -> Result<Postprocessing> {
    if path.extension().is_some_and(|ending| ending == "json") {
        return Postprocessing::read(path);
    }
    let wrong = |problem: String| Error::Exchange(ExchangeError::Postprocessing { path: path.into(), problem });
    let bytes = fs::read(path).map_err(Error::io(path, "read"))?;
    let value = pickle::read(&bytes).map_err(|fault| match fault {
        pickle::Fault::Global(name) => ExchangeError::PickleGlobal { path: path.into(), name }.into(),
        pickle::Fault::Damaged(problem) => wrong(problem),
    })?;
    let shape = || wrong("expected a list of functions and one of as many arguments".into());
    let Some([functions, arguments]) = value.items() else { return Err(shape()) };
    let (Some(functions), Some(arguments)) = (functions.items(), arguments.items()) else { return Err(shape()) };
    if functions.len() != arguments.len() {
        return Err(shape());
    }
    let mut keep_largest = Vec::with_capacity(functions.len());
    for (function, arguments) in functions.iter().zip(arguments) {
        if *function != Value::KeepLargestComponent {
            return Err(wrong("holds something that is no function".into()));
        }
        let only = matches!(arguments, Value::Dict(entries) if entries.len() == 1);
        let group = arguments.get("labels_or_regions").filter(|_| only).and_then(group_of);
        keep_largest
            .push(group.ok_or_else(|| wrong("expected `labels_or_regions` with labels, and nothing else".into()))?);
    }
    Ok(Postprocessing { keep_largest })
}

/// Writes `postprocessing.pkl`, which nnU-Net's `nnUNetv2_apply_postprocessing` reads.
///
/// # Errors
/// [`FileError::Io`](crate::error::FileError::Io).
pub fn write_postprocessing(path: &Path, postprocessing: &Postprocessing) -> Result<()> {
    let functions = postprocessing.keep_largest.iter().map(|_| Value::KeepLargestComponent).collect();
    let label = |label: &i16| Value::Int((*label).into());
    let arguments = postprocessing.keep_largest.iter().map(|group| {
        let labels = match group {
            LabelGroup::Label(one) => label(one),
            LabelGroup::Region(labels) => Value::Tuple(labels.iter().map(label).collect()),
        };
        Value::dict([("labels_or_regions", labels)])
    });
    let both = Value::Tuple(vec![Value::List(functions), Value::List(arguments.collect())]);
    write_atomically(path, &pickle::write(&both))
}

/// A label, or a list of labels and regions, which together are one mask.
fn group_of(value: &Value) -> Option<LabelGroup> {
    let label = |value: &Value| value.as_index().and_then(|label| i16::try_from(label).ok());
    match value.items() {
        None => Some(LabelGroup::Label(label(value)?)),
        Some(entries) => {
            let flat = entries.iter().flat_map(|entry| entry.items().unwrap_or(std::slice::from_ref(entry)));
            Some(LabelGroup::Region(flat.map(label).collect::<Option<_>>()?))
        }
    }
}
