//! One picture per case: image, sparse annotation, prediction and dense reference of the most telling slice.

use std::path::Path;

use ndarray::{ArrayView3, Axis};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::canvas::{Canvas, FONT};
use super::panel::{Greyscale, Tint, Zoom, colour};
use crate::error::{Error, FileError, Result};

/// Longer side of a panel in pixels, roughly: voxels are scaled by whole numbers.
pub(super) const PANEL: usize = 460;
const GAP: usize = 20;
const HEAD: usize = 64;
const CAPTION: usize = 40;
const FOOT: usize = 48;

const BACKGROUND: RGBColor = RGBColor(16, 18, 22);
const TEXT: RGBColor = RGBColor(232, 235, 240);
const FAINT: RGBColor = RGBColor(150, 157, 168);
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
    let (_, rows, columns) = overlay.image.dim();
    let zoom = Zoom::new([rows, columns], [overlay.spacing[1], overlay.spacing[2]], PANEL);
    let panel = |volume: ArrayView3<'_, i16>| {
        let labels = volume.index_axis(Axis(0), z);
        zoom.paint(&image, &|row, column| match labels[[row, column]] {
            label if Some(label) == overlay.ignore => Tint::Dimmed,
            label if label <= 0 => Tint::None,
            label => Tint::Label(label),
        })
    };

    let mut panels = vec![("image", zoom.paint(&image, &|_, _| Tint::None))];
    if let Some(annotation) = overlay.annotation {
        let share = annotated_share(annotation, overlay.ignore);
        let caption = if share < 1.0 { "sparse annotation" } else { "annotation" };
        panels.push((caption, panel(annotation)));
    }
    panels.push((prediction, panel(overlay.prediction)));
    if let Some(reference) = overlay.reference {
        panels.push(("dense reference", panel(reference)));
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
