//! The annotation of a case over its image, in a slice across each axis; what is ignored is hatched.

use std::path::Path;

use ndarray::{ArrayView3, Axis};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::canvas::{Canvas, FONT};
use super::panel::{Greyscale, Tint, Zoom, colour};
use crate::error::{Error, FileError, Result};

const GAP: usize = 12;
const CAPTION: usize = 30;
/// Longer side of a panel in pixels, roughly.
const SIDE: usize = 460;

const BACKGROUND: RGBColor = RGBColor(16, 18, 22);
const TEXT: RGBColor = RGBColor(200, 205, 212);

/// What is shown, on one grid (z, y, x).
pub(super) struct Shown<'a> {
    /// A channel of the image.
    pub image: ArrayView3<'a, f32>,
    /// The annotation.
    pub labels: ArrayView3<'a, i16>,
    /// Spacing (z, y, x).
    pub spacing: [f64; 3],
}

/// The picture as PNG; `path` is the label file, for errors.
pub(super) fn draw(path: &Path, shown: &Shown, ignore: Option<i16>) -> Result<Vec<u8>> {
    if shown.image.dim() != shown.labels.dim() || shown.labels.is_empty() {
        let problem = "image and label map differ in shape, or are empty".into();
        return Err(Error::File(FileError::Figure { path: path.into(), problem }));
    }
    let panels: Vec<Panel> = (0..3).map(|axis| Panel::new(axis, shown, ignore)).collect();
    let width = GAP + panels.iter().map(|panel| panel.width + GAP).sum::<usize>();
    let height = GAP + panels.iter().map(|panel| panel.height).max().unwrap_or(0) + CAPTION;
    let mut canvas = Canvas::new(width, height, BACKGROUND);
    let mut left = GAP;
    let mut captions = Vec::with_capacity(3);
    for panel in &panels {
        for (y, row) in panel.pixels.chunks_exact(3 * panel.width).enumerate() {
            let first = 3 * ((GAP + y) * width + left);
            canvas.pixels[first..first + row.len()].copy_from_slice(row);
        }
        let middle = ((left + panel.width / 2) as i32, (GAP + panel.height + CAPTION / 2) as i32);
        captions.push((middle, panel.caption.clone()));
        left += panel.width + GAP;
    }
    canvas.draw(path, |area| {
        let style = TextStyle::from((FONT, 15)).color(&TEXT).pos(Pos::new(HPos::Center, VPos::Center));
        for (place, caption) in captions {
            area.draw(&Text::new(caption, place, style.clone()))?;
        }
        Ok(())
    })?;
    canvas.encode(path)
}

/// A slice across one axis.
struct Panel {
    caption: String,
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl Panel {
    fn new(axis: usize, shown: &Shown, ignore: Option<i16>) -> Self {
        let order = [[0, 1, 2], [1, 0, 2], [2, 0, 1]][axis];
        let spacing = order.map(|axis| shown.spacing[axis]);
        let (mut image, mut labels) = (shown.image.permuted_axes(order), shown.labels.permuted_axes(order));
        if axis > 0 {
            // Rows are along z there: up is up.
            image.invert_axis(Axis(1));
            labels.invert_axis(Axis(1));
        }
        let index = telling(labels, ignore);
        let slice = labels.index_axis(Axis(0), index);
        let (_, rows, columns) = image.dim();
        let zoom = Zoom::new([rows, columns], [spacing[1], spacing[2]], SIDE);
        let grey = Greyscale::new(image.index_axis(Axis(0), index));
        let pixels = zoom.paint(&grey, &|row, column| match slice[[row, column]] {
            label if Some(label) == ignore => Tint::Hatched,
            label if label <= 0 => Tint::None,
            label => Tint::Label(label),
        });
        let caption = format!("{} = {index} of {}", ["z", "y", "x"][axis], image.dim().0);
        Panel { caption, width: zoom.width, height: zoom.height, pixels }
    }
}

/// The slice with most annotated foreground; without any, that with most annotation; else the middle one.
fn telling(labels: ArrayView3<i16>, ignore: Option<i16>) -> usize {
    let most = |counted: &dyn Fn(i16) -> bool| {
        let counts = labels.outer_iter().map(|slice| slice.iter().filter(|&&label| counted(label)).count());
        counts.enumerate().max_by_key(|&(_, count)| count).filter(|&(_, count)| count > 0).map(|(index, _)| index)
    };
    most(&|label| label > 0 && Some(label) != ignore)
        .or_else(|| most(&|label| Some(label) != ignore))
        .unwrap_or(labels.dim().0 / 2)
}

/// The colour of a label as HTML writes it.
pub(super) fn html_colour(label: i16) -> String {
    match label {
        0 => "#8a919c".into(),
        label => {
            let RGBColor(red, green, blue) = colour(label);
            format!("#{red:02x}{green:02x}{blue:02x}")
        }
    }
}
