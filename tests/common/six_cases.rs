//! Six cases of three labels, sparsely annotated, and small changes to their files.

use ndarray::Array3;
use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;
use voxgrad::Error;
use voxgrad::io::{self, Geometry};
use voxgrad::plan::verify::{self, Verification};

/// Extent of every image.
pub const SIDE: usize = 16;
/// The ignore label.
pub const IGNORE: u8 = 3;

/// Six cases `c_0` to `c_5` of 16 x 16 x 16 voxels, labels background 0, a 1, b 2, ignore 3.
pub struct Place(pub tempfile::TempDir);

impl Place {
    pub fn new() -> Self {
        let place = Place(tempfile::tempdir().unwrap());
        for folder in ["imagesTr", "labelsTr"] {
            fs::create_dir(place.path(folder)).unwrap();
        }
        for case in 0..6 {
            let labels = labels();
            let image = labels.mapv(|label| 100 + 50 * label);
            place.write(&format!("imagesTr/c_{case}_0000.nii.gz"), &image);
            place.write(&format!("labelsTr/c_{case}.nii.gz"), &labels);
        }
        place.describe(r#""labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}, "numTraining": 6"#);
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, volume: &Array3<u8>) {
        io::write_labels(&self.path(name), volume.view(), &Geometry::new([1.0; 3])).unwrap();
    }

    pub fn describe(&self, fields: &str) {
        let text = format!(r#"{{"channel_names": {{"0": "MR"}}, "file_ending": ".nii.gz", {fields}}}"#);
        fs::write(self.path("dataset.json"), text).unwrap();
    }

    pub fn rename(&self, from: &str, to: &str) {
        fs::rename(self.path(from), self.path(to)).unwrap();
    }

    /// Everything that is found.
    pub fn verify(&self) -> Verification {
        verify::verify(self.0.path(), 2, |_| {}).unwrap()
    }

    pub fn failures(&self) -> Vec<Error> {
        self.verify().failures
    }

    /// Changes the decompressed bytes of a file.
    pub fn patch(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let path = self.path(name);
        let mut bytes = Vec::new();
        flate2::read::MultiGzDecoder::new(fs::File::open(&path).unwrap()).read_to_end(&mut bytes).unwrap();
        change(&mut bytes);
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&bytes).unwrap();
        fs::write(path, encoder.finish().unwrap()).unwrap();
    }
}

/// Label map of every case.
pub fn labels() -> Array3<u8> {
    Array3::from_shape_fn((SIDE, SIDE, SIDE), |(z, y, x)| match (z, y) {
        (4..8, 4..12) => 1,
        (8..12, 4..12) => 2,
        _ if x == 0 => 0,
        _ => IGNORE * u8::from(x > 8),
    })
}
