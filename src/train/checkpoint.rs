//! Checkpoints: one safetensors file with the network under nnU-Net's state-dict names and PyTorch's layout, the
//! optimiser's momenta, and in its metadata everything else that training or prediction needs, a checksum among it.

use super::progress::Progress;
use super::settings::Settings;
use crate::compat::Compat;
use crate::dataset::plans::{Configuration, Plans};
use crate::dataset::splits::{Fold, Split};
use crate::dataset::{DatasetJson, LabelManager};
use crate::error::{Error, NetworkError, Result};
use crate::io::write_atomically;
use crate::kernels::Context;
use crate::nn::UNetShape;
use crate::parameters::{Parameters, Slot};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::Path;

/// Key of the description in the file's metadata.
const DESCRIPTION: &str = "voxgrad";
/// Version of the description: 2 had no checksum.
const VERSION: u32 = 3;
/// What stands before the checksum's digits in the file: the description is a JSON string inside of JSON.
const BEFORE_CHECKSUM: &[u8] = br#"\"checksum\":\""#;
/// The digits while the sum is taken.
const NO_CHECKSUM: &str = "00000000";
const NETWORK: &str = "network.";
const MOMENTUM: &str = "momentum.";

/// What a network is for: the plans, one of their configurations, and the labels.
#[derive(Clone, Debug)]
pub struct Model {
    /// The plans.
    pub plans: Plans,
    /// Name of the configuration, `3d_fullres` for example.
    pub configuration_name: String,
    /// The configuration itself.
    pub configuration: Configuration,
    /// The dataset's description.
    pub dataset: DatasetJson,
    /// Its labels.
    pub labels: LabelManager,
}

impl Model {
    /// Resolves a configuration of the plans and the labels of the dataset.
    ///
    /// # Errors
    /// If the plans have no such configuration, or the labels break a rule.
    pub fn new(plans: Plans, configuration_name: &str, dataset: DatasetJson) -> Result<Self> {
        let configuration = plans.configuration(configuration_name)?;
        let labels = LabelManager::new(&dataset)?;
        Ok(Self { plans, configuration_name: configuration_name.into(), configuration, dataset, labels })
    }

    /// Whether everything that the plans ask for is supported.
    ///
    /// # Errors
    /// [`PlanError::PlansUnsupported`](crate::error::PlanError::PlansUnsupported) with all that is not.
    pub fn check(&self) -> Result<()> {
        self.plans.check_training(&self.configuration)
    }

    /// The shape of the network.
    ///
    /// # Errors
    /// [`PlanError::PlansUnsupported`](crate::error::PlanError::PlansUnsupported) or [`NetworkError::Architecture`] for what is not supported.
    pub fn architecture(&self) -> Result<UNetShape> {
        self.plans.check_network(&self.configuration)?;
        let arguments = &self.configuration.architecture.arch_kwargs;
        UNetShape::from_plans(
            arguments,
            self.configuration.normalization_schemes.len(),
            self.labels.num_segmentation_heads(),
        )
    }
}

/// Which cases a network trains on, and how they are prepared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrainingCases {
    /// The fold that was asked for.
    pub fold: Fold,
    /// What it was when training began: a splits file may change.
    pub split: Split,
    /// How the cases were preprocessed; the other settings of that are in the plans.
    pub compat: Compat,
}

/// Tensors by nnU-Net's names of their parameters: shape and values in PyTorch's layout.
pub type Stored = HashMap<String, (Vec<usize>, Vec<f32>)>;

/// A saved state of training.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// What the network is for.
    pub model: Model,
    /// How long it trains.
    pub settings: Settings,
    /// Where training stands.
    pub progress: Progress,
    /// What it trains on. `None` unless whoever trains has set it; earlier versions did not keep it.
    pub cases: Option<TrainingCases>,
    network: Stored,
    momentum: Stored,
}

/// The metadata of the file.
#[derive(Serialize, Deserialize)]
struct Description {
    version: u32,
    /// CRC-32 of the whole file with zeros in this place, in hexadecimal digits. Before anything that a user has named.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    checksum: Option<String>,
    plans: Plans,
    configuration: String,
    dataset: serde_json::Value,
    settings: Settings,
    progress: Progress,
    #[serde(default)]
    cases: Option<TrainingCases>,
}

impl Checkpoint {
    pub(super) fn of(
        context: &Context,
        parameters: &Parameters,
        model: Model,
        settings: Settings,
        progress: Progress,
    ) -> Result<Self> {
        let store = |slot| -> Result<Stored> {
            let named = parameters.to_torch(context, slot)?;
            Ok(named.into_iter().map(|(name, shape, values)| (name, (shape, values))).collect())
        };
        let (network, momentum) = (store(Slot::Value)?, store(Slot::Momentum)?);
        Ok(Self { model, settings, progress, cases: None, network, momentum })
    }

    /// A state that another program has trained. Momenta that are left out are zero.
    pub fn from_parts(model: Model, settings: Settings, progress: Progress, network: Stored, momentum: Stored) -> Self {
        let zero = |(name, (shape, values)): (&String, &(Vec<usize>, Vec<f32>))| {
            let given = momentum.get(name).cloned();
            (name.clone(), given.unwrap_or_else(|| (shape.clone(), vec![0.0; values.len()])))
        };
        let momentum = network.iter().map(zero).collect();
        Self { model, settings, progress, cases: None, network, momentum }
    }

    /// The weights.
    pub fn network(&self) -> &Stored {
        &self.network
    }

    /// The optimiser's momenta.
    pub fn momentum(&self) -> &Stored {
        &self.momentum
    }

    /// Loads weights and momenta into a network of the same shape.
    ///
    /// # Errors
    /// [`NetworkError::State`] naming the first parameter that does not fit.
    pub fn load_into(&self, context: &Context, parameters: &Parameters) -> Result<()> {
        for (slot, stored) in [(Slot::Value, &self.network), (Slot::Momentum, &self.momentum)] {
            let find = |name: &str| stored.get(name).map(|(shape, values)| (&shape[..], &values[..]));
            parameters.load_torch(context, slot, find)?;
        }
        Ok(())
    }

    /// Writes the file; under its final name it is always complete.
    ///
    /// # Errors
    /// [`FileError::Io`](crate::error::FileError::Io).
    pub fn write(&self, path: &Path) -> Result<()> {
        let failed = |problem: String| Error::Network(NetworkError::Checkpoint { path: path.into(), problem });
        let description = Description {
            version: VERSION,
            checksum: Some(NO_CHECKSUM.into()),
            plans: self.model.plans.clone(),
            configuration: self.model.configuration_name.clone(),
            dataset: serde_json::Value::Object(self.model.dataset.source().clone()),
            settings: self.settings,
            progress: self.progress.clone(),
            cases: self.cases.clone(),
        };
        let description = serde_json::to_string(&description).map_err(|e| failed(e.to_string()))?;
        let stored = [(NETWORK, &self.network), (MOMENTUM, &self.momentum)];
        let mut views = Vec::new();
        for (prefix, tensors) in stored {
            for (name, (shape, values)) in tensors {
                let bytes: &[u8] = bytemuck::cast_slice(values);
                let view = TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes)
                    .map_err(|e| failed(e.to_string()))?;
                views.push((format!("{prefix}{name}"), view));
            }
        }
        // A hash map's order is random: sorted, equal states are equal files.
        views.sort_by(|a, b| a.0.cmp(&b.0));
        let metadata = HashMap::from([(DESCRIPTION.to_string(), description)]);
        let mut bytes = safetensors::serialize(views, Some(metadata)).map_err(|e| failed(e.to_string()))?;
        let place = checksum_place(&bytes).ok_or_else(|| failed("no place for the checksum".into()))?;
        let sum = format!("{:08x}", crc32fast::hash(&bytes));
        bytes[place].copy_from_slice(sum.as_bytes());
        write_atomically(path, &bytes)
    }

    /// Reads a file that [`Checkpoint::write`] wrote.
    ///
    /// # Errors
    /// [`FileError::Io`](crate::error::FileError::Io) if it cannot be read,
    /// [`NetworkError::Checkpoint`] if it is something else, cut off or damaged.
    pub fn read(path: &Path) -> Result<Self> {
        let failed = |problem: String| Error::Network(NetworkError::Checkpoint { path: path.into(), problem });
        let mut bytes = std::fs::read(path).map_err(Error::io(path, "read"))?;
        let place = checksum_place(&bytes);
        check_sum(&mut bytes, place.clone()).map_err(&failed)?;
        let (_, header) = SafeTensors::read_metadata(&bytes)
            .map_err(|e| failed(format!("{e}: cut off, damaged, or no safetensors file")))?;
        let text = (header.metadata().as_ref())
            .and_then(|metadata| metadata.get(DESCRIPTION))
            .ok_or_else(|| failed("a safetensors file, but not of voxgrad".into()))?;
        let description: Description = serde_json::from_str(text).map_err(|e| failed(e.to_string()))?;
        match description.version {
            ..VERSION => {}
            VERSION if place.is_some() => {}
            VERSION => return Err(failed("it has no checksum: damaged".into())),
            version => {
                return Err(Error::Network(NetworkError::CheckpointVersion {
                    path: path.into(),
                    version: version.to_string(),
                }));
            }
        }
        description.plans.check_names(path)?;
        let dataset = DatasetJson::parse(path, &description.dataset.to_string())?;
        let model = Model::new(description.plans, &description.configuration, dataset)?;
        let tensors = SafeTensors::deserialize(&bytes).map_err(|e| failed(e.to_string()))?;
        let (mut network, mut momentum) = (Stored::new(), Stored::new());
        for (name, view) in tensors.tensors() {
            if view.dtype() != safetensors::Dtype::F32 {
                return Err(failed(format!("tensor {name} is {:?}, expected f32", view.dtype())));
            }
            let stored = (view.shape().to_vec(), bytemuck::pod_collect_to_vec(view.data()));
            if let Some(name) = name.strip_prefix(NETWORK) {
                network.insert(name.into(), stored);
            } else if let Some(name) = name.strip_prefix(MOMENTUM) {
                momentum.insert(name.into(), stored);
            }
        }
        let Description { settings, progress, cases, .. } = description;
        Ok(Self { model, settings, progress, cases, network, momentum })
    }

    /// How far training had come when the file was written, epochs and iterations: from the header alone. `None` if that
    /// cannot be read.
    pub fn place(path: &Path) -> Option<(usize, usize)> {
        #[derive(Deserialize)]
        struct Header {
            #[serde(rename = "__metadata__")]
            metadata: HashMap<String, String>,
        }
        let mut file = File::open(path).ok()?;
        let mut length = [0; 8];
        file.read_exact(&mut length).ok()?;
        let length = u64::from_le_bytes(length);
        // A damaged length asks for no more than the file has.
        let mut header = Vec::new();
        file.take(length).read_to_end(&mut header).ok()?;
        let header: Header = serde_json::from_slice(&header).ok()?;
        let description: Description = serde_json::from_str(header.metadata.get(DESCRIPTION)?).ok()?;
        Some((description.progress.epoch, description.progress.iteration))
    }
}

/// Whether the bytes are a checkpoint as it was written. One of an earlier version, without a checksum, is not.
pub(super) fn is_whole(mut bytes: Vec<u8>) -> bool {
    let place = checksum_place(&bytes);
    place.is_some() && check_sum(&mut bytes, place).is_ok()
}

/// Where the digits of the checksum are in a file.
fn checksum_place(bytes: &[u8]) -> Option<Range<usize>> {
    let length = u64::from_le_bytes(*bytes.first_chunk()?);
    let end = usize::try_from(length).ok()?.checked_add(8)?.min(bytes.len());
    let found = bytes[..end].windows(BEFORE_CHECKSUM.len()).position(|window| window == BEFORE_CHECKSUM)?;
    let start = found + BEFORE_CHECKSUM.len();
    (start + NO_CHECKSUM.len() <= end).then(|| start..start + NO_CHECKSUM.len())
}

/// Compares the checksum, where there is one, with what the file holds. Its digits are zeros afterwards.
fn check_sum(bytes: &mut [u8], place: Option<Range<usize>>) -> Result<(), String> {
    let Some(place) = place else { return Ok(()) };
    let stored = String::from_utf8_lossy(&bytes[place.clone()]).into_owned();
    bytes[place].copy_from_slice(NO_CHECKSUM.as_bytes());
    let sum = format!("{:08x}", crc32fast::hash(bytes));
    match sum == stored {
        true => Ok(()),
        false => Err(format!("its checksum is {sum}, it should be {stored}: cut off or damaged")),
    }
}
