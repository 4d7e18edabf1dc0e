//! nnU-Net's preprocessed arrays, written by Blosc2 in Python, and damage to them.

use crate::common::data;
use ndarray::{Array3, Array4};
use proptest::prelude::*;
use std::path::Path;
use voxgrad::Error;
use voxgrad::dataset::{DatasetJson, LabelManager};
use voxgrad::error::{FileError, PreprocessError};
use voxgrad::preprocess::{PreprocessedCase, read_b2nd};

const SHAPE: (usize, usize, usize, usize) = (2, 13, 22, 17);
const READABLE: [&str; 7] = ["nnunet", "lz4", "lz4hc_plain", "zstd", "zlib", "blosclz", "many_chunks"];

fn read(path: &Path) -> voxgrad::Result<PreprocessedCase> {
    let json = r#"{"channel_names": {"0": "a", "1": "b"}, "labels": {"background": 0, "one": 1, "two": 2},
                   "numTraining": 1, "file_ending": ".nii.gz"}"#;
    let labels = LabelManager::new(&DatasetJson::parse("d".as_ref(), json).unwrap()).unwrap();
    read_b2nd(path, &labels, [1.0; 3])
}

fn fixture(name: &str) -> std::path::PathBuf {
    data("b2nd").join(format!("{name}.b2nd"))
}

/// The formula of tests/data/make/make_b2nd_fixtures.py.
fn image() -> Array4<f32> {
    Array4::from_shape_fn(SHAPE, |(c, z, y, x)| match (c, z % 2) {
        (1, _) if z < 8 => 0.0,
        (_, 0) => ((c + 1) * (z + 2 * y)) as f32,
        _ => ((z * 31 + y * 17 + x * 7) % 101) as f32 / 8.0 - 6.0,
    })
}

fn seg() -> Array3<i16> {
    Array3::from_shape_fn((SHAPE.1, SHAPE.2, SHAPE.3), |(z, y, _)| ((z / 3 + y / 4) % 4) as i16 - 1)
}

#[test]
fn every_compressor_gives_the_same_case() {
    for name in READABLE {
        let case = read(&fixture(name)).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(case.name, name);
        assert_eq!(case.data, image(), "{name}");
        assert_eq!(case.seg, seg(), "{name}");
        assert!(case.class_locations.foreground.iter().all(|(_, voxels)| voxels.len() > 100), "{name}");
    }
}

#[test]
fn what_nnunet_never_writes_is_named() {
    let error = read(&fixture("bitshuffle")).unwrap_err().to_string();
    assert!(error.contains("bitshuffle.b2nd") && error.contains("filtered in another way"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.b2nd");
    std::fs::copy(fixture("lz4"), &path).unwrap();
    let error = read(&path).unwrap_err();
    assert!(matches!(&error, Error::File(FileError::Io { path, .. }) if path.ends_with("x_seg.b2nd")), "{error}");
    std::fs::write(&path, "no frame").unwrap();
    assert!(read(&path).unwrap_err().to_string().contains("not a Blosc2 frame"));
}

/// A chunk may be larger than the array, and said to be all zeros: that costs the file nothing and memory everything.
#[test]
fn chunks_far_beyond_the_array_are_not_made() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.b2nd");
    for part in ["x.b2nd", "x_seg.b2nd"] {
        std::fs::copy(fixture("lz4"), &path).unwrap();
        std::fs::copy(fixture("lz4_seg"), folder.path().join("x_seg.b2nd")).unwrap();
        assert_eq!(read(&path).unwrap().seg, seg());
        let damaged = folder.path().join(part);
        let mut bytes = std::fs::read(&damaged).unwrap();
        // The metalayer's list of the array's extent, msgpack's eight-byte integers; that of its chunks comes next.
        let extent: Vec<u8> =
            [13u64, 22, 17].iter().flat_map(|n| [vec![0xd3], n.to_be_bytes().to_vec()].concat()).collect();
        let at = bytes.windows(extent.len()).position(|window| window == extent).unwrap() + extent.len() + 1;
        for (axis, extent) in [2, 64, 64, i32::MAX as u32].into_iter().enumerate() {
            assert_eq!(bytes[at + 5 * axis], 0xd2);
            bytes[at + 5 * axis + 1..at + 5 * axis + 5].copy_from_slice(&extent.to_be_bytes());
        }
        // One chunk, of zeros: its offset, stored plainly, says so itself.
        let data = u32::from_be_bytes(bytes[11..15].try_into().unwrap()) as usize;
        bytes[39..47].fill(0);
        bytes.truncate(data);
        let mut index = vec![0u8; 32];
        index[2] = 7;
        index[3] = 8;
        index[4..8].copy_from_slice(&8i32.to_le_bytes());
        index[8..12].copy_from_slice(&8i32.to_le_bytes());
        index[12..16].copy_from_slice(&40i32.to_le_bytes());
        index.extend((0x81u64 << 56).to_le_bytes());
        bytes.extend(index);
        std::fs::write(&damaged, bytes).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("more values than the file can hold"), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    /// Frames have no checksums, so damage may go unnoticed; it never panics or yields another shape.
    #[test]
    fn damaged_frames_do_not_panic(
        which in 0..READABLE.len(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        front in any::<bool>(),
        cut in any::<prop::sample::Index>(),
        cuts in prop::bool::weighted(0.2),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = std::fs::read(fixture(READABLE[which])).unwrap();
        for (at, value) in changes {
            let length = if front { bytes.len().min(400) } else { bytes.len() };
            bytes[at.index(length)] = value;
        }
        if cuts {
            bytes.truncate(cut.index(bytes.len()));
        }
        let path = folder.path().join("x.b2nd");
        std::fs::write(&path, bytes).unwrap();
        std::fs::copy(fixture("lz4_seg"), folder.path().join("x_seg.b2nd")).unwrap();
        match read(&path) {
            Ok(case) => prop_assert_eq!(&case.data.shape()[1..], case.seg.shape()),
            Err(error) => prop_assert!(matches!(error, Error::Preprocess(PreprocessError::StoredCase { .. })), "{}", error),
        }
    }
}
