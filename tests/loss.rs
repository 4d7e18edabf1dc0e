//! The fused losses against plain f64 loops written from the formulas, nnU-Net's own numbers, and the promises
//! about ignored voxels, undeclared labels and repeatability.

use crate::common::{assert_close, assert_no_device_panic, device, is_slow, read, uniform};
use half::f16;
use voxgrad::kernels::loss::{Gradient, Level, LossSettings, Problem, Target, value, value_and_gradient};
use voxgrad::kernels::{Buffer, Context, Dtype, KernelError};

// ---------------------------------------------------------------------------------------------------------
// The reference: f64, one loop per formula, one-hot targets in memory.

struct Reference {
    /// `[total, ce, dice, coefficient of each Dice class.., cross-entropy part of each channel..]`
    loss: Vec<f64>,
    gradients: Vec<Vec<f64>>,
}

fn nearest_exact(i: usize, from: usize, to: usize) -> usize {
    ((i as f64 + 0.5) * from as f64 / to as f64).floor() as usize
}

/// Labels of a level: `[batch, depth, height, width]`.
fn downsample(labels: &[u8], batch: usize, dims: [usize; 3], level: [usize; 3]) -> Vec<u8> {
    let mut out = Vec::new();
    for b in 0..batch {
        for z in 0..level[0] {
            for y in 0..level[1] {
                for x in 0..level[2] {
                    let z = nearest_exact(z, dims[0], level[0]);
                    let y = nearest_exact(y, dims[1], level[1]);
                    let x = nearest_exact(x, dims[2], level[2]);
                    out.push(labels[((b * dims[0] + z) * dims[1] + y) * dims[2] + x]);
                }
            }
        }
    }
    out
}

/// The loss of one level with weight 1: `[total, ce, dice, coefficients.., cross-entropy parts..]` and the gradient of the total.
fn reference_level(s: &LossSettings, batch: usize, labels: &[u8], logits: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let k = s.target.channels();
    let voxels = labels.len() / batch;
    let exclusive = matches!(s.target, Target::Labels { .. });
    let declared = match &s.target {
        Target::Labels { classes } => *classes,
        Target::Regions { labels, .. } => *labels,
    };
    let mask: Vec<bool> = labels.iter().map(|l| usize::from(*l) < declared).collect();
    let n = labels.len();
    let (mut y, mut p) = (vec![0.0; n * k], vec![0.0; n * k]);
    let mut entropies = vec![0.0; k];
    for v in (0..n).filter(|v| mask[*v]) {
        let z = &logits[v * k..][..k];
        match &s.target {
            Target::Labels { .. } => {
                let top = z.iter().copied().fold(f64::MIN, f64::max);
                let sum: f64 = z.iter().map(|z| (z - top).exp()).sum();
                for c in 0..k {
                    p[v * k + c] = (z[c] - top).exp() / sum;
                }
                y[v * k + usize::from(labels[v])] = 1.0;
                entropies[usize::from(labels[v])] += top + sum.ln() - z[usize::from(labels[v])];
            }
            Target::Regions { regions, .. } => {
                for c in 0..k {
                    p[v * k + c] = 1.0 / (1.0 + (-z[c]).exp());
                    y[v * k + c] = f64::from(u8::from(regions[c].contains(&u16::from(labels[v]))));
                    entropies[c] += z[c].max(0.0) - z[c] * y[v * k + c] + (-z[c].abs()).exp().ln_1p();
                }
            }
        }
    }
    let valid = mask.iter().filter(|m| **m).count() as f64;
    let mut elements = valid;
    if !exclusive && s.ignore.is_empty() {
        elements *= k as f64;
    }
    if valid > 0.0 {
        entropies.iter_mut().for_each(|entropy| *entropy /= elements);
    }
    let ce = entropies.iter().sum::<f64>();

    let sums = |b: usize, c: usize| {
        let (mut i, mut p_sum, mut g) = (0.0, 0.0, 0.0);
        for v in b * voxels..(b + 1) * voxels {
            i += p[v * k + c] * y[v * k + c];
            p_sum += p[v * k + c];
            g += y[v * k + c];
        }
        (i, p_sum, g)
    };
    let first = usize::from(exclusive && k > 1);
    let samples = if s.dice.batch { 1 } else { batch };
    let terms = ((k - first) * samples) as f64;
    let mut coefficients = vec![0.0; k];
    // d(loss)/dp = slope_hit where y = 1, slope_rest elsewhere
    let mut slopes = vec![(0.0, 0.0); batch * k];
    for c in first..k {
        for group in 0..samples {
            let members = if s.dice.batch { 0..batch } else { group..group + 1 };
            let (mut i, mut d) = (0.0, s.dice.smooth as f64);
            for b in members.clone() {
                let (i_b, p_b, g_b) = sums(b, c);
                i += i_b;
                d += p_b + g_b;
            }
            let numerator = 2.0 * i + s.dice.smooth as f64;
            let dice = numerator / d.max(1e-8);
            coefficients[c] += dice / samples as f64;
            let rest = if d > 1e-8 { numerator / (d * d) } else { 0.0 };
            for b in members {
                slopes[b * k + c] = ((rest - 2.0 / d.max(1e-8)) / terms, rest / terms);
            }
        }
    }
    let dice = -coefficients[first..].iter().sum::<f64>() / (k - first) as f64;

    let (wc, wd) = (f64::from(s.weight_ce), f64::from(s.weight_dice));
    let mut gradient = vec![0.0; n * k];
    for v in (0..n).filter(|v| mask[*v]) {
        let at = v * k;
        let slope = |c: usize| {
            let (hit, rest) = slopes[v / voxels * k + c];
            wd * if y[at + c] == 1.0 { hit } else { rest }
        };
        for c in 0..k {
            let mut g = wc * (p[at + c] - y[at + c]) / elements;
            if exclusive {
                for j in 0..k {
                    let jacobian = p[at + j] * (f64::from(u8::from(j == c)) - p[at + c]);
                    g += slope(j) * jacobian;
                }
            } else {
                g += slope(c) * p[at + c] * (1.0 - p[at + c]);
            }
            gradient[at + c] = g;
        }
    }
    let mut loss = vec![wc * ce + wd * dice, ce, dice];
    loss.extend(&coefficients[first..]);
    loss.extend(&entropies);
    (loss, gradient)
}

fn reference(case: &Case, labels: &[u8], logits: &[Vec<f32>]) -> Reference {
    let mut loss = vec![0.0; 3 + case.settings.dice_classes() + case.settings.target.channels()];
    let mut gradients = Vec::new();
    for (level, logits) in case.levels.iter().zip(logits) {
        let logits: Vec<f64> = logits.iter().map(|z| f64::from(*z)).collect();
        let coarse = downsample(labels, case.batch, case.dims, level.dims);
        let (level_loss, gradient) = reference_level(&case.settings, case.batch, &coarse, &logits);
        let weight = f64::from(level.weight);
        loss.iter_mut().zip(level_loss).for_each(|(sum, term)| *sum += weight * term);
        gradients.push(gradient.iter().map(|g| weight * g).collect());
    }
    Reference { loss, gradients }
}

// ---------------------------------------------------------------------------------------------------------
// Running the kernels.

#[derive(Clone)]
struct Case {
    name: String,
    settings: LossSettings,
    batch: usize,
    dims: [usize; 3],
    levels: Vec<Level>,
}

impl Case {
    fn new(name: impl Into<String>, settings: LossSettings, batch: usize, dims: [usize; 3]) -> Self {
        Self { name: name.into(), settings, batch, dims, levels: vec![Level { dims, weight: 1.0 }] }
    }

    fn voxels(&self) -> usize {
        self.batch * self.dims.iter().product::<usize>()
    }

    fn logits(&self, seed: u64) -> Vec<Vec<f32>> {
        let channels = self.settings.target.channels();
        let one = |(i, level): (usize, &Level)| {
            let len = self.batch * level.dims.iter().product::<usize>() * channels;
            uniform(seed + i as u64, len).iter().map(|z| 4.0 * z).collect()
        };
        self.levels.iter().enumerate().map(one).collect()
    }

    /// Labels in runs, so that there are whole groups of ignored voxels and mixed ones.
    fn labels(&self, seed: u64, ignored: Ignored) -> Vec<u8> {
        let declared = match &self.settings.target {
            Target::Labels { classes } => *classes,
            Target::Regions { labels, .. } => *labels,
        };
        let ignore = self.settings.ignore.first().map_or(255, |label| *label as u8);
        let (classes, runs) = (uniform(seed, self.voxels()), uniform(seed + 1, self.voxels() / 11 + 1));
        let sample = self.voxels() / self.batch;
        let label = |v: usize| {
            let label = (((classes[v] + 1.0) / 2.0 * declared as f32) as usize).min(declared - 1) as u8;
            let gone = match ignored {
                Ignored::Nothing => false,
                Ignored::Some => runs[v / 11] > -0.2 || classes[v] > 0.8,
                Ignored::All => true,
                Ignored::LastSample => v / sample == self.batch - 1,
            };
            if gone { ignore } else { label }
        };
        (0..self.voxels()).map(label).collect()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Ignored {
    Nothing,
    Some,
    All,
    LastSample,
}

const CANARY: f32 = -7.25;

struct Outcome {
    loss: Vec<f32>,
    gradients: Vec<Vec<f32>>,
}

/// Runs value and gradient in f32, with canaries behind all outputs, NaN in them before, and the value alone.
fn run(context: &Context, case: &Case, labels: &[u8], logits: &[Vec<f32>]) -> Outcome {
    let problem = Problem::new(context, &case.settings, case.batch, case.dims, &case.levels).expect(&case.name);
    let guarded = |len: usize| {
        let mut values = vec![f32::NAN; len];
        values.extend([CANARY; 64]);
        let buffer = context.upload_f32(&values).unwrap();
        (buffer.part(0, len).unwrap(), buffer)
    };
    let (loss, whole_loss) = guarded(problem.loss_len());
    let (value_loss, whole_value_loss) = guarded(problem.loss_len());
    let labels = context.upload(labels, Dtype::U8).unwrap();
    let logits: Vec<Buffer> = logits.iter().map(|z| context.upload_f32(z).unwrap()).collect();
    let logits: Vec<&Buffer> = logits.iter().collect();
    let (parts, wholes): (Vec<Buffer>, Vec<Buffer>) =
        (0..case.levels.len()).map(|l| guarded(problem.logits_len(l))).unzip();
    let gradients: Vec<Gradient> = parts.iter().map(Gradient::Into).collect();
    value_and_gradient(context, &problem, &(&labels).into(), &logits, &gradients, 1.0, &loss).expect(&case.name);
    value(context, &problem, &(&labels).into(), &logits, &value_loss).expect(&case.name);
    for whole in wholes.iter().chain([&whole_loss, &whole_value_loss]) {
        let values = read(context, whole);
        assert!(values[values.len() - 64..].iter().all(|v| *v == CANARY), "{}: wrote behind an output", case.name);
    }
    let loss = read(context, &loss);
    assert_eq!(bits(&loss), bits(&read(context, &value_loss)), "{}: value() differs", case.name);

    Outcome { loss, gradients: parts.iter().map(|part| read(context, part)).collect() }
}

/// The gradient over the logits is the same as apart from them.
fn check_in_place(context: &Context, case: &Case, labels: &[u8], logits: &[Vec<f32>], apart: &Outcome) {
    let problem = Problem::new(context, &case.settings, case.batch, case.dims, &case.levels).expect(&case.name);
    let loss = context.empty(problem.loss_len(), Dtype::F32).unwrap();
    let labels = context.upload(labels, Dtype::U8).unwrap();
    let buffers: Vec<Buffer> = logits.iter().map(|z| context.upload_f32(z).unwrap()).collect();
    let buffers: Vec<&Buffer> = buffers.iter().collect();
    let in_place = vec![Gradient::InPlace; buffers.len()];
    value_and_gradient(context, &problem, &(&labels).into(), &buffers, &in_place, 1.0, &loss).expect(&case.name);
    for (level, buffer) in buffers.iter().enumerate() {
        let expected = if case.levels[level].weight > 0.0 { &apart.gradients[level] } else { &logits[level] };
        assert_eq!(bits(&read(context, buffer)), bits(expected), "{}: in place at level {level}", case.name);
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn check(context: &Context, case: &Case, labels: &[u8], logits: &[Vec<f32>]) -> Outcome {
    let outcome = run(context, case, labels, logits);
    let expected = reference(case, labels, logits);
    assert_close(&format!("{}: loss", case.name), &outcome.loss, &expected.loss, 2e-6);
    for (level, (actual, expected)) in outcome.gradients.iter().zip(&expected.gradients).enumerate() {
        if case.levels[level].weight == 0.0 {
            assert!(actual.iter().all(|g| g.is_nan()), "{}: level {level} was touched", case.name);
        } else {
            // lavapipe's exp is about 3e-6 off
            let tolerance = if is_slow() { 2e-5 } else { 2e-6 };
            assert_close(&format!("{}: gradient {level}", case.name), actual, expected, tolerance);
            for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
                assert!(*e != 0.0 || *a == 0.0, "{}: gradient {level} [{i}] is {a} on an ignored voxel", case.name);
            }
        }
    }
    outcome
}

/// `count` regions over `labels` labels; label 0 lies in some of them too.
fn overlapping(count: usize, labels: usize) -> Target {
    let regions = (0..count).map(|r| (0..labels).filter(|l| (l * 7 + r * 3) % 5 < 2).map(|l| l as u16).collect());
    Target::Regions { labels, regions: regions.collect() }
}

// ---------------------------------------------------------------------------------------------------------

#[test]
fn value_and_gradient_match_the_f64_reference() {
    let (context, _guard) = device();
    // Channels, samples and sizes: one voxel; ragged; more than one chunk; wide class counts on small volumes.
    let sizes: &[(usize, usize, [usize; 3])] = &[
        (1, 2, [3, 5, 7]),
        (2, 1, [1, 1, 1]),
        (2, 3, [3, 5, 7]),
        (3, 2, [13, 17, 19]),
        (4, 2, [16, 16, 16]),
        (5, 1, [3, 5, 7]),
        (8, 2, [9, 10, 25]),
        (9, 2, [3, 5, 7]),
        (14, 2, [9, 10, 25]),
        (62, 2, [3, 5, 7]),
        (118, 1, [3, 5, 7]),
    ];
    for &(channels, batch, dims) in sizes {
        if is_slow() && dims[0] > 10 {
            continue;
        }
        let labels = Target::Labels { classes: channels };
        let regions = overlapping(channels, 6);
        for (kind, target, ignore) in [("labels", labels, channels as u8), ("regions", regions, 6)] {
            for (ignored, batch_dice) in
                [(Ignored::Nothing, true), (Ignored::Some, false), (Ignored::Some, true), (Ignored::LastSample, false)]
            {
                // Without an ignore label the kernels are others: for some channels that is enough.
                if ignored == Ignored::Nothing && ![1, 3, 4, 14].contains(&channels) {
                    continue;
                }
                let declared = (ignored != Ignored::Nothing).then_some(ignore);
                let mut settings = LossSettings::new(target.clone(), declared.map(u16::from), batch_dice);
                if ignored == Ignored::LastSample {
                    (settings.weight_ce, settings.weight_dice) = (0.75, 1.5);
                }
                let name = format!("{channels} {kind} {ignored:?} batch_dice {batch_dice} {dims:?}");
                let case = Case::new(name, settings, batch, dims);
                check(context, &case, &case.labels(5, ignored), &case.logits(1));
            }
        }
    }
}

#[test]
fn deep_supervision_reads_every_level_from_one_map() {
    let (context, _guard) = device();
    // Anisotropic steps, odd sizes, ratios that are no integers, and a level of weight 0.
    let dims = if is_slow() { [4, 11, 9] } else { [6, 23, 21] };
    let half = |n: usize| n.div_ceil(2);
    let second = [dims[0], half(dims[1]), half(dims[2])];
    let third = [half(dims[0]), half(second[1]), half(second[2])];
    let levels = [(dims, 0.5333f32), (second, 0.2667), (third, 0.2), ([1, 2, 3], 0.1), ([2, 2, 2], 0.0)];
    let levels: Vec<Level> = levels.map(|(dims, weight)| Level { dims, weight }).to_vec();
    let targets = [4, 14, 20]
        .map(|classes| Target::Labels { classes })
        .into_iter()
        .chain([overlapping(3, 4), overlapping(20, 4)]);
    for target in targets {
        let ignore = target.channels().max(4) as u16;
        let settings = LossSettings::new(target, Some(ignore), false);
        let mut case = Case::new("deep supervision", settings, 2, dims);
        case.levels.clone_from(&levels);
        let (labels, logits) = (case.labels(3, Ignored::Some), case.logits(9));
        let outcome = check(context, &case, &labels, &logits);
        check_in_place(context, &case, &labels, &logits, &outcome);
    }
}

#[test]
fn more_than_32_regions_use_several_words() {
    let (context, _guard) = device();
    for count in [32, 33, 70] {
        let mut settings = LossSettings::new(overlapping(count, 9), Some(9), true);
        settings.dice.smooth = 1.0;
        let case = Case::new(format!("{count} regions"), settings, 2, [3, 4, 5]);
        check(context, &case, &case.labels(8, Ignored::Some), &case.logits(4));
    }
}

#[test]
fn nothing_annotated_is_minus_one_without_gradient() {
    let (context, _guard) = device();
    for target in [Target::Labels { classes: 3 }, Target::Labels { classes: 20 }, overlapping(3, 3)] {
        for batch_dice in [false, true] {
            let settings = LossSettings::new(target.clone(), Some(77), batch_dice);
            let case = Case::new("all ignored", settings, 2, [3, 5, 7]);
            let outcome = check(context, &case, &case.labels(1, Ignored::All), &case.logits(1));
            assert_eq!(outcome.loss[..3], [-1.0, 0.0, -1.0]);
            assert!(outcome.gradients[0].iter().all(|g| *g == 0.0));
        }
    }
}

#[test]
fn the_reference_is_the_derivative_of_its_value() {
    for target in [Target::Labels { classes: 4 }, overlapping(5, 4)] {
        for batch_dice in [false, true] {
            let mut settings = LossSettings::new(target.clone(), Some(4), batch_dice);
            (settings.weight_ce, settings.weight_dice) = (0.7, 1.3);
            let case = Case::new("finite differences", settings, 2, [2, 3, 5]);
            let labels = case.labels(2, Ignored::Some);
            let logits: Vec<f64> = case.logits(2)[0].iter().map(|z| f64::from(*z)).collect();
            let (_, gradient) = reference_level(&case.settings, 2, &labels, &logits);
            for i in 0..logits.len() {
                let at = |step: f64| {
                    let mut moved = logits.clone();
                    moved[i] += step;
                    reference_level(&case.settings, 2, &labels, &moved).0[0]
                };
                let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!((slope - gradient[i]).abs() < 1e-9, "{i}: {slope} and {}", gradient[i]);
            }
        }
    }
}

/// nnU-Net's logits `[batch, channel, ...]` to ours.
fn channels_last<T: Copy>(values: &[T], batch: usize, channels: usize) -> Vec<T> {
    let voxels = values.len() / batch / channels;
    let index = |i: usize| {
        let (b, v, c) = (i / channels / voxels, i / channels % voxels, i % channels);
        values[(b * channels + c) * voxels + v]
    };
    (0..values.len()).map(index).collect()
}

#[test]
fn published_numbers_of_nnunet_s_loss() {
    let (context, _guard) = device();
    let logits: Vec<f32> =
        (0..144).map(|n| (2.0 * (0.7 * f64::from(n) + 0.3 * f64::from(n % 5)).sin()) as f32).collect();
    let logits = [channels_last(&logits, 2, 3)];
    let by_label: Vec<u8> = (0..48).map(|k| ((7 * k + k / 3) % 7).min(3) as u8).collect();
    let by_region: Vec<u8> = (0..48).map(|k| ((5 * k + k / 3) % 5) as u8).collect();
    let labels = Target::Labels { classes: 3 };
    let regions = Target::Regions { labels: 4, regions: vec![vec![1, 2, 3], vec![2, 3], vec![3]] };
    let run = |target: &Target, ignore, batch_dice, map: &[u8]| {
        let settings = LossSettings::new(target.clone(), ignore, batch_dice);
        let case = Case::new("published", settings, 2, [2, 3, 4]);
        check(context, &case, map, &logits)
    };
    // CE, Dice loss, total, gradient norm, first and last gradient
    let rows = [
        (
            &labels,
            &by_label,
            3,
            false,
            [1.1974576994, -0.4476534302, 0.7498042692, 0.1923808143, -0.0300566159, 0.0301737852],
        ),
        (
            &labels,
            &by_label,
            3,
            true,
            [1.1974576994, -0.4636496701, 0.7338080294, 0.1932673558, -0.0282962364, 0.0346959063],
        ),
        (
            &regions,
            &by_region,
            4,
            false,
            [2.4465436580, -0.4930618834, 1.9534817746, 0.1623581124, 0.0138272325, 0.0192978940],
        ),
        (
            &regions,
            &by_region,
            4,
            true,
            [2.4465436580, -0.4965905560, 1.9499531020, 0.1625848918, 0.0139770973, 0.0190381270],
        ),
    ];
    for (target, map, ignore, batch_dice, expected) in rows {
        let outcome = run(target, Some(ignore), batch_dice, map);
        let gradient = &outcome.gradients[0];
        let norm = gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
        let actual =
            [outcome.loss[1], outcome.loss[2], outcome.loss[0], norm, gradient[0], gradient[gradient.len() - 1]];
        assert_close("published", &actual, &expected, 1e-6);
    }
    let outcome = run(&labels, Some(3), false, &by_label);
    // means over the samples of [[0.54044524, 0.67683000], [0.47711207, 0.09622641]]
    assert_close("dice", &outcome.loss[3..5], &[0.508778655, 0.386528205], 1e-6);
    let outcome = run(&labels, Some(3), true, &by_label);
    assert_close("batch dice", &outcome.loss[3..5], &[0.50359626, 0.42370308], 1e-6);

    let mut one_sample = by_label.clone();
    one_sample[24..].fill(3);
    let outcome = run(&labels, Some(3), false, &one_sample);
    assert_close("sample 1 ignored", &outcome.loss[..3], &[0.0087574154, 0.8130762261, -0.8043188108], 1e-6);
    one_sample.fill(3);
    assert_eq!(run(&labels, Some(3), false, &one_sample).loss[0], -1.0);

    // An empty ignore channel, and none at all: label 4 lies in no region, but then counts as background.
    let regions = Target::Regions { labels: 5, regions: vec![vec![1, 2, 3], vec![2, 3], vec![3]] };
    let declared = run(&regions, Some(200), false, &by_region).loss[1];
    let undeclared = run(&regions, None, false, &by_region).loss[1];
    assert_close("bce", &[declared, undeclared], &[2.4825783489, 0.8275261163], 1e-6);
}

/// A tensor of a safetensors file, as f64 for any of its types.
fn tensor(file: &safetensors::SafeTensors, name: &str) -> Vec<f64> {
    let view = file.tensor(name).expect(name);
    match view.dtype() {
        safetensors::Dtype::F32 => {
            view.data().as_chunks().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
        }
        safetensors::Dtype::I16 => {
            view.data().as_chunks().0.iter().map(|b| f64::from(i16::from_le_bytes(*b))).collect()
        }
        safetensors::Dtype::U8 => view.data().iter().map(|b| f64::from(*b)).collect(),
        other => panic!("{name}: {other:?}"),
    }
}

/// The label map of nnU-Net's target of a level: labels as they are; of regions (whole tumour 1 2 3, core 2 3,
/// enhancing 3, ignored) the number of regions that a voxel lies in.
fn label_map(target: &[f64], batch: usize, regions: bool) -> Vec<u8> {
    if !regions {
        return target.iter().map(|label| *label as u8).collect();
    }
    let channels = channels_last(target, batch, 4);
    channels.chunks(4).map(|c| if c[3] == 1.0 { 4 } else { (c[0] + c[1] + c[2]) as u8 }).collect()
}

/// A training step of nnU-Net 2.8.1 with torch 2.15: its logits of three levels, the loss of each and their
/// gradients, and the deep-supervision loss.
#[test]
fn values_and_gradients_of_real_nnunet_steps() {
    let (context, _guard) = device();
    if is_slow() {
        eprintln!("skipped: the volumes of the real steps are too large for this device");
        return;
    }
    let data = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let finest = std::fs::read(data.join("loss/finest_gradient.safetensors")).unwrap();
    let finest = safetensors::SafeTensors::deserialize(&finest).unwrap();
    for (name, regions) in [("brats_regions", true), ("brats_labels_anisotropic", false)] {
        let packed = std::fs::File::open(data.join(name).join("step.safetensors.gz")).unwrap();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(packed), &mut bytes).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let target = if regions {
            Target::Regions { labels: 4, regions: vec![vec![1, 2, 3], vec![2, 3], vec![3]] }
        } else {
            Target::Labels { classes: 4 }
        };
        let channels = target.channels();
        let settings = LossSettings::new(target, Some(4), false);
        let shapes: Vec<[usize; 3]> = (0..3)
            .map(|level| {
                let view = file.tensor(&format!("step.logits.{level}")).unwrap();
                [view.shape()[2], view.shape()[3], view.shape()[4]]
            })
            .collect();
        let labels = label_map(&tensor(&file, "step.target.0"), 2, regions);
        let logits: Vec<Vec<f32>> = (0..3)
            .map(|level| {
                let planar = tensor(&file, &format!("step.logits.{level}"));
                channels_last(&planar, 2, channels).iter().map(|z| *z as f32).collect()
            })
            .collect();

        for level in 0..3 {
            let theirs = label_map(&tensor(&file, &format!("step.target.{level}")), 2, regions);
            assert_eq!(downsample(&labels, 2, shapes[0], shapes[level]), theirs, "{name}: target {level}");
            let mut case = Case::new(format!("{name} level {level}"), settings.clone(), 2, shapes[0]);
            case.levels = vec![Level { dims: shapes[level], weight: 1.0 }];
            let outcome = run(context, &case, &labels, &logits[level..=level]);
            let value = tensor(&file, &format!("loss.{level}.value"));
            assert_close(&case.name, &outcome.loss[..1], &value, 1e-6);
            if level == 0 {
                let part: Vec<f32> = outcome.gradients[0].chunks(channels).step_by(23).flatten().copied().collect();
                assert_close(&case.name, &part, &tensor(&finest, name), 2e-6);
            } else {
                let gradient = tensor(&file, &format!("loss.{level}.grad"));
                assert_close(&case.name, &outcome.gradients[0], &channels_last(&gradient, 2, channels), 2e-6);
            }
        }
        let mut case = Case::new(format!("{name} deep supervision"), settings, 2, shapes[0]);
        let weights = [2.0 / 3.0, 1.0 / 3.0, 0.0];
        case.levels = (0..3).map(|level| Level { dims: shapes[level], weight: weights[level] }).collect();
        let outcome = check(context, &case, &labels, &logits);
        assert_close(&case.name, &outcome.loss[..1], &tensor(&file, "step.loss.0"), 1e-6);
    }
}

#[test]
fn what_an_ignored_voxel_holds_does_not_matter() {
    let (context, _guard) = device();
    for target in [Target::Labels { classes: 4 }, Target::Labels { classes: 17 }, overlapping(3, 4)] {
        let ignore = target.channels().max(4) as u8;
        let case = Case::new("masked", LossSettings::new(target, Some(u16::from(ignore)), false), 2, [5, 7, 9]);
        let labels = case.labels(4, Ignored::Some);
        let logits = case.logits(6);
        let clean = check(context, &case, &labels, &logits);
        let channels = case.settings.target.channels();
        let mut dirty = logits.clone();
        let mut sentinel = labels.clone();
        for (v, label) in labels.iter().enumerate().filter(|(_, label)| **label == ignore) {
            let poison = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e38][v % 4];
            dirty[0][v * channels..][..channels].fill(poison);
            // Labels that the data set does not declare count as ignored.
            sentinel[v] = [255, 254, *label, *label][v % 4];
        }
        let poisoned = run(context, &case, &sentinel, &dirty);
        assert_eq!(bits(&poisoned.loss), bits(&clean.loss));
        assert_eq!(bits(&poisoned.gradients[0]), bits(&clean.gradients[0]));
        // A NaN in an annotated voxel is not hidden.
        let annotated = labels.iter().position(|label| *label != ignore).unwrap();
        dirty[0][annotated * channels] = f32::NAN;
        let outcome = run(context, &case, &sentinel, &dirty);
        assert!(outcome.loss[0].is_nan());
        let ignored = (0..labels.len()).filter(|v| labels[*v] == ignore);
        assert!(ignored.flat_map(|v| v * channels..(v + 1) * channels).all(|i| outcome.gradients[0][i] == 0.0));
    }
}

#[test]
fn results_repeat_bit_for_bit() {
    let (context, _guard) = device();
    let dims = if is_slow() { [8, 16, 17] } else { [24, 32, 33] };
    for target in [Target::Labels { classes: 4 }, Target::Labels { classes: 14 }, overlapping(3, 4)] {
        let case = Case::new("repeat", LossSettings::new(target, Some(200), false), 2, dims);
        let (labels, logits) = (case.labels(4, Ignored::Some), case.logits(6));
        let first = run(context, &case, &labels, &logits);
        for _ in 0..2 {
            let again = run(context, &case, &labels, &logits);
            assert_eq!(bits(&first.loss), bits(&again.loss));
            assert_eq!(bits(&first.gradients[0]), bits(&again.gradients[0]));
        }
    }
}

#[test]
fn a_launch_of_more_cubes_than_an_axis_holds() {
    let (context, _guard) = device();
    // With 17 classes a GPU's gradient has a unit for each logit: more than 65535 cubes of 64.
    let settings = LossSettings::new(Target::Labels { classes: 17 }, Some(17), true);
    let case = Case::new("many cubes", settings, 1, [64, 64, 64]);
    check(context, &case, &case.labels(3, Ignored::Some), &case.logits(2));
}

#[test]
fn long_sums_are_exact_enough() {
    let (context, _guard) = device();
    if is_slow() {
        eprintln!("skipped: two million voxels are too many for this device");
        return;
    }
    let case = Case::new("long", LossSettings::new(Target::Labels { classes: 2 }, None, true), 1, [128; 3]);
    let mut logits = case.logits(1);
    // One class everywhere, well predicted: sums of two million equal signs, small errors.
    logits[0].chunks_mut(2).for_each(|z| z[1] += 4.0);
    check(context, &case, &vec![1; case.voxels()], &logits);
}

#[test]
fn samples_and_classes_are_interchangeable() {
    let (context, _guard) = device();
    let settings = LossSettings::new(Target::Labels { classes: 5 }, Some(5), false);
    let case = Case::new("batch", settings, 3, [4, 6, 7]);
    let (labels, logits) = (case.labels(4, Ignored::Nothing), case.logits(6));
    let together = run(context, &case, &labels, &logits);
    // Without ignored voxels, a batch's loss is the mean of its samples' losses.
    let one = Case { batch: 1, ..case.clone() };
    let (voxels, values) = (4 * 6 * 7, 4 * 6 * 7 * 5);
    let mut mean = vec![0.0f64; together.loss.len()];
    for sample in 0..3 {
        let part = logits[0][sample * values..][..values].to_vec();
        let alone = run(context, &one, &labels[sample * voxels..][..voxels], &[part]);
        mean.iter_mut().zip(&alone.loss).for_each(|(m, l)| *m += f64::from(*l) / 3.0);
        let expected: Vec<f64> = alone.gradients[0].iter().map(|g| f64::from(*g) / 3.0).collect();
        assert_close("a sample's gradient", &together.gradients[0][sample * values..][..values], &expected, 1e-6);
    }
    assert_close("mean of the samples", &together.loss, &mean, 1e-6);
    // Renaming the foreground classes renames the results.
    let order = [0usize, 3, 1, 4, 2];
    let renamed: Vec<u8> = labels.iter().map(|l| order[usize::from(*l)] as u8).collect();
    let mut moved = logits.clone();
    for (i, z) in logits[0].iter().enumerate() {
        moved[0][i / 5 * 5 + order[i % 5]] = *z;
    }
    let outcome = run(context, &case, &renamed, &moved);
    let gradient: Vec<f64> = (0..outcome.gradients[0].len())
        .map(|i| f64::from(together.gradients[0][i / 5 * 5 + inverse(order, i % 5)]))
        .collect();
    assert_close("renamed classes", &outcome.gradients[0], &gradient, 1e-6);
    assert_close("renamed loss", &outcome.loss[..1], &[f64::from(together.loss[0])], 1e-6);
}

fn inverse(order: [usize; 5], class: usize) -> usize {
    order.iter().position(|c| *c == class).unwrap()
}

#[test]
fn half_precision_logits() {
    let (context, _guard) = device();
    if !context.caps().f16 {
        eprintln!("skipped: this device has no f16");
        return;
    }
    for target in [Target::Labels { classes: 3 }, Target::Labels { classes: 14 }, overlapping(3, 4)] {
        let ignore = target.channels().max(4) as u8;
        let case = Case::new("f16", LossSettings::new(target, Some(u16::from(ignore)), false), 2, [7, 9, 11]);
        let labels = case.labels(4, Ignored::Some);
        let halves: Vec<f16> = case.logits(6)[0].iter().map(|z| f16::from_f32(*z)).collect();
        let expected = reference(&case, &labels, &[halves.iter().map(|z| z.to_f32()).collect()]);
        let problem = Problem::new(context, &case.settings, case.batch, case.dims, &case.levels).unwrap();
        let labels = context.upload(&labels, Dtype::U8).unwrap();
        let logits = context.upload(&halves, Dtype::F16).unwrap();
        let gradient = context.empty(halves.len(), Dtype::F16).unwrap();
        let loss = context.empty(problem.loss_len(), Dtype::F32).unwrap();
        let scale = 1024.0;
        value_and_gradient(
            context,
            &problem,
            &(&labels).into(),
            &[&logits],
            &[Gradient::Into(&gradient)],
            scale,
            &loss,
        )
        .unwrap();
        assert_close("f16 loss", &read(context, &loss), &expected.loss, 1e-5);
        let gradient: Vec<f16> = context.download(&gradient).unwrap();
        assert_no_device_panic();
        let gradient: Vec<f32> = gradient.iter().map(|g| g.to_f32() / scale).collect();
        assert_close("f16 gradient", &gradient, &expected.gradients[0], 5e-3);
        assert_close("f16 gradient", &gradient, &expected.gradients[0], 5e-4);
    }
}

/// Of what is allocated, and from the shapes: `kernels/src/loss/plan.rs` has the latter for every kind of device.
#[test]
fn memory_beyond_the_arguments_is_less_than_a_hundredth_of_the_logits() {
    let (context, _guard) = device();
    let caps = context.caps();
    let dims = [32, 32, 32];
    for classes in [4, 14, 62, 118] {
        if classes > 4 && caps.cores.is_none() && caps.shared_memory == 0 {
            println!("skipped: {classes} classes where shared memory does not work");
            continue;
        }
        for (target, ignore) in [(Target::Labels { classes }, classes as u16), (overlapping(classes, 6), 6)] {
            let settings = LossSettings::new(target, Some(ignore), false);
            let problem = Problem::new(context, &settings, 1, dims, &[Level { dims, weight: 1.0 }]).unwrap();
            let labels = context.upload(&vec![1u8; dims.iter().product()], Dtype::U8).unwrap();
            let loss = context.empty(problem.loss_len(), Dtype::F32).unwrap();
            // Without shared memory chunks are too short for that.
            let narrow = caps.f16 && (caps.cores.is_some() || caps.shared_memory > 0);
            for (dtype, has) in [(Dtype::F32, true), (Dtype::F16, narrow)] {
                if !has {
                    continue;
                }
                let bytes = problem.logits_len(0) * dtype.size();
                let logits = context.upload(&vec![0u8; bytes], Dtype::U8).unwrap();
                let logits = Buffer::from_handle(logits.handle().clone(), problem.logits_len(0), dtype).unwrap();
                let gradient = context.empty(problem.logits_len(0), dtype).unwrap();
                context.reset_peak();
                let (held, launches) = (context.held_bytes(), context.launches());
                let into = [Gradient::Into(&gradient)];
                value_and_gradient(context, &problem, &(&labels).into(), &[&logits], &into, 1.0, &loss).unwrap();
                let (more, launches) = (context.peak_bytes() - held, context.launches() - launches);
                context.finish([&loss, &gradient]).unwrap();
                let what = format!("{:?}, {dtype:?}", settings.target.channels());
                eprintln!("{what}: {more} bytes beside {bytes}, {launches} launches");
                assert!(100 * more < bytes as u64, "{what}: {more} bytes beside {bytes}");
                // The sums, their total, the loss, the gradient.
                assert_eq!(launches, 4, "{what}");
            }
        }
    }
    assert_no_device_panic();
}

#[test]
fn what_does_not_fit_is_a_typed_error() {
    let (context, _guard) = device();
    let settings = LossSettings::new(Target::Labels { classes: 4 }, Some(4), false);
    let level = |dims, weight| Level { dims, weight };
    let new =
        |settings: &LossSettings, batch, dims, levels: &[Level]| Problem::new(context, settings, batch, dims, levels);
    let dims = [4, 4, 4];
    let shape = |result: Result<Problem, KernelError>| assert!(matches!(result, Err(KernelError::Shape { .. })));
    shape(new(&settings, 0, dims, &[level(dims, 1.0)]));
    shape(new(&settings, 1, dims, &[level([5, 4, 4], 1.0)]));
    shape(new(&settings, 1, dims, &[level([0, 4, 4], 1.0)]));
    shape(new(&settings, 1, dims, &[level(dims, 0.0)]));
    shape(new(&settings, 1, dims, &[level(dims, f32::NAN)]));
    shape(new(&settings, 1, dims, &[]));
    let many = LossSettings::new(Target::Labels { classes: 1025 }, None, false);
    shape(new(&many, 1, dims, &[level(dims, 1.0)]));
    let stray = LossSettings::new(Target::Regions { labels: 3, regions: vec![vec![1, 3]] }, None, false);
    shape(new(&stray, 1, dims, &[level(dims, 1.0)]));
    let large = [4096, 4096, 1024];
    assert!(matches!(new(&settings, 1, large, &[level(large, 1.0)]), Err(KernelError::Limit { .. })));

    let problem = new(&settings, 1, dims, &[level(dims, 1.0)]).unwrap();
    let labels = context.upload(&[0u8; 64], Dtype::U8).unwrap();
    let logits = context.upload_f32(&[0.0; 256]).unwrap();
    let short = context.upload_f32(&[0.0; 255]).unwrap();
    let loss = context.empty(problem.loss_len(), Dtype::F32).unwrap();
    assert!(value(context, &problem, &(&labels).into(), &[&logits], &loss).is_ok());
    assert!(matches!(value(context, &problem, &(&labels).into(), &[&short], &loss), Err(KernelError::Shape { .. })));
    assert!(matches!(value(context, &problem, &(&labels).into(), &[], &loss), Err(KernelError::Shape { .. })));
    assert!(matches!(value(context, &problem, &(&logits).into(), &[&logits], &loss), Err(KernelError::Dtype { .. })));
    assert!(matches!(value(context, &problem, &(&labels).into(), &[&logits], &logits), Err(KernelError::Shape { .. })));
    let gradients = [Gradient::Into(&short)];
    let result = value_and_gradient(context, &problem, &(&labels).into(), &[&logits], &gradients, 1.0, &loss);
    assert!(matches!(result, Err(KernelError::Shape { .. })));
}
