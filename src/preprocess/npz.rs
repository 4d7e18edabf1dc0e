//! nnU-Net's older preprocessed cases: `<case>.npz`, a zip archive of the numpy arrays `data` and `seg`.
//!
//! The pickle beside it is not read: class locations are sampled anew, which gives what nnU-Net 2.8 would store, and
//! the way back to the raw grid, which training does not need, is that of an uncropped volume.

use std::path::Path;

use ndarray::{Array4, ArrayView3, Axis};

use super::{ClassLocations, PreprocessedCase, Properties};
use crate::dataset::LabelManager;
use crate::error::{Error, FileError, PreprocessError, Result};
use crate::io::{Geometry, read_npz_array};

/// Reads a case that was preprocessed to `spacing` (transposed axes).
///
/// # Errors
/// [`FileError::Io`](crate::error::FileError::Io), or [`PreprocessError::StoredCase`] for a damaged archive or arrays of other types or shapes.
pub fn read_npz(path: &Path, labels: &LabelManager, spacing: [f64; 3]) -> Result<PreprocessedCase> {
    let array = |name: &str| match read_npz_array(path, name) {
        Err(Error::File(FileError::Npz { path, problem })) => {
            Err(Error::Preprocess(PreprocessError::StoredCase { path, problem }))
        }
        array => array,
    };
    let (data, seg) = (array("data")?, array("seg")?);
    let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    from_arrays(path, name, data, seg, labels, spacing)
}

/// The case of nnU-Net's arrays: image `(c, z, y, x)`, labels `(1, z, y, x)`.
pub(super) fn from_arrays(
    path: &Path,
    name: String,
    data: Array4<f32>,
    seg: Array4<f32>,
    labels: &LabelManager,
    spacing: [f64; 3],
) -> Result<PreprocessedCase> {
    let bad =
        |problem: &str| Error::Preprocess(PreprocessError::StoredCase { path: path.into(), problem: problem.into() });
    let (channels, depth, height, width) = data.dim();
    if channels == 0 || seg.dim() != (1, depth, height, width) {
        return Err(bad("`data` and `seg` differ in shape"));
    }
    let shape = [depth, height, width];
    let seg: ArrayView3<f32> = seg.index_axis(Axis(0), 0);
    if seg.iter().any(|v| v.fract() != 0.0 || v.abs() > 32767.0) {
        return Err(bad("`seg` holds something that is not a label"));
    }
    let seg = seg.mapv(|label| label as i16);
    Ok(PreprocessedCase {
        name,
        class_locations: ClassLocations::sample(seg.view(), labels),
        data,
        seg,
        properties: Properties {
            spacing,
            shape_before_cropping: shape,
            bbox: shape.map(|n| [0, n]),
            shape_after_cropping: shape,
        },
        geometry: Geometry::new(spacing),
    })
}
