//! From a raw dataset to preprocessed cases on the command line, against nnU-Net's own files, and what bad input gets.

use crate::common::place::{Place, assert_same, copy_folder, json, text};
use crate::common::{data, npz, phantom};
use ndarray::{Array3, Ix4, s};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;
use voxgrad::dataset::plans::Plans;
use voxgrad::io::{self, Geometry};
use voxgrad::preprocess::StoredCase;

/// Both reference datasets by number, each as nnU-Net planned and preprocessed it.
#[test]
fn plan_and_preprocess_gives_what_nnunet_gives() {
    let place = Place::new();
    let names = [("brats_regions", "Dataset101_Regions"), ("brats_labels_anisotropic", "Dataset102_Anisotropic")];
    let references = names.map(|(reference, name)| {
        let mut planned = json(&data(reference).join("preprocessed/nnUNetPlans_as_planned.json"));
        planned["dataset_name"] = name.into();
        copy_folder(&data(reference).join("raw"), &place.path("raw").join(name));
        (reference, name, planned)
    });
    let arguments = ["plan-and-preprocess", "-d", "101", "102", "-np", "2", "--compat", "nnunet"];
    let said = place.succeeds(&[&arguments[..], &["--verify_dataset_integrity"]].concat());
    assert!(said.contains("10 cases, nothing wrong") && said.contains("annotated"), "{said}");
    for (reference, name, planned) in &references {
        let folder = place.path("preprocessed").join(name);
        let expected = data(reference).join("preprocessed");
        let plans = json(&folder.join("nnUNetPlans.json"));
        assert_same(&plans, planned, 1e-5, reference);
        for file in ["dataset_fingerprint.json", "dataset.json"] {
            assert_same(&json(&folder.join(file)), &json(&expected.join(file)), 1e-5, file);
        }
        assert_eq!(
            fs::read(folder.join("splits_final.json")).unwrap(),
            fs::read(expected.join("splits_final.json")).unwrap(),
            "{reference}"
        );
        let labels = |folder: PathBuf| fs::read_dir(folder).unwrap().count();
        assert_eq!(labels(folder.join("gt_segmentations")), 10);
        assert_eq!(labels(folder.join("voxgrad/nnUNetPlans_3d_fullres")), 10, "ten cases and nothing else");
        for case in ["case_000", "case_001"] {
            let found = StoredCase::open(&folder.join(format!("voxgrad/nnUNetPlans_3d_fullres/{case}.vxg"))).unwrap();
            let found = found.read().unwrap();
            let archive = expected.join(format!("{case}.npz"));
            let data = npz::read(&archive, "data").into_dimensionality::<Ix4>().unwrap();
            let seg = npz::read(&archive, "seg").into_dimensionality::<Ix4>().unwrap();
            assert_eq!(found.data.dim(), data.dim());
            let pairs = found.data.iter().zip(&data);
            let worst = pairs.map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
            assert!(worst < 1e-4, "{reference} {case}: largest difference {worst}");
            assert_eq!(found.seg, seg.slice(s![0, .., .., ..]).mapv(|v| v as i16), "{reference} {case}");
        }
    }

    // Planning again needs no images, keeps what somebody added, and follows its options.
    let name = references[0].1;
    let folder = place.path("preprocessed").join(name);
    let file = folder.join("nnUNetPlans.json");
    let mut edited = json(&file);
    edited["configurations"]["mine"] = serde_json::json!({"inherits_from": "3d_fullres", "batch_size": 7});
    fs::write(&file, edited.to_string()).unwrap();
    let said = place.succeeds(&["plan", "-d", name, "--memory"]);
    assert!(said.contains("3d_fullres: a training step on 2 patches") && said.contains("f16: "), "{said}");
    assert_eq!(Plans::read(&file).unwrap().configuration("mine").unwrap().batch_size, 7);
    let options = ["-overwrite_target_spacing", "2", "2.5", "3", "-overwrite_plans_name", "coarse"];
    place.succeeds(&[&["plan", "-d", name], &options[..]].concat());
    let coarse = Plans::read(&folder.join("coarse.json")).unwrap();
    assert_eq!(coarse.plans_name, "coarse");
    let mut spacing = coarse.configuration("3d_fullres").unwrap().spacing;
    spacing.sort_by(f64::total_cmp);
    assert_eq!(spacing, [2.0, 2.5, 3.0]);
    place.succeeds(&["plan", "-d", name, "-pl", "nnUNetPlannerResEncM", "-gpu_memory_target", "8"]);
    assert!(folder.join("nnUNetResEncUNetMPlans.json").exists());
    place.refuses(&["plan", "-d", name, "-pl", "MyPlanner"], &["MyPlanner", "nnUNetPlannerResEncL"]);
    place.refuses(&["plan", "-d", name, "-gpu_memory_target", "0"], &["gpu-memory-target"]);
}

fn modified(path: &Path) -> SystemTime {
    fs::metadata(path).unwrap().modified().unwrap()
}

#[test]
fn an_interrupted_run_goes_on_where_it_stopped() {
    let place = Place::with_spheres("Dataset007_Spheres", 4);
    let said = place.succeeds(&["preprocess", "-d", "7"]);
    assert!(said.contains("4 cases (0 of them from an earlier run)"), "{said}");
    assert!(said.contains("patch [8, 8, 8], batch 2, spacing [1.0, 1.0, 1.0]"), "{said}");
    // Every fourth slice is annotated.
    assert!(said.contains("25.000"), "{said}");
    let folder = place.path("preprocessed/Dataset007_Spheres/voxgrad/nnUNetPlans_3d_fullres");
    let file = |case: usize| folder.join(format!("case_{case:03}.vxg"));
    let whole: Vec<Vec<u8>> = (0..4).map(|case| fs::read(file(case)).unwrap()).collect();
    let times: Vec<SystemTime> = (0..4).map(|case| modified(&file(case))).collect();

    // One was never begun, one was cut short, and of one the labels have been corrected since.
    fs::remove_file(file(0)).unwrap();
    fs::write(file(1), &whole[1][..whole[1].len() - 1]).unwrap();
    let raw = place.path("raw/Dataset007_Spheres");
    let labels = Array3::from_elem((16, 16, 16), phantom::IGNORE);
    io::write_labels(&phantom::label_path(&raw, 2), labels.view(), &Geometry::new([1.0; 3])).unwrap();
    let said = place.succeeds(&["preprocess", "-d", "Dataset007_Spheres"]);
    assert!(said.contains("4 cases (1 of them from an earlier run)"), "{said}");
    assert!(said.contains("case case_002 has no annotated voxel"), "{said}");
    assert_eq!(fs::read(file(0)).unwrap(), whole[0]);
    assert_eq!(fs::read(file(1)).unwrap(), whole[1]);
    assert_eq!(modified(&file(3)), times[3]);

    // Other settings: nothing of it can be used again. --clean: nothing is.
    let plans = place.path("preprocessed/Dataset007_Spheres/nnUNetPlans.json");
    let mut changed = json(&plans);
    changed["configurations"]["3d_fullres"]["spacing"] = serde_json::json!([2.0, 1.0, 1.0]);
    fs::write(&plans, changed.to_string()).unwrap();
    let again = |extra: &[&str]| place.succeeds(&[&["preprocess", "-d", "7"], extra].concat());
    assert!(again(&[]).contains("(0 of them"));
    assert_eq!(StoredCase::open(&file(3)).unwrap().shape(), [8, 16, 16]);
    assert!(again(&[]).contains("(4 of them"));
    assert!(again(&["--clean"]).contains("(0 of them"));
}

#[test]
fn classes_and_background_without_annotation_are_named() {
    let place = Place::with_spheres("Dataset007_Spheres", 2);
    let raw = place.path("raw/Dataset007_Spheres");
    let fill = |value: u8| {
        for case in 0..2 {
            let labels = Array3::from_shape_fn((16, 16, 16), |(z, _, _)| if z == 3 { value } else { phantom::IGNORE });
            io::write_labels(&phantom::label_path(&raw, case), labels.view(), &Geometry::new([1.0; 3])).unwrap();
        }
        place.succeeds(&["preprocess", "-d", "7"])
    };
    assert!(fill(1).contains("background is never annotated"));
    assert!(fill(0).contains("class sphere is never annotated"));
}

#[test]
fn datasets_by_number_name_and_path() {
    let place = Place::with_spheres("Dataset007_Spheres", 1);
    fs::create_dir(place.path("results/Dataset008_Other")).unwrap();
    let path = place.path("raw/Dataset007_Spheres");
    for wanted in ["7", "007", "Dataset007_Spheres", path.to_str().unwrap()] {
        assert!(place.succeeds(&["verify", "-d", wanted]).contains("1 cases, nothing wrong"));
    }
    place.refuses(&["verify", "-d", "9"], &["no dataset `9`", "Dataset007_Spheres", "Dataset008_Other"]);
    place.refuses(&["verify", "-d", "/not/there"], &["/not/there"]);
    fs::create_dir(place.path("preprocessed/Dataset007_Copy")).unwrap();
    place.refuses(&["verify", "-d", "7"], &["Dataset007_Copy", "Dataset007_Spheres", "whole name"]);
    // Options win over the environment; without either, the error says what to set.
    let elsewhere = place.path("elsewhere");
    place.refuses(&["verify", "-d", "7", "--raw", elsewhere.to_str().unwrap()], &["Dataset007_Copy"]);
    let result = Command::new(env!("CARGO_BIN_EXE_voxgrad"))
        .args(["preprocess", "-d", path.to_str().unwrap()])
        .env_remove("nnUNet_preprocessed")
        .output()
        .unwrap();
    assert!(text(&result.stderr).contains("set the environment variable nnUNet_preprocessed"));
}

/// One run names every file that is wrong, each with its own cause.
#[test]
fn verify_reports_everything_at_once() {
    let place = Place::with_spheres("Dataset007_Spheres", 6);
    let raw = place.path("raw/Dataset007_Spheres");
    let (image, label) = (|case| phantom::image_path(&raw, case), |case| phantom::label_path(&raw, case));
    let cube = |value: u8, side: usize| Array3::from_elem((side, side, side), value);
    let write = |path: &Path, volume: Array3<u8>, spacing: f64| {
        io::write_labels(path, volume.view(), &Geometry::new([spacing; 3])).unwrap();
    };
    write(&label(0), cube(9, 16), 1.0);
    write(&label(1), cube(0, 5), 1.0);
    write(&label(2), cube(0, 16), 2.0);
    fs::remove_file(label(3)).unwrap();
    let bytes = fs::read(image(4)).unwrap();
    fs::write(image(4), &bytes[..bytes.len() / 2]).unwrap();
    fs::write(label(4), b"no image").unwrap();
    fs::copy(image(5), raw.join("imagesTr/case_005_0001.nii.gz")).unwrap();
    let mut description = json(&raw.join("dataset.json"));
    description["numTraining"] = serde_json::json!(8);
    fs::write(raw.join("dataset.json"), description.to_string()).unwrap();
    let said = place.refuses(&["verify", "-d", "7"], &["case_000.nii.gz holds label 9", "declares [0, 1, 2]"]);
    for words in [
        "case_001.nii.gz has shape [5, 5, 5]",
        "case_002.nii.gz has spacing [2.0, 2.0, 2.0]",
        "case case_003: no label file",
        "case_004_0000.nii.gz",
        "case_004.nii.gz",
        "case_005_0001.nii.gz is a channel beyond",
        "case_005_0001.nii.gz becomes case_005_0001_0000.nii.gz",
        "`numTraining` is 8 but 6",
    ] {
        assert!(said.contains(words), "no `{words}` in: {said}");
    }
    assert_eq!(said.lines().filter(|line| line.starts_with("Dataset007_Spheres: ")).count(), 8, "{said}");
    // Preprocessing stops at the same dataset, and says where to find the list.
    place.refuses(&["preprocess", "-d", "7"], &["voxgrad verify"]);
}

#[test]
fn one_bad_case_does_not_stop_the_others() {
    let place = Place::with_spheres("Dataset007_Spheres", 3);
    let image = phantom::image_path(&place.path("raw/Dataset007_Spheres"), 1);
    // Beyond the header, which is looked at before any work begins.
    let bytes = fs::read(&image).unwrap();
    fs::write(&image, &bytes[..bytes.len() * 3 / 4]).unwrap();
    place.refuses(&["preprocess", "-d", "7"], &["case_001_0000.nii.gz", "1 cases could not be preprocessed"]);
    let folder = place.path("preprocessed/Dataset007_Spheres/voxgrad/nnUNetPlans_3d_fullres");
    assert!(folder.join("case_000.vxg").exists() && folder.join("case_002.vxg").exists());
    assert!(!folder.join("case_001.vxg").exists());
}

#[test]
fn what_is_not_supported_says_so() {
    let place = Place::with_spheres("Dataset007_Spheres", 1);
    place.refuses(&["preprocess", "-d", "7", "-c", "2d"], &["2d is not supported", "3d_fullres"]);
    place.refuses(&["preprocess", "-d", "7", "-c", "3d_huge"], &["3d_huge", "3d_fullres"]);
    place.refuses(&["preprocess", "-d", "7", "--plans-name", "other"], &["other.json", "voxgrad plan"]);
    place.refuses(&["plan", "-d", "7"], &["dataset_fingerprint.json", "voxgrad fingerprint"]);
    let raw = place.path("raw/Dataset007_Spheres/dataset.json");
    let mut description = json(&raw);
    description["file_ending"] = serde_json::json!(".nrrd");
    fs::write(&raw, description.to_string()).unwrap();
    place.refuses(&["verify", "-d", "7"], &[".nii.gz", "file_ending"]);
}

/// Training by number reads the stored cases: they are all that says so once their settings are no longer the plans'.
#[test]
fn training_takes_a_prepared_dataset() {
    let place = Place::with_spheres("Dataset007_Spheres", 2);
    place.succeeds(&["preprocess", "-d", "7"]);
    let output = place.path("results/run");
    let small = ["--fold", "all", "--epochs", "1", "--iterations", "1", "--validation-iterations", "1"];
    let rest = ["-o", output.to_str().unwrap(), "--device", "cpu", "--disable-tta"];
    let arguments = [&["train", "-d", "7"], &small[..], &rest].concat();
    let prepared = place.path("preprocessed/Dataset007_Spheres");
    let plans = fs::read(prepared.join("nnUNetPlans.json")).unwrap();
    let mut changed = json(&prepared.join("nnUNetPlans.json"));
    changed["configurations"]["3d_fullres"]["spacing"] = serde_json::json!([2.0, 1.0, 1.0]);
    fs::write(prepared.join("nnUNetPlans.json"), changed.to_string()).unwrap();
    place.refuses(&arguments, &["case_000, case_001 made with other settings", "voxgrad preprocess"]);
    fs::write(prepared.join("nnUNetPlans.json"), plans).unwrap();
    place.succeeds(&arguments);
    assert!(output.join("checkpoint_final.safetensors").exists());
    place.refuses(&[&["train"], &small[..], &rest].concat(), &["<DATASET>"]);
}

#[test]
fn nnunets_class_names_and_flags() {
    let place = Place::with_spheres("Dataset007_Spheres", 1);
    let known = ["-fpe", "DatasetFingerprintExtractor", "--verbose", "--no_pbar"];
    let said = place.succeeds(&[&["fingerprint", "-d", "7"], &known[..]].concat());
    assert!(said.contains("measured case_000"), "{said}");
    place.succeeds(&["plan", "-d", "7", "-preprocessor_name", "DefaultPreprocessor", "-overwrite_plans_name", "mine"]);
    let both = ["plan-and-preprocess", "-d", "7"];
    let refused = |flag: &str, expected: &str| {
        place.refuses(&[&both[..], &[flag, "Mine"]].concat(), &["Mine", expected]);
    };
    refused("-fpe", "DatasetFingerprintExtractor");
    refused("-preprocessor_name", "DefaultPreprocessor");
}

/// Without -o, results lie where nnU-Net has them; the patches come from the preprocessed case on disk.
#[test]
fn training_by_number_writes_nnunets_layout() {
    let place = Place::with_spheres("Dataset007_Spheres", 2);
    place.succeeds(&["preprocess", "-d", "7"]);
    let short = ["--device", "cpu", "--epochs", "1", "--iterations", "2", "--validation-iterations", "1"];
    let train = [&["train", "-d", "7", "-f", "all", "--disable_tta"], &short[..]].concat();
    place.succeeds(&train);
    let folder = place.path("results/Dataset007_Spheres/voxgradTrainer__nnUNetPlans__3d_fullres");
    for file in ["plans.json", "dataset.json", "fold_all/checkpoint_final.safetensors", "fold_all/progress.png"] {
        assert!(folder.join(file).is_file(), "no {file}");
    }
    assert!(folder.join("fold_all/validation/summary.json").is_file());
    assert_eq!(json(&folder.join("plans.json")), json(&place.path("preprocessed/Dataset007_Spheres/nnUNetPlans.json")));
    place.refuses(&train, &["checkpoint_final", "--continue"]);
    place.succeeds(&[&train[..], &["--c"]].concat());

    // Plans by name, of another name.
    let plans = place.path("preprocessed/Dataset007_Spheres/nnUNetPlans.json");
    let mut other = json(&plans);
    other["plans_name"] = "other".into();
    fs::write(plans.with_file_name("other.json"), other.to_string()).unwrap();
    place.succeeds(&[&train[..], &["-p", "other"]].concat());
    let folder = place.path("results/Dataset007_Spheres/voxgradTrainer__other__3d_fullres/fold_all");
    assert!(folder.join("checkpoint_final.safetensors").is_file());
    let result = Command::new(env!("CARGO_BIN_EXE_voxgrad"))
        .args(["train", "-d", "7"])
        .env("nnUNet_raw", place.path("raw"))
        .env("nnUNet_preprocessed", place.path("preprocessed"))
        .env_remove("nnUNet_results")
        .output()
        .unwrap();
    assert!(text(&result.stderr).contains("nnUNet_results"), "{}", text(&result.stderr));
}

/// Cases that nnU-Net has preprocessed are trained on as they are; damage to one shows that they are read.
#[test]
fn training_reads_nnunets_preprocessed_cases() {
    let place = Place::with_spheres("Dataset007_Spheres", 1);
    let folder = place.path("preprocessed/Dataset007_Spheres/nnUNetPlans_3d_fullres");
    fs::create_dir(&folder).unwrap();
    for (from, to) in [("one_channel", "case_000"), ("one_channel_seg", "case_000_seg")] {
        fs::copy(data("b2nd").join(format!("{from}.b2nd")), folder.join(format!("{to}.b2nd"))).unwrap();
    }
    let short = ["--device", "cpu", "--epochs", "1", "--iterations", "1", "--validation-iterations", "1"];
    let train = [&["train", "-d", "7", "-f", "all", "--disable_tta"], &short[..]].concat();
    place.succeeds(&train);
    fs::write(folder.join("case_000.b2nd"), "damaged").unwrap();
    fs::remove_dir_all(place.path("results/Dataset007_Spheres")).unwrap();
    place.refuses(&train, &["case_000.b2nd", "not a Blosc2 frame"]);
}
