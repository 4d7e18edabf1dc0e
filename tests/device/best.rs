//! What `find-best-configuration` says to do, done: its commands are run as they are printed.

use crate::common::{device, phantom, place::text};
use ndarray::{Array3, Array4, Axis, concatenate};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use voxgrad::dataset::DatasetJson;
use voxgrad::dataset::plans::Plans;
use voxgrad::io::{Geometry, read_labels, read_npz_array, write_labels, write_npz_array};
use voxgrad::predict::PROBABILITIES;
use voxgrad::train::{Model, Settings, Trainer};

const DATASET: &str = "Dataset001_Spheres";
const CASES: usize = 4;

/// The probability of the sphere that a model gives: right, but not sure, and wrong in one half of the image.
fn predicted(truth: &Array3<i16>, wrong: std::ops::Range<usize>) -> Array3<f32> {
    let mut of = truth.mapv(|label| if label == 1 { 0.95 } else { 0.05 });
    for ((_, _, x), probability) in of.indexed_iter_mut() {
        if wrong.contains(&x) && *probability > 0.5 {
            *probability = 0.4;
        }
    }
    of
}

/// nnU-Net's three folders, of which two configurations with untrained networks, and with validation cases whose errors the
/// other one has not.
fn compared(place: &Path) {
    let raw = place.join("raw").join(DATASET);
    phantom::write(&raw, CASES);
    let prepared = place.join("preprocessed").join(DATASET);
    fs::create_dir_all(&prepared).unwrap();
    let name = |case: usize| format!("case_{case:03}");
    let of_fold = |fold: usize| (0..CASES).filter(move |case| case % 2 == fold).map(name).collect::<Vec<_>>();
    let splits: Vec<_> =
        [0, 1].map(|fold| serde_json::json!({"train": of_fold(1 - fold), "val": of_fold(fold)})).into();
    fs::write(prepared.join("splits_final.json"), serde_json::to_string(&splits).unwrap()).unwrap();
    let mut plans: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(raw.join("nnUNetPlans.json")).unwrap()).unwrap();
    plans["configurations"]["3d_lowres"] = plans["configurations"]["3d_fullres"].clone();
    let (context, _guard) = device();
    for (number, configuration) in ["3d_fullres", "3d_lowres"].into_iter().enumerate() {
        let folder =
            place.join("all results").join(DATASET).join(format!("voxgradTrainer__nnUNetPlans__{configuration}"));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("plans.json"), plans.to_string()).unwrap();
        fs::copy(raw.join("dataset.json"), folder.join("dataset.json")).unwrap();
        let dataset = DatasetJson::read(&folder.join("dataset.json")).unwrap();
        let plans = Plans::read(&folder.join("plans.json")).unwrap();
        let model = Model::new(plans, configuration, dataset).unwrap();
        for fold in [0, 1] {
            let place = folder.join(format!("fold_{fold}"));
            let validation = place.join("validation");
            fs::create_dir_all(&validation).unwrap();
            let settings = Settings { seed: 10 * number as u64 + fold as u64, ..Settings::default() };
            let trainer = Trainer::new(context, model.clone(), settings).unwrap();
            trainer.checkpoint().unwrap().write(&place.join("checkpoint_final.safetensors")).unwrap();
            for case in (0..CASES).filter(|case| case % 2 == fold) {
                let truth = read_labels(&phantom::label_path(&raw, case)).unwrap().data;
                let half = phantom::SIDE / 2;
                let sphere = predicted(&truth, number * half..(number + 1) * half);
                let background = sphere.mapv(|probability| 1.0 - probability).insert_axis(Axis(0));
                let labels = sphere.mapv(|probability| u8::from(probability > 0.5));
                let both = concatenate![Axis(0), background, sphere.insert_axis(Axis(0))];
                write_npz_array(&validation.join(format!("{}.npz", name(case))), PROBABILITIES, both.view()).unwrap();
                let file = validation.join(format!("{}.nii.gz", name(case)));
                write_labels(&file, labels.view(), &Geometry::new([1.0; 3])).unwrap();
            }
        }
    }
}

fn program(place: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_voxgrad"));
    let folders = ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"];
    folders.iter().for_each(|name| _ = command.env_remove(name));
    command.current_dir(place);
    command
}

/// The instructions that are written where the folders are given relative to the present one.
fn instructions(place: &Path, extra: &[&str]) -> String {
    let found = program(place)
        .args(["find-best-configuration", "1", "-f", "0", "1", "--raw", "raw", "--preprocessed", "preprocessed"])
        .args(["--results", "all results"])
        .args(extra)
        .output()
        .unwrap();
    assert!(found.status.success(), "{}", text(&found.stderr));
    let written =
        fs::read_to_string(place.join("all results").join(DATASET).join("inference_instructions.txt")).unwrap();
    assert!(text(&found.stdout).contains(&written), "{}", text(&found.stdout));
    written
}

/// Runs every command in another folder, which it returns, as somebody would who has copied them to a shell.
fn follow(place: &Path, elsewhere: &str, instructions: &str) -> PathBuf {
    let folder = place.join(elsewhere);
    fs::create_dir(&folder).unwrap();
    let input = format!("'{}'", place.join("raw").join(DATASET).join("imagesTr").display());
    let commands: Vec<&str> = instructions.lines().filter(|line| line.starts_with("voxgrad ")).collect();
    for command in commands {
        let words = command.replacen("voxgrad", &format!("'{}'", env!("CARGO_BIN_EXE_voxgrad")), 1);
        let mut shell = Command::new("sh");
        let folders = ["nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"];
        folders.iter().for_each(|name| _ = shell.env_remove(name));
        let done = shell.arg("-c").arg(words.replace("INPUT_FOLDER", &input)).current_dir(&folder).output().unwrap();
        assert!(done.status.success(), "{command}: {}", text(&done.stderr));
    }
    folder
}

#[test]
fn printed_commands_do_what_they_say() {
    if crate::common::is_slow() {
        return eprintln!("skipped on a software device: the commands choose a device by themselves");
    }
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    compared(place);
    let case = |number: usize, ending: &str| format!("case_{number:03}.{ending}");

    // Two models, whose mean has neither's errors.
    let told = instructions(place, &[]);
    for (words, count) in [("voxgrad predict", 2), ("--save_probabilities", 2), ("voxgrad ensemble", 1)] {
        assert_eq!(told.matches(words).count(), count, "{words}: {told}");
    }
    let done = follow(place, "two models", &told);
    for number in 0..CASES {
        let of = |model: usize| -> Array4<f32> {
            read_npz_array(&done.join(format!("OUTPUT_FOLDER_MODEL_{model}")).join(case(number, "npz")), PROBABILITIES)
                .unwrap()
        };
        let (first, second) = (of(1), of(2));
        assert_ne!(first, second, "networks of different seeds");
        let mean = (first + second) / 2.0;
        let found = read_labels(&done.join("OUTPUT_FOLDER").join(case(number, "nii.gz"))).unwrap().data;
        for ((z, y, x), label) in found.indexed_iter() {
            assert_eq!(*label, i16::from(mean[[1, z, y, x]] > mean[[0, z, y, x]]), "{number} {z} {y} {x}");
        }
        assert!(done.join("OUTPUT_FOLDER_PP").join(case(number, "nii.gz")).is_file());
    }

    // One.
    let told = instructions(place, &["--disable-ensembling", "-c", "3d_lowres"]);
    assert!(told.matches("voxgrad ").count() == 2 && told.contains("3d_lowres"), "{told}");
    let single = follow(place, "one model", &told);
    for number in 0..CASES {
        let [alone, of_two] = [single.join("OUTPUT_FOLDER"), done.join("OUTPUT_FOLDER_MODEL_2")]
            .map(|folder| read_labels(&folder.join(case(number, "nii.gz"))).unwrap().data);
        assert_eq!(alone, of_two);
        assert!(single.join("OUTPUT_FOLDER_PP").join(case(number, "nii.gz")).is_file());
    }
}
