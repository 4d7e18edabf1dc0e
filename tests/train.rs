//! Training: it learns, it can be stopped between any two iterations, and a checkpoint continues to the same bits.

use crate::common::{device, phantom};
use std::ops::ControlFlow;
use voxgrad::dataset::Dataset;
use voxgrad::dataset::plans::Plans;
use voxgrad::kernels::Context;
use voxgrad::parameters::{NamedTensor, Slot};
use voxgrad::preprocess::{PreprocessedCase, Preprocessor, RawCase};
use voxgrad::train::{Checkpoint, Model, Outcome, Settings, Trainer};
use voxgrad::{Compat, Error, predict};

const SETTINGS: Settings = Settings {
    epochs: 2,
    iterations: 6,
    validation_iterations: 2,
    learning_rate: 0.01,
    momentum: 0.99,
    mirror: [true; 3],
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

#[test]
fn interrupted_anywhere_and_continued_from_the_file_ends_in_the_same_bits() {
    let (context, _guard) = device();
    let (folder, model, cases, _) = phantom();
    let mut whole = Trainer::new(context, model.clone(), SETTINGS).unwrap();
    finish(&mut whole, &cases);

    // In the middle of the first epoch's training, at its end, and in the second epoch's validation.
    for stop in [3, 6, 15] {
        let mut first = Trainer::new(context, model.clone(), SETTINGS).unwrap();
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
    }
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
    assert!(losses[3] < losses[0] - 0.5, "{losses:?}");

    let case = &cases[0];
    let settings = predict::Settings { mirror: [false; 3], ..Default::default() };
    let labels =
        predict::segmentation(context, trainer.network(), case, &preprocessor, patch, &settings, |_, _| ()).unwrap();
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
    assert!(matches!(error, Error::Checkpoint { .. }), "{error}");
    assert!(error.to_string().contains("checkpoint.safetensors"));
}

#[test]
fn no_training_cases_is_an_error() {
    let (context, _guard) = device();
    let (_folder, model, _, _) = phantom();
    let mut trainer = Trainer::new(context, model, SETTINGS).unwrap();
    let error = trainer.epoch(&[], &[], |_| ControlFlow::Continue(())).unwrap_err();
    assert!(matches!(error, Error::NoCases), "{error}");
}
