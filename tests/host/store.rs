//! Preprocessed cases on disk: what comes back, in part and whole, and what damage does.

use crate::common::{data, npz};
use ndarray::{Array3, Array4, Ix4, s};
use proptest::prelude::*;
use std::path::Path;
use std::sync::OnceLock;
use voxgrad::Error;
use voxgrad::dataset::{DatasetJson, LabelManager};
use voxgrad::error::{FileError, PreprocessError};
use voxgrad::io::{self, Geometry};
use voxgrad::preprocess::store::{self, StoredCase};
use voxgrad::preprocess::{ClassLocations, PreprocessedCase, Properties, read_npz};

/// Two channels of 37 x 70 x 9 voxels: chunks of full and of partial extent along every axis.
fn case() -> PreprocessedCase {
    let json = r#"{"channel_names": {"0": "a", "1": "b"}, "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
                   "regions_class_order": [1, 2], "numTraining": 1, "file_ending": ".nii.gz"}"#;
    let labels = LabelManager::new(&DatasetJson::parse("d".as_ref(), json).unwrap()).unwrap();
    let shape = (37, 70, 9);
    let data = Array4::from_shape_fn((2, 37, 70, 9), |(c, z, y, x)| {
        (z as f32 * 0.37 + y as f32 * 1.1 - x as f32).sin() * (1.0 + c as f32)
    });
    let seg = Array3::from_shape_fn(shape, |(z, y, x)| if z < 3 { -1 } else { ((z / 5 + y / 7 + x) % 4) as i16 });
    let image = io::read_image(&data_file()).unwrap();
    PreprocessedCase {
        name: "case_007".into(),
        class_locations: ClassLocations::sample(seg.view(), &labels),
        data,
        seg,
        properties: Properties {
            spacing: [3.5, 0.7, 0.1 + 0.2],
            shape_before_cropping: [40, 80, 12],
            bbox: [[1, 38], [4, 74], [3, 12]],
            shape_after_cropping: [37, 70, 9],
        },
        geometry: image.geometry,
    }
}

fn data_file() -> std::path::PathBuf {
    data("brats_regions/raw/imagesTr/case_000_0000.nii.gz")
}

fn stored(folder: &Path) -> StoredCase {
    let path = folder.join("case_007.vxg");
    store::write(&path, &case(), "recipe").unwrap();
    StoredCase::open(&path).unwrap()
}

#[test]
fn everything_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let stored = stored(folder.path());
    let expected = case();
    let counts = stored.label_counts();
    assert_eq!(counts.values().sum::<u64>(), 37 * 70 * 9);
    assert_eq!(counts[&-1], 3 * 70 * 9);
    assert_eq!((stored.name(), stored.recipe(), stored.channels()), ("case_007", "recipe", 2));
    let found = stored.read().unwrap();
    assert_eq!(found.data, expected.data);
    assert_eq!(found.seg, expected.seg);
    assert!(expected.class_locations.foreground.iter().all(|(_, list)| list.len() > 100));
    assert_eq!(found.class_locations, expected.class_locations);
    assert_eq!(found.properties, expected.properties);
    assert_eq!(found.geometry.spacing, expected.geometry.spacing);
    assert_eq!(found.geometry.affine(), expected.geometry.affine());
    let names: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names, ["case_007.vxg"], "only the finished file is left");
}

#[test]
fn values_that_are_no_numbers_come_back_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.vxg");
    let mut odd = case();
    odd.geometry = Geometry::new([0.1, 1e-3, 7.25]);
    odd.data = Array4::from_elem((1, 37, 70, 9), f32::MIN_POSITIVE / 2.0);
    odd.data[[0, 36, 69, 8]] = f32::NEG_INFINITY;
    odd.data[[0, 0, 0, 0]] = -0.0;
    odd.seg.fill(i16::MIN);
    odd.class_locations = ClassLocations::default();
    store::write(&path, &odd, "").unwrap();
    let found = StoredCase::open(&path).unwrap().read().unwrap();
    let bits = |case: &PreprocessedCase| case.data.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
    assert_eq!(bits(&found), bits(&odd));
    assert!(found.seg == odd.seg && found.geometry == odd.geometry);
    assert_eq!(found.class_locations, ClassLocations::default());
}

#[test]
fn boxes_outside_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let stored = stored(folder.path());
    for (start, size) in [([0, 0, 0], [38, 1, 1]), ([37, 0, 0], [1, 1, 1]), ([0, usize::MAX, 0], [1, 2, 1])] {
        let refused = |error: Option<Error>| {
            matches!(error, Some(Error::Preprocess(PreprocessError::StoredBox { shape: [37, 70, 9], .. })))
        };
        assert!(refused(stored.data(start, size).err()), "{start:?}");
        assert!(refused(stored.seg(start, size).err()), "{start:?}");
    }
    assert_eq!(stored.data([37, 70, 9], [0, 0, 0]).unwrap().len(), 0);
}

#[test]
fn missing_foreign_and_newer_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.vxg");
    assert!(matches!(StoredCase::open(&path), Err(Error::File(FileError::Io { .. }))));
    let problem = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let error = StoredCase::open(&path).unwrap_err().to_string();
        assert!(error.contains("x.vxg") && error.contains("preprocess again"), "{error}");
        error
    };
    assert!(problem(b"").contains("0 bytes"));
    assert!(problem(&[7; 100]).contains("does not begin"));
    store::write(&path, &case(), "").unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[8] = 2;
    assert!(problem(&bytes).contains("version 2"));
}

/// Headers that lie under a correct checksum: nothing is allocated from them.
#[test]
fn a_header_that_promises_too_much() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.vxg");
    let lie = |from: &str, to: &str| {
        store::write(&path, &case(), "").unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let length = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
        let blocks = u32::from_le_bytes(bytes[16..20].try_into().unwrap()) as usize;
        let header = String::from_utf8(bytes[24..24 + length].to_vec()).unwrap();
        assert!(header.contains(from), "{header:.200}");
        let header = header.replace(from, to);
        let mut front = [&bytes[..12], &(header.len() as u32).to_le_bytes(), &bytes[16..20]].concat();
        let after = [header.as_bytes(), &bytes[24 + length..24 + length + 8 * blocks]].concat();
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&front);
        hasher.update(&after);
        front.extend(hasher.finalize().to_le_bytes());
        std::fs::write(&path, [&front, &after, &bytes[24 + length + 8 * blocks..]].concat()).unwrap();
        match StoredCase::open(&path).and_then(|case| case.read()) {
            Err(Error::Preprocess(PreprocessError::StoredCase { problem, .. })) => problem,
            other => panic!("{to}: {:?}", other.map(|case| case.name)),
        }
    };
    assert!(lie(r#""shape":[2,37,70,9]"#, r#""shape":[2,37000,70000,9000]"#).contains("more values"));
    assert!(lie(r#""shape":[2,37,70,9]"#, r#""shape":[9000000000,9000000000,9000000000,9]"#).contains("more values"));
    assert!(lie(r#""shape":[2,37,70,9]"#, r#""shape":[2,37,70,8]"#).contains("block 1"));
    assert!(lie(r#""shape":[2,37,70,9]"#, r#""shape":[3,37,70,9]"#).contains("blocks"));
    assert!(lie(r#""shape":[2,37,70,9]"#, r#""shape":[2,0,70,9]"#).contains("axis"));
    assert!(lie(r#""chunk":[32,32,9]"#, r#""chunk":[0,32,9]"#).contains("axis"));
    assert!(lie(r#""annotated":"#, r#""annotated":99999999"#).contains("more values"));
    assert!(lie(r#""shape""#, r#""shapes""#).contains("shape"));
    assert!(lie(r#""geometry":["#, r#""geometry":[1,"#).contains("geometry"));
}

fn bytes() -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    BYTES.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        stored(folder.path());
        std::fs::read(folder.path().join("case_007.vxg")).unwrap()
    })
}

/// What opening and reading everything says about these bytes.
fn verdict(bytes: &[u8]) -> voxgrad::Result<PreprocessedCase> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("case_007.vxg");
    std::fs::write(&path, bytes).unwrap();
    StoredCase::open(&path).and_then(|case| case.read())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_box_equals_the_slice(a in prop::array::uniform3(0usize..1000), b in prop::array::uniform3(0usize..1000)) {
        let folder = tempfile::tempdir().unwrap();
        let stored = stored(folder.path());
        let shape = [37, 70, 9];
        let start: [usize; 3] = std::array::from_fn(|axis| a[axis] % shape[axis]);
        let size: [usize; 3] = std::array::from_fn(|axis| b[axis] % (shape[axis] - start[axis] + 1));
        let end: [usize; 3] = std::array::from_fn(|axis| start[axis] + size[axis]);
        let whole = case();
        let data = whole.data.slice(s![.., start[0]..end[0], start[1]..end[1], start[2]..end[2]]);
        let seg = whole.seg.slice(s![start[0]..end[0], start[1]..end[1], start[2]..end[2]]);
        prop_assert_eq!(stored.data(start, size).unwrap(), data);
        prop_assert_eq!(stored.seg(start, size).unwrap(), seg);
    }

    #[test]
    fn a_changed_byte_is_noticed(at in any::<prop::sample::Index>(), flip in 1u8..) {
        let mut bytes = bytes().to_vec();
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let error = verdict(&bytes).err();
        prop_assert!(matches!(error, Some(Error::Preprocess(PreprocessError::StoredCase { .. }))), "byte {}: {:?}", at, error);
    }

    #[test]
    fn a_truncated_or_longer_file_is_noticed(length in any::<prop::sample::Index>(), more in 1usize..50) {
        let bytes = bytes();
        let short = verdict(&bytes[..length.index(bytes.len())]);
        prop_assert!(matches!(short, Err(Error::Preprocess(PreprocessError::StoredCase { .. }))), "cut short");
        let long = verdict(&[bytes, &vec![0; more]].concat());
        prop_assert!(matches!(long, Err(Error::Preprocess(PreprocessError::StoredCase { .. }))), "{} bytes more", more);
    }
}

/// Every byte of the part whose damage could mislead a reader: preamble, header, table.
#[test]
fn every_byte_of_the_front_is_guarded() {
    let bytes = bytes();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    for at in 0..24 + word(12) + 8 * word(16) {
        let mut changed = bytes.to_vec();
        changed[at] ^= 0x10;
        assert!(matches!(verdict(&changed), Err(Error::Preprocess(PreprocessError::StoredCase { .. }))), "byte {at}");
    }
}

fn archive() -> (std::path::PathBuf, LabelManager) {
    let json = DatasetJson::read(&data("brats_regions/preprocessed/dataset.json")).unwrap();
    (data("brats_regions/preprocessed/case_001.npz"), LabelManager::new(&json).unwrap())
}

#[test]
fn nnunets_older_files_are_read() {
    let (path, labels) = archive();
    let found = read_npz(&path, &labels, [1.0; 3]).unwrap();
    let expected = |name| npz::read(&path, name).into_dimensionality::<Ix4>().unwrap();
    assert_eq!(found.name, "case_001");
    assert_eq!(found.data.mapv(f64::from), expected("data"));
    assert_eq!(found.seg.mapv(f64::from), expected("seg").slice(s![0, .., .., ..]));
    let text = std::fs::read_to_string(data("brats_regions/preprocessed/class_locations.json")).unwrap();
    let locations: serde_json::Value = serde_json::from_str(&text).unwrap();
    let annotated = found.class_locations.annotated.unwrap();
    assert_eq!(locations["case_001"]["(-1, 0, 1, 2, 3)"], annotated.len());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Bytes that zip does not guard (names, dates) may change without harm: then the arrays are the same.
    #[test]
    fn damaged_archives_are_refused_or_harmless(at in any::<prop::sample::Index>(), flip in 1u8.., cut in any::<bool>()) {
        let (path, labels) = archive();
        let mut bytes = std::fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        if cut { bytes.truncate(at) } else { bytes[at] ^= flip }
        let folder = tempfile::tempdir().unwrap();
        let copy = folder.path().join("case_001.npz");
        std::fs::write(&copy, bytes).unwrap();
        match read_npz(&copy, &labels, [1.0; 3]) {
            Err(error) => prop_assert!(matches!(error, Error::Preprocess(PreprocessError::StoredCase { .. })), "{}", error),
            Ok(found) => {
                let whole = read_npz(&path, &labels, [1.0; 3]).unwrap();
                prop_assert!(found.data == whole.data && found.seg == whole.seg, "byte {}", at);
            }
        }
    }
}
