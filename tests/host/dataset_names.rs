//! Which files belong to which case, and what is said of those that belong to none.

use crate::common::six_cases::Place;
use std::fs;
use voxgrad::Error;
use voxgrad::dataset::{Dataset, DatasetJson, cases_in, list_cases};
use voxgrad::error::{DatasetError, FileError};
use voxgrad::plan::verify;

#[test]
fn every_file_that_fits_no_case_is_listed() {
    let place = Place::new();
    place.rename("imagesTr/c_5_0000.nii.gz", "imagesTr/x.001.0000.nii.gz");
    place.rename("labelsTr/c_1.nii.gz", "labelsTr/other.nii.gz");
    fs::write(place.path("imagesTr/notes.txt"), "").unwrap();
    let found = place.verify();
    let said: Vec<String> = found.failures.iter().map(Error::to_string).collect();
    match found.failures.as_slice() {
        [
            Error::Dataset(DatasetError::ImageNames { files, .. }),
            Error::Dataset(DatasetError::LabelMissing { case, .. }),
            Error::Dataset(DatasetError::LabelWithoutImage { files: labels, .. }),
        ] => {
            assert_eq!(files, &["x.001.0000.nii.gz"]);
            assert_eq!(case, "c_1");
            assert_eq!(labels, &["c_5.nii.gz", "other.nii.gz"]);
        }
        _ => panic!("{said:#?}"),
    }
    assert!(said[0].contains("<case>_<four digits of the channel>.nii.gz"), "{said:?}");
    assert!(found.dataset.notes[0].contains("notes.txt"), "{:?}", found.dataset.notes);
    assert_eq!(found.sound, 4);
}

#[test]
fn images_without_a_channel_number_and_labels_with_one() {
    let place = Place::new();
    place.rename("imagesTr/c_0_0000.nii.gz", "imagesTr/c_0.nii.gz");
    place.rename("labelsTr/c_1.nii.gz", "labelsTr/c_1_0000.nii.gz");
    let failures = place.failures();
    match failures.as_slice() {
        [
            Error::Dataset(DatasetError::ChannelNumberMissing { files: images, .. }),
            Error::Dataset(DatasetError::LabelNumbered { files: labels, .. }),
        ] => {
            assert_eq!((images[0].as_str(), labels[0].as_str()), ("c_0.nii.gz", "c_1_0000.nii.gz"));
        }
        _ => panic!("{failures:#?}"),
    }
    assert!(failures[0].to_string().contains("c_0.nii.gz becomes c_0_0000.nii.gz"), "{}", failures[0]);
}

/// Five cases whose names end in four digits are not five channels of one case.
#[test]
fn four_digits_of_a_case_name_are_explained_once() {
    let place = Place::new();
    for case in 0..5 {
        place.rename(&format!("imagesTr/c_{case}_0000.nii.gz"), &format!("imagesTr/PID_000{case}.nii.gz"));
        place.rename(&format!("labelsTr/c_{case}.nii.gz"), &format!("labelsTr/PID_000{case}.nii.gz"));
    }
    let failures = place.failures();
    let [Error::Dataset(DatasetError::ChannelNumberMissing { files, .. })] = failures.as_slice() else {
        panic!("{failures:#?}")
    };
    assert_eq!(files.len(), 5);
    assert!(failures[0].to_string().contains("PID_0000.nii.gz becomes PID_0000_0000.nii.gz"), "{}", failures[0]);
    // Without labels, as for prediction, they may be channels: one message says both.
    let json = DatasetJson::read(&place.path("dataset.json")).unwrap();
    let found = list_cases(&place.path("imagesTr"), None, &json).unwrap();
    let [Error::Dataset(DatasetError::ChannelUndeclared { case, files, .. })] = found.failures.as_slice() else {
        panic!("{found:#?}")
    };
    assert_eq!((case.as_str(), files.len()), ("PID", 4));
    assert!(found.failures[0].to_string().contains("PID_0001.nii.gz becomes PID_0001_0000.nii.gz"));
}

#[test]
fn both_endings_are_named() {
    let place = Place::new();
    for case in 0..2 {
        place.rename(&format!("imagesTr/c_{case}_0000.nii.gz"), &format!("imagesTr/c_{case}_0000.nii"));
    }
    let failures = place.failures();
    let [Error::Dataset(DatasetError::OtherEnding { .. })] = failures.as_slice() else { panic!("{failures:#?}") };
    assert!(failures[0].to_string().contains("2 files end in .nii and 4 in .nii.gz"), "{}", failures[0]);
    for case in 2..6 {
        place.rename(&format!("imagesTr/c_{case}_0000.nii.gz"), &format!("imagesTr/c_{case}_0000.nii"));
    }
    let error = verify::quick(place.0.path()).unwrap_err();
    assert!(matches!(error, Error::Dataset(DatasetError::DatasetEmpty { others: 6, .. })), "{error}");
    assert!(error.to_string().contains("6 files end in .nii:"), "{error}");
}

#[test]
fn bad_names_beside_good_ones_are_not_skipped_in_prediction() {
    let place = Place::new();
    let json = DatasetJson::read(&place.path("dataset.json")).unwrap();
    place.rename("imagesTr/c_3_0000.nii.gz", "imagesTr/c-3.nii.gz");
    place.rename("imagesTr/c_4_0000.nii.gz", "imagesTr/c_4_0.nii.gz");
    let error = cases_in(&place.path("imagesTr"), None, &json).unwrap_err().to_string();
    assert!(error.contains("c-3.nii.gz, c_4_0.nii.gz"), "{error}");
}

/// What macOS writes beside every file on foreign disks.
#[test]
fn resource_forks_are_ignored_with_a_note() {
    let place = Place::new();
    for name in ["imagesTr/._c_0_0000.nii.gz", "imagesTr/._c_1_0000.nii.gz", "labelsTr/._c_0.nii.gz"] {
        fs::write(place.path(name), "Mac OS X").unwrap();
    }
    let found = place.verify();
    assert!(found.failures.is_empty(), "{:?}", found.failures);
    assert_eq!(found.dataset.notes.len(), 2);
    assert!(found.dataset.notes[0].contains("2 names that begin with `._`"), "{:?}", found.dataset.notes);
}

#[test]
fn listed_cases_keep_inside_their_folder() {
    let place = Place::new();
    let files = r#"{"images": ["imagesTr/c_0_0000.nii.gz"], "label": "labelsTr/c_0.nii.gz"}"#;
    let list = |names: &[&str]| {
        let entries: Vec<String> = names.iter().map(|name| format!("{}: {files}", serde_json::json!(name))).collect();
        place.describe(&format!(
            r#""labels": {{"background": 0, "a": 1, "b": 2, "ignore": 3}}, "numTraining": {}, "dataset": {{{}}}"#,
            names.len(),
            entries.join(", ")
        ));
        Dataset::open(place.0.path())
    };
    assert_eq!(list(&["one", "two.b", "..c"]).unwrap().cases.len(), 3);
    for name in ["../x", "/x", "", ".", "..", "a/b", "a\\b", "c:x", "a\nb"] {
        let error = list(&["one", name]).unwrap_err();
        assert!(
            matches!(&error, Error::File(FileError::UnsafeName { name: found, .. }) if found == name),
            "{name}: {error}"
        );
    }
    let several = list(&["../x", "one", "/y"]).unwrap_err();
    assert!(matches!(&several, Error::Several { faults } if faults.len() == 2), "{several}");
    // Files that are not there are known before anything is read.
    let gone = files.replace("imagesTr/c_0_0000", "imagesTr/gone").replace("labelsTr/c_0", "labelsTr/gone");
    place
        .describe(&format!(r#""labels": {{"background": 0, "a": 1}}, "numTraining": 1, "dataset": {{"one": {gone}}}"#));
    let error = Dataset::open(place.0.path()).unwrap_err().to_string();
    assert!(error.contains("imagesTr/gone.nii.gz") && error.contains("labelsTr/gone.nii.gz"), "{error}");
}
