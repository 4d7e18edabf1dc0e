//! Archives of trained models in nnU-Net's layout: `DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION/fold_N/...`, which
//! are unpacked into the folder of results.

use super::archive::{Archive, Entry};
use super::folder::CHECKPOINTS;
use crate::dataset::folders::is_dataset_name;
use crate::dataset::splits::Fold;
use crate::error::{Error, ExchangeError, Result};
use crate::io::{in_scratch, is_file_name, write_aside};
use flate2::Compression;
use flate2::write::DeflateEncoder;
use rawzip::{CompressionMethod, ZipArchiveWriter};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Bytes that an archive may unpack to: more than all models of a dataset with their validation predictions have.
const LARGEST: u64 = 256 << 30;

/// What goes into an archive.
#[derive(Clone, Debug)]
pub struct Bundle {
    /// Model folders, inside of the folder of results.
    pub models: Vec<PathBuf>,
    /// Their folds.
    pub folds: Vec<Fold>,
    /// Names of checkpoints; the final ones of either program if empty.
    pub checkpoints: Vec<String>,
    /// Whether the predictions of the validation cases go with them.
    pub predictions: bool,
}

/// What came out of an archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installed {
    /// The model folders.
    pub models: Vec<PathBuf>,
    /// Files in them.
    pub files: usize,
}

/// Packs models that lie in the folder of results, atomically. Returns the number of files.
///
/// # Errors
/// [`ExchangeError::ModelFolder`] with all that is missing, or for models whose place in the folder of results is none that
/// [`install_zip`] knows; [`FileError::Io`](crate::error::FileError::Io),
/// [`ExchangeError::Archive`].
pub fn export_zip(path: &Path, results: &Path, bundle: &Bundle) -> Result<usize> {
    let misplaced = bundle.models.iter().filter(|model| !is_installable(model, results));
    let problem = "an archive is unpacked as DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION, and this folder does not lie so; \
                   copy it to such a place";
    let refuse = |model: &PathBuf| ExchangeError::ModelFolder { path: model.clone(), problem: problem.into() }.into();
    Error::all(misplaced.map(refuse).collect())?;
    let (mut files, mut missing) = (BTreeSet::new(), Vec::new());
    for model in &bundle.models {
        let mut need = |file: PathBuf, needed: bool| match file.is_file() {
            true => {
                files.insert(file);
            }
            false if needed => missing.push(file.display().to_string()),
            false => {}
        };
        for (name, needed) in [("plans.json", true), ("dataset.json", true), ("dataset_fingerprint.json", false)] {
            need(model.join(name), needed);
        }
        for fold in &bundle.folds {
            let place = model.join(format!("fold_{fold}"));
            for name in ["debug.json", "progress.png", "network_architecture.pdf", "validation/summary.json"] {
                need(place.join(name), false);
            }
            bundle.checkpoints.iter().for_each(|name| need(place.join(name), true));
            if bundle.checkpoints.is_empty() {
                let there: Vec<_> =
                    CHECKPOINTS.iter().map(|name| place.join(name)).filter(|file| file.is_file()).collect();
                match there.is_empty() {
                    true => need(place.join(CHECKPOINTS[0]), true),
                    false => there.into_iter().for_each(|file| need(file, true)),
                }
            }
            let validation = place.join("validation");
            if bundle.predictions && validation.is_dir() {
                for file in files_in(&validation)? {
                    // Probabilities and their properties are left out, as nnU-Net does.
                    if !["npz", "pkl"].iter().any(|ending| file.extension() == Some(ending.as_ref())) {
                        need(file, true);
                    }
                }
            }
        }
        for folder in files_and_folders(model)? {
            let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if folder.is_dir() && name.starts_with("crossval_results_folds_") {
                for file in files_in(&folder)? {
                    let kept = ["summary.json", "postprocessing.pkl", "postprocessing.json"];
                    let known = file.file_name().is_some_and(|name| kept.iter().any(|known| name == *known));
                    if bundle.predictions || known {
                        need(file, true);
                    }
                }
            }
        }
    }
    files.retain(|file| bundle.predictions || file.extension().is_none_or(|ending| ending != "npz"));
    if !missing.is_empty() || files.is_empty() {
        let problem = format!("these files are missing: {}", missing.join(", "));
        return Err(Error::Exchange(ExchangeError::ModelFolder { path: results.into(), problem }));
    }
    let failed = |error: rawzip::Error| {
        Error::Exchange(ExchangeError::Archive { path: path.into(), problem: error.to_string() })
    };
    write_aside(path, "archive", |place| {
        let written = Error::io(path, "write");
        let mut archive = ZipArchiveWriter::new(BufWriter::new(File::create(place).map_err(written)?));
        for file in &files {
            let inside = file.strip_prefix(results).map_err(|_| {
                let problem = format!("{} lies outside of it, and has no place in an archive", file.display());
                Error::Exchange(ExchangeError::ModelFolder { path: results.into(), problem })
            })?;
            let name = inside.iter().map(|part| part.to_string_lossy()).collect::<Vec<_>>().join("/");
            let entry = archive.new_file(name.as_str()).compression_method(CompressionMethod::DEFLATE);
            let (mut entry, config) = entry.start().map_err(failed)?;
            let mut data = config.wrap(DeflateEncoder::new(&mut entry, Compression::default()));
            let mut source = BufReader::new(File::open(file).map_err(Error::io(file, "read"))?);
            std::io::copy(&mut source, &mut data).map_err(Error::io(file, "pack"))?;
            let (encoder, descriptor) = data.finish().map_err(failed)?;
            encoder.finish().map_err(Error::io(path, "write"))?;
            entry.finish(descriptor).map_err(failed)?;
        }
        archive.finish().map_err(failed)?.flush().map_err(Error::io(path, "write"))
    })?;
    Ok(files.len())
}

/// Whether a model lies where archives are unpacked to.
fn is_installable(model: &Path, results: &Path) -> bool {
    let inside = model.strip_prefix(results).unwrap_or(model).iter().map(|part| part.to_str().unwrap_or_default());
    let parts: Vec<&str> = inside.collect();
    matches!(parts.as_slice(), [dataset, name] if is_dataset_name(dataset) && name.split("__").count() == 3)
}

fn files_and_folders(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(Error::io(folder, "list"))?;
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(Error::io(folder, "list"))).collect()
}

fn files_in(folder: &Path) -> Result<Vec<PathBuf>> {
    Ok(files_and_folders(folder)?.into_iter().filter(|path| path.is_file()).collect())
}

/// Unpacks models into the folder of results. Everything is unpacked beside it first; only a whole archive is moved
/// in, and files that are there already are kept unless `overwrite`.
///
/// # Errors
/// [`ExchangeError::Archive`] if it is damaged or would leave the folder, [`ExchangeError::ModelFolder`] if it is no
/// archive of models or one of its files is there already, [`FileError::Io`](crate::error::FileError::Io).
pub fn install_zip(path: &Path, results: &Path, overwrite: bool) -> Result<Installed> {
    let archive = Archive::open(path)?;
    let refused = |problem: String| Error::Exchange(ExchangeError::Archive { path: path.into(), problem });
    let files: Vec<&Entry> = archive.entries().iter().filter(|entry| !entry.is_folder).collect();
    let outside: Vec<String> =
        archive.entries().iter().filter(|entry| !stays_inside(&entry.name)).map(|e| format!("{:?}", e.name)).collect();
    if !outside.is_empty() {
        return Err(refused(format!("these entries would be written outside of the folder: {}", outside.join(", "))));
    }
    let size = files.iter().fold(0u64, |sum, entry| sum.saturating_add(entry.size));
    if size > LARGEST {
        return Err(refused(format!("it would unpack to {} GiB, more than {}", size >> 30, LARGEST >> 30)));
    }
    let models: BTreeSet<PathBuf> = files
        .iter()
        .filter_map(|entry| entry.name.strip_suffix("/plans.json"))
        .filter(|model| model.starts_with("Dataset") && model.split('/').count() == 2)
        .map(|model| results.join(model))
        .collect();
    if models.is_empty() {
        let problem =
            "it has no DatasetXXX_NAME/TRAINER__PLANS__CONFIGURATION/plans.json: no archive of nnU-Net models";
        return Err(refused(problem.into()));
    }
    let there: Vec<String> = files
        .iter()
        .map(|entry| results.join(&entry.name))
        .filter(|target| target.symlink_metadata().is_ok())
        .map(|target| target.display().to_string())
        .collect();
    if !there.is_empty() && !overwrite {
        return Err(ExchangeError::FilesThere { path: results.into(), files: there }.into());
    }
    fs::create_dir_all(results).map_err(Error::io(results, "create"))?;
    in_scratch(results, |place| {
        for entry in &files {
            let target = place.join(&entry.name);
            create_parent(&target)?;
            let mut file = BufWriter::new(File::create(&target).map_err(Error::io(&target, "write"))?);
            archive.copy(entry, &mut file, &target)?;
            let file = file.into_inner().map_err(|error| Error::io(&target, "write")(error.into_error()))?;
            file.sync_all().map_err(Error::io(&target, "write"))?;
        }
        for entry in &files {
            let target = results.join(&entry.name);
            create_parent(&target)?;
            fs::rename(place.join(&entry.name), &target).map_err(Error::io(&target, "write"))?;
        }
        Ok(())
    })?;
    Ok(Installed { models: models.into_iter().collect(), files: files.len() })
}

fn create_parent(path: &Path) -> Result<()> {
    match path.parent() {
        Some(folder) => fs::create_dir_all(folder).map_err(Error::io(folder, "create")),
        None => Ok(()),
    }
}

/// Whether a name leads to a place below the folder that it is joined to, on every system.
fn stays_inside(name: &str) -> bool {
    let name = name.strip_suffix('/').unwrap_or(name);
    name.split('/').all(is_file_name)
}
