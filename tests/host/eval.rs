//! Metrics by hand and against `summary.json` files that nnU-Net wrote.

use std::fs;
use std::path::Path;
use voxgrad::error::EvaluateError;

use approx::assert_relative_eq;
use ndarray::Array3;
use voxgrad::Error;
use voxgrad::dataset::{Dataset, DatasetJson, LabelGroup, LabelManager};
use voxgrad::eval::{Classes, Confusion, PseudoDice, Summary, evaluate_case, evaluate_folder};
use voxgrad::io::{Geometry, write_labels};

use crate::common::data;

fn evaluate(name: &str) -> Summary {
    let folder = data(name);
    let labels = Dataset::open(&folder.join("raw")).unwrap().labels;
    evaluate_folder(&folder.join("evaluation/reference"), &folder.join("predictions"), ".nii.gz", &labels, false)
        .unwrap()
}

#[test]
fn summary_is_nnunets_to_the_byte() {
    for name in ["brats_regions", "brats_labels_anisotropic"] {
        let mut summary = evaluate(name);
        // The reference was written from another folder.
        for case in &mut summary.cases {
            let file = case.prediction_file.file_name().unwrap().to_owned();
            case.prediction_file = "./predictions/plain".into();
            case.prediction_file.push(&file);
            case.reference_file = "./evaluation/reference".into();
            case.reference_file.push(&file);
        }
        let expected = fs::read_to_string(data(name).join("evaluation/summary.json")).unwrap();
        assert_eq!(summary.to_json(), expected);
    }
    assert_relative_eq!(evaluate("brats_regions").foreground_dice(), 0.5059925098948544);
}

fn volume(labels: [i16; 8]) -> Array3<i16> {
    Array3::from_shape_vec((2, 2, 2), labels.to_vec()).unwrap()
}

#[test]
fn counts_by_hand() {
    let prediction = volume([1, 1, 2, 0, 1, 0, 2, 2]);
    let reference = volume([1, 2, 2, 0, 3, 1, 3, 0]);
    let groups = [LabelGroup::Label(1), LabelGroup::Region(vec![1, 2]), LabelGroup::Label(5)];
    let ignored = evaluate_case(prediction.view(), reference.view(), &groups, Some(3));
    let counts = |tp, fp, fn_, tn| Confusion {
        true_positives: tp,
        false_positives: fp,
        false_negatives: fn_,
        true_negatives: tn,
    };
    assert_eq!(ignored, [counts(1, 1, 1, 3), counts(3, 1, 1, 1), counts(0, 0, 0, 6)]);
    assert_eq!(ignored[0].dice(), 0.5);
    assert_eq!(ignored[0].iou(), 1.0 / 3.0);
    assert!(ignored[2].dice().is_nan() && ignored[2].iou().is_nan());
    let all = evaluate_case(prediction.view(), reference.view(), &groups[..1], None);
    assert_eq!(all, [counts(1, 2, 1, 4)]);
}

/// Means leave out cases without a Dice; a label without any Dice makes the foreground mean NaN.
#[test]
fn undefined_dice_in_means() {
    let groups = [LabelGroup::Label(1), LabelGroup::Region(vec![2])];
    let case = |prediction: [i16; 8], reference: [i16; 8]| voxgrad::eval::CaseResult {
        counts: evaluate_case(volume(prediction).view(), volume(reference).view(), &groups, None),
        annotated: 1.0,
        prediction_file: "a".into(),
        reference_file: "b\"c".into(),
    };
    let mut summary = Summary {
        classes: Classes::listed(groups.to_vec(), None).unwrap(),
        cases: vec![case([1; 8], [1; 8]), case([0; 8], [0; 8])],
        warnings: Vec::new(),
        passed_over: Vec::new(),
    };
    assert_eq!(summary.mean(0)[0], 1.0);
    assert_eq!([0, 1].map(|group| summary.cases_with(group)), [1, 0]);
    assert!(summary.mean(1)[0].is_nan());
    assert!(summary.foreground_dice().is_nan());
    let text = summary.to_json();
    assert!(text.contains("\"(2,)\": {\n            \"Dice\": NaN,"), "{text}");
    assert!(text.contains("\"reference_file\": \"b\\\"c\""), "{text}");
    summary.cases.push(case([2, 2, 0, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0, 0, 0]));
    assert_relative_eq!(summary.mean(1)[0], 2.0 / 3.0);
    assert_eq!([0, 1].map(|group| summary.cases_with(group)), [1, 1]);
    assert_relative_eq!(summary.foreground_dice(), (1.0 + 2.0 / 3.0) / 2.0);
}

#[test]
fn folders_must_fit_together() {
    let dir = tempfile::tempdir().unwrap();
    let [reference, prediction] = ["reference", "prediction"].map(|name| dir.path().join(name));
    for folder in [&reference, &prediction] {
        fs::create_dir(folder).unwrap();
    }
    let labels = manager(r#"{"background": 0, "a": 1}"#);
    let run = |missing| evaluate_folder(&reference, &prediction, ".nii.gz", &labels, missing);
    let write = |folder: &Path, file: &str, depth: usize| {
        let labels = Array3::<u8>::ones((depth, 3, 3));
        write_labels(&folder.join(file), labels.view(), &Geometry::new([1.0; 3])).unwrap();
    };
    assert!(matches!(run(false), Err(Error::Evaluate(EvaluateError::NothingToEvaluate { .. }))));
    write(&prediction, "a.nii.gz", 2);
    assert!(matches!(run(false), Err(Error::Evaluate(EvaluateError::ReferenceMissing { .. }))));
    write(&reference, "a.nii.gz", 2);
    write(&reference, "b.nii.gz", 2);
    assert!(
        matches!(run(false), Err(Error::Evaluate(EvaluateError::PredictionMissing { path })) if path.ends_with("b.nii.gz"))
    );
    assert_eq!(run(true).unwrap().foreground_dice(), 1.0);
    // What a killed process left, and what macOS leaves, is no case.
    fs::create_dir(prediction.join(".voxgrad-123-0.partial")).unwrap();
    fs::write(prediction.join(".voxgrad-123-0.partial/volume.nii.gz"), "cut").unwrap();
    for folder in [&prediction, &reference] {
        fs::write(folder.join("._a.nii.gz"), "attributes").unwrap();
    }
    let summary = run(true).unwrap();
    assert_eq!((summary.cases.len(), summary.passed_over.len()), (1, 2));
    // Everything that is wrong, at once.
    write(&prediction, "b.nii.gz", 3);
    write(&prediction, "c.nii.gz", 2);
    write(&reference, "d.nii.gz", 2);
    fs::write(prediction.join("e.nii.gz"), "no image").unwrap();
    write(&reference, "e.nii.gz", 2);
    let error = run(false).unwrap_err();
    let text = error.to_string();
    let Error::Several { faults } = error else { panic!("{text}") };
    assert_eq!(faults.len(), 4, "{text}");
    for words in ["prediction/b.nii.gz", "[3, 3, 3] instead of [2, 3, 3]", "reference/c.nii.gz", "prediction/d.nii.gz"]
    {
        assert!(text.contains(words), "no `{words}` in {text}");
    }
    assert!(text.contains("prediction/e.nii.gz"), "{text}");
}

/// Changes numbers of an uncompressed file's header: byte offset and value.
fn edit_header(path: &Path, changes: &[(usize, f32)]) {
    let mut bytes = fs::read(path).unwrap();
    for &(offset, value) in changes {
        bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
    }
    fs::write(path, bytes).unwrap();
}

/// Twice the spacing, another origin, a flipped axis: scores of such pairs would mean nothing.
#[test]
fn other_places_in_the_world_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let [reference, prediction] = ["reference", "prediction"].map(|name| dir.path().join(name));
    let (pixdim_x, srow_x, srow_y) = (80, 280, 296);
    let changes: [(&str, &[(usize, f32)]); 6] = [
        ("same", &[]),
        ("noise", &[(srow_x, 1.0001), (srow_x + 12, 1e-4)]),
        ("spacing", &[(pixdim_x, 2.0), (srow_x, 2.0)]),
        ("origin", &[(srow_y + 12, 5.0)]),
        ("flipped", &[(srow_x, -1.0), (srow_x + 12, 3.0)]),
        ("turned", &[(srow_x, 0.0), (srow_x + 4, 1.0), (srow_y, 1.0), (srow_y + 4, 0.0)]),
    ];
    for folder in [&reference, &prediction] {
        fs::create_dir(folder).unwrap();
        for (name, _) in changes {
            let labels = Array3::<u8>::ones((2, 3, 4));
            write_labels(&folder.join(format!("{name}.nii")), labels.view(), &Geometry::new([1.0; 3])).unwrap();
        }
    }
    for (name, changes) in changes {
        edit_header(&prediction.join(format!("{name}.nii")), changes);
    }
    let labels = manager(r#"{"background": 0, "a": 1}"#);
    let error = evaluate_folder(&reference, &prediction, ".nii", &labels, false).unwrap_err();
    let text = error.to_string();
    let Error::Several { faults } = error else { panic!("{text}") };
    assert_eq!(faults.len(), 4, "{text}");
    assert!(
        faults.iter().all(|fault| matches!(fault, Error::Evaluate(EvaluateError::EvaluationGrid { .. }))),
        "{text}"
    );
    for words in ["spacing.nii", "[1.0, 1.0, 2.0] mm instead of", "origin.nii", "flipped.nii", "turned.nii"] {
        assert!(text.contains(words), "no `{words}` in {text}");
    }
}

#[test]
fn undeclared_labels_are_counted_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let [reference, prediction] = ["reference", "prediction"].map(|name| dir.path().join(name));
    let write = |folder: &Path, labels: [u8; 8]| {
        fs::create_dir(folder).unwrap();
        let labels = Array3::from_shape_vec((2, 2, 2), labels.to_vec()).unwrap();
        write_labels(&folder.join("a.nii.gz"), labels.view(), &Geometry::new([1.0; 3])).unwrap();
    };
    write(&reference, [0, 1, 1, 2, 2, 0, 0, 9]);
    write(&prediction, [0, 1, 1, 7, 7, 7, 2, 2]);
    let labels = manager(r#"{"background": 0, "a": 1, "ignore": 2}"#);
    let summary = evaluate_folder(&reference, &prediction, ".nii.gz", &labels, false).unwrap();
    assert_eq!(summary.cases[0].counts[0].true_positives, 2);
    let [ignored, seven, nine] = summary.warnings.as_slice() else { panic!("{:?}", summary.warnings) };
    assert!(ignored.contains("prediction/a.nii.gz: 2 voxels hold label 2"), "{ignored}");
    assert!(seven.contains("prediction/a.nii.gz: 3 voxels hold label 7"), "{seven}");
    assert!(nine.contains("reference/a.nii.gz: 1 voxels hold label 9"), "{nine}");
}

fn manager(labels: &str) -> LabelManager {
    let json =
        format!(r#"{{"channel_names": {{"0": "a"}}, "numTraining": 1, "file_ending": ".nii", "labels": {labels}}}"#);
    LabelManager::new(&DatasetJson::parse("d".as_ref(), &json).unwrap()).unwrap()
}

#[test]
fn pseudo_dice_of_labels() {
    let labels = manager(r#"{"background": 0, "a": 1, "b": 2, "c": 3, "ignore": 4}"#);
    let mut dice = PseudoDice::new(&labels);
    assert!(dice.mean().is_nan());
    // Predictions 1, 2, 0 (first maximum), 1 (ignored), 2.
    let logits = [
        [0.0, 2.0, 1.0, 0.0],
        [0.0, 1.0, 2.0, 0.0],
        [3.0, 3.0, 0.0, 0.0],
        [0.0, 9.0, 0.0, 0.0],
        [-2.0, -3.0, -1.0, -1.5],
    ];
    dice.add_logits(logits.as_flattened(), &[1, 1, 1, 4, 2]).unwrap();
    // Class 1: tp 1, fn 2; class 2: tp 1, fp 1; class 3: nothing.
    let per_class = dice.per_class();
    assert_relative_eq!(per_class[0], 0.5);
    assert_relative_eq!(per_class[1], 2.0 / 3.0);
    assert!(per_class[2].is_nan());
    assert_relative_eq!(dice.mean(), (0.5 + 2.0 / 3.0) / 2.0);
    let seen = Confusion { true_positives: 1, ..Confusion::default() };
    dice.add_counts(&[seen, seen, seen]).unwrap();
    assert_relative_eq!(dice.per_class()[0], 2.0 / 3.0);
    assert_relative_eq!(dice.per_class()[2], 1.0);
    assert!(dice.add_counts(&[seen]).is_err());
    assert!(dice.add_logits(&[0.0; 7], &[1, 1]).is_err());
}

#[test]
fn pseudo_dice_of_regions() {
    let labels = LabelManager::new(&Dataset::open(&data("brats_regions/raw")).unwrap().json).unwrap();
    let mut dice = PseudoDice::new(&labels);
    let logits = [[1.0, 1.0, 0.0], [1.0, -1.0, -1.0], [-1.0, -1.0, -1.0], [1.0; 3]];
    dice.add_logits(logits.as_flattened(), &[3, 0, 2, 4]).unwrap();
    // Whole: tp 1, fp 1, fn 1; core: tp 1, fn 1; enhancing: fn 1.
    let per_class = dice.per_class();
    assert_relative_eq!(per_class[0], 0.5);
    assert_relative_eq!(per_class[1], 2.0 / 3.0);
    assert_relative_eq!(per_class[2], 0.0);
}
