//! Winograd's convolution beside the direct one, both against a plain f64 loop over the definition: the error of the
//! former may be no more than four times the latter's.

use crate::common::{device, is_slow, read, uniform};
use voxgrad::kernels::conv3d::{self, Pass, Policy, Problem, Route};
use voxgrad::kernels::{Buffer, Caps, Context, Dtype};

struct Case {
    batch: usize,
    dims: [usize; 3],
    channels: (usize, usize, usize), // first input, second input, output
    kernel: [usize; 3],
}

impl Case {
    fn problem(&self) -> Problem {
        let (first, second, out) = self.channels;
        let problem = Problem::new(self.batch, self.dims, first, out, self.kernel, [1; 3]).unwrap();
        if second > 0 { problem.with_second_input(second).unwrap() } else { problem }
    }

    /// Calls `f(position of the input, of the output, tap)` for every product of one channel pair.
    fn for_each_product(&self, mut f: impl FnMut(usize, usize, usize)) {
        let [kd, kh, kw] = self.kernel;
        let pad = self.kernel.map(|k| (k - 1) / 2);
        for n in 0..self.batch {
            for (o, out) in positions(self.dims).enumerate() {
                for (tap, k) in positions([kd, kh, kw]).enumerate() {
                    let i: [usize; 3] = std::array::from_fn(|a| (out[a] + k[a]).wrapping_sub(pad[a]));
                    if (0..3).all(|a| i[a] < self.dims[a]) {
                        let [_, height, width] = self.dims;
                        let voxels = self.dims.iter().product::<usize>();
                        f(n * voxels + (i[0] * height + i[1]) * width + i[2], n * voxels + o, tap);
                    }
                }
            }
        }
    }
}

fn positions(dims: [usize; 3]) -> impl Iterator<Item = [usize; 3]> {
    (0..dims[0]).flat_map(move |d| (0..dims[1]).flat_map(move |h| (0..dims[2]).map(move |w| [d, h, w])))
}

/// What a convolution and its gradients give.
struct Results {
    y: Vec<f32>,
    y_without_bias: Vec<f32>,
    dx: Vec<f32>,
    second_dx: Vec<f32>,
    dw: Vec<f32>,
}

struct Inputs {
    x: Buffer,
    second: Option<Buffer>,
    w: Buffer,
    bias: Buffer,
    dy: Buffer,
}

const CANARY: f32 = 123.5;

/// Runs `f` on a buffer full of NaN and returns what it wrote; nothing behind the buffer may be touched.
fn written(context: &Context, len: usize, f: impl FnOnce(&Buffer)) -> Vec<f32> {
    let mut values = vec![f32::NAN; len];
    values.extend([CANARY; 64]);
    let whole = context.upload_f32(&values).unwrap();
    f(&whole.part(0, len).unwrap());
    let mut values = read(context, &whole);
    assert!(values.split_off(len).iter().all(|&v| v == CANARY), "written behind the end of a buffer");
    values
}

fn run(context: &Context, problem: &Problem, inputs: &Inputs) -> Results {
    let Inputs { x, second, w, bias, dy } = inputs;
    let second = second.as_ref();
    let forward = |bias: Option<&Buffer>| {
        written(context, problem.output_len(), |y| {
            conv3d::forward(context, problem, x, second, w, bias, y).unwrap();
        })
    };
    let mut second_dx = Vec::new();
    let dx = written(context, problem.input_len(), |dx| {
        second_dx = written(context, problem.second_len(), |second_dx| {
            let second_dx = (problem.second_len() > 0).then_some(second_dx);
            conv3d::backward_data(context, problem, w, dy, dx, second_dx).unwrap();
        });
    });
    let dw = written(context, problem.weight_len(), |dw| {
        conv3d::backward_weight(context, problem, x, second, dy, dw).unwrap();
    });
    Results { y: forward(Some(bias)), y_without_bias: forward(None), dx, second_dx, dw }
}

/// Norm-wise relative error.
fn error(actual: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let square: f64 = actual.iter().zip(expected).map(|(&a, &e)| (f64::from(a) - e).powi(2)).sum();
    let norm: f64 = expected.iter().map(|e| e * e).sum();
    assert!(square.is_finite(), "not finite, or not everything was written");
    (square / norm.max(1e-30)).sqrt()
}

const PASSES: [Pass; 3] = [Pass::Forward, Pass::DataGradient, Pass::WeightGradient];

/// The context on which all passes of the problem go by Winograd's route, also those for which the rule prefers another; `None`,
/// and says why, where the device or the shape has none.
fn by_winograd(context: &Context, name: &str, problem: &Problem) -> Option<Context> {
    let mut policy = Policy::default();
    for pass in PASSES {
        if !Route::applicable(problem, pass, Dtype::F32, context.caps()).contains(&Route::Winograd) {
            eprintln!("skipped: {name}: Winograd's kernels are for CPUs, and for channels that are multiples of 8");
            return None;
        }
        policy.choose(problem.clone(), pass, Dtype::F32, Route::Winograd);
    }
    Some(policy.on(context))
}

fn check(case: &Case) {
    let (context, _guard) = device();
    let problem = case.problem();
    let name = format!("batch {} {:?} channels {:?} {:?}", case.batch, case.dims, case.channels, case.kernel);
    let Some(chosen) = by_winograd(context, &name, &problem) else { return };
    let (ca, cb, co) = case.channels;
    let ci = ca + cb;
    let (xa, xb) = (uniform(1, problem.input_len()), uniform(2, problem.second_len()));
    let w = uniform(3, problem.weight_len());
    let bias = uniform(4, co);
    let dy = uniform(5, problem.output_len());

    // The reference, on the channels of both inputs side by side.
    let wide = |v: &[f32]| -> Vec<f64> { v.iter().map(|&v| f64::from(v)).collect() };
    let voxels = case.batch * case.dims.iter().product::<usize>();
    let x: Vec<f64> = (0..voxels * ci)
        .map(|i| (i / ci, i % ci))
        .map(|(voxel, c)| f64::from(if c < ca { xa[voxel * ca + c] } else { xb[voxel * cb + c - ca] }))
        .collect();
    let (w64, dy64) = (wide(&w), wide(&dy));
    let mut y_ref = vec![0.0; problem.output_len()];
    let mut dx_ref = vec![0.0; x.len()];
    let mut dw_ref = vec![0.0; w.len()];
    case.for_each_product(|input, output, tap| {
        let y = &mut y_ref[output * co..][..co];
        let dy = &dy64[output * co..][..co];
        for c in 0..ci {
            let x = x[input * ci + c];
            let at = (tap * ci + c) * co;
            let (w, dw) = (&w64[at..][..co], &mut dw_ref[at..][..co]);
            let mut sum = 0.0;
            for o in 0..co {
                y[o] += x * w[o];
                dw[o] += x * dy[o];
                sum += dy[o] * w[o];
            }
            dx_ref[input * ci + c] += sum;
        }
    });
    let with_bias: Vec<f64> = y_ref.iter().enumerate().map(|(i, y)| y + f64::from(bias[i % co])).collect();
    let of_input = |from: usize, to: usize| -> Vec<f64> {
        dx_ref.chunks(ci).flat_map(|channels| &channels[from..to]).copied().collect()
    };

    let up = |v: &[f32]| context.upload_f32(v).unwrap();
    let inputs = Inputs { x: up(&xa), second: (cb > 0).then(|| up(&xb)), w: up(&w), bias: up(&bias), dy: up(&dy) };
    let winograd = run(&chosen, &problem, &inputs);
    let direct = run(&Policy::default().with_exact(true).on(context), &problem, &inputs);
    for (what, winograd, direct, expected) in [
        ("y", &winograd.y, &direct.y, &with_bias),
        ("y without bias", &winograd.y_without_bias, &direct.y_without_bias, &y_ref),
        ("dx", &winograd.dx, &direct.dx, &of_input(0, ca)),
        ("second dx", &winograd.second_dx, &direct.second_dx, &of_input(ca, ci)),
        ("dw", &winograd.dw, &direct.dw, &dw_ref),
    ] {
        // The other algorithm rounds otherwise: equal bits of more than a few sums are the same one twice.
        assert!(expected.len() < 256 || winograd != direct, "{name}: {what}: the same algorithm twice");
        let (winograd, direct) = (error(winograd, expected), error(direct, expected));
        println!("{name}: {what} {winograd:.2e}, direct {direct:.2e}");
        assert!(winograd <= 4.0 * direct + 1e-12, "{name}: {what}: {winograd:.3e} where direct has {direct:.3e}");
        assert!(direct < 2e-6, "{name}: {what}: direct {direct:.3e}");
    }
}

#[test]
fn ragged_sizes() {
    for dims in [[1, 1, 1], [2, 3, 1], [1, 2, 5], [3, 5, 7], [4, 4, 4], [5, 2, 13]] {
        for kernel in [[3, 3, 3], [1, 3, 3]] {
            check(&Case { batch: 2, dims, channels: (32, 0, 32), kernel });
        }
    }
}

#[test]
fn every_kind_of_channel_count() {
    for (ci, co) in [(8, 8), (8, 16), (24, 8), (16, 48), (32, 24), (40, 80), (64, 32)] {
        check(&Case { batch: 1, dims: [3, 4, 5], channels: (ci, 0, co), kernel: [3, 3, 3] });
    }
}

#[test]
fn two_inputs_are_read_as_their_concatenation() {
    for channels in [(8, 8, 8), (16, 16, 16), (16, 8, 32), (32, 32, 32)] {
        for kernel in [[3, 3, 3], [1, 3, 3]] {
            check(&Case { batch: 2, dims: [3, 4, 7], channels, kernel });
        }
    }
}

#[test]
fn shapes_of_real_networks() {
    if is_slow() {
        return eprintln!("skipped on a software device: shapes of real networks");
    }
    check(&Case { batch: 1, dims: [32, 32, 36], channels: (32, 0, 32), kernel: [3, 3, 3] });
    check(&Case { batch: 2, dims: [10, 14, 10], channels: (32, 32, 32), kernel: [3, 3, 3] });
    check(&Case { batch: 2, dims: [8, 8, 8], channels: (64, 0, 128), kernel: [3, 3, 3] });
    check(&Case { batch: 1, dims: [8, 32, 33], channels: (32, 0, 32), kernel: [1, 3, 3] });
    check(&Case { batch: 2, dims: [4, 5, 4], channels: (256, 0, 320), kernel: [3, 3, 3] });
}

#[test]
fn results_repeat_bit_for_bit() {
    let (context, _guard) = device();
    let case = Case { batch: 2, dims: [6, 7, 9], channels: (16, 16, 32), kernel: [3, 3, 3] };
    let problem = case.problem();
    let Some(context) = &by_winograd(context, "repetition", &problem) else { return };
    let up = |seed, len| context.upload_f32(&uniform(seed, len)).unwrap();
    let inputs = Inputs {
        x: up(1, problem.input_len()),
        second: Some(up(2, problem.second_len())),
        w: up(3, problem.weight_len()),
        bias: up(4, 32),
        dy: up(5, problem.output_len()),
    };
    let (first, again) = (run(context, &problem, &inputs), run(context, &problem, &inputs));
    assert_eq!(first.y, again.y);
    assert_eq!(first.dx, again.dx);
    assert_eq!(first.second_dx, again.second_dx);
    assert_eq!(first.dw, again.dw);
}

#[test]
fn the_route_is_chosen_by_shape_type_and_device() {
    let (context, _guard) = device();
    let cpu = Caps { cores: Some(2), lanes: 16, registers: 32, tensor_cores: vec![], ..context.caps().clone() };
    let rule = Policy::default();
    let gpu = Caps { cores: None, lanes: 4, max_units: 1024, shared_memory: 0, ..cpu.clone() };
    let sharing = Caps { shared_memory: 48 << 10, ..gpu.clone() };
    let of = |problem: &Problem, dtype, caps: &Caps| Route::choose(problem, Pass::Forward, dtype, caps, &rule);
    let problem = Problem::new(1, [16; 3], 32, 32, [3; 3], [1; 3]).unwrap();
    assert_eq!(of(&problem, Dtype::F32, &cpu), Route::Winograd);
    assert_eq!(of(&problem, Dtype::F16, &cpu), Route::Direct);
    assert_eq!(of(&problem, Dtype::F32, &gpu), Route::Direct);
    assert_eq!(of(&problem, Dtype::F32, &sharing), Route::Tiled);
    for (channels, kernel, stride) in
        [(32, [3; 3], [2; 3]), (32, [1; 3], [1; 3]), (32, [3, 3, 1], [1; 3]), (4, [3; 3], [1; 3])]
    {
        let problem = Problem::new(1, [16; 3], channels, 32, kernel, stride).unwrap();
        assert_eq!(of(&problem, Dtype::F32, &cpu), Route::Direct, "{channels} {kernel:?} {stride:?}");
    } // The lowest stages: gradients are directly computed, the forward pass is not.
    let lowest = Problem::new(1, [5, 7, 5], 256, 256, [3; 3], [1; 3]).unwrap();
    let of_pass = |pass| Route::choose(&lowest, pass, Dtype::F32, &cpu, &rule);
    assert_eq!(PASSES.map(of_pass), [Route::Winograd, Route::Direct, Route::Direct]);
}
