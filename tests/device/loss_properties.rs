//! What must hold for the losses whatever the sizes, labels and logits are.

use crate::common::loss_case::{Case, Outcome, Weights, is_possible, overlapping, run, tolerance};
use crate::common::{assert_close, device, is_slow};
use proptest::prelude::*;
use voxgrad::kernels::Dtype;
use voxgrad::kernels::loss::{LossSettings, Target};

/// Kernels are compiled for a number of channels: a few are enough.
fn settings() -> impl Strategy<Value = LossSettings> {
    let labels = |classes: usize| LossSettings::new(Target::Labels { classes }, Some(classes as u16), false);
    let regions = |count: usize| LossSettings::new(overlapping(count, 6), Some(6), false);
    let targets = [labels(3), labels(10), labels(18), regions(3), regions(18)];
    let targets: Vec<LossSettings> = targets.into_iter().filter(is_possible).collect();
    (prop::sample::select(targets), any::<bool>()).prop_map(|(mut settings, batch)| {
        settings.ignore.extend([200, 255]);
        settings.dice.batch = batch;
        settings
    })
}

/// Cases of one to three samples of up to a few chunks.
fn cases() -> impl Strategy<Value = Case> {
    let most = if is_slow() { 5usize } else { 14 };
    (settings(), 1usize..=3, [1..=most, 1..=most, 1..=17usize], 1u64..1_000_000)
        .prop_map(|(settings, batch, dims, seed)| Case::new("property", settings, batch, dims, seed))
}

fn config() -> ProptestConfig {
    ProptestConfig {
        cases: if is_slow() { 4 } else { 32 },
        max_shrink_iters: 32,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}

/// Two runs agree up to the rounding of sums.
fn assert_agree(what: &str, actual: &Outcome, expected: &Outcome) {
    assert_close(&format!("{what}: loss"), &actual.loss, &wide(&expected.loss), tolerance());
    for (actual, expected) in actual.gradients.iter().zip(&expected.gradients) {
        assert_close(&format!("{what}: gradient"), actual, &wide(expected), 2.0 * tolerance());
    }
}

/// Logits and gradients of a sample.
fn of_sample(values: &[f32], sample: usize, batch: usize) -> Vec<f32> {
    let len = values.len() / batch;
    values[sample * len..][..len].to_vec()
}

proptest! {
    #![proptest_config(config())]

    /// Logits under the mask may be anything, and it does not matter by which value a voxel is ignored.
    #[test]
    fn ignored_voxels_change_nothing(case in cases(), poison in any::<u64>()) {
        let (context, _guard) = device();
        let clean = run(context, &case);
        let mut dirty = case.clone();
        let channels = case.channels();
        let declared = case.settings.target.labels() as u16;
        for v in (0..case.voxels()).filter(|v| case.counts(*v) == 0.0) {
            let pick = (poison >> (v % 60)) as usize;
            dirty.labels[v] = [case.settings.ignore[0], 200, 255, declared.max(100) + 1][pick % 4];
            let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38, -3e38, 0.0];
            for c in 0..channels {
                dirty.logits[0][v * channels + c] = values[(pick + c) % 6];
            }
        }
        prop_assert_eq!(run(context, &dirty).bits(), clean.bits());
    }

    /// Renaming the classes renames the rows of gradient and loss.
    #[test]
    fn classes_are_interchangeable(mut case in cases(), turn in 1usize..17) {
        let (context, _guard) = device();
        case.settings.dice.background = true;
        let channels = case.channels();
        let renamed = |c: usize| (c + turn) % channels;
        let mut moved = case.clone();
        match &mut moved.settings.target {
            Target::Labels { classes } => {
                let declared = |label: &&mut u16| usize::from(**label) < *classes;
                moved.labels.iter_mut().filter(declared).for_each(|l| *l = renamed(usize::from(*l)) as u16);
            }
            Target::Regions { regions, .. } => regions.rotate_right(turn % channels),
        }
        let at = |i: usize| i / channels * channels + renamed(i % channels);
        case.logits[0].iter().enumerate().for_each(|(i, z)| moved.logits[0][at(i)] = *z);
        let (original, outcome) = (run(context, &case), run(context, &moved));
        let mut back = outcome.clone();
        for i in 0..original.gradients[0].len() {
            back.gradients[0][i] = outcome.gradients[0][at(i)];
        }
        for c in 0..channels {
            back.loss[3 + c] = outcome.loss[3 + renamed(c)];
            back.loss[3 + channels + c] = outcome.loss[3 + channels + renamed(c)];
        }
        assert_agree("renamed classes", &back, &original);
    }

    /// With Dice of each sample, a batch is the sum of its samples: the cross-entropy of each counts by its share of
    /// the annotated voxels, its Dice term by its share of the samples.
    #[test]
    fn a_batch_is_the_sum_of_its_samples(mut case in cases()) {
        let (context, _guard) = device();
        case.settings.dice.batch = false;
        let together = run(context, &case);
        let annotated = |case: &Case| (0..case.voxels()).filter(|v| case.counts(*v) > 0.0).count() as f32;
        let (all, samples) = (annotated(&case), case.batch as f32);
        let mut sum = vec![0.0; together.loss.len()];
        let mut gradient = Vec::new();
        let voxels = case.voxels() / case.batch;
        for b in 0..case.batch {
            let mut alone = case.clone();
            alone.batch = 1;
            alone.labels = case.labels[b * voxels..][..voxels].to_vec();
            alone.logits = vec![of_sample(&case.logits[0], b, case.batch)];
            alone.settings.weight_ce = if all > 0.0 { annotated(&alone) / all } else { 1.0 };
            alone.settings.weight_dice = 1.0 / samples;
            let outcome = run(context, &alone);
            sum[0] += f64::from(outcome.loss[0]);
            sum[1] += f64::from(alone.settings.weight_ce * outcome.loss[1]);
            for (i, sum) in sum.iter_mut().enumerate().skip(2) {
                let parts = i >= 3 + case.settings.dice_classes();
                let share = if parts { alone.settings.weight_ce } else { alone.settings.weight_dice };
                *sum += f64::from(share * outcome.loss[i]);
            }
            gradient.extend(wide(&outcome.gradients[0]));
        }
        assert_close("sum of the samples: loss", &together.loss, &sum, 2.0 * tolerance());
        assert_close("sum of the samples: gradient", &together.gradients[0], &gradient, 2.0 * tolerance());
    }

    /// Nothing annotated: Dice of empty sets is 1, there is no cross-entropy, and no gradient.
    #[test]
    fn nothing_annotated_is_finite(mut case in cases(), smooth in prop::sample::select(vec![0.0f32, 1e-5, 1.0])) {
        let (context, _guard) = device();
        case.labels.fill(255);
        case.settings.dice.smooth = smooth;
        let outcome = run(context, &case);
        let dice = if smooth > 0.0 { -1.0 } else { 0.0 };
        prop_assert_eq!(&outcome.loss[..3], &[dice, 0.0, dice]);
        prop_assert!(outcome.loss.iter().all(|l| l.is_finite()));
        prop_assert!(outcome.gradients[0].iter().all(|g| *g == 0.0));
    }

    /// A weight of 1 everywhere is no weight, in every type of weights.
    #[test]
    fn uniform_weights_change_nothing(case in cases()) {
        let (context, _guard) = device();
        let plain = run(context, &case);
        let mut weighted = case.clone();
        for weights in [Weights::U8(vec![255; case.voxels()]), Weights::F32(vec![1.0; case.voxels()])] {
            weighted.weights = weights;
            assert_agree("weights of 1", &run(context, &weighted), &plain);
        }
    }

    /// A weight of 0, or one that makes no sense, ignores a voxel whatever its label and logits are.
    #[test]
    fn no_weight_is_ignored(mut case in cases(), nonsense in any::<u64>()) {
        let (context, _guard) = device();
        case.weigh(Dtype::F32);
        let Weights::F32(weights) = &case.weights else { unreachable!() };
        let mut ignored = case.clone();
        let mut dirty = case.clone();
        let mut strange = weights.clone();
        for v in (0..case.voxels()).filter(|v| weights[*v] == 0.0) {
            ignored.labels[v] = 255;
            strange[v] = [0.0, -0.0, -1.0, f32::NAN][(nonsense >> (v % 62)) as usize % 4];
            dirty.logits[0][v * case.channels()..][..case.channels()].fill(f32::NAN);
        }
        dirty.weights = Weights::F32(strange);
        ignored.weights = Weights::F32(weights.iter().map(|w| if *w == 0.0 { 1.0 } else { *w }).collect());
        let expected = run(context, &ignored).bits();
        prop_assert_eq!(run(context, &case).bits(), expected.clone());
        prop_assert_eq!(run(context, &dirty).bits(), expected);
    }

    /// Only proportions of weights matter where nothing is added to the Dice fraction.
    #[test]
    fn the_scale_of_weights_does_not_matter(mut case in cases()) {
        let (context, _guard) = device();
        case.settings.dice.smooth = 0.0;
        case.weigh(Dtype::F32);
        let Weights::F32(weights) = &case.weights else { unreachable!() };
        let mut scaled = case.clone();
        scaled.weights = Weights::F32(weights.iter().map(|w| 8.0 * w).collect());
        assert_agree("scaled weights", &run(context, &scaled), &run(context, &case));
    }

    /// An empty set of missing classes is none.
    #[test]
    fn nothing_missing_is_the_plain_loss(case in cases()) {
        let (context, _guard) = device();
        let mut none = case.clone();
        none.missing = Some(vec![0; case.batch * case.channels().div_ceil(32)]);
        assert_agree("nothing missing", &run(context, &none), &run(context, &case));
    }

    /// Exclusive classes: only differences of logits count, so the gradient of each voxel sums to 0.
    #[test]
    fn only_differences_of_logits_count(case in cases(), shift in -8i8..8) {
        let (context, _guard) = device();
        prop_assume!(matches!(case.settings.target, Target::Labels { .. }));
        let outcome = run(context, &case);
        let largest = outcome.gradients[0].iter().fold(0.0f32, |m, g| m.max(g.abs()));
        for voxel in outcome.gradients[0].chunks(case.channels()) {
            prop_assert!(voxel.iter().sum::<f32>().abs() <= 10.0 * tolerance() as f32 * largest);
        }
        let mut shifted = case.clone();
        shifted.logits[0].iter_mut().for_each(|z| *z += f32::from(shift));
        // The shifted logits are rounded.
        let actual = run(context, &shifted);
        assert_close("shifted", &actual.loss, &wide(&outcome.loss), 10.0 * tolerance());
        assert_close("shifted", &actual.gradients[0], &wide(&outcome.gradients[0]), 10.0 * tolerance());
    }

    /// Levels add up with their weights.
    #[test]
    fn levels_add_up(mut case in cases(), weights in [0.1f32..2.0, 0.1f32..2.0]) {
        let (context, _guard) = device();
        let half = case.dims.map(|d| d.div_ceil(2));
        case.set_levels(&[(case.dims, weights[0]), (half, weights[1])]);
        let together = run(context, &case);
        let mut sum = vec![0.0; together.loss.len()];
        for level in 0..2 {
            let mut alone = case.clone();
            alone.levels = vec![case.levels[level]];
            alone.logits = vec![case.logits[level].clone()];
            let outcome = run(context, &alone);
            sum.iter_mut().zip(&outcome.loss).for_each(|(s, l)| *s += f64::from(*l));
            assert_close("a level", &together.gradients[level], &wide(&outcome.gradients[0]), tolerance());
        }
        assert_close("sum of the levels", &together.loss, &sum, tolerance());
    }
}
