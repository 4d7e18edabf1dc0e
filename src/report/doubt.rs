//! A slice that an annotator is asked to look at: image, annotation, prediction, and where the prediction is in doubt.

use std::ops::Range;
use std::path::Path;

use ndarray::{ArrayView2, ArrayView3, Axis};

use super::overlay::{PANEL, Sheet, annotated_share, write_sheet};
use super::panel::{Greyscale, Tint, Zoom, to_byte};
use crate::error::{Error, FileError, Result};

/// From dark over red and orange to light yellow, each a little lighter than the one before.
const HEAT: [[f32; 3]; 5] =
    [[0.0, 0.0, 0.0], [90.0, 16.0, 80.0], [205.0, 50.0, 50.0], [250.0, 150.0, 40.0], [255.0, 240.0, 160.0]];
/// The colour of the outline.
const OUTLINE: [u8; 3] = [255, 255, 255];

/// What is shown. All volumes share one grid, (z, y, x).
#[derive(Debug, Clone)]
pub struct Doubt<'a> {
    /// Title of the picture.
    pub title: &'a str,
    /// Behind the title.
    pub note: &'a str,
    /// The axis across which the slice lies, and its place.
    pub slice: (usize, usize),
    /// The part of the slice that is meant, along the other two axes; everything if `None`.
    pub outline: Option<[Range<usize>; 2]>,
    /// One channel of the image.
    pub image: ArrayView3<'a, f32>,
    /// What is annotated, if anything is.
    pub annotation: Option<ArrayView3<'a, i16>>,
    /// The prediction.
    pub prediction: ArrayView3<'a, i16>,
    /// How uncertain every voxel is; the slice's most uncertain voxel is brightest.
    pub uncertainty: ArrayView3<'a, f32>,
    /// Voxels without annotation.
    pub ignore: Option<i16>,
    /// Label values and their names for the legend, background left out.
    pub labels: &'a [(i16, String)],
    /// Spacing (z, y, x), for the shape of voxels.
    pub spacing: [f64; 3],
}

/// Writes the picture of a slice.
///
/// # Errors
/// [`FileError::Figure`] if the volumes differ in shape or have no such slice; [`FileError::Io`].
pub fn write_doubt(path: &Path, doubt: &Doubt) -> Result<()> {
    let (axis, place) = doubt.slice;
    let shape = doubt.image.dim();
    let fits = doubt.prediction.dim() == shape
        && doubt.uncertainty.dim() == shape
        && doubt.annotation.is_none_or(|annotation| annotation.dim() == shape)
        && axis < 3
        && place < doubt.image.len_of(Axis(axis.min(2)))
        && !doubt.image.is_empty();
    if !fits {
        let problem = "image, label maps and uncertainty differ in shape, or have no such slice".into();
        return Err(Error::File(FileError::Figure { path: path.into(), problem }));
    }
    let image = Greyscale::new(doubt.image.index_axis(Axis(axis), place));
    let (rows, columns) = image.values.dim();
    // The spacing along the slice's own axes.
    let along: Vec<f64> = (0..3).filter(|&other| other != axis).map(|other| doubt.spacing[other]).collect();
    let zoom = Zoom::new([rows, columns], [along[0], along[1]], PANEL);
    let panel = |labels: ArrayView2<'_, i16>| {
        zoom.paint(&image, &|row, column| match labels[[row, column]] {
            label if Some(label) == doubt.ignore => Tint::Dimmed,
            label if label <= 0 => Tint::None,
            label => Tint::Label(label),
        })
    };
    let mut panels = vec![("image", zoom.paint(&image, &|_, _| Tint::None))];
    let mut sparse = false;
    if let Some(annotation) = doubt.annotation {
        let slice = annotation.index_axis(Axis(axis), place);
        sparse = annotated_share(slice.insert_axis(Axis(0)), doubt.ignore) < 1.0;
        panels.push(("annotation", panel(slice)));
    }
    let slice = doubt.prediction.index_axis(Axis(axis), place);
    panels.push(("prediction", panel(slice)));
    panels.push(("uncertainty", heat(&zoom, &image, doubt.uncertainty.index_axis(Axis(axis), place))));
    if let Some(outline) = &doubt.outline {
        panels.iter_mut().for_each(|(_, pixels)| draw_outline(&zoom, pixels, outline));
    }
    let (title, note, labels) = (doubt.title, doubt.note.to_owned(), doubt.labels);
    write_sheet(path, &Sheet { title, note, panels, zoom: &zoom, labels, sparse })
}

/// The image in dark grey, and over it the uncertainty as a share of the slice's largest one.
fn heat(zoom: &Zoom, image: &Greyscale, uncertainty: ArrayView2<f32>) -> Vec<u8> {
    let largest = uncertainty.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
    let mut pixels = Vec::with_capacity(3 * zoom.width * zoom.height);
    for y in 0..zoom.height {
        for x in 0..zoom.width {
            let voxel = [y / zoom.voxel[0], x / zoom.voxel[1]];
            let share = (uncertainty[voxel] / largest).clamp(0.0, 1.0);
            let step = share * (HEAT.len() - 1) as f32;
            let (first, rest) = (step.floor(), step.fract());
            let low = HEAT[first as usize];
            let high = HEAT[(first as usize + 1).min(HEAT.len() - 1)];
            let grey = 0.45 * image.values[voxel] * (1.0 - share);
            pixels.extend((0..3).map(|channel| {
                let colour = low[channel] * (1.0 - rest) + high[channel] * rest;
                to_byte((colour / 255.0 + grey).min(1.0))
            }));
        }
    }
    pixels
}

/// A line of two pixels around the voxels of a rectangle.
fn draw_outline(zoom: &Zoom, pixels: &mut [u8], [rows, columns]: &[Range<usize>; 2]) {
    let (top, bottom) = (rows.start * zoom.voxel[0], rows.end * zoom.voxel[0]);
    let (left, right) = (columns.start * zoom.voxel[1], columns.end * zoom.voxel[1]);
    for y in top..bottom.min(zoom.height) {
        for x in left..right.min(zoom.width) {
            let inside = y >= top + 2 && y + 2 < bottom && x >= left + 2 && x + 2 < right;
            if !inside {
                let first = 3 * (y * zoom.width + x);
                pixels[first..first + 3].copy_from_slice(&OUTLINE);
            }
        }
    }
}
