//! Counting lesions: connected components instead of voxels.

use ndarray::{Array3, ArrayView3};

use super::components::Components;
use crate::dataset::LabelGroup;

/// Connected components of one label or region in one case. Voxels are connected through faces, edges and corners (26
/// neighbours, as in nnU-Net's postprocessing). Ignored voxels belong to no component.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Lesions {
    /// Components of the reference.
    pub reference: usize,
    /// Those of them that share a voxel with the prediction.
    pub found: usize,
    /// Components of the prediction.
    pub predicted: usize,
    /// Those of them that share no voxel with the reference.
    pub invented: usize,
}

/// Counts the components of both maps over all voxels whose reference is not `ignore`. Shapes must agree.
pub fn lesions(
    prediction: ArrayView3<i16>,
    reference: ArrayView3<i16>,
    group: &LabelGroup,
    ignore: Option<i16>,
) -> Lesions {
    let member = |map: ArrayView3<i16>| {
        let mut mask = map.mapv(|label| group.contains(label));
        mask.zip_mut_with(&reference, |inside, &truth| *inside &= Some(truth) != ignore);
        mask
    };
    let (predicted, truth) = (member(prediction), member(reference));
    let (reference, found) = components(&truth, &predicted);
    let (count, confirmed) = components(&predicted, &truth);
    Lesions { reference, found, predicted: count, invented: count - confirmed }
}

/// Number of connected components, and how many of them share a voxel with the other mask.
fn components(mask: &Array3<bool>, other: &Array3<bool>) -> (usize, usize) {
    let components = Components::of(mask.view());
    let mut touching = vec![false; components.sizes.len() + 1];
    for (&number, &other) in components.numbers.iter().zip(other) {
        touching[number as usize] |= other;
    }
    // Number 0 is outside.
    (components.sizes.len(), touching.iter().skip(1).filter(|touches| **touches).count())
}
