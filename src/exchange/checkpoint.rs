//! nnU-Net's `checkpoint_*.pth`, read into this program's checkpoint and written from it.

use super::pickle::{Tensor, Value};
use super::state;
use super::torch::{self, TorchFile};
use crate::augment::TrainerVariant;
use crate::dataset::DatasetJson;
use crate::dataset::plans::Plans;
use crate::dataset::splits::Fold;
use crate::error::{Error, ExchangeError, FileError, Result};
use crate::history::History;
use crate::optim::{Optimizer, poly_learning_rate};
use crate::sample::Sampling;
use crate::train::{Checkpoint, Model, Progress, Settings, Stored};
use std::collections::HashMap;
use std::path::Path;

/// Epochs of nnU-Net's default trainer.
const EPOCHS: usize = 1000;
/// The trainer whose network and prediction are those of the plans.
const TRAINER: &str = "nnUNetTrainer";

/// A checkpoint of nnU-Net.
pub struct Imported {
    /// As this program's.
    pub checkpoint: Checkpoint,
    /// The fold that it was trained on.
    pub fold: Fold,
    /// The class that trained it.
    pub trainer: String,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Reads a checkpoint. Plans and dataset are those of its model folder, as nnU-Net takes them, or without such a
/// folder the ones that it was trained with. Momenta are read only if they are asked for: predicting has no use for
/// them.
///
/// # Errors
/// Those of [`TorchFile::open`]; [`FileError::Field`] for each entry that is missing or of another kind;
/// [`ExchangeError::StateDict`].
pub fn read(path: &Path, folder: Option<(Plans, DatasetJson)>, momenta: bool) -> Result<Imported> {
    let file = TorchFile::open(path)?;
    let fields = Fields { path, content: &file.content };
    let mut faults = Vec::new();
    let mut keep = |found: Result<Value>| found.map_err(|fault| faults.push(fault)).unwrap_or(Value::None);
    let state = keep(fields.find(&["network_weights"], "the weights", |v| matches!(v, Value::Dict(_))));
    let trainer = keep(fields.find(&["trainer_name"], "the trainer's name", |v| v.as_text().is_some()));
    let configuration = keep(fields.find(&["init_args", "configuration"], "a name", |v| v.as_text().is_some()));
    let is_fold = |v: &Value| v.as_index().is_some() || v.as_text() == Some("all");
    let fold = keep(fields.find(&["init_args", "fold"], "a number or `all`", is_fold));
    Error::all(faults)?;
    let fold = fold.as_index().map_or(Fold::All, Fold::Index);
    let (trainer, configuration) = (trainer.as_text().unwrap_or_default(), configuration.as_text().unwrap_or_default());

    let mut notes = Vec::new();
    let own = fields.trained_with();
    let (plans, dataset) = match (folder, own) {
        (Some(folder), own) => {
            // nnU-Net goes by the folder. Another architecture does not load, but another spacing does.
            if let Ok((plans, _)) = own
                && plans.configuration(configuration).ok() != folder.0.configuration(configuration).ok()
            {
                notes.push(format!(
                    "{}: the configuration {configuration} has changed since this was trained; that in plans.json is used",
                    path.display()
                ));
            }
            folder
        }
        (None, own) => own?,
    };
    let model = Model::new(plans, configuration, dataset)?;
    let variant = TrainerVariant::of(trainer).ok();
    if variant.is_none() {
        notes.push(format!(
            "{}: trained by {trainer}, which voxgrad does not know: its network is taken to be the one in the plans",
            path.display()
        ));
    }
    let weights = state::weights(&file, &state)?;
    let momentum = if momenta { momenta_of(&file, &weights)? } else { Stored::new() };
    let epoch = file.content.get("current_epoch").and_then(Value::as_index).unwrap_or(0);
    let named = variant.as_ref().and_then(|variant| variant.epochs).unwrap_or(EPOCHS);
    let settings = Settings {
        epochs: named.max(epoch),
        mirror: fields.mirror()?,
        augmentation: variant.as_ref().map_or_else(Default::default, |variant| variant.recipe),
        sampling: Sampling {
            oversampling: variant.map_or(Sampling::NNUNET.oversampling, |variant| variant.oversampling),
            ..Sampling::NNUNET
        },
        ..Settings::default()
    };
    let progress = Progress {
        epoch,
        iteration: 0,
        losses: Vec::new(),
        not_finite: 0,
        not_finite_in_a_row: 0,
        started: 0.0,
        times: Default::default(),
        loss_scale: None,
        history: fields.history(),
    };
    let checkpoint = Checkpoint::from_parts(model, settings, progress, weights, momentum);
    Ok(Imported { checkpoint, fold, trainer: trainer.into(), notes })
}

/// What torch.save saved, and where.
struct Fields<'a> {
    path: &'a Path,
    content: &'a Value,
}

impl Fields<'_> {
    fn wrong(&self, field: &str, problem: String) -> Error {
        Error::File(FileError::Field { path: self.path.into(), field: field.into(), problem })
    }

    fn find(&self, keys: &[&str], expected: &str, fits: impl Fn(&Value) -> bool) -> Result<Value> {
        let found = keys.iter().try_fold(self.content, |value, key| value.get(key));
        let problem = |what| self.wrong(&keys.join("."), format!("{what}, expected {expected}: is this nnU-Net's?"));
        let value = found.ok_or_else(|| problem("is missing"))?;
        if fits(value) { Ok(value.clone()) } else { Err(problem("is something else")) }
    }

    /// Axes of mirrored copies; none where the trainer did not mirror.
    fn mirror(&self) -> Result<[bool; 3]> {
        let field = "inference_allowed_mirroring_axes";
        let axes = match self.content.get(field) {
            None | Some(Value::None) => return Ok([false; 3]),
            Some(axes) => axes,
        };
        let mut mirror = [false; 3];
        for axis in axes.items().ok_or_else(|| self.wrong(field, "expected a tuple of axes".into()))? {
            let place = axis.as_index().and_then(|axis| mirror.get_mut(axis));
            *place.ok_or_else(|| self.wrong(field, format!("{axis:?} is none of the axes 0, 1, 2")))? = true;
        }
        Ok(mirror)
    }

    /// Plans and dataset when it was trained.
    fn trained_with(&self) -> Result<(Plans, DatasetJson)> {
        let json = |key| -> Result<serde_json::Value> {
            let value = self.find(&["init_args", key], "a dict", |value| matches!(value, Value::Dict(_)))?;
            value
                .to_json()
                .ok_or_else(|| self.wrong(&format!("init_args.{key}"), "holds more than JSON can say".into()))
        };
        let wrong = |source| Error::File(FileError::Json { path: self.path.into(), source });
        let plans: Plans = serde_json::from_value(json("plans")?).map_err(wrong)?;
        plans.check_names(self.path)?;
        Ok((plans, DatasetJson::parse(self.path, &json("dataset_json")?.to_string())?))
    }

    /// The record of epochs, as far as it is one.
    fn history(&self) -> History {
        let numbers = |value: &Value| value.items()?.iter().map(Value::as_number).collect::<Option<Vec<f64>>>();
        let logging = self.content.get("logging");
        let list = |key| logging.and_then(|logging| numbers(logging.get(key)?)).unwrap_or_default();
        let per_class = logging.and_then(|logging| logging.get("dice_per_class_or_region")?.items());
        let history = History {
            mean_fg_dice: list("mean_fg_dice"),
            ema_fg_dice: list("ema_fg_dice"),
            dice_per_class_or_region: per_class.unwrap_or_default().iter().filter_map(numbers).collect(),
            train_losses: list("train_losses"),
            val_losses: list("val_losses"),
            lrs: list("lrs"),
            epoch_start_timestamps: list("epoch_start_timestamps"),
            epoch_end_timestamps: list("epoch_end_timestamps"),
            times: Vec::new(),
        };
        let epochs = history.epochs();
        let lists = [
            &history.mean_fg_dice,
            &history.ema_fg_dice,
            &history.val_losses,
            &history.lrs,
            &history.epoch_start_timestamps,
            &history.epoch_end_timestamps,
        ];
        // Lists of different lengths belong to no sequence of epochs.
        let complete =
            lists.iter().all(|list| list.len() == epochs) && history.dice_per_class_or_region.len() == epochs;
        if complete { history } else { History::default() }
    }
}

/// SGD's momenta by the names of their parameters.
fn momenta_of(file: &TorchFile, weights: &Stored) -> Result<Stored> {
    let Some(Value::Dict(states)) = file.content.get("optimizer_state").and_then(|state| state.get("state")) else {
        return Ok(Stored::new());
    };
    let (names, mut momenta, mut faults) = (state::sorted(weights.keys()), Stored::new(), Vec::new());
    for (index, state) in states {
        // A parameter without a gradient has none.
        let Some(Value::Tensor(tensor)) = state.get("momentum_buffer") else { continue };
        match index.as_index().and_then(|index| names.get(index)) {
            Some(&name) if weights[name].0 == tensor.shape => {
                momenta.insert(name.into(), (tensor.shape.clone(), file.values(tensor)?));
            }
            _ => faults.push(format!("the momentum of parameter {index:?} has shape {:?}", tensor.shape)),
        }
    }
    match faults.is_empty() {
        true => Ok(momenta),
        false => Err(Error::Exchange(ExchangeError::StateDict { path: file.path().into(), faults })),
    }
}

/// The trainer class of nnU-Net that comes closest to a training: one of the same mirroring, augmentation and, if
/// there is one, number of epochs. Prediction looks at its name for the network only, which all of them take from the
/// plans.
pub fn trainer_of(settings: &Settings) -> String {
    let all = TrainerVariant::all();
    let alike =
        |variant: &&TrainerVariant| variant.mirror == settings.mirror && variant.recipe == settings.augmentation;
    let of_epochs = |variant: &&TrainerVariant| variant.epochs.unwrap_or(EPOCHS) == settings.epochs;
    let sampled = |variant: &&TrainerVariant| variant.oversampling == settings.sampling.oversampling;
    let found = (all.iter().find(|variant| alike(variant) && sampled(variant) && of_epochs(variant)))
        .or_else(|| all.iter().find(|variant| alike(variant) && sampled(variant)))
        .or_else(|| all.iter().find(alike));
    found.map_or_else(|| TRAINER.into(), |variant| variant.name.clone())
}

/// Writes a checkpoint as nnU-Net does, atomically: all names of its tensors, momenta, record, and what its trainer was
/// made with.
///
/// # Errors
/// [`FileError::Io`], [`ExchangeError::Archive`].
pub fn write(path: &Path, checkpoint: &Checkpoint, fold: Fold, trainer: &str) -> Result<()> {
    let Checkpoint { model, settings, progress, .. } = checkpoint;
    let names = state::sorted(checkpoint.network().keys());
    let mut storages: Vec<(String, &[f32])> = Vec::new();
    let (mut weights, mut states) = (HashMap::new(), Vec::new());
    for (index, &name) in names.iter().enumerate() {
        if let Some((shape, values)) = checkpoint.network().get(name) {
            weights.insert(name, stored(&mut storages, shape, values));
        }
        // The optimiser keeps nothing for a parameter that never had a gradient.
        if let Some((shape, values)) =
            checkpoint.momentum().get(name).filter(|(_, values)| values.iter().any(|&v| v != 0.0))
        {
            let state = Value::dict([("momentum_buffer", stored(&mut storages, shape, values))]);
            states.push((Value::Int(index as i64), state));
        }
    }
    let state_dict =
        state::keys(&names).into_iter().filter_map(|(key, name)| Some((Value::Text(key), weights.get(name)?.clone())));
    let axes = (0..3).filter(|&axis| settings.mirror[axis]).map(|axis| Value::Int(axis as i64)).collect::<Vec<_>>();
    let plans = serde_json::to_value(&model.plans)
        .map_err(|source| Error::File(FileError::Json { path: path.into(), source }))?;
    let dataset = serde_json::Value::Object(model.dataset.source().clone());
    let fold = match fold {
        Fold::All => "all".into(),
        Fold::Index(index) => Value::Int(index as i64),
    };
    let content = Value::dict([
        ("network_weights", Value::Dict(state_dict.collect())),
        ("optimizer_state", optimizer(settings, progress, states, names.len())),
        ("grad_scaler_state", progress.loss_scale.map_or(Value::None, scaler)),
        ("logging", logging(&progress.history)),
        ("_best_ema", progress.history.best_ema().map_or(Value::None, Value::Float)),
        ("current_epoch", Value::Int(progress.epoch as i64)),
        (
            "init_args",
            Value::dict([
                ("plans", Value::from_json(&plans)),
                ("configuration", model.configuration_name.as_str().into()),
                ("fold", fold),
                ("dataset_json", Value::from_json(&dataset)),
                ("device", Value::Device("cpu".into())),
            ]),
        ),
        ("trainer_name", trainer.into()),
        ("inference_allowed_mirroring_axes", if axes.is_empty() { Value::None } else { Value::Tuple(axes) }),
    ]);
    torch::write(path, &content, &storages)
}

/// A tensor with a storage of its own.
fn stored<'a>(storages: &mut Vec<(String, &'a [f32])>, shape: &[usize], values: &'a [f32]) -> Value {
    let storage = storages.len().to_string();
    storages.push((storage.clone(), values));
    Value::Tensor(Tensor::contiguous(storage, shape))
}

/// The state of PyTorch's SGD.
fn optimizer(settings: &Settings, progress: &Progress, states: Vec<(Value, Value)>, parameters: usize) -> Value {
    let rate = poly_learning_rate(settings.learning_rate, progress.epoch.min(settings.epochs), settings.epochs.max(1));
    let decimal = |value: f32| Value::Float(value.to_string().parse().unwrap_or(value.into()));
    let group = Value::dict([
        ("lr", Value::Float(rate)),
        ("momentum", decimal(settings.momentum)),
        ("dampening", Value::Int(0)),
        ("weight_decay", decimal(Optimizer::default().weight_decay)),
        ("nesterov", Value::Bool(true)),
        ("maximize", Value::Bool(false)),
        ("foreach", Value::None),
        ("differentiable", Value::Bool(false)),
        ("fused", Value::None),
        ("params", Value::List((0..parameters).map(|index| Value::Int(index as i64)).collect())),
    ]);
    Value::dict([("state", Value::Dict(states)), ("param_groups", Value::List(vec![group]))])
}

/// The state of PyTorch's GradScaler.
fn scaler((scale, good_steps): (f32, u32)) -> Value {
    Value::dict([
        ("scale", Value::Float(scale.into())),
        ("growth_factor", Value::Float(2.0)),
        ("backoff_factor", Value::Float(0.5)),
        ("growth_interval", Value::Int(2000)),
        ("_growth_tracker", Value::Int(good_steps.into())),
    ])
}

/// nnU-Net's eight lists.
fn logging(history: &History) -> Value {
    let list = |values: &[f64]| Value::List(values.iter().map(|&value| Value::Float(value)).collect());
    Value::dict([
        ("mean_fg_dice", list(&history.mean_fg_dice)),
        ("ema_fg_dice", list(&history.ema_fg_dice)),
        (
            "dice_per_class_or_region",
            Value::List(history.dice_per_class_or_region.iter().map(|values| list(values)).collect()),
        ),
        ("train_losses", list(&history.train_losses)),
        ("val_losses", list(&history.val_losses)),
        ("lrs", list(&history.lrs)),
        ("epoch_start_timestamps", list(&history.epoch_start_timestamps)),
        ("epoch_end_timestamps", list(&history.epoch_end_timestamps)),
    ])
}
