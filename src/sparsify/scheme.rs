//! What is left annotated: the schemes, and mixtures of them over the cases of a dataset.

use super::blocks::Blocks;
use super::drawn::Drawn;
use super::mask::Mask;
use super::scribbles::{Scribbles, shuffle};
use super::slices::{self, Slices};
use ndarray::ArrayView3;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// What is left annotated.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scheme {
    /// A scribble through each class and one along its border.
    Scribbles(Scribbles),
    /// Whole slices.
    Slices(Slices),
    /// Dense blocks.
    Blocks(Blocks),
    /// Everything but what is taken away.
    Mask(Mask),
    /// Everything, for some cases of a mixture.
    Dense,
    /// Different schemes for different cases.
    Mix(Mix),
}

impl Scheme {
    /// Its name on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Scheme::Scribbles(_) => "scribbles",
            Scheme::Slices(_) => "slices",
            Scheme::Blocks(_) => "blocks",
            Scheme::Mask(_) => "mask",
            Scheme::Dense => "dense",
            Scheme::Mix(_) => "mix",
        }
    }
}

/// Draws the annotation of one volume by a scheme that needs to know nothing else: scribbles, slices that are not listed,
/// blocks that are not pooled. Other schemes leave the volume dense.
pub fn draw(scheme: &Scheme, dense: ArrayView3<i16>, ignore: i16, random: &mut ChaCha8Rng) -> Drawn {
    match scheme {
        Scheme::Scribbles(scribbles) => scribbles.draw(dense, ignore, random),
        Scheme::Slices(slices) => slices::keep(dense, ignore, &slices.choose(dense, random)),
        Scheme::Blocks(blocks) => blocks.draw(dense, ignore, 0, random),
        Scheme::Mask(_) | Scheme::Dense | Scheme::Mix(_) => Drawn::whole(dense.to_owned(), ignore),
    }
}

/// Schemes and the share of the cases that gets each.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mix {
    /// Positive weights; they need not add up to one.
    pub parts: Vec<(Scheme, f64)>,
}

impl Mix {
    /// For each of `cases` cases the index of its scheme: as many of each as the weights say (largest remainders), in random
    /// order.
    pub(super) fn assign(&self, cases: usize, random: &mut ChaCha8Rng) -> Vec<usize> {
        let total: f64 = self.parts.iter().map(|(_, weight)| weight).sum();
        let exact: Vec<f64> = self.parts.iter().map(|(_, weight)| cases as f64 * weight / total).collect();
        let mut counts: Vec<usize> = exact.iter().map(|&share| share as usize).collect();
        let mut by_remainder: Vec<usize> = (0..counts.len()).collect();
        by_remainder.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()).then(a.cmp(&b)));
        let missing = cases.saturating_sub(counts.iter().sum());
        for &part in by_remainder.iter().cycle().take(missing) {
            counts[part] += 1;
        }
        let mut assigned: Vec<usize> =
            counts.iter().enumerate().flat_map(|(part, &count)| std::iter::repeat_n(part, count)).collect();
        shuffle(&mut assigned, random);
        assigned
    }
}
