//! Counting lesions: connected components instead of voxels.

use ndarray::{Array3, ArrayView3};

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
    let (depth, height, width) = mask.dim();
    let mut open = mask.clone();
    let (mut count, mut touching) = (0, 0);
    let mut pending = Vec::new();
    for seed in ndarray::indices(mask.dim()) {
        if !open[seed] {
            continue;
        }
        let mut touches = false;
        open[seed] = false;
        pending.push(seed);
        while let Some((z, y, x)) = pending.pop() {
            touches |= other[(z, y, x)];
            let around = |at: usize, length: usize| at.saturating_sub(1)..(at + 2).min(length);
            for z in around(z, depth) {
                for y in around(y, height) {
                    for x in around(x, width) {
                        if std::mem::take(&mut open[(z, y, x)]) {
                            pending.push((z, y, x));
                        }
                    }
                }
            }
        }
        count += 1;
        touching += usize::from(touches);
    }
    (count, touching)
}
