//! What nnU-Net keeps beside probabilities: `CASE.pkl`, a pickle of where a case lies and how it was cropped. nnU-Net's
//! ensembling takes the geometry of what it writes from there.

use super::pickle::{self, Value};
use crate::error::Result;
use crate::io::{Geometry, write_atomically};
use crate::preprocess::Properties;
use std::path::Path;

/// Writes the properties of a case as nnU-Net's readers name them, in plain values only: spacing, crop and shapes of the
/// transposed image, and the placement for `SimpleITKIO` and for `NibabelIO`.
///
/// # Errors
/// [`FileError::Io`](crate::error::FileError::Io).
pub fn write_properties(path: &Path, properties: &Properties, geometry: &Geometry) -> Result<()> {
    let counts = |counts: &[usize]| counts.iter().map(|&count| Value::Int(count as i64)).collect::<Vec<_>>();
    let corners = properties.bbox.iter().map(|side| Value::List(counts(side))).collect();
    let content = Value::dict([
        ("sitk_stuff", simple_itk(geometry)),
        ("nibabel_stuff", nibabel(geometry)),
        ("spacing", Value::List(floats(&properties.spacing))),
        ("shape_before_cropping", Value::Tuple(counts(&properties.shape_before_cropping))),
        ("bbox_used_for_cropping", Value::List(corners)),
        ("shape_after_cropping_and_before_resampling", Value::Tuple(counts(&properties.shape_after_cropping))),
    ]);
    write_atomically(path, &pickle::write(&content))
}

fn floats(values: &[f64]) -> Vec<Value> {
    values.iter().map(|&value| Value::Float(value)).collect()
}

/// Spacing, origin and directions in the order x, y, z; ITK's first two axes point the other way than NIfTI's.
fn simple_itk(geometry: &Geometry) -> Value {
    let [z, y, x] = geometry.spacing;
    let rows = geometry.affine();
    let lengths: [f64; 3] =
        std::array::from_fn(|axis| rows.iter().map(|row| row[axis] * row[axis]).sum::<f64>().sqrt());
    let signs = [-1.0, -1.0, 1.0];
    // Adding zero makes a negative one positive.
    let origin: Vec<f64> = rows.iter().zip(signs).map(|(row, sign)| sign * row[3] + 0.0).collect();
    let directions: Vec<f64> = rows
        .iter()
        .zip(signs)
        .flat_map(|(row, sign)| (0..3).map(move |axis| sign * row[axis] / lengths[axis] + 0.0))
        .collect();
    Value::dict([
        ("spacing", Value::Tuple(floats(&[x, y, z]))),
        ("origin", Value::Tuple(floats(&origin))),
        ("direction", Value::Tuple(floats(&directions))),
    ])
}

/// The affine map of four rows; nibabel takes lists for arrays.
fn nibabel(geometry: &Geometry) -> Value {
    let [x, y, z] = geometry.affine().map(|row| Value::List(floats(&row)));
    let last = Value::List(floats(&[0.0, 0.0, 0.0, 1.0]));
    Value::dict([("original_affine", Value::List(vec![x, y, z, last]))])
}
