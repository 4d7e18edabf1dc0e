//! The memory of a training step and of a prediction: what a dry context counts is what they take, and computing
//! activations again changes no bit of a gradient.

use crate::common::network::{BATCH, labels, network, step, step_in};
use crate::common::{context, device, phantom, uniform};
use voxgrad::Error;
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::{DatasetJson, LabelManager};
use voxgrad::error::{NetworkError, PredictError, TrainError};
use voxgrad::infer::memory::planned_host;
use voxgrad::infer::{Budget, Demand, Kept, Planned, SlidingWindow, Wanted};
use voxgrad::kernels::conv3d::{self, Pass, Policy, Problem, Route};
use voxgrad::kernels::{Caps, Context, Dtype};
use voxgrad::nn::{Encoder, Network, UNetShape, planned_prediction, pytorch_kept_bytes};
use voxgrad::tape::{Fusion, Tape, Var};
use voxgrad::tensor::{Shape, Tensor};
use voxgrad::train::{MemoryPlan, Model, Settings, Trainer};

const KEEP_BOTH: Fusion = Fusion::NONE;
const RECOMPUTE: Fusion = Fusion { recompute_activations: true, ..Fusion::NONE };
pub fn planned_memory(
    context: &Context,
    shape: &UNetShape,
    batch: usize,
    dims: [usize; 3],
    dtype: Dtype,
    fusion: Fusion,
) -> MemoryPlan {
    voxgrad::train::planned_memory(context, &labels(), shape, batch, dims, dtype, fusion).unwrap()
}

/// A plan holds what was measured and is at most 5 % above it.
pub fn check_plan(name: &str, peak: u64, planned: u64) {
    eprintln!("{name}: peak {peak} bytes, planned {planned}");
    assert!(peak <= planned, "{name}: {peak} bytes exceed the planned {planned}");
    assert!(peak + planned / 20 >= planned, "{name}: {peak} bytes are far below the planned {planned}");
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
                    println!("skipped: no f16 on this device");
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
fn one_convolution_takes_the_scratch_that_a_dry_one_counts() {
    let (context, _guard) = device();
    if crate::common::is_slow() {
        return println!("skipped on a software device: large convolutions");
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
            let scratch = |context: &Context| {
                let buffer = |len| context.empty(len, dtype).unwrap();
                let second = (second_channels > 0).then(|| buffer(problem.second_len()));
                let (x, y, second) = (buffer(problem.input_len()), buffer(problem.output_len()), second.as_ref());
                let w = context.empty(problem.weight_len(), Dtype::F32).unwrap();
                context.reset_peak();
                let (before, launches) = (context.held_bytes(), context.launches());
                match pass {
                    Pass::Forward => conv3d::forward(context, &problem, &x, second, &w, None, &y),
                    Pass::DataGradient => conv3d::backward_data(context, &problem, &w, &y, &x, second),
                    Pass::WeightGradient => conv3d::backward_weight(context, &problem, &x, second, &y, &w),
                }
                .unwrap();
                context.finish([&x, &y, &w]).unwrap();
                (context.peak_bytes() - before, context.launches() - launches)
            };
            let counted = scratch(&context.dry());
            assert_eq!(scratch(context), counted, "{channels:?} {pass:?} {route:?} {dtype:?}");
        }
    }
}

#[test]
fn a_prediction_takes_what_is_planned_and_one_that_does_not_fit_is_refused() {
    let (context, _guard) = device();
    let patch = if crate::common::is_slow() { [16; 3] } else { [32, 40, 32] };
    let shape = network(&[16, 32, 64], 2, 3);
    for (dtype, there) in [(Dtype::F32, true), (Dtype::F16, context.caps().f16)] {
        if !there {
            continue;
        }
        let held_before = context.held_bytes();
        let network = Network::new(context, shape.clone(), 1).unwrap();
        context.reset_peak();
        let input = Shape { batch: 1, dims: patch, channels: 2 };
        let image_tensor = Tensor::upload(context, input, &uniform(1, input.len())).unwrap();
        let x = Var::data(image_tensor.cast(context, dtype).unwrap());
        drop(image_tensor);
        let outputs = network.forward(&mut Tape::inference(context), &x, 1).unwrap();
        outputs[0].value().download(context).unwrap();
        let plan = planned_prediction(context, &shape, patch, dtype, 1 << 20).unwrap();
        check_plan(&format!("prediction in {dtype:?}"), context.peak_bytes() - held_before, plan.device);
        plan.check(context.caps(), None).unwrap();
    }
    let caps = Caps { cores: Some(2), memory: Some(8 << 30), max_buffer: 8 << 30, ..context.caps().clone() };
    for (host, patch, word) in [(8 << 30, patch, "fewer classes"), (0, [480; 3], "smaller patch")] {
        let error =
            planned_prediction(context, &shape, patch, Dtype::F32, host).unwrap().check(&caps, None).unwrap_err();
        assert!(
            matches!(error, Error::Predict(PredictError::PredictionMemory { .. })) && error.to_string().contains(word),
            "{error}"
        );
    }
    // A GPU has memory of its own; the host's is another matter.
    let gpu = Caps { cores: None, ..caps };
    let plan = planned_prediction(context, &shape, patch, Dtype::F32, 9 << 30).unwrap();
    plan.check(&gpu, Some(16 << 30)).unwrap();
    assert!(matches!(plan.check(&gpu, Some(8 << 30)), Err(Error::Predict(PredictError::PredictionMemory { .. }))));
}

/// Of classes times voxels, the host holds what one patch is deep: 105 classes of 512x512x800 voxels, and half of them.
#[test]
fn the_host_holds_a_patch_deep_of_a_case() {
    let planned = |image: [usize; 3], heads| {
        let window = SlidingWindow::new(image, [128, 128, 128], 0.5).unwrap();
        planned_host(&window, 1, heads, image, 16)
    };
    let copy = |image: [usize; 3], heads: u64| image.iter().product::<usize>() as u64 * heads * 4;
    let image = [800, 512, 512];
    let share = planned(image, 105) as f64 / copy(image, 105) as f64;
    assert!((0.16..0.21).contains(&share), "{share}");
    // What is as deep as a patch is held whole, once.
    let flat = [128, 512, 512];
    let share = planned(flat, 105) as f64 / copy(flat, 105) as f64;
    assert!((1.0..1.2).contains(&share), "{share}");
    // The labels of a raw image that is finer than the case.
    let window = SlidingWindow::new(flat, [128; 3], 0.5).unwrap();
    let fine = planned_host(&window, 1, 3, [512, 1024, 1024], 16);
    assert!(fine > planned_host(&window, 1, 3, flat, 16) + 2 * (512 - 32) * 1024 * 1024);
}

/// A whole body, 512x512 voxels in 800 slices, of 105 classes, by a network of nnU-Net's size: what a case of this kind is
/// planned to take, and where.
fn whole_body(wanted: Wanted, kept: Option<Kept>, budget: &Budget) -> voxgrad::Result<Planned> {
    let image = [800, 512, 512];
    let shape = network(&[32, 64, 128, 256, 320, 320], 1, 105);
    let window = SlidingWindow::new(image, [128; 3], 0.5).unwrap();
    let (window, shape) = (&window, &shape);
    let demand = Demand { window, channels: 1, raw: image, shape, networks: 1, dtype: Dtype::F32, wanted, kept };
    demand.plan(context(), image, budget)
}

/// Bytes of classes times voxels, once.
const COPY: u64 = 4 * 105 * 800 * 512 * 512;

fn many_labels() -> LabelManager {
    let labels: Vec<String> = (1..105).map(|label| format!(r#""l{label}": {label}"#)).collect();
    let json = format!(
        r#"{{"channel_names": {{"0": "CT"}}, "labels": {{"background": 0, {}}}, "numTraining": 1,
            "file_ending": ".nii.gz"}}"#,
        labels.join(", ")
    );
    LabelManager::new(&DatasetJson::parse("d".as_ref(), &json).unwrap()).unwrap()
}

/// A CPU, a GPU that takes buffers of any size, and one that takes 4 GiB at most, with so much memory, and a host.
fn budgets(memory: u64, host: u64) -> [(&'static str, Budget); 3] {
    let caps = context().caps();
    [("CPU", Some(16), memory), ("GPU", None, memory), ("GPU of small buffers", None, (4 << 30) - 1)].map(
        |(name, cores, max_buffer)| {
            let caps = Caps { cores, max_buffer, memory: Some(memory), ..caps.clone() };
            (name, Budget { caps, host: Some(host) })
        },
    )
}

#[test]
fn a_whole_body_of_105_classes_is_predicted_in_24_gib() {
    let labels = many_labels();
    for (name, budget) in budgets(24 << 30, 24 << 30) {
        let planned = whole_body(Wanted::Labels(&labels), None, &budget).unwrap();
        let [device, host] =
            [planned.memory.device, planned.memory.host].map(|bytes| bytes as f64 / (1u64 << 30) as f64);
        eprintln!(
            "{name}: {:?} windows at once on the device, {device:.1} GiB there, {host:.1} GiB on the host",
            planned.at_once
        );
        if name == "GPU of small buffers" {
            assert_eq!(planned.at_once, None);
        } else if planned.at_once.is_none() {
            assert!(context().caps().cores.is_none());
            println!("skipped: this device does not count so many values, which are added up on the host");
        }
    }
}

#[test]
fn classes_times_voxels_are_not_held_one_and_a_half_times() {
    let labels = many_labels();
    let kept = |what| Some(Kept { what, bytes: COPY });
    let all = [
        ("labels", Wanted::Labels(&labels), None, 0),
        ("logits", Wanted::Logits, kept("logits"), COPY),
        ("probabilities", Wanted::Logits, kept("probabilities"), COPY),
    ];
    for (what, wanted, kept, least) in all {
        for (name, budget) in budgets(1 << 40, 1 << 40) {
            let Planned { memory, .. } = whole_body(wanted, kept, &budget).unwrap();
            let held = memory.device + memory.host;
            eprintln!("{what}, {name}: {:.2} copies", held as f64 / COPY as f64);
            assert!(held >= least && held < COPY + COPY / 2, "{what}, {name}: {held} bytes");
            assert!(memory.largest_buffer < COPY / 2, "{what}, {name}: {} bytes at once", memory.largest_buffer);
        }
        // Labels need no copy at all.
        if kept.is_none() {
            let (_, budget) = &budgets(1 << 40, 1 << 40)[0];
            let Planned { memory, .. } = whole_body(wanted, kept, budget).unwrap();
            assert!(memory.device + memory.host < COPY / 4, "{memory:?}");
        }
    }
}

/// What is too large is named: a smaller patch would not make room for probabilities.
#[test]
fn too_many_probabilities_are_told_from_too_large_windows() {
    let labels = many_labels();
    for (name, budget) in budgets(24 << 30, 24 << 30) {
        let kept = Kept { what: "probabilities", bytes: COPY };
        let error = whole_body(Wanted::Logits, Some(kept), &budget).unwrap_err();
        let told = error.to_string();
        assert!(matches!(error, Error::Predict(PredictError::KeptMemory { bytes: COPY, .. })), "{name}: {told}");
        for word in ["probabilities of 105 heads", "[800, 512, 512]", "labels only"] {
            assert!(told.contains(word), "{name}: no `{word}` in {told}");
        }
        assert!(!told.contains("patch") && !told.contains("16 bits"), "{name}: {told}");
    }
    for (name, budget) in budgets(1 << 30, 1 << 30) {
        for kept in [None, Some(Kept { what: "probabilities", bytes: 1 })] {
            let error = whole_body(Wanted::Labels(&labels), kept, &budget).unwrap_err();
            let told = error.to_string();
            assert!(matches!(error, Error::Predict(PredictError::PredictionMemory { .. })), "{name}: {told}");
            assert!(told.contains("patch"), "{name}: {told}");
        }
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

/// Convolutions computed again, of more and more stages, of both kinds of encoder.
#[test]
fn stages_computed_again_change_no_bit_and_take_what_is_planned() {
    let (context, _guard) = device();
    let dims = [16; 3];
    let plain = network(&[8, 16], 2, 3);
    let residual = UNetShape { encoder: Encoder::Residual, ..plain.clone() };
    for (name, shape) in [("plain", plain), ("residual", residual)] {
        let (launches_kept, peak_kept, kept) = step(context, &shape, dims, Fusion::default());
        let planned = |stages| {
            let fusion = Fusion { recompute_stages: stages, ..Fusion::default() };
            (fusion, planned_memory(context, &shape, BATCH, dims, Dtype::F32, fusion))
        };
        let (_, mut before) = planned(0);
        check_plan(name, peak_kept, before.total);
        for stages in 1..=2 {
            let (fusion, plan) = planned(stages);
            let (launches, peak, gradients) = step(context, &shape, dims, fusion);
            assert_eq!(gradients, kept, "{name}: {stages} stages");
            check_plan(
                &format!("{name}: {stages} stages, {launches_kept} launches become {launches}"),
                peak,
                plan.total,
            );
            assert!(launches > launches_kept && plan.activations < before.activations, "{plan:?} {before:?}");
            // All of the coarse stages is less than what one moment of the finest holds.
            assert!(plan.total < before.total || stages > 1, "{plan:?} {before:?}");
            before = plan;
        }
        // Of activations that are kept there is nothing to be computed again.
        let stored = Fusion { recompute_stages: 2, recompute_activations: false, ..Fusion::default() };
        let all = Fusion { recompute_activations: false, ..Fusion::default() };
        let [a, b] = [stored, all].map(|fusion| planned_memory(context, &shape, BATCH, dims, Dtype::F32, fusion));
        assert_eq!(a, b);
    }
}

#[test]
fn a_budget_computes_as_few_stages_again_as_it_takes() {
    let (context, _guard) = device();
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 1);
    let mut plans = Plans::read(&folder.path().join("nnUNetPlans.json")).unwrap();
    plans.configurations["3d_fullres"]["patch_size"] = serde_json::json!([32, 32, 32]);
    let arguments = &mut plans.configurations["3d_fullres"]["architecture"]["arch_kwargs"];
    arguments["features_per_stage"] = serde_json::json!([16, 16]);
    arguments["n_conv_per_stage"] = serde_json::json!([2, 2]);
    arguments["n_conv_per_stage_decoder"] = serde_json::json!([2]);
    let dataset = DatasetJson::read(&folder.path().join("dataset.json")).unwrap();
    let model = Model::new(plans, "3d_fullres", dataset).unwrap();
    let within = |budget| Trainer::within(context, model.clone(), Settings::default(), budget).map(|t| t.recomputed());
    let (stages, all) = within(None).unwrap();
    assert_eq!(stages, 0);
    assert_eq!(within(Some(all)).unwrap(), (0, all));
    let (stages, less) = within(Some(all - 1)).unwrap();
    assert!(stages == 1 && less < all, "{stages}: {less} of {all}");
    let error = within(Some(all / 2)).unwrap_err();
    let Error::Train(TrainError::MemoryBudget { budget, least }) = error else { panic!("{error}") };
    assert!(budget == all / 2 && least <= less && least > budget);
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
    let (launches, held) = (context.launches(), context.held_bytes());
    // More elements than the kernels count.
    let plan = voxgrad::train::planned_memory(context, &labels(), &shape, 64, [2048; 3], Dtype::F32, RECOMPUTE);
    let words = plan.unwrap_err().to_string();
    assert!(words.contains("smaller patch or batch"), "{words}");
    // More bytes than the device has.
    let plan = planned_memory(context, &shape, 1, [384; 3], Dtype::F32, RECOMPUTE);
    let error = plan.check(context.caps()).unwrap_err();
    assert!(matches!(error, Error::Network(NetworkError::DeviceMemory { .. })), "{error}");
    let words = error.to_string();
    assert!(words.contains("patch size") && words.contains("batch size"), "{words}");
    assert_eq!((context.launches(), context.held_bytes()), (launches, held));
    planned_memory(context, &shape, 1, [16; 3], Dtype::F32, RECOMPUTE).check(context.caps()).unwrap();
}
