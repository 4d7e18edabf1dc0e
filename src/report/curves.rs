//! A score against its price: one line of points for each way of annotating.

use std::path::Path;

use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::canvas::{Canvas, FONT};
use crate::error::Result;

/// Everything is drawn at double size and halved, for smooth lines.
const SCALE: i32 = 2;
const WIDTH: usize = 900;
const HEIGHT: usize = 560;

const INK: RGBColor = RGBColor(38, 43, 51);
const FAINT: RGBColor = RGBColor(110, 118, 129);
const GRID: RGBColor = RGBColor(232, 235, 239);
const COLOURS: [RGBColor; 6] = [
    RGBColor(31, 98, 189),
    RGBColor(207, 54, 60),
    RGBColor(30, 140, 78),
    RGBColor(204, 112, 18),
    RGBColor(116, 75, 172),
    RGBColor(38, 43, 51),
];

/// The points of one way of annotating.
#[derive(Debug, Clone, PartialEq)]
pub struct Curve {
    /// Its name in the legend.
    pub name: String,
    /// Price, and the scores of all repetitions.
    pub points: Vec<(f64, Vec<f64>)>,
}

impl Curve {
    /// Price, lowest, mean and highest score of each point that has one.
    fn spans(&self) -> Vec<(f64, [f64; 3])> {
        let mut spans: Vec<(f64, [f64; 3])> = Vec::new();
        for (price, scores) in &self.points {
            let scores: Vec<f64> = scores.iter().copied().filter(|score| score.is_finite()).collect();
            if *price > 0.0 && !scores.is_empty() {
                let low = scores.iter().copied().fold(f64::INFINITY, f64::min);
                let high = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                spans.push((*price, [low, scores.iter().sum::<f64>() / scores.len() as f64, high]));
            }
        }
        spans.sort_by(|a, b| a.0.total_cmp(&b.0));
        spans
    }
}

/// Draws scores over prices on a logarithmic axis: a point for the mean of the repetitions, a bar from the lowest to the
/// highest. Points without a score are left out.
///
/// # Errors
/// [`FileError::Figure`](crate::error::FileError::Figure) or [`FileError::Io`](crate::error::FileError::Io).
pub fn write_curves(path: &Path, price: &str, score: &str, curves: &[Curve]) -> Result<()> {
    let scale = SCALE as usize;
    let mut canvas = Canvas::new(WIDTH * scale, HEIGHT * scale, WHITE);
    canvas.draw(path, |area| draw(area, price, score, curves))?;
    canvas.halved().write(path)
}

fn draw(
    area: &DrawingArea<BitMapBackend, plotters::coord::Shift>,
    price: &str,
    score: &str,
    curves: &[Curve],
) -> Result<(), Box<dyn std::error::Error>> {
    let px = |n: i32| n * SCALE;
    let all: Vec<(f64, [f64; 3])> = curves.iter().flat_map(Curve::spans).collect();
    let over = |pick: fn(&(f64, [f64; 3])) -> f64, start: f64, join: fn(f64, f64) -> f64| {
        all.iter().map(pick).fold(start, join)
    };
    let (cheapest, dearest) = (over(|p| p.0, f64::INFINITY, f64::min), over(|p| p.0, f64::NEG_INFINITY, f64::max));
    let (lowest, highest) = (over(|p| p.1[0], f64::INFINITY, f64::min), over(|p| p.1[2], f64::NEG_INFINITY, f64::max));
    let (prices, scores) = match all.is_empty() {
        true => (0.001..1.0, 0.0..1.0),
        false => {
            let air = (0.08 * (highest - lowest)).max(0.005);
            (cheapest / 1.4..dearest * 1.4, lowest - air..highest + air)
        }
    };
    let decimals = if scores.end - scores.start < 0.1 { 3 } else { 2 };
    let label = TextStyle::from((FONT, px(15))).color(&FAINT);
    let mut chart = ChartBuilder::on(area)
        .margin_top(px(52))
        .margin_bottom(px(10))
        .margin_left(px(16))
        .margin_right(px(28))
        .x_label_area_size(px(44))
        .y_label_area_size(px(70))
        .build_cartesian_2d(prices.log_scale(), scores)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(ShapeStyle::from(&GRID).stroke_width(px(1) as u32))
        .axis_style(ShapeStyle::from(&FAINT).stroke_width(px(1) as u32))
        .x_label_style(label.clone())
        .y_label_style(label.clone())
        .axis_desc_style(label)
        .x_desc(price)
        .y_desc(score)
        .x_label_formatter(&|value| format!("{value}"))
        .y_label_formatter(&|value| format!("{value:.decimals$}"))
        .draw()?;
    let legend = TextStyle::from((FONT, px(16))).color(&INK).pos(Pos::new(HPos::Left, VPos::Center));
    let mut left = px(88);
    for (curve, colour) in curves.iter().zip(COLOURS.iter().cycle()) {
        let spans = curve.spans();
        let style = ShapeStyle::from(colour).stroke_width(px(2) as u32);
        chart.draw_series(LineSeries::new(spans.iter().map(|(price, [_, mean, _])| (*price, *mean)), style))?;
        chart.draw_series(
            spans.iter().map(|(price, [low, _, high])| PathElement::new([(*price, *low), (*price, *high)], style)),
        )?;
        chart.draw_series(
            spans.iter().map(|(price, [_, mean, _])| Circle::new((*price, *mean), px(4), colour.filled())),
        )?;
        area.draw(&Circle::new((left, px(28)), px(5), colour.filled()))?;
        area.draw(&Text::new(curve.name.clone(), (left + px(12), px(28)), legend.clone()))?;
        left += px(34) + area.estimate_text_size(&curve.name, &legend)?.0 as i32;
    }
    Ok(())
}
