//! Files that appear under their name only when they are complete.

use crate::error::{Error, Result};
use serde::Serialize;
use std::fs;
use std::io::Write;
use std::path::Path;

/// Writes a file beside its final name, to the disk, and renames it: a reader finds the old file or the new one, even
/// after a crash.
///
/// # Errors
/// [`Error::Io`]; the target is then as it was before.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!("writing-{}-{name}", std::process::id()));
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|error| {
        // Best effort: the error that matters is the first one.
        let _ = fs::remove_file(&temporary);
        Error::io(path, "write")(error)
    })
}

/// Writes JSON with nnU-Net's indentation of four, atomically.
///
/// # Errors
/// [`Error::Io`]; the target is then as it was before.
pub fn write_json<T: Serialize + ?Sized>(path: &Path, value: &T) -> Result<()> {
    let mut text = Vec::new();
    let indentation = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, indentation);
    value.serialize(&mut serializer).map_err(|source| Error::Json { path: path.into(), source })?;
    write_atomically(path, &text)
}
