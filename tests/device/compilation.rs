//! Kernels compiled ahead, on another thread: they are those that are launched later, and nothing else happens.

use crate::common::{device, phantom, read};
use cubecl::launched::LaunchedKernels;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use voxgrad::augment::Recipe;
use voxgrad::compilation::Compilation;
use voxgrad::dataset::Dataset;
use voxgrad::dataset::plans::Plans;
use voxgrad::kernels::{Context, Dtype, KernelError, elementwise};
use voxgrad::preprocess::{PreprocessedCase, Preprocessor, RawCase};
use voxgrad::train::{Model, Precision, Settings, Trainer, compile};
use voxgrad::{Compat, predict};

fn phantom() -> (tempfile::TempDir, Model, Vec<PreprocessedCase>, Preprocessor) {
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 3);
    let dataset = Dataset::open(folder.path()).unwrap();
    let plans = Plans::read(&folder.path().join("nnUNetPlans.json")).unwrap();
    let model = Model::new(plans, "3d_fullres", dataset.json.clone()).unwrap();
    let preprocessor =
        Preprocessor::from_plans(&model.plans, &model.configuration, model.labels.clone(), Compat::Corrected).unwrap();
    let case = |files| preprocessor.run(RawCase::read(files, &model.labels).unwrap()).unwrap();
    let cases = dataset.cases.iter().map(case).collect();
    (folder, model, cases, preprocessor)
}

#[test]
fn what_is_compiled_is_not_run_and_is_compiled_once() {
    let (context, _guard) = device();
    let wanted = Arc::new(AtomicBool::new(true));
    let compiling = context.compiling(wanted.clone());
    let fill = |context: &Context, len, dtype| {
        let buffer = context.empty(len, dtype).unwrap();
        elementwise::fill(context, &buffer, 3.0).unwrap();
        buffer
    };
    // Of 17 elements, i32: no other test fills such.
    fill(&compiling, 17, Dtype::I32);
    let profiled = context.profiled();
    fill(&profiled, 17, Dtype::I32);
    // The same with vectors, which nobody has compiled.
    wanted.store(false, Ordering::Relaxed);
    fill(&compiling, 64, Dtype::I32);
    let filled = fill(&profiled, 64, Dtype::I32);
    assert_eq!(context.download::<i32>(&filled).unwrap(), [3; 64]);
    let [ahead, at_once] = profiled.take_launched().try_into().unwrap();
    assert!(ahead.form != at_once.form);
    // A Vulkan driver makes machine code when it likes, the software one at the first dispatch.
    if context.caps().cores.is_some() {
        assert!(ahead.took < at_once.took, "{:?} {:?}", ahead.took, at_once.took);
    }

    // Buffers of others keep what they hold, and there is nothing to read.
    wanted.store(true, Ordering::Relaxed);
    let before = context.upload_f32(&[1.0; 64]).unwrap();
    elementwise::fill(&compiling, &before, 2.0).unwrap();
    compiling.finish([&before]).unwrap();
    assert_eq!(read(context, &before), [1.0; 64]);
    assert!(matches!(compiling.download_f32(&before), Err(KernelError::Device { .. })));
}

#[test]
fn launches_of_others_run_while_kernels_are_compiled() {
    let (context, _guard) = device();
    let stop = Arc::new(AtomicBool::new(false));
    let seen = stop.clone();
    let compilation = Compilation::start(context, move |compiling, _| -> Result<(), KernelError> {
        let buffer = compiling.empty(64, Dtype::F32)?;
        while !seen.load(Ordering::Relaxed) {
            elementwise::fill(compiling, &buffer, 1.0)?;
        }
        Ok(())
    });
    let buffer = context.empty(64, Dtype::F32).unwrap();
    for round in 0..500 {
        elementwise::fill(context, &buffer, round as f32).unwrap();
        assert_eq!(read(context, &buffer), [round as f32; 64]);
    }
    stop.store(true, Ordering::Relaxed);
    compilation.finish();
}

/// Everything that training, validation and prediction launch has been compiled by then, in either type.
#[test]
fn training_and_prediction_launch_what_was_compiled_for_them() {
    let (context, _guard) = device();
    let (_folder, model, cases, preprocessor) = phantom();
    for precision in [Precision::F32, Precision::F16] {
        if precision.check(context.caps()).is_err() {
            println!("skipped: no {precision} on this device");
            continue;
        }
        let settings = Settings {
            epochs: 1,
            iterations: 12,
            validation_iterations: 1,
            augmentation: Recipe::NNUNET,
            precision,
            ..Settings::default()
        };
        let kernels = LaunchedKernels::new();
        let (of_model, wanted) = (model.clone(), settings);
        let done = Compilation::start(context, move |compiling, _| compile(compiling, &of_model, &wanted, &|| true));
        done.finish();
        let compiled = kernels.finish();
        let kernels = LaunchedKernels::new();
        let mut trainer = Trainer::new(context, model.clone(), settings).unwrap();
        trainer.epoch(&cases, &cases, |_| ControlFlow::Continue(())).unwrap();
        let launched = kernels.finish();
        // Those that make a network's parameters are launched before there is a step.
        assert!(
            launched.len() > 20 && launched.is_subset(&compiled),
            "{precision}: {} of {}",
            launched.difference(&compiled).count(),
            launched.len()
        );

        let settings = predict::Settings { dtype: precision.dtype(), ..predict::Settings::default() };
        let shape = trainer.network().shape().clone();
        let (labels, patch) = (model.labels.clone(), [8; 3]);
        let kernels = LaunchedKernels::new();
        Compilation::start(context, move |compiling, _| {
            predict::compile(compiling, &shape, Some(&labels), patch, &settings, &|| true)
        })
        .finish();
        let compiled = kernels.finish();
        let kernels = LaunchedKernels::new();
        let networks = [voxgrad::nn::Network::new(context, trainer.network().shape().clone(), 0).unwrap()];
        predict::segmentation(context, &networks, &cases[0], &preprocessor, patch, &settings, |_, _| ()).unwrap();
        let launched = kernels.finish();
        assert!(
            launched.len() > 10 && launched.is_subset(&compiled),
            "{precision}: {} of {}",
            launched.difference(&compiled).count(),
            launched.len()
        );
    }
}

/// Who does not need it any more waits for one kernel, not for all.
#[test]
fn a_compilation_that_is_dropped_ends() {
    let (context, _guard) = device();
    let kernels = LaunchedKernels::new();
    let compilation = Compilation::start(context, |compiling, has_time| -> Result<(), KernelError> {
        let buffer = compiling.empty(64, Dtype::F32)?;
        while has_time() {
            std::thread::yield_now();
        }
        // No sooner than it was told: nothing is compiled after that.
        std::thread::sleep(std::time::Duration::from_millis(50));
        elementwise::fill(compiling, &buffer, 1.0)
    });
    drop(compilation);
    assert!(kernels.finish().is_empty());
}
