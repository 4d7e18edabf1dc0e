//! Edge cases of losses on sparse annotations, one test each.

use crate::common::loss_case::{
    Case, Outcome, Weights, check, is_possible, overlapping, run, run_in_place, run_narrow,
};
use crate::common::loss_reference::reference;
use crate::common::{assert_close, device, is_slow};
use voxgrad::kernels::loss::{Entropy, Level, LossSettings, Problem, Target, value};
use voxgrad::kernels::{Dtype, KernelError};

fn labels(classes: usize) -> LossSettings {
    LossSettings::new(Target::Labels { classes }, Some(classes as u16), false)
}

/// Whole tumour, core, enhancing core; label 4 is ignored.
fn nested_regions() -> LossSettings {
    let regions = vec![vec![1, 2, 3], vec![2, 3], vec![3]];
    LossSettings::new(Target::Regions { labels: 4, regions }, Some(4), false)
}

fn both() -> [LossSettings; 2] {
    [labels(4), nested_regions()]
}

fn case(name: &str, settings: LossSettings) -> Case {
    Case::new(name, settings, 2, [5, 7, 9], 11)
}

fn run_once(case: &Case) -> Outcome {
    let (context, _guard) = device();
    run(context, case)
}

fn ignored(case: &Case) -> Vec<usize> {
    (0..case.voxels()).filter(|v| case.counts(*v) == 0.0).collect()
}

#[test]
fn edge_01_a_batch_a_sample_or_a_level_without_annotation() {
    for settings in both() {
        let ignore = settings.ignore[0];
        let mut batch = case("batch ignored", settings.clone());
        batch.labels.fill(ignore);
        let outcome = check(&batch);
        assert_eq!(outcome.loss[..3], [-1.0, 0.0, -1.0]);

        let mut sample = case("sample ignored", settings.clone());
        let half = sample.voxels() / 2;
        sample.labels[half..].fill(ignore);
        let outcome = check(&sample);
        let values = half * sample.channels();
        assert!(outcome.gradients[0][values..].iter().all(|g| *g == 0.0));
        assert!(outcome.gradients[0][..values].iter().any(|g| *g != 0.0));
        // Its Dice of 1 takes half of the mean, and the other sample's cross-entropy is the batch's.
        let mut first = Case::new("first sample", settings.clone(), 1, sample.dims, 11);
        first.labels.copy_from_slice(&sample.labels[..half]);
        first.logits[0].copy_from_slice(&sample.logits[0][..values]);
        let alone = run_once(&first);
        assert_close("ce", &outcome.loss[1..2], &[f64::from(alone.loss[1])], 1e-6);
        assert_close("dice", &outcome.loss[2..3], &[(f64::from(alone.loss[2]) - 1.0) / 2.0], 1e-6);

        // The coarse level samples voxels 1, 3, 5 of each axis: thin scribbles elsewhere are gone.
        let mut level = Case::new("level ignored", settings, 1, [6, 6, 6], 11);
        level.labels.iter_mut().enumerate().for_each(|(v, l)| *l = if v % 2 == 0 { 1 } else { ignore });
        level.set_levels(&[([6; 3], 0.75), ([3; 3], 0.25)]);
        assert!(level.sources(1).iter().all(|v| level.counts(*v) == 0.0));
        let outcome = check(&level);
        assert!(outcome.gradients[0].iter().any(|g| *g != 0.0));
        assert!(outcome.gradients[1].iter().all(|g| *g == 0.0));
    }
}

#[test]
fn edge_02_sentinels_outside_the_classes_never_index() {
    for (settings, sentinels) in [
        (labels(4), vec![255, 254, 128, 5]),
        (labels(12), vec![255, 13]),
        (nested_regions(), vec![255, 128, 5]),
        (labels(300), vec![65535, 65534, 32768, 301]),
        (LossSettings::new(overlapping(3, 400), Some(400), false), vec![65535, 32768, 401]),
    ] {
        if !is_possible(&settings) {
            continue;
        }
        let mut case = case("sentinels", settings);
        let declared = check(&case);
        let gone = ignored(&case);
        assert!(!gone.is_empty());
        for (i, v) in gone.into_iter().enumerate() {
            case.labels[v] = sentinels[i % sentinels.len()];
        }
        assert_eq!(check(&case).bits(), declared.bits());
        // Not declared at all: the same labels, sums and gradients for exclusive classes.
        if matches!(case.settings.target, Target::Labels { .. }) {
            case.settings.ignore.clear();
            check(&case);
        }
    }
}

#[test]
fn edge_03_ignored_voxels_are_in_neither_dice_denominator() {
    // One annotated voxel of class 1 with probability p. Ignored voxels are certain of class 1, and labelled so.
    for (settings, p) in [(labels(2), 0.25f64), (nested_regions(), 0.25)] {
        let ignore = settings.ignore[0];
        let channels = settings.target.channels();
        let mut case = Case::new("denominators", settings, 1, [2, 3, 4], 1);
        case.labels.fill(ignore);
        case.labels[5] = 1;
        case.logits[0].fill(50.0);
        let own = &mut case.logits[0][5 * channels..][..channels];
        own.fill(0.0);
        match channels {
            2 => own[1] = -(3.0f32.ln()),
            _ => own[0] = -(3.0f32.ln()),
        }
        let outcome = check(&case);
        let s = 1e-5;
        let dice = (2.0 * p + s) / (p + 1.0 + s);
        assert_close("Dice of one voxel", &outcome.loss[3..4], &[dice], 1e-6);
    }
}

#[test]
fn edge_04_cross_entropy_is_divided_by_annotated_voxels_only() {
    // Equal logits: every annotated voxel costs ln(classes), or ln 2 a region, however few they are.
    for annotated in [1, 2, 100, 630] {
        for settings in both() {
            let exclusive = matches!(settings.target, Target::Labels { .. });
            let mut case = case("equal logits", settings);
            let ignore = case.settings.ignore[0];
            case.labels
                .iter_mut()
                .enumerate()
                .for_each(|(v, l)| *l = if v < annotated { v as u16 % 4 } else { ignore });
            case.logits[0].fill(0.5);
            if !exclusive {
                case.logits[0].fill(0.0);
            }
            let outcome = check(&case);
            // nnU-Net's sum over regions is not divided by their number.
            let expected = if exclusive { 4f64.ln() } else { 3.0 * 2f64.ln() };
            assert_close("mean over annotated voxels", &outcome.loss[1..2], &[expected], 1e-6);
        }
    }
}

#[test]
fn edge_05_the_mask_comes_after_the_softmax() {
    // Masked logits would be zeros, whose softmax is 1/classes and not nothing: P would grow by a third a voxel.
    let mut settings = labels(3);
    settings.weight_ce = 0.0;
    let mut case = Case::new("mask after softmax", settings, 1, [4, 5, 6], 1);
    case.labels.fill(3);
    case.labels[..6].copy_from_slice(&[1, 1, 2, 2, 0, 0]);
    case.logits[0].fill(0.0);
    for v in 0..6 {
        case.logits[0][3 * v + usize::from(case.labels[v])] = 3.0;
    }
    let outcome = check(&case);
    // exp(3) / (exp(3) + 2) of all annotated voxels is right, and nothing else counts.
    let expected = 3f64.exp() / (3f64.exp() + 2.0);
    assert!((f64::from(outcome.loss[2]) + expected).abs() < 1e-5, "{:?}", outcome.loss);
}

#[test]
fn edge_06_a_class_that_no_voxel_has() {
    for mut settings in both() {
        settings.ignore.clear();
        let exclusive = matches!(settings.target, Target::Labels { .. });
        let mut case = case("class 3 absent", settings);
        case.labels.iter_mut().for_each(|l| *l %= 3);
        let present = check(&case);
        let coefficient = present.loss[2 + case.settings.dice_classes()];
        assert!(coefficient > 0.0 && coefficient < 1e-6, "smooth / P remains: {coefficient}");
        // Never predicted either: Dice 1, exactly what nnU-Net counts.
        let channel = case.channels() - 1;
        let channels = case.channels();
        case.logits[0].iter_mut().skip(channel).step_by(channels).for_each(|z| *z = -200.0);
        let outcome = check(&case);
        assert_close(
            "neither there nor predicted",
            &outcome.loss[2 + case.settings.dice_classes()..][..1],
            &[1.0],
            1e-6,
        );
        // Without smooth that would be 0 / 0.
        case.settings.dice.smooth = 0.0;
        let outcome = check(&case);
        assert_eq!(outcome.loss[2 + case.settings.dice_classes()], 0.0, "exclusive {exclusive}");
    }
}

#[test]
fn edge_07_batch_dice_and_dice_of_each_sample() {
    for settings in both() {
        let mut apart = case("apart", settings.clone());
        let mut together = case("together", settings);
        together.settings.dice.batch = true;
        let (a, t) = (check(&apart), check(&together));
        assert_eq!(a.loss[1], t.loss[1], "the cross-entropy is of the batch either way");
        assert!((a.loss[2] - t.loss[2]).abs() > 1e-4);
        // Of one sample they are the same.
        for case in [&mut apart, &mut together] {
            let (voxels, values) = (case.voxels() / 2, case.logits[0].len() / 2);
            case.batch = 1;
            case.labels.truncate(voxels);
            case.logits[0].truncate(values);
        }
        assert_eq!(check(&apart).bits(), check(&together).bits());
        // A sample without annotation adds nothing to sums over the batch, but a Dice of 1 to the mean of the samples.
    }
    let mut together = case("half empty", labels(4));
    together.settings.dice.batch = true;
    let half = together.voxels() / 2;
    together.labels[half..].fill(4);
    let mut first = Case::new("the other half", together.settings.clone(), 1, together.dims, 11);
    first.labels.copy_from_slice(&together.labels[..half]);
    first.logits[0].copy_from_slice(&together.logits[0][..half * 4]);
    let expected: Vec<f64> = run_once(&first).loss.iter().map(|l| f64::from(*l)).collect();
    assert_close("an empty sample", &run_once(&together).loss, &expected, 1e-6);
}

#[test]
fn edge_08_one_level_alone() {
    // nnU-Net's rule for weights divides 0 by 0 with one output. And a single level among ones of weight 0.
    assert_eq!(voxgrad::loss::deep_supervision_weights(1), [1.0]);
    for settings in both() {
        let mut case = case("single level", settings);
        let finest = check(&case);
        case.set_levels(&[(case.dims, 1.0), ([3, 4, 5], 0.0), ([1, 2, 3], 0.0)]);
        let outcome = check(&case);
        assert_eq!(outcome.loss, finest.loss);
        assert_eq!(outcome.gradients[0], finest.gradients[0]);
        // Only a coarse one.
        case.set_levels(&[(case.dims, 0.0), ([3, 4, 5], 1.0)]);
        assert!(check(&case).loss.iter().all(|l| l.is_finite()));
    }
}

#[test]
fn edge_09_regions_with_an_ignore_label() {
    let with = case("regions, ignore", nested_regions());
    let outcome = check(&with);
    let ignored = ignored(&with);
    assert!(!ignored.is_empty());
    // The scale of the cross-entropy depends on whether an ignore label is declared, not on whether any voxel has it.
    let mut declared = case("declared", nested_regions());
    declared.labels.iter_mut().for_each(|l| *l %= 4);
    let mut undeclared = declared.clone();
    undeclared.settings.ignore.clear();
    let ratio = check(&declared).loss[1] / check(&undeclared).loss[1];
    assert!((ratio - 3.0).abs() < 1e-5, "{ratio}");
    // The mean over regions does not.
    for case in [&mut declared, &mut undeclared] {
        case.settings.entropy = Entropy::MeanOverRegions;
    }
    assert_close("means", &check(&declared).loss, &reference(&undeclared).loss, 2e-6);
    let mut mean = with.clone();
    mean.settings.entropy = Entropy::MeanOverRegions;
    assert_close("mean", &check(&mean).loss[1..2], &[f64::from(outcome.loss[1]) / 3.0], 1e-6);
}

#[test]
fn edge_10_nan_and_infinite_logits_under_the_mask() {
    let many_regions = LossSettings::new(overlapping(17, 6), Some(6), false);
    for settings in [labels(4), labels(17), nested_regions(), many_regions].into_iter().filter(is_possible) {
        let case = case("poison", settings);
        let clean = check(&case);
        let channels = case.channels();
        let mut dirty = case.clone();
        for (i, v) in ignored(&case).into_iter().enumerate() {
            let poison = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN][i % 5];
            dirty.logits[0][v * channels..][..channels].fill(poison);
        }
        assert_eq!(run_once(&dirty).bits(), clean.bits());
        // Where a voxel counts, a NaN is not hidden.
        let annotated = (0..case.voxels()).find(|v| case.counts(*v) > 0.0).expect("annotated");
        dirty.logits[0][annotated * channels] = f32::NAN;
        let outcome = run_once(&dirty);
        assert!(outcome.loss[0].is_nan());
        let of = |v: usize| &outcome.gradients[0][v * channels..][..channels];
        assert!(ignored(&case).into_iter().all(|v| of(v).iter().all(|g| *g == 0.0)));
    }
}

#[test]
fn edge_11_gradients_do_not_depend_on_what_lies_under_the_mask() {
    for settings in both() {
        let mut case = case("under the mask", settings);
        let expected = check(&case);
        for seed in 1..4 {
            let other = Case::new("other", case.settings.clone(), case.batch, case.dims, seed * 1000);
            let channels = case.channels();
            for v in ignored(&case) {
                case.labels[v] = case.settings.ignore[0] + (seed as u16 * v as u16) % 9;
                let range = v * channels..(v + 1) * channels;
                case.logits[0][range.clone()].copy_from_slice(&other.logits[0][range]);
            }
            assert_eq!(run_once(&case).bits(), expected.bits());
        }
    }
}

#[test]
fn edge_12_more_logits_than_31_bits_count() {
    let (context, _guard) = device();
    // 2 x 512^3 voxels of 14 classes: 3.8e9 logits, 15 GB in f32. Shapes and tables only; nothing of that size exists.
    let dims = [512; 3];
    let settings = labels(14);
    let level = |dims| Level { dims, weight: 1.0 };
    let problem = Problem::new(context, &settings, 2, dims, &[level(dims)]).expect("shape");
    assert_eq!(problem.logits_len(0), 2 * (1 << 27) * 14);
    let small = context.upload(&[0u8; 64], Dtype::U8).expect("upload");
    let logits = context.upload_f32(&[0.0; 64]).expect("upload");
    let loss = context.empty(problem.loss_len(), Dtype::F32).expect("memory");
    let result = value(context, &problem, &(&small).into(), &[&logits], &loss);
    assert!(matches!(result, Err(KernelError::Shape { .. })), "{result:?}");
    // All levels together are counted, and lengths do not wrap around.
    let too_many = [level(dims), level([400; 3])];
    let result = Problem::new(context, &settings, 2, dims, &too_many);
    assert!(matches!(result, Err(KernelError::Limit { .. })), "{result:?}");
    let huge = [usize::MAX / 2, 3, 5];
    let result = Problem::new(context, &settings, 2, huge, &[level(huge)]);
    assert!(matches!(result, Err(KernelError::Limit { .. })), "{result:?}");
}

#[test]
fn edge_13_one_class_under_a_softmax() {
    for ignore in [None, Some(1)] {
        let mut case = case("one class", LossSettings::new(Target::Labels { classes: 1 }, ignore, false));
        if ignore.is_some() {
            assert!(!ignored(&case).is_empty());
        }
        let outcome = check(&case);
        // Its probability is 1 everywhere: nothing can be better or worse.
        assert_close("one class", &outcome.loss, &[-1.0, 0.0, -1.0, 1.0, 0.0], 1e-6);
        assert!(outcome.gradients[0].iter().all(|g| g.abs() < 1e-9));
        case.settings.dice.background = true;
        assert_eq!(check(&case).loss, outcome.loss);
    }
}

#[test]
fn edge_14_reductions_repeat_bit_for_bit() {
    let (context, _guard) = device();
    // Many chunks, of which some are empty: whoever takes which, sums are added in one order.
    let dims = if is_slow() { [8, 16, 17] } else { [24, 40, 41] };
    for settings in [labels(4), labels(14), labels(20), nested_regions()].into_iter().filter(is_possible) {
        let mut case = Case::new("repeat", settings, 2, dims, 11);
        let ignore = case.settings.ignore[0];
        let slice = dims[1] * dims[2];
        case.labels.iter_mut().enumerate().for_each(|(v, l)| *l = if v / slice % 4 == 0 { *l } else { ignore });
        let first = run(context, &case);
        // In other memory, and beside other work.
        let mut kept = Vec::new();
        for round in 0..4 {
            kept.push(context.empty(1000 * (round + 1), Dtype::F32).expect("memory"));
            let busy = std::thread::spawn(|| (0..3_000_000u64).fold(0, |a, b| a ^ b.wrapping_mul(31)));
            assert_eq!(run(context, &case).bits(), first.bits());
            busy.join().expect("other work");
        }
    }
}

#[test]
fn a_mask_over_everything_is_finite_in_every_variant() {
    for settings in [labels(4), labels(20), nested_regions()].into_iter().filter(is_possible) {
        let exclusive = matches!(settings.target, Target::Labels { .. });
        let mut variants = Vec::new();
        for weights in [false, true] {
            let mut case = case("everything ignored", settings.clone());
            match weights {
                true => case.weights = Weights::F32(vec![0.0; case.voxels()]),
                false => case.labels.fill(case.settings.ignore[0]),
            }
            variants.push(case.clone());
            case.settings.entropy = if exclusive { Entropy::TopK { percent: 10.0 } } else { Entropy::MeanOverRegions };
            variants.push(case.clone());
            case.miss(0, 1);
            case.settings.dice.batch = true;
            variants.push(case.clone());
            case.settings.dice.smooth = 0.0;
            variants.push(case.clone());
            case.settings.dice.clip_tp = Some(1.0);
            variants.push(case.clone());
            case.settings.weight_ce = 0.0;
            variants.push(case.clone());
            (case.settings.weight_ce, case.settings.weight_dice) = (1.0, 0.0);
            variants.push(case);
        }
        for case in variants {
            let outcome = check(&case);
            assert!(outcome.loss.iter().all(|l| l.is_finite()), "{:?}", outcome.loss);
            assert_eq!(outcome.loss[1], 0.0);
            assert!(outcome.gradients[0].iter().all(|g| *g == 0.0));
        }
    }
}

#[test]
fn extreme_logits_of_annotated_voxels_stay_finite() {
    for settings in both() {
        let mut case = case("extreme", settings);
        case.logits[0].iter_mut().for_each(|z| *z *= 1e4);
        let outcome = check(&case);
        assert!(outcome.loss.iter().chain(&outcome.gradients[0]).all(|v| v.is_finite()));
    }
    let (context, _guard) = device();
    if context.caps().f16 {
        let mut case = case("extreme f16", labels(4));
        case.logits[0].iter_mut().for_each(|z| *z *= 1.5e4);
        let (_, outcome) = run_narrow(context, &case, Dtype::F16, 1.0);
        assert!(outcome.loss.iter().chain(&outcome.gradients[0]).all(|v| v.is_finite()));
    }
}

#[test]
fn the_gradient_may_replace_the_logits_in_every_variant() {
    let (context, _guard) = device();
    for settings in [labels(4), labels(20), nested_regions()].into_iter().filter(is_possible) {
        let mut case = case("in place", settings);
        case.set_levels(&[(case.dims, 0.6), ([3, 4, 5], 0.4)]);
        case.weigh(Dtype::F32);
        case.miss(1, 2);
        let apart = run(context, &case);
        assert_eq!(run_in_place(context, &case).bits(), apart.bits());
    }
}
