//! The end of a residual block, `leaky_relu(norm(x) + skip)` in one pass and its way back, against the formulas in f64 and
//! against its parts: norm, addition and activation one by one.

use crate::common::convolution::{get, put, types};
use crate::common::{assert_close, assert_no_device_panic, device, is_slow, read, uniform};
use voxgrad::kernels::instance_norm::{self, Norm, NormGradient, Problem};
use voxgrad::kernels::{Buffer, Context, Dtype, KernelError, elementwise};

const SLOPE: f64 = 0.01;

/// Shape, parameters and data of one case; f32 values that f64 loops read too.
#[derive(Clone)]
struct Case {
    batch: usize,
    voxels: usize,
    channels: usize,
    x: Vec<f32>,
    skip: Vec<f32>,
    gamma: Vec<f32>,
    beta: Vec<f32>,
    dy: Vec<f32>,
}

/// What the formulas give: the output; the gradients of x, skip, gamma and beta.
struct Expected {
    y: Vec<f64>,
    dx: Vec<f64>,
    dskip: Vec<f64>,
    dgamma: Vec<f64>,
    dbeta: Vec<f64>,
}

impl Case {
    fn new(context: &Context, batch: usize, voxels: usize, channels: usize, dtype: Dtype) -> Self {
        let len = batch * voxels * channels;
        // As the device stores them.
        let stored = |values: Vec<f32>| get(context, &put(context, &values, dtype));
        let spread = |(i, v): (usize, f32)| v * (1.0 + (i % channels) as f32 % 3.0) + 0.7;
        Self {
            batch,
            voxels,
            channels,
            x: stored(uniform(51, len).into_iter().enumerate().map(spread).collect()),
            skip: stored(uniform(55, len)),
            gamma: uniform(52, channels).iter().map(|v| v + if *v < 0.0 { -0.5 } else { 0.5 }).collect(),
            beta: uniform(53, channels),
            dy: stored(uniform(54, len)),
        }
    }

    /// Plain loops over one sample and channel at a time. Where the sum lies is told by `signs`, or by the sum itself.
    fn expected(&self, signs: Option<&[f32]>) -> Expected {
        let (voxels, channels, len) = (self.voxels, self.channels, self.x.len());
        let zeros = |len| vec![0.0; len];
        let mut out = Expected {
            y: zeros(len),
            dx: zeros(len),
            dskip: zeros(len),
            dgamma: zeros(channels),
            dbeta: zeros(channels),
        };
        for n in 0..self.batch {
            for c in 0..channels {
                let places: Vec<usize> = (0..voxels).map(|v| (n * voxels + v) * channels + c).collect();
                let over = |f: &dyn Fn(usize) -> f64| places.iter().map(|&i| f(i)).sum::<f64>() / voxels as f64;
                let x = |i: usize| f64::from(self.x[i]);
                let mean = over(&x);
                let rstd = 1.0 / (over(&|i| (x(i) - mean).powi(2)) + 1e-5).sqrt();
                let (gamma, beta) = (f64::from(self.gamma[c]), f64::from(self.beta[c]));
                let xhat = |i: usize| (x(i) - mean) * rstd;
                let sum = |i: usize| gamma * xhat(i) + beta + f64::from(self.skip[i]);
                let is_above = |i: usize| signs.map_or(sum(i), |signs| f64::from(signs[i])) > 0.0;
                let d = |i: usize| f64::from(self.dy[i]) * if is_above(i) { 1.0 } else { SLOPE };
                let (mean_d, mean_product) = (over(&d), over(&|i| d(i) * xhat(i)));
                for &i in &places {
                    out.y[i] = if sum(i) > 0.0 { sum(i) } else { SLOPE * sum(i) };
                    out.dskip[i] = d(i);
                    out.dx[i] = gamma * rstd * (d(i) - mean_d - xhat(i) * mean_product);
                }
                out.dbeta[c] += mean_d * voxels as f64;
                out.dgamma[c] += mean_product * voxels as f64;
            }
        }
        out
    }

    /// sum(y * dy): the function whose gradients the formulas are.
    fn objective(&self) -> f64 {
        self.expected(None).y.iter().zip(&self.dy).map(|(y, dy)| y * f64::from(*dy)).sum()
    }
}

/// What the kernels give.
struct Actual {
    y: Vec<f32>,
    dx: Vec<f32>,
    dskip: Vec<f32>,
    dgamma: Vec<f32>,
    dbeta: Vec<f32>,
}

/// Norm, addition and activation in one pass, or each on its own: the activation, of which there is no kernel alone, on the host.
fn run(context: &Context, case: &Case, dtype: Dtype, fused: bool) -> Actual {
    let problem = Problem::new(case.batch, case.voxels, case.channels, dtype, Some(SLOPE as f32)).unwrap();
    let linear = problem.without_activation();
    let (x, skip, dy) = (put(context, &case.x, dtype), put(context, &case.skip, dtype), put(context, &case.dy, dtype));
    let [gamma, beta] = [&case.gamma, &case.beta].map(|v| context.upload_f32(v).unwrap());
    let statistics = context.empty(problem.statistics_len(), Dtype::F32).unwrap();
    instance_norm::statistics(context, &problem, &x, &statistics).unwrap();
    let norm = Norm { statistics: &statistics, gamma: &gamma, beta: &beta };
    // NaN behind the outputs must stay.
    let guarded = |len: usize| put(context, &vec![f32::NAN; len + 64], dtype);
    let (y_all, dx_all) = (guarded(x.len()), guarded(x.len()));
    let [y, dx] = [&y_all, &dx_all].map(|all| all.part(0, x.len()).unwrap());
    let sums = context.empty(problem.statistics_len(), Dtype::F32).unwrap();
    let [dgamma, dbeta] = [0, 1].map(|_| context.empty(case.channels, Dtype::F32).unwrap());
    let gradient = NormGradient { gamma: &dgamma, beta: &dbeta };

    let dskip: Buffer = if fused {
        instance_norm::apply_onto(context, &problem, &x, &norm, &skip, &y).unwrap();
        let parts = instance_norm::gradient_parts_onto(context, &problem, &x, &norm, &y, &dy).unwrap();
        instance_norm::backward_sums_of_parts(context, &linear, parts, &sums, &gradient).unwrap();
        dy
    } else {
        instance_norm::apply(context, &linear, &x, &norm, &y).unwrap();
        elementwise::add_assign(context, &y, &skip).unwrap();
        let (sum, slope) = (get(context, &y), SLOPE as f32);
        let activated: Vec<f32> = sum.iter().map(|&v| if v > 0.0 { v } else { v * slope }).collect();
        elementwise::copy(context, &put(context, &activated, dtype), &y).unwrap();
        let d = sum.iter().zip(&case.dy).map(|(&sum, &dy)| if sum > 0.0 { dy } else { dy * slope });
        let d = put(context, &d.collect::<Vec<_>>(), dtype);
        instance_norm::backward_sums(context, &linear, &x, &norm, &d, &sums, &gradient).unwrap();
        d
    };
    instance_norm::backward_apply(context, &linear, &x, &norm, &dskip, &sums, &dx).unwrap();

    let unguarded = |all: &Buffer| {
        let mut values = get(context, all);
        assert!(values[case.x.len()..].iter().all(|v| v.is_nan()), "wrote behind the output");
        values.truncate(case.x.len());
        values
    };
    Actual {
        y: unguarded(&y_all),
        dx: unguarded(&dx_all),
        dskip: get(context, &dskip),
        dgamma: read(context, &dgamma),
        dbeta: read(context, &dbeta),
    }
}

/// Batch, voxels, channels: rows of one voxel and of several, a tail, the bottleneck of a network, many parts.
fn shapes() -> Vec<(usize, usize, usize)> {
    let mut shapes = vec![(2, 7, 3), (2, 96, 3), (1, 1000, 6), (2, 1000, 32), (1, 80, 320), (3, 2100, 4)];
    if !is_slow() {
        shapes.push((2, 8192, 32));
    }
    shapes
}

#[test]
fn forward_and_backward_equal_the_formulas() {
    let (context, _guard) = device();
    for (batch, voxels, channels) in shapes() {
        for dtype in types(context) {
            if dtype != Dtype::F32 && voxels != 1000 {
                continue;
            }
            let name = format!("[{batch}, {voxels}, {channels}] in {dtype:?}");
            let case = Case::new(context, batch, voxels, channels, dtype);
            let actual = run(context, &case, dtype, true);
            // Rounding may move what lies on the kink.
            let expected = case.expected(Some(&actual.y));
            let (values, sums) = match dtype {
                Dtype::F16 => (3e-4, 3e-4),
                Dtype::Bf16 => (2.4e-3, 2.4e-3),
                _ => (4e-6, 1e-5),
            };
            assert_close(&format!("{name} y"), &actual.y, &expected.y, values);
            assert_close(&format!("{name} dskip"), &actual.dskip, &expected.dskip, values);
            assert_close(&format!("{name} dx"), &actual.dx, &expected.dx, 2.0 * sums);
            assert_close(&format!("{name} dgamma"), &actual.dgamma, &expected.dgamma, sums);
            assert_close(&format!("{name} dbeta"), &actual.dbeta, &expected.dbeta, sums);
        }
    }
    assert_no_device_panic();
}

#[test]
fn the_fused_passes_are_the_unfused_ones() {
    let (context, _guard) = device();
    for (batch, voxels, channels) in shapes() {
        let name = format!("[{batch}, {voxels}, {channels}]");
        let case = Case::new(context, batch, voxels, channels, Dtype::F32);
        let [fused, parts] = [true, false].map(|fused| run(context, &case, Dtype::F32, fused));
        let wide = |values: &[f32]| values.iter().map(|&v| f64::from(v)).collect::<Vec<_>>();
        assert_close(&format!("{name} y"), &fused.y, &wide(&parts.y), 1e-6);
        assert_close(&format!("{name} dskip"), &fused.dskip, &wide(&parts.dskip), 1e-6);
        assert_close(&format!("{name} dx"), &fused.dx, &wide(&parts.dx), 1e-5);
        assert_close(&format!("{name} dgamma"), &fused.dgamma, &wide(&parts.dgamma), 1e-5);
        assert_close(&format!("{name} dbeta"), &fused.dbeta, &wide(&parts.dbeta), 1e-5);
        let again = run(context, &case, Dtype::F32, true);
        assert!(again.y == fused.y && again.dx == fused.dx && again.dgamma == fused.dgamma, "{name}: other bits");
    }
}

#[test]
fn reference_and_kernels_agree_with_finite_differences() {
    let (context, _guard) = device();
    let case = Case::new(context, 2, 60, 3, Dtype::F32);
    // One random direction in everything together, so small that few sums change sign.
    let step = |sign: f32| -> Case {
        let moved = |values: &[f32], seed| -> Vec<f32> {
            values.iter().zip(uniform(seed, values.len())).map(|(v, d)| v + sign * 1e-3 * d).collect()
        };
        Case {
            x: moved(&case.x, 61),
            gamma: moved(&case.gamma, 62),
            beta: moved(&case.beta, 63),
            skip: moved(&case.skip, 64),
            ..case.clone()
        }
    };
    let (up, down) = (step(1.0), step(-1.0));
    let numeric = up.objective() - down.objective();
    let along = |up: &[f32], down: &[f32], gradient: &[f64]| -> f64 {
        up.iter().zip(down).zip(gradient).map(|((u, d), g)| (f64::from(*u) - f64::from(*d)) * g).sum()
    };
    let total = |gradient: &Expected| {
        along(&up.x, &down.x, &gradient.dx)
            + along(&up.skip, &down.skip, &gradient.dskip)
            + along(&up.gamma, &down.gamma, &gradient.dgamma)
            + along(&up.beta, &down.beta, &gradient.dbeta)
    };
    let reference = total(&case.expected(None));
    assert!((reference / numeric - 1.0).abs() < 1e-3, "reference {reference}, differences {numeric}");
    let Actual { y, dx, dskip, dgamma, dbeta } = run(context, &case, Dtype::F32, true);
    let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect();
    let kernels = Expected { y: wide(y), dx: wide(dx), dskip: wide(dskip), dgamma: wide(dgamma), dbeta: wide(dbeta) };
    let kernels = total(&kernels);
    assert!((kernels / numeric - 1.0).abs() < 1e-3, "kernels {kernels}, differences {numeric}");
}

#[test]
fn misuse_is_a_typed_error() {
    let (context, _guard) = device();
    let problem = Problem::new(1, 4, 3, Dtype::F32, Some(0.01)).unwrap();
    let [x, short, three, six] = [12, 11, 3, 6].map(|len| context.upload_f32(&vec![0.0; len]).unwrap());
    let norm = Norm { statistics: &six, gamma: &three, beta: &three };
    for [a, b, c] in [[&short, &x, &x], [&x, &short, &x], [&x, &x, &short]] {
        let forward = instance_norm::apply_onto(context, &problem, a, &norm, b, c);
        assert!(matches!(forward, Err(KernelError::Shape { .. })));
        let backward = instance_norm::gradient_parts_onto(context, &problem, a, &norm, b, c);
        assert!(matches!(backward, Err(KernelError::Shape { .. })));
    }
    assert_no_device_panic();
}
