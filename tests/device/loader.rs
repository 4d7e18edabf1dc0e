//! Loading patches: any number of threads gives the same bits, and a case that cannot be read any more is named or left
//! out.

use crate::common::{device, phantom};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use voxgrad::augment::Recipe;
use voxgrad::dataset::Dataset;
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::splits::Split;
use voxgrad::error::TrainError;
use voxgrad::parameters::{NamedTensor, Slot};
use voxgrad::preprocess::{Preprocessor, case_path, cases_folder, preprocess_folder};
use voxgrad::sample::{ChunkCache, PatchSource, Sampling, StoredPatches};
use voxgrad::train::{Checkpoint, Loading, Model, Outcome, Settings, Trainer, TrainingCases, run};
use voxgrad::{Compat, Error};

fn settings() -> Settings {
    Settings {
        epochs: 1,
        iterations: 7,
        validation_iterations: 3,
        augmentation: Recipe::NNUNET,
        seed: 9,
        ..Settings::default()
    }
}

/// Three stored cases, of which nothing is kept in memory.
fn stored() -> (tempfile::TempDir, Model, Vec<StoredPatches>) {
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 3);
    let dataset = Dataset::open(folder.path()).unwrap();
    let plans = Plans::read(&folder.path().join("nnUNetPlans.json")).unwrap();
    let model = Model::new(plans, "3d_fullres", dataset.json.clone()).unwrap();
    let preprocessor =
        Preprocessor::from_plans(&model.plans, &model.configuration, model.labels.clone(), Compat::Corrected).unwrap();
    let own = own(folder.path());
    preprocess_folder(&dataset, &preprocessor, &own, 1, |_| ()).unwrap();
    let cache = ChunkCache::new(0);
    let open = |case: &voxgrad::dataset::CaseFiles| StoredPatches::open(&case_path(&own, &case.name), &cache).unwrap();
    let cases = dataset.cases.iter().map(open).collect();
    (folder, model, cases)
}

fn own(folder: &Path) -> std::path::PathBuf {
    cases_folder(folder, "nnUNetPlans_3d_fullres")
}

fn loading(threads: usize, skip_unreadable: bool) -> Loading {
    Loading { threads, skip_unreadable }
}

fn weights(trainer: &Trainer) -> Vec<NamedTensor> {
    trainer.network().parameters().to_torch(trainer.context(), Slot::Value).unwrap()
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let (context, _guard) = device();
    let (_folder, model, cases) = stored();
    let train = |threads: usize, seed: u64| {
        let settings = Settings { seed, ..settings() };
        let trainer = Trainer::new(context, model.clone(), settings).unwrap();
        let mut trainer = trainer.with_loading(loading(threads, false));
        let outcome = trainer.epoch(&cases, &cases, |_| ControlFlow::Continue(())).unwrap();
        assert!(matches!(outcome, Outcome::Finished { .. }));
        let times = trainer.times();
        let parts = times.augment + times.step + times.idle;
        assert!(times.load > 0.0 && times.step > 0.0 && parts <= times.wall, "{times:?}");
        let history = trainer.progress().history.clone();
        (weights(&trainer), history.train_losses, history.val_losses, history.mean_fg_dice)
    };
    let one = train(1, 9);
    for threads in [2, 3] {
        assert!(train(threads, 9) == one, "{threads} threads");
    }
    assert!(train(2, 10).1 != one.1, "another seed is another training");
}

#[test]
fn what_is_loaded_ahead_has_a_bound() {
    let loading = loading(6, false);
    assert_eq!((loading.threads_for(100 << 20), loading.memory(100 << 20)), (6, 1200 << 20));
    // Two batches a thread must fit into 2 GiB, or there is one thread.
    assert_eq!((loading.threads_for(400 << 20), loading.memory(400 << 20)), (2, 1600 << 20));
    assert_eq!((loading.threads_for(4 << 30), loading.memory(4 << 30)), (1, 8 << 30));
}

/// Cuts a file to its first bytes.
fn damage(folder: &Path, case: &str) {
    let path = case_path(&own(folder), case);
    let length = std::fs::metadata(&path).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(length / 4).unwrap();
}

#[test]
fn a_case_that_becomes_unreadable_is_named_and_nothing_is_lost() {
    let (context, _guard) = device();
    let (folder, model, cases) = stored();
    let output = folder.path().join("output");
    std::fs::create_dir(&output).unwrap();
    let mut trainer = Trainer::new(context, model.clone(), Settings { iterations: 60, ..settings() }).unwrap();
    let described = TrainingCases {
        fold: "0".parse().unwrap(),
        split: Split { train: Vec::new(), val: Vec::new() },
        compat: Compat::Corrected,
    };
    let error = run::train(
        &mut trainer,
        &described,
        &output,
        run::Saving::default(),
        [&cases, &cases],
        |report| {
            if report.iteration == 2 {
                damage(folder.path(), "case_001");
            }
            ControlFlow::Continue(())
        },
        |_| Ok(()),
    )
    .unwrap_err();
    assert!(matches!(&error, Error::Train(TrainError::CaseUnreadable { case, .. }) if case == "case_001"), "{error}");
    let text = error.to_string();
    assert!(text.contains("case_001.vxg"), "{text}");
    // What was trained before is saved, and goes on without the case, which is counted.
    let saved = Checkpoint::read(&output.join(run::LATEST)).unwrap();
    let done = saved.progress.iteration;
    assert!((2..60).contains(&done), "{done}");
    let mut trainer = Trainer::resume(context, saved).unwrap().with_loading(loading(2, true));
    assert!(trainer.unreadable().is_empty());
    trainer.epoch(&cases, &cases, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(trainer.unreadable().keys().collect::<Vec<_>>(), ["case_001"]);
}

/// With a case that is unreadable from the beginning, the bits are again those of one thread.
#[test]
fn leaving_a_case_out_depends_on_no_thread() {
    let (context, _guard) = device();
    let (folder, model, cases) = stored();
    damage(folder.path(), "case_000");
    let settings = Settings { sampling: Sampling { by_annotation: true, ..Sampling::NNUNET }, ..settings() };
    let train = |threads: usize| {
        let trainer = Trainer::new(context, model.clone(), settings).unwrap();
        let mut trainer = trainer.with_loading(loading(threads, true));
        trainer.epoch(&cases, &cases, |_| ControlFlow::Continue(())).unwrap();
        weights(&trainer)
    };
    assert!(train(1) == train(3));

    cases.iter().for_each(|case| damage(folder.path(), case.name()));
    let mut trainer = Trainer::new(context, model, settings).unwrap().with_loading(loading(3, true));
    let error = trainer.epoch(&cases, &cases, |_| ControlFlow::Continue(())).unwrap_err();
    let Error::Train(TrainError::NoReadableCase { reasons }) = error else { panic!("{error}") };
    assert_eq!(reasons.len(), 3);
    let all: BTreeMap<_, _> = trainer.unreadable();
    assert_eq!(all.len(), 3);
}
