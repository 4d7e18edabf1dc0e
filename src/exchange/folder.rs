//! Model folders: `plans.json`, `dataset.json` and a folder `fold_N` with checkpoints for each fold, as nnU-Net makes
//! them and as this program does.

use super::checkpoint;
use super::pretrained::is_zip;
use super::state;
use crate::dataset::DatasetJson;
use crate::dataset::plans::Plans;
use crate::dataset::splits::Fold;
use crate::error::{Error, ExchangeError, Result};
use crate::io::{write_aside, write_json};
use crate::kernels::Context;
use crate::nn::Network;
use crate::parameters::Slot;
use crate::train::{Checkpoint, Model};
use std::fs;
use std::path::{Path, PathBuf};

/// Names of trained networks, nnU-Net's and this program's.
pub const CHECKPOINTS: [&str; 2] = ["checkpoint_final.pth", "checkpoint_final.safetensors"];

/// One fold of a trained model.
pub struct TrainedFold {
    /// Which.
    pub fold: Fold,
    /// Where it was read from.
    pub path: PathBuf,
    /// The network.
    pub checkpoint: Checkpoint,
    /// The class that trained it, if that is one of nnU-Net's.
    pub trainer: Option<String>,
}

/// A trained model of one or several folds.
pub struct TrainedModel {
    /// What the networks are for.
    pub model: Model,
    /// Axes that predictions may be mirrored along: those of the first fold, as in nnU-Net.
    pub mirror: [bool; 3],
    /// The folds, at least one.
    pub folds: Vec<TrainedFold>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// How a model is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `checkpoint_final.pth`, for nnU-Net.
    Nnunet,
    /// `checkpoint_final.safetensors`, this program's own.
    Safetensors,
}

/// The folds in a model folder that have a folder with one of these checkpoints, numbers first.
///
/// # Errors
/// [`FileError::Io`](crate::error::FileError::Io).
pub fn folds_in(folder: &Path, checkpoints: &[&str]) -> Result<Vec<Fold>> {
    let mut folds = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io(folder, "list"))? {
        let entry = entry.map_err(Error::io(folder, "list"))?;
        let name = entry.file_name();
        let fold = name.to_str().and_then(|name| name.strip_prefix("fold_")).and_then(|fold| fold.parse::<Fold>().ok());
        if let Some(fold) = fold
            && checkpoints.iter().any(|name| entry.path().join(name).is_file())
        {
            folds.push(fold);
        }
    }
    folds.sort_by_key(|fold| match fold {
        Fold::Index(index) => *index,
        Fold::All => usize::MAX,
    });
    Ok(folds)
}

impl TrainedModel {
    /// Reads a model folder. Without `folds` those with numbers are taken that are there, and a note says which;
    /// without `checkpoint` the final one, of nnU-Net or of this program.
    ///
    /// # Errors
    /// [`ExchangeError::ModelFolder`] if a fold or its checkpoint is missing, or folds do not belong together; those of
    /// [`checkpoint::read`] and [`Checkpoint::read`].
    pub fn open(folder: &Path, folds: &[Fold], checkpoint: Option<&str>, momenta: bool) -> Result<Self> {
        let wrong = |problem: String| Error::Exchange(ExchangeError::ModelFolder { path: folder.into(), problem });
        let names = checkpoint.map_or(CHECKPOINTS.to_vec(), |name| vec![name]);
        let there = folds_in(folder, &names)?;
        let listed = |folds: &[Fold]| folds.iter().map(Fold::to_string).collect::<Vec<_>>().join(", ");
        let mut notes = Vec::new();
        let folds = match folds {
            [] => {
                let numbered: Vec<Fold> = there.iter().copied().filter(|fold| *fold != Fold::All).collect();
                let chosen = if numbered.is_empty() { there.clone() } else { numbered };
                notes.push(format!("folds {}: those with {}", listed(&chosen), names.join(" or ")));
                chosen
            }
            given => given.to_vec(),
        };
        let missing: Vec<Fold> = folds.iter().copied().filter(|fold| !there.contains(fold)).collect();
        if folds.is_empty() || !missing.is_empty() {
            let what = if folds.is_empty() { "any fold".into() } else { format!("fold {}", listed(&missing)) };
            let problem = format!(
                "no {} of {what}; {} here",
                names.join(" or "),
                if there.is_empty() { "none is".into() } else { format!("folds {} are", listed(&there)) },
            );
            return Err(ExchangeError::FoldMissing { path: folder.into(), problem }.into());
        }
        let mut read = Vec::with_capacity(folds.len());
        for &fold in &folds {
            let place = folder.join(format!("fold_{fold}"));
            let found: Vec<PathBuf> = names.iter().map(|name| place.join(name)).filter(|path| path.is_file()).collect();
            let [path] = found.as_slice() else {
                return Err(wrong(format!("fold {fold} has both {}: name one", names.join(" and "))));
            };
            read.push(read_fold(path, Some(folder), Some(fold), momenta, &mut notes)?);
        }
        Self::of(folder, read, notes)
    }

    /// Reads a single checkpoint, with the plans and the dataset that are in it.
    ///
    /// # Errors
    /// Those of [`checkpoint::read`] and [`Checkpoint::read`].
    pub fn of_file(path: &Path, momenta: bool) -> Result<Self> {
        let mut notes = Vec::new();
        let fold = read_fold(path, None, None, momenta, &mut notes)?;
        Self::of(path, vec![fold], notes)
    }

    fn of(path: &Path, folds: Vec<TrainedFold>, mut notes: Vec<String>) -> Result<Self> {
        let Some(first) = folds.first() else {
            return Err(Error::Exchange(ExchangeError::ModelFolder {
                path: path.into(),
                problem: "no fold was named".into(),
            }));
        };
        let (model, mirror) = (first.checkpoint.model.clone(), first.checkpoint.settings.mirror);
        for TrainedFold { fold, checkpoint, .. } in &folds {
            let other = &checkpoint.model;
            let differs = if other.configuration_name != model.configuration_name {
                format!("is of configuration {}, not {}", other.configuration_name, model.configuration_name)
            } else if other.configuration != model.configuration {
                "has another patch, spacing, normalisation or architecture".into()
            } else if other.plans.transpose_forward != model.plans.transpose_forward
                || other.plans.foreground_intensity_properties_per_channel
                    != model.plans.foreground_intensity_properties_per_channel
            {
                "has plans of other intensities or axes".into()
            } else if ["labels", "regions_class_order"]
                .iter()
                .any(|field| other.dataset.source().get(*field) != model.dataset.source().get(*field))
            {
                "has other labels".into()
            } else {
                if checkpoint.settings.mirror != mirror {
                    notes.push(format!("fold {fold} mirrors along other axes; those of fold {} are used", first.fold));
                }
                continue;
            };
            let problem = format!("fold {fold} {differs} than fold {}: predict with each on its own", first.fold);
            return Err(Error::Exchange(ExchangeError::ModelFolder { path: path.into(), problem }));
        }
        Ok(Self { model, mirror, folds, notes })
    }

    /// The networks of all folds on a device.
    ///
    /// # Errors
    /// [`ExchangeError::StateDict`] with every tensor that does not fit the plans, or if the device is out of memory.
    pub fn networks(&self, context: &Context) -> Result<Vec<Network>> {
        let build = |fold: &TrainedFold| -> Result<Network> {
            let network = Network::new(context, self.model.architecture()?, 0)?;
            let weights = fold.checkpoint.network();
            state::check(&fold.path, weights, network.parameters())?;
            let find = |name: &str| weights.get(name).map(|(shape, values)| (&shape[..], &values[..]));
            network.parameters().load_torch(context, Slot::Value, find)?;
            Ok(network)
        };
        self.folds.iter().map(build).collect()
    }

    /// Writes a model folder, which must not exist: it appears when it is complete. Returns what the user should know.
    ///
    /// # Errors
    /// [`ExchangeError::ModelFolder`] if the folder exists, [`FileError::Io`](crate::error::FileError::Io),
    /// [`ExchangeError::Archive`].
    pub fn write(&self, folder: &Path, format: Format) -> Result<Vec<String>> {
        if folder.symlink_metadata().is_ok() {
            let problem = "is there already; remove it, or write to another folder".into();
            return Err(Error::Exchange(ExchangeError::ModelFolder { path: folder.into(), problem }));
        }
        let mut notes = Vec::new();
        write_aside(folder, "model", |place| {
            let create = |path: &Path| fs::create_dir(path).map_err(Error::io(folder, "create"));
            create(place)?;
            write_json(&place.join("plans.json"), &self.model.plans)?;
            write_json(&place.join("dataset.json"), self.model.dataset.source())?;
            for TrainedFold { fold, path, checkpoint, trainer } in &self.folds {
                let target = place.join(format!("fold_{fold}"));
                create(&target)?;
                match format {
                    Format::Safetensors => checkpoint.write(&target.join("checkpoint_final.safetensors"))?,
                    Format::Nnunet => {
                        let own = trainer.clone().unwrap_or_else(|| {
                            let closest = checkpoint::trainer_of(&checkpoint.settings);
                            notes.push(format!("fold {fold}: nnU-Net is told that {closest} trained it"));
                            closest
                        });
                        checkpoint::write(&target.join("checkpoint_final.pth"), checkpoint, *fold, &own)?;
                    }
                }
                // The fingerprint lies beside the folds; nothing that predicts reads it, but nnU-Net's archives have it.
                let fingerprint = path.ancestors().nth(2).map(|model| model.join("dataset_fingerprint.json"));
                let copy = place.join("dataset_fingerprint.json");
                if let Some(fingerprint) = fingerprint.filter(|file| file.is_file() && !copy.exists()) {
                    fs::copy(&fingerprint, &copy).map_err(Error::io(&fingerprint, "copy"))?;
                }
            }
            Ok(())
        })?;
        Ok(notes)
    }
}

fn read_fold(
    path: &Path,
    folder: Option<&Path>,
    fold: Option<Fold>,
    momenta: bool,
    notes: &mut Vec<String>,
) -> Result<TrainedFold> {
    if is_zip(path)? {
        let beside = match folder {
            Some(folder) => {
                let dataset = DatasetJson::read(&folder.join("dataset.json"))?;
                Some((Plans::read(&folder.join("plans.json"))?, dataset))
            }
            None => None,
        };
        let read = checkpoint::read(path, beside, momenta)?;
        notes.extend(read.notes);
        let fold = fold.unwrap_or(read.fold);
        return Ok(TrainedFold { fold, path: path.into(), checkpoint: read.checkpoint, trainer: Some(read.trainer) });
    }
    if path.extension().is_some_and(|ending| ending == "pth") {
        let problem = "no zip archive: PyTorch before 1.6 wrote it, or it is cut off".into();
        return Err(Error::Exchange(ExchangeError::TorchFile { path: path.into(), problem }));
    }
    let checkpoint = Checkpoint::read(path)?;
    let trained = checkpoint.cases.as_ref().map(|cases| cases.fold);
    let fold = fold.or(trained).unwrap_or(Fold::All);
    Ok(TrainedFold { fold, path: path.into(), checkpoint, trainer: None })
}
