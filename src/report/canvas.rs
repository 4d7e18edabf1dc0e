//! A picture in memory: fonts, text, and writing it as PNG.

use std::path::Path;
use std::sync::Once;

use image::{ExtendedColorType, ImageEncoder, RgbImage, codecs::png::PngEncoder};
use plotters::prelude::*;
use plotters::style::register_font;

use crate::error::{Error, FileError, Result};
use crate::io::write_atomically;

/// Family name under which the embedded font is known to plotters.
pub(super) const FONT: &str = "voxgrad-sans";

const REGULAR: &[u8] = include_bytes!("../../assets/DejaVuSans-subset.ttf");
const BOLD: &[u8] = include_bytes!("../../assets/DejaVuSans-Bold-subset.ttf");

/// Makes the embedded fonts known, so that figures look the same on every machine and need no font installed.
pub(super) fn register_fonts() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // Fails for invalid font files only; these are compiled in, and drawing text would report it.
        let _ = register_font(FONT, FontStyle::Normal, REGULAR);
        let _ = register_font(FONT, FontStyle::Bold, BOLD);
    });
}

/// An RGB picture.
pub(super) struct Canvas {
    pub width: usize,
    pub height: usize,
    pub pixels: Vec<u8>,
}

impl Canvas {
    pub(super) fn new(width: usize, height: usize, colour: RGBColor) -> Self {
        register_fonts();
        let pixel = [colour.0, colour.1, colour.2];
        Canvas { width, height, pixels: pixel.repeat(width * height) }
    }

    /// Draws with plotters onto what is there already.
    pub(super) fn draw(
        &mut self,
        path: &Path,
        drawing: impl FnOnce(&DrawingArea<BitMapBackend, plotters::coord::Shift>) -> Result<(), Box<dyn std::error::Error>>,
    ) -> Result<()> {
        let size = (self.width as u32, self.height as u32);
        let area = BitMapBackend::with_buffer(&mut self.pixels, size).into_drawing_area();
        drawing(&area)
            .and_then(|()| Ok(area.present()?))
            .map_err(|error| Error::File(FileError::Figure { path: path.into(), problem: error.to_string() }))
    }

    /// Halves both sides, averaging: what was drawn at double size gets smooth edges.
    pub(super) fn halved(self) -> Self {
        let (width, height) = (self.width / 2, self.height / 2);
        let mut pixels = Vec::with_capacity(3 * width * height);
        for y in 0..height {
            for x in 0..width {
                for channel in 0..3 {
                    let at = |dy: usize, dx: usize| {
                        let pixel = (2 * y + dy) * self.width + 2 * x + dx;
                        u32::from(self.pixels[3 * pixel + channel])
                    };
                    let sum = at(0, 0) + at(0, 1) + at(1, 0) + at(1, 1);
                    pixels.push((sum / 4) as u8);
                }
            }
        }
        Canvas { width, height, pixels }
    }

    /// Writes a PNG that appears under its name only when it is complete.
    pub(super) fn write(self, path: &Path) -> Result<()> {
        write_atomically(path, &self.encode(path)?)
    }

    /// The bytes of a PNG; `path` is for errors.
    pub(super) fn encode(self, path: &Path) -> Result<Vec<u8>> {
        let failed = |problem: String| Error::File(FileError::Figure { path: path.into(), problem });
        let (width, height) = (self.width as u32, self.height as u32);
        let picture = RgbImage::from_raw(width, height, self.pixels)
            .ok_or_else(|| failed("pixels do not fill the picture".into()))?;
        let mut png = Vec::new();
        PngEncoder::new(&mut png)
            .write_image(&picture, width, height, ExtendedColorType::Rgb8)
            .map_err(|error| failed(error.to_string()))?;
        Ok(png)
    }
}
