//! Cross-validation as one: collected and scored, averaged, compared; beside what nnU-Net 2.8.1 makes of the same files.

use crate::common::data;
use crate::common::place::{Place, copy_folder};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use voxgrad::io::{read_labels, read_npz_array, write_npz_array};

const DATASET: &str = "Dataset901_Evaluation";
const CASES: [&str; 6] = ["case_0", "case 1 with blanks", "fall_für_größe", "case_3", "case_4", "病例_5"];

fn fixture(name: &str) -> PathBuf {
    data("evaluation").join(name)
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    fs::copy(from, to).unwrap();
}

/// A dataset with copies of its labels, and a model of it with the predictions of two folds.
fn trained() -> (Place, PathBuf) {
    let place = Place::new();
    for case in CASES {
        let file = format!("{case}.nii.gz");
        let copies = place.path("preprocessed").join(DATASET).join("gt_segmentations");
        copy(&fixture("labels/references").join(&file), &copies.join(&file));
    }
    let model = place.path("results").join(DATASET).join("nnUNetTrainer__nnUNetPlans__3d_fullres");
    for name in ["dataset.json", "plans.json"] {
        copy(&fixture("labels").join(name), &model.join(name));
    }
    for (number, case) in CASES.iter().enumerate() {
        let file = format!("{case}.nii.gz");
        let folder = model.join(format!("fold_{}/validation", number % 2));
        copy(&fixture("labels/predictions").join(&file), &folder.join(&file));
    }
    (place, model)
}

/// Python's NaN as null.
fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap().replace("NaN", "null")).unwrap()
}

#[test]
fn folds_are_collected_and_scored_as_nnunet_does() {
    let (place, model) = trained();
    let accumulate = ["accumulate-crossval", "901", "-c", "3d_fullres", "-f", "0", "1"];
    place.succeeds(&accumulate);
    let results = model.join("crossval_results_folds_0_1");
    let (found, expected) = (json(&results.join("summary.json")), json(&fixture("labels/summary.json")));
    for field in ["foreground_mean", "mean"] {
        assert_eq!(found[field], expected[field]);
    }
    let metrics = |summary: &Value| -> Vec<Value> {
        summary["metric_per_case"].as_array().unwrap().iter().map(|case| case["metrics"].clone()).collect()
    };
    assert_eq!(metrics(&found), metrics(&expected));
    let file = found["metric_per_case"][1]["prediction_file"].as_str().unwrap();
    assert!(file.ends_with("crossval_results_folds_0_1/case_0.nii.gz") && Path::new(file).is_file(), "{file}");
    assert!(results.join("plans.json").is_file() && results.join("dataset.json").is_file());

    // What is there is made anew, and what is no longer predicted is gone; other files are left alone, by name.
    fs::remove_file(model.join("fold_0/validation/case_0.nii.gz")).unwrap();
    let said = place.succeeds(&accumulate);
    assert!(said.contains("1 of 6 cases of the dataset have no prediction"), "{said}");
    assert!(!results.join("case_0.nii.gz").exists());
    fs::write(results.join("notes.txt"), "mine").unwrap();
    place.refuses(&accumulate, &["crossval_results_folds_0_1", "notes.txt"]);
    assert!(results.join("notes.txt").is_file() && results.join("case_3.nii.gz").is_file());

    // Elsewhere, into an empty folder only.
    let elsewhere = place.path("else where");
    let to = [&accumulate[..], &["-o", elsewhere.to_str().unwrap()]].concat();
    place.succeeds(&to);
    assert!(elsewhere.join("summary.json").is_file());
    place.refuses(&to, &["else where", "is not empty"]);
}

#[test]
fn what_is_missing_or_twice_is_named() {
    let (place, model) = trained();
    place.refuses(&["accumulate-crossval", "901", "-c", "3d_fullres"], &["fold 2, 3, 4", "validation", "train"]);
    place.refuses(&["accumulate-crossval", "901", "-c", "3d_lowres"], &["3d_lowres", "do not exist"]);
    let accumulate = ["accumulate-crossval", "901", "-c", "3d_fullres", "-f", "0", "1"];
    let twice = model.join("fold_0/validation");
    copy(&twice.join("case_0.nii.gz"), &model.join("fold_1/validation/case_0.nii.gz"));
    place.refuses(&accumulate, &["more than one fold", "case_0.nii.gz"]);
    fs::remove_file(model.join("fold_1/validation/case_0.nii.gz")).unwrap();
    let copies = place.path("preprocessed").join(DATASET).join("gt_segmentations");
    fs::rename(copies.join("病例_5.nii.gz"), copies.join("other.nii.gz")).unwrap();
    place.refuses(&accumulate, &["病例_5.nii.gz", "no reference"]);
    // Labels of the raw dataset come first.
    let raw = place.path("raw").join(DATASET).join("labelsTr");
    CASES.iter().for_each(|case| {
        let file = format!("{case}.nii.gz");
        copy(&fixture("labels/references").join(&file), &raw.join(&file));
    });
    place.succeeds(&accumulate);
    fs::remove_dir_all(place.path("raw").join(DATASET)).unwrap();
    fs::remove_dir_all(&copies).unwrap();
    place.refuses(&accumulate, &[DATASET, "gt_segmentations"]);
}

#[test]
fn ensembles_are_nnunets() {
    for name in ["labels", "regions"] {
        let place = Place::new();
        let [a, b] = ["a", "b"].map(|member| fixture("ensemble").join(name).join(member));
        let output = place.path("mean of two");
        let [a, b, output] = [&a, &b, &output].map(|path| path.to_str().unwrap());
        let base = ["ensemble", "-i", a, b, "-o", output, "--save_npz"];
        place.succeeds(&base);
        for case in &CASES[..2] {
            let ours = read_labels(&Path::new(output).join(format!("{case}.nii.gz"))).unwrap();
            let theirs = read_labels(&fixture("ensemble").join(name).join(format!("mean/{case}.nii.gz"))).unwrap();
            assert!(theirs.data.iter().any(|&label| label > 1));
            assert_eq!(ours.data, theirs.data, "{name} {case}");
            let file = format!("{case}.npz");
            let [mean, first, second] =
                [output, a, b].map(|folder| read_npz_array(&Path::new(folder).join(&file), "probabilities").unwrap());
            assert_eq!(mean, (first + second) / 2.0);
        }
        place.refuses(&base, &["case_0.nii.gz", "case_0.npz", "is there already", "--overwrite"]);
        place.succeeds(&[&base[..], &["--overwrite"]].concat());
        // Probabilities of an earlier mean do not stay beside the segmentations of another.
        let without = &base[..base.len() - 1];
        fs::remove_file(Path::new(output).join("case_0.nii.gz")).unwrap();
        place.refuses(without, &["case_0.npz", "is there already", "--overwrite"]);
        place.succeeds(&[without, &["--overwrite"]].concat());
        assert!(!Path::new(output).join("case_0.npz").exists());
    }
}

#[test]
fn probabilities_that_do_not_fit_are_named() {
    let place = Place::new();
    let member = |name: &str| {
        let folder = place.path(name);
        for case in &CASES[..2] {
            for ending in ["nii.gz", "npz"] {
                let file = format!("{case}.{ending}");
                copy(&fixture("ensemble/labels/a").join(&file), &folder.join(&file));
            }
        }
        folder
    };
    let (a, b) = (member("a"), member("b"));
    let description = fixture("labels/dataset.json");
    let output = place.path("out");
    let [first, second, out, json] = [&a, &b, &output, &description].map(|path| path.to_str().unwrap());
    let base = ["ensemble", "-i", first, second, "-o", out];
    place.refuses(&base, &["no dataset.json", "--dataset-json"]);
    let onto_itself = ["ensemble", "-i", first, second, "-o", first, "--dataset-json", json, "--overwrite"];
    place.refuses(&onto_itself, &["is an input too"]);
    let base = [&base[..], &["--dataset-json", json, "--overwrite"]].concat();
    let file = b.join("case_0.npz");
    let good = read_npz_array(&file, "probabilities").unwrap();

    let mut damaged = good.clone();
    damaged[[0, 0, 0, 0]] = f32::NAN;
    write_npz_array(&file, "probabilities", damaged.view()).unwrap();
    place.refuses(&base, &["case_0.npz", "no number"]);
    write_npz_array(&file, "probabilities", good.slice(ndarray::s![..3, .., .., ..])).unwrap();
    place.refuses(&base, &["case_0.npz", "3 channels", "ask for 4"]);
    write_npz_array(&file, "probabilities", good.slice(ndarray::s![.., 1.., .., ..])).unwrap();
    place.refuses(&base, &["case_0.npz", "[11, 15, 17] instead of [12, 15, 17]"]);
    write_npz_array(&file, "softmax", good.view()).unwrap();
    place.refuses(&base, &["case_0.npz", "probabilities.npy"]);
    assert!(!output.join("case_0.nii.gz").exists() && output.join("case 1 with blanks.nii.gz").is_file());
    fs::remove_file(&file).unwrap();
    place.refuses(&base, &["case_0", "another member has"]);
    fs::remove_file(b.join("case 1 with blanks.npz")).unwrap();
    place.refuses(&base, &["no probabilities (.npz)"]);
}

/// The splits of [`trained`]: cases take turns.
fn write_splits(place: &Place) {
    let of = |fold: usize| -> (Vec<&str>, Vec<&str>) {
        let taken = CASES.iter().enumerate().partition::<Vec<_>, _>(|(number, _)| number % 2 != fold);
        let names = |cases: Vec<(usize, &&'static str)>| cases.into_iter().map(|(_, name)| *name).collect();
        (names(taken.0), names(taken.1))
    };
    let splits: Vec<Value> =
        [0, 1].map(of).into_iter().map(|(train, val)| serde_json::json!({"train": train, "val": val})).collect();
    let file = place.path("preprocessed").join(DATASET).join("splits_final.json");
    fs::write(file, serde_json::to_string(&splits).unwrap()).unwrap();
}

#[test]
fn folds_hold_the_cases_that_the_splits_give_them() {
    let (place, model) = trained();
    let accumulate = ["accumulate-crossval", "901", "-c", "3d_fullres", "-f", "0", "1"];
    let find = ["find-best-configuration", "901", "-c", "3d_fullres", "-f", "0", "1"];
    let said = place.succeeds(&accumulate);
    assert!(said.contains("no splits_final.json"), "{said}");
    write_splits(&place);
    let said = place.succeeds(&accumulate);
    assert!(!said.contains("splits_final.json"), "{said}");
    // One that another split has validated there, and one that is missing.
    let validation = |fold: usize| model.join(format!("fold_{fold}/validation"));
    fs::rename(validation(0).join("case_4.nii.gz"), validation(1).join("case_4.nii.gz")).unwrap();
    fs::remove_file(validation(1).join("病例_5.nii.gz")).unwrap();
    for command in [&accumulate[..], &find[..]] {
        place.refuses(
            command,
            &[
                "3d_fullres",
                "splits_final.json",
                "fold 0 lacks case_4.nii.gz",
                "fold 1 lacks 病例_5.nii.gz",
                "fold 1 holds, of other folds, case_4.nii.gz",
            ],
        );
    }
}

#[test]
fn models_of_different_cases_are_not_compared() {
    let (place, model) = trained();
    let other = model.with_file_name("nnUNetTrainer__nnUNetPlans__3d_lowres");
    copy_folder(&model, &other);
    let find = ["find-best-configuration", "901", "-f", "0", "1", "--disable_ensembling"];
    place.succeeds(&find);
    fs::remove_file(other.join("fold_0/validation/case_0.nii.gz")).unwrap();
    fs::remove_file(model.join("fold_1/validation/case_3.nii.gz")).unwrap();
    place.refuses(
        &find,
        &["3d_lowres has not predicted case_0.nii.gz", "3d_fullres has not predicted case_3.nii.gz", "different cases"],
    );
    place.succeeds(&[&find[..], &["-c", "3d_lowres"]].concat());
}

/// dataset.json may list label maps of any name, in labelsTr too.
#[test]
fn listed_labels_have_any_name() {
    let (place, model) = trained();
    let raw = place.path("raw").join(DATASET);
    let copies = place.path("preprocessed").join(DATASET).join("gt_segmentations");
    let mut listed = serde_json::Map::new();
    for case in CASES {
        let [image, label] = [format!("imagesTr/{case}.nii.gz"), format!("labelsTr/drawn of {case}.nii.gz")];
        for file in [&image, &label] {
            copy(&copies.join(format!("{case}.nii.gz")), &raw.join(file));
        }
        listed.insert(case.into(), serde_json::json!({"images": [image], "label": label}));
    }
    let mut description = json(&model.join("dataset.json"));
    description["dataset"] = listed.into();
    description["numTraining"] = CASES.len().into();
    description["channel_names"] = serde_json::json!({"0": "CT"});
    fs::write(raw.join("dataset.json"), description.to_string()).unwrap();
    let accumulate = ["accumulate-crossval", "901", "-c", "3d_fullres", "-f", "0", "1"];
    let results = model.join("crossval_results_folds_0_1/summary.json");
    let references = || json(&results)["metric_per_case"][1]["reference_file"].as_str().unwrap().to_owned();
    place.succeeds(&accumulate);
    assert!(references().ends_with("gt_segmentations/case_0.nii.gz"), "{}", references());
    fs::remove_dir_all(&copies).unwrap();
    place.succeeds(&accumulate);
    assert!(references().ends_with("labelsTr/drawn of case_0.nii.gz"), "{}", references());
}

/// Two configurations with probabilities of the same two cases.
#[test]
fn the_best_configuration_is_found_and_told() {
    let place = Place::new();
    let results = place.path("results").join(DATASET);
    for (configuration, member) in [("3d_fullres", "a"), ("3d_lowres", "b")] {
        let model = results.join(format!("nnUNetTrainer__nnUNetPlans__{configuration}"));
        for name in ["dataset.json", "plans.json"] {
            copy(&fixture("labels").join(name), &model.join(name));
        }
        for (fold, case) in CASES[..2].iter().enumerate() {
            for ending in ["nii.gz", "npz"] {
                let file = format!("{case}.{ending}");
                let from = fixture("ensemble/labels").join(member).join(&file);
                copy(&from, &model.join(format!("fold_{fold}/validation")).join(&file));
            }
        }
    }
    let references = place.path("preprocessed").join(DATASET).join("gt_segmentations");
    for case in &CASES[..2] {
        let file = format!("{case}.nii.gz");
        copy(&fixture("labels/references").join(&file), &references.join(&file));
    }
    // A network that this program could not predict with.
    fs::create_dir_all(results.join("nnUNetTrainer__nnUNetPlans__2d")).unwrap();
    let find = ["find-best-configuration", "901", "-f", "0", "1"];
    let said = place.succeeds(&find);
    assert!(said.contains("nnUNetTrainer__nnUNetPlans__2d is not compared"), "{said}");
    let found = json(&results.join("inference_information.json"));
    let name = "ensemble___nnUNetTrainer__nnUNetPlans__3d_fullres___nnUNetTrainer__nnUNetPlans__3d_lowres___0_1";
    assert_eq!(found["all_results"].as_object().unwrap().len(), 3);
    // The ensemble's segmentations are those that nnU-Net's would be.
    let ensemble = results.join("ensembles").join(name);
    for case in &CASES[..2] {
        let [ours, theirs] = [ensemble.clone(), fixture("ensemble/labels/mean")]
            .map(|folder| read_labels(&folder.join(format!("{case}.nii.gz"))).unwrap());
        assert_eq!(ours.data, theirs.data);
    }
    let scored = json(&ensemble.join("summary.json"))["foreground_mean"]["Dice"].clone();
    assert_eq!(found["all_results"][name], scored);
    // Both single models have the same segmentations: the first of them wins over the noise of the ensemble.
    let best = &found["best_model_or_ensemble"];
    assert_eq!(best["selected_model_or_models"][0]["configuration"], "3d_fullres");
    assert_eq!(found["folds"], serde_json::json!([0, 1]));
    let instructions = fs::read_to_string(results.join("inference_instructions.txt")).unwrap();
    // They are followed in `device::best`.
    let model = results.join("nnUNetTrainer__nnUNetPlans__3d_fullres");
    for words in [&format!("voxgrad predict -m {} -f 0 1 -i", model.display()), "voxgrad apply-postprocessing -i"] {
        assert!(instructions.contains(words), "{instructions}");
    }
    let file = best["postprocessing_file"].as_str().unwrap();
    assert!(Path::new(file).is_file() && Path::new(file).with_extension("json").is_file());

    // Again, over what is there; without probabilities there is no ensemble, which is said.
    fs::remove_file(results.join("nnUNetTrainer__nnUNetPlans__3d_lowres/fold_1/validation/case 1 with blanks.npz"))
        .unwrap();
    let said = place.succeeds(&find);
    assert!(said.contains("3d_lowres has no probabilities (.npz) of all folds"), "{said}");
    place.succeeds(&[&find[..], &["--disable_ensembling", "-c", "3d_lowres"]].concat());
    place.refuses(
        &[&find[..], &["-c", "3d_fullres", "3d_huge", "-tr", "Nobody"]].concat(),
        &["-c 3d_huge", "-tr Nobody"],
    );
    place.refuses(&[&find[..], &["-c", "2d"]].concat(), &["does not predict with 2-D networks"]);
    place.refuses(&[&find[..], &["--no_overwrite"]].concat(), &["always made anew"]);
    place.refuses(&["find-best-configuration", "901"], &["fold 2, 3, 4"]);
}
