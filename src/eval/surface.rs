//! Distances between the surfaces of a prediction and its reference, in millimetres, by either of two definitions.
//!
//! *Voxels*, MONAI's. A voxel of a mask belongs to its surface if one of its six face neighbours does not belong to the
//! mask; beyond the image's border nothing does. The distance of a surface voxel to the other surface is that of its centre
//! to the nearest centre there. All surface voxels count alike. With the ignore label, ignored voxels belong to no mask, and
//! neighbours that are ignored make no surface: where the annotation ends is not where the object ends.
//!
//! *Elements*, those of DeepMind's surface-distance. The surface passes every corner of voxels around which some of the eight
//! voxels belong to the mask and some do not, with the area that marching cubes give it there; distances are between such
//! corners, and count by area. A corner beside an ignored voxel belongs to no surface.
//!
//! - Hausdorff distance, 95th percentile: the larger of both directions' percentiles; among voxels interpolated as numpy
//!   does, among elements the first distance up to which lie 95 % of the area.
//! - Average symmetric surface distance: the mean over both surfaces.
//! - Normalised surface Dice: the share of both surfaces that lies within a tolerance of the other one.

use ndarray::{Array3, ArrayView3, Axis, s};

use super::elements;
use super::estimate::percentile;
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

/// What a surface is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SurfaceKind {
    /// Voxels of the mask at its border, as in MONAI.
    #[default]
    Voxels,
    /// Pieces of the surface between the voxels, weighted by their area, as in surface-distance.
    Elements,
}

impl SurfaceKind {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            SurfaceKind::Voxels => "voxels",
            SurfaceKind::Elements => "elements",
        }
    }
}

/// How surfaces are measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SurfaceSettings {
    /// What they are made of.
    pub kind: SurfaceKind,
    /// Tolerance of the normalised surface Dice in millimetres.
    pub tolerance: f64,
}

/// Measures one label or region over all voxels whose reference is not `ignore`. `spacing` is that of the axes (z, y, x) in
/// millimetres. Shapes must agree.
pub fn surface_distances(
    prediction: ArrayView3<i16>,
    reference: ArrayView3<i16>,
    group: &LabelGroup,
    ignore: Option<i16>,
    spacing: [f64; 3],
    settings: SurfaceSettings,
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
    let is_ignored = |at: [usize; 3]| Some(reference[at]) == ignore;
    let surfaces = masks.each_ref().map(|mask| match settings.kind {
        SurfaceKind::Voxels => surface_voxels(mask, &is_ignored, surrounding),
        SurfaceKind::Elements => elements::areas(mask, &is_ignored, surrounding, spacing),
    });
    // Distance and area of every piece, by distance.
    let [predicted, truth] = [(&surfaces[0], &surfaces[1]), (&surfaces[1], &surfaces[0])].map(|(from, to)| {
        let squares = squared_distances(to, spacing);
        let pieces = from.iter().zip(&squares).filter(|(area, _)| **area > 0.0);
        let mut pieces: Vec<(f64, f64)> = pieces.map(|(&area, square)| (square.sqrt(), area)).collect();
        pieces.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        pieces
    });
    // A mask that touches only ignored voxels is there, but what is known of its surface is nothing: no distance to it.
    let there = masks.each_ref().map(|mask| mask.iter().any(|&inside| inside));
    let unknown = predicted.is_empty() && there[0] || truth.is_empty() && there[1];
    if unknown || predicted.is_empty() && truth.is_empty() {
        return all(f64::NAN);
    }
    if predicted.is_empty() || truth.is_empty() {
        return SurfaceDistances { within_tolerance: 0.0, ..all(f64::INFINITY) };
    }
    let both = || predicted.iter().chain(&truth);
    let area: f64 = both().map(|(_, area)| area).sum();
    let hausdorff_95 = |pieces: &[(f64, f64)]| match settings.kind {
        SurfaceKind::Voxels => percentile(&pieces.iter().map(|(distance, _)| *distance).collect::<Vec<f64>>(), 0.95),
        SurfaceKind::Elements => elements::percentile_by_area(pieces, 0.95),
    };
    SurfaceDistances {
        hausdorff_95: hausdorff_95(&predicted).max(hausdorff_95(&truth)),
        average: both().map(|(distance, area)| distance * area).sum::<f64>() / area,
        within_tolerance: both().filter(|piece| piece.0 <= settings.tolerance).map(|piece| piece.1).sum::<f64>() / area,
    }
}

/// The surface voxels of a mask in the part that surrounds it: 1 for each, 0 elsewhere.
fn surface_voxels(
    mask: &Array3<bool>,
    is_ignored: &impl Fn([usize; 3]) -> bool,
    surrounding: [[usize; 2]; 3],
) -> Array3<f64> {
    let [z, y, x] = surrounding.map(|[start, end]| start..end);
    let part = mask.slice(s![z, y, x]);
    let mut surface = Array3::zeros(part.dim());
    for ((at, inside), target) in part.indexed_iter().zip(&mut surface) {
        if *inside && is_surface(mask, is_ignored, [at.0, at.1, at.2], surrounding) {
            *target = 1.0;
        }
    }
    surface
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
    is_ignored: &impl Fn([usize; 3]) -> bool,
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
            !mask[neighbour] && !is_ignored(neighbour)
        })
    })
}

/// Squared distance of every place to the nearest one of a surface, in square millimetres; infinite if there is none. Exact:
/// the lower envelope of parabolas along one axis after the other (Felzenszwalb and Huttenlocher, 2012).
fn squared_distances(surface: &Array3<f64>, spacing: [f64; 3]) -> Array3<f64> {
    let mut squares = surface.mapv(|area| if area > 0.0 { 0.0 } else { f64::INFINITY });
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
