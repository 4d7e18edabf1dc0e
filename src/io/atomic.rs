//! Files that appear under their name only when they are complete.
//!
//! A file is written in a folder of its own beside its final place, `.voxgrad-PID-N.partial`, which no reader takes for a
//! case, and renamed out of it. The writer keeps that folder locked: what a killed process left behind is unlocked, and
//! removed when the next process writes to the same place.

use crate::error::{Error, FileError, Result};
use serde::Serialize;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

const PREFIX: &str = ".voxgrad-";
const ENDING: &str = ".partial";

/// Writes a file beside its final name, to the disk, and renames it: a reader finds the old file or the new one, even
/// after a crash.
///
/// # Errors
/// [`FileError::Io`]; the target is then as it was before.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    write_aside(path, "content", |file| fs::write(file, bytes).map_err(Error::io(path, "write")))
}

/// Writes JSON with nnU-Net's indentation of four, atomically.
///
/// # Errors
/// [`FileError::Io`]; the target is then as it was before.
pub fn write_json<T: Serialize + ?Sized>(path: &Path, value: &T) -> Result<()> {
    let mut text = Vec::new();
    let indentation = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, indentation);
    value.serialize(&mut serializer).map_err(|source| Error::File(FileError::Json { path: path.into(), source }))?;
    write_atomically(path, &text)
}

/// Lets `write` make a file or folder called `name` in a folder of its own, brings that to the disk, and renames it to
/// `path`.
pub(crate) fn write_aside(path: &Path, name: &str, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    // What is named is the file that was to be written, not the folder that is missing.
    let named = |error| match error {
        Error::File(FileError::Io { path: at, action, source }) if at == folder => Error::io(path, action)(source),
        error => error,
    };
    in_scratch(folder, |scratch| {
        let file = scratch.join(name);
        write(&file)?;
        let place = || {
            File::open(&file)?.sync_all()?;
            fs::rename(&file, path)?;
            // The new name too: a folder is a file on its own.
            if cfg!(unix) { File::open(folder)?.sync_all() } else { Ok(()) }
        };
        place().map_err(Error::io(path, "write"))
    })
    .map_err(named)
}

/// Lets `work` write in a folder of its own inside of `folder`, which is removed afterwards.
pub(crate) fn in_scratch<T>(folder: &Path, work: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    if first_write_to(folder) {
        // Best effort: what cannot be removed is no reason not to write.
        let _ = remove_leftovers(folder);
    }
    let scratch = Scratch::create(folder).map_err(Error::io(folder, "write"))?;
    work(&scratch.path)
}

/// Whether this process has not written to the folder before.
fn first_write_to(folder: &Path) -> bool {
    static KNOWN: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner).insert(folder.to_path_buf())
}

/// Removes from a folder what killed processes were writing there, and returns how many files that were. A folder that
/// does not exist has none.
///
/// # Errors
/// [`FileError::Io`] if the folder cannot be listed, or a leftover not be removed.
pub fn remove_leftovers(folder: &Path) -> Result<usize> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        entries => entries.map_err(Error::io(folder, "list"))?,
    };
    let mut removed = 0;
    for entry in entries {
        let path = entry.map_err(Error::io(folder, "list"))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !(name.starts_with(PREFIX) && name.ends_with(ENDING)) {
            continue;
        }
        // Held while it is removed, so that nobody begins to write in it.
        let Ok(lock) = File::open(&path) else { continue };
        if lock.try_lock().is_err() {
            continue;
        }
        match fs::remove_dir_all(&path) {
            Ok(()) => removed += 1,
            // Its writer was done with it in this moment.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(path, "remove")(error)),
        }
    }
    Ok(removed)
}

/// Removes a file, if it is there. Returns whether it was.
///
/// # Errors
/// [`FileError::Io`].
pub fn remove_if_there(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        removed => removed.map(|()| true).map_err(Error::io(path, "remove")),
    }
}

/// A folder of this process, removed when it is dropped.
struct Scratch {
    path: PathBuf,
    /// Keeps the lock; `None` where folders cannot be locked.
    _lock: Option<File>,
}

impl Scratch {
    fn create(beside: &Path) -> io::Result<Self> {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        loop {
            let count = COUNTER.fetch_add(1, Ordering::Relaxed);
            let path = beside.join(format!("{PREFIX}{}-{count}{ENDING}", std::process::id()));
            match fs::create_dir(&path) {
                // Of a process of the same number on another machine, or of one that was killed.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                created => created?,
            }
            let lock = File::open(&path).and_then(|folder| folder.lock().map(|()| folder)).ok();
            let scratch = Scratch { path, _lock: lock };
            // Before it was locked, somebody may have taken it for a leftover.
            if scratch.path.is_dir() {
                return Ok(scratch);
            }
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Best effort: the error that matters has been returned, and the next run removes what is left.
        let _ = fs::remove_dir_all(&self.path);
    }
}
