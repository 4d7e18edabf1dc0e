//! One picture per case: three planes through one voxel, each as image, annotation, prediction and map of the errors.

use std::collections::BTreeSet;
use std::path::Path;

use ndarray::{ArrayView2, ArrayView3, Axis};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::canvas::{Canvas, FONT};
use super::panel::{Greyscale, Tint, Zoom, colour, usual_range};
use crate::error::{Error, FileError, Result};

/// Longer side of a panel in pixels, roughly.
const PANEL: usize = 340;
const GAP: usize = 20;
const HEAD: usize = 64;
const CAPTION: usize = 34;
const FOOT: usize = 44;
/// Pixels that title and legend take at least.
const LEAST_WIDTH: usize = 760;

const BACKGROUND: RGBColor = RGBColor(16, 18, 22);
const TEXT: RGBColor = RGBColor(232, 235, 240);
const FAINT: RGBColor = RGBColor(150, 157, 168);

/// What a voxel of the map of errors says, with its colour.
const AGREEMENT: [(&str, [u8; 3]); 4] = [
    ("agrees", [60, 190, 130]),
    ("invented", [225, 70, 85]),
    ("missed", [86, 180, 233]),
    ("other class", [240, 228, 66]),
];

/// What is shown of a case. All volumes share one grid, (z, y, x).
#[derive(Debug, Clone)]
pub struct Planes<'a> {
    /// Title of the picture.
    pub case: &'a str,
    /// One channel of the image.
    pub image: ArrayView3<'a, f32>,
    /// The annotation, complete or sparse.
    pub annotation: Option<ArrayView3<'a, i16>>,
    /// The prediction.
    pub prediction: Option<ArrayView3<'a, i16>>,
    /// Voxels without annotation.
    pub ignore: Option<i16>,
    /// Label values and their names for the legend, background left out.
    pub labels: &'a [(i16, String)],
    /// Spacing (z, y, x), for the shape of voxels.
    pub spacing: [f64; 3],
    /// The voxel that all planes go through.
    pub at: [usize; 3],
    /// Values of the image that are black and white; of the three slices, without the darkest per cent and the brightest
    /// half per cent, unless given.
    pub window: Option<[f32; 2]>,
}

/// One plane: the axis that it stands on, and its slices.
struct Plane<'a> {
    axis: usize,
    image: ArrayView2<'a, f32>,
    annotation: Option<ArrayView2<'a, i16>>,
    prediction: Option<ArrayView2<'a, i16>>,
    zoom: Zoom,
}

/// Writes the picture of a case: a row for each of the planes that stand on z, y and x. In the last two, z points up. Where
/// nobody annotated, annotation and map of errors are hatched.
///
/// # Errors
/// [`FileError::Figure`] if the volumes differ in shape or are empty, the voxel lies outside, or the window is none;
/// [`FileError::Io`].
pub fn write_planes(path: &Path, planes: &Planes) -> Result<()> {
    let failed = |problem: &str| Error::File(FileError::Figure { path: path.into(), problem: problem.into() });
    let shape = planes.image.dim();
    let volumes = [planes.annotation, planes.prediction];
    if volumes.into_iter().flatten().any(|volume| volume.dim() != shape) || planes.image.is_empty() {
        return Err(failed("image and label maps differ in shape, or are empty"));
    }
    if planes.at.iter().zip([shape.0, shape.1, shape.2]).any(|(&at, length)| at >= length) {
        return Err(failed("the planes lie outside of the image"));
    }
    if planes.window.is_some_and(|[low, high]| !(low.is_finite() && high.is_finite() && low < high)) {
        return Err(failed("the window has no width"));
    }
    let rows: Vec<Plane> = (0..3).map(|axis| plane(planes, axis)).collect();
    let [low, high] =
        planes.window.unwrap_or_else(|| usual_range(rows.iter().flat_map(|row| row.image.iter().copied())));
    let captions = captions(planes);
    let column = rows.iter().map(|row| row.zoom.width).max().unwrap_or(0);
    let width = (captions.len() * (column + GAP) + GAP).max(LEAST_WIDTH);
    let height = HEAD + rows.iter().map(|row| row.zoom.height + CAPTION).sum::<usize>() + FOOT;
    let mut canvas = Canvas::new(width, height, BACKGROUND);
    let mut top = HEAD;
    for row in &rows {
        let image = Greyscale::between(row.image, low, high);
        for (place, tints) in tints(row, planes.ignore).iter().enumerate() {
            let left = GAP + place * (column + GAP) + (column - row.zoom.width) / 2;
            let pixels = row.zoom.paint(&image, tints.as_ref());
            for (y, line) in pixels.chunks_exact(3 * row.zoom.width).enumerate() {
                let first = 3 * ((top + y) * width + left);
                canvas.pixels[first..first + line.len()].copy_from_slice(line);
            }
        }
        top += row.zoom.height + CAPTION;
    }
    canvas.draw(path, |area| write_texts(area, planes, &rows, &captions, column))?;
    canvas.write(path)
}

/// The slices on which an axis stands; z, where it is in the slice, from high to low.
fn plane<'a>(planes: &Planes<'a>, axis: usize) -> Plane<'a> {
    let at = planes.at[axis];
    let rest: Vec<usize> = (0..3).filter(|other| *other != axis).collect();
    let spacing = [planes.spacing[rest[0]], planes.spacing[rest[1]]];
    let image = upright(planes.image.index_axis_move(Axis(axis), at), axis);
    let labels = |volume: Option<ArrayView3<'a, i16>>| {
        volume.map(|volume| upright(volume.index_axis_move(Axis(axis), at), axis))
    };
    let (annotation, prediction) = (labels(planes.annotation), labels(planes.prediction));
    let zoom = Zoom::new([image.dim().0, image.dim().1], spacing, PANEL);
    Plane { axis, image, annotation, prediction, zoom }
}

fn upright<T>(mut slice: ArrayView2<T>, axis: usize) -> ArrayView2<T> {
    if axis > 0 {
        slice.invert_axis(Axis(0));
    }
    slice
}

fn captions(planes: &Planes) -> Vec<&'static str> {
    let mut captions = vec!["image"];
    captions.extend(planes.annotation.map(|_| "annotation"));
    captions.extend(planes.prediction.map(|_| "prediction"));
    captions.extend(planes.annotation.and(planes.prediction).map(|_| "errors"));
    captions
}

type Tints<'a> = Box<dyn Fn(usize, usize) -> Tint + 'a>;

/// What each panel of a plane shows, in the order of the captions.
fn tints<'a>(plane: &'a Plane, ignore: Option<i16>) -> Vec<Tints<'a>> {
    let shown = move |label: i16| match label {
        label if Some(label) == ignore => Tint::Hatched,
        label if label <= 0 => Tint::None,
        label => Tint::Label(label),
    };
    let mut panels: Vec<Tints> = vec![Box::new(|_, _| Tint::None)];
    for labels in [&plane.annotation, &plane.prediction].into_iter().flatten() {
        panels.push(Box::new(move |row, column| shown(labels[[row, column]])));
    }
    if let (Some(truth), Some(predicted)) = (&plane.annotation, &plane.prediction) {
        panels.push(Box::new(move |row, column| {
            let (truth, predicted) = (truth[[row, column]], predicted[[row, column]]);
            let colour = |place: usize| {
                let [r, g, b] = AGREEMENT[place].1;
                Tint::Colour(r, g, b)
            };
            match (truth > 0, predicted > 0) {
                _ if Some(truth) == ignore => Tint::Hatched,
                (false, false) => Tint::None,
                (true, true) if truth == predicted => colour(0),
                (false, true) => colour(1),
                (true, false) => colour(2),
                (true, true) => colour(3),
            }
        }));
    }
    panels
}

fn write_texts(
    area: &DrawingArea<BitMapBackend, plotters::coord::Shift>,
    planes: &Planes,
    rows: &[Plane],
    captions: &[&str],
    column: usize,
) -> Result<(), Box<dyn std::error::Error>> {
    let (left, at_left) = (GAP as i32, Pos::new(HPos::Left, VPos::Center));
    let title = TextStyle::from((FONT, 24, FontStyle::Bold)).color(&TEXT).pos(at_left);
    let middle = HEAD as i32 / 2;
    area.draw(&Text::new(planes.case, (left, middle), title.clone()))?;
    let (title_width, _) = area.estimate_text_size(planes.case, &title)?;
    if let Some(annotation) = planes.annotation {
        let annotated = annotation.iter().filter(|&&label| Some(label) != planes.ignore).count();
        let share = 100.0 * annotated as f64 / annotation.len() as f64;
        let small = TextStyle::from((FONT, 17)).color(&FAINT).pos(at_left);
        let note = format!("{share:.1} % of the volume annotated");
        area.draw(&Text::new(note, (left + title_width as i32 + 18, middle + 2), small))?;
    }
    let shape = [planes.image.dim().0, planes.image.dim().1, planes.image.dim().2];
    let centred = TextStyle::from((FONT, 16)).color(&TEXT).pos(Pos::new(HPos::Center, VPos::Center));
    let mut top = HEAD;
    for row in rows {
        for (place, caption) in captions.iter().enumerate() {
            let x = GAP + place * (column + GAP) + column / 2;
            let y = top + row.zoom.height + CAPTION / 2;
            let plane = format!("{} {} of {}", ["z", "y", "x"][row.axis], planes.at[row.axis] + 1, shape[row.axis]);
            let text = if place == 0 { format!("{caption}, {plane}") } else { (*caption).into() };
            area.draw(&Text::new(text, (x as i32, y as i32), centred.clone()))?;
        }
        top += row.zoom.height + CAPTION;
    }
    legend(area, planes, rows, (top + FOOT / 2 - 4) as i32)
}

/// Names of the labels that the three planes show, as many as there is room for, and what the map of errors means.
fn legend(
    area: &DrawingArea<BitMapBackend, plotters::coord::Shift>,
    planes: &Planes,
    rows: &[Plane],
    y: i32,
) -> Result<(), Box<dyn std::error::Error>> {
    let maps = rows.iter().flat_map(|row| [&row.annotation, &row.prediction]).flatten();
    let shown: BTreeSet<i16> = maps.flat_map(|map| map.iter().copied()).collect();
    let labels = planes.labels.iter().filter(|(label, _)| shown.contains(label));
    let mut entries: Vec<(RGBColor, &str)> = labels.map(|(label, name)| (colour(*label), name.as_str())).collect();
    if planes.annotation.is_some() && planes.prediction.is_some() {
        let meaning = AGREEMENT.iter().map(|(name, [r, g, b])| (RGBColor(*r, *g, *b), *name));
        // What is at the end may find no room.
        entries.splice(0..0, meaning);
    }
    let style = TextStyle::from((FONT, 15)).color(&FAINT).pos(Pos::new(HPos::Left, VPos::Center));
    let (room, mut x) = (area.dim_in_pixel().0 as i32 - GAP as i32, GAP as i32);
    if planes.annotation.is_some() && planes.ignore.is_some_and(|ignore| shown.contains(&ignore)) {
        let note = "hatched: not annotated";
        area.draw(&Text::new(note, (x, y), style.clone()))?;
        x += area.estimate_text_size(note, &style)?.0 as i32 + 24;
    }
    for (place, (colour, name)) in entries.iter().enumerate() {
        let (width, _) = area.estimate_text_size(name, &style)?;
        let end = x + 23 + width as i32;
        if end + 100 > room && place + 1 < entries.len() || end > room {
            area.draw(&Text::new(format!("and {} more", entries.len() - place), (x, y), style))?;
            break;
        }
        area.draw(&Rectangle::new([(x, y - 7), (x + 14, y + 7)], colour.filled()))?;
        area.draw(&Text::new((*name).to_owned(), (x + 21, y), style.clone()))?;
        x = end + 20;
    }
    Ok(())
}
