//! Comparing ways of annotating: from dense labels to a table, stopped and gone on with, and what is refused.

use crate::common::{context, device, phantom};
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use voxgrad::augment::Recipe;
use voxgrad::dataset::Dataset;
use voxgrad::dataset::plans::Plans;
use voxgrad::error::SimulateError;
use voxgrad::io::{Geometry, read_labels, write_labels};
use voxgrad::kernels::Context;
use voxgrad::simulate::{Ended, Event, NetworkPlan, Outcome, Strategy, Study};
use voxgrad::sparsify::{Blocks, Budget, Scheme, Selection, Slices};
use voxgrad::train::Settings;
use voxgrad::{Error, predict};

/// The spheres with every voxel labelled.
fn dense(folder: &Path) -> Dataset {
    phantom::write(folder, 6);
    for case in 0..6 {
        let centre = 6.0 + case as f64;
        let labels = ndarray::Array3::from_shape_fn([phantom::SIDE; 3], |(z, y, x)| {
            u8::from([z, y, x].iter().map(|&p| (p as f64 - centre).powi(2)).sum::<f64>() < 16.0)
        });
        write_labels(&phantom::label_path(folder, case), labels.view(), &Geometry::new([1.0; 3])).unwrap();
    }
    let json = folder.join("dataset.json");
    fs::write(&json, fs::read_to_string(&json).unwrap().replace(r#""ignore":2,"#, "").replace(r#","ignore":2"#, ""))
        .unwrap();
    Dataset::open(folder).unwrap()
}

fn slices(share: f64) -> Strategy {
    let scheme = Scheme::Slices(Slices { axes: [true; 3], fraction: share, selection: Selection::Pooled });
    Strategy { scheme, share: Some(share) }
}

fn study<'a>(dataset: &'a Dataset, folder: &'a Path) -> Study<'a> {
    Study {
        dataset,
        held_out: vec!["case_001".into(), "case_004".into()],
        folder,
        strategies: vec![slices(0.2), Strategy { scheme: Scheme::Dense, share: None }],
        seeds: vec![1],
        network: NetworkPlan {
            plans: Some(Plans::read(&dataset.folder.join("nnUNetPlans.json")).unwrap()),
            configuration: "3d_fullres".into(),
            features: None,
            batch_size: None,
            patch_size: None,
        },
        training: Settings {
            epochs: 2,
            iterations: 4,
            validation_iterations: 0,
            learning_rate: 0.05,
            momentum: 0.9,
            augmentation: Recipe::MIRROR,
            ..Settings::default()
        },
        prediction: predict::Settings { mirror: [false; 3], ..predict::Settings::default() },
        save_every: 1,
        workers: 2,
        again: false,
    }
}

fn finish(study: &Study, context: &Context) -> Vec<Outcome> {
    match study.run(context, |_| Ok(ControlFlow::Continue(()))).unwrap() {
        Ended::Finished(outcomes) => outcomes,
        Ended::Stopped => panic!("nobody asked to stop"),
    }
}

/// Everything but the seconds.
fn untimed(outcomes: &[Outcome]) -> Vec<Outcome> {
    outcomes.iter().map(|outcome| Outcome { training_seconds: 0.0, ..outcome.clone() }).collect()
}

#[test]
fn a_comparison_goes_on_to_the_same_outcomes() {
    let (context, _guard) = device();
    let place = tempfile::tempdir().unwrap();
    let dataset = dense(place.path());
    let (whole, stopped) = (place.path().join("whole"), place.path().join("stopped"));
    let outcomes = finish(&study(&dataset, &whole), context);

    // The held-out cases are scored on complete labels, by hand here.
    for outcome in &outcomes {
        let mut dice = Vec::new();
        for case in ["case_001", "case_004"] {
            let file = format!("{case}.nii.gz");
            let found =
                read_labels(&whole.join(&outcome.strategy).join("seed_1/predictions").join(&file)).unwrap().data;
            let wanted = read_labels(&dataset.folder.join("labelsTr").join(&file)).unwrap().data;
            let both = found.iter().zip(&wanted).filter(|(a, b)| **a == 1 && **b == 1).count() as f64;
            let sum = found.iter().chain(&wanted).filter(|label| **label == 1).count() as f64;
            dice.push(2.0 * both / sum);
        }
        let mean = dice.iter().sum::<f64>() / 2.0;
        assert!((outcome.mean_dice.unwrap() - mean).abs() < 1e-12, "{outcome:?}");
        assert_eq!((outcome.cases, outcome.dice.len()), (2, 1));
    }
    assert_eq!((outcomes[1].annotated.share, outcomes[1].annotated.cases.len()), (1.0, 4));
    let share = outcomes[0].annotated.share;
    assert!((0.19..0.21).contains(&share), "{share}");
    // What is trained on has an ignore label, and nothing of the held-out cases.
    let sparse = Dataset::open(&whole.join("slices-0.2/seed_1/dataset")).unwrap();
    assert_eq!((sparse.labels.ignore_label(), sparse.cases.len()), (Some(2), 4));

    // Stopped in the first epoch, in the second, and between the held-out cases.
    for stop in [3, 6, 9] {
        let mut told = 0;
        let ended = study(&dataset, &stopped).run(context, |event| {
            told += usize::from(matches!(event, Event::Iteration(_) | Event::Predicted(..)));
            Ok(if told >= stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        });
        assert_eq!(ended.unwrap(), Ended::Stopped);
        // What one call has trained the next does not.
        assert!(stopped.join("slices-0.2/seed_1/training").is_dir());
    }
    assert_eq!(untimed(&finish(&study(&dataset, &stopped), context)), untimed(&outcomes));
    let table = |folder: &Path| fs::read_to_string(folder.join("results.csv")).unwrap().lines().count();
    assert_eq!((table(&whole), table(&stopped)), (3, 3));

    // Finished runs are kept: nothing is trained any more.
    let again = study(&dataset, &whole).run(context, |event| {
        assert!(matches!(event, Event::Finished(_)), "{event:?}");
        // Nobody else may work here meanwhile.
        let other = study(&dataset, &whole).run(context, |event| panic!("{event:?}"));
        assert!(matches!(other, Err(Error::Simulate(SimulateError::InUse { .. }))), "{other:?}");
        Ok(ControlFlow::Continue(()))
    });
    assert_eq!(again.unwrap(), Ended::Finished(outcomes));

    // Other settings are refused by name, those of every run, and redone where that was asked for.
    let training = Settings { iterations: 5, ..study(&dataset, &whole).training };
    let other = Study { training, ..study(&dataset, &whole) };
    match other.run(context, |_| Ok(ControlFlow::Continue(()))) {
        Err(Error::Simulate(SimulateError::OtherSettings { differences, .. })) => {
            assert_eq!(differences.len(), 2);
            assert_eq!(differences[0], "slices-0.2 seed 1: training.iterations was 4, is now 5");
        }
        other => panic!("{other:?}"),
    }
    let strategies = vec![slices(0.2)];
    finish(&Study { again: true, strategies, ..other }, context);
}

#[test]
fn what_makes_no_comparison_is_refused_before_anything_is_trained() {
    let place = tempfile::tempdir().unwrap();
    let dataset = dense(place.path());
    let folder = place.path().join("study");
    let refused = |study: &Study| match study.run(context(), |event| panic!("{event:?}")) {
        Err(error) => error,
        Ok(ended) => panic!("{ended:?}"),
    };
    let held_out = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
    for (names, words) in
        [(held_out(&["case_009"]), "no case_009"), (held_out(&[]), "none"), (dataset.case_names(), "all cases")]
    {
        let error = refused(&Study { held_out: names, ..study(&dataset, &folder) });
        assert!(
            matches!(&error, Error::Simulate(SimulateError::HeldOut { problem }) if problem.contains(words)),
            "{error}"
        );
    }
    let twice = Study { strategies: vec![slices(0.2), slices(0.2)], seeds: vec![3, 3], ..study(&dataset, &folder) };
    let error = refused(&twice).to_string();
    assert!(error.contains("`slices-0.2`") && error.contains("seed `3`"), "{error}");
    // One block is a quarter of a case: a hundredth of all cannot be met by anything but a block too many.
    let scheme = Scheme::Blocks(Blocks { size: [8; 3], budget: Budget::Count(1), foreground: 0.5 });
    let strategies = vec![Strategy { scheme, share: Some(0.01) }];
    match refused(&Study { strategies, ..study(&dataset, &folder) }) {
        Error::Simulate(SimulateError::ShareMissed { asked, reached, .. }) => {
            assert_eq!((asked, reached), (0.01, 0.125));
        }
        error => panic!("{error}"),
    }
}

#[test]
fn the_command_line_refuses_what_it_would_not_look_at() {
    let place = tempfile::tempdir().unwrap();
    dense(place.path());
    let refuses = |options: &[&str], words: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_voxgrad"));
        command.current_dir(place.path()).args(["simulate", ".", "-o", "study"]).args(options);
        let result = command.output().unwrap();
        let said = String::from_utf8_lossy(&result.stderr).into_owned();
        assert_eq!(result.status.code(), Some(2), "{options:?}: {said}");
        words.iter().for_each(|word| assert!(said.contains(word), "{options:?}: no `{word}` in {said}"));
        assert!(!place.path().join("study").exists(), "{options:?}");
    };
    refuses(&["--shares", "0.1,1.5"], &["--shares 1.5"]);
    refuses(
        &["--schemes", "slices", "--block", "4", "--thickness", "1"],
        &["--block", "--thickness", "--schemes slices"],
    );
    refuses(&["--select", "even"], &["--select"]);
    refuses(&["--foreground-slices", "0.5"], &["--shares", "--foreground-slices"]);
    refuses(&["--fold", "7"], &["--fold 7", "5 folds"]);
    refuses(&["--augmentation", "none", "--mirror", "2"], &["--augmentation none"]);
    refuses(&["--patch-size", "8,8"], &["--patch-size"]);
}
