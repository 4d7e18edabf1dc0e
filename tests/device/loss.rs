//! The fused losses in sizes from one voxel to two million, nnU-Net's own numbers, real steps, memory, and input that does
//! not fit. `loss_reference.rs` holds every variant to it.

use crate::common::loss_case::{Case, check_on, is_possible, overlapping, run, run_in_place};
use crate::common::{assert_close, assert_no_device_panic, device, is_slow};
use voxgrad::kernels::loss::{Gradient, Level, LossSettings, Problem, Target, value, value_and_gradient};
use voxgrad::kernels::{Buffer, Dtype, KernelError, Scale};

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
        for (target, ignore) in [(labels, channels as u16), (overlapping(channels, 6), 6)] {
            let settings = |declared, batch_dice| LossSettings::new(target.clone(), declared, batch_dice);
            if !is_possible(&settings(None, false)) {
                continue;
            }
            let name = |what: &str| format!("{channels} channels, {what}, {dims:?}");
            // Without an ignore label the kernels are others: for some channels that is enough.
            if [1, 3, 4, 14].contains(&channels) {
                check_on(context, &Case::new(name("all annotated"), settings(None, true), batch, dims, 5));
            }
            for batch_dice in [false, true] {
                check_on(context, &Case::new(name("sparse"), settings(Some(ignore), batch_dice), batch, dims, 5));
            }
            let mut case = Case::new(name("last sample ignored"), settings(Some(ignore), false), batch, dims, 5);
            (case.settings.weight_ce, case.settings.weight_dice) = (0.75, 1.5);
            let last = case.voxels() / batch * (batch - 1);
            case.labels[..last].iter_mut().for_each(|label| *label %= case.settings.target.labels() as u16);
            case.labels[last..].fill(ignore);
            check_on(context, &case);
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
    let targets = [4, 14, 20]
        .map(|classes| Target::Labels { classes })
        .into_iter()
        .chain([overlapping(3, 4), overlapping(20, 4)]);
    for target in targets {
        let ignore = target.channels().max(4) as u16;
        let settings = LossSettings::new(target, Some(ignore), false);
        if !is_possible(&settings) {
            continue;
        }
        let mut case = Case::new("deep supervision", settings, 2, dims, 3);
        case.set_levels(&levels);
        let mut apart = check_on(context, &case);
        // The gradient over the logits is the same as apart from them, and what is not touched stays.
        apart.gradients[4].clone_from(&case.logits[4]);
        assert_eq!(run_in_place(context, &case).bits(), apart.bits(), "in place");
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

fn wide(labels: &[u8]) -> Vec<u16> {
    labels.iter().map(|&label| u16::from(label)).collect()
}

#[test]
fn published_numbers_of_nnunet_s_loss() {
    let (context, _guard) = device();
    let logits: Vec<f32> =
        (0..144).map(|n| (2.0 * (0.7 * f64::from(n) + 0.3 * f64::from(n % 5)).sin()) as f32).collect();
    let logits = vec![channels_last(&logits, 2, 3)];
    let by_label: Vec<u8> = (0..48).map(|k| ((7 * k + k / 3) % 7).min(3) as u8).collect();
    let by_region: Vec<u8> = (0..48).map(|k| ((5 * k + k / 3) % 5) as u8).collect();
    let labels = Target::Labels { classes: 3 };
    let regions = Target::Regions { labels: 4, regions: vec![vec![1, 2, 3], vec![2, 3], vec![3]] };
    let run = |target: &Target, ignore, batch_dice, map: &[u8]| {
        let settings = LossSettings::new(target.clone(), ignore, batch_dice);
        let mut case = Case::new("published", settings, 2, [2, 3, 4], 1);
        case.labels = wide(map);
        case.logits.clone_from(&logits);
        check_on(context, &case)
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
        println!("skipped: the volumes of the real steps are too large for this device");
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

        let mut case = Case::new(format!("{name} deep supervision"), settings, 2, shapes[0], 1);
        case.set_levels(&[(shapes[0], 2.0 / 3.0), (shapes[1], 1.0 / 3.0), (shapes[2], 0.0)]);
        case.labels = wide(&labels);
        case.logits = logits;
        for (level, &dims) in shapes.iter().enumerate() {
            let theirs = label_map(&tensor(&file, &format!("step.target.{level}")), 2, regions);
            let ours: Vec<u8> = case.sources(level).into_iter().map(|v| labels[v]).collect();
            assert_eq!(ours, theirs, "{name}: target {level}");
            let mut case = case.clone();
            case.name = format!("{name} level {level}");
            case.levels = vec![Level { dims, weight: 1.0 }];
            case.logits = vec![case.logits.swap_remove(level)];
            let outcome = run(context, &case);
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
        let outcome = check_on(context, &case);
        assert_close(&case.name, &outcome.loss[..1], &tensor(&file, "step.loss.0"), 1e-6);
    }
}

#[test]
fn long_sums_are_exact_enough() {
    let (context, _guard) = device();
    if is_slow() {
        println!("skipped: two million voxels are too many for this device");
        return;
    }
    let mut case = Case::new("long", LossSettings::new(Target::Labels { classes: 2 }, None, true), 1, [128; 3], 1);
    // One class everywhere, well predicted: sums of two million equal signs, small errors.
    case.labels.fill(1);
    case.logits[0].chunks_mut(2).for_each(|z| z[1] += 4.0);
    check_on(context, &case);
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
                value_and_gradient(context, &problem, &(&labels).into(), &[&logits], &into, Scale::ONE, &loss).unwrap();
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
    let result = value_and_gradient(context, &problem, &(&labels).into(), &[&logits], &gradients, Scale::ONE, &loss);
    assert!(matches!(result, Err(KernelError::Shape { .. })));
}
