//! Slices drawn by numpy (`numpy.random.seed(1234)`, `choice(size, n, replace=False)`), and a whole dataset.

use std::fs;

use ndarray::{Array3, ArrayView3, Axis};
use voxgrad::dataset::Dataset;
use voxgrad::dataset::sparsify::{integration_dataset, sparsify};
use voxgrad::io::{Geometry, read_labels, write_labels};
use voxgrad::numpy_random::NumpyRandom;

const FIRST: [&[usize]; 3] = [&[8], &[0, 26], &[13]];
const SECOND: [&[usize]; 3] = [&[21, 27], &[0], &[30]];

/// Slices along an axis without any ignored voxel.
fn kept(sparse: ArrayView3<i16>, axis: usize) -> Vec<usize> {
    let slices = sparse.axis_iter(Axis(axis)).enumerate();
    slices.filter(|(_, slice)| slice.iter().all(|&l| l != 3)).map(|(i, _)| i).collect()
}

#[test]
fn slices_are_numpys() {
    let mut random = NumpyRandom::new(1234);
    for (shape, expected) in [((36, 50, 35), FIRST), ((60, 15, 44), SECOND)] {
        let dense = Array3::from_shape_fn(shape, |(z, y, x)| ((z + 2 * y + 3 * x) % 3) as i16);
        let sparse = sparsify(dense.view(), 3, &mut random);
        for (axis, expected) in expected.iter().enumerate() {
            assert_eq!(kept(sparse.view(), axis), *expected, "{shape:?} axis {axis}");
        }
        for (found, dense) in sparse.iter().zip(&dense) {
            assert!(*found == 3 || found == dense);
        }
    }
}

#[test]
fn the_integration_dataset_opens() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("dense"), dir.path().join("sparse"));
    for part in ["imagesTr", "labelsTr"] {
        fs::create_dir_all(source.join(part)).unwrap();
    }
    let json = r#"{"channel_names": {"0": "MRI"}, "labels": {"background": 0, "Anterior": 1, "Posterior": 2},
                   "numTraining": 2, "file_ending": ".nii.gz"}"#;
    fs::write(source.join("dataset.json"), json).unwrap();
    let labels = Array3::from_shape_fn((12, 10, 11), |(z, y, x)| ((z * y + x) % 3) as u8);
    for case in ["a", "b"] {
        for file in [format!("imagesTr/{case}_0000.nii.gz"), format!("labelsTr/{case}.nii.gz")] {
            write_labels(&source.join(file), labels.view(), &Geometry::new([1.0; 3])).unwrap();
        }
    }
    integration_dataset(&source, &target).unwrap();
    let dataset = Dataset::open(&target).unwrap();
    let keys: Vec<String> = dataset.labels.foreground().iter().map(|g| g.to_string()).collect();
    assert_eq!(keys, ["(1, 2)", "1"]);
    assert_eq!(dataset.labels.regions_class_order(), Some([2, 1].as_slice()));
    assert_eq!(dataset.labels.ignore_label(), Some(3));
    let sparse = |case: &str| read_labels(&target.join(format!("labelsTr/{case}.nii.gz"))).unwrap().data;
    // One slice each way: 132 + 110 + 120 voxels less the three overlaps' lines, plus their common voxel.
    for case in ["a", "b"] {
        let annotated = sparse(case).iter().filter(|&&l| l != 3).count();
        assert_eq!(annotated, 110 + 132 + 120 - 12 - 10 - 11 + 1);
    }
    // The stream goes on from case to case.
    assert_ne!(sparse("a"), sparse("b"));
}
