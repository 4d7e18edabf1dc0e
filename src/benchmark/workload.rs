//! What is benchmarked, and on which batch.

use crate::dataset::{DatasetJson, LabelManager};
use crate::error::{Error, Result};
use crate::kernels::{Buffer, Context, Dtype, LossScale, LossScaleState};
use crate::loss::NetworkLoss;
use crate::nn::{Encoder, Network, Stage, UNetShape};
use crate::optim::Optimizer;
use crate::tape::Fusion;
use crate::tensor::{Shape, Tensor};
use crate::train::{MemoryPlan, Model, Precision, Step, planned_memory};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::Path;

/// A network in training on batches of patches.
#[derive(Clone, Debug)]
pub struct Workload {
    /// What the network tells apart.
    pub labels: LabelManager,
    /// The network.
    pub shape: UNetShape,
    /// Extent of a patch along depth, height, width.
    pub patch: [usize; 3],
    /// Patches of a step.
    pub batch: usize,
    /// Whether Dice is computed over the batch as one volume.
    pub batch_dice: bool,
    /// Type of activations.
    pub precision: Precision,
}

impl Workload {
    /// What a training of the plans would do.
    ///
    /// # Errors
    /// If the plans ask for what is not supported.
    pub fn of_plans(model: &Model, precision: Precision) -> Result<Self> {
        model.check()?;
        let (patch, _) = model.configuration.three_dimensional()?;
        let (batch, batch_dice) = (model.configuration.batch_size, model.configuration.batch_dice);
        Ok(Self { labels: model.labels.clone(), shape: model.architecture()?, patch, batch, batch_dice, precision })
    }

    /// nnU-Net's PlainConvUNet with `features` channels at each stage, two convolutions of 3x3x3 taps a block, and a stride of 2
    /// between stages, for images of so many channels and labels of so many classes, background among them.
    ///
    /// # Errors
    /// [`Error::Setting`] for all numbers that make no network.
    pub fn of_features(
        features: &[usize],
        channels: usize,
        classes: usize,
        patch: [usize; 3],
        batch: usize,
        precision: Precision,
    ) -> Result<Self> {
        let wrong = |setting, value: String, expected| Error::Setting { setting, value, expected };
        let mut faults = Vec::new();
        if features.len() < 2 || features.len() > 16 || features.contains(&0) {
            faults.push(wrong(
                "features",
                format!("{features:?}"),
                "expected the channels of 2 to 16 stages, such as 32,64,128",
            ));
        } else if patch.iter().any(|&extent| extent == 0 || !extent.is_multiple_of(1 << (features.len() - 1))) {
            faults.push(wrong(
                "patch",
                format!("{patch:?}"),
                "expected multiples of 2 to the power of stages less one",
            ));
        }
        for (setting, value) in [("channels", channels), ("batch size", batch)] {
            if value == 0 {
                faults.push(wrong(setting, "0".into(), "expected at least 1"));
            }
        }
        if !(2..=255).contains(&classes) {
            faults.push(wrong("classes", classes.to_string(), "expected 2 to 255, background among them"));
        }
        Error::all(faults)?;
        let stages = features.iter().enumerate().map(|(stage, &features)| Stage {
            features,
            kernel: [3; 3],
            stride: [if stage == 0 { 1 } else { 2 }; 3],
            encoder_blocks: 2,
            decoder_blocks: 2,
        });
        let mut stages: Vec<Stage> = stages.collect();
        if let Some(bottleneck) = stages.last_mut() {
            bottleneck.decoder_blocks = 0;
        }
        let names: serde_json::Map<_, _> = (0..classes)
            .map(|class| (if class == 0 { "background".into() } else { format!("class {class}") }, class.into()))
            .collect();
        let json = serde_json::json!({
            "channel_names": {"0": "MRI"}, "labels": names, "numTraining": 1, "file_ending": ".nii.gz",
        });
        let labels = LabelManager::new(&DatasetJson::parse(Path::new("dataset.json"), &json.to_string())?)?;
        let heads = labels.num_segmentation_heads();
        let shape = UNetShape { channels_in: channels, heads, encoder: Encoder::Plain, stages, bias: true };
        Ok(Self { labels, shape, patch, batch, batch_dice: false, precision })
    }

    /// The memory of a step, counted without one.
    ///
    /// # Errors
    /// As [`planned_memory`].
    pub fn memory(&self, context: &Context) -> Result<MemoryPlan> {
        let Self { labels, shape, patch, batch, precision, .. } = self;
        planned_memory(context, labels, shape, *batch, *patch, precision.dtype(), Fusion::default())
    }

    /// A fresh network, and a batch of random images and labels, made once. What the device cannot hold is refused before.
    ///
    /// # Errors
    /// [`NetworkError::DeviceMemory`](crate::error::NetworkError::DeviceMemory), a type that the device does not have, or what
    /// the device reports.
    pub(super) fn on(&self, context: &Context) -> Result<Prepared> {
        self.precision.check(context.caps())?;
        self.memory(context)?.check(context.caps())?;
        let Self { labels, shape, patch, batch, .. } = self;
        let loss = NetworkLoss::new(context, labels, shape, *batch, *patch, self.batch_dice)?;
        let network = Network::new(context, shape.clone(), 0)?;
        let scale = (self.precision.needs_loss_scale())
            .then(|| LossScale::new(context, LossScaleState::default()))
            .transpose()?;
        let step = Step::new(context, network, loss, Optimizer::default()).with_loss_scale(scale);

        let extent = Shape { batch: *batch, dims: *patch, channels: shape.channels_in };
        let mut random = ChaCha8Rng::seed_from_u64(0);
        let values: Vec<f32> = (0..extent.len()).map(|_| random.random()).collect();
        let image = Tensor::upload(context, extent, &values)?.cast(context, self.precision.dtype())?;
        // As nnU-Net's: rounded, so that the first and the last label are half as frequent.
        let largest = labels.all_labels().iter().copied().max().unwrap_or(0);
        let map: Vec<i16> =
            (0..extent.voxels()).map(|_| (random.random::<f32>() * f32::from(largest)).round() as i16).collect();
        let target = match labels.expected_labels().iter().any(|&label| label > 255) {
            true => context.upload(&map.iter().map(|&label| label as u16).collect::<Vec<_>>(), Dtype::U16)?,
            false => context.upload(&map.iter().map(|&label| label as u8).collect::<Vec<_>>(), Dtype::U8)?,
        };
        Ok(Prepared { step, image, target, map })
    }
}

/// A workload on a device.
pub(super) struct Prepared {
    pub step: Step,
    pub image: Tensor,
    pub target: Buffer,
    /// The target's labels.
    pub map: Vec<i16>,
}
