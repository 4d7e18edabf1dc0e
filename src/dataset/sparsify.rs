//! Turning dense annotations into sparse ones, as nnU-Net's integration test does.
//!
//! About a tenth of all slice planes stays annotated, shared among the three directions; everything else becomes the
//! ignore label. The draws equal numpy's, so the result is the same everywhere.

use std::fs;
use std::path::Path;

use ndarray::{Array3, ArrayView3, Axis};
use serde_json::json;

use super::Dataset;
use crate::error::{Error, Result};
use crate::io;
use crate::numpy_random::NumpyRandom;

const SEED: u32 = 1234;
/// Share of annotated slice planes over all three directions.
pub const ANNOTATED_SHARE: f64 = 0.1;

/// Keeps a random set of whole slices along each axis and marks the rest with `ignore`: of 36 x 50 x 35 voxels
/// 1 + 2 + 1 slices.
pub fn sparsify(dense: ArrayView3<i16>, ignore: i16, random: &mut NumpyRandom) -> Array3<i16> {
    let mut sparse = Array3::from_elem(dense.dim(), ignore);
    for axis in [Axis(0), Axis(1), Axis(2)] {
        let length = dense.len_of(axis);
        let count = (length as f64 * ANNOTATED_SHARE / 3.0).round_ties_even();
        for index in random.choice(length as u32, (count as usize).max(1)) {
            let index = index as usize;
            sparse.index_axis_mut(axis, index).assign(&dense.index_axis(axis, index));
        }
    }
    sparse
}

/// Makes nnU-Net's integration dataset 996 from the Decathlon's hippocampus dataset: regions hippocampus (1, 2) and
/// anterior 1, ignore 3, sparse labels. `target` is created; label files are drawn in the order of their names.
///
/// # Errors
/// The errors of [`Dataset::open`], of NIfTI input and output, and [`Error::Io`].
pub fn integration_dataset(source: &Path, target: &Path) -> Result<()> {
    let dense = Dataset::open(source)?;
    let (images, labels) = (target.join("imagesTr"), target.join("labelsTr"));
    for folder in [&images, &labels] {
        fs::create_dir_all(folder).map_err(Error::io(folder, "create"))?;
    }
    let mut random = NumpyRandom::new(SEED);
    for case in &dense.cases {
        for image in &case.images {
            let copy = images.join(image.file_name().unwrap_or_default());
            fs::copy(image, &copy).map_err(Error::io(copy, "write"))?;
        }
        let Some(file) = &case.label else { continue };
        let map = io::read_labels(file)?;
        let sparse = sparsify(map.data.view(), 3, &mut random);
        let copy = labels.join(file.file_name().unwrap_or_default());
        io::write_labels(&copy, sparse.mapv(|label| label as u8).view(), &map.geometry)?;
    }
    let mut json = dense.json.source().clone();
    json["labels"] = json!({"background": 0, "hippocampus": [1, 2], "anterior": 1, "ignore": 3});
    json.insert("regions_class_order".into(), json!([2, 1]));
    io::write_json(&target.join("dataset.json"), &json)
}
