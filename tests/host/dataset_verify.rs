//! What is found in a dataset before any work begins: headers, labels, regions, folds.

use crate::common::data;
use crate::common::six_cases::{IGNORE, Place, SIDE, labels};
use ndarray::Array3;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use voxgrad::dataset::{Dataset, DatasetJson, LabelManager, splits};
use voxgrad::error::{DatasetError, FileError};
use voxgrad::plan::fingerprint::Fingerprint;
use voxgrad::plan::verify;
use voxgrad::{Compat, Error};

fn put_f32(bytes: &mut [u8], at: usize, values: &[f32]) {
    for (index, value) in values.iter().enumerate() {
        bytes[at + 4 * index..at + 4 * index + 4].copy_from_slice(&value.to_le_bytes());
    }
}

fn put_i16(bytes: &mut [u8], at: usize, value: i16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

// Places of fields in the header.
const QFORM_CODE: usize = 252;
const QOFFSET: usize = 268;
const SFORM: usize = 280;
const PIXDIM: usize = 76;
const UNITS: usize = 123;

#[test]
fn nothing_is_wrong_with_a_good_dataset() {
    let place = Place::new();
    let found = place.verify();
    assert!(found.failures.is_empty() && found.warnings.is_empty(), "{found:?}");
    assert_eq!((found.sound, found.annotations.len()), (6, 6));
    let counts = &found.annotations[2].label_counts;
    assert_eq!(counts[&1], 4 * 8 * 16);
    let quick = verify::quick(place.0.path()).unwrap();
    assert!(quick.annotations.is_empty());
    assert_eq!(quick.passed().unwrap().0.case_names().len(), 6);
}

fn json(fields: &str) -> voxgrad::Result<DatasetJson> {
    let text = format!(r#"{{"channel_names": {{"0": "MR"}}, "numTraining": 1, "file_ending": ".nii.gz", {fields}}}"#);
    DatasetJson::parse(Path::new("dataset.json"), &text)
}

#[test]
fn reversed_labels_are_turned_round() {
    let error = json(r#""labels": {"0": "background", "1": "left \"a\"", "10": "b"}"#).unwrap_err();
    let Error::Dataset(DatasetError::LabelsReversed { corrected, .. }) = &error else { panic!("{error}") };
    let expected = "\"labels\": {\n    \"background\": 0,\n    \"left \\\"a\\\"\": 1,\n    \"b\": 10\n}";
    assert_eq!(corrected, expected);
    assert!(serde_json::from_str::<serde_json::Value>(&format!("{{{corrected}}}")).is_ok());
    // Names may be numbers.
    assert!(json(r#""labels": {"background": 0, "1": 1}"#).is_ok());
}

#[test]
fn an_ignore_label_of_255_comes_with_its_remedy() {
    let described = json(r#""labels": {"background": 0, "a": 1, "b": 2, "ignore": 255}"#).unwrap();
    let error = LabelManager::new(&described).unwrap_err().to_string();
    assert!(error.contains("it must be 3") && error.contains("d[d == 255] = 3"), "{error}");
}

#[test]
fn all_wrong_fields_are_named_at_once() {
    let error = DatasetJson::parse(Path::new("d.json"), r#"{"labels": {"background": 0}}"#).unwrap_err().to_string();
    for field in ["channel_names", "numTraining", "file_ending"] {
        assert!(error.contains(field), "{error}");
    }
}

#[test]
fn labels_that_regions_never_write_are_told() {
    let manager = |fields: &str| LabelManager::new(&json(fields).unwrap()).unwrap();
    let lost =
        manager(r#""labels": {"background": 0, "a": 1, "b": [2, 4], "c": [3, 4]}, "regions_class_order": [1, 2, 3]"#);
    let warnings = lost.region_warnings();
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains("label 4 can never come out") && warnings[0].contains("region c"), "{warnings:?}");
    let written: Vec<String> = lost.written_regions().iter().map(|(n, g, v)| format!("{n} {g} -> {v}")).collect();
    assert_eq!(written, ["a 1 -> 1", "b (2, 4) -> 2", "c (3, 4) -> 3"]);
    let brats = r#""labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3}"#;
    assert!(manager(&format!("{brats}, \"regions_class_order\": [1, 2, 3]")).region_warnings().is_empty());
    let swapped = manager(&format!("{brats}, \"regions_class_order\": [1, 3, 2]")).region_warnings();
    assert_eq!(swapped.len(), 2, "{swapped:?}");
    let undeclared = manager(&format!("{brats}, \"regions_class_order\": [1, 2, 9]")).region_warnings();
    assert!(undeclared.iter().any(|warning| warning.contains("writes 9")), "{undeclared:?}");
}

#[test]
fn an_image_in_the_place_of_a_label_looks_like_one() {
    let place = Place::new();
    let bright = Array3::from_shape_fn((SIDE, SIDE, SIDE), |(z, y, x)| ((z * 31 + y * 7 + x * 3) % 200) as u8 + 50);
    place.write("labelsTr/c_0.nii.gz", &bright);
    // The same as floats with fractions.
    place.patch("labelsTr/c_1.nii.gz", |bytes| {
        put_i16(bytes, 70, 16);
        put_i16(bytes, 72, 32);
        bytes.truncate(352);
        let values: Vec<u8> = bright.iter().flat_map(|&v| (f32::from(v) + 0.25).to_le_bytes()).collect();
        bytes.extend(values);
    });
    let mut labels = labels();
    labels[[0, 0, 1]] = 9;
    labels[[3, 0, 1]] = 9;
    labels[[5, 0, 1]] = 7;
    place.write("labelsTr/c_2.nii.gz", &labels);
    let said: Vec<String> = place.failures().iter().map(Error::to_string).collect();
    assert_eq!(said.len(), 3, "{said:#?}");
    assert!(said[0].contains("200 distinct values from 50 to 249: it looks like an image"), "{}", said[0]);
    assert!(said[1].contains("200 distinct values from 50.25 to 249.25: it looks like an image"), "{}", said[1]);
    assert!(said[1].contains("in 4096 voxels"), "{}", said[1]);
    assert!(said[2].contains("7 (1 voxels), 9 (2 voxels)"), "{}", said[2]);
}

#[test]
fn sheared_grids_are_refused_with_their_angle() {
    let sheared = |shear: f32, qform: i16| {
        let place = Place::new();
        for name in ["imagesTr/c_0_0000.nii.gz", "labelsTr/c_0.nii.gz"] {
            place.patch(name, |bytes| {
                put_f32(bytes, SFORM + 4, &[shear]);
                put_i16(bytes, QFORM_CODE, qform);
            });
        }
        place.verify()
    };
    assert!(sheared(1e-3, 0).failures.is_empty());
    let found = sheared(0.2, 0).failures;
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(matches!(found[0], Error::File(FileError::NiftiShear { axes: "x and y", .. })), "{}", found[0]);
    assert!(
        found[0].to_string().contains("78.69 degrees") && found[0].to_string().contains("resample"),
        "{}",
        found[0]
    );
    // With a qform, which cannot shear, that one is used, as SimpleITK does.
    let with_qform = sheared(0.2, 1);
    assert!(with_qform.failures.is_empty(), "{:?}", with_qform.failures);
    assert!(with_qform.warnings[0].contains("the qform is used"), "{:?}", with_qform.warnings);
}

#[test]
fn contradictory_headers_are_told_with_what_is_used() {
    let place = Place::new();
    place.patch("imagesTr/c_0_0000.nii.gz", |bytes| put_f32(bytes, SFORM, &[10.0]));
    place.patch("imagesTr/c_1_0000.nii.gz", |bytes| {
        put_i16(bytes, QFORM_CODE, 1);
        put_f32(bytes, QOFFSET, &[5.0]);
    });
    let plain = place.path("imagesTr/c_2_0000.nii.gz");
    let mut bytes = Vec::new();
    flate2::read::MultiGzDecoder::new(fs::File::open(&plain).unwrap()).read_to_end(&mut bytes).unwrap();
    fs::write(&plain, bytes).unwrap();
    let found = place.verify();
    assert!(found.failures.is_empty(), "{:?}", found.failures);
    let told = |words: &[&str]| found.warnings.iter().any(|warning| words.iter().all(|word| warning.contains(word)));
    assert!(told(&["c_0_0000", "[1.0, 1.0, 10.0]", "pixdim is used"]), "{:?}", found.warnings);
    assert!(told(&["c_1_0000", "5.00 mm apart", "the sform is used"]), "{:?}", found.warnings);
    assert!(told(&["c_2_0000.nii.gz: not compressed"]), "{:?}", found.warnings);
}

/// Micrometres beside millimetres are the same place; fifty millimetres in metres are another.
#[test]
fn units_count_where_grids_are_compared() {
    let place = Place::new();
    place.patch("imagesTr/c_0_0000.nii.gz", |bytes| {
        bytes[UNITS] = 3;
        put_f32(bytes, PIXDIM + 4, &[1000.0; 3]);
        for axis in 0..3 {
            put_f32(bytes, SFORM + 20 * axis, &[1000.0]);
        }
    });
    let found = place.verify();
    assert!(found.failures.is_empty() && found.warnings.is_empty(), "{found:?}");
    for (name, shift) in [("imagesTr/c_1_0000.nii.gz", 0.05), ("labelsTr/c_1.nii.gz", 0.0)] {
        place.patch(name, |bytes| {
            bytes[UNITS] = 1;
            put_f32(bytes, PIXDIM + 4, &[0.001; 3]);
            for axis in 0..3 {
                put_f32(bytes, SFORM + 20 * axis, &[0.001]);
            }
            put_f32(bytes, SFORM + 12, &[shift]);
        });
    }
    let found = place.verify();
    assert!(found.failures.is_empty(), "{:?}", found.failures);
    assert!(found.warnings.len() == 1 && found.warnings[0].contains("case c_1"), "{:?}", found.warnings);
}

/// One slice is 2-D in whichever direction it lies.
#[test]
fn single_slices_are_refused_in_every_direction() {
    for shape in [(1, 32, 32), (32, 1, 32), (32, 32, 1)] {
        let place = Place::new();
        for case in 0..6 {
            let volume = Array3::from_shape_fn(shape, |(z, y, x)| ((z + y + x) % 3) as u8);
            place.write(&format!("imagesTr/c_{case}_0000.nii.gz"), &volume);
            place.write(&format!("labelsTr/c_{case}.nii.gz"), &volume);
        }
        let failures = verify::quick(place.0.path()).unwrap().failures;
        let [Error::Dataset(DatasetError::TwoDimensional { shape: median, .. })] = failures.as_slice() else {
            panic!("{failures:?}")
        };
        assert_eq!(*median, <[usize; 3]>::from(shape));
    }
    // One such case among others is a thin volume.
    let place = Place::new();
    for name in ["imagesTr/c_0_0000.nii.gz", "labelsTr/c_0.nii.gz"] {
        place.write(name, &Array3::from_elem((1, SIDE, SIDE), 1));
    }
    assert!(place.failures().is_empty());
}

/// Headers tell much, but not what lies behind them.
#[test]
fn a_quick_look_reads_headers_only() {
    let place = Place::new();
    place.write("labelsTr/c_0.nii.gz", &Array3::zeros((SIDE, SIDE, SIDE - 1)));
    place.write("labelsTr/c_1.nii.gz", &Array3::from_elem((SIDE, SIDE, SIDE), 77));
    fs::write(place.path("imagesTr/c_2_0000.nii.gz"), "").unwrap();
    fs::write(place.path("imagesTr/c_3_0000.nii.gz"), "no image").unwrap();
    let quick = verify::quick(place.0.path()).unwrap();
    assert_eq!((quick.failures.len(), quick.sound), (3, 3), "{:?}", quick.failures);
    assert!(quick.passed().unwrap_err().to_string().starts_with("3 faults:"));
    let whole = place.verify();
    assert_eq!((whole.failures.len(), whole.sound), (4, 2), "{:?}", whole.failures);
}

#[test]
fn classes_that_a_fold_lacks_are_named() {
    let place = Place::new();
    // b is in c_0 only.
    for case in 1..6 {
        place.write(&format!("labelsTr/c_{case}.nii.gz"), &labels().mapv(|label| if label == 2 { 1 } else { label }));
    }
    let found = place.verify();
    let folds = splits::k_fold(&found.dataset.case_names()).unwrap();
    let home = folds.iter().position(|fold| fold.val.contains(&"c_0".to_owned())).unwrap();
    let warnings = verify::fold_warnings(&folds, &found.annotations, &found.dataset.labels);
    let others: Vec<String> = (0..5).filter(|&fold| fold != home).map(|fold| fold.to_string()).collect();
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(warnings[0].contains(&format!("class b is in no training case of fold {home}:")), "{warnings:?}");
    assert!(warnings[1].contains(&format!("no validation case of fold {}:", others.join(", "))), "{warnings:?}");
}

fn voxgrad(place: &Place, verb: &str, arguments: &[&str]) -> (Option<i32>, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_voxgrad"))
        .args([verb, "-d", place.0.path().to_str().unwrap()])
        .args(arguments)
        .env_remove("nnUNet_preprocessed")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout) + &text(&output.stderr))
}

#[test]
fn verify_shows_what_is_annotated_and_by_which_folds() {
    let place = Place::new();
    // The only validation case of fold 1.
    place.write("labelsTr/c_4.nii.gz", &Array3::from_elem((SIDE, SIDE, SIDE), IGNORE));
    let (code, said) = voxgrad(&place, "verify", &["-np", "1"]);
    assert_eq!(code, Some(0), "{said}");
    for words in ["% of voxels", "case c_4 has no annotated voxel", "nnU-Net's five", "6 cases, nothing wrong"] {
        assert!(said.contains(words), "no `{words}` in: {said}");
    }
    assert!(said.contains("class a is in no validation case of fold 1:"), "{said}");
    // Splits that are there count instead.
    let all = r#"{"train": ["c_0", "c_1", "c_2", "c_3"], "val": ["c_4", "c_5"]}"#;
    fs::write(place.path("splits_final.json"), format!("[{all}]")).unwrap();
    let (_, said) = voxgrad(&place, "verify", &[]);
    assert!(said.contains("folds: those of") && !said.contains("in no validation case"), "{said}");
    fs::write(place.path("splits_final.json"), "[{").unwrap();
    let (code, said) = voxgrad(&place, "verify", &[]);
    assert!(code == Some(2) && said.contains("splits_final.json: not valid JSON"), "{said}");
}

#[test]
fn verify_counts_sound_cases_and_says_what_regions_become() {
    let place = Place::new();
    place.describe(
        r#""labels": {"background": 0, "all": [1, 2], "b": 2, "ignore": 3}, "regions_class_order": [1, 2], "numTraining": 6"#,
    );
    place.write("labelsTr/c_0.nii.gz", &Array3::from_elem((SIDE, SIDE, SIDE), 9));
    let (code, said) = voxgrad(&place, "verify", &[]);
    assert_eq!(code, Some(2), "{said}");
    for words in ["all (1, 2) -> 1", "b 2 -> 2", "1 failures; 5 of 6 cases have nothing wrong"] {
        assert!(said.contains(words), "no `{words}` in: {said}");
    }
    fs::remove_dir_all(place.path("imagesTr")).unwrap();
    let (_, said) = voxgrad(&place, "fingerprint", &["--preprocessed", place.path("p").to_str().unwrap()]);
    assert_eq!(said.matches("No such file").count(), 1, "the cause is told twice: {said}");
}

/// What only preprocessing would find is found before.
#[test]
fn what_preprocessing_would_refuse() {
    let place = Place::new();
    let fields = r#""labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}, "numTraining": 6"#;
    let text = |extra: &str| {
        format!(r#"{{"channel_names": {{"0": "rgb_to_0_1"}}, "file_ending": ".nii.gz", {fields}{extra}}}"#)
    };
    fs::write(place.path("dataset.json"), text("")).unwrap();
    assert!(place.failures().is_empty());
    // Slope 2: the brightest voxels hold 400.
    place.patch("imagesTr/c_1_0000.nii.gz", |bytes| put_f32(bytes, 112, &[2.0]));
    let failures = place.failures();
    assert!(
        matches!(failures.as_slice(), [Error::Dataset(DatasetError::NotRgbImage { channel: 0, .. })]),
        "{failures:?}"
    );
    fs::write(place.path("dataset.json"), text(r#", "overwrite_image_reader_writer": "NibabelIOWithReorient""#))
        .unwrap();
    let error = verify::quick(place.0.path()).unwrap_err().to_string();
    assert!(error.contains("overwrite_image_reader_writer") && error.contains("NibabelIOWithReorient"), "{error}");

    let empty = Place::new();
    for case in 0..6 {
        empty.write(&format!("labelsTr/c_{case}.nii.gz"), &labels().mapv(|label| if label == 3 { 3 } else { 0 }));
    }
    let failures = empty.failures();
    assert!(
        matches!(failures.as_slice(), [Error::Dataset(DatasetError::NothingAnnotated { cases: 6, .. })]),
        "{failures:?}"
    );
}

/// No more cases are open than there are workers, even where the work on a case is itself parallel.
#[test]
fn workers_bound_the_cases_in_memory() {
    let place = Place::new();
    let dataset = Dataset::open(place.0.path()).unwrap();
    let (open, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let hold = |_: &str| {
        use rayon::prelude::*;
        most.fetch_max(open.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        (0..64).into_par_iter().for_each(|_| std::thread::sleep(std::time::Duration::from_micros(500)));
        open.fetch_sub(1, Ordering::SeqCst);
    };
    Fingerprint::extract(&dataset, Compat::Corrected, 2, hold).unwrap();
    assert!(most.load(Ordering::SeqCst) <= 2, "{most:?} cases at a time");
    verify::verify(place.0.path(), 1, hold).unwrap();
    assert!(most.load(Ordering::SeqCst) <= 2, "{most:?} cases at a time");
}

/// nnU-Net does not preprocess without the intensities of every channel.
#[test]
fn shipped_plans_know_every_channel() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/data/hippocampus");
    for folder in [examples, data("brats_regions/preprocessed"), data("brats_labels_anisotropic/preprocessed")] {
        let json = DatasetJson::read(&folder.join("dataset.json")).unwrap();
        let plans = voxgrad::dataset::plans::Plans::read(&folder.join("nnUNetPlans.json")).unwrap();
        let known = plans.foreground_intensity_properties_per_channel;
        let channels: Vec<String> = (0..json.channel_names.len()).map(|channel| channel.to_string()).collect();
        assert!(known.keys().eq(&channels), "{}", folder.display());
    }
}
