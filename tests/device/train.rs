//! Training: it learns, it can be stopped between any two iterations, and a checkpoint continues to the same bits.

use crate::common::{device, phantom};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};
use voxgrad::augment::Recipe;
use voxgrad::dataset::Dataset;
use voxgrad::dataset::plans::Plans;
use voxgrad::error::{DatasetError, NetworkError, TrainError};
use voxgrad::kernels::conv3d::Policy;
use voxgrad::kernels::{Context, Dtype};
use voxgrad::parameters::{NamedTensor, Slot};
use voxgrad::preprocess::{PreprocessedCase, Preprocessor, RawCase};
use voxgrad::sample::Sampling;
use voxgrad::train::{Checkpoint, Model, Outcome, Precision, Report, Settings, Trainer};
use voxgrad::{Compat, Error, predict};

const SETTINGS: Settings = Settings {
    epochs: 2,
    iterations: 6,
    validation_iterations: 2,
    learning_rate: 0.01,
    momentum: 0.99,
    mirror: [true; 3],
    augmentation: Recipe::MIRROR,
    sampling: Sampling::NNUNET,
    compat: Compat::Corrected,
    precision: Precision::F32,
    exact: false,
    tuned: false,
    seed: 5,
};

fn phantom() -> (tempfile::TempDir, Model, Vec<PreprocessedCase>, Preprocessor) {
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 3);
    let dataset = Dataset::open(folder.path()).unwrap();
    let plans = Plans::read(&folder.path().join("nnUNetPlans.json")).unwrap();
    let model = Model::new(plans, "3d_fullres", dataset.json.clone()).unwrap();
    let preprocessor =
        Preprocessor::from_plans(&model.plans, &model.configuration, model.labels.clone(), Compat::Corrected).unwrap();
    let read = |files| preprocessor.run(RawCase::read(files, &model.labels).unwrap()).unwrap();
    let cases = dataset.cases.iter().map(read).collect();
    (folder, model, cases, preprocessor)
}

fn finish(trainer: &mut Trainer, cases: &[PreprocessedCase]) {
    while !trainer.is_finished() {
        let outcome = trainer.epoch(cases, cases, |_| ControlFlow::Continue(())).unwrap();
        assert!(matches!(outcome, Outcome::Finished { .. }));
    }
}

fn weights(context: &Context, trainer: &Trainer) -> Vec<NamedTensor> {
    trainer.network().parameters().to_torch(context, Slot::Value).unwrap()
}

/// Stops after each of these numbers of observations, and compares with a run that was never stopped.
fn check_continuation(settings: Settings, stops: &[usize]) {
    let (context, _guard) = device();
    let (folder, model, cases, _) = phantom();
    let mut whole = Trainer::new(context, model.clone(), settings).unwrap();
    finish(&mut whole, &cases);

    for &stop in stops {
        let mut first = Trainer::new(context, model.clone(), settings).unwrap();
        let mut calls = 0;
        let path = folder.path().join("checkpoint.safetensors");
        loop {
            let outcome = first
                .epoch(&cases, &cases, |_| {
                    calls += 1;
                    if calls == stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                })
                .unwrap();
            if outcome == Outcome::Interrupted {
                break;
            }
        }
        first.checkpoint().unwrap().write(&path).unwrap();
        drop(first);
        let mut second = Trainer::resume(context, Checkpoint::read(&path).unwrap()).unwrap();
        finish(&mut second, &cases);
        assert_eq!(weights(context, &second), weights(context, &whole), "stopped after {stop} iterations");
        let history = |trainer: &Trainer| trainer.progress().history.clone();
        assert_eq!(history(&second).train_losses, history(&whole).train_losses);
        assert_eq!(history(&second).val_losses, history(&whole).val_losses);
        assert_eq!(history(&second).mean_fg_dice, history(&whole).mean_fg_dice);
        let loss_scale = |trainer: &Trainer| trainer.checkpoint().unwrap().progress.loss_scale;
        assert_eq!(loss_scale(&second), loss_scale(&whole));
    }
}

#[test]
fn interrupted_anywhere_and_continued_from_the_file_ends_in_the_same_bits() {
    // In the middle of the first epoch's training, at its end, and in the second epoch's validation.
    check_continuation(Settings { augmentation: Recipe::NNUNET, ..SETTINGS }, &[3, 6, 15]);
}

/// The time of an epoch is that of training it, however long it was stopped.
#[test]
fn time_between_a_stop_and_a_continuation_is_no_part_of_an_epoch() {
    let (context, _guard) = device();
    let (_folder, model, cases, _) = phantom();
    let began = Instant::now();
    let mut first = Trainer::new(context, model, SETTINGS).unwrap();
    first.epoch(&cases, &cases, |_| ControlFlow::Break(())).unwrap();
    let before = first.times();
    assert!(before.wall > 0.0 && before.step > 0.0);
    let saved = first.checkpoint().unwrap();
    let gap = Duration::from_secs(2);
    std::thread::sleep(gap);
    let mut second = Trainer::resume(context, saved).unwrap();
    second.epoch(&cases, &cases, |_| ControlFlow::Continue(())).unwrap();
    let trained = (began.elapsed() - gap).as_secs_f64();
    let history = &second.progress().history;
    let recorded = history.epoch_end_timestamps[0] - history.epoch_start_timestamps[0];
    let times = history.times[0].unwrap();
    assert!((recorded - times.wall).abs() < 0.5, "{recorded} s recorded, {} s counted", times.wall);
    assert!(before.wall < recorded && recorded < trained + 0.5, "{recorded} s of {trained} s");
    assert!(before.step < times.step && times.step <= times.wall, "{before:?}, then {times:?}");
}

/// nnU-Net lets patches hang over the far border of the image: others are learned from.
#[test]
fn patches_lie_where_nnunet_has_them_when_asked() {
    let (context, _guard) = device();
    let (_folder, model, cases, _) = phantom();
    let [corrected, again, nnunet] = [Compat::Corrected, Compat::Corrected, Compat::Nnunet].map(|compat| {
        let settings = Settings { compat, epochs: 1, ..SETTINGS };
        let mut trainer = Trainer::new(context, model.clone(), settings).unwrap();
        finish(&mut trainer, &cases);
        weights(context, &trainer)
    });
    assert!(corrected == again);
    assert!(corrected != nnunet);
}

#[test]
fn the_loss_scale_is_continued_too() {
    let f16 = {
        let (context, _guard) = device();
        if !context.caps().f16 {
            return eprintln!("skipped: no f16 on this device");
        }
        let (_folder, model, cases, _) = phantom();
        let mut trainer = Trainer::new(context, model, Settings { precision: Precision::F16, ..SETTINGS }).unwrap();
        finish(&mut trainer, &cases);
        trainer.checkpoint().unwrap().progress.loss_scale.unwrap()
    };
    let (scale, good_steps) = f16;
    assert!(scale.log2().fract() == 0.0 && scale <= 65536.0 && good_steps <= 12, "{f16:?}");
    check_continuation(Settings { precision: Precision::F16, ..SETTINGS }, &[4]);
}

#[test]
fn steps_whose_gradients_overflow_change_nothing_but_the_scale() {
    let (context, _guard) = device();
    if !context.caps().f16 {
        return eprintln!("skipped: no f16 on this device");
    }
    let (_folder, model, cases, _) = phantom();
    let settings = Settings { precision: Precision::F16, ..SETTINGS };
    let mut checkpoint = Trainer::new(context, model, settings).unwrap().checkpoint().unwrap();
    checkpoint.progress.loss_scale = Some((2f32.powi(60), 5));
    let mut trainer = Trainer::resume(context, checkpoint).unwrap();
    let state = |trainer: &Trainer| {
        [Slot::Value, Slot::Momentum].map(|slot| trainer.network().parameters().to_torch(context, slot).unwrap())
    };
    let before = state(&trainer);
    let stop_after_three =
        |report: Report| if report.iteration == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) };
    assert_eq!(trainer.epoch(&cases, &cases, stop_after_three).unwrap(), Outcome::Interrupted);
    assert_eq!(state(&trainer), before);
    assert_eq!(trainer.checkpoint().unwrap().progress.loss_scale, Some((2f32.powi(57), 0)));
}

#[test]
fn sixteen_bits_learn_as_well() {
    let (context, _guard) = device();
    if crate::common::is_slow() {
        return eprintln!("skipped on a software device: trainings of a hundred steps");
    }
    let (_folder, model, cases, _) = phantom();
    let caps = context.caps();
    let last_loss = |precision| {
        let settings = Settings { epochs: 4, iterations: 40, precision, ..SETTINGS };
        let mut trainer = Trainer::new(context, model.clone(), settings).unwrap();
        finish(&mut trainer, &cases);
        trainer.progress().history.train_losses[3]
    };
    let f32_loss = last_loss(Precision::F32);
    for (precision, there) in [(Precision::F16, caps.f16), (Precision::Bf16, caps.bf16)] {
        if !there {
            eprintln!("skipped: no {precision} on this device");
            continue;
        }
        let loss = last_loss(precision);
        eprintln!("loss {loss} in {precision}, {f32_loss} in f32");
        assert!((loss - f32_loss).abs() < 0.05, "{loss} in {precision}, {f32_loss} in f32");
    }
}

#[test]
fn exact_training_is_training_without_winograd() {
    let (context, _guard) = device();
    if context.caps().cores.is_none() {
        return eprintln!("skipped: Winograd's algorithm is for the CPU");
    }
    let (folder, _, cases, _) = phantom();
    let path = folder.path().join("nnUNetPlans.json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("[4,8]"));
    std::fs::write(&path, text.replace("[4,8]", "[32,64]")).unwrap();
    let dataset = Dataset::open(folder.path()).unwrap();
    let model = Model::new(Plans::read(&path).unwrap(), "3d_fullres", dataset.json.clone()).unwrap();
    let train = |context: &Context, exact| {
        let settings = Settings { epochs: 1, iterations: 2, exact, ..SETTINGS };
        let mut trainer = Trainer::new(context, model.clone(), settings).unwrap();
        finish(&mut trainer, &cases);
        assert_eq!(trainer.checkpoint().unwrap().settings.exact, exact);
        weights(context, &trainer)
    };
    let exact = train(context, true);
    assert_eq!(exact, train(&Policy::default().with_exact(true).on(context), false));
    assert_ne!(exact, train(context, false));
}

#[test]
fn predictions_in_sixteen_bits_are_near_those_in_f32() {
    let (context, _guard) = device();
    let (_folder, model, cases, _) = phantom();
    let patch = model.configuration.three_dimensional().unwrap().0;
    let mut trainer = Trainer::new(context, model, Settings { epochs: 1, iterations: 4, ..SETTINGS }).unwrap();
    finish(&mut trainer, &cases);
    let predict = |dtype| {
        let settings = predict::Settings { mirror: [false; 3], step_size: 1.0, dtype };
        predict::logits(context, std::slice::from_ref(trainer.network()), &cases[0], patch, &settings, |_, _| ())
            .unwrap()
    };
    let exact = predict(Dtype::F32);
    let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
    // Half a unit of the last place is 5e-4 and 4e-3, and there are four roundings in a row.
    for (dtype, there, bound) in [(Dtype::F16, context.caps().f16, 4e-3), (Dtype::Bf16, context.caps().bf16, 3e-2)] {
        if !there {
            eprintln!("skipped: no {dtype:?} on this device");
            continue;
        }
        let rounded = predict(dtype);
        let difference = square(&mut rounded.iter().zip(&exact).map(|(r, e)| r - e));
        let relative = (difference / square(&mut exact.iter().copied())).sqrt();
        eprintln!("logits in {dtype:?} differ by {relative:.1e}");
        assert!(relative > 0.0 && relative < bound, "{relative:.1e} in {dtype:?}");
    }
}

#[test]
fn a_type_that_the_device_lacks_is_refused() {
    let (context, _guard) = device();
    let lacking = voxgrad::kernels::Caps { f16: false, bf16: false, ..context.caps().clone() };
    assert!(Precision::F32.check(&lacking).is_ok());
    let error = "f16".parse::<Precision>().unwrap().check(&lacking).unwrap_err();
    assert!(error.to_string().contains("this device has no f16"), "{error}");
    assert!("f8".parse::<Precision>().is_err());
}

#[test]
fn the_loss_falls_and_the_prediction_finds_the_sphere() {
    let (context, _guard) = device();
    if crate::common::is_slow() {
        return eprintln!("skipped on a software device: a training of a hundred steps");
    }
    let (_folder, model, cases, preprocessor) = phantom();
    let patch = model.configuration.three_dimensional().unwrap().0;
    let settings = Settings { epochs: 4, iterations: 40, ..SETTINGS };
    let mut trainer = Trainer::new(context, model, settings).unwrap();
    finish(&mut trainer, &cases);
    let losses = &trainer.progress().history.train_losses;
    assert!(losses[3] < losses[0] - 0.4, "{losses:?}");

    let case = &cases[0];
    let settings = predict::Settings { mirror: [false; 3], ..Default::default() };
    let labels = predict::segmentation(
        context,
        std::slice::from_ref(trainer.network()),
        case,
        &preprocessor,
        patch,
        &settings,
        |_, _| (),
    )
    .unwrap();
    // Dense truth of a sphere of radius 4 about (6, 6, 6), most of which was never annotated.
    let (mut both, mut either) = (0, 0);
    for ((z, y, x), &label) in labels.indexed_iter() {
        let truth = [z, y, x].iter().map(|&p| (p as f64 - 6.0).powi(2)).sum::<f64>() < 16.0;
        both += 2 * usize::from(truth && label == 1);
        either += usize::from(truth) + usize::from(label == 1);
    }
    let dice = both as f64 / either as f64;
    assert!(dice > 0.8, "Dice {dice}");
}

#[test]
fn a_damaged_checkpoint_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("checkpoint.safetensors");
    std::fs::write(&path, b"\x10\0\0\0\0\0\0\0not safetensors!").unwrap();
    let error = Checkpoint::read(&path).unwrap_err();
    assert!(matches!(error, Error::Network(NetworkError::Checkpoint { .. })), "{error}");
    assert!(error.to_string().contains("checkpoint.safetensors"));
}

#[test]
fn no_training_cases_is_an_error() {
    let (context, _guard) = device();
    let (_folder, model, _, _) = phantom();
    let mut trainer = Trainer::new(context, model, SETTINGS).unwrap();
    let error = trainer.epoch::<PreprocessedCase>(&[], &[], |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, Error::Dataset(DatasetError::NoCases)), "{error}");
}

/// The phantom's cases, of which the given ones hold infinite voxels everywhere: their losses are not finite.
fn poisoned(which: &[usize]) -> (tempfile::TempDir, Model, Vec<PreprocessedCase>) {
    let (folder, model, mut cases, _) = phantom();
    which.iter().for_each(|&case| cases[case].data.fill(f32::INFINITY));
    (folder, model, cases)
}

#[test]
fn steps_without_a_finite_loss_are_left_out_and_counted() {
    let (context, _guard) = device();
    let (_folder, model, cases) = poisoned(&[1]);
    let settings = Settings { epochs: 1, iterations: 12, validation_iterations: 1, ..SETTINGS };
    let mut precisions = vec![Precision::F32];
    precisions.extend(context.caps().f16.then_some(Precision::F16));
    for precision in precisions {
        let settings = Settings { precision, ..settings };
        let mut trainer = Trainer::new(context, model.clone(), settings).unwrap();
        let before = weights(context, &trainer);
        trainer.epoch(&cases, &cases[..1], |_| ControlFlow::Continue(())).unwrap();
        let not_finite = trainer.progress().not_finite;
        assert!((1..12).contains(&not_finite), "{precision}: {not_finite}");
        assert!(trainer.progress().history.train_losses[0].is_finite());
        let after = weights(context, &trainer);
        assert_ne!(after, before);
        assert!(after.iter().all(|(_, _, values)| values.iter().all(|value| value.is_finite())));
        // Each halves the scale.
        let scale = trainer.checkpoint().unwrap().progress.loss_scale.map(|(scale, _)| scale);
        let expected = (precision == Precision::F16).then(|| 65536.0 / 2f32.powi(not_finite as i32));
        assert_eq!(scale, expected, "{precision}");
    }
}

#[test]
fn training_ends_when_no_step_can_be_taken_any_more() {
    let (context, _guard) = device();
    let (_folder, model, cases) = poisoned(&[0, 1, 2]);
    let settings = Settings { iterations: 100, ..SETTINGS };
    let mut precisions = vec![(Precision::F32, 20)];
    // 65536 is halved 17 times until it is below 1; losses are read after every tenth step.
    precisions.extend(context.caps().f16.then_some((Precision::F16, 20)));
    for (precision, steps) in precisions {
        let mut trainer = Trainer::new(context, model.clone(), Settings { precision, ..settings }).unwrap();
        let before = weights(context, &trainer);
        let error = trainer.epoch(&cases, &cases, |_| ControlFlow::Continue(())).unwrap_err();
        assert!(
            matches!(error, Error::Train(TrainError::Diverged { epoch: 0, in_a_row }) if in_a_row == steps),
            "{precision}: {error}"
        );
        assert_eq!(weights(context, &trainer), before, "{precision}");
    }
}
