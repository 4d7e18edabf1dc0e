//! How often nnU-Net's transforms happen and with what, over many draws; how large patches are before; and whole batches.

use crate::common::augmentation::{PATCH, everything, raw};
use crate::common::{device, read};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use voxgrad::Error;
use voxgrad::augment::{Augmenter, Draw, Geometry, Recipe, TrainerVariant, Transforms};
use voxgrad::error::TrainError;
use voxgrad::kernels::augment::{self, Finish, LabelRule, Movement, Patch, Region, Sample};
use voxgrad::kernels::{Context, Dtype};
use voxgrad::sample::{Batch, Oversampling};

const DRAWS: usize = 10_000;
const CHANNELS: usize = 3;

fn draws(geometry: &Geometry) -> Vec<Draw> {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    (0..DRAWS).map(|_| Draw::new(Transforms::Nnunet, geometry, [true; 3], CHANNELS, &mut rng)).collect()
}

/// Fails unless `count` of `of` is `probability`, within four standard errors.
fn assert_share(what: &str, count: usize, of: usize, probability: f64) {
    let share = count as f64 / of as f64;
    let error = (probability * (1.0 - probability) / of as f64).sqrt();
    assert!((share - probability).abs() < 4.0 * error, "{what}: {share}, expected {probability} +- {error}");
}

/// Fails unless values are uniform in `low..high`: inside, with the mean and variance of that, and near both ends.
fn assert_uniform(what: &str, values: &[f64], low: f64, high: f64) {
    let n = values.len() as f64;
    assert!(n > 400.0, "{what}: {n} values");
    assert!(values.iter().all(|v| (low..=high).contains(v)), "{what} leaves {low}..{high}");
    let (width, mean) = (high - low, values.iter().sum::<f64>() / n);
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
    let expected = width * width / 12.0;
    assert!((mean - (low + high) / 2.0).abs() < 4.0 * (expected / n).sqrt(), "{what}: mean {mean}");
    // The fourth central moment of a uniform distribution is width^4 / 80.
    let spread = ((width.powi(4) / 80.0 - expected * expected) / n).sqrt();
    assert!((variance - expected).abs() < 4.0 * spread, "{what}: variance {variance}, expected {expected}");
    for (bound, distance) in [(low, 20.0 / n), (high, 20.0 / n)] {
        assert!(values.iter().any(|v| (v - bound).abs() < width * distance), "{what} never comes near {bound}");
    }
}

/// Half of the values uniform below 1, half above.
fn assert_around_one(what: &str, values: &[f64], low: f64, high: f64) {
    let (below, above): (Vec<f64>, Vec<f64>) = values.iter().partition(|&&v| v < 1.0);
    assert_share(what, below.len(), values.len(), 0.5);
    assert_uniform(what, &below, low, 1.0);
    assert_uniform(what, &above, 1.0, high);
}

fn present<T>(draws: &[Draw], part: impl Fn(&Draw) -> Option<T>) -> Vec<T> {
    draws.iter().filter_map(part).collect()
}

fn flat<T: Copy + Into<f64>>(lists: &[Vec<T>]) -> Vec<f64> {
    lists.iter().flatten().map(|&v| v.into()).collect()
}

#[test]
fn transforms_happen_as_often_and_as_strongly_as_upstream() {
    let geometry = Recipe::default().geometry([40, 56, 40]);
    let draws = draws(&geometry);
    let limit = 30f64.to_radians();

    let angles = present(&draws, |d| d.angles);
    assert_share("rotation", angles.len(), DRAWS, 0.2);
    for axis in 0..3 {
        assert_uniform("angle", &angles.iter().map(|a| a[axis]).collect::<Vec<_>>(), -limit, limit);
    }
    let scales = present(&draws, |d| d.scale);
    assert_share("scaling", scales.len(), DRAWS, 0.2);
    assert_uniform("scale", &scales, 0.7, 1.4);
    let both = draws.iter().filter(|d| d.angles.is_some() && d.scale.is_some()).count();
    assert_share("rotation and scaling", both, DRAWS, 0.04);

    let noise = present(&draws, |d| d.noise);
    assert_share("noise", noise.len(), DRAWS, 0.1);
    assert_uniform("deviation", &noise.iter().map(|n| f64::from(n.0)).collect::<Vec<_>>(), 0.0, 0.1);
    let mut keys: Vec<_> = noise.iter().map(|n| n.1).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), noise.len(), "keys repeat");

    let blurs = present(&draws, |d| d.blur.clone());
    assert_share("blur", blurs.len(), DRAWS, 0.2);
    let sigmas: Vec<[f64; 3]> = blurs.iter().flatten().flatten().copied().collect();
    assert_share("blurred channels", sigmas.len(), blurs.len() * CHANNELS, 0.5);
    for axis in 0..3 {
        assert_uniform("sigma", &sigmas.iter().map(|s| s[axis]).collect::<Vec<_>>(), 0.5, 1.0);
    }
    assert!(sigmas.iter().all(|s| s[0] != s[1] && s[1] != s[2]), "axes share a sigma");

    let brightness = present(&draws, |d| d.brightness.clone());
    assert_share("brightness", brightness.len(), DRAWS, 0.15);
    assert!(brightness.iter().all(|b| b.len() == CHANNELS && b[0] != b[1]));
    assert_around_one("brightness", &flat(&brightness), 0.75, 1.25);
    let contrast = present(&draws, |d| d.contrast.clone());
    assert_share("contrast", contrast.len(), DRAWS, 0.15);
    assert_around_one("contrast", &flat(&contrast), 0.75, 1.25);

    let low = present(&draws, |d| d.low_resolution.clone());
    assert_share("low resolution", low.len(), DRAWS, 0.25);
    let coarse: Vec<[usize; 3]> = low.iter().flatten().flatten().copied().collect();
    assert_share("channels of low resolution", coarse.len(), low.len() * CHANNELS, 0.5);
    for [depth, height, width] in &coarse {
        assert!((20..=40).contains(depth) && (28..=56).contains(height) && depth == width);
        // One factor for all axes, each size rounded to the nearest.
        let [a, b] = [*depth as f64 / 40.0, *height as f64 / 56.0];
        assert!((a - b).abs() <= 0.5 / 40.0 + 0.5 / 56.0 + 1e-12);
    }
    let mean = coarse.iter().map(|c| c[1] as f64 / 56.0).sum::<f64>() / coarse.len() as f64;
    assert!((mean - 0.75).abs() < 4.0 * (0.25 / 12.0 / coarse.len() as f64).sqrt(), "mean factor {mean}");

    let inverted = present(&draws, |d| d.gamma_inverted.clone());
    assert_share("gamma of the inverted image", inverted.len(), DRAWS, 0.1);
    assert_around_one("exponent", &flat(&inverted), 0.7, 1.5);
    let gamma = present(&draws, |d| d.gamma.clone());
    assert_share("gamma", gamma.len(), DRAWS, 0.3);
    assert_around_one("exponent", &flat(&gamma), 0.7, 1.5);

    for axis in 0..3 {
        assert_share("mirroring", draws.iter().filter(|d| d.mirror[axis]).count(), DRAWS, 0.5);
    }
    let all = draws.iter().filter(|d| d.mirror == [true; 3]).count();
    assert_share("mirroring of all axes", all, DRAWS, 0.125);
}

#[test]
fn flat_patches_are_turned_in_the_plane() {
    let geometry = Recipe::default().geometry([12, 64, 48]);
    assert!(geometry.in_plane);
    let draws = draws(&geometry);
    let angles = present(&draws, |d| d.angles);
    let pi = std::f64::consts::PI;
    assert_uniform("angle", &angles.iter().map(|a| a[0]).collect::<Vec<_>>(), -pi, pi);
    assert!(angles.iter().all(|a| a[1] == 0.0 && a[2] == 0.0));
    for draw in &draws {
        if let Some(matrix) = draw.matrix() {
            assert_eq!((matrix[0], matrix[1][0], matrix[2][0]), ([1.0, 0.0, 0.0], 0.0, 0.0));
            let determinant = matrix[1][1] * matrix[2][2] - matrix[1][2] * matrix[2][1];
            let scale = draw.scale.unwrap_or(1.0);
            assert!((f64::from(determinant) - scale * scale).abs() < 1e-5);
        }
        let coarse = draw.low_resolution.iter().flatten().flatten();
        coarse.for_each(|coarse| assert_eq!(coarse[0], 12));
    }
}

#[test]
fn matrices_turn_about_the_axes_that_upstream_turns_about() {
    let quarter = std::f64::consts::FRAC_PI_2;
    let of = |angles: [f64; 3], scale: f64| {
        let draw = Draw { angles: Some(angles), scale: Some(scale), ..Draw::default() };
        draw.matrix().unwrap().map(|row| row.map(|v| (v * 1e6).round() / 1e6))
    };
    assert_eq!(of([quarter, 0.0, 0.0], 1.0), [[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]]);
    assert_eq!(of([0.0, quarter, 0.0], 1.0), [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]);
    assert_eq!(of([0.0, 0.0, quarter], 1.0), [[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]);
    // Rz Ry Rx S: the first angle acts first.
    assert_eq!(of([quarter, quarter, 0.0], 2.0), [[0.0, 2.0, 0.0], [0.0, 0.0, -2.0], [-2.0, 0.0, 0.0]]);
    assert_eq!(Draw::default().matrix(), None);
}

#[test]
fn initial_patches_have_room_for_the_turn() {
    let initial = |patch| Recipe::default().geometry(patch).initial;
    assert_eq!(initial([128; 3]), [205; 3]);
    assert_eq!(initial([40, 56, 40]), [73, 80, 64]);
    // In the plane: 90 degrees at most, depth as it is. 3 is not more than 3.
    assert_eq!(initial([16, 64, 64]), [16, 75, 75]);
    assert!(!Recipe::default().geometry([16, 48, 48]).in_plane);
    let without = Recipe { dummy_2d: false, ..Recipe::default() }.geometry([16, 64, 64]);
    assert!(!without.in_plane && without.initial[0] > 16);
    assert_eq!(Recipe::MIRROR.geometry([40, 56, 40]).initial, [40, 56, 40]);
}

#[test]
fn forbidden_axes_and_recipes_change_nothing_else() {
    let geometry = Recipe::default().geometry([40, 56, 40]);
    let draw = |transforms, mirror| {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        (0..500).map(|_| Draw::new(transforms, &geometry, mirror, 1, &mut rng)).collect::<Vec<_>>()
    };
    let (all, some) = (draw(Transforms::Nnunet, [true; 3]), draw(Transforms::Nnunet, [true, false, true]));
    for (a, b) in all.iter().zip(&some) {
        assert_eq!(Draw { mirror: [a.mirror[0], false, a.mirror[2]], ..a.clone() }, *b);
    }
    for draw in draw(Transforms::Mirror, [true; 3]) {
        assert_eq!(Draw { mirror: draw.mirror, ..Draw::default() }, draw);
    }
    assert!(draw(Transforms::None, [true; 3]).iter().all(|d| *d == Draw::default()));
}

#[test]
fn trainers_have_their_names_and_unknown_ones_are_refused_with_the_list() {
    let of = |name: &str| TrainerVariant::of(name).unwrap();
    assert_eq!(of("nnUNetTrainer").recipe, Recipe::default());
    assert_eq!((of("nnUNetTrainer").epochs, of("nnUNetTrainer").mirror), (None, [true; 3]));
    assert_eq!(of("nnUNetTrainerNoMirroring").mirror, [false; 3]);
    assert_eq!((of("nnUNetTrainerNoDA").recipe, of("nnUNetTrainerNoDA").mirror), (Recipe::NONE, [false; 3]));
    assert_eq!(of("nnUNetTrainer_onlyMirror01").mirror, [true, true, false]);
    assert!(!of("nnUNetTrainer_noDummy2DDA").recipe.dummy_2d);
    assert!(of("nnUNetTrainer_DASegOrd0").recipe.nearest_labels);
    for epochs in [5, 10, 20, 50, 100, 250, 500, 750, 2000, 4000, 8000] {
        assert_eq!(of(&format!("nnUNetTrainer_{epochs}epochs")).epochs, Some(epochs));
    }
    assert_eq!(of("nnUNetTrainer_1epoch").epochs, Some(1));
    let both = of("nnUNetTrainer_250epochs_NoMirroring");
    assert_eq!((both.epochs, both.mirror), (Some(250), [false; 3]));
    assert_eq!(both.oversampling, Oversampling::LastThird);
    let by_chance = |name: &str| of(&format!("nnUNetTrainer_probabilisticOversampling{name}")).oversampling;
    assert_eq!(by_chance(""), Oversampling::SameShare);
    assert_eq!(by_chance("_033"), Oversampling::Probability(0.33));
    assert_eq!(by_chance("_010"), Oversampling::Probability(0.1));
    let error = TrainerVariant::of("nnUNetTrainerDA5").unwrap_err();
    assert!(matches!(error, Error::Train(TrainError::UnknownTrainer { .. })));
    let text = error.to_string();
    assert!(TrainerVariant::all().iter().all(|variant| text.contains(&variant.name)), "{text}");
}

// --------------------------------------------------------------------------------------------- whole batches

#[test]
fn samples_go_through_the_operations_in_upstream_order() {
    let (context, _guard) = device();
    let (recipe, channels) = (Recipe::default(), 2);
    let raw = raw(recipe, channels);
    let augmenter = Augmenter::new(recipe, PATCH, [true; 3], &[false, true], 3, Dtype::F32);
    let draw = everything(channels);
    let draws = [Draw::default(), draw.clone(), Draw { mirror: [false, true, false], ..Draw::default() }];
    let (image, labels) = augmenter.apply(context, &raw, &draws).unwrap();
    assert_eq!((image.shape().batch, image.shape().dims, image.shape().channels), (3, PATCH, channels));

    let source_patch = Patch::new(raw.patch, channels).unwrap();
    let patch = Patch::new(PATCH, channels).unwrap();
    let source_image = context.upload_f32(&raw.image).unwrap();
    let codes: Vec<u8> = raw.labels.iter().map(|l| (l + 1) as u8).collect();
    let source_codes = context.upload(&codes, Dtype::U8).unwrap();
    let expected = context.empty(3 * patch.elements(), Dtype::F32).unwrap();
    let expected_labels = context.empty(3 * patch.voxels(), Dtype::U8).unwrap();
    let sample = |index| Sample { patch: source_patch, image: &source_image, labels: &source_codes, index };
    let target = |index| Sample { patch, image: &expected, labels: &expected_labels, index };
    let masked = [false, true];
    let how = |mirror| Finish { mirror, masked: &masked };
    augment::finish(context, &sample(0), &target(0), how([false; 3])).unwrap();
    augment::finish(context, &sample(2), &target(2), how([false, true, false])).unwrap();
    let empty = || context.empty(patch.elements(), Dtype::F32).unwrap();
    let (a, b) = (empty(), empty());
    let codes = context.empty(patch.voxels(), Dtype::U8).unwrap();
    let region = Region::whole(raw.patch);
    let movement = Movement { matrix: draw.matrix().unwrap(), region, rule: LabelRule::Vote };
    augment::spatial(context, &sample(1), &movement, &patch, &a, &codes).unwrap();
    augment::noise(context, &patch, &a, 0.05, [7, 8]).unwrap();
    for (axis, sigma, x, y) in [(0, 0.5, &a, &b), (1, 0.7, &b, &a), (2, 1.0, &a, &b)] {
        augment::blur(context, &patch, x, y, axis, &[augment::gaussian_taps(sigma), vec![1.0]]).unwrap();
    }
    augment::brightness(context, &patch, &b, &[0.9; 2]).unwrap();
    augment::contrast(context, &patch, &b, &[1.2; 2]).unwrap();
    augment::low_resolution(context, &patch, &b, &a, &[Some([4, 6, 5]), None]).unwrap();
    augment::gamma(context, &patch, &a, &[1.3; 2], true).unwrap();
    augment::gamma(context, &patch, &a, &[0.8; 2], false).unwrap();
    let last = Sample { patch, image: &a, labels: &codes, index: 0 };
    augment::finish(context, &last, &target(1), how([true, false, true])).unwrap();

    assert_eq!(read(context, image.buffer()), read(context, &expected));
    assert_eq!(context.download::<u8>(&labels).unwrap(), context.download::<u8>(&expected_labels).unwrap());
}

fn bits(context: &Context, augmenter: &Augmenter, raw: &Batch, seed: u64) -> (Vec<u32>, Vec<u8>) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let (mut image, mut labels) = (Vec::new(), Vec::new());
    for _ in 0..4 {
        let (x, target) = augmenter.batch(context, raw, &mut rng).unwrap();
        image.extend(read(context, x.buffer()).into_iter().map(f32::to_bits));
        labels.extend(context.download::<u8>(&target).unwrap());
    }
    (image, labels)
}

#[test]
fn the_same_seed_gives_the_same_bits_and_another_seed_others() {
    let (context, _guard) = device();
    let raw = raw(Recipe::default(), 2);
    let augmenter = Augmenter::new(Recipe::default(), PATCH, [true; 3], &[true, true], 3, Dtype::F32);
    let once = bits(context, &augmenter, &raw, 1);
    assert_eq!(once, bits(context, &augmenter, &raw, 1));
    let other = bits(context, &augmenter, &raw, 2);
    assert_ne!(once.0, other.0);
    assert_ne!(once.1, other.1);
    assert!(once.1.iter().all(|&label| label <= 3), "a label that was not there");
}

#[test]
fn two_byte_labels_stay_what_they_are_and_undeclared_ones_are_refused() {
    let (context, _guard) = device();
    let mut raw = raw(Recipe::MIRROR, 1);
    raw.labels.iter_mut().enumerate().for_each(|(i, label)| *label = [-1, 0, 255, 256, 3000][i % 5]);
    let augmenter = |largest| Augmenter::new(Recipe::MIRROR, PATCH, [false; 3], &[true], largest, Dtype::F32);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let (image, target) = augmenter(3000).batch(context, &raw, &mut rng).unwrap();
    let expected: Vec<u16> = raw.labels.iter().map(|&label| label.max(0) as u16).collect();
    assert_eq!(context.download::<u16>(&target).unwrap(), expected);
    // Mirroring alone masks nothing.
    assert_eq!(read(context, image.buffer()), raw.image);
    let error = augmenter(299).batch(context, &raw, &mut rng).unwrap_err();
    assert!(matches!(error, Error::Train(TrainError::LabelBeyondDeclared { found: 3000, largest: 299 })), "{error}");
    // The largest label of one byte needs codes of two.
    raw.labels.iter_mut().for_each(|label| *label = (*label).min(255));
    let (_, target) = augmenter(255).batch(context, &raw, &mut rng).unwrap();
    let expected: Vec<u8> = raw.labels.iter().map(|&label| label.max(0) as u8).collect();
    assert_eq!(context.download::<u8>(&target).unwrap(), expected);
}

#[test]
fn augmentation_holds_no_more_memory_than_is_planned() {
    let (context, _guard) = device();
    let (recipe, channels) = (Recipe::default(), 2);
    let raw = raw(recipe, channels);
    let augmenter = Augmenter::new(recipe, PATCH, [true; 3], &[true, true], 3, Dtype::F32);
    let draws: Vec<Draw> = (0..3).map(|_| everything(channels)).collect();
    let before = context.held_bytes();
    context.reset_peak();
    let (image, target) = augmenter.apply(context, &raw, &draws).unwrap();
    let batch = (image.buffer().len() * 4 + target.len()) as u64;
    let (peak, planned) = (context.peak_bytes() - before - batch, augmenter.bytes(channels));
    // Statistics and tables are small; what is planned is the largest rotation.
    assert!(peak <= planned + (64 << 10) && planned <= 2 * peak, "{peak} bytes, planned {planned}");
}
