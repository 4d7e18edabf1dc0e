//! The memory of a training step: what is counted from shapes is what a step takes, and computing activations again
//! changes no bit of a gradient.

use crate::common::{device, uniform};
use voxgrad::Error;
use voxgrad::dataset::{DatasetJson, LabelManager};
use voxgrad::kernels::{Context, Dtype};
use voxgrad::loss::NetworkLoss;
use voxgrad::nn::{PlainConvUNet, Stage, UNetShape, planned_memory, pytorch_kept_bytes};
use voxgrad::optim::Optimizer;
use voxgrad::parameters::{NamedTensor, Slot};
use voxgrad::tape::{Fusion, Tape, Var};
use voxgrad::tensor::{Shape, Tensor};

const KEEP_BOTH: Fusion = Fusion { recompute_activations: false };
const RECOMPUTE: Fusion = Fusion { recompute_activations: true };
const BATCH: usize = 2;
const DATASET: &str = r#"{"channel_names": {"0": "MRI"}, "numTraining": 1, "file_ending": ".nii.gz",
    "labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}}"#;

fn network(features: &[usize], channels_in: usize, heads: usize) -> UNetShape {
    let stages = features.len();
    let stage = |(i, &features): (usize, &usize)| Stage {
        features,
        kernel: [3; 3],
        stride: [if i == 0 { 1 } else { 2 }; 3],
        encoder_blocks: 2,
        decoder_blocks: if i + 1 == stages { 0 } else { 2 },
    };
    UNetShape { channels_in, heads, stages: features.iter().enumerate().map(stage).collect(), bias: true }
}

/// Launches, peak bytes and gradients of one step.
fn step(context: &Context, shape: &UNetShape, dims: [usize; 3], fusion: Fusion) -> (u32, u64, Vec<NamedTensor>) {
    let labels = LabelManager::new(&DatasetJson::parse("dataset.json".as_ref(), DATASET).unwrap()).unwrap();
    let loss = NetworkLoss::new(context, &labels, shape, BATCH, dims, false).unwrap();
    let held_before = context.held_bytes();
    let network = PlainConvUNet::new(context, shape.clone(), 1).unwrap();
    let input = Shape { batch: BATCH, dims, channels: shape.channels_in };
    let x = Var::data(Tensor::upload(context, input, &uniform(1, input.len())).unwrap());
    let map: Vec<u8> = (0..input.voxels()).map(|i| (i / 7 % 4) as u8).collect();
    let target = context.upload(&map, Dtype::U8).unwrap();
    context.reset_peak();
    let launches = context.launches();
    let mut tape = Tape::new(context).with_fusion(fusion);
    let outputs = network.forward(&mut tape, &x, loss.levels()).unwrap();
    let (_, seeds) = loss.value_and_gradient(context, &target, outputs).unwrap();
    tape.backward(seeds).unwrap();
    Optimizer::default().step(context, network.parameters(), 0.01).unwrap();
    let (launches, peak) = (context.launches() - launches, context.peak_bytes() - held_before);
    (launches, peak, network.parameters().to_torch(context, Slot::Gradient).unwrap())
}

#[test]
fn activations_computed_again_change_no_gradient_and_save_what_is_planned() {
    let (context, _guard) = device();
    let dims = if crate::common::is_slow() { [16, 16, 16] } else { [48, 32, 32] };
    let shape = network(&[16, 24, 32], 3, 3);
    let (launches_kept, peak_kept, gradients_kept) = step(context, &shape, dims, KEEP_BOTH);
    let (launches, peak, gradients) = step(context, &shape, dims, RECOMPUTE);
    assert_eq!(gradients, gradients_kept);
    eprintln!("launches a step: {launches_kept}, computing activations again {launches}");
    for (name, fusion, peak) in [("keeping both", KEEP_BOTH, peak_kept), ("computing again", RECOMPUTE, peak)] {
        let plan = planned_memory(&shape, BATCH, dims, Dtype::F32, fusion);
        eprintln!("{name}: peak {peak} bytes, planned {}", plan.total);
        assert!(peak <= plan.total, "{name}: {peak} bytes exceed {plan:?}");
        // The allowances for small buffers are generous; the tensors must explain the rest.
        let slack = plan.total / 20 + (2 << 20);
        assert!(peak + slack >= plan.total, "{name}: {peak} bytes are far below {plan:?}");
    }
    if !crate::common::is_slow() {
        assert!((peak as f64) < 0.85 * peak_kept as f64, "{peak} against {peak_kept}");
    }
}

#[test]
fn the_brats_network_keeps_at_most_three_fifths_of_what_pytorch_keeps() {
    let shape = network(&[32, 64, 128, 256, 320, 320], 4, 3);
    for (dtype, size) in [(Dtype::F32, 4), (Dtype::F16, 2)] {
        let plan = planned_memory(&shape, 2, [128; 3], dtype, RECOMPUTE);
        let pytorch = pytorch_kept_bytes(&shape, 2, [128; 3], size);
        let share = plan.activations as f64 / pytorch as f64;
        eprintln!("{dtype:?}: {plan:?}, PyTorch keeps {pytorch}: {share:.3}");
        assert!(share <= 0.6, "{share}");
        let both = planned_memory(&shape, 2, [128; 3], dtype, KEEP_BOTH);
        assert!(plan.total < both.total);
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_remedy() {
    let (context, _guard) = device();
    let shape = network(&[32, 64, 128], 1, 3);
    let launches = context.launches();
    let plan = planned_memory(&shape, 64, [2048; 3], Dtype::F32, RECOMPUTE);
    let error = plan.check(context.caps()).unwrap_err();
    assert!(matches!(error, Error::DeviceMemory { .. }), "{error}");
    let words = error.to_string();
    assert!(words.contains("patch size") && words.contains("batch size"), "{words}");
    assert_eq!(context.launches(), launches);
    planned_memory(&shape, 1, [16; 3], Dtype::F32, RECOMPUTE).check(context.caps()).unwrap();
}
