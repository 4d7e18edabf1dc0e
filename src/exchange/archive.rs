//! Zip archives that strangers made: listed whole and checked before anything is read, then read entry by entry
//! within the sizes that were listed.

use crate::error::{Error, ExchangeError, Result};
use rawzip::{CompressionMethod, FileReader, RECOMMENDED_BUFFER_SIZE, ZipArchive, ZipArchiveEntryWayfinder};
use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// Entries that an archive may have. A model with all of its validation predictions has thousands.
const MOST_ENTRIES: u64 = 200_000;
/// What an entry may grow to when it is unpacked, beyond which it must not shrink below a hundredth.
const SMALL: u64 = 16 << 20;
const DENSEST: u64 = 100;

/// An archive whose table has been read.
pub(super) struct Archive {
    path: PathBuf,
    zip: ZipArchive<FileReader>,
    entries: Vec<Entry>,
}

/// A file, or a folder, in an archive.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub name: String,
    /// Bytes, unpacked.
    pub size: u64,
    pub is_folder: bool,
    pub deflated: bool,
    place: ZipArchiveEntryWayfinder,
}

impl Archive {
    /// Reads the table of an archive and refuses one that lies about itself: entries of one name or in one place,
    /// sizes that no file has, links, encryption.
    ///
    /// # Errors
    /// [`FileError::Io`](crate::error::FileError::Io), [`ExchangeError::Archive`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path, "read"))?;
        let length = file.metadata().map_err(Error::io(path, "read"))?.len();
        let mut buffer = vec![0; RECOMMENDED_BUFFER_SIZE];
        let damaged = |problem: String| Error::Exchange(ExchangeError::Archive { path: path.into(), problem });
        let zip = ZipArchive::from_file(file, &mut buffer).map_err(|error| damaged(error.to_string()))?;
        let mut found = Self { path: path.into(), zip, entries: Vec::new() };
        let (mut names, mut places) = (HashSet::new(), Vec::new());
        if found.zip.entries_hint() > MOST_ENTRIES {
            return Err(damaged(format!("{} entries, more than {MOST_ENTRIES}", found.zip.entries_hint())));
        }
        let mut listed = found.zip.entries(&mut buffer);
        while let Some(entry) = listed.next_entry().map_err(|error| damaged(error.to_string()))? {
            let name = String::from_utf8(entry.file_path().as_bytes().to_vec())
                .map_err(|_| damaged("the name of an entry is not UTF-8".into()))?;
            let (size, packed) = (entry.uncompressed_size_hint(), entry.compressed_size_hint());
            let deflated = match entry.compression_method() {
                CompressionMethod::STORE => false,
                CompressionMethod::DEFLATE => true,
                other => return Err(damaged(format!("{name} is compressed by {other}; deflate is known"))),
            };
            let problem = if entry.flags().is_encrypted() {
                "is encrypted"
            } else if entry.mode().is_symlink() {
                "is a link"
            } else if packed > length || (!deflated && size != packed) {
                "has a size that the archive has no room for"
            } else if size > SMALL && size / DENSEST > packed {
                "would grow to more than a hundred times its size, as files made to fill disks do"
            } else if !names.insert(name.clone()) {
                "is there twice"
            } else {
                ""
            };
            if !problem.is_empty() {
                return Err(damaged(format!("{name:?} {problem}")));
            }
            places.push((entry.local_header_offset(), name.clone(), entry.wayfinder()));
            let (is_folder, place) = (entry.is_dir(), entry.wayfinder());
            found.entries.push(Entry { name, size, is_folder, deflated, place });
            if found.entries.len() as u64 > MOST_ENTRIES {
                return Err(damaged(format!("more than {MOST_ENTRIES} entries")));
            }
        }
        // A few bytes that many entries share would unpack to any amount.
        places.sort_by_key(|place| place.0);
        let mut end = 0;
        for (start, name, place) in places {
            let entry = found.zip.get_entry(place).map_err(|error| damaged(format!("{name}: {error}")))?;
            if start < end {
                return Err(damaged(format!("{name:?} lies in another entry's bytes")));
            }
            end = entry.compressed_data_range().1;
        }
        Ok(found)
    }

    /// The entries, in the order of the table.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry of a name.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.name == name)
    }

    /// Where an entry's bytes begin in the file.
    pub fn start(&self, entry: &Entry) -> Result<u64> {
        let found = self.zip.get_entry(entry.place).map_err(|error| self.damaged(entry, &error.to_string()))?;
        Ok(found.compressed_data_range().0)
    }

    /// Unpacks an entry, and compares its size and checksum with the table.
    ///
    /// # Errors
    /// [`ExchangeError::Archive`], and what writing to `target` fails with, as
    /// [`FileError::Io`](crate::error::FileError::Io) of `written`.
    pub fn copy(&self, entry: &Entry, target: &mut impl Write, written: &Path) -> Result<()> {
        let found = self.zip.get_entry(entry.place).map_err(|error| self.damaged(entry, &error.to_string()))?;
        let packed = found.reader();
        let unpacked: Box<dyn Read> = match entry.deflated {
            true => Box::new(flate2::read::DeflateDecoder::new(packed)),
            false => Box::new(packed),
        };
        let mut unpacked = found.verifying_reader(unpacked);
        let (mut buffer, mut left) = (vec![0; 1 << 16], entry.size);
        loop {
            let count = unpacked.read(&mut buffer).map_err(|error| self.damaged(entry, &error.to_string()))?;
            if count == 0 {
                break;
            }
            left =
                left.checked_sub(count as u64).ok_or_else(|| self.damaged(entry, "is longer than its table says"))?;
            target.write_all(&buffer[..count]).map_err(Error::io(written, "write"))?;
        }
        if left > 0 {
            return Err(self.damaged(entry, "is shorter than its table says"));
        }
        Ok(())
    }

    /// An entry's bytes.
    ///
    /// # Errors
    /// As [`copy`](Self::copy), and for more than `most` bytes.
    pub fn read(&self, entry: &Entry, most: u64) -> Result<Vec<u8>> {
        if entry.size > most {
            return Err(
                self.damaged(entry, &format!("has {} bytes, more than the {most} that it may have", entry.size))
            );
        }
        // What is stored lies in the file; what is packed may lie about its size.
        let mut bytes = Vec::with_capacity(if entry.deflated { 0 } else { entry.size as usize });
        self.copy(entry, &mut bytes, &self.path)?;
        Ok(bytes)
    }

    fn damaged(&self, entry: &Entry, problem: &str) -> Error {
        Error::Exchange(ExchangeError::Archive {
            path: self.path.clone(),
            problem: format!("{:?} {problem}", entry.name),
        })
    }
}
