//! Distances between the surfaces of a prediction and its reference, in millimetres.
//!
//! Definitions are MONAI's. A voxel of a mask belongs to its surface if one of its six face neighbours does not belong to
//! the mask; beyond the image's border nothing does. The distance of a surface voxel to the other surface is that of its
//! centre to the nearest centre there. With the ignore label, ignored voxels belong to no mask, and neighbours that are
//! ignored make no surface: where the annotation ends is not where the object ends.
//!
//! - Hausdorff distance, 95th percentile: the larger of both directions' percentiles, interpolated as numpy does.
//! - Average symmetric surface distance: the mean over the voxels of both surfaces.
//! - Normalised surface Dice: the share of the voxels of both surfaces that lie within a tolerance of the other one.

use ndarray::{Array3, ArrayView3, Axis, s};

use crate::dataset::LabelGroup;

/// Distances of one label or region in one case. NaN where there is neither prediction nor truth. Where only one of them
/// has a surface, both distances are infinite and no share of the surfaces is within any tolerance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SurfaceDistances {
    /// 95th percentile of the Hausdorff distance in millimetres.
    pub hausdorff_95: f64,
    /// Average symmetric surface distance in millimetres.
    pub average: f64,
    /// Normalised surface Dice, in [0, 1].
    pub within_tolerance: f64,
}

/// Measures one label or region over all voxels whose reference is not `ignore`. `spacing` is that of the axes (z, y, x),
/// `tolerance` that of the normalised surface Dice, both in millimetres. Shapes must agree.
pub fn surface_distances(
    prediction: ArrayView3<i16>,
    reference: ArrayView3<i16>,
    group: &LabelGroup,
    ignore: Option<i16>,
    spacing: [f64; 3],
    tolerance: f64,
) -> SurfaceDistances {
    let all = |value| SurfaceDistances { hausdorff_95: value, average: value, within_tolerance: value };
    let member = |map: ArrayView3<i16>| {
        let mut mask = map.mapv(|label| group.contains(label));
        mask.zip_mut_with(&reference, |inside, &truth| *inside &= Some(truth) != ignore);
        mask
    };
    let masks = [member(prediction), member(reference)];
    let Some(surrounding) = surrounding(&masks) else {
        return all(f64::NAN);
    };
    let [z, y, x] = surrounding.map(|[start, end]| start..end);
    let part = s![z, y, x];
    let surfaces = masks.each_ref().map(|mask| {
        let mut surface = Array3::from_elem(mask.slice(part).dim(), false);
        for ((at, inside), target) in mask.slice(part).indexed_iter().zip(&mut surface) {
            *target = *inside && is_surface(mask, reference, ignore, [at.0, at.1, at.2], surrounding);
        }
        surface
    });
    let [predicted, truth] = [(&surfaces[0], &surfaces[1]), (&surfaces[1], &surfaces[0])].map(|(from, to)| {
        let squares = squared_distances(to, spacing);
        let mut distances: Vec<f64> =
            from.iter().zip(&squares).filter(|(on, _)| **on).map(|(_, square)| square.sqrt()).collect();
        distances.sort_unstable_by(f64::total_cmp);
        distances
    });
    let count = (predicted.len() + truth.len()) as f64;
    if count == 0.0 {
        return all(f64::NAN);
    }
    if predicted.is_empty() || truth.is_empty() {
        return SurfaceDistances { within_tolerance: 0.0, ..all(f64::INFINITY) };
    }
    let near = [&predicted, &truth].map(|sorted| sorted.partition_point(|&distance| distance <= tolerance));
    SurfaceDistances {
        hausdorff_95: percentile(&predicted, 0.95).max(percentile(&truth, 0.95)),
        average: (predicted.iter().sum::<f64>() + truth.iter().sum::<f64>()) / count,
        within_tolerance: (near[0] + near[1]) as f64 / count,
    }
}

/// The smallest box around all masks; `None` if they are empty.
fn surrounding(masks: &[Array3<bool>; 2]) -> Option<[[usize; 2]; 3]> {
    let range = |axis: usize| {
        let any = |at: usize| masks.iter().any(|mask| mask.index_axis(Axis(axis), at).iter().any(|&inside| inside));
        let length = masks[0].len_of(Axis(axis));
        let first = (0..length).find(|&at| any(at))?;
        Some([first, (first..length).rfind(|&at| any(at))? + 1])
    };
    Some([range(0)?, range(1)?, range(2)?])
}

/// Whether a voxel of the mask, given by its place in the part, has a face neighbour that is known to be outside.
fn is_surface(
    mask: &Array3<bool>,
    reference: ArrayView3<i16>,
    ignore: Option<i16>,
    at: [usize; 3],
    part: [[usize; 2]; 3],
) -> bool {
    let at: [usize; 3] = std::array::from_fn(|axis| at[axis] + part[axis][0]);
    (0..3).any(|axis| {
        [at[axis].checked_sub(1), Some(at[axis] + 1)].into_iter().any(|place| {
            let Some(place) = place.filter(|&place| place < mask.len_of(Axis(axis))) else {
                return true;
            };
            let mut neighbour = at;
            neighbour[axis] = place;
            !mask[neighbour] && Some(reference[neighbour]) != ignore
        })
    })
}

/// Squared distance of every voxel to the nearest one that is set, in square millimetres; infinite if none is. Exact:
/// the lower envelope of parabolas along one axis after the other (Felzenszwalb and Huttenlocher, 2012).
fn squared_distances(set: &Array3<bool>, spacing: [f64; 3]) -> Array3<f64> {
    let mut squares = set.mapv(|on| if on { 0.0 } else { f64::INFINITY });
    for (axis, spacing) in spacing.into_iter().enumerate() {
        let mut envelope = Envelope::default();
        let mut line = Vec::new();
        for mut lane in squares.lanes_mut(Axis(axis)) {
            line.clear();
            line.extend(lane.iter().copied());
            envelope.build(&line, spacing);
            lane.iter_mut().enumerate().for_each(|(at, value)| *value = envelope.lowest(at, spacing));
        }
    }
    squares
}

/// Parabolas `value + (spacing (at - place))^2` that are the lowest somewhere, and from where on each of them is.
#[derive(Default)]
struct Envelope {
    parabolas: Vec<(f64, f64)>,
    begins: Vec<f64>,
    current: usize,
}

impl Envelope {
    fn build(&mut self, values: &[f64], spacing: f64) {
        self.parabolas.clear();
        self.begins.clear();
        self.current = 0;
        let square = spacing * spacing;
        for (place, &value) in values.iter().enumerate().filter(|(_, value)| value.is_finite()) {
            let place = place as f64;
            let mut begin = f64::NEG_INFINITY;
            while let Some(&(before, lower)) = self.parabolas.last() {
                begin = ((value - lower) / square + place * place - before * before) / (2.0 * (place - before));
                if self.begins.last().is_some_and(|&last| begin > last) {
                    break;
                }
                self.parabolas.pop();
                self.begins.pop();
                begin = f64::NEG_INFINITY;
            }
            self.parabolas.push((place, value));
            self.begins.push(begin);
        }
    }

    /// The envelope at places that do not fall.
    fn lowest(&mut self, at: usize, spacing: f64) -> f64 {
        let at = at as f64;
        while self.begins.get(self.current + 1).is_some_and(|&begin| begin <= at) {
            self.current += 1;
        }
        let Some(&(place, value)) = self.parabolas.get(self.current) else {
            return f64::INFINITY;
        };
        let distance = spacing * (at - place);
        value + distance * distance
    }
}

/// A quantile of sorted values, linear between neighbours.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    let position = share * (sorted.len() - 1) as f64;
    let (below, above) = (sorted[position.floor() as usize], sorted[position.ceil() as usize]);
    below + (above - below) * position.fract()
}
