//! Scribbles as ScribbleBench draws them (Gotkowski et al., MICCAI 2025; arXiv 2403.12834).
//!
//! In every chosen slice one component of each class, background included, gets two scribbles: one through its interior
//! along a curve of degree 2 with random control points in the component, and one along a part of its outline, a few pixels
//! inside, where the outline is curved rather than straight. Both are clipped to the component, so no scribble carries a
//! wrong label. The border scribble is drawn last.
//!
//! What differs from the released code: draws are seeded; an outline's point is drawn at the pixel inside it instead of
//! being rounded to either side, so a border scribble is always in one piece; and it stays on one outline where the
//! released code may go on to the next and keep the larger part.

use std::collections::BTreeMap;

use ndarray::{Array2, ArrayView2, ArrayView3, ArrayViewMut2, Axis};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::drawn::Drawn;
use super::plane::{Component, Components, Mask, Outline, OutlinePoint};

/// Parameters along the interior curve; the released code evaluates it at steps of a thousandth.
const CURVE_STEPS: usize = 1000;

/// What to draw, and where. The defaults are ScribbleBench's.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Scribbles {
    /// Axis across the slices: 0 is z.
    pub axis: usize,
    /// Thickness in pixels, odd.
    pub thickness: usize,
    /// Interior scribbles of a component.
    pub interior: usize,
    /// Control points of an interior scribble, at least 3.
    pub control_points: usize,
    /// Border scribbles of a component.
    pub border: usize,
    /// How far inside the outline the edge of a border scribble runs, in pixels: lowest and highest.
    pub border_depth: [usize; 2],
    /// Share of the outline that a border scribble follows: lowest and highest.
    pub border_length: [f64; 2],
    /// Components smaller than this many pixels are left out.
    pub smallest_area: usize,
    /// Share of the slices with foreground that are scribbled on: lowest and highest, drawn for each case.
    pub foreground_slices: [f64; 2],
    /// Share of the slices without foreground that are scribbled on.
    pub background_slices: [f64; 2],
    /// Slices are drawn until this share of the voxels is annotated, instead of the two shares above.
    pub fraction: Option<f64>,
    /// Whether a case may stay below that share once every slice has scribbles, instead of being refused.
    pub saturate: bool,
}

impl Default for Scribbles {
    fn default() -> Self {
        Scribbles {
            axis: 0,
            thickness: 3,
            interior: 1,
            control_points: 4,
            border: 1,
            border_depth: [1, 4],
            border_length: [0.07, 0.15],
            smallest_area: 1,
            foreground_slices: [1.0; 2],
            background_slices: [1.0; 2],
            fraction: None,
            saturate: false,
        }
    }
}

impl Scribbles {
    /// Draws scribbles on a case; everything else becomes `ignore`, and what is `ignore` already stays so.
    pub fn draw(&self, dense: ArrayView3<i16>, ignore: i16, random: &mut ChaCha8Rng) -> Drawn {
        let mut annotation = Drawn::none(dense.dim(), ignore);
        let target = self.fraction.map(|fraction| fraction * dense.len() as f64);
        let mut annotated = 0;
        for index in self.slices(dense, ignore, random) {
            let plane = dense.index_axis(Axis(self.axis), index);
            let (drawn, strokes) = self.draw_plane(plane, ignore, random);
            let voxels = drawn.iter().filter(|&&label| label != ignore).count();
            if let Some(target) = target
                && (target - annotated as f64) < 0.5 * voxels as f64
            {
                return annotation; // closer to the target without this slice
            }
            annotated += voxels;
            annotation.labels.index_axis_mut(Axis(self.axis), index).assign(&drawn);
            for (label, count) in strokes {
                *annotation.strokes.entry(label).or_default() += count;
            }
        }
        annotation.exhausted = target.is_some();
        annotation
    }

    /// The slices to scribble on, in random order.
    fn slices(&self, dense: ArrayView3<i16>, ignore: i16, random: &mut ChaCha8Rng) -> Vec<usize> {
        let has_foreground = |index: &usize| {
            let plane = dense.index_axis(Axis(self.axis), *index);
            plane.iter().any(|&label| label != 0 && label != ignore)
        };
        let (mut foreground, mut background): (Vec<usize>, Vec<usize>) =
            (0..dense.len_of(Axis(self.axis))).partition(has_foreground);
        if self.fraction.is_some() {
            foreground.append(&mut background);
        }
        let mut chosen = Vec::new();
        for (mut slices, [low, high]) in [(foreground, self.foreground_slices), (background, self.background_slices)] {
            shuffle(&mut slices, random);
            let share = if low < high { random.random_range(low..=high) } else { low };
            let count = match self.fraction {
                Some(_) => slices.len(),
                None => (slices.len() as f64 * share) as usize,
            };
            chosen.extend_from_slice(&slices[..count.min(slices.len())]);
        }
        chosen
    }

    /// Scribbles on one plane, and how many strokes each class took.
    fn draw_plane(
        &self,
        plane: ArrayView2<i16>,
        ignore: i16,
        random: &mut ChaCha8Rng,
    ) -> (Array2<i16>, BTreeMap<i16, u64>) {
        let mut drawn = Array2::from_elem(plane.dim(), ignore);
        let mut strokes = BTreeMap::new();
        let components = Components::find(plane);
        let mut by_label: BTreeMap<i16, Vec<&Component>> = BTreeMap::new();
        for component in components.list.iter().filter(|c| c.label != ignore && c.area >= self.smallest_area) {
            by_label.entry(component.label).or_default().push(component);
        }
        for (label, candidates) in by_label {
            let Some(chosen) = weighted(&candidates, |component| component.area as f64, random) else { continue };
            let component = components.mask(candidates[chosen]);
            let interior =
                (0..self.interior).map(|_| Some(self.interior_scribble(&component, random))).collect::<Vec<_>>();
            let border = (0..self.border).map(|_| self.border_scribble(&component, random)).collect::<Vec<_>>();
            for scribble in interior.into_iter().chain(border).flatten() {
                *strokes.entry(label).or_default() += scribble.pieces();
                lay(&scribble, label, drawn.view_mut());
            }
        }
        (drawn, strokes)
    }

    fn radius(&self) -> usize {
        self.thickness / 2
    }

    /// A curve through random points of the component.
    fn interior_scribble(&self, component: &Mask, random: &mut ChaCha8Rng) -> Mask {
        let pixels = component.pixels();
        let mut scribble = component.empty();
        if pixels.is_empty() {
            return scribble;
        }
        let points: Vec<[f64; 2]> = (0..self.control_points)
            .map(|_| pixels[random.random_range(0..pixels.len())].map(|coordinate| coordinate as f64))
            .collect();
        let mut previous: Option<[usize; 2]> = None;
        for step in 0..=CURVE_STEPS {
            let at = curve(&points, step as f64 / CURVE_STEPS as f64).map(|coordinate| coordinate.round() as usize);
            if previous == Some(at) {
                continue; // most steps are shorter than a pixel
            }
            for pixel in line(previous.unwrap_or(at), at) {
                if component.inside[pixel] {
                    scribble.paint(pixel, self.radius(), component);
                }
            }
            previous = Some(at);
        }
        scribble
    }

    /// A part of the outline of what is left of the component a few pixels inside; nothing if nothing is left.
    fn border_scribble(&self, component: &Mask, random: &mut ChaCha8Rng) -> Option<Mask> {
        let [shallow, deep] = self.border_depth;
        let depth = self.radius() + random.random_range(shallow..=deep);
        let outlines = component.eroded(depth).outlines();
        let total: usize = outlines.iter().map(|outline| outline.points.len()).sum();
        let weights: Vec<f64> = outlines.iter().flat_map(curvature).collect();
        let mut centre = match weighted(&weights, |&weight| weight, random) {
            Some(centre) => centre,
            // Straight everywhere: all positions are alike.
            None if total > 0 => random.random_range(0..total),
            None => return None,
        };
        let [low, high] = self.border_length.map(|share| ((total as f64 * share) as usize).max(1));
        let length = random.random_range(low..=high.max(low));
        for outline in &outlines {
            if centre >= outline.points.len() {
                centre -= outline.points.len();
                continue;
            }
            let mut scribble = component.empty();
            for point in stretch(outline, centre, length) {
                scribble.paint(point.pixel, self.radius(), component);
            }
            return Some(scribble);
        }
        None
    }
}

/// `length` points around a centre: around the end of a closed outline, up to the ends of an open one.
fn stretch(outline: &Outline, centre: usize, length: usize) -> impl Iterator<Item = OutlinePoint> {
    let count = outline.points.len();
    let length = length.min(count);
    let start = centre as isize - (length / 2) as isize;
    let start = match outline.closed {
        true => start.rem_euclid(count as isize) as usize,
        false => (start.max(0) as usize).min(count - length),
    };
    (start..start + length).map(move |index| outline.points[index % count])
}

/// Absolute curvature along an outline, smoothed over neighbouring points (standard deviation 1), zero or positive.
fn curvature(outline: &Outline) -> Vec<f64> {
    let count = outline.points.len();
    let neighbour = |index: usize, step: isize| {
        let index = index as isize + step;
        match outline.closed {
            true => index.rem_euclid(count as isize) as usize,
            false => index.clamp(0, count as isize - 1) as usize,
        }
    };
    let gradient = |values: &[f64]| -> Vec<f64> {
        (0..count).map(|i| (values[neighbour(i, 1)] - values[neighbour(i, -1)]) / 2.0).collect()
    };
    let [y, x] = [0, 1].map(|axis| outline.points.iter().map(|point| point.at[axis]).collect::<Vec<f64>>());
    let (dy, dx) = (gradient(&y), gradient(&x));
    let (ddy, ddx) = (gradient(&dy), gradient(&dx));
    let bend: Vec<f64> = (0..count)
        .map(|i| {
            let speed = (dy[i] * dy[i] + dx[i] * dx[i]).powf(1.5);
            if speed > 0.0 { ((dy[i] * ddx[i] - dx[i] * ddy[i]) / speed).abs() } else { 0.0 }
        })
        .collect();
    let kernel = [-4_isize, -3, -2, -1, 0, 1, 2, 3, 4].map(|step| (step, (-0.5 * (step * step) as f64).exp()));
    (0..count).map(|i| kernel.iter().map(|&(step, weight)| weight * bend[neighbour(i, step)]).sum()).collect()
}

/// Point of the clamped uniform B-spline of degree 2 (a NURBS curve of unit weights) at `t` in 0..=1, by de Boor's
/// algorithm.
fn curve(points: &[[f64; 2]], t: f64) -> [f64; 2] {
    let spans = points.len().saturating_sub(2).max(1);
    let position = t * spans as f64;
    let span = (position as usize).min(spans - 1);
    // Knots 0 0 0 1 2 ... spans spans spans.
    let knot = |index: usize| index.saturating_sub(2).min(spans) as f64;
    let at = |index: usize| points[index.min(points.len() - 1)];
    let mut control = [at(span), at(span + 1), at(span + 2)];
    for level in 1..=2 {
        for j in (level..=2).rev() {
            let (left, right) = (knot(span + j), knot(span + j + 3 - level));
            let share = (position - left) / (right - left);
            control[j] = [0, 1].map(|axis| (1.0 - share) * control[j - 1][axis] + share * control[j][axis]);
        }
    }
    control[2]
}

/// Pixels of a straight line, both ends included (Bresenham).
fn line(from: [usize; 2], to: [usize; 2]) -> Vec<[usize; 2]> {
    let [mut y, mut x] = from.map(|c| c as isize);
    let [end_y, end_x] = to.map(|c| c as isize);
    let (height, width) = ((end_y - y).abs(), (end_x - x).abs());
    let (down, right) = ((end_y - y).signum(), (end_x - x).signum());
    let mut error = width - height;
    let mut pixels = vec![from];
    while (y, x) != (end_y, end_x) {
        let doubled = 2 * error;
        if doubled > -height {
            error -= height;
            x += right;
        }
        if doubled < width {
            error += width;
            y += down;
        }
        pixels.push([y as usize, x as usize]);
    }
    pixels
}

/// Lays a scribble over a plane.
fn lay(scribble: &Mask, label: i16, mut plane: ArrayViewMut2<i16>) {
    let [top, left] = scribble.origin;
    for ((y, x), _) in scribble.inside.indexed_iter().filter(|(_, inside)| **inside) {
        plane[[top + y, left + x]] = label;
    }
}

/// Index of an item drawn with a probability in proportion to its weight; `None` if no weight is positive.
pub(super) fn weighted<T>(items: &[T], weight: impl Fn(&T) -> f64, random: &mut ChaCha8Rng) -> Option<usize> {
    let total: f64 = items.iter().map(&weight).sum();
    if total <= 0.0 {
        return None;
    }
    let mut rest = random.random_range(0.0..total);
    for (index, item) in items.iter().enumerate() {
        rest -= weight(item);
        if rest < 0.0 {
            return Some(index);
        }
    }
    items.iter().rposition(|item| weight(item) > 0.0)
}

/// Puts items into random order.
pub(super) fn shuffle<T>(items: &mut [T], random: &mut ChaCha8Rng) {
    for last in (1..items.len()).rev() {
        items.swap(last, random.random_range(0..=last));
    }
}
