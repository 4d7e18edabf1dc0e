//! NIfTI in and out: every hostile file by its expectation, damage of any kind, round trips, atomic writing.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};
use voxgrad::error::FileError;

use approx::assert_abs_diff_eq;
use ndarray::{Array3, s};
use proptest::prelude::*;
use voxgrad::Error;
use voxgrad::io::{Geometry, read_channels, read_image, read_labels, write_labels};

use crate::common::data;

fn hostile(name: &str) -> std::path::PathBuf {
    data("hostile_nifti").join(name)
}

fn image_error(name: &str) -> Error {
    match read_image(&hostile(name)) {
        Ok(_) => panic!("{name} was accepted"),
        Err(error) => error,
    }
}

#[test]
fn every_hostile_file_meets_its_expectation() {
    let table = fs::read_to_string(hostile("EXPECT.tsv")).unwrap();
    let mut judged = 0;
    for line in table.lines().skip(1) {
        let mut columns = line.split('\t');
        let (name, _bytes, expected) = (columns.next().unwrap(), columns.next().unwrap(), columns.next().unwrap());
        if name.starts_with("pairs/") {
            continue; // judged as cases, in preprocess.rs
        }
        let read = read_image(&hostile(name));
        match expected {
            "accept" => assert!(read.is_ok(), "{name}: {}", read.unwrap_err()),
            "reject" => assert!(read.is_err(), "{name} was accepted"),
            "either" | "policy" => {}
            other => panic!("unknown expectation {other}"),
        }
        if let Err(error) = read {
            assert!(error.to_string().contains(name), "{error} names no file");
        }
        judged += 1;
    }
    assert_eq!(judged, 78);
}

/// Equal voxels, whatever the scalar type, byte order or wrapping.
#[test]
fn one_volume_in_every_encoding() {
    let reference = read_image(&hostile("ok.nii")).unwrap();
    assert_eq!(reference.data.dim(), (10, 9, 8));
    for name in [
        "ok.nii.gz",
        "gzipped_named.nii",
        "big_endian.nii",
        "big_endian.nii.gz",
        "dim_tail_junk.nii",
        "dim4_trailing1.nii",
        "vox_offset_0.0.nii",
        "data_extra.nii",
        "slope_0_0.nii",
        "slope_nan.nii",
        "slope_inf.nii",
        "slope_1_nan.nii",
    ] {
        assert_eq!(read_image(&hostile(name)).unwrap().data, reference.data, "{name}");
    }
    let small = read_image(&hostile("dt_i16.nii")).unwrap().data;
    assert_eq!(small.iter().copied().fold(0.0, f32::max), 99.0);
    for name in ["dt_i8.nii", "dt_i64.nii", "dt_f32.nii", "dt_f64.nii"] {
        assert_eq!(read_image(&hostile(name)).unwrap().data, small, "{name}");
    }
}

#[test]
fn slope_and_intercept_scale_images_and_labels() {
    let plain = read_image(&hostile("ok.nii")).unwrap().data;
    let scaled = read_image(&hostile("slope_2_-1000.nii")).unwrap().data;
    assert_eq!(scaled, plain.mapv(|v| 2.0 * v - 1000.0));
    let labels = read_labels(&hostile("label_slope.nii")).unwrap().data;
    assert!(labels.iter().all(|&l| (0..=2).contains(&l)));
    assert!(labels.iter().any(|&l| l == 1) && labels.iter().any(|&l| l == 2));
}

#[test]
fn labels_are_rounded_never_floored() {
    let labels = read_labels(&hostile("label_float_inexact.nii")).unwrap().data;
    let exact = read_image(&hostile("label_float_inexact.nii")).unwrap().data;
    assert!(exact.iter().any(|v| v.fract() != 0.0));
    for (label, value) in labels.iter().zip(&exact) {
        assert_eq!(f32::from(*label), value.round());
    }
    assert_eq!(*read_labels(&hostile("label_255.nii")).unwrap().data.iter().max().unwrap(), 255);
    assert!(matches!(read_labels(&hostile("f32_nan.nii")), Err(Error::File(FileError::LabelNotInteger { .. }))));
}

#[test]
fn errors_name_their_cause() {
    use FileError::*;
    assert!(matches!(image_error("empty.nii.gz"), Error::File(NiftiTruncated { found: 0, .. })));
    assert!(matches!(image_error("gz_header_only.nii.gz"), Error::File(Gzip { .. })));
    assert!(matches!(image_error("gz_bad_isize.nii.gz"), Error::File(Gzip { .. })));
    assert!(matches!(image_error("gz_bitflip.nii.gz"), Error::File(Gzip { .. })));
    assert!(matches!(image_error("data_short_1.nii"), Error::File(NiftiTruncated { expected: 1792, found: 1791, .. })));
    assert!(matches!(image_error("short_347.nii"), Error::File(NiftiTruncated { expected: 348, found: 347, .. })));
    assert!(matches!(image_error("magic_n+3.nii"), Error::File(NotNifti { .. })));
    assert!(matches!(image_error("sizeof_hdr_347.nii"), Error::File(NotNifti { .. })));
    assert!(matches!(image_error("ndim_8.nii"), Error::File(NiftiHeader { field: "dim[0]", .. })));
    assert!(matches!(image_error("dim_zero.nii"), Error::File(NiftiHeader { field: "dim", .. })));
    assert!(matches!(image_error("dim_overflow.nii"), Error::File(NiftiHeader { field: "dim", .. })));
    assert!(matches!(image_error("dim_huge3.nii"), Error::File(NiftiTruncated { .. })));
    assert!(matches!(image_error("dtype_128.nii"), Error::File(NiftiDatatype { datatype: 128, .. })));
    assert!(matches!(image_error("dtype_1792.nii"), Error::File(NiftiDatatype { datatype: 1792, .. })));
    assert!(matches!(image_error("bitpix_mismatch.nii"), Error::File(NiftiHeader { field: "bitpix", .. })));
    assert!(matches!(image_error("vox_offset_352.5.nii"), Error::File(NiftiHeader { field: "vox_offset", .. })));
    assert!(matches!(image_error("sform_shear.nii"), Error::File(NiftiShear { axes: "x and y", .. })));
    assert!(matches!(image_error("sform_singular.nii"), Error::File(NiftiShear { axes: "x and y", angle: 0.0, .. })));
    assert!(matches!(image_error("sform_zero.nii"), Error::File(NiftiShear { .. })));
    assert!(matches!(image_error("pixdim_nan.nii"), Error::File(NiftiHeader { field: "pixdim[1]", .. })));
    assert!(matches!(image_error("dim5_vec.nii"), Error::File(NotThreeDimensional { .. })));
    assert!(matches!(image_error("no such file.nii"), Error::File(Io { action: "open", .. })));
}

#[test]
fn spacing_is_absolute_and_ordered_like_the_array() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.nii.gz");
    let geometry = Geometry::new([3.0, 2.0, 0.5]);
    write_labels(&path, Array3::<u8>::zeros((2, 3, 4)).view(), &geometry).unwrap();
    let read = read_labels(&path).unwrap();
    assert_eq!(read.geometry.spacing, [3.0, 2.0, 0.5]);
    assert_eq!(read.data.dim(), (2, 3, 4));
    let negative = read_image(&hostile("pixdim_neg.nii")).unwrap().geometry;
    assert!(negative.spacing.iter().all(|&s| s > 0.0));
}

#[test]
fn labels_and_affine_survive_a_round_trip() {
    let dir = tempfile::tempdir().unwrap();
    for source in ["ok.nii", "big_endian.nii", "pixdim_neg.nii"] {
        let geometry = read_image(&hostile(source)).unwrap().geometry;
        let labels = Array3::from_shape_fn((3, 4, 5), |(z, y, x)| (z * 20 + y * 5 + x) as u16 * 7);
        for name in ["dots.in.name.nii.gz", "dots.in.name.nii"] {
            let path = dir.path().join(name);
            write_labels(&path, labels.view(), &geometry).unwrap();
            let read = read_labels(&path).unwrap();
            assert_eq!(read.data, labels.mapv(|v| v as i16), "{source} {name}");
            for (row, expected) in read.geometry.affine().iter().zip(geometry.affine()) {
                for (a, b) in row.iter().zip(expected) {
                    assert_abs_diff_eq!(*a, b, epsilon = 1e-6);
                }
            }
        }
    }
    // Views that are not contiguous keep their voxels too.
    let labels = Array3::from_shape_fn((4, 6, 5), |(z, y, x)| (z * 30 + y * 5 + x) as u8);
    let view = labels.slice(s![1.., ..;2, 1..]).permuted_axes([2, 0, 1]);
    let path = dir.path().join("view.nii.gz");
    write_labels(&path, view, &Geometry::new([1.0; 3])).unwrap();
    assert_eq!(read_labels(&path).unwrap().data, view.mapv(i16::from));
}

#[test]
fn a_failed_write_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let labels = Array3::<u8>::zeros((2, 2, 2));
    let geometry = Geometry::new([1.0; 3]);
    let occupied = dir.path().join("occupied.nii.gz");
    fs::create_dir(&occupied).unwrap();
    fs::write(occupied.join("file"), "x").unwrap();
    assert!(write_labels(&occupied, labels.view(), &geometry).is_err());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "temporary file left behind");
    let missing = dir.path().join("missing/case.nii.gz");
    let error = write_labels(&missing, labels.view(), &geometry).unwrap_err();
    assert!(
        matches!(error, Error::File(FileError::Io { .. })) && error.to_string().contains("missing/case.nii.gz"),
        "{error}"
    );
}

#[test]
fn flipped_axes_are_told_from_rounding_noise() {
    let placement = |pair: &str| {
        let image = read_image(&hostile(&format!("pairs/{pair}/image.nii.gz"))).unwrap();
        let label = read_labels(&hostile(&format!("pairs/{pair}/label.nii.gz"))).unwrap();
        image.geometry.same_placement(&label.geometry, image.data.dim().into())
    };
    assert!(placement("good"));
    assert!(placement("affine_1e-4"));
    assert!(!placement("affine_flip"));
}

/// Bytes of a valid file, to be damaged.
fn valid_file() -> Vec<u8> {
    fs::read(hostile("ok.nii")).unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn read_bytes(dir: &Path, bytes: &[u8]) -> voxgrad::Result<voxgrad::io::Image> {
    let path = dir.join("file.nii.gz");
    fs::write(&path, bytes).unwrap();
    read_image(&path)
}

#[test]
fn a_gap_before_the_voxels_is_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = valid_file();
    let voxels = bytes.split_off(352);
    bytes[108..112].copy_from_slice(&416f32.to_le_bytes());
    bytes.extend([0xAB; 64]);
    bytes.extend(voxels);
    let expected = read_image(&hostile("ok.nii")).unwrap().data;
    assert_eq!(read_bytes(dir.path(), &bytes).unwrap().data, expected);
    assert_eq!(read_bytes(dir.path(), &gzip(&bytes)).unwrap().data, expected);
}

#[test]
fn four_dimensional_files_are_channels() {
    let dir = tempfile::tempdir().unwrap();
    let mut bytes = valid_file();
    let voxels = bytes[352..].to_vec();
    bytes[40..42].copy_from_slice(&4i16.to_le_bytes());
    bytes[48..50].copy_from_slice(&2i16.to_le_bytes());
    bytes.extend(voxels.iter().map(|b| b ^ 1));
    let path = dir.path().join("file.nii.gz");
    fs::write(&path, gzip(&bytes)).unwrap();
    let message = read_image(&path).unwrap_err().to_string();
    assert!(message.contains("_0000"), "no remedy in: {message}");
    let channels = read_channels(&path).unwrap();
    assert_eq!(channels.len(), 2);
    assert_eq!(channels[0].data, read_image(&hostile("ok.nii")).unwrap().data);
    assert_ne!(channels[0].data, channels[1].data);
}

/// Kilobytes that claim gigabytes: rejected fast, without allocating what the header claims.
#[test]
fn bombs_are_defused() {
    let dir = tempfile::tempdir().unwrap();
    let started = Instant::now();
    let mut claims_much = valid_file();
    for axis in 0..3 {
        claims_much[42 + 2 * axis..44 + 2 * axis].copy_from_slice(&2000i16.to_le_bytes());
    }
    assert!(matches!(read_bytes(dir.path(), &gzip(&claims_much)), Err(Error::File(FileError::NiftiTruncated { .. }))));
    let mut goes_on = valid_file();
    goes_on.extend(vec![0; 64 << 20]);
    assert!(matches!(read_bytes(dir.path(), &gzip(&goes_on)), Err(Error::File(FileError::NiftiTooLong { .. }))));
    assert!(started.elapsed() < Duration::from_secs(10));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Any damage to the header gives an error or a volume of the promised size, at once.
    #[test]
    fn damaged_headers_never_panic(changes in prop::collection::vec((0usize..352, any::<u8>()), 1..6)) {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = valid_file();
        for (at, value) in changes {
            bytes[at] = value;
        }
        let started = Instant::now();
        for file in [bytes.clone(), gzip(&bytes)] {
            if let Ok(image) = read_bytes(dir.path(), &file) {
                prop_assert!(image.data.len() <= bytes.len() - 352);
            }
            let _ = read_labels(&dir.path().join("file.nii.gz"));
        }
        prop_assert!(started.elapsed() < Duration::from_secs(2));
    }

    /// One changed byte in a gzip stream is noticed, or was in a part that carries no data.
    #[test]
    fn damaged_gzip_never_yields_other_voxels(at in any::<prop::sample::Index>(), change in 1u8..) {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = gzip(&valid_file());
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        if let Ok(image) = read_bytes(dir.path(), &bytes) {
            prop_assert_eq!(image.data, read_image(&hostile("ok.nii")).unwrap().data);
        }
    }

    /// A file cut anywhere is rejected.
    #[test]
    fn truncated_files_are_rejected(at in any::<prop::sample::Index>()) {
        let dir = tempfile::tempdir().unwrap();
        for bytes in [valid_file(), gzip(&valid_file())] {
            prop_assert!(read_bytes(dir.path(), &bytes[..at.index(bytes.len())]).is_err());
        }
    }
}
