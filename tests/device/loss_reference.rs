//! Every variant of the loss: the f64 reference against finite differences of itself, and the kernels against it.

use crate::common::loss_case::{Case, check, check_on, is_possible, overlapping, run, run_narrow, tolerance};
use crate::common::loss_reference::{reference, reference_at};
use crate::common::{assert_close, assert_no_device_panic, device, is_slow};
use voxgrad::kernels::Dtype;
use voxgrad::kernels::loss::{Entropy, LossSettings, Target};

fn labels(classes: usize) -> LossSettings {
    LossSettings::new(Target::Labels { classes }, Some(classes as u16), false)
}

fn regions(count: usize) -> LossSettings {
    LossSettings::new(overlapping(count, 6), Some(6), false)
}

/// Few classes, as many as are looked up instead of compared, and more than a GPU's unit keeps; regions likewise.
fn targets() -> Vec<LossSettings> {
    [labels(3), labels(10), labels(20), regions(3), regions(20)].into_iter().filter(is_possible).collect()
}

fn is_labels(settings: &LossSettings) -> bool {
    matches!(settings.target, Target::Labels { .. })
}

/// Two samples, ragged, more than one chunk.
fn case(name: &str, settings: &LossSettings) -> Case {
    let dims = if is_slow() { [3, 5, 7] } else { [9, 16, 17] };
    let channels = settings.target.channels();
    let kind = if is_labels(settings) { "classes" } else { "regions" };
    Case::new(format!("{name}, {channels} {kind}"), settings.clone(), 2, dims, 7)
}

/// A change of a case that makes a variant of it.
type Change = fn(&mut Case);

/// All variants, by name: each option alone, and combinations of those that meet in a formula.
const VARIANTS: &[(&str, Change)] = &[
    ("nnU-Net's", |_| ()),
    ("no ignore label declared", |case| *case = replaced(case, |settings| settings.ignore.clear())),
    ("batch Dice", |case| case.settings.dice.batch = true),
    ("three ignore labels", |case| {
        *case = replaced(case, |settings| settings.ignore.extend([201, 255]));
    }),
    ("Dice of the background", |case| case.settings.dice.background = true),
    ("smooth 1", |case| case.settings.dice.smooth = 1.0),
    ("smooth 0", |case| case.settings.dice.smooth = 0.0),
    ("clipped intersections", clip),
    ("clipped intersections, batch Dice", |case| {
        clip(case);
        case.settings.dice.batch = true;
    }),
    ("cross-entropy only", |case| case.settings.weight_dice = 0.0),
    ("Dice only", |case| case.settings.weight_ce = 0.0),
    ("both weights", |case| (case.settings.weight_ce, case.settings.weight_dice) = (0.3, 1.7)),
    ("u8 weights", |case| case.weigh(Dtype::U8)),
    ("f32 weights", |case| case.weigh(Dtype::F32)),
    ("f32 weights, no ignore label", |case| {
        *case = replaced(case, |settings| settings.ignore.clear());
        case.weigh(Dtype::F32);
    }),
    ("missing classes", |case| {
        case.miss(0, 1);
        case.miss(0, 2);
        case.miss(1, case.channels() - 1);
    }),
    ("missing classes, batch Dice, Dice of the background", |case| {
        case.miss(0, 1);
        case.miss(1, 2);
        (case.settings.dice.batch, case.settings.dice.background) = (true, true);
    }),
    ("a class missing everywhere, Dice of the background", |case| {
        case.miss(0, 1);
        case.miss(1, 1);
        case.settings.dice.background = true;
    }),
    ("a class missing everywhere, no ignore label", |case| {
        *case = replaced(case, |settings| settings.ignore.clear());
        case.miss(0, 2);
        case.miss(1, 2);
        case.settings.dice.batch = true;
    }),
    ("missing classes, weights, clipped intersections", |case| {
        case.miss(1, 2);
        case.weigh(Dtype::F32);
        clip(case);
        case.settings.dice.background = true;
    }),
    ("levels", levels),
    ("levels, weights, missing classes", |case| {
        levels(case);
        case.weigh(Dtype::U8);
        case.miss(0, 2);
    }),
    ("entropy of another kind", other_entropy),
    ("entropy of another kind, levels, weights, missing classes", |case| {
        other_entropy(case);
        levels(case);
        case.weigh(Dtype::F32);
        case.miss(1, 1);
        case.settings.dice.background = true;
    }),
    ("entropy of another kind, no ignore label, no Dice", |case| {
        *case = replaced(case, |settings| settings.ignore.clear());
        other_entropy(case);
        case.settings.weight_dice = 0.0;
    }),
];

/// The same case for other settings, which may change the labels.
fn replaced(case: &Case, change: impl Fn(&mut LossSettings)) -> Case {
    let mut settings = case.settings.clone();
    change(&mut settings);
    Case::new(case.name.clone(), settings, case.batch, case.dims, 7)
}

/// A least intersection that some classes reach and some do not.
fn clip(case: &mut Case) {
    let sample = case.voxels() / case.batch;
    case.settings.dice.clip_tp = Some(sample as f32 * if is_labels(&case.settings) { 0.01 } else { 0.08 });
}

/// Anisotropic steps, ratios that are no integers, a level of weight 0.
fn levels(case: &mut Case) {
    let [depth, height, width] = case.dims;
    let second = [depth, height.div_ceil(2), width.div_ceil(2)];
    case.set_levels(&[(case.dims, 0.5333), (second, 0.2667), ([2, 3, 4], 0.2), ([1, 1, 1], 0.0)]);
}

fn other_entropy(case: &mut Case) {
    case.settings.entropy =
        if is_labels(&case.settings) { Entropy::TopK { percent: 12.5 } } else { Entropy::MeanOverRegions };
}

fn variant(name: &str) -> Change {
    VARIANTS.iter().find(|(other, _)| *other == name).expect(name).1
}

#[test]
fn the_reference_s_gradient_is_the_derivative_of_its_value() {
    for &(name, change) in VARIANTS {
        for settings in [labels(4), regions(4)] {
            let mut case = Case::new(name, settings, 2, [2, 4, 5], 3);
            change(&mut case);
            let logits: Vec<Vec<f64>> = case.logits.iter().map(|z| z.iter().map(|z| f64::from(*z)).collect()).collect();
            let gradients = reference(&case).gradients;
            for (level, gradient) in gradients.iter().enumerate() {
                for (i, expected) in gradient.iter().enumerate() {
                    let at = |step: f64| {
                        let mut moved = logits.clone();
                        moved[level][i] += step;
                        reference_at(&case, &moved).loss[0]
                    };
                    let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
                    assert!((slope - expected).abs() < 2e-9, "{name}, level {level}, {i}: {slope} and {expected}");
                }
            }
        }
    }
}

/// Holds the kernels to the reference in the named variants, for all targets.
fn hold(names: &[&str]) {
    let (context, _guard) = device();
    for name in names {
        for settings in targets() {
            let mut case = case(name, &settings);
            variant(name)(&mut case);
            check_on(context, &case);
        }
    }
}

#[test]
fn nnunet_s_losses_and_batch_dice() {
    hold(&["nnU-Net's", "batch Dice", "no ignore label declared"]);
}

#[test]
fn several_ignore_labels() {
    hold(&["three ignore labels"]);
}

#[test]
fn dice_options() {
    hold(&["Dice of the background", "smooth 1", "smooth 0"]);
}

#[test]
fn clipped_intersections() {
    hold(&["clipped intersections", "clipped intersections, batch Dice"]);
}

#[test]
fn one_term_only_and_weighted_terms() {
    hold(&["cross-entropy only", "Dice only", "both weights"]);
}

#[test]
fn weight_maps() {
    hold(&["u8 weights", "f32 weights", "f32 weights, no ignore label"]);
    let (context, _guard) = device();
    if context.caps().f16 {
        for settings in targets() {
            let mut case = case("f16 weights", &settings);
            case.weigh(Dtype::F16);
            check_on(context, &case);
        }
    }
}

#[test]
fn missing_classes() {
    hold(&[
        "missing classes",
        "missing classes, batch Dice, Dice of the background",
        "a class missing everywhere, Dice of the background",
        "a class missing everywhere, no ignore label",
        "missing classes, weights, clipped intersections",
    ]);
}

#[test]
fn several_levels() {
    hold(&["levels", "levels, weights, missing classes"]);
}

#[test]
fn largest_entropies_and_means_over_regions() {
    hold(&[
        "entropy of another kind",
        "entropy of another kind, levels, weights, missing classes",
        "entropy of another kind, no ignore label, no Dice",
    ]);
}

#[test]
fn any_number_of_classes_and_regions() {
    for channels in [1, 2, 4, 5, 8, 9, 14, 16, 17, 32, 33, 62, 118, 200] {
        for settings in [labels(channels), regions(channels)].into_iter().filter(is_possible) {
            let dims = if is_slow() || channels > 40 { [3, 5, 7] } else { [9, 16, 17] };
            check(&Case::new(format!("{channels} channels"), settings, 2, dims, 5));
        }
    }
}

#[test]
fn more_than_255_labels_are_16_bits_wide() {
    for classes in [256, 257, 300, 1023] {
        let settings = LossSettings::new(Target::Labels { classes }, Some(65535), false);
        if !is_possible(&settings) {
            continue;
        }
        check(&Case::new(format!("{classes} classes"), settings, 2, [3, 5, 7], 5));
    }
    // Regions over many labels, with ignore labels on both sides of 255.
    let mut settings = LossSettings::new(overlapping(5, 400), Some(400), true);
    settings.ignore.push(65535);
    check(&Case::new("regions of 400 labels", settings, 2, [3, 5, 7], 5));
    // More channels than a set of missing classes holds in one word.
    let settings = LossSettings::new(Target::Labels { classes: 300 }, Some(300), false);
    if !is_possible(&settings) {
        return;
    }
    let mut case = Case::new("missing among 300", settings, 2, [3, 5, 7], 5);
    [(0, 1), (0, 33), (0, 299), (1, 64)].into_iter().for_each(|(sample, class)| case.miss(sample, class));
    check(&case);
}

#[test]
fn percentages_of_the_largest_entropies() {
    let mut settings = labels(3);
    for (percent, voxels) in [(100.0, 210), (10.0, 21), (33.3, 69), (0.1, 1), (1e-6, 1), (99.9, 209)] {
        settings.entropy = Entropy::TopK { percent };
        let outcome = check(&Case::new(format!("{percent} %"), settings.clone(), 2, [3, 5, 7], 5));
        // Of the cross-entropy alone.
        let mut alone = Case::new(format!("{percent} % alone"), settings.clone(), 2, [3, 5, 7], 5);
        alone.settings.weight_dice = 0.0;
        let gradient = &check(&alone).gradients[0];
        let counted = gradient.chunks(3).filter(|g| g.iter().any(|g| *g != 0.0)).count();
        let annotated = (0..alone.voxels()).filter(|v| alone.counts(*v) > 0.0).count();
        assert_eq!(counted, annotated.min(voxels), "{percent} %");
        assert!(outcome.loss[1] > 0.0);
    }
}

#[test]
fn equal_entropies_share_the_last_places() {
    // Four kinds of voxels only, 12.5 % of 80: 10 places for the 20 voxels of the kind with the largest entropy.
    let mut settings = LossSettings::new(Target::Labels { classes: 3 }, None, false);
    settings.entropy = Entropy::TopK { percent: 12.5 };
    settings.weight_dice = 0.0;
    let mut case = Case::new("ties", settings, 2, [2, 4, 5], 1);
    for v in 0..80 {
        case.labels[v] = [0, 1, 2, 2][v % 4];
        case.logits[0][3 * v..][..3]
            .copy_from_slice(&[[1.0, 2.0, 0.0], [0.5, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0; 3]][v % 4]);
    }
    let outcome = check(&case);
    let of_kind = |v: usize| outcome.gradients[0][3 * v..][..3].to_vec();
    for v in 0..80 {
        assert_eq!(of_kind(v), of_kind(v % 4), "voxel {v}");
        assert_eq!(of_kind(v).iter().all(|g| *g == 0.0), v % 4 != 2, "voxel {v}");
    }
}

#[test]
fn narrow_logits_have_gradients_within_half_a_percent() {
    let (context, _guard) = device();
    let caps = context.caps();
    for (dtype, has) in [(Dtype::F16, caps.f16), (Dtype::Bf16, caps.bf16)] {
        if !has {
            println!("skipped: this device has no {dtype:?}");
            continue;
        }
        for settings in targets() {
            for name in ["nnU-Net's", "entropy of another kind, levels, weights, missing classes"] {
                let mut case = case(name, &settings);
                variant(name)(&mut case);
                case.name = format!("{dtype:?}, {}", case.name);
                let (rounded, outcome) = run_narrow(context, &case, dtype, 1024.0);
                let expected = reference(&rounded);
                assert_close(&case.name, &outcome.loss, &expected.loss, 5.0 * tolerance());
                for (level, (actual, expected)) in outcome.gradients.iter().zip(&expected.gradients).enumerate() {
                    if !expected.is_empty() {
                        // Rounding to f16 and bf16 is at most 2^-11 and 2^-8.
                        let bound = if dtype == Dtype::F16 { 5e-4 } else { 5e-3 };
                        assert_close(&format!("{}, gradient {level}", case.name), actual, expected, bound);
                    }
                }
                assert_no_device_panic();
            }
        }
    }
}

#[test]
fn the_same_bits_run_after_run() {
    let (context, _guard) = device();
    for settings in targets() {
        for name in ["nnU-Net's", "entropy of another kind, levels, weights, missing classes"] {
            let mut case = case(name, &settings);
            variant(name)(&mut case);
            let first = run(context, &case).bits();
            for _ in 0..3 {
                assert!(run(context, &case).bits() == first, "{}", case.name);
            }
        }
    }
}

/// Of nnU-Net 2.8.1's own loss modules in f64 (torch 2.15) on a formula for logits and labels: total, norm of the
/// gradient, first and last gradient.
#[test]
fn numbers_of_nnunet_s_other_losses() {
    let labels = Target::Labels { classes: 3 };
    let regions = Target::Regions { labels: 5, regions: vec![vec![1, 2, 3], vec![2, 3], vec![3]] };
    let declared = Target::Regions { labels: 4, regions: vec![vec![1, 2, 3], vec![2, 3], vec![3]] };
    let hold = |name: &str, target: &Target, ignore, change: Change, expected: [f64; 4]| {
        let mut case = Case::new(name, LossSettings::new(target.clone(), ignore, false), 2, [2, 3, 4], 1);
        change(&mut case);
        for v in 0..48 {
            case.labels[v] = match target {
                Target::Labels { .. } => ((7 * v + v / 3) % 7).min(3) as u16,
                Target::Regions { .. } => ((5 * v + v / 3) % 5) as u16,
            };
            for c in 0..3 {
                // nnU-Net's channels come first.
                let n = (v / 24 * 3 + c) * 24 + v % 24;
                let phase = 0.7 * n as f64 + 0.3 * (n % 5) as f64;
                case.logits[0][3 * v + c] = (2.0 * phase.sin()) as f32;
            }
        }
        let ours = reference(&case);
        let gradient = &ours.gradients[0];
        let norm = gradient.iter().map(|g| g * g).sum::<f64>().sqrt();
        let numbers = [ours.loss[0], norm, gradient[0], gradient[gradient.len() - 1]];
        for (ours, theirs) in numbers.iter().zip(expected) {
            assert!((ours - theirs).abs() < 2e-7, "{name}: {numbers:?} and nnU-Net's {expected:?}");
        }
        check(&case);
    };
    let top_10: Change = |case| case.settings.entropy = Entropy::TopK { percent: 10.0 };
    let top_50: Change = |case| case.settings.entropy = Entropy::TopK { percent: 50.0 };
    hold(
        "TopKLoss",
        &labels,
        Some(3),
        |case| {
            case.settings.entropy = Entropy::TopK { percent: 10.0 };
            case.settings.weight_dice = 0.0;
        },
        [3.8253827421, 0.6310249899, 0.0, 0.0],
    );
    hold("DC_and_topk_loss, 10 %", &labels, Some(3), top_10, [3.3777292697, 0.6353996031, -0.0061617727, 0.0083836126]);
    hold("DC_and_topk_loss, 50 %", &labels, Some(3), top_50, [0.7498042231, 0.1923808142, -0.0300566168, 0.0301737860]);
    hold(
        "DC_and_topk_loss, 10 %, batch Dice",
        &labels,
        Some(3),
        |case| {
            case.settings.entropy = Entropy::TopK { percent: 10.0 };
            case.settings.dice.batch = true;
        },
        [3.3617330520, 0.6355422204, -0.0044013928, 0.0129057341],
    );
    hold(
        "DC_and_CE_loss, do_bg, smooth 1, clip_tp 2",
        &labels,
        Some(3),
        |case| {
            let dice = &mut case.settings.dice;
            (dice.background, dice.smooth, dice.clip_tp) = (true, 1.0, Some(2.0));
        },
        [0.5868131762, 0.1808998355, -0.0327783845, 0.0279163912],
    );
    hold(
        "DC_and_CE_loss, do_bg, smooth 1, clip_tp 3, batch Dice",
        &labels,
        Some(3),
        |case| {
            let dice = &mut case.settings.dice;
            (dice.background, dice.smooth, dice.clip_tp, dice.batch) = (true, 1.0, Some(3.0), true);
        },
        [0.6369733458, 0.1802259197, -0.0328459678, 0.0296503153],
    );
    hold(
        "DC_and_CE_loss, weights",
        &labels,
        Some(3),
        |case| {
            (case.settings.weight_ce, case.settings.weight_dice) = (0.3, 1.7);
        },
        [-0.4017736362, 0.1207744110, -0.0176434673, 0.0207891932],
    );
    hold(
        "DC_and_CE_loss, weight_dice 0",
        &labels,
        Some(3),
        |case| {
            case.settings.weight_dice = 0.0;
        },
        [1.1974576956, 0.1580040330, -0.0238948441, 0.0217901734],
    );
    hold(
        "DC_and_CE_loss, weight_ce 0",
        &labels,
        Some(3),
        |case| {
            case.settings.weight_ce = 0.0;
        },
        [-0.4476534724, 0.0510255351, -0.0061617727, 0.0083836126],
    );
    hold("DC_and_BCE_loss", &regions, None, |_| (), [0.3881673515, 0.0575925337, 0.0044021788, 0.0057836182]);
    hold(
        "DC_and_BCE_loss, batch Dice",
        &regions,
        None,
        |case| {
            case.settings.dice.batch = true;
        },
        [0.3826818466, 0.0577363933, 0.0044261316, 0.0056040536],
    );
    hold(
        "DC_and_BCE_loss, ignore label, clip_tp 2",
        &declared,
        Some(4),
        |case| {
            case.settings.dice.clip_tp = Some(2.0);
        },
        [1.9348731041, 0.1614300939, 0.0138272328, 0.0192978946],
    );
}
