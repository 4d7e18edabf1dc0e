//! Cases that are ready for training: stored by voxgrad, by nnU-Net, or preprocessed on the spot.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use super::converted::{convert, copy_of, origin};
use super::folder::{case_path, cases_folder, made_with, preprocess_raw, recipe};
use super::parallel::in_parallel;
use super::{PreprocessedCase, Preprocessor, StoredCase, label_counts, read_b2nd, read_npz};
use crate::compat::Compat;
use crate::dataset::CaseFiles;
use crate::error::{Error, FileError, PreprocessError, Result};

/// How to open the cases of a configuration.
#[derive(Debug, Clone)]
pub struct Opening<'a> {
    /// The folder of plans and splits.
    pub prepared: &'a Path,
    /// The configuration's name for its data.
    pub data_identifier: &'a str,
    /// Its preprocessing. What is not stored is preprocessed so, if the treatment of ignored voxels is not that of other
    /// cases.
    pub preprocessor: &'a Preprocessor,
    /// The treatment of ignored voxels that the cases must have.
    pub compat: Option<Compat>,
    /// Cases that are read at a time.
    pub workers: usize,
    /// Bytes that cases may take which have not been preprocessed.
    pub memory: u64,
    /// Whether a stored case that cannot be read is left out, with a note.
    pub skip_unreadable: bool,
}

/// The opened cases, in the order in which they were asked for.
#[derive(Debug)]
pub struct Opened {
    /// The cases.
    pub cases: Vec<PreparedCase>,
    /// The treatment of ignored voxels that they have in common.
    pub compat: Compat,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// A case that patches can be cut from.
#[derive(Debug)]
pub enum PreparedCase {
    /// On disk: parts are read as they are needed.
    Stored(Box<StoredCase>),
    /// In memory.
    InMemory(Box<PreprocessedCase>),
}

impl PreparedCase {
    /// Case identifier.
    pub fn name(&self) -> &str {
        match self {
            PreparedCase::Stored(case) => case.name(),
            PreparedCase::InMemory(case) => &case.name,
        }
    }

    /// How many voxels have each label that occurs.
    pub fn label_counts(&self) -> BTreeMap<i16, u64> {
        match self {
            PreparedCase::Stored(case) => case.label_counts(),
            PreparedCase::InMemory(case) => label_counts(case.seg.view()),
        }
    }
}

/// Where a case is to be had.
enum Place {
    Stored {
        case: Box<StoredCase>,
        compat: Option<Compat>,
        stale: bool,
        among_nnunets: bool,
    },
    /// nnU-Net's, and the copy of it that can be read in parts, if that has been made.
    Nnunets {
        path: PathBuf,
        older: bool,
        copy: Option<Box<StoredCase>>,
    },
    Raw,
    Nowhere,
}

impl Opening<'_> {
    /// Where the cases are to be had, those left out that cannot be read and may be.
    fn places<'f>(&self, files: &[&'f CaseFiles]) -> Result<(Vec<&'f CaseFiles>, Vec<Place>, Vec<String>)> {
        let (mut kept, mut places, mut notes) = (Vec::new(), Vec::new(), Vec::new());
        for (files, place) in files.iter().zip(in_parallel(files, self.workers, |files| self.place(files))) {
            match place {
                Err(error) if self.skip_unreadable => notes.push(left_out(&files.name, &error)),
                place => {
                    kept.push(*files);
                    places.push(place?);
                }
            }
        }
        Ok((kept, places, notes))
    }

    /// Opens cases, those of voxgrad first, then nnU-Net's, then the raw files. `on_case` is called after each, from
    /// several threads.
    ///
    /// Stored cases are compared with their raw files by size and time where the raw files are there.
    ///
    /// # Errors
    /// [`PreprocessError::StoredCases`] if some are made with other settings, from other files, or in two ways;
    /// [`PreprocessError::CaseMemory`] if those that have not been preprocessed are too large together; and what reading gives, and
    /// writing the copies that nnU-Net's cases are read from in parts.
    pub fn open(&self, files: &[&CaseFiles], on_case: impl Fn(&str) + Sync) -> Result<Opened> {
        let (files, places, mut notes) = self.places(files)?;
        let compat = self.common(&files, &places)?;
        notes.extend(odd(&files, &places));
        let preprocessor = Preprocessor { compat, ..self.preprocessor.clone() };
        let whole = places.iter().filter(|place| matches!(place, Place::Raw)).count();
        let held = Held {
            limit: self.memory,
            whole,
            cases: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
            copying: Mutex::new(()),
        };
        let work: Vec<_> = files.iter().zip(places).collect();
        let opened = in_parallel(&work, self.workers, |(files, place)| {
            let case = self.read(files, place, &preprocessor, &held);
            on_case(&files.name);
            case
        });
        let mut cases = Vec::with_capacity(opened.len());
        let mut faults = Vec::new();
        for case in opened {
            match case {
                Ok((case, warnings)) => {
                    cases.extend(case);
                    notes.extend(warnings);
                }
                // Which all cases after it have too.
                Err(fault @ Error::Preprocess(PreprocessError::CaseMemory { .. })) => return Err(fault),
                Err(fault) => faults.push(fault),
            }
        }
        Error::all(faults)?;
        if whole > 0 {
            let mebibytes = held.bytes.into_inner() as f64 / (1u64 << 20) as f64;
            notes.push(format!("{whole} cases are kept in memory as a whole: {mebibytes:.1} MiB"));
        }
        Ok(Opened { cases, compat, notes })
    }

    /// Opens one case, with what is odd about it. None if it cannot be read and is to be left out.
    fn read(
        &self,
        files: &CaseFiles,
        place: &Place,
        preprocessor: &Preprocessor,
        held: &Held,
    ) -> Result<(Option<PreparedCase>, Vec<String>)> {
        let (labels, spacing) = (&preprocessor.labels, preprocessor.spacing);
        match place {
            Place::Stored { case, .. } | Place::Nnunets { copy: Some(case), .. } => {
                Ok((Some(PreparedCase::Stored(case.clone())), Vec::new()))
            }
            Place::Nnunets { path, copy: None, .. } => {
                // A case is held as a whole, and more than once, while it is copied: one after the other.
                let _one = held.copying.lock().unwrap_or_else(PoisonError::into_inner);
                // Of the original before it is read: one that changes meanwhile is copied again next time.
                let origin = origin(path, preprocessor)?;
                let read = match path.extension().is_some_and(|ending| ending == "npz") {
                    true => read_npz(path, labels, spacing),
                    false => read_b2nd(path, labels, spacing),
                };
                let case = match read {
                    Err(error) if self.skip_unreadable => return Ok((None, vec![left_out(&files.name, &error)])),
                    read => read?,
                };
                match convert(self.prepared, self.data_identifier, &case, &origin) {
                    Err(Error::File(FileError::Io { path, source, .. }))
                        if matches!(source.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) =>
                    {
                        held.add(bytes(&case))?;
                        let note =
                            format!("case {}: kept in memory, since {} cannot be written", case.name, path.display());
                        Ok((Some(PreparedCase::InMemory(Box::new(case))), vec![note]))
                    }
                    copy => Ok((Some(PreparedCase::Stored(Box::new(copy?))), Vec::new())),
                }
            }
            Place::Raw | Place::Nowhere => {
                held.check()?;
                let (case, warnings) = preprocess_raw(files, labels, preprocessor)?;
                held.add(bytes(&case))?;
                Ok((Some(PreparedCase::InMemory(Box::new(case))), warnings))
            }
        }
    }

    fn place(&self, files: &CaseFiles) -> Result<Place> {
        let theirs = self.prepared.join(self.data_identifier);
        let own = case_path(&cases_folder(self.prepared, self.data_identifier), &files.name);
        let earlier = case_path(&theirs, &files.name);
        for (path, among_nnunets) in [(own, false), (earlier, true)] {
            if path.exists() {
                let case = Box::new(StoredCase::open(&path)?);
                let compat = made_with(&case, self.preprocessor);
                let stale = match compat {
                    Some(compat) if !files.images.is_empty() => {
                        let preprocessor = Preprocessor { compat, ..self.preprocessor.clone() };
                        case.recipe() != recipe(files, &preprocessor)?
                    }
                    _ => false,
                };
                return Ok(Place::Stored { case, compat, stale, among_nnunets });
            }
        }
        let path = |ending: &str| Some(theirs.join(format!("{}{ending}", files.name))).filter(|path| path.exists());
        Ok(match path(".b2nd").or(path(".npz")) {
            Some(path) => Place::Nnunets {
                older: older(&path, files),
                copy: copy_of(self.prepared, self.data_identifier, &files.name, &path, self.preprocessor).map(Box::new),
                path,
            },
            None if files.images.is_empty() => Place::Nowhere,
            None => Place::Raw,
        })
    }

    /// The treatment of ignored voxels that all cases have, or everything that is wrong with them.
    fn common(&self, files: &[&CaseFiles], places: &[Place]) -> Result<Compat> {
        let named = |wanted: &dyn Fn(&Place) -> bool| -> Vec<&str> {
            let pairs = files.iter().zip(places);
            pairs.filter(|(_, place)| wanted(place)).map(|(files, _)| files.name.as_str()).collect()
        };
        let other = named(&|place| matches!(place, Place::Stored { compat: None, .. }));
        let stale = named(&|place| matches!(place, Place::Stored { stale: true, .. }));
        let nowhere = named(&|place| matches!(place, Place::Nowhere));
        let mut problems = Vec::new();
        let mut list = |names: &[&str], problem: &str| {
            if !names.is_empty() {
                problems.push(format!("{} {problem}", names.join(", ")));
            }
        };
        list(&other, "made with other settings than the plans'");
        list(&stale, "made before the raw images or labels changed");
        list(&nowhere, "not preprocessed, and the raw files are not there");
        // Without an ignore label the two treatments are one.
        let differ = self.preprocessor.labels.ignore_label().is_some();
        let made = |compat: Compat| {
            named(&|place| match place {
                Place::Stored { compat: Some(made), .. } => *made == compat,
                Place::Nnunets { .. } => compat == Compat::Nnunet,
                _ => false,
            })
        };
        let (corrected, nnunets) = (made(Compat::Corrected), made(Compat::Nnunet));
        let found = match (corrected.is_empty(), nnunets.is_empty()) {
            (true, true) => None,
            (false, _) => Some(Compat::Corrected),
            (true, false) => Some(Compat::Nnunet),
        };
        if differ && !corrected.is_empty() && !nnunets.is_empty() {
            list(&nnunets, "made with nnU-Net's treatment of ignored voxels, the others with the corrected one");
        }
        if let (true, Some(wanted), Some(found)) = (differ, self.compat, found)
            && wanted != found
        {
            problems.push(format!("all made for {found} numbers where training has {wanted} ones"));
        }
        match problems.is_empty() {
            true => Ok(if differ { found.or(self.compat) } else { self.compat }.unwrap_or(self.preprocessor.compat)),
            false => {
                let folder = cases_folder(self.prepared, self.data_identifier);
                Err(Error::Preprocess(PreprocessError::StoredCases { folder, problems: problems.join("; ") }))
            }
        }
    }
}

/// The memory of the cases that stay in it as a whole.
struct Held {
    limit: u64,
    /// How many there are to be.
    whole: usize,
    /// How many there are.
    cases: AtomicUsize,
    bytes: AtomicU64,
    /// Held while a case is copied.
    copying: Mutex<()>,
}

impl Held {
    /// Counts a case, or refuses it.
    fn add(&self, bytes: u64) -> Result<()> {
        let held = self.bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let cases = self.cases.fetch_add(1, Ordering::Relaxed) + 1;
        match held > self.limit {
            true => Err(self.too_much(held, cases)),
            false => Ok(()),
        }
    }

    /// Whether there is room for another: what is too much is not added to while other threads come to their end.
    fn check(&self) -> Result<()> {
        match self.bytes.load(Ordering::Relaxed) {
            held if held > self.limit => Err(self.too_much(held, self.cases.load(Ordering::Relaxed))),
            _ => Ok(()),
        }
    }

    fn too_much(&self, held: u64, cases: usize) -> Error {
        let expected = held / cases.max(1) as u64 * self.whole as u64;
        Error::Preprocess(PreprocessError::CaseMemory { cases, whole: self.whole, held, expected, limit: self.limit })
    }
}

/// What a case takes in memory.
fn bytes(case: &PreprocessedCase) -> u64 {
    let locations = &case.class_locations;
    let listed = locations.foreground.iter().map(|(_, list)| list).chain(&locations.annotated).map(Vec::len);
    (4 * case.data.len() + 2 * case.seg.len() + 12 * listed.sum::<usize>()) as u64
}

/// Whether a file is older than the newest of a case's raw files.
fn older(path: &Path, files: &CaseFiles) -> bool {
    let modified = |path: &Path| fs::metadata(path).and_then(|file| file.modified()).ok();
    let newest = files.images.iter().chain(&files.label).filter_map(|path| modified(path)).max();
    newest.zip(modified(path)).is_some_and(|(raw, made)| raw > made)
}

/// What is said of a case that training goes on without.
pub(crate) fn left_out(case: &str, error: &Error) -> String {
    format!("case {case} is left out, it cannot be read: {error}")
}

/// What is used although something else may have been meant.
fn odd(files: &[&CaseFiles], places: &[Place]) -> Vec<String> {
    let mut notes = Vec::new();
    let mut list = |what: &dyn Fn(&Place) -> bool, note: &str| {
        let pairs = files.iter().zip(places).filter(|(_, place)| what(place));
        let names: Vec<&str> = pairs.map(|(files, _)| files.name.as_str()).collect();
        if !names.is_empty() {
            notes.push(format!("{} {note}: {}", names.len(), names.join(", ")));
        }
    };
    let among = |place: &Place| matches!(place, Place::Stored { among_nnunets: true, .. });
    list(
        &among,
        "cases lie where nnU-Net's own belong, which stops nnU-Net; `voxgrad preprocess` moves them to a folder of their \
         own",
    );
    let older = |place: &Place| matches!(place, Place::Nnunets { older: true, .. });
    list(&older, "cases that nnU-Net has preprocessed are older than their raw files, and are used as they are");
    let converted = |place: &Place| matches!(place, Place::Nnunets { copy: None, .. });
    list(
        &converted,
        "cases that nnU-Net has preprocessed are copied into chunks, once, so that they can be read in parts",
    );
    let raw = places.iter().filter(|place| matches!(place, Place::Raw)).count();
    if raw > 0 && raw < places.len() {
        let is_raw = |place: &Place| matches!(place, Place::Raw);
        list(&is_raw, "cases are not preprocessed: that is done now, `voxgrad preprocess` would do it once");
    }
    notes
}
