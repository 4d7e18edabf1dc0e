//! The memory of a training step: what is counted from shapes is what a step takes, and computing activations again
//! changes no bit of a gradient.

use crate::common::{device, uniform};
use voxgrad::Error;
use voxgrad::dataset::{DatasetJson, LabelManager};
use voxgrad::kernels::conv3d::{self, Pass, Policy, Problem, Route, scratch_bytes};
use voxgrad::kernels::{Caps, Context, Dtype};
use voxgrad::loss::NetworkLoss;
use voxgrad::nn::{PlainConvUNet, Stage, UNetShape, planned_memory, planned_prediction, pytorch_kept_bytes};
use voxgrad::optim::Optimizer;
use voxgrad::parameters::{NamedTensor, Slot};
use voxgrad::tape::{Fusion, Tape, Var};
use voxgrad::tensor::{Shape, Tensor};

const KEEP_BOTH: Fusion = Fusion::NONE;
const RECOMPUTE: Fusion = Fusion { recompute_activations: true, ..Fusion::NONE };
const BATCH: usize = 2;
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
    UNetShape { channels_in, heads, stages: features.iter().enumerate().map(stage).collect(), bias: true }
}

/// Launches, peak bytes and gradients of one step with activations of type `dtype`.
fn step_in(
    context: &Context,
    shape: &UNetShape,
    dims: [usize; 3],
    dtype: Dtype,
    fusion: Fusion,
) -> (u32, u64, Vec<NamedTensor>) {
    let labels = LabelManager::new(&DatasetJson::parse("dataset.json".as_ref(), DATASET).unwrap()).unwrap();
    let loss = NetworkLoss::new(context, &labels, shape, BATCH, dims, false).unwrap();
    let held_before = context.held_bytes();
    let network = PlainConvUNet::new(context, shape.clone(), 1).unwrap();
    let input = Shape { batch: BATCH, dims, channels: shape.channels_in };
    let image = Tensor::upload(context, input, &uniform(1, input.len())).unwrap();
    let x = Var::data(image.cast(context, dtype).unwrap());
    drop(image);
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

/// The same in f32.
pub fn step(context: &Context, shape: &UNetShape, dims: [usize; 3], fusion: Fusion) -> (u32, u64, Vec<NamedTensor>) {
    step_in(context, shape, dims, Dtype::F32, fusion)
}

/// A plan holds what was measured and is not far above it.
fn check_plan(name: &str, peak: u64, planned: u64) {
    eprintln!("{name}: peak {peak} bytes, planned {planned}");
    assert!(peak <= planned, "{name}: {peak} bytes exceed the planned {planned}");
    // The allowances for small buffers are generous; the tensors must explain the rest.
    let slack = planned / 20 + (2 << 20);
    assert!(peak + slack >= planned, "{name}: {peak} bytes are far below the planned {planned}");
}

#[test]
fn every_type_and_algorithm_takes_what_is_planned() {
    let (context, _guard) = device();
    // The first network has its peak in large tensors; in the second, weights and scratch are as large.
    let networks: &[(&[usize], [usize; 3])] = match crate::common::is_slow() {
        true => &[(&[8, 16], [16; 3])],
        false => &[(&[16, 24, 32], [48, 32, 32]), (&[32, 64, 256, 320], [16; 3])],
    };
    for (features, dims) in networks {
        let shape = network(features, 3, 3);
        for (dtype, there) in [(Dtype::F32, true), (Dtype::F16, context.caps().f16)] {
            for exact in [false, true] {
                if !there {
                    eprintln!("skipped: no f16 on this device");
                    continue;
                }
                let context = &Policy::default().with_exact(exact).on(context);
                for fusion in [RECOMPUTE, Fusion::ALL] {
                    let (_, peak, _) = step_in(context, &shape, *dims, dtype, fusion);
                    let plan = planned_memory(context, &shape, BATCH, *dims, dtype, fusion);
                    check_plan(&format!("{features:?} in {dtype:?}, exact {exact}, {fusion:?}"), peak, plan.total);
                }
            }
        }
    }
}

#[test]
fn one_convolution_takes_the_scratch_that_is_planned() {
    let (context, _guard) = device();
    if crate::common::is_slow() {
        return eprintln!("skipped on a software device: large convolutions");
    }
    for (dims, channels, kernel) in [
        ([20, 20, 20], (32, 0, 32), [3; 3]),
        ([16, 16, 16], (32, 32, 64), [1, 3, 3]),
        ([6, 7, 5], (320, 0, 320), [3; 3]),
        ([6, 7, 5], (64, 64, 320), [3; 3]),
    ] {
        let (first, second_channels, out) = channels;
        let mut problem = Problem::new(2, dims, first, out, kernel, [1; 3]).unwrap();
        if second_channels > 0 {
            problem = problem.with_second_input(second_channels).unwrap();
        }
        for (pass, dtype, route) in
            [Pass::Forward, Pass::DataGradient, Pass::WeightGradient].into_iter().flat_map(|pass| {
                [(Dtype::F32, Route::Direct), (Dtype::F32, Route::Winograd), (Dtype::F16, Route::Direct)]
                    .map(|(d, a)| (pass, d, a))
            })
        {
            if dtype == Dtype::F16 && !context.caps().f16 {
                continue;
            }
            let mut policy = Policy::default();
            policy.choose(problem.clone(), pass, dtype, route);
            let context = &policy.on(context);
            let buffer = |len| context.empty(len, dtype).unwrap();
            let second = (second_channels > 0).then(|| buffer(problem.second_len()));
            let (x, y, second) = (buffer(problem.input_len()), buffer(problem.output_len()), second.as_ref());
            let w = context.empty(problem.weight_len(), Dtype::F32).unwrap();
            context.reset_peak();
            let before = context.held_bytes();
            match pass {
                Pass::Forward => conv3d::forward(context, &problem, &x, second, &w, None, &y),
                Pass::DataGradient => conv3d::backward_data(context, &problem, &w, &y, &x, second),
                Pass::WeightGradient => conv3d::backward_weight(context, &problem, &x, second, &y, &w),
            }
            .unwrap();
            context.finish([&x, &y, &w]).unwrap();
            let planned = scratch_bytes(context, &problem, pass, dtype);
            check_plan(&format!("{channels:?} {pass:?} {route:?} {dtype:?}"), context.peak_bytes() - before, planned);
        }
    }
}

#[test]
fn a_prediction_takes_what_is_planned_and_one_that_does_not_fit_is_refused() {
    let (context, _guard) = device();
    let (patch, image) = if crate::common::is_slow() { ([16; 3], [20; 3]) } else { ([32, 40, 32], [40; 3]) };
    let shape = network(&[16, 32, 64], 2, 3);
    for (dtype, there) in [(Dtype::F32, true), (Dtype::F16, context.caps().f16)] {
        if !there {
            continue;
        }
        let held_before = context.held_bytes();
        let network = PlainConvUNet::new(context, shape.clone(), 1).unwrap();
        context.reset_peak();
        let input = Shape { batch: 1, dims: patch, channels: 2 };
        let image_tensor = Tensor::upload(context, input, &uniform(1, input.len())).unwrap();
        let x = Var::data(image_tensor.cast(context, dtype).unwrap());
        drop(image_tensor);
        let outputs = network.forward(&mut Tape::inference(context), &x, 1).unwrap();
        outputs[0].value().download(context).unwrap();
        let plan = planned_prediction(context, &shape, image, patch, dtype);
        check_plan(&format!("prediction in {dtype:?}"), context.peak_bytes() - held_before, plan.device);
        let voxels = image.iter().zip(patch).map(|(&i, p)| i.max(p) as u64).product::<u64>();
        assert_eq!(plan.host, 4 * voxels * 4 + image.iter().product::<usize>() as u64 * 12);
        plan.check(context.caps()).unwrap();
    }
    let caps = Caps { cores: Some(2), memory: Some(8 << 30), max_buffer: 8 << 30, ..context.caps().clone() };
    for (image, patch, word) in [([2048; 3], patch, "fewer classes"), (image, [1024; 3], "smaller patch")] {
        let error = planned_prediction(context, &shape, image, patch, Dtype::F32).check(&caps).unwrap_err();
        assert!(matches!(error, Error::PredictionMemory { .. }) && error.to_string().contains(word), "{error}");
    }
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
        let plan = planned_memory(context, &shape, BATCH, dims, Dtype::F32, fusion);
        check_plan(name, peak, plan.total);
    }
    if !crate::common::is_slow() {
        assert!((peak as f64) < 0.85 * peak_kept as f64, "{peak} against {peak_kept}");
    }
}

#[test]
fn the_brats_network_keeps_at_most_three_fifths_of_what_pytorch_keeps() {
    let (context, _guard) = device();
    let shape = network(&[32, 64, 128, 256, 320, 320], 4, 3);
    for (dtype, size) in [(Dtype::F32, 4), (Dtype::F16, 2)] {
        let plan = planned_memory(context, &shape, 2, [128; 3], dtype, RECOMPUTE);
        let pytorch = pytorch_kept_bytes(&shape, 2, [128; 3], size);
        let share = plan.activations as f64 / pytorch as f64;
        eprintln!("{dtype:?}: {plan:?}, PyTorch keeps {pytorch}: {share:.3}");
        assert!(share <= 0.6, "{share}");
        let both = planned_memory(context, &shape, 2, [128; 3], dtype, KEEP_BOTH);
        assert!(plan.total < both.total);
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_remedy() {
    let (context, _guard) = device();
    let shape = network(&[32, 64, 128], 1, 3);
    let launches = context.launches();
    let plan = planned_memory(context, &shape, 64, [2048; 3], Dtype::F32, RECOMPUTE);
    let error = plan.check(context.caps()).unwrap_err();
    assert!(matches!(error, Error::DeviceMemory { .. }), "{error}");
    let words = error.to_string();
    assert!(words.contains("patch size") && words.contains("batch size"), "{words}");
    assert_eq!(context.launches(), launches);
    planned_memory(context, &shape, 1, [16; 3], Dtype::F32, RECOMPUTE).check(context.caps()).unwrap();
}
