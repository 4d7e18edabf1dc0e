//! What lies in a folder, by name, and which names may become a path.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// The names in a folder, without those that are nobody's data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The folder.
    pub folder: PathBuf,
    /// Names of files and folders in it, sorted.
    pub names: BTreeSet<String>,
    /// How many names begin with `._`: what macOS writes beside every file on foreign disks. They are no images,
    /// whatever their ending says.
    pub resource_forks: usize,
    /// Names that are not UTF-8, as far as they can be shown.
    pub unreadable: Vec<String>,
}

/// Lists a folder. Every reader of a folder of images or labels begins here, so that all ignore the same names.
///
/// # Errors
/// [`FileError::Io`](crate::error::FileError::Io).
pub fn list_folder(folder: &Path) -> Result<Listing> {
    let mut listing =
        Listing { folder: folder.into(), names: BTreeSet::new(), resource_forks: 0, unreadable: Vec::new() };
    for entry in fs::read_dir(folder).map_err(Error::io(folder, "list"))? {
        match entry.map_err(Error::io(folder, "list"))?.file_name().into_string() {
            Ok(name) if name.starts_with("._") => listing.resource_forks += 1,
            Ok(name) => _ = listing.names.insert(name),
            Err(name) => listing.unreadable.push(name.to_string_lossy().into_owned()),
        }
    }
    listing.unreadable.sort();
    Ok(listing)
}

impl Listing {
    /// What to tell the user about names that were left out; `None` if there are none.
    pub fn note(&self) -> Option<String> {
        let folder = self.folder.display();
        let mut parts = Vec::new();
        if self.resource_forks > 0 {
            parts.push(format!(
                "{} names that begin with `._` are ignored (macOS writes them beside the real files)",
                self.resource_forks
            ));
        }
        if !self.unreadable.is_empty() {
            parts.push(format!("names that are not UTF-8 are ignored: {}", self.unreadable.join(", ")));
        }
        (!parts.is_empty()).then(|| format!("{folder}: {}", parts.join("; ")))
    }
}

/// Whether a name that was read from a file may become a file's or folder's name: one part of a path, which leads neither
/// out of its folder nor elsewhere.
///
/// ```
/// use voxgrad::io::is_file_name;
/// assert!(is_file_name("case 1.b") && is_file_name(".hidden"));
/// assert!(!["", ".", "..", "../x", "/x", "a/b", "a/", "a\n"].into_iter().any(is_file_name));
/// ```
pub fn is_file_name(name: &str) -> bool {
    let dots = name.bytes().all(|byte| byte == b'.'); // the empty name too
    // Some of these separate folders on one operating system only; files travel.
    !dots && !name.contains(|c: char| matches!(c, '/' | '\\' | ':') || c.is_control())
}
