//! The losses once more on the host: f64, dense, one loop per formula, gradients written by hand.
//!
//! With w the weight of a voxel (0 where it is ignored), p the probabilities, y the one-hot target:
//!
//! ```text
//! I = sum w p y,  P = sum w p,  G = sum w y,  J = max(I, clip)
//! dice = - mean (2 J + s) / max(2 J + (P - I) + (G - I) + s, 1e-8)     over the terms that exist
//! ce   = sum w (-log p[label]) / sum w;  regions: sums of binary cross-entropies
//! ```

use super::loss_case::Case;
use voxgrad::kernels::loss::{Entropy, Target};

#[derive(Clone, Debug)]
pub struct Reference {
    /// As the kernels' loss vector.
    pub loss: Vec<f64>,
    /// Of each level; empty where its weight is 0.
    pub gradients: Vec<Vec<f64>>,
}

/// The loss in f64, from the case's own logits.
pub fn reference(case: &Case) -> Reference {
    let wide = |logits: &Vec<f32>| logits.iter().map(|z| f64::from(*z)).collect();
    reference_at(case, &case.logits.iter().map(wide).collect::<Vec<Vec<f64>>>())
}

/// The loss in f64, from other logits than the case's.
pub fn reference_at(case: &Case, logits: &[Vec<f64>]) -> Reference {
    let mut loss = vec![0.0; 3 + case.settings.dice_classes() + case.channels()];
    let mut gradients = Vec::new();
    for (i, level) in case.levels.iter().enumerate() {
        if level.weight == 0.0 {
            gradients.push(Vec::new());
            continue;
        }
        let weight = f64::from(level.weight);
        let (terms, gradient) = one_level(case, &case.sources(i), &logits[i]);
        loss.iter_mut().zip(terms).for_each(|(sum, term)| *sum += weight * term);
        gradients.push(gradient.iter().map(|g| weight * g).collect());
    }
    Reference { loss, gradients }
}

/// The loss vector of one level with weight 1, and the gradient of its total.
fn one_level(case: &Case, sources: &[usize], logits: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (settings, k) = (&case.settings, case.channels());
    let (weight_ce, weight_dice) = (f64::from(settings.weight_ce), f64::from(settings.weight_dice));
    let (ce, parts, ce_gradient) = entropy_term(case, sources, logits);
    let (dice, coefficients, dice_gradient) = dice_term(case, sources, logits);
    let used = |weight: f64, value: f64| if weight == 0.0 { 0.0 } else { value };
    let mut loss = vec![
        used(weight_ce, weight_ce * ce) + used(weight_dice, weight_dice * dice),
        used(weight_ce, ce),
        used(weight_dice, dice),
    ];
    let first = k - settings.dice_classes();
    loss.extend(coefficients[first..].iter().map(|c| used(weight_dice, *c)));
    loss.extend(parts.iter().map(|p| used(weight_ce, *p)));
    let sum = |(ce, dice): (&f64, &f64)| weight_ce * ce + weight_dice * dice;
    (loss, ce_gradient.iter().zip(&dice_gradient).map(sum).collect())
}

/// The class whose probability a channel is part of; none for a missing region.
fn owner(case: &Case, sample: usize, channel: usize) -> Option<usize> {
    match (case.is_missing(sample, channel), &case.settings.target) {
        (false, _) => Some(channel),
        (true, Target::Labels { .. }) => Some(0),
        (true, Target::Regions { .. }) => None,
    }
}

/// Whether a voxel of a label belongs to a class (region).
fn belongs(target: &Target, label: u16, class: usize) -> bool {
    match target {
        Target::Labels { .. } => usize::from(label) == class,
        Target::Regions { regions, .. } => regions[class].contains(&label),
    }
}

fn log_sum_exp(z: impl Iterator<Item = f64> + Clone) -> f64 {
    let top = z.clone().fold(f64::MIN, f64::max);
    top + z.map(|z| (z - top).exp()).sum::<f64>().ln()
}

/// (Binary) cross-entropy, its parts by channel, and its gradient.
fn entropy_term(case: &Case, sources: &[usize], logits: &[f64]) -> (f64, Vec<f64>, Vec<f64>) {
    let (k, voxels) = (case.channels(), sources.len() / case.batch);
    let target = &case.settings.target;
    let mut by_channel = vec![0.0; sources.len() * k];
    let mut slopes = vec![0.0; sources.len() * k];
    let (mut weights, mut elements) = (0.0, 0.0);
    for (v, &source) in sources.iter().enumerate() {
        let (weight, label, sample) = (case.counts(source), case.labels[source], v / voxels);
        if weight == 0.0 {
            continue;
        }
        let z = &logits[v * k..][..k];
        let present = (0..k).filter(|c| !case.is_missing(sample, *c)).count();
        weights += weight;
        elements += weight * present as f64;
        match target {
            Target::Labels { .. } => {
                let class = usize::from(label);
                let mine = (0..k).filter(|c| owner(case, sample, *c) == Some(class));
                let (all, of_class) = (log_sum_exp(z.iter().copied()), log_sum_exp(mine.clone().map(|c| z[c])));
                by_channel[v * k + class] = weight * (all - of_class);
                (0..k).for_each(|c| slopes[v * k + c] = weight * (z[c] - all).exp());
                mine.for_each(|c| slopes[v * k + c] -= weight * (z[c] - of_class).exp());
            }
            Target::Regions { .. } => {
                for c in (0..k).filter(|c| !case.is_missing(sample, *c)) {
                    let y = f64::from(u8::from(belongs(target, label, c)));
                    by_channel[v * k + c] = weight * (z[c].max(0.0) - z[c] * y + (-z[c].abs()).exp().ln_1p());
                    slopes[v * k + c] = weight * (sigmoid(z[c]) - y);
                }
            }
        }
    }

    let undeclared_regions = matches!(target, Target::Regions { .. }) && case.settings.ignore.is_empty();
    let shares: Vec<f64> = match case.settings.entropy {
        Entropy::TopK { percent } => {
            let entropies: Vec<f64> = by_channel.chunks(k).map(|c| c.iter().sum()).collect();
            shares_of_largest(&entropies, ((sources.len() as f64 * f64::from(percent) / 100.0) as usize).max(1))
        }
        Entropy::Mean if !undeclared_regions => vec![1.0 / weights; sources.len()],
        Entropy::Mean | Entropy::MeanOverRegions => vec![1.0 / elements; sources.len()],
    };
    let mut parts = vec![0.0; k];
    let mut gradient = vec![0.0; sources.len() * k];
    for (v, &source) in sources.iter().enumerate() {
        if case.counts(source) > 0.0 {
            for c in 0..k {
                parts[c] += shares[v] * by_channel[v * k + c];
                gradient[v * k + c] = shares[v] * slopes[v * k + c];
            }
        }
    }
    (parts.iter().sum(), parts, gradient)
}

/// The factor of each value in the mean of the `count` largest; those that equal the least of them share what is left.
fn shares_of_largest(values: &[f64], count: usize) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let least = sorted[count - 1];
    let above = values.iter().filter(|v| **v > least).count();
    let equal = values.iter().filter(|v| **v == least).count();
    let share = (count - above) as f64 / equal as f64;
    let factor = |v: &f64| {
        let places = if *v > least { 1.0 } else { share * f64::from(u8::from(*v == least)) };
        places / count as f64
    };
    values.iter().map(factor).collect()
}

fn sigmoid(z: f64) -> f64 {
    1.0 / (1.0 + (-z).exp())
}

/// Dice loss, its coefficient of each channel (also of those without a term), and its gradient.
fn dice_term(case: &Case, sources: &[usize], logits: &[f64]) -> (f64, Vec<f64>, Vec<f64>) {
    let (settings, k, voxels) = (&case.settings, case.channels(), sources.len() / case.batch);
    let exclusive = matches!(settings.target, Target::Labels { .. });
    let hit = |v: usize, c: usize| belongs(&settings.target, case.labels[sources[v]], c);

    // Probability of every channel, and of every class: those of the channels that stand for it.
    let (mut p, mut q) = (vec![0.0; sources.len() * k], vec![0.0; sources.len() * k]);
    for v in (0..sources.len()).filter(|v| case.counts(sources[*v]) > 0.0) {
        let z = &logits[v * k..][..k];
        let all = log_sum_exp(z.iter().copied());
        for c in 0..k {
            p[v * k + c] = if exclusive { (z[c] - all).exp() } else { sigmoid(z[c]) };
            if let Some(class) = owner(case, v / voxels, c) {
                q[v * k + class] += p[v * k + c];
            }
        }
    }

    let groups: Vec<Vec<usize>> =
        if settings.dice.batch { vec![(0..case.batch).collect()] } else { (0..case.batch).map(|b| vec![b]).collect() };
    let (smooth, clip) = (f64::from(settings.dice.smooth), settings.dice.clip_tp.map(f64::from));
    let mut terms = 0;
    let mut of_class = vec![Vec::new(); k];
    // d(sum of coefficients)/d(w q), for voxels of the class and for the others.
    let mut slopes = vec![(0.0, 0.0); case.batch * k];
    for c in k - settings.dice_classes()..k {
        for group in &groups {
            let members: Vec<usize> = group.iter().copied().filter(|b| !case.is_missing(*b, c)).collect();
            if members.is_empty() {
                continue;
            }
            let (mut i, mut sum_p, mut sum_g) = (0.0, 0.0, 0.0);
            for v in members.iter().flat_map(|b| b * voxels..(b + 1) * voxels) {
                let weight = case.counts(sources[v]);
                let y = f64::from(u8::from(hit(v, c)));
                i += weight * q[v * k + c] * y;
                sum_p += weight * q[v * k + c];
                sum_g += weight * y;
            }
            let raised = clip.map_or(i, |least| i.max(least));
            let numerator = 2.0 * raised + smooth;
            let denominator = 2.0 * raised + (sum_p - i) + (sum_g - i) + smooth;
            let d = denominator.max(1e-8);
            terms += 1;
            of_class[c].push(numerator / d);
            // Of the numerator, and of the denominator for voxels of the class and for the others.
            let up = if raised > i { 0.0 } else { 2.0 };
            let (down_hit, down_rest) = match denominator > 1e-8 {
                true => (up - 1.0, 1.0),
                false => (0.0, 0.0),
            };
            for b in members {
                let slope = |up: f64, down: f64| up / d - numerator * down / (d * d);
                slopes[b * k + c] = (slope(up, down_hit), slope(0.0, down_rest));
            }
        }
    }
    let mean = |values: &[f64]| if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 };
    let coefficients: Vec<f64> = of_class.iter().map(|values| mean(values)).collect();
    let all: Vec<f64> = of_class.concat();

    let mut gradient = vec![0.0; sources.len() * k];
    for v in 0..sources.len() {
        let (weight, sample) = (case.counts(sources[v]), v / voxels);
        if weight == 0.0 || terms == 0 {
            continue;
        }
        let slope = |class: usize| {
            let (of_hit, of_rest) = slopes[sample * k + class];
            -weight / terms as f64 * if hit(v, class) { of_hit } else { of_rest }
        };
        let mean: f64 = (0..k).map(|class| slope(class) * q[v * k + class]).sum();
        for c in 0..k {
            let p = p[v * k + c];
            let own = owner(case, sample, c).map_or(0.0, slope);
            gradient[v * k + c] = if exclusive { p * (own - mean) } else { own * p * (1.0 - p) };
        }
    }
    (-mean(&all), coefficients, gradient)
}
