//! A slice of an image in grey, tinted by labels: what pictures of cases are made of.

use ndarray::ArrayView2;
use plotters::style::RGBColor;

/// Share of the label colour over the image.
const OPACITY: f32 = 0.5;
/// Brightness of voxels that nobody annotated.
const DIMMED: f32 = 0.38;
/// Pixels from one line of a hatching to the next, and how many of them a line has.
const HATCH: [usize; 2] = [9, 2];
/// Brightness that the lines of a hatching have at least.
const HATCH_BRIGHTNESS: f32 = 0.55;

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

/// The colour of a label from 1 on.
pub(super) fn colour(label: i16) -> RGBColor {
    COLOURS[(label.max(1) as usize - 1) % COLOURS.len()]
}

/// How a voxel is shown.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Tint {
    /// As the image is.
    None,
    /// Darkened.
    Dimmed,
    /// Darkened under slanting lines.
    Hatched,
    /// In a label's colour, and its border in full colour.
    Label(i16),
    /// In a colour, and its border too.
    Colour(u8, u8, u8),
}

/// A slice with values in 0..=1.
pub(super) struct Greyscale {
    pub(super) values: ndarray::Array2<f32>,
}

impl Greyscale {
    /// With its brightest and darkest per cent clipped.
    pub(super) fn new(slice: ArrayView2<f32>) -> Self {
        let [low, high] = usual_range(slice.iter().copied());
        Self::between(slice, low, high)
    }

    /// From `low`, which is black, to `high`, which is white.
    pub(super) fn between(slice: ArrayView2<f32>, low: f32, high: f32) -> Self {
        let range = (high - low).max(f32::MIN_POSITIVE);
        let scaled = |&value: &f32| ((value - low) / range).clamp(0.0, 1.0);
        Greyscale { values: slice.map(scaled) }
    }
}

/// The range of the values without the darkest per cent and the brightest half per cent.
pub(super) fn usual_range(values: impl Iterator<Item = f32>) -> [f32; 2] {
    let mut sorted: Vec<f32> = values.filter(|v| v.is_finite()).collect();
    sorted.sort_unstable_by(f32::total_cmp);
    [0.01, 0.995].map(|share| {
        let index = (share * sorted.len().saturating_sub(1) as f32) as usize;
        sorted.get(index).copied().unwrap_or(0.0)
    })
}

/// How many pixels a voxel covers.
pub(super) struct Zoom {
    pub(super) voxel: [usize; 2],
    /// Pixels of a panel.
    pub(super) width: usize,
    pub(super) height: usize,
}

impl Zoom {
    /// For slices of so many rows and columns, of this spacing, in panels whose longer side has about `side` pixels: voxels
    /// are scaled by whole numbers.
    pub(super) fn new([rows, columns]: [usize; 2], spacing: [f64; 2], side: usize) -> Self {
        let finest = spacing[0].min(spacing[1]);
        let aspect = spacing.map(|spacing| (spacing / finest).clamp(1.0, 8.0));
        let longest = (rows as f64 * aspect[0]).max(columns as f64 * aspect[1]);
        let scale = (side as f64 / longest).round().max(1.0);
        let voxel = aspect.map(|ratio| (scale * ratio).round() as usize);
        Zoom { voxel, width: columns * voxel[1], height: rows * voxel[0] }
    }

    /// Pixels of a panel.
    pub(super) fn paint(&self, image: &Greyscale, tint_at: &dyn Fn(usize, usize) -> Tint) -> Vec<u8> {
        let (rows, columns) = image.values.dim();
        let thickness = (self.voxel[0].min(self.voxel[1]) / 4).clamp(1, 2);
        let mut pixels = Vec::with_capacity(3 * self.width * self.height);
        for y in 0..self.height {
            let (row, dy) = (y / self.voxel[0], y % self.voxel[0]);
            for x in 0..self.width {
                let (column, dx) = (x / self.voxel[1], x % self.voxel[1]);
                let grey = image.values[[row, column]];
                let tint = tint_at(row, column);
                let RGBColor(r, g, b) = match tint {
                    Tint::None | Tint::Dimmed | Tint::Hatched => {
                        let on_line = tint == Tint::Hatched && (x + y) % HATCH[0] < HATCH[1];
                        let grey = if tint == Tint::None { grey } else { grey * DIMMED };
                        pixels.extend([to_byte(if on_line { grey.max(HATCH_BRIGHTNESS) } else { grey }); 3]);
                        continue;
                    }
                    Tint::Label(label) => colour(label),
                    Tint::Colour(r, g, b) => RGBColor(r, g, b),
                };
                let differs = |r: usize, c: usize| tint_at(r, c) != tint;
                let border = (dy < thickness && row > 0 && differs(row - 1, column))
                    || (dy + thickness >= self.voxel[0] && row + 1 < rows && differs(row + 1, column))
                    || (dx < thickness && column > 0 && differs(row, column - 1))
                    || (dx + thickness >= self.voxel[1] && column + 1 < columns && differs(row, column + 1));
                let opacity = if border { 1.0 } else { OPACITY };
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
