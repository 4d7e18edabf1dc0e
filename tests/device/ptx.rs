//! Every kernel that three whole networks launch, handed to `ptx/driver.c` in place of a CUDA driver: that they compile for
//! an NVIDIA GPU, and respect its limits, needs none. `scripts/ptx_check.sh` runs this and assembles what it wrote. The same
//! kernels at small ragged shapes, which `scripts/cuda_software.sh` executes.

use crate::common::{assert_no_device_panic, device};
use std::path::Path;
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::{DatasetJson, LabelManager};
use voxgrad::kernels::loss::{Annotation, Entropy, Gradient, Level, LossSettings, Problem, Target, value_and_gradient};
use voxgrad::kernels::{Buffer, Context, Dtype, LossScale, LossScaleState, Scale, elementwise};
use voxgrad::loss::NetworkLoss;
use voxgrad::nn::{Encoder, Network, Stage, UNetShape};
use voxgrad::optim::Optimizer;
use voxgrad::tape::{Fusion, Tape, Var};
use voxgrad::tensor::{Shape, Tensor};
use voxgrad::train::Step;

/// A network in training, and what it is trained with.
struct Work {
    network: UNetShape,
    labels: LabelManager,
    batch: usize,
    patch: [usize; 3],
    batch_dice: bool,
}

const REGIONS: &str = r#""whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3"#;
const SPARSE_REGIONS: &str = r#""whole tumor": [1, 2, 3], "tumor core": [2, 3], "enhancing tumor": 3, "ignore": 4"#;
const SPARSE_LABELS: &str = r#""oedema": 1, "necrosis": 2, "enhancing tumor": 3, "ignore": 4"#;

/// nnU-Net's 3d_fullres plan for BraTS on 24 GB: four contrasts, patches of 128^3, six stages.
fn brats(labels: &str) -> Work {
    let json = format!(
        r#"{{"channel_names": {{"0": "T1", "1": "T1ce", "2": "T2", "3": "FLAIR"}}, "numTraining": 1251,
        "file_ending": ".nii.gz", "regions_class_order": [1, 2, 3], "labels": {{"background": 0, {labels}}}}}"#
    );
    let labels = LabelManager::new(&DatasetJson::parse(Path::new("dataset.json"), &json).unwrap()).unwrap();
    let stage = |(i, features)| Stage {
        features,
        kernel: [3; 3],
        stride: if i == 0 { [1; 3] } else { [2; 3] },
        encoder_blocks: 2,
        decoder_blocks: 2,
    };
    let stages = [32, 64, 128, 256, 320, 320].into_iter().enumerate().map(stage).collect();
    let network = UNetShape {
        channels_in: 4,
        heads: labels.num_segmentation_heads(),
        encoder: Encoder::Plain,
        stages,
        bias: true,
    };
    Work { network, labels, batch: 2, patch: [128; 3], batch_dice: true }
}

/// A residual encoder as nnU-Net's presets have it for thick slices, whose kernels and strides differ by axis.
fn residual() -> Work {
    let mut work = brats(SPARSE_LABELS);
    work.network.encoder = Encoder::Residual;
    work.network.stages.truncate(4);
    work.network.stages[0].kernel = [1, 3, 3];
    work.network.stages[1].stride = [1, 2, 2];
    Work { patch: [32, 64, 64], ..work }
}

/// The network of the demo.
fn hippocampus() -> Work {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/hippocampus");
    let plans = Plans::read(&folder.join("nnUNetPlans.json")).unwrap();
    let labels = LabelManager::new(&DatasetJson::read(&folder.join("dataset.json")).unwrap()).unwrap();
    let configuration = plans.configuration("3d_fullres").unwrap();
    let heads = labels.num_segmentation_heads();
    let network = UNetShape::from_plans(&configuration.architecture.arch_kwargs, 1, heads).unwrap();
    let patch = configuration.patch_size[..].try_into().unwrap();
    Work { network, labels, batch: configuration.batch_size, patch, batch_dice: configuration.batch_dice }
}

/// A network with its optimiser and loss, and labels.
fn training(context: &Context, work: &Work) -> (Step, Buffer) {
    let voxels = work.batch * work.patch.iter().product::<usize>();
    let target = context.upload(&vec![0u8; voxels], Dtype::U8).unwrap();
    let Work { network, labels, batch, patch, batch_dice } = work;
    let loss = NetworkLoss::new(context, labels, network, *batch, *patch, *batch_dice).unwrap();
    let network = Network::new(context, network.clone(), 1).unwrap();
    (Step::new(context, network, loss, Optimizer::default()), target)
}

fn image(context: &Context, work: &Work, batch: usize) -> Tensor {
    let shape = Shape { batch, dims: work.patch, channels: work.network.channels_in };
    Tensor::upload(context, shape, &vec![0.0; shape.len()]).unwrap()
}

/// A training step in f32 and one in each 16-bit type with its loss scale, a validation step, and the prediction of one
/// patch.
fn launch(context: &Context, work: Work) {
    let (x, one) = (image(context, &work, work.batch), image(context, &work, 1));
    let (mut step, target) = training(context, &work);

    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        if dtype != Dtype::F32 {
            let scale = LossScale::new(context, LossScaleState::default()).unwrap();
            step = step.with_loss_scale(scale);
        }
        let image = x.cast(context, dtype).unwrap();
        // With what is on by default, and with nothing that convolutions can do on the way.
        for fusion in [Fusion::default(), Fusion::NONE] {
            step = step.with_fusion(fusion);
            step.gradients(&image, &target).unwrap();
        }
        let norm = step.update(0.01).unwrap();
        let [values, ..] = step.network().parameters().trained().unwrap();
        context.finish([&norm, &values]).unwrap();
    }

    let (network, loss, x, one) = (step.network(), step.loss(), Var::data(x), Var::data(one));
    let outputs = network.forward(&mut Tape::inference(context), &x, loss.levels()).unwrap();
    let value = loss.value(context, &target, &outputs).unwrap();
    context.finish([&value]).unwrap();
    let outputs = network.forward(&mut Tape::inference(context), &one, 1).unwrap();
    outputs[0].value().download(context).unwrap();
    assert_no_device_panic();
}

/// Losses of more classes and regions than these networks have, one of them with everything that a loss may have.
/// `dims`: of the labels, and of a second level.
fn launch_losses(context: &Context, [dims, coarse]: [[usize; 3]; 2]) {
    let voxels = dims.iter().product();
    let levels = [Level { dims, weight: 0.75 }, Level { dims: coarse, weight: 0.25 }];
    for channels in [14, 62, 118, 1023] {
        let regions = (0..channels).map(|region| vec![region as u16 % 7]).collect();
        for target in [Target::Labels { classes: channels }, Target::Regions { labels: 7, regions }] {
            for everything in [false, true] {
                if everything && channels != 62 {
                    continue;
                }
                let mut settings = LossSettings::new(target.clone(), Some(2000), false);
                if everything && matches!(target, Target::Labels { .. }) {
                    settings.entropy = Entropy::TopK { percent: 10.0 };
                }
                let problem = Problem::new(context, &settings, 1, dims, &levels).unwrap();
                let labels = context.upload(&vec![0u16; voxels], Dtype::U16).unwrap();
                let weights = context.upload(&vec![255u8; voxels], Dtype::U8).unwrap();
                let mut annotation = Annotation::from(&labels);
                if everything {
                    annotation.weights = Some(&weights);
                    annotation.missing = Some(&[2, 1]);
                }
                let loss = context.empty(problem.loss_len(), Dtype::F32).unwrap();
                for dtype in [Dtype::F32, Dtype::F16] {
                    let logits = [0, 1].map(|level| context.empty(problem.logits_len(level), dtype).unwrap());
                    let logits = [&logits[0], &logits[1]];
                    logits.iter().for_each(|logits| elementwise::fill(context, logits, 0.5).unwrap());
                    let in_place = [Gradient::InPlace; 2];
                    value_and_gradient(context, &problem, &annotation, &logits, &in_place, Scale::ONE, &loss).unwrap();
                    context.finish([&loss]).unwrap();
                }
            }
        }
    }
}

#[test]
fn kernels_of_whole_networks_compile_for_cuda() {
    if std::env::var_os("CUDA_STUB_FOLDER").is_none() {
        return println!("skipped: this is for scripts/ptx_check.sh");
    }
    let (context, _guard) = device();
    launch(context, hippocampus());
    for labels in [REGIONS, SPARSE_REGIONS, SPARSE_LABELS] {
        launch(context, brats(labels));
    }
    launch(context, residual());
    launch_losses(context, [[64; 3], [32; 3]]);
    for (channels, dtype) in [(1, Dtype::F32), (4, Dtype::F16)] {
        crate::common::augmentation::launch_everything(context, channels, dtype);
    }
    assert_no_device_panic();
}

/// The networks of above with fewer stages and little patches: what is computed is tested elsewhere, here an access out of
/// bounds, a race, or a value that nobody wrote is found by the driver.
#[test]
fn the_same_kernels_run_at_ragged_shapes() {
    if std::env::var_os("CUDA_SOFTWARE_SM").is_none() {
        return println!("skipped: this is for scripts/cuda_software.sh");
    }
    let (context, _guard) = device();
    let small = |mut work: Work, patch| {
        work.network.stages.truncate(3);
        Work { patch, ..work }
    };
    launch(context, small(hippocampus(), [12, 20, 8]));
    for labels in [REGIONS, SPARSE_REGIONS, SPARSE_LABELS] {
        launch(context, small(brats(labels), [4, 12, 8]));
    }
    launch(context, small(residual(), [4, 12, 8]));
    launch_losses(context, [[3, 9, 7], [2, 5, 4]]);
    for (channels, dtype) in [(1, Dtype::F32), (4, Dtype::F16)] {
        crate::common::augmentation::launch_everything(context, channels, dtype);
    }
    assert_no_device_panic();
}

/// What benches/RESULTS.md has counters of: a step of nnU-Net's network for BraTS in f16 at a patch that a software driver
/// can do, and losses of 4, 14 and 118 classes.
#[test]
fn a_step_and_losses_are_counted() {
    if std::env::var_os("CUDA_SOFTWARE_COUNT").is_none() {
        return println!("skipped: this is for scripts/cuda_software.sh --count");
    }
    let (context, _guard) = device();
    for channels in [4, 14, 118] {
        let dims = [32, 32, 32];
        let settings = LossSettings::new(Target::Labels { classes: channels }, None, true);
        let problem = Problem::new(context, &settings, 1, dims, &[Level { dims, weight: 1.0 }]).unwrap();
        let labels = context.upload(&vec![1u8; 32 * 32 * 32], Dtype::U8).unwrap();
        let logits = context.empty(problem.logits_len(0), Dtype::F16).unwrap();
        elementwise::fill(context, &logits, 0.5).unwrap();
        let loss = context.empty(problem.loss_len(), Dtype::F32).unwrap();
        let (annotation, in_place) = (Annotation::from(&labels), [Gradient::InPlace]);
        value_and_gradient(context, &problem, &annotation, &[&logits], &in_place, Scale::ONE, &loss).unwrap();
        context.finish([&loss]).unwrap();
    }
    let work = Work { patch: [64, 32, 32], batch: 1, ..brats(SPARSE_LABELS) };
    let x = image(context, &work, 1).cast(context, Dtype::F16).unwrap();
    let (step, target) = training(context, &work);
    let step = step.with_loss_scale(LossScale::new(context, LossScaleState::default()).unwrap());
    step.gradients(&x, &target).unwrap();
    let norm = step.update(0.01).unwrap();
    context.finish([&norm]).unwrap();
    assert_no_device_panic();
}
