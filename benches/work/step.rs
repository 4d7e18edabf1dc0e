//! Whole training steps of nnU-Net's PlainConvUNet: forward, deep-supervision loss, backward, clipping, SGD. The kernels that a
//! step launches are counted and printed. `VOXGRAD_FUSION` lists what is fused, of
//! `recompute`, `moments`, `bias` and `sums` (see `Fusion`); unset, that is the default.

use super::{Amount, Item, Kind, Place, pattern, sparse_labels, suffix};
use std::path::Path;
use voxgrad::dataset::{DatasetJson, LabelManager};
use voxgrad::kernels::{Dtype, LossScale, LossScaleState};
use voxgrad::loss::NetworkLoss;
use voxgrad::nn::{Encoder, Network, Stage, UNetShape};
use voxgrad::optim::Optimizer;
use voxgrad::tape::Fusion;
use voxgrad::tensor::{Shape, Tensor};
use voxgrad::train::Step;

const BATCH: usize = 2;
const TWO_REGIONS: &str = r#"{"channel_names": {"0": "MRI"}, "numTraining": 1, "file_ending": ".nii.gz",
    "labels": {"background": 0, "whole": [1, 2], "part": 1, "ignore": 3}, "regions_class_order": [2, 1]}"#;
const FOUR_CLASSES: &str = r#"{"channel_names": {"0": "MRI"}, "numTraining": 1, "file_ending": ".nii.gz",
    "labels": {"background": 0, "a": 1, "b": 2, "c": 3, "ignore": 4}}"#;

/// The three networks that are measured everywhere, and on a GPU that of nnU-Net's plan for BraTS.
pub fn items(place: &Place) -> Vec<Item> {
    let mut items = Vec::new();
    for dtype in place.dtypes() {
        items.push(item("step", &[8, 16, 32, 64], 1, TWO_REGIONS, [40, 56, 40], dtype));
        items.push(item("step", &[32, 64, 128, 256], 1, TWO_REGIONS, [40, 56, 40], dtype));
        items.push(item("step", &[32, 64, 128], 4, FOUR_CLASSES, [64, 64, 64], dtype));
        if place.kind == Kind::Gpu {
            items.push(item("step", &[32, 64, 128, 256, 320, 320], 4, FOUR_CLASSES, [128, 128, 128], dtype));
        }
    }
    items
}

/// Cost against size: the smallest network on larger patches, and wider networks on one patch.
pub fn sizes() -> Vec<Item> {
    let patches = [32, 48, 64, 80, 96].map(|n| item("size", &[8, 16, 32, 64], 1, TWO_REGIONS, [n; 3], Dtype::F32));
    let widths = [2, 4].map(|k| item("size", &[8, 16, 32, 64].map(|f| f * k), 1, TWO_REGIONS, [48; 3], Dtype::F32));
    patches.into_iter().chain(widths).collect()
}

/// A step with activations of `dtype`; with f16 also a loss scale, as training has.
fn item(
    group: &str,
    features: &[usize],
    channels: usize,
    dataset: &'static str,
    dims: [usize; 3],
    dtype: Dtype,
) -> Item {
    let features = features.to_vec();
    let names: Vec<String> = features.iter().map(usize::to_string).collect();
    let [d, h, w] = dims;
    let id = format!("{group}/{}-in{channels}-b{BATCH}-{d}x{h}x{w}{}", names.join("-"), suffix(dtype));
    Item {
        id: id.clone(),
        amount: Amount::Voxels((BATCH * d * h * w) as u64),
        prepare: Box::new(move |context| {
            let context = context.clone();
            let json = DatasetJson::parse(Path::new("dataset.json"), dataset).expect("dataset");
            let labels = LabelManager::new(&json).expect("labels");
            let stage = |(i, &features): (usize, &usize)| Stage {
                features,
                kernel: [3; 3],
                stride: if i == 0 { [1; 3] } else { [2; 3] },
                encoder_blocks: 2,
                decoder_blocks: 2,
            };
            let shape = UNetShape {
                channels_in: channels,
                heads: labels.num_segmentation_heads(),
                encoder: Encoder::Plain,
                stages: features.iter().enumerate().map(stage).collect(),
                bias: true,
            };
            let loss = NetworkLoss::new(&context, &labels, &shape, BATCH, dims, false).expect("loss");
            let network = Network::new(&context, shape, 1).expect("network");
            let scale =
                (dtype == Dtype::F16).then(|| LossScale::new(&context, LossScaleState::default()).expect("loss scale"));
            let step = Step::new(&context, network, loss, Optimizer::default());
            let step = step.with_loss_scale(scale).with_fusion(fusion());
            let shape = Shape { batch: BATCH, dims, channels };
            let image = Tensor::upload(&context, shape, &pattern(shape.len(), 1)).expect("upload");
            let image = image.cast(&context, dtype).expect("cast");
            let map = sparse_labels(BATCH, dims, labels.all_labels().len());
            let target = context.upload(&map, Dtype::U8).expect("upload");
            let mut title = Some(id.clone());
            Box::new(move || {
                let launches = context.launches();
                step.gradients(&image, &target).expect("gradients");
                let norm = step.update(0.01).expect("update");
                let [values, ..] = step.network().parameters().trained().expect("parameters");
                context.finish([&norm, &values]).expect("finish");
                if let Some(title) = title.take() {
                    eprintln!("# {title}: {} launches a step", context.launches() - launches);
                }
            })
        }),
    }
}

fn fusion() -> Fusion {
    let Ok(names) = std::env::var("VOXGRAD_FUSION") else { return Fusion::default() };
    let has = |name| names.split(',').any(|n| n == name);
    Fusion {
        recompute_activations: has("recompute"),
        moments_by_convolution: has("moments"),
        no_bias_gradient_before_norm: has("bias"),
        norm_sums_by_convolution: has("sums"),
        recompute_stages: 0,
    }
}
