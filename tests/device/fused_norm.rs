//! Convolutions that take the sums of a norm's gradient from what they store: against the pass over the stored gradient.

use crate::common::convolution::{CUBE, Case, ONE, cases, get, put, types};
use crate::common::{assert_no_device_panic, device, read, uniform};
use voxgrad::kernels::conv3d::{self, NormBefore, Problem};
use voxgrad::kernels::instance_norm::{self, Coefficients, Norm, NormGradient};
use voxgrad::kernels::{Buffer, Context, Dtype, KernelError};

/// An instance norm with leaky ReLU, and what it reads, on the device.
struct NormOf {
    problem: instance_norm::Problem,
    raw: Buffer,
    statistics: Buffer,
    gamma: Buffer,
    beta: Buffer,
    coefficients: Coefficients,
}

impl NormOf {
    /// Of `[batch, voxels, channels]` random values around 0.3; the shifts put the kink of the leaky ReLU at different places.
    fn new(context: &Context, seed: u64, batch: usize, voxels: usize, channels: usize, dtype: Dtype) -> Self {
        let problem = instance_norm::Problem::new(batch, voxels, channels, dtype, Some(0.01)).unwrap();
        let values: Vec<f32> = uniform(seed, problem.elements()).iter().map(|v| v + 0.3).collect();
        let raw = put(context, &values, dtype);
        let gamma: Vec<f32> = uniform(seed + 100, channels).iter().map(|v| 1.0 + 0.3 * v).collect();
        let [gamma, beta] = [gamma, uniform(seed + 200, channels)].map(|v| context.upload_f32(&v).unwrap());
        let statistics = context.empty(problem.statistics_len(), Dtype::F32).unwrap();
        let moments = instance_norm::moments(context, &problem, &raw).unwrap();
        let norm = Norm { statistics: &statistics, gamma: &gamma, beta: &beta };
        let coefficients = instance_norm::coefficients(context, &problem, moments, &norm).unwrap();
        Self { problem, raw, statistics, gamma, beta, coefficients }
    }

    fn norm(&self) -> Norm<'_> {
        Norm { statistics: &self.statistics, gamma: &self.gamma, beta: &self.beta }
    }

    fn before(&self) -> NormBefore<'_> {
        NormBefore { raw: &self.raw, by: &self.coefficients }
    }
}

/// Where the gradients of a norm go: sums, gamma, beta.
struct Sums([Buffer; 3]);

impl Sums {
    fn new(context: &Context, norm: &NormOf) -> Self {
        let channels = norm.gamma.len();
        let empty = |len| context.upload_f32(&vec![f32::NAN; len]).unwrap();
        Self([norm.problem.statistics_len(), channels, channels].map(empty))
    }

    fn gradient(&self) -> NormGradient<'_> {
        NormGradient { gamma: &self.0[1], beta: &self.0[2] }
    }
}

/// Whether sums were taken. The gradient itself has the same bits with and without.
fn check(context: &Context, case: &Case, dtype: Dtype) -> bool {
    let (problem, (first, second, _)) = (case.problem(), case.channels);
    let name = format!("{case:?} {dtype:?}");
    let norm = NormOf::new(context, 1, case.batch, case.dims.iter().product(), first, dtype);
    let w = context.upload_f32(&uniform(3, problem.weight_len())).unwrap();
    let dy = put(context, &uniform(5, problem.output_len()), dtype);
    let empty = |len| put(context, &vec![f32::NAN; len], dtype);
    let [expected, dx] = [0, 1].map(|_| empty(problem.input_len()));
    let [second_expected, second_dx] = [0, 1].map(|_| (second > 0).then(|| empty(problem.second_len())));
    conv3d::backward_data(context, &problem, &w, &dy, &expected, second_expected.as_ref()).unwrap();
    let before = norm.before();
    let second = second_dx.as_ref();
    let parts = conv3d::backward_data_with_sums(context, &problem, &w, &dy, &dx, second, before).unwrap();
    assert!(get(context, &dx) == get(context, &expected), "{name}: another gradient");
    for (actual, expected) in second_dx.iter().zip(&second_expected) {
        assert!(get(context, actual) == get(context, expected), "{name}: another second gradient");
    }

    let Some(parts) = parts else { return false };
    if case.dims == ONE && dtype != Dtype::F32 {
        // What comes back through the norm of one voxel is nothing but rounding.
        return true;
    }
    let [passed, taken] = [0, 1].map(|_| Sums::new(context, &norm));
    let to = passed.gradient();
    instance_norm::backward_sums(context, &norm.problem, &norm.raw, &norm.norm(), &dx, &passed.0[0], &to).unwrap();
    instance_norm::backward_sums_of_parts(context, &norm.problem, parts, &taken.0[0], &taken.gradient()).unwrap();
    let unit = match dtype {
        Dtype::F16 => 2e-4,
        Dtype::Bf16 => 2e-3,
        _ => 1e-6,
    };
    for (passed, taken) in passed.0.iter().zip(&taken.0) {
        let [passed, taken] = [passed, taken].map(|buffer| read(context, buffer));
        let size = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
        let apart = size(&mut taken.iter().zip(&passed).map(|(a, e)| a - e));
        let apart = (apart / size(&mut passed.iter().copied()).max(1e-30)).sqrt();
        eprintln!("{name}: sums differ by {apart:.1e}");
        assert!(apart < 10.0 * unit, "{name}: sums differ by {apart:.1e}");
    }
    true
}

#[test]
fn a_data_gradient_takes_the_sums_of_the_norm_before() {
    let (context, _guard) = device();
    let mut taken = 0;
    for case in cases() {
        for dtype in types(context) {
            taken += usize::from(check(context, &case, dtype));
        }
    }
    if taken == 0 {
        assert!(context.caps().cores.is_none(), "no kernel took sums");
        eprintln!("skipped: no kernel of this device takes sums");
    }
    assert_no_device_panic();
}

#[test]
fn a_norm_of_another_shape_is_refused() {
    let (context, _guard) = device();
    if context.caps().cores.is_none() {
        return eprintln!("skipped: a norm is looked at where a kernel takes its sums, which not every GPU's does");
    }
    let problem = Problem::new(1, [3, 4, 5], 16, 16, CUBE, ONE).unwrap();
    let [norm, other] = [16, 8].map(|channels| NormOf::new(context, 1, 1, 60, channels, Dtype::F32));
    let [w, y, dx] = [problem.weight_len(), problem.output_len(), problem.input_len()]
        .map(|len| context.upload_f32(&vec![0.0; len]).unwrap());
    for before in [other.before(), NormBefore { by: &other.coefficients, ..norm.before() }] {
        let error = conv3d::backward_data_with_sums(context, &problem, &w, &y, &dx, None, before).unwrap_err();
        assert!(matches!(error, KernelError::Shape { .. }), "{error}");
    }
    conv3d::backward_data_with_sums(context, &problem, &w, &y, &dx, None, norm.before()).unwrap();
    assert_no_device_panic();
}
