//! Networks with a residual encoder: names as nnU-Net's, initialisation, memory, convolutions, the plans of nnU-Net's presets,
//! training and prediction. Logits, gradients and weights are compared with PyTorch's in `golden`.

use super::golden::Reference;
use super::memory::{check_plan, planned_memory};
use crate::common::network::{BATCH, labels, network, step_in};
use crate::common::plans::{fullres, plan};
use crate::common::{assert_no_device_panic, context, data, device, is_slow, phantom, uniform};
use serde_json::json;
use std::ops::ControlFlow;
use voxgrad::augment::Recipe;
use voxgrad::dataset::Dataset;
use voxgrad::dataset::plans::Plans;
use voxgrad::kernels::{Context, Dtype};
use voxgrad::loss::NetworkLoss;
use voxgrad::nn::{Encoder, Network, PlainConvUNet, UNetShape, planned_prediction, pytorch_kept_bytes};
use voxgrad::optim::Optimizer;
use voxgrad::parameters::{ParameterKind, Slot};
use voxgrad::plan::planner::PlannerKind;
use voxgrad::preprocess::{Preprocessor, RawCase};
use voxgrad::tape::{Fusion, Tape, Var};
use voxgrad::tensor::{Shape, Tensor};
use voxgrad::train::{Checkpoint, Model, Settings, Step, Trainer};
use voxgrad::tune::convolutions;
use voxgrad::{Compat, predict};

/// Two blocks in every stage of the encoder, stages that halve all extents.
fn residual(features: &[usize], channels_in: usize, heads: usize) -> UNetShape {
    UNetShape { encoder: Encoder::Residual, ..network(features, channels_in, heads) }
}

/// The network of `make_residual_fixture.py`.
fn small() -> UNetShape {
    let plans = Plans::read(&data("residual").join("plans.json")).unwrap();
    UNetShape::from_plans(&fullres(&plans).architecture.arch_kwargs, 1, 3).unwrap()
}

#[test]
fn names_and_their_order_are_pytorchs() {
    let built = Network::new(&context().dry(), small(), 1).unwrap();
    let reference = Reference::read("residual");
    let names: Vec<_> = built.parameters().iter().map(|p| p.name().to_owned()).collect();
    assert_eq!(names, reference.lines("parameters"));
    let sorted = |mut keys: Vec<String>| {
        keys.sort();
        keys
    };
    let keys = built.parameters().iter().flat_map(|p| p.state_dict_keys()).collect();
    assert_eq!(sorted(keys), sorted(reference.lines("state_dict")));
    // A plain network of six stages.
    let shape = network(&[4, 8, 8, 8, 8, 8], 1, 2);
    let plain = PlainConvUNet::new(&context().dry(), shape, 1).unwrap();
    let mut keys: Vec<_> = plain.parameters().iter().flat_map(|p| p.state_dict_keys()).collect();
    keys.sort();
    keys.dedup();
    assert_eq!((plain.parameters().iter().count(), keys.len()), (108, 292));
}

#[test]
fn blocks_begin_as_their_skips() {
    let (context, _guard) = device();
    let network = Network::new(context, small(), 1).unwrap();
    let mut zeros = 0;
    for (name, _, values) in network.parameters().to_torch(context, Slot::Value).unwrap() {
        let expected = if name.ends_with("conv2.norm.weight") { 0.0 } else { 1.0 };
        zeros += usize::from(expected == 0.0);
        if name.ends_with("norm.weight") {
            assert!(values.iter().all(|&v| v == expected), "{name}");
        } else if name.ends_with("bias") {
            assert!(values.iter().all(|&v| v == 0.0), "{name}");
        }
    }
    assert_eq!(zeros, 5);
    // He's deviation for the fan-in.
    let parameter = network.parameters().get("encoder.stages.1.blocks.1.conv2.conv.weight").unwrap();
    let values = context.download_f32(parameter.value()).unwrap();
    let deviation = (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt();
    assert!(matches!(parameter.kind(), ParameterKind::ConvWeight { kernel: [3, 3, 3], inputs: 6, outputs: 6 }));
    let expected = (2.0 / 1.0001f32 / 162.0).sqrt();
    assert!((deviation / expected - 1.0).abs() < 0.1, "{deviation}, expected {expected}");
}

#[test]
fn a_step_takes_what_is_planned() {
    let (context, _guard) = device();
    let dims = if is_slow() { [16; 3] } else { [32, 24, 16] };
    let shape = residual(&[16, 24], 3, 3);
    for (dtype, there) in [(Dtype::F32, true), (Dtype::F16, context.caps().f16)] {
        if !there {
            println!("skipped: no f16 on this device");
        } else {
            let (_, peak, _) = step_in(context, &shape, dims, dtype, Fusion::ALL);
            let plan = planned_memory(context, &shape, BATCH, dims, dtype, Fusion::ALL);
            check_plan(&format!("residual in {dtype:?}"), peak, plan.total);
            let held_before = context.held_bytes();
            let network = Network::new(context, shape.clone(), 1).unwrap();
            context.reset_peak();
            let input = Shape { batch: 1, dims, channels: 3 };
            let image = Tensor::upload(context, input, &uniform(1, input.len())).unwrap();
            let x = Var::data(image.cast(context, dtype).unwrap());
            drop(image);
            let outputs = network.forward(&mut Tape::inference(context), &x, 1).unwrap();
            outputs[0].value().download(context).unwrap();
            let plan = planned_prediction(context, &shape, dims, dtype, 0).unwrap();
            check_plan(&format!("prediction in {dtype:?}"), context.peak_bytes() - held_before, plan.device);
        }
    }
}

/// What PyTorch keeps is counted by its rules; computing again keeps three tensors a block where it keeps four.
#[test]
fn less_is_kept_than_pytorch_keeps() {
    let shape = residual(&[32, 64, 128, 256, 320, 320], 4, 3);
    let plan = planned_memory(context(), &shape, 2, [128; 3], Dtype::F32, Fusion::ALL);
    let share = plan.activations as f64 / pytorch_kept_bytes(&shape, 2, [128; 3], 4) as f64;
    eprintln!("{plan:?}: {share:.3} of what PyTorch keeps");
    assert!((0.5..0.75).contains(&share), "{share}");
}

#[test]
fn the_convolutions_of_a_block_are_measured_too() {
    let problems = convolutions(context(), &small(), 2, [8, 16, 16]).unwrap();
    let has = |dims, channels, kernel, stride| {
        let fits = |p: &voxgrad::kernels::conv3d::Problem| {
            (p.in_dims(), [p.channels_in(), p.channels_out()], p.kernel(), p.stride())
                == (dims, channels, kernel, stride)
        };
        assert!(problems.iter().any(fits), "no {dims:?} {channels:?}");
    };
    // Stem, first block, strided block, its projection, and a projection without stride.
    has([8, 16, 16], [1, 4], [1, 3, 3], [1; 3]);
    has([8, 16, 16], [4, 4], [1, 3, 3], [1; 3]);
    has([8, 16, 16], [4, 6], [3; 3], [1, 2, 2]);
    has([8, 8, 8], [4, 6], [1; 3], [1; 3]);
    has([4, 4, 4], [6, 8], [1; 3], [1; 3]);
}

/// One step on a patch twice the smallest.
fn trains(context: &Context, shape: &UNetShape) {
    let dims = shape.divisor().map(|n| 2 * n);
    let loss = NetworkLoss::new(context, &labels(), shape, 1, dims, false).unwrap();
    let step = Step::new(context, Network::new(context, shape.clone(), 1).unwrap(), loss, Optimizer::default());
    let input = Shape { batch: 1, dims, channels: shape.channels_in };
    let image = Tensor::upload(context, input, &uniform(1, input.len())).unwrap();
    let map: Vec<u8> = (0..input.voxels()).map(|i| (i / 7 % 4) as u8).collect();
    let target = context.upload(&map, Dtype::U8).unwrap();
    let mut losses = Vec::new();
    for _ in 0..2 {
        let value = step.gradients(&image, &target).unwrap();
        let norm = context.download_f32(&step.update(0.01).unwrap()).unwrap();
        assert!(norm[0] > 0.0 && norm[0].is_finite() && norm[1] == 0.0, "{norm:?}");
        losses.push(context.download_f32(&value).unwrap()[0]);
    }
    assert!(losses[1] < losses[0], "{losses:?}");
}

/// nnU-Net's presets as the planner writes them. Their networks for BraTS, of 100 million parameters, run on a dry context; those
/// for small images, which have the same blocks in fewer stages, train.
#[test]
fn the_presets_load_and_train() {
    let (context, _guard) = device();
    let mut trained: Vec<UNetShape> = Vec::new();
    for kind in [PlannerKind::ResEncM, PlannerKind::ResEncL, PlannerKind::ResEncXl] {
        let shape_of = |shape, spacing| {
            let plans = plan(kind, shape, spacing, 20, 3);
            let configuration = fullres(&plans);
            plans.check_training(&configuration).unwrap();
            UNetShape::from_plans(&configuration.architecture.arch_kwargs, 1, 3).unwrap()
        };
        let brats = shape_of([140, 171, 136], [1.0; 3]);
        assert_eq!(brats.encoder, Encoder::Residual);
        let blocks: Vec<_> = brats.stages.iter().map(|stage| stage.encoder_blocks).collect();
        assert_eq!(blocks, [1, 3, 4, 6, 6, 6]);
        let patch = brats.divisor().map(|n| 2 * n);
        let memory = planned_memory(context, &brats, 1, patch, Dtype::F32, Fusion::ALL);
        let parameters = memory.parameters / 12;
        assert!((90_000_000..110_000_000).contains(&parameters), "{parameters}");
        if is_slow() {
            continue;
        }
        // With thick slices: kernels and strides of 1 across them.
        let small = shape_of([6, 28, 28], [4.0, 1.0, 1.0]);
        assert_eq!(small.stages[0].kernel, [1, 3, 3]);
        if !trained.contains(&small) {
            trains(context, &small);
            trained.push(small);
        }
    }
    assert!(is_slow() || !trained.is_empty());
    assert_no_device_panic();
}

/// Two epochs on spheres, interrupted between them: the file continues to the same bits, and its network predicts.
#[test]
fn a_training_continues_from_its_file_and_predicts() {
    let (context, _guard) = device();
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 2);
    let dataset = Dataset::open(folder.path()).unwrap();
    let mut plans: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(folder.path().join("nnUNetPlans.json")).unwrap()).unwrap();
    let architecture = &mut plans["configurations"]["3d_fullres"]["architecture"];
    architecture["network_class_name"] = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet".into();
    let arguments = architecture["arch_kwargs"].as_object_mut().unwrap();
    arguments.remove("n_conv_per_stage");
    arguments.insert("n_blocks_per_stage".into(), json!([1, 2]));
    let plans: Plans = serde_json::from_value(plans).unwrap();
    let model = Model::new(plans, "3d_fullres", dataset.json.clone()).unwrap();
    model.check().unwrap();
    let preprocessor =
        Preprocessor::from_plans(&model.plans, &model.configuration, model.labels.clone(), Compat::Corrected).unwrap();
    let read = |files| preprocessor.run(RawCase::read(files, &model.labels).unwrap()).unwrap();
    let cases: Vec<_> = dataset.cases.iter().map(read).collect();

    let settings = Settings {
        epochs: 2,
        iterations: 4,
        validation_iterations: 1,
        augmentation: Recipe::MIRROR,
        seed: 5,
        ..Settings::default()
    };
    let epoch = |trainer: &mut Trainer| trainer.epoch(&cases, &cases, |_| ControlFlow::Continue(())).unwrap();
    let weights = |trainer: &Trainer| trainer.network().parameters().to_torch(context, Slot::Value).unwrap();
    let mut whole = Trainer::new(context, model.clone(), settings).unwrap();
    epoch(&mut whole);
    let path = folder.path().join("checkpoint.safetensors");
    whole.checkpoint().unwrap().write(&path).unwrap();
    epoch(&mut whole);
    let mut continued = Trainer::resume(context, Checkpoint::read(&path).unwrap()).unwrap();
    epoch(&mut continued);
    assert_eq!(weights(&continued), weights(&whole));
    let losses = &whole.progress().history.train_losses;
    assert!(losses[1] < losses[0], "{losses:?}");

    let patch = model.configuration.three_dimensional().unwrap().0;
    let settings = predict::Settings { mirror: [false; 3], ..predict::Settings::default() };
    let logits =
        predict::logits(context, std::slice::from_ref(continued.network()), &cases[0], patch, &settings, |_, _| ())
            .unwrap();
    assert!(logits.len() == 2 * phantom::SIDE.pow(3) && logits.iter().all(|v| v.is_finite()));
    assert_no_device_panic();
}
