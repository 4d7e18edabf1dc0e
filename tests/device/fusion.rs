//! Fused operations against the unfused ones, whose results must be the same but for rounding: moments that convolutions take,
//! and whole steps. See `fused_norm` for the sums that data gradients take.

use crate::common::convolution::{Case, cases, get, put, types};
use crate::common::network::{network, step};
use crate::common::{assert_no_device_panic, device, is_slow, read, uniform};
use voxgrad::kernels::conv3d;
use voxgrad::kernels::instance_norm;
use voxgrad::kernels::{Context, Dtype};
use voxgrad::tape::Fusion;

/// Mean and variance of every sample and channel, in f64.
fn moments(values: &[f32], batch: usize, channels: usize) -> Vec<(f64, f64)> {
    let each = values.len() / batch;
    let of =
        |n: usize, c: usize| values[n * each..(n + 1) * each].iter().skip(c).step_by(channels).map(|&v| f64::from(v));
    let voxels = (each / channels) as f64;
    let both = |n, c| {
        let mean = of(n, c).sum::<f64>() / voxels;
        (mean, of(n, c).map(|v| (v - mean).powi(2)).sum::<f64>() / voxels)
    };
    (0..batch * channels).map(|i| both(i / channels, i % channels)).collect()
}

#[test]
fn a_convolution_takes_the_moments_of_what_it_stores() {
    let (context, _guard) = device();
    for case in cases() {
        for dtype in types(context) {
            check_moments(context, &case, dtype, 0.0);
            if dtype == Dtype::F32 {
                // Around 100 deviations.
                check_moments(context, &case, dtype, 100.0);
            }
        }
    }
    assert_no_device_panic();
}

fn check_moments(context: &Context, case: &Case, dtype: Dtype, offset: f32) {
    let problem = case.problem();
    let (first, second, channels) = case.channels;
    let scale = (problem.weight_len() as f32 / channels as f32 / 9.0).powf(-0.5);
    let weights: Vec<f32> = uniform(3, problem.weight_len()).iter().map(|w| w * scale).collect();
    let bias: Vec<f32> = uniform(4, channels).iter().map(|b| b + offset).collect();
    let x = put(context, &uniform(1, problem.input_len()), dtype);
    let second = (second > 0).then(|| put(context, &uniform(2, problem.second_len()), dtype));
    let (w, bias) = (context.upload_f32(&weights).unwrap(), context.upload_f32(&bias).unwrap());
    let y = [0, 1].map(|_| put(context, &vec![f32::NAN; problem.output_len()], dtype));

    conv3d::forward(context, &problem, &x, second.as_ref(), &w, Some(&bias), &y[0]).unwrap();
    let (second, bias) = (second.as_ref(), Some(&bias));
    let taken = conv3d::forward_with_moments(context, &problem, &x, second, &w, bias, &y[1]).unwrap();
    let name = format!("{case:?} first {first} {dtype:?} around {offset}");
    let taken = taken.unwrap_or_else(|| panic!("{name}: no moments"));
    let stored = y.clone();
    let y = y.map(|y| get(context, &y));
    assert!(y[0] == y[1], "{name}: another output");

    let voxels = problem.out_dims().iter().product();
    let norm = instance_norm::Problem::new(case.batch, voxels, channels, dtype, None).unwrap();
    let statistics = [0, 1].map(|_| context.empty(norm.statistics_len(), Dtype::F32).unwrap());
    instance_norm::statistics_of_moments(context, &norm, taken, &statistics[0]).unwrap();
    instance_norm::statistics(context, &norm, &stored[1], &statistics[1]).unwrap();
    // Largest errors of the mean in deviations, and of the deviation as a share of it.
    let expected = moments(&y[0], case.batch, channels);
    let [taken, passed] = statistics.map(|statistics| {
        let statistics = read(context, &statistics);
        expected.iter().enumerate().fold((0.0f64, 0.0f64), |worst, (i, (mean, variance))| {
            let at = i / channels * 2 * channels + i % channels;
            let (got, rstd) = (f64::from(statistics[at]), f64::from(statistics[at + channels]));
            let deviation = (variance + 1e-5).sqrt();
            let mean = if voxels > 1 { (got - mean).abs() / deviation } else { (got - mean).abs() };
            (worst.0.max(mean), worst.1.max((rstd * deviation - 1.0).abs()))
        })
    });
    eprintln!("{name}: errors {:.1e} {:.1e}, of a pass {:.1e} {:.1e}", taken.0, taken.1, passed.0, passed.1);
    // A GPU's compiler may leave out the rounding of 16-bit outputs on the way to their moments.
    let unit = match dtype {
        Dtype::F16 => 2f64.powi(-11),
        Dtype::Bf16 => 2f64.powi(-8),
        _ => 2e-7,
    };
    let far = f64::from(1.0 + offset);
    assert!(taken.0 <= 2.0 * passed.0 + unit * far, "{name}: mean off by {taken:?}, in a pass {passed:?}");
    assert!(taken.1 <= 2.0 * passed.1 + 4.0 * unit, "{name}: deviation off by {taken:?}, in a pass {passed:?}");
}

/// A whole step, forward and backward, with each fusion alone and with all of them, and how many launches that saves on a CPU:
/// for each of the ten blocks the pass over the convolution's output, and one of the two that sum up a bias gradient. Of the
/// convolutions, seven follow Winograd's algorithm in all passes; five of these read what a norm has put out for nobody else.
/// Computing again costs a launch for each of the twelve operations that read a normalised value.
#[test]
fn a_step_of_a_network_is_the_same_with_fewer_launches() {
    let (context, _guard) = device();
    let dims = if is_slow() { [16; 3] } else { [32; 3] };
    let shape = network(&[16, 32, 48], 3, 3);
    let (launches_unfused, _, unfused) = step(context, &shape, dims, Fusion::NONE);
    for (name, fusion, same_bits, saved) in [
        ("recompute", Fusion { recompute_activations: true, ..Fusion::NONE }, true, -12),
        ("moments", Fusion { moments_by_convolution: true, ..Fusion::NONE }, false, 10),
        ("bias gradient", Fusion { no_bias_gradient_before_norm: true, ..Fusion::NONE }, false, 10),
        ("sums", Fusion { norm_sums_by_convolution: true, ..Fusion::NONE }, false, 5),
        ("default", Fusion::default(), false, 13),
    ] {
        let (launches, _, fused) = step(context, &shape, dims, fusion);
        let size = |gradient: &[f32]| gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>();
        let (mut difference, mut all, mut worst) = (0.0, 0.0, 0.0f64);
        for ((parameter, _, fused), (_, _, unfused)) in fused.iter().zip(&unfused) {
            let apart: Vec<f32> = fused.iter().zip(unfused).map(|(a, b)| a - b).collect();
            difference += size(&apart);
            all += size(unfused);
            if !parameter.ends_with("conv.bias") {
                worst = worst.max((size(&apart) / size(unfused).max(1e-30)).sqrt());
            } else if fusion.no_bias_gradient_before_norm {
                assert!(fused.iter().all(|&g| g == 0.0), "{name}: {parameter}");
            }
        }
        let difference = (difference / all).sqrt();
        eprintln!(
            "{name}: {launches} launches, {launches_unfused} unfused; gradients differ by {difference:.1e}, {worst:.1e}"
        );
        if context.caps().cores.is_some() {
            assert_eq!(launches_unfused as i32 - launches as i32, saved, "{name}");
            assert!(!same_bits || difference == 0.0, "{name}: gradients differ by {difference:.1e}");
        }
        // Where the forward pass rounds otherwise, a few voxels come to lie on the other side of leaky ReLU's kink, which is seen
        // in the gradients of a network as small as this.
        let bound = if fusion.moments_by_convolution { 1e-2 } else { 1e-5 };
        assert!(worst < bound, "{name}: gradients differ by {difference:.1e}, one by {worst:.1e}");
    }
    assert_no_device_panic();
}
