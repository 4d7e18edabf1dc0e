//! The losses once more on the host: f64, dense, one loop per formula, gradients written by hand. And what goes with
//! that: random cases, and running the kernels on them.
//!
//! With w the weight of a voxel (0 where it is ignored), p the probabilities, y the one-hot target:
//!
//! ```text
//! I = sum w p y,  P = sum w p,  G = sum w y,  J = max(I, clip)
//! dice = - mean (2 J + s) / max(2 J + (P - I) + (G - I) + s, 1e-8)     over the terms that exist
//! ce   = sum w (-log p[label]) / sum w;  regions: sums of binary cross-entropies
//! ```

use super::{assert_close, device, is_slow, read, uniform};
use half::{bf16, f16};
use voxgrad::kernels::loss::{
    Annotation, Entropy, Gradient, Level, LossSettings, Problem, Target, value, value_and_gradient,
};
use voxgrad::kernels::{Buffer, Context, Dtype, KernelError};

// ---------------------------------------------------------------------------------------------------------
// A loss and everything that it is given.

/// Weights of the voxels, `[batch, depth, height, width]`.
#[derive(Clone, Debug)]
pub enum Weights {
    None,
    U8(Vec<u8>),
    F16(Vec<f16>),
    F32(Vec<f32>),
}

#[derive(Clone, Debug)]
pub struct Case {
    pub name: String,
    pub settings: LossSettings,
    pub batch: usize,
    /// Of the label map.
    pub dims: [usize; 3],
    pub levels: Vec<Level>,
    /// `[batch, depth, height, width]`.
    pub labels: Vec<u16>,
    pub weights: Weights,
    /// `[batch, ceil(channels / 32)]`.
    pub missing: Option<Vec<u32>>,
    /// `[batch, depth, height, width, channels]` of each level.
    pub logits: Vec<Vec<f32>>,
    seed: u64,
}

impl Case {
    /// One level of random logits in [-4, 4). The labels come in runs, so that there are whole groups of annotated and
    /// of ignored voxels beside mixed ones; all are annotated if no ignore label is declared.
    pub fn new(name: impl Into<String>, settings: LossSettings, batch: usize, dims: [usize; 3], seed: u64) -> Self {
        let voxels = batch * dims.iter().product::<usize>();
        let declared = settings.target.labels();
        let (which, runs) = (uniform(seed, voxels), uniform(seed + 1, voxels / 11 + 1));
        let label = |v: usize| {
            let ignored = !settings.ignore.is_empty() && (runs[v / 11] > 0.1 || which[v] > 0.8);
            match ignored {
                true => settings.ignore[v % settings.ignore.len()],
                false => (((which[v] + 1.0) / 2.0 * declared as f32) as usize).min(declared - 1) as u16,
            }
        };
        let mut case = Self {
            name: name.into(),
            labels: (0..voxels).map(label).collect(),
            settings,
            batch,
            dims,
            levels: Vec::new(),
            weights: Weights::None,
            missing: None,
            logits: Vec::new(),
            seed,
        };
        case.set_levels(&[(dims, 1.0)]);
        case
    }

    /// Other levels, with new logits.
    pub fn set_levels(&mut self, levels: &[([usize; 3], f32)]) {
        self.levels = levels.iter().map(|&(dims, weight)| Level { dims, weight }).collect();
        let logits = |(i, level): (usize, &Level)| {
            let len = self.batch * level.dims.iter().product::<usize>() * self.channels();
            uniform(self.seed + 100 + i as u64, len).iter().map(|z| 4.0 * z).collect()
        };
        self.logits = self.levels.iter().enumerate().map(logits).collect();
    }

    /// Random weights in [0, 1], a quarter of them 0.
    pub fn weigh(&mut self, dtype: Dtype) {
        let values: Vec<f32> =
            uniform(self.seed + 50, self.voxels()).iter().map(|w| (w + 0.5).max(0.0) / 1.5).collect();
        self.weights = match dtype {
            Dtype::U8 => Weights::U8(values.iter().map(|w| (255.0 * w) as u8).collect()),
            Dtype::F16 => Weights::F16(values.iter().map(|w| f16::from_f32(*w)).collect()),
            _ => Weights::F32(values),
        };
    }

    /// Declares that nobody annotated a class (region) in a sample.
    pub fn miss(&mut self, sample: usize, class: usize) {
        let words = self.channels().div_ceil(32);
        let missing = self.missing.get_or_insert_with(|| vec![0; self.batch * words]);
        missing[sample * words + class / 32] |= 1 << (class % 32);
    }

    pub fn channels(&self) -> usize {
        self.settings.target.channels()
    }

    /// Of the label map, with all samples.
    pub fn voxels(&self) -> usize {
        self.batch * self.dims.iter().product::<usize>()
    }

    fn is_missing(&self, sample: usize, class: usize) -> bool {
        let words = self.channels().div_ceil(32);
        self.missing.as_ref().is_some_and(|m| m[sample * words + class / 32] >> (class % 32) & 1 == 1)
    }

    fn weight(&self, voxel: usize) -> f64 {
        match &self.weights {
            Weights::None => 1.0,
            Weights::U8(w) => f64::from(w[voxel]) / 255.0,
            Weights::F16(w) => w[voxel].to_f64(),
            Weights::F32(w) => f64::from(w[voxel]),
        }
    }

    /// Weight of a voxel of the label map; 0 where it is ignored.
    pub fn counts(&self, voxel: usize) -> f64 {
        let (label, sample) = (usize::from(self.labels[voxel]), voxel / (self.voxels() / self.batch));
        let exclusive = matches!(self.settings.target, Target::Labels { .. });
        let ignored = label >= self.settings.target.labels() || (exclusive && self.is_missing(sample, label));
        if ignored { 0.0 } else { self.weight(voxel).max(0.0) }
    }

    /// For each voxel of a level, with all samples, the voxel of the label map that nearest-exact interpolation takes.
    pub fn sources(&self, level: usize) -> Vec<usize> {
        let (from, to) = (self.dims, self.levels[level].dims);
        let source = |i: usize, axis: usize| (2 * i + 1) * from[axis] / (2 * to[axis]);
        let mut sources = Vec::new();
        for sample in 0..self.batch {
            for z in 0..to[0] {
                for y in 0..to[1] {
                    for x in 0..to[2] {
                        let row = (sample * from[0] + source(z, 0)) * from[1] + source(y, 1);
                        sources.push(row * from[2] + source(x, 2));
                    }
                }
            }
        }
        sources
    }
}

/// `count` overlapping regions over `labels` labels; label 0 lies in some of them too.
pub fn overlapping(count: usize, labels: usize) -> Target {
    let regions = (0..count).map(|r| (0..labels).filter(|l| (l * 7 + r * 3) % 5 < 2).map(|l| l as u16).collect());
    Target::Regions { labels, regions: regions.collect() }
}

// ---------------------------------------------------------------------------------------------------------
// The reference.

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

// ---------------------------------------------------------------------------------------------------------
// Running the kernels.

const CANARY: f32 = -7.25;

#[derive(Clone, Debug)]
pub struct Outcome {
    pub loss: Vec<f32>,
    pub gradients: Vec<Vec<f32>>,
}

impl Outcome {
    /// All numbers, to compare runs bit for bit.
    pub fn bits(&self) -> Vec<u32> {
        self.loss.iter().chain(self.gradients.iter().flatten()).map(|v| v.to_bits()).collect()
    }
}

/// The case's annotation on the device.
pub struct Uploaded {
    labels: Buffer,
    weights: Option<Buffer>,
    missing: Option<Vec<u32>>,
}

impl Uploaded {
    pub fn new(context: &Context, case: &Case) -> Self {
        let narrow: Vec<u8> = case.labels.iter().filter_map(|l| u8::try_from(*l).ok()).collect();
        let labels = match narrow.len() == case.labels.len() && case.settings.target.labels() <= 256 {
            true => context.upload(&narrow, Dtype::U8),
            false => context.upload(&case.labels, Dtype::U16),
        };
        let weights = match &case.weights {
            Weights::None => None,
            Weights::U8(w) => Some(context.upload(w, Dtype::U8)),
            Weights::F16(w) => Some(context.upload(w, Dtype::F16)),
            Weights::F32(w) => Some(context.upload(w, Dtype::F32)),
        };
        Self {
            labels: labels.expect(&case.name),
            weights: weights.map(|w| w.expect(&case.name)),
            missing: case.missing.clone(),
        }
    }

    pub fn annotation(&self) -> Annotation<'_> {
        Annotation { labels: &self.labels, missing: self.missing.as_deref(), weights: self.weights.as_ref() }
    }
}

/// Value and gradient in f32, with NaN in all outputs before and canaries behind them, and the value alone.
pub fn run(context: &Context, case: &Case) -> Outcome {
    try_run(context, case).unwrap_or_else(|error| panic!("{}: {error}", case.name))
}

/// As [`run`], for cases that the kernels may refuse.
pub fn try_run(context: &Context, case: &Case) -> Result<Outcome, KernelError> {
    let problem = Problem::new(context, &case.settings, case.batch, case.dims, &case.levels)?;
    let guarded = |len: usize| {
        let mut values = vec![f32::NAN; len];
        values.extend([CANARY; 64]);
        let buffer = context.upload_f32(&values).expect("upload");
        (buffer.part(0, len).expect("part"), buffer)
    };
    let (loss, whole_loss) = guarded(problem.loss_len());
    let (loss_alone, whole_loss_alone) = guarded(problem.loss_len());
    let uploaded = Uploaded::new(context, case);
    let logits: Vec<Buffer> = case.logits.iter().map(|z| context.upload_f32(z).expect("upload")).collect();
    let logits: Vec<&Buffer> = logits.iter().collect();
    let (parts, wholes): (Vec<Buffer>, Vec<Buffer>) =
        (0..case.levels.len()).map(|level| guarded(problem.logits_len(level))).unzip();
    let gradients: Vec<Gradient> = parts.iter().map(Gradient::Into).collect();
    value_and_gradient(context, &problem, &uploaded.annotation(), &logits, &gradients, 1.0, &loss)?;
    value(context, &problem, &uploaded.annotation(), &logits, &loss_alone)?;
    for whole in wholes.iter().chain([&whole_loss, &whole_loss_alone]) {
        let values = read(context, whole);
        assert!(values[values.len() - 64..].iter().all(|v| *v == CANARY), "{}: wrote behind an output", case.name);
    }
    let outcome =
        Outcome { loss: read(context, &loss), gradients: parts.iter().map(|part| read(context, part)).collect() };
    let alone = Outcome { loss: read(context, &loss_alone), gradients: outcome.gradients.clone() };
    assert_eq!(outcome.bits(), alone.bits(), "{}: the value alone differs", case.name);
    Ok(outcome)
}

/// What software Vulkan's `exp` and the f32 sums of the kernels are allowed to be off, relative.
pub fn tolerance() -> f64 {
    if is_slow() { 2e-5 } else { 2e-6 }
}

/// Holds the kernels to the reference: value, gradient, and that gradients of ignored voxels are exactly 0.
pub fn check(case: &Case) -> Outcome {
    let (context, _guard) = device();
    check_on(context, case)
}

/// As [`check`], for those who hold the device already.
pub fn check_on(context: &Context, case: &Case) -> Outcome {
    let outcome = run(context, case);
    let expected = reference(case);
    assert_close(&format!("{}: loss", case.name), &outcome.loss, &expected.loss, tolerance());
    for (level, (actual, expected)) in outcome.gradients.iter().zip(&expected.gradients).enumerate() {
        if case.levels[level].weight == 0.0 {
            assert!(actual.iter().all(|g| g.is_nan()), "{}: level {level} was touched", case.name);
            continue;
        }
        assert_close(&format!("{}: gradient {level}", case.name), actual, expected, tolerance());
        for (v, source) in case.sources(level).iter().enumerate().filter(|(_, s)| case.counts(**s) == 0.0) {
            let gradient = &actual[v * case.channels()..][..case.channels()];
            assert!(gradient.iter().all(|g| *g == 0.0), "{}: voxel {v} (label {source}) is ignored", case.name);
        }
    }
    outcome
}

/// The case with its logits rounded to f16 or bf16, and the gradient that the kernels compute from logits of that type.
pub fn run_narrow(context: &Context, case: &Case, dtype: Dtype, scale: f32) -> (Case, Outcome) {
    let mut rounded = case.clone();
    let narrow = |z: f32| if dtype == Dtype::F16 { f16::from_f32(z).to_bits() } else { bf16::from_f32(z).to_bits() };
    let wide = |z: u16| if dtype == Dtype::F16 { f16::from_bits(z).to_f32() } else { bf16::from_bits(z).to_f32() };
    rounded.logits.iter_mut().flatten().for_each(|z| *z = wide(narrow(*z)));
    let problem = Problem::new(context, &case.settings, case.batch, case.dims, &case.levels).expect(&case.name);
    let uploaded = Uploaded::new(context, case);
    let bits = |z: &Vec<f32>| z.iter().map(|z| narrow(*z)).collect::<Vec<u16>>();
    let logits: Vec<Buffer> = case.logits.iter().map(|z| context.upload(&bits(z), dtype).expect("upload")).collect();
    let logits: Vec<&Buffer> = logits.iter().collect();
    let into: Vec<Buffer> = logits.iter().map(|z| context.empty(z.len(), dtype).expect("memory")).collect();
    let gradients: Vec<Gradient> = into.iter().map(Gradient::Into).collect();
    let loss = context.empty(problem.loss_len(), Dtype::F32).expect("memory");
    value_and_gradient(context, &problem, &uploaded.annotation(), &logits, &gradients, scale, &loss)
        .unwrap_or_else(|error| panic!("{}: {error}", case.name));
    let loss = read(context, &loss);
    let download = |g: &Buffer| {
        let bits: Vec<u16> = context.download(g).expect("download");
        bits.iter().map(|g| wide(*g) / scale).collect()
    };
    (rounded, Outcome { loss, gradients: into.iter().map(download).collect() })
}
