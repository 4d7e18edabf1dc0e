//! `dataset.json`, label rules (each with its own error), and finding the files of cases.

use std::fs;
use std::path::Path;
use voxgrad::error::{DatasetError, FileError};

use voxgrad::Error;
use voxgrad::dataset::{Dataset, DatasetJson, LabelGroup, LabelManager, cases_in};

use crate::common::data;

/// A description with the given `labels` and further fields.
fn parse(labels: &str, further: &str) -> voxgrad::Result<DatasetJson> {
    let text = format!(
        r#"{{"channel_names": {{"0": "T1", "1": "T2"}}, "labels": {labels}, "numTraining": 2,
            "file_ending": ".nii.gz"{further}}}"#
    );
    DatasetJson::parse(Path::new("some/dataset.json"), &text)
}

fn labels(labels: &str, further: &str) -> voxgrad::Result<LabelManager> {
    LabelManager::new(&parse(labels, further)?)
}

const BRATS: &str = r#"{"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}"#;

#[test]
fn every_label_rule_has_its_error() {
    use DatasetError::*;
    type Check = fn(&Error) -> bool;
    let cases: [(&str, &str, Check); 14] = [
        (r#"{"a": 1}"#, "", |e| matches!(e, Error::Dataset(BackgroundMissing { .. }))),
        (r#"{"background": [0], "a": 1}"#, "", |e| matches!(e, Error::Dataset(BackgroundIsRegion { .. }))),
        (r#"{"background": 1, "a": 0}"#, "", |e| matches!(e, Error::Dataset(BackgroundNotZero { value: 1, .. }))),
        (r#"{"background": 0, "a": 1, "ignore": [2]}"#, "", |e| matches!(e, Error::Dataset(IgnoreIsRegion { .. }))),
        (r#"{"background": 0, "ignore": 1, "a": 2}"#, "", |e| {
            matches!(e, Error::Dataset(IgnoreNotHighest { value: 1, expected: 3, .. }))
        }),
        (r#"{"background": 0, "a": 1, "ignore": 3}"#, "", |e| {
            matches!(e, Error::Dataset(IgnoreNotHighest { value: 3, expected: 2, .. }))
        }),
        (r#"{"background": 0, "a": 1, "b": 3}"#, "", |e| matches!(e, Error::Dataset(LabelsNotConsecutive { .. }))),
        (r#"{"background": 0, "a": -1}"#, "", |e| matches!(e, Error::Dataset(LabelOutOfRange { value: -1, .. }))),
        (r#"{"background": 0, "a": 32767}"#, "", |e| matches!(e, Error::Dataset(LabelOutOfRange { .. }))),
        (r#"{"background": 0, "ignore": 1}"#, "", |e| matches!(e, Error::Dataset(NoForeground { .. }))),
        (r#"{"background": 0, "a": [1, 2], "b": 2}"#, "", |e| {
            matches!(e, Error::Dataset(RegionsClassOrderMissing { .. }))
        }),
        (BRATS, r#", "regions_class_order": [1, 2]"#, |e| {
            matches!(e, Error::Dataset(RegionsClassOrderLength { found: 2, expected: 3, .. }))
        }),
        (
            r#"{"background": 0, "a": "one"}"#,
            "",
            |e| matches!(e, Error::File(FileError::Field { field, .. }) if field == "labels.a"),
        ),
        (r#"{"background": 0, "a": 1.5}"#, "", |e| matches!(e, Error::File(FileError::Field { .. }))),
    ];
    for (text, further, is_expected) in cases {
        let error = labels(text, further).expect_err(text);
        assert!(is_expected(&error), "{text}: {error:?}");
        assert!(error.to_string().contains("dataset.json"), "{error}");
    }
}

#[test]
fn missing_and_mistyped_fields_are_named() {
    let text = |json: &str| DatasetJson::parse(Path::new("d.json"), json);
    let whole =
        r#"{"channel_names": {"0": "a"}, "labels": {"background": 0}, "numTraining": 1, "file_ending": ".nii"}"#;
    assert!(text(whole).is_ok());
    for (from, to, field) in [
        ("\"channel_names\"", "\"chanel_names\"", "channel_names"),
        ("\"labels\"", "\"label\"", "labels"),
        ("\"numTraining\"", "\"n\"", "numTraining"),
        ("\"numTraining\": 1", "\"numTraining\": \"1\"", "numTraining"),
        ("\"file_ending\"", "\"ending\"", "file_ending"),
        ("\".nii\"", "\".png\"", "file_ending"),
        ("{\"0\": \"a\"}", "{\"1\": \"a\"}", "channel_names"),
        ("{\"0\": \"a\"}", "{}", "channel_names"),
    ] {
        match text(&whole.replace(from, to)) {
            Err(Error::File(FileError::Field { field: named, .. })) => assert_eq!(named, field),
            other => panic!("{to}: {other:?}"),
        }
    }
    assert!(matches!(text("{"), Err(Error::File(FileError::Json { .. }))));
    let old = text(&whole.replace("channel_names", "modality")).unwrap();
    assert_eq!(old.channel_names, ["a"]);
}

#[test]
fn labels_mode() {
    let manager = labels(r#"{"background": 0, "b": 2, "a": [1], "ignore": 3}"#, "").unwrap();
    assert!(!manager.has_regions());
    assert_eq!(manager.all_labels(), [0, 1, 2]);
    assert_eq!(manager.ignore_label(), Some(3));
    assert_eq!(manager.expected_labels(), [0, 1, 2, 3]);
    assert_eq!(manager.num_segmentation_heads(), 3);
    assert_eq!(manager.foreground(), [LabelGroup::Label(1), LabelGroup::Label(2)]);
    assert_eq!(manager.foreground_names(), ["a", "b"]);
    assert_eq!(manager.annotated().to_string(), "(-1, 0, 1, 2)");
    let table = manager.region_table().unwrap();
    assert_eq!(table, [1, 2, 4, 0]);
    // The first maximum wins.
    let logits = [0.0, 0.0, -1.0, 1.0, 2.0, 2.0, 0.0, 0.5, 1.0];
    assert_eq!(manager.segmentation_from_logits(&logits).unwrap(), [0, 1, 2]);
    assert!(manager.segmentation_from_logits(&logits[1..]).is_err());
}

#[test]
fn regions_mode() {
    let manager = labels(BRATS, r#", "regions_class_order": [1, 2, 3]"#).unwrap();
    assert!(manager.has_regions());
    assert_eq!(manager.num_segmentation_heads(), 3);
    let keys: Vec<String> = manager.foreground().iter().map(|g| g.to_string()).collect();
    assert_eq!(keys, ["(1, 2, 3)", "(2, 3)", "3"]);
    assert_eq!(LabelGroup::Region(vec![3]).to_string(), "(3,)");
    let table = manager.region_table().unwrap();
    assert_eq!(table, [0, 0b001, 0b011, 0b111, 0]);
    // Strictly above the threshold; later regions overwrite earlier ones.
    let logits = [1.0, 1.0, -1.0, 0.0, 0.0, 0.0, 1.0, -1.0, 0.1, -1.0, 1.0, -1.0];
    assert_eq!(manager.segmentation_from_logits(&logits).unwrap(), [2, 0, 3, 2]);
    let probabilities = [0.6, 0.5, 0.4, 0.5, 0.5, 0.5];
    assert_eq!(manager.segmentation_from_probabilities(&probabilities).unwrap(), [1, 0]);
}

/// The order of `labels` in the file is the order of regions, whatever their names.
#[test]
fn region_order_is_file_order() {
    let text = r#"{"background": 0, "z": [1, 2], "a": 1}"#;
    let json = parse(text, r#", "regions_class_order": [2, 1]"#).unwrap();
    let manager = LabelManager::new(&json).unwrap();
    assert_eq!(manager.foreground_names(), ["z", "a"]);
    let keys: Vec<&String> = json.source()["labels"].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["background", "z", "a"]);
}

#[test]
fn opens_a_real_dataset() {
    let dataset = Dataset::open(&data("brats_regions/raw")).unwrap();
    assert_eq!(dataset.cases.len(), 10);
    assert_eq!(dataset.cases[3].name, "case_003");
    assert_eq!(dataset.cases[3].images.len(), 4);
    assert!(dataset.cases[3].images[2].ends_with("imagesTr/case_003_0002.nii.gz"));
    assert_eq!(dataset.json.channel_names, ["T1", "T1ce", "T2", "FLAIR"]);
}

/// A dataset folder of empty files; opening looks at names only.
fn folder(files: &[&str]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for part in ["imagesTr", "labelsTr"] {
        fs::create_dir(dir.path().join(part)).unwrap();
    }
    for file in files {
        fs::write(dir.path().join(file), "").unwrap();
    }
    let json = r#"{"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "a": 1},
                   "numTraining": 2, "file_ending": ".nii.gz"}"#;
    fs::write(dir.path().join("dataset.json"), json).unwrap();
    dir
}

const COMPLETE: [&str; 6] = [
    "imagesTr/b_0000.nii.gz",
    "imagesTr/b_0001.nii.gz",
    "labelsTr/b.nii.gz",
    "imagesTr/a_1_0000.nii.gz",
    "imagesTr/a_1_0001.nii.gz",
    "labelsTr/a_1.nii.gz",
];

#[test]
fn incomplete_folders_are_told_apart() {
    let open = |files: &[&str]| Dataset::open(folder(files).path());
    assert_eq!(open(&COMPLETE).unwrap().case_names(), ["a_1", "b"]);
    let without = |missing: &str| {
        let files: Vec<&str> = COMPLETE.into_iter().filter(|f| *f != missing).collect();
        open(&files).unwrap_err()
    };
    assert!(matches!(
        without("imagesTr/b_0001.nii.gz"),
        Error::Dataset(DatasetError::ChannelMissing { channel: 1, case, .. }) if case == "b"
    ));
    assert!(matches!(
        without("imagesTr/b_0000.nii.gz"),
        Error::Dataset(DatasetError::ChannelMissing { channel: 0, .. })
    ));
    assert!(matches!(
        without("labelsTr/a_1.nii.gz"),
        Error::Dataset(DatasetError::LabelMissing { case, .. }) if case == "a_1"
    ));
    assert!(matches!(open(&[]).unwrap_err(), Error::Dataset(DatasetError::DatasetEmpty { .. })));
    assert!(matches!(
        open(&COMPLETE[..3]).unwrap_err(),
        Error::Dataset(DatasetError::NumTraining { declared: 2, found: 1, .. })
    ));
    let mut surplus = COMPLETE.to_vec();
    surplus.push("imagesTr/b_0002.nii.gz");
    assert!(matches!(
        open(&surplus).unwrap_err(),
        Error::Dataset(DatasetError::ChannelUndeclared { declared: 2, case, .. }) if case == "b"
    ));
    let empty = tempfile::tempdir().unwrap();
    assert!(matches!(Dataset::open(empty.path()), Err(Error::File(FileError::Io { .. }))));
}

#[test]
fn test_images_need_no_labels() {
    let dir = folder(&COMPLETE);
    let json = DatasetJson::read(&dir.path().join("dataset.json")).unwrap();
    let cases = cases_in(&dir.path().join("imagesTr"), None, &json).unwrap();
    assert_eq!(cases.len(), 2);
    assert_eq!(cases[0].label, None);
}

#[test]
fn cases_may_be_listed_in_dataset_json() {
    let dir = folder(&COMPLETE);
    let path = dir.path().join("dataset.json");
    let listed = |files: &str| {
        let json = format!(
            r#"{{"channel_names": {{"0": "T1"}}, "labels": {{"background": 0, "a": 1}}, "numTraining": 1,
                "file_ending": ".nii.gz", "dataset": {{"one": {files}}}}}"#
        );
        fs::write(&path, json).unwrap();
        Dataset::open(dir.path())
    };
    let dataset = listed(r#"{"images": ["imagesTr/b_0000.nii.gz"], "label": "labelsTr/b.nii.gz"}"#).unwrap();
    assert_eq!(dataset.cases[0].name, "one");
    assert_eq!(dataset.cases[0].images, [dir.path().join("imagesTr/b_0000.nii.gz")]);
    assert!(matches!(listed(r#"{"images": ["x", "y"], "label": "z"}"#), Err(Error::File(FileError::Field { .. }))));
    // An unset variable stays in the message.
    let error = listed(r#"{"images": ["x"], "label": "${NO_SUCH_VARIABLE}/z"}"#).unwrap_err();
    assert!(error.to_string().contains("${NO_SUCH_VARIABLE}/z"), "{error}");
}
