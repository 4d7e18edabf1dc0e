//! Training on the command line that goes on: what the checkpoint remembers, what is refused, how a stop ends; and what
//! is looked at before the first epoch.

use crate::common::phantom;
use ndarray::Array3;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use voxgrad::Compat;
use voxgrad::dataset::splits::{self, Fold, Split};
use voxgrad::io::{self, Geometry};
use voxgrad::train::Checkpoint;

/// A dataset folder and the folder of its results.
struct Place(tempfile::TempDir);

impl Place {
    fn new(cases: usize) -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        fs::create_dir(place.data()).unwrap();
        phantom::write(&place.data(), cases);
        place
    }

    fn data(&self) -> PathBuf {
        self.0.path().join("data")
    }

    fn output(&self) -> PathBuf {
        self.0.path().join("out")
    }

    fn edit(&self, file: &str, change: impl FnOnce(&mut serde_json::Value)) {
        let path = self.data().join(file);
        let mut json = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        change(&mut json);
        fs::write(path, json.to_string()).unwrap();
    }

    fn command(&self, extra: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_voxgrad"));
        command.arg("train").arg(self.data()).arg("-o").arg(self.output());
        command.args(["--device", "cpu", "--disable-tta"]).args(extra);
        command
    }

    fn train(&self, extra: &[&str]) -> Output {
        self.command(extra).output().unwrap()
    }

    fn trains(&self, extra: &[&str]) -> String {
        let result = self.train(extra);
        let said = text(&result.stdout) + &text(&result.stderr);
        assert!(result.status.success(), "{extra:?}: {said}");
        said
    }

    /// Expects a refusal that mentions all of `words`.
    fn refuses(&self, extra: &[&str], words: &[&str]) -> String {
        let result = self.train(extra);
        let said = text(&result.stderr);
        assert_eq!(result.status.code(), Some(2), "{extra:?}: {said}");
        for word in words {
            assert!(said.contains(word), "no `{word}` in: {said}");
        }
        said
    }

    fn checkpoint(&self) -> Checkpoint {
        Checkpoint::read(&self.output().join("checkpoint_final.safetensors")).unwrap()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn names(folder: &Path) -> Vec<String> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = files.collect();
    names.sort();
    names
}

const SHORT: [&str; 6] = ["--epochs", "1", "--iterations", "1", "--validation-iterations", "1"];

/// The README's own line: `--continue` and nothing else but dataset and output.
#[test]
fn what_is_not_typed_comes_from_the_checkpoint() {
    let place = Place::new(6);
    place.edit("nnUNetPlans.json", |plans| {
        plans["configurations"]["3d_lowres"] = serde_json::json!({
            "inherits_from": "3d_fullres", "spacing": [1.0, 1.0, 2.0], "data_identifier": "nnUNetPlans_3d_lowres"
        });
    });
    let cases: Vec<String> = (0..6).map(|case| format!("case_{case:03}")).collect();
    let fold = splits::k_fold(&cases).unwrap()[2].clone();
    place.trains(&[&SHORT[..], &["--fold", "2", "-c", "3d_lowres", "--mirror", "2", "--seed", "3"]].concat());
    let first = place.checkpoint();
    let kept = first.cases.clone().unwrap();
    assert_eq!((kept.fold, &kept.split), (Fold::Index(2), &fold));

    let said = place.trains(&["--continue", "--epochs", "2", "--learning-rate", "0.5"]);
    assert!(said.contains("2 epochs instead of 1") && said.contains("learning rate 0.5 instead of 0.01"), "{said}");
    assert!(said.contains("fold 2, 5 training and 1 validation cases"), "{said}");
    let second = place.checkpoint();
    assert_eq!((second.progress.epoch, second.settings.iterations, second.settings.learning_rate), (2, 1, 0.5));
    assert_eq!(second.settings.mirror, [false, false, true]);
    assert_eq!(second.model.configuration_name, "3d_lowres");
    assert_eq!(second.cases, first.cases);
    let predicted = names(&place.output().join("validation"));
    assert_eq!(predicted, fold.val.iter().map(|case| format!("{case}.nii.gz")).collect::<Vec<_>>());

    // What is typed and cannot change is refused, all of it.
    let other = ["--fold", "0", "-c", "3d_fullres", "--mirror", "none", "--precision", "bf16", "--iterations", "7"];
    let more = ["--momentum", "0.5", "--seed", "4", "--exact", "--validation-iterations", "9", "--epochs", "1"];
    place.refuses(
        &[&["--continue"], &other[..], &more].concat(),
        &[
            "checkpoint_final",
            "--fold is 0, it was 2",
            "--configuration is 3d_fullres, it was 3d_lowres",
            "mirror is none, it was 2",
            "precision is bf16, it was f32",
            "iterations is 7, it was 1",
            "validation iterations is 9, it was 1",
            "momentum is 0.5, it was 0.99",
            "seed is 4, it was 3",
            "exact is true, it was false",
            "epochs is 1, 2 are done",
        ],
    );

    // Splits that were exchanged, and plans that changed: the checkpoint's are used, and that is said.
    let turned = Split { train: fold.val.clone(), val: fold.train.clone() };
    splits::write(&place.data().join("splits_final.json"), &vec![turned; 5]).unwrap();
    place.edit("nnUNetPlans.json", |plans| plans["configurations"]["3d_fullres"]["batch_size"] = 5.into());
    let said = place.trains(&["--continue"]);
    assert!(said.contains("fold 2 is not what it was") && said.contains("5 training and 1 validation"), "{said}");
    assert!(said.contains("nnUNetPlans.json has changed since training began"), "{said}");
    let plans = place.data().join("nnUNetPlans.json");
    place.refuses(&["--continue", "--plans", plans.to_str().unwrap()], &["--plans", "differ"]);
    place.edit("dataset.json", |json| json["labels"] = serde_json::json!({"background": 0, "sphere": 1, "other": 2}));
    place.refuses(&["--continue"], &["`labels` in", "dataset.json"]);
}

#[test]
fn measured_algorithms_are_used_again() {
    let place = Place::new(6);
    let said = place.trains(&[&SHORT[..], &["--tune"]].concat());
    assert!(said.contains("tuning: "), "{said}");
    assert!(place.checkpoint().settings.tuned);
    // Not typed again.
    let said = place.trains(&["--continue", "--epochs", "2"]);
    assert!(said.contains("tuning: "), "{said}");
    place.refuses(&["--continue", "--exact"], &["exact is true, it was false"]);

    let untuned = Place::new(6);
    untuned.trains(&SHORT);
    untuned.refuses(&["--continue", "--tune"], &["tune is true, it was false"]);
}

#[test]
fn cases_and_patches_as_nnunets_when_asked() {
    let place = Place::new(6);
    place.trains(&[&SHORT[..], &["--compat", "nnunet"]].concat());
    let kept = place.checkpoint();
    assert_eq!((kept.settings.compat, kept.cases.unwrap().compat), (Compat::Nnunet, Compat::Nnunet));
    place.refuses(&["--continue", "--compat", "corrected"], &["compat is corrected, it was nnunet"]);
    place.trains(&["--continue", "--epochs", "2"]);
    assert_eq!(place.checkpoint().settings.compat, Compat::Nnunet);
}

#[test]
fn the_weights_that_training_began_with_stay_on_record() {
    let (other, place) = (Place::new(6), Place::new(6));
    other.trains(&SHORT);
    let weights = other.output().join("checkpoint_final.safetensors");
    let begun_with = || {
        let about = fs::read_to_string(place.output().join("debug.json")).unwrap();
        serde_json::from_str::<serde_json::Value>(&about).unwrap()["pretrained_weights"].clone()
    };
    place.trains(&[&SHORT[..], &["-pretrained_weights", weights.to_str().unwrap()]].concat());
    assert_eq!(begun_with(), weights.to_str().unwrap());
    place.trains(&["--continue", "--epochs", "2"]);
    assert_eq!(begun_with(), weights.to_str().unwrap());
    // What is given to a training that goes on is not what it began with.
    place.trains(&["--continue", "--epochs", "3", "-pretrained_weights", "elsewhere.safetensors"]);
    assert_eq!(begun_with(), weights.to_str().unwrap());
}

#[test]
fn a_checkpoint_that_names_no_cases_needs_the_fold() {
    let place = Place::new(5);
    place.trains(&[&SHORT[..], &["--fold", "1"]].concat());
    let path = place.output().join("checkpoint_final.safetensors");
    let mut old = Checkpoint::read(&path).unwrap();
    old.cases = None;
    old.write(&path).unwrap();
    place.refuses(&["--continue"], &["checkpoint_final", "earlier version", "--fold"]);
    let said = place.trains(&["--continue", "--fold", "1"]);
    assert!(said.contains("taking fold 1 as typed"), "{said}");
    assert_eq!(place.checkpoint().cases.unwrap().fold, Fold::Index(1));
}

#[test]
fn folds_and_cases_outside_the_splits_are_said() {
    let place = Place::new(6);
    let case = |number: usize| format!("case_{number:03}");
    let three: Vec<Split> = (0..3)
        .map(|fold| Split { train: (0..5).filter(|&n| n != fold).map(case).collect(), val: vec![case(fold)] })
        .collect();
    splits::write(&place.data().join("splits_final.json"), &three).unwrap();
    let words = ["no fold of", "splits_final.json has case_005", "fold 7 is none of", "folds 0 to 2"];
    place.refuses(&[&SHORT[..], &["--fold", "7"]].concat(), &words);
}

#[test]
fn plans_that_are_not_supported_are_refused_before_anything_is_written() {
    let place = Place::new(2);
    place.edit("nnUNetPlans.json", |plans| {
        plans["configurations"]["3d_cascade_fullres"] =
            serde_json::json!({"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"});
        plans["configurations"]["relu"] = serde_json::json!({"inherits_from": "3d_fullres"});
        let mut network = plans["configurations"]["3d_fullres"]["architecture"].clone();
        network["arch_kwargs"]["nonlin"] = "torch.nn.ReLU".into();
        plans["configurations"]["relu"]["architecture"] = network;
    });
    let common = [&SHORT[..], &["--fold", "all", "-c"]].concat();
    place.refuses(&[&common[..], &["3d_cascade_fullres"]].concat(), &["`previous_stage` is \"3d_lowres\"", "cascade"]);
    place.refuses(&[&common[..], &["relu"]].concat(), &["arch_kwargs.nonlin` is \"torch.nn.ReLU\"", "LeakyReLU"]);
    assert!(!place.output().exists());
}

/// Labels that lie elsewhere are found for scoring too; labels that do not are missed before the first epoch.
#[test]
fn labels_that_the_dataset_lists_elsewhere() {
    let place = Place::new(2);
    let data = place.data();
    fs::create_dir(data.join("elsewhere")).unwrap();
    for case in 0..2 {
        let to = data.join(format!("elsewhere/lab_{case}.nii.gz"));
        fs::rename(phantom::label_path(&data, case), to).unwrap();
    }
    fs::remove_dir(data.join("labelsTr")).unwrap();
    place.edit("dataset.json", |json| {
        let case = |n: usize| {
            serde_json::json!({
                "images": [format!("imagesTr/case_{n:03}_0000.nii.gz")], "label": format!("elsewhere/lab_{n}.nii.gz")
            })
        };
        json["dataset"] = serde_json::json!({"case_000": case(0), "case_001": case(1)});
    });
    let all = [&SHORT[..], &["--fold", "all"]].concat();
    let missing = place.0.path().join("dense");
    fs::create_dir(&missing).unwrap();
    fs::copy(data.join("elsewhere/lab_0.nii.gz"), missing.join("case_000.nii.gz")).unwrap();
    let reference = ["--reference", missing.to_str().unwrap()];
    place.refuses(&[&all[..], &reference].concat(), &["validation will need", "dense/case_001.nii.gz"]);
    assert!(!place.output().exists());
    place.trains(&all);
    let summary = fs::read_to_string(place.output().join("summary.json")).unwrap();
    assert!(summary.contains("case_000.nii.gz") && summary.contains("case_001.nii.gz"), "{summary}");
}

/// Waits for a line that begins so, sends a signal, and returns the exit code.
#[cfg(unix)]
fn stopped(mut command: Command, line: &str, signal: &str) -> Option<i32> {
    use std::io::BufRead;
    // On a terminal the progress bar would take the lines.
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null());
    let mut child = command.spawn().unwrap();
    let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let mut lines = lines.map(|line| line.unwrap());
    assert!(lines.any(|found| found.starts_with(line)), "no `{line}`");
    // The shell's own: a bare system has no program of that name.
    let sent = Command::new("sh").args(["-c", &format!("kill {signal} {}", child.id())]).status().unwrap();
    assert!(sent.success());
    lines.for_each(drop);
    child.wait().unwrap().code()
}

#[cfg(unix)]
#[test]
fn stopping_has_exit_codes_of_its_own() {
    let place = Place::new(3);
    let long = ["--fold", "all", "--iterations", "1000000"];
    let latest = place.output().join("checkpoint_latest.safetensors");
    assert_eq!(stopped(place.command(&long), "first iteration", "-INT"), Some(130));
    let first = Checkpoint::read(&latest).unwrap().progress.iteration;
    assert!(first > 0);
    assert_eq!(stopped(place.command(&["--continue"]), "first iteration", "-TERM"), Some(143));
    assert!(Checkpoint::read(&latest).unwrap().progress.iteration > first);
}

/// After training there is nothing to save: the first signal is obeyed.
#[cfg(unix)]
#[test]
fn the_final_validation_can_be_stopped() {
    let place = Place::new(1);
    // Seconds of prediction.
    let (labels, image) = (Array3::from_elem((64, 64, 64), 1u8), Array3::from_shape_fn((64, 64, 64), |p| p.2 as u8));
    for (path, volume) in
        [(phantom::label_path(&place.data(), 0), labels), (phantom::image_path(&place.data(), 0), image)]
    {
        io::write_labels(&path, volume.view(), &Geometry::new([1.0; 3])).unwrap();
    }
    let command = place.command(&[&SHORT[..], &["--fold", "all"]].concat());
    assert_eq!(stopped(command, "trained;", "-INT"), Some(130));
    assert!(place.output().join("checkpoint_final.safetensors").exists());
    assert!(!place.output().join("summary.json").exists());
}
