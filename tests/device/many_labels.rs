//! Labels that need two bytes: through preprocessing, training, prediction, files and evaluation.

use crate::common::{device, is_slow, phantom};
use ndarray::Array3;
use std::ops::ControlFlow;
use std::path::Path;
use voxgrad::Compat;
use voxgrad::augment::{Augmenter, Draw, Recipe};
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::{Dataset, LabelGroup};
use voxgrad::eval::{PseudoDice, evaluate_folder};
use voxgrad::infer::export;
use voxgrad::io::{self, Geometry};
use voxgrad::kernels::Dtype;
use voxgrad::predict;
use voxgrad::preprocess::{Preprocessor, case_path, preprocess_folder};
use voxgrad::sample::{Batch, ChunkCache, PatchSource, StoredPatches};
use voxgrad::train::{Model, Outcome, Settings, Trainer};

const HIGHEST: u16 = 300;
const IGNORE: u16 = 301;

/// The label of a voxel: 300 nearly everywhere, every other one somewhere, a few voxels not annotated.
fn label([z, y, x]: [usize; 3]) -> u16 {
    match (z * phantom::SIDE + y) * phantom::SIDE + x {
        place if place % 11 == 0 => (place / 11) as u16 % HIGHEST,
        place if place % 11 == 1 => IGNORE,
        _ => HIGHEST,
    }
}

/// The phantom's images with these labels.
fn write(folder: &Path, cases: usize) {
    phantom::write(folder, cases);
    let labels = Array3::from_shape_fn([phantom::SIDE; 3], |(z, y, x)| label([z, y, x]));
    for case in 0..cases {
        io::write_labels(&phantom::label_path(folder, case), labels.view(), &Geometry::new([1.0; 3])).unwrap();
    }
    let path = folder.join("dataset.json");
    let mut json: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let names = (1..=HIGHEST).map(|label| (format!("l{label}"), label.into()));
    let mut named: serde_json::Map<String, serde_json::Value> = names.collect();
    named.insert("background".into(), 0.into());
    named.insert("ignore".into(), IGNORE.into());
    json["labels"] = named.into();
    std::fs::write(&path, json.to_string()).unwrap();
}

fn opened(folder: &Path) -> (Dataset, Model, Preprocessor) {
    let dataset = Dataset::open(folder).unwrap();
    let plans = Plans::read(&folder.join("nnUNetPlans.json")).unwrap();
    let model = Model::new(plans, "3d_fullres", dataset.json.clone()).unwrap();
    let preprocessor =
        Preprocessor::from_plans(&model.plans, &model.configuration, model.labels.clone(), Compat::Corrected).unwrap();
    (dataset, model, preprocessor)
}

/// A dataset in which 300 is nearly everywhere teaches 300, and neither 44 (its lower byte) nor anything else.
#[test]
fn labels_above_255_are_learned_predicted_and_scored() {
    let (context, _guard) = device();
    if is_slow() {
        return eprintln!("skipped on a software device: a network of 301 classes");
    }
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 2);
    let (dataset, model, preprocessor) = opened(folder.path());
    let own = folder.path().join("own");
    preprocess_folder(&dataset, &preprocessor, &own, 1, |_| ()).unwrap();
    let cache = ChunkCache::new(1 << 20);
    let open = |name: &str| StoredPatches::open(&case_path(&own, name), &cache).unwrap();
    let cases: Vec<StoredPatches> = dataset.cases.iter().map(|case| open(&case.name)).collect();
    let locations = cases[0].class_locations();
    let (group, voxels) = &locations.foreground[usize::from(HIGHEST) - 1];
    assert!(*group == LabelGroup::Label(HIGHEST as i16) && !voxels.is_empty());
    assert!(voxels.iter().all(|voxel| label(voxel.map(|n| n as usize)) == HIGHEST));

    let patch = model.configuration.three_dimensional().unwrap().0;
    let settings = Settings {
        epochs: 1,
        iterations: 12,
        validation_iterations: 2,
        learning_rate: 0.1,
        momentum: 0.9,
        ..Settings::default()
    };
    let mut trainer = Trainer::new(context, model, settings).unwrap();
    let outcome = trainer.epoch(&cases, &cases, |_| ControlFlow::Continue(())).unwrap();
    assert!(matches!(outcome, Outcome::Finished { .. }));
    let history = &trainer.progress().history;
    assert!(history.train_losses[0].is_finite());
    assert!(history.dice_per_class_or_region[0][usize::from(HIGHEST) - 1] > 0.5, "{history:?}");

    let predictions = folder.path().join("predictions");
    std::fs::create_dir(&predictions).unwrap();
    let case = voxgrad::preprocess::StoredCase::open(&case_path(&own, "case_000")).unwrap().read().unwrap();
    let settings = predict::Settings { mirror: [false; 3], step_size: 1.0, ..Default::default() };
    let (network, observe) = (trainer.network(), |_, _| ());
    let labels =
        predict::segmentation(context, std::slice::from_ref(network), &case, &preprocessor, patch, &settings, observe)
            .unwrap();
    let file = predictions.join("case_000.nii.gz");
    io::write_segmentation(&file, labels.view(), &case.geometry).unwrap();
    let read = io::read_labels(&file).unwrap();
    let found = read.data.iter().filter(|&&label| label == HIGHEST as i16).count();
    assert!(2 * found > labels.len(), "{found} of {} voxels", labels.len());
    let references = folder.path().join("labelsTr");
    let summary = evaluate_folder(&references, &predictions, ".nii.gz", &dataset.labels, true).unwrap();
    assert!(summary.mean(usize::from(HIGHEST) - 1)[0] > 0.5);
}

#[test]
fn every_label_comes_back_from_logits_and_files() {
    let folder = tempfile::tempdir().unwrap();
    write(folder.path(), 1);
    let (dataset, _, preprocessor) = opened(folder.path());
    let files = &dataset.cases[0];
    let case = preprocessor.run(voxgrad::preprocess::RawCase::read(files, &dataset.labels).unwrap()).unwrap();
    let heads = dataset.labels.num_segmentation_heads();
    assert_eq!(heads, usize::from(HIGHEST) + 1);
    // Ignored voxels have no head: 255 for them.
    let expected = case.seg.mapv(|label| if label == IGNORE as i16 { 255 } else { label as u16 });
    let mut logits = vec![0.0f32; case.seg.len() * heads];
    for (voxel, &label) in logits.chunks_exact_mut(heads).zip(&expected) {
        voxel[usize::from(label)] = 1.0;
    }
    let labels = export::segmentation(&logits, case.seg.dim().into(), &case.properties, &preprocessor).unwrap();
    assert_eq!(labels, expected);
    let path = folder.path().join("labels.nii.gz");
    io::write_segmentation(&path, labels.view(), &case.geometry).unwrap();
    assert_eq!(io::read_labels(&path).unwrap().data, expected.mapv(|label| label as i16));
    // One byte where that is enough: NIfTI's voxel types 2 and 512, told by the 70th byte.
    for (labels, datatype) in [(labels.mapv(|label| label % 255), 2), (labels, 512)] {
        let path = folder.path().join("labels.nii");
        io::write_segmentation(&path, labels.view(), &case.geometry).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(u16::from_le_bytes([bytes[70], bytes[71]]), datatype);
    }

    let mut dice = PseudoDice::new(&dataset.labels);
    let target: Vec<i16> = case.seg.iter().copied().collect();
    dice.add_logits(&logits, &target).unwrap();
    let per_class = dice.per_class();
    assert!(per_class.iter().all(|&dice| dice == 1.0), "{per_class:?}");
}

#[test]
fn augmented_labels_keep_their_two_bytes() {
    let (context, _guard) = device();
    let patch = [4, 5, 6];
    let labels: Vec<i16> = (0..120).map(|i| if i % 7 == 0 { -1 } else { 200 + i }).collect();
    let batch = Batch { size: 1, patch, channels: 1, image: vec![0.5; 120], labels: labels.clone() };
    let augmenter = Augmenter::new(Recipe::MIRROR, patch, [true; 3], &[false], 320, Dtype::F32);
    let draw = Draw { mirror: [false, true, false], ..Draw::default() };
    let (_, target) = augmenter.apply(context, &batch, &[draw]).unwrap();
    let found = context.download::<u16>(&target).unwrap();
    let uploaded = augmenter.upload_labels(context, &labels).unwrap();
    let expected = context.download::<u16>(&uploaded).unwrap();
    for z in 0..4 {
        for y in 0..5 {
            for x in 0..6 {
                let at = |y: usize| (z * 5 + y) * 6 + x;
                assert_eq!(expected[at(y)], labels[at(y)].max(0) as u16);
                assert_eq!(found[at(y)], expected[at(4 - y)]);
            }
        }
    }
}
