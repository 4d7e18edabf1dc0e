//! Small networks, and one training step of them.

use super::uniform;
use voxgrad::dataset::{DatasetJson, LabelManager};
use voxgrad::kernels::{Context, Dtype};
use voxgrad::loss::NetworkLoss;
use voxgrad::nn::{Encoder, Network, Stage, UNetShape};
use voxgrad::optim::Optimizer;
use voxgrad::parameters::{NamedTensor, Slot};
use voxgrad::tape::Fusion;
use voxgrad::tensor::{Shape, Tensor};
use voxgrad::train::Step;

pub const BATCH: usize = 2;
const DATASET: &str = r#"{"channel_names": {"0": "MRI"}, "numTraining": 1, "file_ending": ".nii.gz",
    "labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}}"#;

pub fn network(features: &[usize], channels_in: usize, heads: usize) -> UNetShape {
    let stages = features.len();
    let stage = |(i, &features): (usize, &usize)| Stage {
        features,
        kernel: [3; 3],
        stride: [if i == 0 { 1 } else { 2 }; 3],
        encoder_blocks: 2,
        decoder_blocks: if i + 1 == stages { 0 } else { 2 },
    };
    let stages = features.iter().enumerate().map(stage).collect();
    UNetShape { channels_in, heads, encoder: Encoder::Plain, stages, bias: true }
}

pub fn labels() -> LabelManager {
    LabelManager::new(&DatasetJson::parse("dataset.json".as_ref(), DATASET).unwrap()).unwrap()
}

/// Launches, peak bytes and gradients of one step with activations of type `dtype`.
pub fn step_in(
    context: &Context,
    shape: &UNetShape,
    dims: [usize; 3],
    dtype: Dtype,
    fusion: Fusion,
) -> (u32, u64, Vec<NamedTensor>) {
    let loss = NetworkLoss::new(context, &labels(), shape, BATCH, dims, false).unwrap();
    let held_before = context.held_bytes();
    let network = Network::new(context, shape.clone(), 1).unwrap();
    let step = Step::new(context, network, loss, Optimizer::default()).with_fusion(fusion);
    let input = Shape { batch: BATCH, dims, channels: shape.channels_in };
    let image = Tensor::upload(context, input, &uniform(1, input.len())).unwrap().cast(context, dtype).unwrap();
    let map: Vec<u8> = (0..input.voxels()).map(|i| (i / 7 % 4) as u8).collect();
    let target = context.upload(&map, Dtype::U8).unwrap();
    context.reset_peak();
    let launches = context.launches();
    step.gradients(&image, &target).unwrap();
    step.update(0.01).unwrap();
    let (launches, peak) = (context.launches() - launches, context.peak_bytes() - held_before);
    (launches, peak, step.network().parameters().to_torch(context, Slot::Gradient).unwrap())
}

/// The same in f32.
pub fn step(context: &Context, shape: &UNetShape, dims: [usize; 3], fusion: Fusion) -> (u32, u64, Vec<NamedTensor>) {
    step_in(context, shape, dims, Dtype::F32, fusion)
}
