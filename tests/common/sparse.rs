//! Small dense datasets for sparse annotations, and the program run on them.

use ndarray::{Array3, ArrayView3, Axis};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use voxgrad::io::{Geometry, read_labels, write_labels};
use voxgrad::sparsify::{Selection, Slices};

/// Two classes.
pub const LABELS: &str = r#"{"background": 0, "Anterior": 1, "Posterior": 2}"#;
/// Two regions of the same labels.
pub const REGIONS: &str = r#"{"background": 0, "hippocampus": [1, 2], "anterior": 1}, "regions_class_order": [2, 1]"#;

/// A volume of background with balls of classes 1 and 2.
pub fn balls(shape: (usize, usize, usize), seeds: &[(usize, usize, usize, usize)]) -> Array3<i16> {
    Array3::from_shape_fn(shape, |(z, y, x)| {
        let inside = |&&(cz, cy, cx, r): &&(usize, usize, usize, usize)| {
            z.abs_diff(cz).pow(2) + y.abs_diff(cy).pow(2) + x.abs_diff(cx).pow(2) <= r * r
        };
        seeds.iter().enumerate().filter(|(_, ball)| inside(ball)).map(|(i, _)| 1 + (i % 2) as i16).max().unwrap_or(0)
    })
}

/// A temporary place with a small dataset, and the program run in it.
pub struct Place(tempfile::TempDir);

impl Place {
    /// An empty place.
    pub fn new() -> Self {
        Place(tempfile::tempdir().unwrap())
    }

    /// Where something lies in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A dense dataset of balls, with labels as `labels` says.
    pub fn dataset(&self, cases: &[&str], labels: &str) -> PathBuf {
        let folder = self.path("dense");
        for part in ["imagesTr", "labelsTr"] {
            fs::create_dir_all(folder.join(part)).unwrap();
        }
        let json = format!(
            r#"{{"channel_names": {{"0": "MRI"}}, "labels": {labels}, "numTraining": {}, "file_ending": ".nii.gz",
                "licence": "kept"}}"#,
            cases.len()
        );
        fs::write(folder.join("dataset.json"), json).unwrap();
        for (index, case) in cases.iter().enumerate() {
            let map = balls((12 + index, 14, 13), &[(4, 5, 4, 3), (8, 8, 8 + index % 3, 3)]);
            for file in [format!("imagesTr/{case}_0000.nii.gz"), format!("labelsTr/{case}.nii.gz")] {
                let geometry = Geometry::new([2.0, 1.0, 0.5]);
                write_labels(&folder.join(file), map.mapv(|l| l as u8).view(), &geometry).unwrap();
            }
        }
        folder
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_voxgrad"));
        command.current_dir(self.0.path()).args(arguments).output().unwrap()
    }

    /// Runs and returns what was said.
    pub fn succeeds(&self, arguments: &[&str]) -> String {
        let result = self.run(arguments);
        let said = String::from_utf8_lossy(&[&result.stdout[..], &result.stderr[..]].concat()).into_owned();
        assert!(result.status.success(), "{arguments:?}: {said}");
        said
    }

    /// Runs, expects a refusal that mentions all of `words`, and that leaves nothing behind.
    pub fn refuses(&self, arguments: &[&str], words: &[&str]) {
        let before = files(self.0.path());
        let result = self.run(arguments);
        let said = String::from_utf8_lossy(&result.stderr).into_owned();
        assert_eq!(result.status.code(), Some(2), "{arguments:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{arguments:?}: no `{word}` in: {said}");
        }
        assert!(!said.contains("panicked"), "{said}");
        assert_eq!(files(self.0.path()), before, "{arguments:?}");
    }
}

/// All files below a folder with their bytes.
pub fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => drop(found.insert(path.clone(), fs::read(&path).unwrap())),
        }
    }
    found
}

/// A label map of a dataset.
pub fn labels(folder: &Path, case: &str) -> Array3<i16> {
    read_labels(&folder.join(format!("labelsTr/{case}.nii.gz"))).unwrap().data
}

/// Slices along an axis without any ignored voxel.
pub fn kept(sparse: ArrayView3<i16>, axis: usize) -> Vec<usize> {
    let slices = sparse.axis_iter(Axis(axis)).enumerate();
    slices.filter(|(_, slice)| slice.iter().all(|&l| l != 3)).map(|(i, _)| i).collect()
}

/// The slices of nnU-Net's integration test.
pub fn nnunet() -> Slices {
    Slices { axes: [true; 3], fraction: 0.1, selection: Selection::Nnunet }
}
