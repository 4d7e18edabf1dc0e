//! One picture per case: image, sparse annotation, prediction and dense reference of the most telling slice.

use std::path::Path;

use ndarray::{ArrayView2, ArrayView3, Axis};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::canvas::{Canvas, FONT};
use crate::error::{Error, FileError, Result};

/// Longer side of a panel in pixels, roughly: voxels are scaled by whole numbers.
const PANEL: usize = 460;
const GAP: usize = 20;
const HEAD: usize = 64;
const CAPTION: usize = 40;
const FOOT: usize = 48;

const BACKGROUND: RGBColor = RGBColor(16, 18, 22);
const TEXT: RGBColor = RGBColor(232, 235, 240);
const FAINT: RGBColor = RGBColor(150, 157, 168);
/// Share of the label colour over the image.
const OPACITY: f32 = 0.5;
/// Brightness of voxels that nobody annotated.
const DIMMED: f32 = 0.38;

/// Distinguishable on grey and for most kinds of colour blindness; repeated for more labels.
const COLOURS: [RGBColor; 8] = [
    RGBColor(86, 180, 233),
    RGBColor(240, 150, 40),
    RGBColor(225, 70, 85),
    RGBColor(60, 190, 130),
    RGBColor(240, 228, 66),
    RGBColor(204, 121, 200),
    RGBColor(130, 140, 255),
    RGBColor(200, 160, 120),
];

/// What is shown of a case. All volumes share one grid, (z, y, x).
#[derive(Debug, Clone)]
pub struct Overlay<'a> {
    /// Title of the picture.
    pub case: &'a str,
    /// One channel of the image.
    pub image: ArrayView3<'a, f32>,
    /// The annotation trained on, if the case has one.
    pub annotation: Option<ArrayView3<'a, i16>>,
    /// The prediction; for [`write_annotation`] the dense labels that the annotation was made from.
    pub prediction: ArrayView3<'a, i16>,
    /// The complete reference, if there is one.
    pub reference: Option<ArrayView3<'a, i16>>,
    /// Voxels without annotation.
    pub ignore: Option<i16>,
    /// Label values and their names for the legend, background left out.
    pub labels: &'a [(i16, String)],
    /// Spacing (z, y, x), for the shape of voxels.
    pub spacing: [f64; 3],
}

/// Writes the picture of a case, of the slice with most foreground: image, annotation, prediction, reference.
///
/// # Errors
/// [`FileError::Figure`] if the volumes differ in shape or are empty; [`FileError::Io`].
pub fn write_overlay(path: &Path, overlay: &Overlay) -> Result<()> {
    write_panels(path, overlay, "prediction")
}

/// Writes the picture of a sparse annotation, of the slice with most foreground: image, annotation, dense labels.
///
/// # Errors
/// As [`write_overlay`].
pub fn write_annotation(path: &Path, overlay: &Overlay) -> Result<()> {
    write_panels(path, overlay, "dense labels")
}

fn write_panels(path: &Path, overlay: &Overlay, prediction: &'static str) -> Result<()> {
    let volumes = [overlay.annotation, Some(overlay.prediction), overlay.reference];
    let fits = volumes.into_iter().flatten().all(|v| v.dim() == overlay.image.dim());
    if !fits || overlay.image.is_empty() {
        return Err(Error::File(FileError::Figure {
            path: path.into(),
            problem: "image and label maps differ in shape, or are empty".into(),
        }));
    }
    let z = telling_slice(overlay);
    let image = Greyscale::new(overlay.image.index_axis(Axis(0), z));
    let slice = |volume: ArrayView3<'_, i16>| volume.index_axis(Axis(0), z).to_owned();
    let zoom = Zoom::new(overlay.image.dim(), overlay.spacing);

    let mut panels = vec![("image", zoom.paint(&image, None, overlay.ignore))];
    if let Some(annotation) = overlay.annotation {
        let share = annotated_share(annotation, overlay.ignore);
        let caption = if share < 1.0 { "sparse annotation" } else { "annotation" };
        let labels = slice(annotation);
        panels.push((caption, zoom.paint(&image, Some(labels.view()), overlay.ignore)));
    }
    let labels = slice(overlay.prediction);
    panels.push((prediction, zoom.paint(&image, Some(labels.view()), overlay.ignore)));
    if let Some(reference) = overlay.reference {
        let labels = slice(reference);
        panels.push(("dense reference", zoom.paint(&image, Some(labels.view()), overlay.ignore)));
    }

    let mut note = format!("slice {} of {}", z + 1, overlay.image.dim().0);
    let mut sparse = false;
    if let Some(annotation) = overlay.annotation {
        let share = annotated_share(annotation, overlay.ignore);
        note += &format!("  ·  {:.1} % of the volume annotated", 100.0 * share);
        sparse = share < 1.0;
    }
    write_sheet(path, &Sheet { title: overlay.case, note, panels, zoom: &zoom, labels: overlay.labels, sparse })
}

/// Panels side by side, with texts around them.
pub(super) struct Sheet<'a> {
    /// In bold.
    pub title: &'a str,
    /// Behind the title.
    pub note: String,
    /// Captions, and pixels as `zoom` paints them.
    pub panels: Vec<(&'static str, Vec<u8>)>,
    /// The size of the panels.
    pub zoom: &'a Zoom,
    /// The legend.
    pub labels: &'a [(i16, String)],
    /// Whether something is dimmed because it is not annotated.
    pub sparse: bool,
}

pub(super) fn write_sheet(path: &Path, sheet: &Sheet) -> Result<()> {
    let zoom = sheet.zoom;
    let width = sheet.panels.len() * (zoom.width + GAP) + GAP;
    let height = HEAD + zoom.height + CAPTION + FOOT;
    let mut canvas = Canvas::new(width, height, BACKGROUND);
    for (index, (_, pixels)) in sheet.panels.iter().enumerate() {
        let left = GAP + index * (zoom.width + GAP);
        for (y, row) in pixels.chunks_exact(3 * zoom.width).enumerate() {
            let first = 3 * ((HEAD + y) * width + left);
            canvas.pixels[first..first + row.len()].copy_from_slice(row);
        }
    }
    canvas.draw(path, |area| write_texts(area, sheet))?;
    canvas.write(path)
}

fn write_texts(
    area: &DrawingArea<BitMapBackend, plotters::coord::Shift>,
    sheet: &Sheet,
) -> Result<(), Box<dyn std::error::Error>> {
    let zoom = sheet.zoom;
    let left = GAP as i32;
    let at_left = Pos::new(HPos::Left, VPos::Center);
    let title = TextStyle::from((FONT, 24, FontStyle::Bold)).color(&TEXT).pos(at_left);
    let middle = HEAD as i32 / 2;
    area.draw(&Text::new(sheet.title, (left, middle), title.clone()))?;
    let (title_width, _) = area.estimate_text_size(sheet.title, &title)?;
    let small = TextStyle::from((FONT, 17)).color(&FAINT).pos(at_left);
    let after_title = left + title_width as i32 + 18;
    area.draw(&Text::new(sheet.note.clone(), (after_title, middle + 2), small))?;

    let centred = Pos::new(HPos::Center, VPos::Center);
    let caption_style = TextStyle::from((FONT, 18)).color(&TEXT).pos(centred);
    for (index, (caption, _)) in sheet.panels.iter().enumerate() {
        let x = GAP + index * (zoom.width + GAP) + zoom.width / 2;
        let y = HEAD + zoom.height + CAPTION / 2 + 2;
        let at = (x as i32, y as i32);
        area.draw(&Text::new(caption.to_string(), at, caption_style.clone()))?;
    }

    let legend_style = TextStyle::from((FONT, 16)).color(&FAINT).pos(at_left);
    let y = (HEAD + zoom.height + CAPTION + FOOT / 2 - 6) as i32;
    let mut x = left;
    for (label, name) in sheet.labels {
        let square = [(x, y - 8), (x + 16, y + 8)];
        area.draw(&Rectangle::new(square, colour(*label).filled()))?;
        area.draw(&Text::new(name.clone(), (x + 25, y), legend_style.clone()))?;
        let (width, _) = area.estimate_text_size(name, &legend_style)?;
        x += 25 + width as i32 + 26;
    }
    if sheet.sparse {
        area.draw(&Text::new("dimmed: not annotated", (x + 4, y), legend_style))?;
    }
    Ok(())
}

/// The slice with most foreground in the reference, else the prediction, else the annotation; else the middle one.
fn telling_slice(overlay: &Overlay) -> usize {
    let volumes = [overlay.reference, Some(overlay.prediction), overlay.annotation];
    for volume in volumes.into_iter().flatten() {
        let foreground = |&&label: &&i16| label > 0 && Some(label) != overlay.ignore;
        let counts = volume.axis_iter(Axis(0)).map(|slice| slice.iter().filter(foreground).count());
        if let Some((z, count)) = counts.enumerate().max_by_key(|&(_, count)| count)
            && count > 0
        {
            return z;
        }
    }
    overlay.image.dim().0 / 2
}

pub(super) fn annotated_share(annotation: ArrayView3<i16>, ignore: Option<i16>) -> f64 {
    let annotated = annotation.iter().filter(|&&label| Some(label) != ignore);
    annotated.count() as f64 / annotation.len() as f64
}

fn colour(label: i16) -> RGBColor {
    COLOURS[(label.max(1) as usize - 1) % COLOURS.len()]
}

/// A slice with its brightest and darkest per cent clipped, in 0..=1.
pub(super) struct Greyscale {
    pub(super) values: ndarray::Array2<f32>,
}

impl Greyscale {
    pub(super) fn new(slice: ArrayView2<f32>) -> Self {
        let mut sorted: Vec<f32> = slice.iter().copied().filter(|v| v.is_finite()).collect();
        sorted.sort_unstable_by(f32::total_cmp);
        let at = |share: f32| {
            let index = (share * sorted.len().saturating_sub(1) as f32) as usize;
            sorted.get(index).copied().unwrap_or(0.0)
        };
        let (low, high) = (at(0.01), at(0.995));
        let range = (high - low).max(f32::MIN_POSITIVE);
        let scaled = |&value: &f32| ((value - low) / range).clamp(0.0, 1.0);
        Greyscale { values: slice.map(scaled) }
    }
}

/// How many pixels a voxel covers.
pub(super) struct Zoom {
    pub(super) voxel: [usize; 2],
    pub(super) width: usize,
    pub(super) height: usize,
}

impl Zoom {
    pub(super) fn new((_, rows, columns): (usize, usize, usize), spacing: [f64; 3]) -> Self {
        let finest = spacing[1].min(spacing[2]);
        let aspect = [spacing[1] / finest, spacing[2] / finest].map(|ratio| ratio.clamp(1.0, 8.0));
        let longest = (rows as f64 * aspect[0]).max(columns as f64 * aspect[1]);
        let scale = (PANEL as f64 / longest).round().max(1.0);
        let voxel = aspect.map(|ratio| (scale * ratio).round() as usize);
        Zoom { voxel, width: columns * voxel[1], height: rows * voxel[0] }
    }

    /// Pixels of a panel. Labels are tinted, their borders drawn in full colour; ignored voxels are dimmed.
    pub(super) fn paint(&self, image: &Greyscale, labels: Option<ArrayView2<i16>>, ignore: Option<i16>) -> Vec<u8> {
        let label_at = |row: usize, column: usize| labels.map_or(0, |map| map[[row, column]]);
        let (rows, columns) = image.values.dim();
        let thickness = (self.voxel[0].min(self.voxel[1]) / 4).clamp(1, 2);
        let mut pixels = Vec::with_capacity(3 * self.width * self.height);
        for y in 0..self.height {
            let (row, dy) = (y / self.voxel[0], y % self.voxel[0]);
            for x in 0..self.width {
                let (column, dx) = (x / self.voxel[1], x % self.voxel[1]);
                let grey = image.values[[row, column]];
                let label = label_at(row, column);
                if Some(label) == ignore {
                    pixels.extend([to_byte(grey * DIMMED); 3]);
                    continue;
                }
                if label <= 0 {
                    pixels.extend([to_byte(grey); 3]);
                    continue;
                }
                let differs = |r: usize, c: usize| label_at(r, c) != label;
                let border = (dy < thickness && row > 0 && differs(row - 1, column))
                    || (dy + thickness >= self.voxel[0] && row + 1 < rows && differs(row + 1, column))
                    || (dx < thickness && column > 0 && differs(row, column - 1))
                    || (dx + thickness >= self.voxel[1] && column + 1 < columns && differs(row, column + 1));
                let opacity = if border { 1.0 } else { OPACITY };
                let RGBColor(r, g, b) = colour(label);
                pixels.extend([r, g, b].map(|tint| {
                    let tint = f32::from(tint) / 255.0;
                    to_byte(grey * (1.0 - opacity) + tint * opacity)
                }));
            }
        }
        pixels
    }
}

pub(super) fn to_byte(share: f32) -> u8 {
    (share * 255.0).round() as u8
}
