//! From logits back to a label map on the raw image's grid.

use ndarray::{Array3, Array4, ArrayView3, s};

use crate::error::{Error, Result};
use crate::preprocess::{Preprocessor, Properties, resample};

/// Turns the logits of a preprocessed case, `[depth, height, width, heads]` with `shape` voxels, into a segmentation in
/// the raw image's axis order and shape.
///
/// Logits (not labels) are resampled to the spacing before preprocessing, then decoded, then pasted where the image was
/// cropped.
///
/// # Errors
/// [`Error::BufferLength`] if logits and shape disagree, [`Error::ResampledTooLarge`].
pub fn segmentation(
    logits: Vec<f32>,
    shape: [usize; 3],
    properties: &Properties,
    preprocessor: &Preprocessor,
) -> Result<Array3<u8>> {
    let [depth, height, width] = shape;
    let heads = preprocessor.labels.num_segmentation_heads();
    let found = logits.len();
    let logits = Array4::from_shape_vec((depth, height, width, heads), logits).map_err(|_| Error::BufferLength {
        what: "logits",
        found,
        expected: depth * height * width * heads,
    })?;
    let to = properties.shape_after_cropping;
    let decoded = if shape == to {
        // Already contiguous: `from_shape_vec` keeps the order it was given.
        preprocessor.labels.segmentation_from_logits(logits.as_slice().unwrap_or_default())?
    } else {
        let raw_spacing = preprocessor.transpose_forward.map(|axis| properties.spacing[axis]);
        let grid = resample::Grid::between(shape, to, preprocessor.spacing, raw_spacing)?;
        let planar = logits.permuted_axes([3, 0, 1, 2]);
        let resampled = resample::logits(planar, &grid).permuted_axes([1, 2, 3, 0]);
        let interleaved: Vec<f32> = resampled.iter().copied().collect();
        preprocessor.labels.segmentation_from_logits(&interleaved)?
    };
    let found = decoded.len();
    let cropped = Array3::from_shape_vec(to, decoded).map_err(|_| Error::BufferLength {
        what: "decoded segmentation",
        found,
        expected: to.iter().product(),
    })?;
    revert(cropped.view(), properties, preprocessor.transpose_forward)
}

/// Pastes a cropped segmentation into background of the original shape and restores the raw axis order.
///
/// # Errors
/// [`Error::BufferLength`] if the segmentation does not fill the crop.
pub fn revert(cropped: ArrayView3<u8>, properties: &Properties, transpose_forward: [usize; 3]) -> Result<Array3<u8>> {
    let mut whole = Array3::zeros(properties.shape_before_cropping);
    let [z, y, x] = properties.bbox.map(|[start, end]| start..end);
    let mut target = whole.slice_mut(s![z, y, x]);
    if target.dim() != cropped.dim() {
        return Err(Error::BufferLength { what: "cropped segmentation", found: cropped.len(), expected: target.len() });
    }
    target.assign(&cropped);
    let mut backward = [0; 3];
    for (transposed, &raw) in transpose_forward.iter().enumerate() {
        backward[raw] = transposed;
    }
    Ok(whole.permuted_axes(backward).as_standard_layout().into_owned())
}
