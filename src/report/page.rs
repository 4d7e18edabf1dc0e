//! A page of HTML that needs nothing else: tables and pictures of an inspected dataset.

use std::fmt::Write as _;
use std::path::Path;

use super::inspect::{Inspected, Inspection};
use super::montage::html_colour;
use crate::error::Result;
use crate::io::write_atomically;

const STYLE: &str = "
body { font: 15px/1.45 system-ui, sans-serif; color: #262b33; background: #fff; margin: 2em auto; max-width: 1500px;
       padding: 0 1.5em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { padding: .25em .8em; text-align: right; border-bottom: 1px solid #e8ebef; white-space: nowrap; }
th { color: #6e7681; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
.bar { display: flex; width: 16em; height: .9em; background: repeating-linear-gradient(135deg, #d5d9df 0 2px, #f3f4f6 2px 7px); }
.bar span { height: 100%; } .key { display: inline-block; width: .9em; height: .9em; margin: 0 .4em 0 1.2em; }
.warning { border-left: 4px solid #cc7012; padding: .2em .8em; margin: .4em 0; background: #fdf5ec; }
figure { display: inline-block; margin: 0 1em 1em 0; } figcaption { color: #6e7681; } img { max-width: 100%; }
";

/// Writes the page.
///
/// # Errors
/// [`FileError::Io`](crate::error::FileError::Io).
pub fn write_inspection(path: &Path, inspection: &Inspection) -> Result<()> {
    write_atomically(path, page(inspection).as_bytes())
}

/// The page's text.
pub fn page(inspection: &Inspection) -> String {
    let mut html = String::new();
    let name = escaped(&inspection.name);
    // Writing to a string cannot fail.
    let _ = write!(
        html,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{name}</title>\n<style>{STYLE}</style>\
         </head><body>\n<h1>{name}</h1>\n"
    );
    overview(&mut html, inspection);
    for warning in &inspection.warnings {
        let _ = writeln!(html, "<div class=\"warning\">{}</div>", escaped(warning));
    }
    annotation(&mut html, inspection);
    grids(&mut html, inspection);
    intensities(&mut html, inspection);
    pictures(&mut html, inspection);
    html += "</body></html>\n";
    html
}

fn overview(html: &mut String, inspection: &Inspection) {
    let cases = &inspection.cases;
    let all: u64 = cases.iter().map(Inspected::all).sum();
    let annotated: u64 = cases.iter().flat_map(|case| &case.voxels).sum();
    let ignore = match inspection.ignore {
        Some(label) => format!("ignore label {label}"),
        None => "no ignore label: every voxel counts as annotated".into(),
    };
    let _ = writeln!(
        html,
        "<p>{} cases, {} channels ({}), {} labels, {ignore}. Annotated: {} of {} voxels, {:.3} %.</p>",
        cases.len(),
        inspection.channels.len(),
        escaped(&inspection.channels.join(", ")),
        inspection.labels.len(),
        grouped(annotated),
        grouped(all),
        100.0 * annotated as f64 / all.max(1) as f64,
    );
    *html += "<p>";
    for (label, name) in &inspection.labels {
        let _ = write!(
            html,
            "<span class=\"key\" style=\"background:{}\"></span>{} ({label})",
            html_colour(*label),
            escaped(name)
        );
    }
    *html += "</p>\n";
}

fn annotation(html: &mut String, inspection: &Inspection) {
    *html += "<h2>Annotation</h2>\n<p>Annotated voxels of each label, the slices across z that have some, and their shares of \
              the volume; what is hatched is ignored.</p>\n<div class=\"wide\"><table><tr><th>case</th><th>annotated</th><th></th>";
    inspection.labels.iter().for_each(|(_, name)| _ = write!(html, "<th>{}</th><th>slices</th>", escaped(name)));
    *html += "</tr>\n";
    for case in &inspection.cases {
        let _ = write!(
            html,
            "<tr><td>{}</td><td>{:.3} %</td><td><div class=\"bar\">",
            escaped(&case.name),
            100.0 * case.share()
        );
        for ((label, _), voxels) in inspection.labels.iter().zip(&case.voxels) {
            let share = 100.0 * *voxels as f64 / case.all().max(1) as f64;
            let _ = write!(html, "<span style=\"width:{share:.3}%;background:{}\"></span>", html_colour(*label));
        }
        *html += "</div></td>";
        for (voxels, slices) in case.voxels.iter().zip(&case.slices) {
            let _ = write!(html, "<td>{}</td><td>{slices}</td>", grouped(*voxels));
        }
        *html += "</tr>\n";
    }
    *html += "<tr><th>all</th><th></th><th></th>";
    for index in 0..inspection.labels.len() {
        let sum = |of: fn(&Inspected) -> &Vec<u64>| inspection.cases.iter().map(|case| of(case)[index]).sum::<u64>();
        let _ = write!(
            html,
            "<th>{}</th><th>{}</th>",
            grouped(sum(|case| &case.voxels)),
            grouped(sum(|case| &case.slices))
        );
    }
    *html += "</tr></table></div>\n";
}

fn grids(html: &mut String, inspection: &Inspection) {
    let cases = &inspection.cases;
    *html += "<h2>Grids</h2>\n<div class=\"wide\"><table><tr><th></th>";
    for what in ["voxels", "mm"] {
        ["z", "y", "x"].iter().for_each(|axis| _ = write!(html, "<th>{axis}, {what}</th>"));
    }
    *html += "</tr>\n";
    let of = |column: usize| -> Vec<f64> {
        let value = |case: &Inspected| match column {
            0..3 => case.shape[column] as f64,
            _ => case.spacing[column - 3],
        };
        let mut values: Vec<f64> = cases.iter().map(value).collect();
        values.sort_unstable_by(f64::total_cmp);
        values
    };
    let columns: Vec<Vec<f64>> = (0..6).map(of).collect();
    for (name, share) in [("smallest", 0.0), ("median", 0.5), ("largest", 1.0)] {
        let _ = write!(html, "<tr><td>{name}</td>");
        for values in &columns {
            let index = (share * values.len().saturating_sub(1) as f64).round() as usize;
            let _ = write!(html, "<td>{}</td>", number(values.get(index).copied().unwrap_or(f64::NAN)));
        }
        *html += "</tr>\n";
    }
    for case in cases {
        let _ = write!(html, "<tr><td>{}</td>", escaped(&case.name));
        case.shape.iter().for_each(|size| _ = write!(html, "<td>{size}</td>"));
        case.spacing.iter().for_each(|spacing| _ = write!(html, "<td>{}</td>", number(*spacing)));
        *html += "</tr>\n";
    }
    *html += "</table></div>\n";
}

fn intensities(html: &mut String, inspection: &Inspection) {
    *html += "<h2>Intensities</h2>\n<p>Of all voxels of the image.</p>\n<div class=\"wide\"><table><tr><th>case</th><th>channel</th>";
    for name in ["smallest", "0.5 %", "median", "99.5 %", "largest", "mean", "deviation"] {
        let _ = write!(html, "<th>{name}</th>");
    }
    *html += "</tr>\n";
    for case in &inspection.cases {
        for (channel, values) in inspection.channels.iter().zip(&case.intensities) {
            let _ = write!(html, "<tr><td>{}</td><td>{}</td>", escaped(&case.name), escaped(channel));
            for value in values.quantiles.iter().chain([&values.mean, &values.deviation]) {
                let _ = write!(html, "<td>{}</td>", number(*value));
            }
            *html += "</tr>\n";
        }
    }
    *html += "</table></div>\n";
}

fn pictures(html: &mut String, inspection: &Inspection) {
    let drawn: Vec<(&Inspected, &Vec<u8>)> =
        inspection.cases.iter().filter_map(|case| Some((case, case.picture.as_ref()?))).collect();
    if drawn.is_empty() {
        return;
    }
    let _ = write!(
        html,
        "<h2>Pictures</h2>\n<p>{} of {} cases, channel {}: across each axis the slice with most annotated foreground. Hatched: \
         ignored.</p>\n",
        drawn.len(),
        inspection.cases.len(),
        escaped(inspection.channels.first().map_or("", String::as_str))
    );
    for (case, png) in drawn {
        let name = escaped(&case.name);
        let _ = writeln!(
            html,
            "<figure><img alt=\"{name}\" src=\"data:image/png;base64,{}\"><figcaption>{name}, {:.3} % annotated</figcaption>\
             </figure>",
            base64(png),
            100.0 * case.share()
        );
    }
}

/// Text in which nothing is markup.
fn escaped(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => safe += "&amp;",
            '<' => safe += "&lt;",
            '>' => safe += "&gt;",
            '"' => safe += "&quot;",
            letter => safe.push(letter),
        }
    }
    safe
}

/// At most five digits that matter.
fn number(value: f64) -> String {
    match value.abs() {
        size if !size.is_finite() => "-".into(),
        size if size >= 1e6 || (size > 0.0 && size < 1e-3) => format!("{value:.3e}"),
        size if size >= 1e3 => format!("{value:.0}"),
        _ => {
            let text = format!("{value:.3}");
            text.trim_end_matches('0').trim_end_matches('.').to_owned()
        }
    }
}

/// Thousands apart.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// RFC 4648.
fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for three in bytes.chunks(3) {
        let word = three.iter().fold(0u32, |word, &byte| (word << 8) | u32::from(byte)) << (8 * (3 - three.len()));
        for digit in 0..4 {
            match digit <= three.len() {
                true => text.push(char::from(DIGITS[((word >> (18 - 6 * digit)) & 63) as usize])),
                false => text.push('='),
            }
        }
    }
    text
}
