//! Whether settings make sense, before any file is read.

use super::blocks::Budget;
use super::scheme::Scheme;
use crate::error::{Error, Result};

/// Whether all settings of a scheme are in range.
pub(super) fn check(scheme: &Scheme) -> Result<()> {
    let mut failures = Vec::new();
    let mut demand = |fine: bool, setting: &'static str, value: String, expected: &'static str| {
        if !fine {
            failures.push(Error::Setting { setting, value, expected });
        }
    };
    let share = |value: f64| value > 0.0 && value <= 1.0;
    const SHARE: &str = "a share above 0 and up to 1 is needed";
    match scheme {
        Scheme::Scribbles(s) => {
            demand(s.axis < 3, "axis", s.axis.to_string(), "z, y or x");
            demand(s.thickness % 2 == 1, "thickness", s.thickness.to_string(), "an odd number of pixels is needed");
            demand(s.interior + s.border > 0, "scribbles", "none".into(), "interior or border scribbles are needed");
            let points = s.control_points;
            demand(points >= 3, "control points", points.to_string(), "a curve of degree 2 needs at least 3");
            let [low, high] = s.border_depth;
            demand(low <= high, "border depth", format!("{low}:{high}"), "the lowest first");
            let ranges = [("border length", s.border_length), ("slices", s.foreground_slices)];
            for (name, [low, high]) in ranges.into_iter().chain([("background slices", s.background_slices)]) {
                let fine = (0.0..=1.0).contains(&low) && low <= high && high <= 1.0;
                demand(fine, name, format!("{low}:{high}"), "shares from 0 to 1 are needed, the lowest first");
            }
            if let Some(fraction) = s.fraction {
                demand(share(fraction), "fraction", fraction.to_string(), SHARE);
            }
        }
        Scheme::Slices(s) => {
            demand(s.axes.contains(&true), "axes", "none".into(), "at least one of z, y and x is needed");
            demand(share(s.fraction), "fraction", s.fraction.to_string(), SHARE);
        }
        Scheme::Blocks(b) => {
            demand(!b.size.contains(&0), "block", format!("{:?}", b.size), "a block needs voxels along every axis");
            let foreground = (0.0..=1.0).contains(&b.foreground);
            demand(foreground, "foreground share", b.foreground.to_string(), "a share from 0 to 1 is needed");
            match b.budget {
                Budget::Count(count) => demand(count > 0, "count", count.to_string(), "at least one block is needed"),
                Budget::Fraction(value) | Budget::Pooled(value) => {
                    demand(share(value), "fraction", value.to_string(), SHARE);
                }
            }
        }
        Scheme::Mask(_) | Scheme::Dense => {}
        Scheme::Mix(mix) => {
            demand(!mix.parts.is_empty(), "mix", "empty".into(), "at least one scheme is needed");
            for (part, weight) in &mix.parts {
                demand(weight.is_finite() && *weight > 0.0, "mix", weight.to_string(), "weights must be positive");
                demand(!matches!(part, Scheme::Mix(_)), "mix", "mix".into(), "a mixture cannot be part of another");
            }
            let parts = mix.parts.iter().filter(|(part, _)| !matches!(part, Scheme::Mix(_)));
            failures.extend(parts.filter_map(|(part, _)| check(part).err()));
        }
    }
    Error::all(failures)
}
