//! The command line: what it does with bad input. Every error names the file and the remedy, ends with exit code 2, and
//! leaves no file behind under a final name.

use crate::common::{data, phantom};
use ndarray::Array3;
use std::path::Path;
use std::process::{Command, Output};
use voxgrad::io::{self, Geometry};
use voxgrad::train::Checkpoint;

fn voxgrad(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_voxgrad")).args(arguments).output().unwrap()
}

/// Trains on `folder` and expects a refusal that mentions all of `words`.
fn refused(folder: &Path, extra: &[&str], words: &[&str]) {
    let output = folder.join("out");
    let mut arguments = vec!["train", folder.to_str().unwrap(), "-o", output.to_str().unwrap()];
    arguments.extend(["--fold", "all", "--epochs", "1", "--iterations", "1"]);
    arguments.extend(if extra.is_empty() { &["--device", "cpu"] } else { extra });
    let result = voxgrad(&arguments);
    let text = String::from_utf8_lossy(&result.stderr);
    assert_eq!(result.status.code(), Some(2), "{text}");
    for word in words {
        assert!(text.contains(word), "no `{word}` in: {text}");
    }
    assert!(!text.contains("panicked"), "{text}");
    let left = std::fs::read_dir(&output).map_or(0, Iterator::count);
    assert_eq!(left, 0, "files were left behind");
}

fn dataset(change: impl FnOnce(&Path)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    phantom::write(folder.path(), 2);
    change(folder.path());
    folder
}

fn edit_json(folder: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let path = folder.join("dataset.json");
    let mut json = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

#[test]
fn a_missing_channel_file() {
    let folder = dataset(|folder| {
        edit_json(folder, |json| json["channel_names"] = serde_json::json!({"0": "T1", "1": "T2"}));
    });
    refused(folder.path(), &[], &["case_000", "0001"]);
}

#[test]
fn unknown_trainers_and_augmentations_that_contradict() {
    let folder = dataset(|_| ());
    let refuse = |extra: &[&str], words: &[&str]| {
        refused(folder.path(), &[&["--device", "cpu"], extra].concat(), words);
    };
    let known = ["nnUNetTrainerDA5", "nnUNetTrainerNoMirroring", "nnUNetTrainer_250epochs"];
    refuse(&["-tr", "nnUNetTrainerDA5"], &known);
    refuse(&["-tr", "nnUNetTrainer_5epochs"], &["--epochs is 1", "the trainer's name says 5"]);
    refuse(&["-tr", "nnUNetTrainer", "--mirror", "0"], &["--mirror", "cannot be used with"]);
    refuse(&["--augmentation", "none", "--mirror", "0"], &["--augmentation none mirrors nothing"]);
    refuse(&["--augmentation", "strong"], &["nnunet, mirror or none"]);
}

#[test]
fn a_label_that_dataset_json_does_not_declare() {
    let folder = dataset(|folder| {
        let labels = Array3::from_elem((phantom::SIDE, phantom::SIDE, phantom::SIDE), 7u8);
        io::write_labels(&phantom::label_path(folder, 1), labels.view(), &Geometry::new([1.0; 3])).unwrap();
    });
    refused(folder.path(), &[], &["case_001.nii.gz", "label 7", "`labels` in dataset.json declares [0, 1, 2]"]);
}

#[test]
fn an_ignore_label_that_is_not_the_highest() {
    let folder = dataset(|folder| edit_json(folder, |json| json["labels"]["ignore"] = serde_json::json!(1)));
    refused(folder.path(), &[], &["dataset.json", "ignore"]);
}

#[test]
fn image_and_label_of_different_shape() {
    let folder = dataset(|folder| {
        let labels = Array3::from_elem((4, 5, 6), 0u8);
        io::write_labels(&phantom::label_path(folder, 0), labels.view(), &Geometry::new([1.0; 3])).unwrap();
    });
    refused(folder.path(), &[], &["case_000", "[4, 5, 6]", "[16, 16, 16]"]);
}

#[test]
fn a_precision_that_there_is_not() {
    let folder = dataset(|_| ());
    refused(folder.path(), &["--precision", "f8"], &["--precision", "`f8`", "f32, f16 or bf16"]);
}

#[test]
fn a_nan_in_an_image() {
    let folder = dataset(|folder| {
        for case in 0..2 {
            std::fs::remove_file(phantom::image_path(folder, case)).unwrap();
            std::fs::remove_file(phantom::label_path(folder, case)).unwrap();
        }
        edit_json(folder, |json| {
            json["file_ending"] = serde_json::json!(".nii");
            json["numTraining"] = serde_json::json!(1);
        });
        std::fs::copy(data("hostile_nifti/f32_nan.nii"), folder.join("imagesTr/case_000_0000.nii")).unwrap();
        std::fs::copy(data("hostile_nifti/ok.nii"), folder.join("labelsTr/case_000.nii")).unwrap();
    });
    refused(folder.path(), &[], &["case_000_0000.nii", "NaN"]);
}

#[test]
fn a_truncated_file() {
    let folder = dataset(|folder| {
        let path = phantom::image_path(folder, 1);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    });
    refused(folder.path(), &[], &["case_001_0000.nii.gz"]);
}

#[test]
fn an_empty_dataset() {
    let folder = dataset(|folder| {
        for name in ["imagesTr", "labelsTr"] {
            std::fs::remove_dir_all(folder.join(name)).unwrap();
            std::fs::create_dir(folder.join(name)).unwrap();
        }
        edit_json(folder, |json| json["numTraining"] = serde_json::json!(0));
    });
    refused(folder.path(), &[], &["imagesTr"]);
}

#[test]
fn nothing_annotated_at_all() {
    let folder = dataset(|folder| {
        for case in 0..2 {
            let labels = Array3::from_elem((phantom::SIDE, phantom::SIDE, phantom::SIDE), phantom::IGNORE);
            io::write_labels(&phantom::label_path(folder, case), labels.view(), &Geometry::new([1.0; 3])).unwrap();
        }
    });
    refused(folder.path(), &[], &["ignore label 2", "annotate"]);
}

#[test]
fn a_device_that_is_not_there_lists_those_that_are() {
    let folder = dataset(|_| ());
    refused(folder.path(), &["--device", "cuda:7"], &["cuda:7", "found here", "cpu"]);
    refused(folder.path(), &["--device", "tpu"], &["tpu", "auto, cpu, vulkan"]);
}

#[test]
fn an_earlier_run_is_not_overwritten_and_can_be_continued() {
    let folder = dataset(|_| ());
    let (input, output) = (folder.path().to_str().unwrap(), folder.path().join("out"));
    let common = ["train", input, "-o", output.to_str().unwrap(), "--device", "cpu", "--fold", "all"];
    let train = |extra: &[&str]| voxgrad(&[&common, extra].concat());
    let small = ["--epochs", "1", "--iterations", "2", "--validation-iterations", "1", "--disable-tta", "--exact"];
    let first = train(&small);
    assert!(first.status.success(), "{}", String::from_utf8_lossy(&first.stderr));
    for file in ["checkpoint_final.safetensors", "progress.png", "summary.json", "overlays/case_000.png"] {
        assert!(output.join(file).exists(), "no {file}");
    }
    assert!(output.join("validation/case_001.nii.gz").exists());
    let checkpoint = Checkpoint::read(&output.join("checkpoint_final.safetensors")).unwrap();
    assert!(checkpoint.settings.exact, "--exact is remembered for later continuation and prediction");
    let again = train(&small);
    assert_eq!(again.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&again.stderr).contains("--continue"));
    assert!(train(&[&small[..], &["--continue"]].concat()).status.success());

    // The trained network segments new images.
    let predictions = folder.path().join("predictions");
    let result = voxgrad(&[
        "predict",
        "-i",
        folder.path().join("imagesTr").to_str().unwrap(),
        "-o",
        predictions.to_str().unwrap(),
        "--checkpoint",
        output.join("checkpoint_final.safetensors").to_str().unwrap(),
        "--device",
        "cpu",
        "--disable-tta",
        "--exact",
    ]);
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    let same = |name: &str| {
        let (a, b) = (io::read_labels(&predictions.join(name)), io::read_labels(&output.join("validation").join(name)));
        assert_eq!(a.unwrap().data, b.unwrap().data, "{name}");
    };
    same("case_000.nii.gz");
    let result = voxgrad(&[
        "evaluate",
        folder.path().join("labelsTr").to_str().unwrap(),
        predictions.to_str().unwrap(),
        "--dataset-json",
        folder.path().join("dataset.json").to_str().unwrap(),
    ]);
    assert!(result.status.success(), "{}", String::from_utf8_lossy(&result.stderr));
    assert!(predictions.join("summary.json").exists());
}

#[test]
fn devices_lists_the_cpu() {
    let result = voxgrad(&["devices"]);
    let text = String::from_utf8_lossy(&result.stdout);
    assert!(result.status.success() && text.contains("cpu") && text.contains("cores"), "{text}");
}
