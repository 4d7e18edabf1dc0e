//! Instance norm with leaky ReLU against the formulas in f64.

use crate::common::{assert_close, assert_no_device_panic, device, is_slow, read, uniform};
use half::f16;
use voxgrad::kernels::instance_norm::{self, Norm, NormGradient, Problem};
use voxgrad::kernels::{Buffer, Context, Dtype, KernelError};

/// Shape, parameters and data of one case; f32 values that f64 loops read too.
struct Case {
    batch: usize,
    voxels: usize,
    channels: usize,
    slope: Option<f32>,
    x: Vec<f32>,
    gamma: Vec<f32>,
    beta: Vec<f32>,
    dy: Vec<f32>,
}

/// What the formulas give.
struct Expected {
    mean: Vec<f64>,
    rstd: Vec<f64>,
    y: Vec<f64>,
    dx: Vec<f64>,
    dgamma: Vec<f64>,
    dbeta: Vec<f64>,
}

impl Case {
    fn new(batch: usize, voxels: usize, channels: usize, slope: Option<f32>) -> Self {
        let len = batch * voxels * channels;
        // Every channel another mean and width, and beta far enough from 0 for signs to differ between channels.
        let spread = |(i, v): (usize, f32)| v * (1.0 + (i % channels) as f32 % 3.0) + 0.7;
        let x = uniform(51, len).into_iter().enumerate().map(spread);
        let gamma = uniform(52, channels).iter().map(|v| v + if *v < 0.0 { -0.5 } else { 0.5 }).collect();
        let beta = uniform(53, channels);
        Self { batch, voxels, channels, slope, x: x.collect(), gamma, beta, dy: uniform(54, len) }
    }

    /// The reference: plain loops over one sample and channel at a time.
    fn expected(&self) -> Expected {
        let (voxels, channels) = (self.voxels, self.channels);
        let slope = f64::from(self.slope.unwrap_or(1.0));
        let mut out = Expected {
            mean: vec![],
            rstd: vec![],
            y: vec![0.0; self.x.len()],
            dx: vec![0.0; self.x.len()],
            dgamma: vec![0.0; channels],
            dbeta: vec![0.0; channels],
        };
        for n in 0..self.batch {
            for c in 0..channels {
                let places: Vec<usize> = (0..voxels).map(|v| (n * voxels + v) * channels + c).collect();
                let over = |f: &dyn Fn(usize) -> f64| places.iter().map(|&i| f(i)).sum::<f64>() / voxels as f64;
                let x = |i: usize| f64::from(self.x[i]);
                let mean = over(&x);
                let variance = over(&|i| (x(i) - mean).powi(2));
                let rstd = 1.0 / (variance + 1e-5).sqrt();
                let (gamma, beta) = (f64::from(self.gamma[c]), f64::from(self.beta[c]));
                let xhat = |i: usize| (x(i) - mean) * rstd;
                let z = |i: usize| gamma * xhat(i) + beta;
                let dz = |i: usize| f64::from(self.dy[i]) * if z(i) > 0.0 { 1.0 } else { slope };
                let (mean_dz, mean_product) = (over(&dz), over(&|i| dz(i) * xhat(i)));
                for &i in &places {
                    out.y[i] = if z(i) > 0.0 { z(i) } else { slope * z(i) };
                    out.dx[i] = gamma * rstd * (dz(i) - mean_dz - xhat(i) * mean_product);
                }
                out.dbeta[c] += mean_dz * voxels as f64;
                out.dgamma[c] += mean_product * voxels as f64;
                out.mean.push(mean);
                out.rstd.push(rstd);
            }
        }
        out
    }

    /// sum(y * dy): the function whose gradients the backward formulas are.
    fn objective(&self) -> f64 {
        self.expected().y.iter().zip(&self.dy).map(|(y, dy)| y * f64::from(*dy)).sum()
    }

    fn problem(&self, dtype: Dtype) -> Problem {
        Problem::new(self.batch, self.voxels, self.channels, dtype, self.slope).unwrap()
    }

    fn name(&self) -> String {
        format!("[{}, {}, {}] {:?}", self.batch, self.voxels, self.channels, self.slope)
    }
}

/// An output of `len` NaN with 64 more behind it.
struct Output {
    all: Buffer,
    part: Buffer,
}

impl Output {
    fn new(context: &Context, len: usize) -> Self {
        let all = context.upload_f32(&vec![f32::NAN; len + 64]).unwrap();
        let part = all.part(0, len).unwrap();
        Self { all, part }
    }

    /// The values, after a look at what lies behind them.
    fn read(&self, context: &Context, what: &str) -> Vec<f32> {
        let mut values = read(context, &self.all);
        assert!(values[self.part.len()..].iter().all(|v| v.is_nan()), "{what}: wrote behind the output");
        values.truncate(self.part.len());
        values
    }
}

/// statistics, y, dx, dgamma, dbeta.
fn run(context: &Context, case: &Case) -> [Vec<f32>; 5] {
    let problem = case.problem(Dtype::F32);
    let [x, dy, gamma, beta] = [&case.x, &case.dy, &case.gamma, &case.beta].map(|v| context.upload_f32(v).unwrap());
    let lens = [problem.statistics_len(), problem.elements(), problem.elements(), case.channels, case.channels];
    let outputs = lens.map(|len| Output::new(context, len));
    let [statistics, y, dx, dgamma, dbeta] = outputs.each_ref().map(|o| &o.part);
    let norm = Norm { statistics, gamma: &gamma, beta: &beta };
    instance_norm::forward(context, &problem, &x, &norm, y).unwrap();
    let gradient = NormGradient { gamma: dgamma, beta: dbeta };
    instance_norm::backward(context, &problem, &x, &norm, &dy, dx, &gradient).unwrap();
    outputs.map(|o| o.read(context, &case.name()))
}

fn check(context: &Context, case: &Case) {
    let [statistics, y, dx, dgamma, dbeta] = run(context, case);
    let expected = case.expected();
    let name = case.name();
    let half = |which: usize| -> Vec<f32> {
        statistics.chunks(case.channels).skip(which).step_by(2).flatten().copied().collect()
    };
    // One voxel: variance and dx are exactly 0; what is left is rounding of 1 / sqrt(eps) = 316.
    let single = case.voxels == 1;
    assert_close(&format!("{name} mean"), &half(0), &expected.mean, 1e-6);
    if !single {
        assert_close(&format!("{name} rstd"), &half(1), &expected.rstd, 2e-6);
    }
    assert_close(&format!("{name} y"), &y, &expected.y, 4e-6);
    if single {
        assert!(dx.iter().all(|v| v.abs() < 1e-4), "{name}: dx of one voxel is {dx:?}");
    } else if case.voxels == 2 {
        // Two values that nearly cancel: dx = O(eps), so only its size can be asked for.
        let bound = expected.rstd.iter().fold(0.0, |a: f64, b| a.max(*b)) * 1e-5;
        for (i, (a, e)) in dx.iter().zip(&expected.dx).enumerate() {
            assert!((f64::from(*a) - e).abs() < bound.max(1e-5), "{name} dx[{i}]: {a} instead of {e}");
        }
    } else {
        assert_close(&format!("{name} dx"), &dx, &expected.dx, 1e-5);
    }
    // Sums that may cancel: measured against sums of magnitudes would be fairer; the cases are mild.
    assert_close(&format!("{name} dbeta"), &dbeta, &expected.dbeta, 1e-5);
    if !single {
        assert_close(&format!("{name} dgamma"), &dgamma, &expected.dgamma, 1e-5);
    }
}

#[test]
fn forward_and_backward_equal_the_formulas() {
    let (context, _guard) = device();
    let voxels: &[usize] = if is_slow() { &[1, 2, 7, 64, 96, 1000] } else { &[1, 2, 7, 64, 96, 1000, 4096] };
    for channels in [1, 2, 3, 4, 5, 8, 12, 20, 32, 33] {
        for &voxels in voxels {
            for batch in [1, 2, 3] {
                let slope = if batch == 2 { None } else { Some(0.01) };
                check(context, &Case::new(batch, voxels, channels, slope));
            }
        }
    }
    // The bottleneck of a network; many tiles a row.
    check(context, &Case::new(2, 80, 320, Some(0.01)));
    if is_slow() {
        // More than 64 parts: the tree of merges.
        check(context, &Case::new(2, 2100, 4, Some(0.01)));
        check(context, &Case::new(1, 64_000, 8, Some(0.01)));
        check(context, &Case::new(2, 64_000, 8, Some(0.01)));
    } else {
        check(context, &Case::new(2, 32_768, 32, Some(0.01)));
        check(context, &Case::new(1, 100_001, 3, None));
    }
}

#[test]
fn the_same_bits_twice() {
    let (context, _guard) = device();
    for (batch, voxels, channels) in [(2, 1000, 32), (1, 4099, 5), (3, 64, 33)] {
        let case = Case::new(batch, voxels, channels, Some(0.01));
        assert_eq!(run(context, &case), run(context, &case), "{}", case.name());
    }
}

#[test]
fn the_reference_and_the_kernel_agree_with_finite_differences() {
    let (context, _guard) = device();
    for slope in [None, Some(0.01)] {
        let case = Case::new(2, 60, 3, slope);
        let expected = case.expected();
        // One random direction in x, gamma and beta together. The step is so small that few z change sign; f64 on
        // f32 values that are rounded after the step: the direction used is the rounded one.
        let step = |sign: f32| -> Case {
            let moved = |values: &[f32], seed| -> Vec<f32> {
                values.iter().zip(uniform(seed, values.len())).map(|(v, d)| v + sign * 1e-3 * d).collect()
            };
            let (x, gamma, beta) = (moved(&case.x, 61), moved(&case.gamma, 62), moved(&case.beta, 63));
            Case { x, gamma, beta, dy: case.dy.clone(), ..case }
        };
        let (up, down) = (step(1.0), step(-1.0));
        let numeric = up.objective() - down.objective();
        let along = |up: &[f32], down: &[f32], gradient: &[f64]| -> f64 {
            up.iter().zip(down).zip(gradient).map(|((u, d), g)| (f64::from(*u) - f64::from(*d)) * g).sum()
        };
        let total = |dx: &[f64], dgamma: &[f64], dbeta: &[f64]| {
            along(&up.x, &down.x, dx) + along(&up.gamma, &down.gamma, dgamma) + along(&up.beta, &down.beta, dbeta)
        };
        let reference = total(&expected.dx, &expected.dgamma, &expected.dbeta);
        assert!((reference / numeric - 1.0).abs() < 1e-3, "{slope:?}: reference {reference}, differences {numeric}");
        let [_, _, dx, dgamma, dbeta] = run(context, &case);
        let [dx, dgamma, dbeta] = [dx, dgamma, dbeta].map(|v| v.iter().map(|&v| f64::from(v)).collect::<Vec<_>>());
        let kernel = total(&dx, &dgamma, &dbeta);
        assert!((kernel / numeric - 1.0).abs() < 1e-3, "{slope:?}: kernel {kernel}, differences {numeric}");
    }
}

/// A mean of a thousand deviations: sums of squares in f32 would have no digit left.
#[test]
fn statistics_are_stable_far_from_zero() {
    let (context, _guard) = device();
    let (voxels, channels) = if is_slow() { (20_000, 3) } else { (10_000_000, 3) };
    // Channel 1 drifts over the volume, and starts with an outlier; channel 2 lies below zero.
    let mut x = uniform(71, voxels * channels);
    for (i, v) in x.iter_mut().enumerate() {
        let (voxel, channel) = (i / channels, i % channels);
        *v *= 3f32.sqrt();
        *v += match channel {
            0 => 1000.0,
            1 => 1000.0 + (voxel as f32 / voxels as f32 - 0.5) * 4.0,
            _ => -1000.0,
        };
    }
    x[1] = 0.0;
    let mut expected = Vec::new();
    for channel in 0..channels {
        let values = || x.iter().skip(channel).step_by(channels).map(|&v| f64::from(v));
        let mean = values().sum::<f64>() / voxels as f64;
        expected.push((mean, values().map(|v| (v - mean).powi(2)).sum::<f64>() / voxels as f64));
    }
    let problem = Problem::new(1, voxels, channels, Dtype::F32, None).unwrap().with_epsilon(0.0);
    let x = context.upload_f32(&x).unwrap();
    let statistics = context.empty(problem.statistics_len(), Dtype::F32).unwrap();
    instance_norm::statistics(context, &problem, &x, &statistics).unwrap();
    let got = read(context, &statistics);
    for (channel, (mean, variance)) in expected.into_iter().enumerate() {
        let error = (f64::from(got[channel]) - mean).abs() / variance.sqrt();
        let relative = (f64::from(got[channels + channel]).powi(-2) / variance - 1.0).abs();
        println!("channel {channel}: variance off by {relative:.1e}, mean by {error:.1e} deviations");
        assert!(relative < 1e-5, "channel {channel}: variance off by {relative:.1e}");
        // Half a unit in the last place of 1000 is 3e-5.
        assert!(error < 1e-4, "channel {channel}: mean off by {error:.1e} deviations");
    }
}

#[test]
fn broken_values_stay_visible() {
    let (context, _guard) = device();
    for broken in [f32::NAN, f32::INFINITY] {
        let mut case = Case::new(1, 100, 4, Some(0.01));
        case.x[41 * 4 + 2] = broken;
        let [statistics, y, ..] = run(context, &case);
        assert!(statistics[2].is_nan() || statistics[2].is_infinite());
        assert!(y.iter().skip(2).step_by(4).all(|v| !v.is_finite()), "{broken} was normalised away");
        assert!(y.iter().step_by(4).all(|v| v.is_finite()), "{broken} spread to another channel");
    }
}

#[test]
fn f16_storage_is_rounded_once() {
    let (context, _guard) = device();
    if !context.caps().f16 {
        println!("skipped: no f16 on this device");
        return;
    }
    let mut case = Case::new(2, 500, 12, Some(0.01));
    let to_half = |values: &[f32]| -> Vec<f16> { values.iter().map(|&v| f16::from_f32(v)).collect() };
    let from_half = |values: &[f16]| -> Vec<f32> { values.iter().map(|v| v.to_f32()).collect() };
    let (x, dy) = (to_half(&case.x), to_half(&case.dy));
    (case.x, case.dy) = (from_half(&x), from_half(&dy));
    let problem = case.problem(Dtype::F16);
    let [x, dy] = [x, dy].map(|v| context.upload(&v, Dtype::F16).unwrap());
    let [gamma, beta] = [&case.gamma, &case.beta].map(|v| context.upload_f32(v).unwrap());
    let [y, dx] = [0, 1].map(|_| context.upload(&vec![f16::NAN; problem.elements()], Dtype::F16).unwrap());
    let statistics = context.empty(problem.statistics_len(), Dtype::F32).unwrap();
    let [dgamma, dbeta] = [0, 1].map(|_| context.empty(case.channels, Dtype::F32).unwrap());
    let norm = Norm { statistics: &statistics, gamma: &gamma, beta: &beta };
    instance_norm::forward(context, &problem, &x, &norm, &y).unwrap();
    let gradient = NormGradient { gamma: &dgamma, beta: &dbeta };
    instance_norm::backward(context, &problem, &x, &norm, &dy, &dx, &gradient).unwrap();
    let expected = case.expected();
    // Half of the 2^-10 between two halves, as a root mean square less than 3e-4.
    let [y, dx] = [y, dx].map(|b| from_half(&context.download::<f16>(&b).unwrap()));
    assert_close("f16 y", &y, &expected.y, 3e-4);
    assert_close("f16 dx", &dx, &expected.dx, 3e-4);
    assert_close("f16 dgamma", &read(context, &dgamma), &expected.dgamma, 1e-5);
    assert_close("f16 dbeta", &read(context, &dbeta), &expected.dbeta, 1e-5);
}

#[test]
fn misuse_is_a_typed_error() {
    let (context, _guard) = device();
    assert!(matches!(Problem::new(0, 1, 1, Dtype::F32, None), Err(KernelError::Shape { .. })));
    assert!(matches!(Problem::new(1, usize::MAX, 2, Dtype::F32, None), Err(KernelError::Shape { .. })));
    assert!(matches!(Problem::new(1, 1, 1, Dtype::U8, None), Err(KernelError::Dtype { .. })));
    let problem = Problem::new(1, 4, 3, Dtype::F32, None).unwrap();
    let [x, short, three, six] = [12, 11, 3, 6].map(|len| context.upload_f32(&vec![0.0; len]).unwrap());
    let norm = Norm { statistics: &six, gamma: &three, beta: &three };
    let gradient = NormGradient { gamma: &three, beta: &three };
    let is_shape = |result: Result<(), KernelError>| matches!(result, Err(KernelError::Shape { .. }));
    assert!(is_shape(instance_norm::statistics(context, &problem, &short, &six)));
    assert!(is_shape(instance_norm::statistics(context, &problem, &x, &three)));
    assert!(is_shape(instance_norm::apply(context, &problem, &x, &norm, &short)));
    let wrong = Norm { gamma: &six, ..norm };
    assert!(is_shape(instance_norm::apply(context, &problem, &x, &wrong, &x)));
    assert!(is_shape(instance_norm::backward(context, &problem, &x, &norm, &short, &x, &gradient)));
    assert!(is_shape(instance_norm::backward_apply(context, &problem, &x, &norm, &x, &three, &x)));
    assert_no_device_panic();
}
