//! Different schemes for different cases.

use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::Scheme;
use super::scribbles::shuffle;

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
