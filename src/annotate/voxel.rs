//! How sure an ensemble is of a voxel. Entropies are in nats.
//!
//! The members of an ensemble are the networks, the mirrored copies that each of them sees, and the windows that overlap.
//! With `p` their mean probabilities, the predictive entropy is `H(p)`, and their disagreement is the mutual information of
//! member and label, `H(p)` less the mean of their own entropies (Houlsby et al. 2011): 0 where all say the same, however
//! unsure each of them is. Regions are independent questions of two answers; their entropies add up.

use crate::dataset::LabelManager;
use crate::dataset::labels::first_maximum;

/// How sure an ensemble is of a voxel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Certainty {
    /// How far the label is from another one, from 0 to 1: its mean probability less the largest of another class. Of
    /// regions the least of those that decide, the last that is predicted and those behind it: the probability of what was
    /// decided less that of its opposite. 0 where the mean probabilities speak for another label than the mean logits.
    pub margin: f32,
    /// Entropy of the mean probabilities.
    pub entropy: f32,
    /// Entropy of the mean probabilities less the mean entropy of the members.
    pub disagreement: f32,
}

impl Certainty {
    /// Nothing in doubt, as outside of what preprocessing keeps of an image.
    pub const FULL: Certainty = Certainty { margin: 1.0, entropy: 0.0, disagreement: 0.0 };

    /// From a voxel's mean logits, which decide its label, its mean probabilities, and the mean entropy of the members.
    pub fn of(labels: &LabelManager, logits: &[f32], mean: &[f32], mean_entropy: f32) -> Self {
        let entropy = entropy(labels, mean.iter().map(|&p| f64::from(p)));
        Certainty {
            margin: margin(labels, logits, mean),
            entropy: entropy as f32,
            // Rounding may leave a little less than nothing.
            disagreement: (entropy - f64::from(mean_entropy)).max(0.0) as f32,
        }
    }
}

/// Probabilities of a voxel from its logits: softmax over classes, or the sigmoid of each region. Both slices hold a value
/// for each head.
pub fn probabilities(labels: &LabelManager, logits: &[f32], probabilities: &mut [f64]) {
    let pairs = probabilities.iter_mut().zip(logits);
    if labels.has_regions() {
        return pairs.for_each(|(p, &logit)| *p = 1.0 / (1.0 + (-f64::from(logit)).exp()));
    }
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for (p, &logit) in pairs {
        *p = (f64::from(logit) - f64::from(largest)).exp();
        sum += *p;
    }
    probabilities.iter_mut().for_each(|p| *p /= sum);
}

/// Entropy of a voxel's probabilities in nats: from 0 to the logarithm of the number of classes, of regions up to as many
/// times ln 2.
pub fn entropy(labels: &LabelManager, probabilities: impl Iterator<Item = f64>) -> f64 {
    let term = |p: f64| if p > 0.0 { -p * p.ln() } else { 0.0 };
    match labels.has_regions() {
        true => probabilities.map(|p| term(p) + term(1.0 - p)).sum(),
        false => probabilities.map(term).sum(),
    }
}

fn margin(labels: &LabelManager, logits: &[f32], mean: &[f32]) -> f32 {
    let margin = if labels.has_regions() {
        // Regions before the last predicted one are written over.
        let last = logits.iter().rposition(|&logit| logit > 0.0).unwrap_or(0);
        let decided = logits.iter().zip(mean).skip(last);
        let margin = |(&logit, &p): (&f32, &f32)| if logit > 0.0 { 2.0 * p - 1.0 } else { 1.0 - 2.0 * p };
        decided.map(margin).fold(1.0, f32::min)
    } else {
        let label = first_maximum(logits);
        let others = mean.iter().enumerate().filter(|&(head, _)| head != label);
        mean[label] - others.map(|(_, &p)| p).fold(0.0, f32::max)
    };
    margin.clamp(0.0, 1.0)
}
