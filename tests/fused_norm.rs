//! Convolutions that normalise what they load, take gradients back through a norm while they load them, and take the sums of a
//! norm's gradient from what they store: against the same operations one by one.

use crate::common::{assert_no_device_panic, device, read, uniform};
use crate::fusion::{CUBE, Case, ONE, cases, get, put, types};
use voxgrad::kernels::conv3d::fused::{self, NormBefore};
use voxgrad::kernels::conv3d::{self, Pass, Problem};
use voxgrad::kernels::instance_norm::{self, Coefficients, Norm, NormGradient, Operand};
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

    fn empty(&self, context: &Context) -> Buffer {
        put(context, &vec![f32::NAN; self.problem.elements()], self.raw.dtype())
    }

    fn activated(&self, context: &Context) -> Buffer {
        let y = self.empty(context);
        instance_norm::apply(context, &self.problem, &self.raw, &self.norm(), &y).unwrap();
        y
    }

    fn operand(&self) -> Operand<'_> {
        Operand::Normalised { raw: &self.raw, by: &self.coefficients }
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

/// A convolution between norms: those that have put out its inputs, and the one behind its output.
struct Between {
    name: String,
    dtype: Dtype,
    problem: Problem,
    weights: Buffer,
    inputs: Vec<NormOf>,
    output: NormOf,
    /// Of what the norm behind puts out.
    gradient: Buffer,
}

impl Between {
    fn new(context: &Context, case: &Case, dtype: Dtype) -> Self {
        let (problem, (first, second, channels)) = (case.problem(), case.channels);
        let voxels = |dims: [usize; 3]| dims.iter().product::<usize>();
        let norm = |seed, dims, channels| NormOf::new(context, seed, case.batch, voxels(dims), channels, dtype);
        let inputs = [(1, first), (2, second)].into_iter().filter(|&(_, channels)| channels > 0);
        Self {
            name: format!("{case:?} {dtype:?}"),
            dtype,
            weights: context.upload_f32(&uniform(3, problem.weight_len())).unwrap(),
            inputs: inputs.map(|(seed, channels)| norm(seed, case.dims, channels)).collect(),
            output: norm(4, problem.out_dims(), channels),
            gradient: put(context, &uniform(5, problem.output_len()), dtype),
            problem,
        }
    }

    fn activated(&self, context: &Context) -> Vec<Buffer> {
        self.inputs.iter().map(|input| input.activated(context)).collect()
    }

    /// The gradient of the convolution's output, one operation after the other, and what loads it.
    fn output_gradient(&self, context: &Context) -> (Buffer, Coefficients) {
        let Self { output, gradient, .. } = self;
        let (problem, raw, norm, sums) = (&output.problem, &output.raw, &output.norm(), Sums::new(context, output));
        instance_norm::backward_sums(context, problem, raw, norm, gradient, &sums.0[0], &sums.gradient()).unwrap();
        let dy = output.empty(context);
        instance_norm::backward_apply(context, problem, raw, norm, gradient, &sums.0[0], &dy).unwrap();
        let parts = instance_norm::gradient_parts(context, problem, raw, norm, gradient).unwrap();
        let by = instance_norm::gradient_coefficients(context, problem, parts, norm, &sums.gradient()).unwrap();
        (dy, by)
    }

    /// Asserts that two buffers differ by no more than the rounding of the type, norm-wise: what is loaded has the bits of what
    /// would have been stored, but for what a compiler contracts. `times`: where sums are long.
    fn close(&self, context: &Context, what: &str, times: f64, actual: &Buffer, expected: &Buffer) {
        let unit = match self.dtype {
            Dtype::F16 => 2e-4,
            Dtype::Bf16 => 2e-3,
            _ => 1e-6,
        };
        let [actual, expected] = [actual, expected].map(|buffer| match buffer.dtype() {
            Dtype::F32 => read(context, buffer),
            _ => get(context, buffer),
        });
        let size = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
        let apart = size(&mut actual.iter().zip(&expected).map(|(a, e)| a - e));
        let apart = (apart / size(&mut expected.iter().copied()).max(1e-30)).sqrt();
        eprintln!("{}: {what} differ by {apart:.1e}", self.name);
        assert!(apart < times * unit, "{}: {what} differ by {apart:.1e}", self.name);
    }
}

/// Calls `check` for every convolution whose `pass` loads fused on this device.
fn for_each(pass: Pass, mut check: impl FnMut(&Context, &Between)) {
    let (context, _guard) = device();
    let mut checked = 0;
    for case in cases() {
        for dtype in types(context) {
            if fused::loads(context, &case.problem(), pass, dtype) {
                check(context, &Between::new(context, &case, dtype));
                checked += 1;
            }
        }
    }
    assert!(checked > 0 || context.caps().cores.is_none(), "nothing was checked");
    assert_no_device_panic();
}

#[test]
fn a_convolution_normalises_what_it_loads() {
    for_each(Pass::Forward, |context, between| {
        let Between { problem, weights, inputs, .. } = between;
        let bias = context.upload_f32(&uniform(6, problem.channels_out())).unwrap();
        let activated = between.activated(context);
        let [expected, actual] = [0, 1].map(|_| between.output.empty(context));
        let (x, second) = (&activated[0], activated.get(1));
        conv3d::forward(context, problem, x, second, weights, Some(&bias), &expected).unwrap();

        let (stored, loaded) = (Operand::Stored(x), inputs[0].operand());
        let behind_stored = second.map(Operand::Stored);
        let behind_loaded = inputs.get(1).map(NormOf::operand);
        for (x, second) in [(loaded, behind_stored), (stored, behind_loaded), (loaded, behind_loaded)] {
            fused::forward(context, problem, x, second, weights, Some(&bias), &actual, true).unwrap();
            between.close(context, "outputs", 1.0, &actual, &expected);
        }
    });
}

#[test]
fn a_weight_gradient_loads_through_norms_on_both_sides() {
    for_each(Pass::WeightGradient, |context, between| {
        let Between { problem, inputs, output, gradient, .. } = between;
        let (activated, (dy, by)) = (between.activated(context), between.output_gradient(context));
        let [expected, actual] = [0, 1].map(|_| context.upload_f32(&vec![f32::NAN; problem.weight_len()]).unwrap());
        conv3d::backward_weight(context, problem, &activated[0], activated.get(1), &dy, &expected).unwrap();

        let loaded = Operand::NormGradient { gradient, raw: &output.raw, by: &by };
        let second = inputs.get(1).map(NormOf::operand);
        fused::backward_weight(context, problem, inputs[0].operand(), second, loaded, &actual).unwrap();
        between.close(context, "weight gradients", 5.0, &actual, &expected);
    });
}

#[test]
fn a_data_gradient_loads_through_a_norm_and_takes_the_sums_of_the_one_before() {
    for_each(Pass::DataGradient, |context, between| {
        let Between { problem, weights, inputs, output, gradient, .. } = between;
        let (dy, by) = between.output_gradient(context);
        let empty = || inputs.iter().map(|input| input.empty(context)).collect::<Vec<_>>();
        let (expected, actual) = (empty(), empty());
        conv3d::backward_data(context, problem, weights, &dy, &expected[0], expected.get(1)).unwrap();

        let loaded = Operand::NormGradient { gradient, raw: &output.raw, by: &by };
        let (x, dx) = (&inputs[0], &actual[0]);
        let before = Some(NormBefore { raw: &x.raw, by: &x.coefficients });
        let parts = fused::backward_data(context, problem, weights, loaded, dx, actual.get(1), before).unwrap();
        for (actual, expected) in actual.iter().zip(&expected) {
            between.close(context, "data gradients", 1.0, actual, expected);
        }

        let Some(parts) = parts else { return };
        if problem.in_dims() == ONE && between.dtype != Dtype::F32 {
            // What comes back through the norm of one voxel is nothing but rounding.
            return;
        }
        let [passed, taken] = [0, 1].map(|_| Sums::new(context, x));
        let (norm, to) = (&x.norm(), passed.gradient());
        instance_norm::backward_sums(context, &x.problem, &x.raw, norm, dx, &passed.0[0], &to).unwrap();
        let to = taken.gradient();
        instance_norm::backward_sums_of_parts(context, &x.problem, parts, norm, &taken.0[0], &to).unwrap();
        for (passed, taken) in passed.0.iter().zip(&taken.0) {
            between.close(context, "sums", 10.0, taken, passed);
        }
    });
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let (context, _guard) = device();
    let problem = Problem::new(1, [3, 4, 5], 3, 5, CUBE, ONE).unwrap();
    let [x, other, output] = [3, 4, 5].map(|channels| NormOf::new(context, 1, 1, 60, channels, Dtype::F32));
    let [w, y] = [problem.weight_len(), problem.output_len()].map(|len| context.upload_f32(&vec![0.0; len]).unwrap());
    let forward = |x: Operand| fused::forward(context, &problem, x, None, &w, None, &y, false).unwrap_err();
    // Three channels: no kernel that normalises, on any device.
    let error = forward(x.operand());
    assert!(matches!(error, KernelError::Unsupported { .. }), "{error}");
    // Coefficients of another number of channels.
    let error = forward(Operand::Normalised { raw: &x.raw, by: &other.coefficients });
    assert!(matches!(error, KernelError::Shape { .. }), "{error}");
    // Those of a forward pass for a gradient.
    let dy = Operand::NormGradient { gradient: &y, raw: &output.raw, by: &output.coefficients };
    let dx = x.empty(context);
    let error = fused::backward_data(context, &problem, &w, dy, &dx, None, None).unwrap_err();
    assert!(matches!(error, KernelError::Shape { .. }), "{error}");
    assert_no_device_panic();
}
