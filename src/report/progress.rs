//! `progress.png`: losses with the pseudo Dice, epoch durations, learning rate.

use std::ops::Range;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::canvas::{Canvas, FONT};
use crate::error::Result;
use crate::history::History;

type Area<'a> = DrawingArea<BitMapBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Everything is drawn at double size and halved, for smooth lines.
const SCALE: u32 = 2;
const WIDTH: usize = 1200;
const HEIGHT: usize = 1320;
/// Most tick labels on a vertical axis.
const TICKS: usize = 9;

const INK: RGBColor = RGBColor(38, 43, 51);
const FAINT: RGBColor = RGBColor(110, 118, 129);
const GRID: RGBColor = RGBColor(232, 235, 239);
const BLUE: RGBColor = RGBColor(31, 98, 189);
const RED: RGBColor = RGBColor(207, 54, 60);
const GREEN: RGBColor = RGBColor(30, 140, 78);
const VIOLET: RGBColor = RGBColor(116, 75, 172);
const ORANGE: RGBColor = RGBColor(204, 112, 18);

/// Draws the history of a training run; an empty history gives empty axes.
///
/// # Errors
/// [`FileError::Figure`](crate::error::FileError::Figure) or [`FileError::Io`](crate::error::FileError::Io).
pub fn write_progress(path: &Path, history: &History) -> Result<()> {
    let scale = SCALE as usize;
    let mut canvas = Canvas::new(WIDTH * scale, HEIGHT * scale, WHITE);
    canvas.draw(path, |area| {
        let (top, rest) = area.split_vertically((600 * SCALE) as i32);
        let (middle, bottom) = rest.split_vertically((360 * SCALE) as i32);
        losses(&top, history)?;
        durations(&middle, history)?;
        learning_rate(&bottom, history)
    })?;
    canvas.halved().write(path)
}

/// One line of a plot.
struct Line<'a> {
    name: &'static str,
    colour: RGBColor,
    dotted: bool,
    values: &'a [f64],
}

impl Line<'_> {
    fn points(&self) -> impl Iterator<Item = (f64, f64)> + Clone + '_ {
        let indexed = self.values.iter().enumerate();
        indexed.filter(|(_, value)| value.is_finite()).map(|(epoch, &value)| (epoch as f64, value))
    }
}

fn losses(area: &Area, history: &History) -> Drawn {
    let losses = [
        Line { name: "training loss", colour: BLUE, dotted: false, values: &history.train_losses },
        Line { name: "validation loss", colour: RED, dotted: false, values: &history.val_losses },
    ];
    let dice = [
        Line { name: "pseudo Dice", colour: GREEN, dotted: true, values: &history.mean_fg_dice },
        Line { name: "pseudo Dice, moving average", colour: GREEN, dotted: false, values: &history.ema_fg_dice },
    ];
    plot(area, history.epochs(), "Loss and pseudo Dice", "loss", &losses, Some(&dice))
}

fn durations(area: &Area, history: &History) -> Drawn {
    let spans = history.epoch_end_timestamps.iter().zip(&history.epoch_start_timestamps);
    let seconds: Vec<f64> = spans.map(|(end, start)| end - start).collect();
    let line = Line { name: "epoch duration", colour: VIOLET, dotted: false, values: &seconds };
    plot(area, history.epochs(), "Epoch duration", "seconds", &[line], None)
}

fn learning_rate(area: &Area, history: &History) -> Drawn {
    let line = Line { name: "learning rate", colour: ORANGE, dotted: false, values: &history.lrs };
    plot(area, history.epochs(), "Learning rate", "learning rate", &[line], None)
}

/// A titled plot over epochs; Dice lines go to a second axis from 0 to 1 on the right.
fn plot(area: &Area, epochs: usize, title: &str, unit: &str, lines: &[Line], dice: Option<&[Line]>) -> Drawn {
    let px = |n: u32| n * SCALE;
    let epoch_axis = -0.02 * epochs as f64..(epochs.max(2) - 1) as f64 * 1.01 + 0.01;
    let range = padded_range(lines);
    let label = TextStyle::from((FONT, px(15))).color(&FAINT);
    let title_style = TextStyle::from((FONT, px(19), FontStyle::Bold)).color(&INK);
    area.draw(&Text::new(title.to_string(), (px(86) as i32, px(18) as i32), title_style))?;
    let mut chart = ChartBuilder::on(area)
        .margin_top(px(52))
        .margin_bottom(px(10))
        .margin_left(px(20))
        .margin_right(if dice.is_some() { px(20) } else { px(86) })
        .x_label_area_size(px(42))
        .y_label_area_size(px(66))
        .right_y_label_area_size(if dice.is_some() { px(66) } else { 0 })
        .build_cartesian_2d(epoch_axis.clone(), range.clone())?
        .set_secondary_coord(epoch_axis, 0.0..1.0);
    let decimals = decimals(&range);
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(ShapeStyle::from(&GRID).stroke_width(px(1)))
        .axis_style(ShapeStyle::from(&FAINT).stroke_width(px(1)))
        .x_label_style(label.clone())
        .y_label_style(label.clone())
        .axis_desc_style(label.clone())
        .x_desc("epoch")
        .y_desc(unit)
        .x_labels(epochs.clamp(2, 11))
        .y_labels(TICKS)
        .x_label_formatter(&|epoch| format!("{epoch:.0}"))
        .y_label_formatter(&|value| tick_text(*value, decimals))
        .draw()?;
    if dice.is_some() {
        chart
            .configure_secondary_axes()
            .axis_style(ShapeStyle::from(&FAINT).stroke_width(px(1)))
            .label_style(label.clone())
            .axis_desc_style(label)
            .y_desc("pseudo Dice")
            .y_label_formatter(&|value| format!("{value:.1}"))
            .draw()?;
    }
    for line in lines {
        let style = ShapeStyle::from(&line.colour).stroke_width(px(2));
        chart.draw_series(LineSeries::new(line.points(), style))?;
        chart.draw_series(lone_points(line))?;
    }
    for line in dice.unwrap_or_default() {
        if line.dotted {
            let style = ShapeStyle::from(&line.colour.mix(0.75)).filled();
            let spots = line.points().map(|point| Circle::new(point, px(2), style));
            chart.draw_secondary_series(spots)?;
        } else {
            let style = ShapeStyle::from(&line.colour).stroke_width(px(2));
            chart.draw_secondary_series(LineSeries::new(line.points(), style))?;
            chart.draw_secondary_series(lone_points(line))?;
        }
    }
    if let Some(dice) = dice {
        legend(area, lines.iter().chain(dice))?;
    }
    Ok(())
}

/// A single epoch is a point, which a line of one point would not show.
fn lone_points<'a>(line: &'a Line) -> impl Iterator<Item = Circle<(f64, f64), u32>> + 'a {
    let only = line.points().take(2).count() == 1;
    let style = ShapeStyle::from(&line.colour).filled();
    line.points().filter(move |_| only).map(move |point| Circle::new(point, 4 * SCALE, style))
}

/// Names of the lines in their colours, in one row at the right end of the title.
fn legend<'a>(area: &Area, lines: impl DoubleEndedIterator<Item = &'a Line<'a>>) -> Drawn {
    let px = |n: i32| n * SCALE as i32;
    let text = TextStyle::from((FONT, 15 * SCALE)).color(&INK).pos(Pos::new(HPos::Right, VPos::Center));
    let mut right = px(WIDTH as i32 - 86);
    // Letters without descenders look centred a little above the middle of their box.
    let (middle, stroke) = (px(28), px(27));
    for line in lines.rev() {
        let (width, _) = area.estimate_text_size(line.name, &text)?;
        area.draw(&Text::new(line.name, (right, middle), text.clone()))?;
        let end = right - width as i32 - px(8);
        let start = end - px(26);
        if line.dotted {
            let style = ShapeStyle::from(&line.colour).filled();
            for spot in 0..4 {
                let x = start + px(4) + spot * px(6);
                area.draw(&Circle::new((x, stroke), px(2), style))?;
            }
        } else {
            let style = ShapeStyle::from(&line.colour).stroke_width(3 * SCALE);
            area.draw(&PathElement::new([(start, stroke), (end, stroke)], style))?;
        }
        right = start - px(22);
    }
    Ok(())
}

/// From the smallest to the largest finite value, with a little air; 0 to 1 for nothing.
fn padded_range(lines: &[Line]) -> Range<f64> {
    let values = lines.iter().flat_map(|line| line.points()).map(|(_, v)| v);
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if low > high {
        return 0.0..1.0;
    }
    let air = ((high - low) * 0.06).max(high.abs() * 0.02).max(1e-6);
    low - air..high + air
}

/// Decimals of tick labels: plotters puts at most [`TICKS`] of them at distances of 1, 2 or 5 times a power of ten.
fn decimals(range: &Range<f64>) -> usize {
    let at_least = (range.end - range.start) / TICKS as f64;
    (-at_least.log10().floor()).clamp(0.0, 12.0) as usize
}

fn tick_text(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    let zero = text.trim_matches(['-', '0', '.']).is_empty();
    match text.strip_prefix('-') {
        Some(positive) if zero => positive.into(),
        _ => text,
    }
}
