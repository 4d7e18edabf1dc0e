//! Convolutions of f16 and bf16 activations, on tensor cores where the device has them, against an f64 loop over the same
//! rounded numbers. Each result may differ by the error bound of an f32 sum, and by one rounding to its own type.

use crate::common::convolution::Case;
use crate::common::{assert_no_device_panic, device, is_slow, uniform};
use voxgrad::kernels::conv3d::{Pass, Policy, Problem, Route};
use voxgrad::kernels::{Buffer, Context, Dtype, conv_transpose3d, conv3d, elementwise};

/// The types that the device under test stores.
fn types(context: &Context) -> Vec<Dtype> {
    let caps = context.caps();
    let types: Vec<Dtype> = [(Dtype::F16, caps.f16), (Dtype::Bf16, caps.bf16)]
        .into_iter()
        .filter_map(|(dtype, there)| there.then_some(dtype))
        .collect();
    if types.is_empty() {
        eprintln!("skipped: neither f16 nor bf16 on this device");
    }
    types
}

fn rounded(values: Vec<f32>, dtype: Dtype) -> Vec<f32> {
    let round = |v: f32| match dtype {
        Dtype::F16 => half::f16::from_f32(v).to_f32(),
        Dtype::Bf16 => half::bf16::from_f32(v).to_f32(),
        _ => v,
    };
    values.into_iter().map(round).collect()
}

/// A buffer of `dtype` with these values, which it holds exactly.
fn put(context: &Context, values: &[f32], dtype: Dtype) -> Buffer {
    let exact = context.upload_f32(values).unwrap();
    let buffer = context.empty(values.len(), dtype).unwrap();
    elementwise::cast(context, &exact, &buffer).unwrap();
    buffer
}

fn get(context: &Context, buffer: &Buffer) -> Vec<f32> {
    let wide = context.empty(buffer.len(), Dtype::F32).unwrap();
    elementwise::cast(context, buffer, &wide).unwrap();
    let values = context.download_f32(&wide).unwrap();
    assert_no_device_panic();
    values
}

/// A sum of products in f64: its value, the sum of their magnitudes, and how many there are.
#[derive(Clone, Copy, Default)]
struct Sum {
    value: f64,
    magnitude: f64,
    terms: u32,
}

impl Sum {
    fn add(&mut self, a: f32, b: f32) {
        let product = f64::from(a) * f64::from(b);
        self.value += product;
        self.magnitude += product.abs();
        self.terms += 1;
    }
}

fn assert_within_bounds(what: &str, actual: &[f32], expected: &[Sum], dtype: Dtype) {
    // Half a unit in the last place of the type that the result is stored in, and its smallest number.
    let (rounding, smallest) = match dtype {
        Dtype::F16 => (2f64.powi(-11), 2f64.powi(-25)),
        Dtype::Bf16 => (2f64.powi(-8), 0.0),
        _ => (2f64.powi(-24), 0.0),
    };
    assert_eq!(actual.len(), expected.len(), "{what}: length");
    for (i, (&a, e)) in actual.iter().zip(expected).enumerate() {
        let sum = f64::from(e.terms + 1) * 2f64.powi(-23) * e.magnitude;
        let bound = sum + rounding * (e.value.abs() + sum) + smallest;
        let error = (f64::from(a) - e.value).abs();
        assert!(error <= bound, "{what}[{i}]: {a} instead of {}, off by {error:.1e}, allowed {bound:.1e}", e.value);
    }
}

fn nan(context: &Context, len: usize, dtype: Dtype) -> Buffer {
    let buffer = context.empty(len, dtype).unwrap();
    elementwise::fill(context, &buffer, f32::NAN).unwrap();
    buffer
}

fn check(case: &Case) {
    let (context, _guard) = device();
    for dtype in types(context) {
        check_type(context, case, dtype);
    }
}

fn check_type(context: &Context, case: &Case, dtype: Dtype) {
    let name = format!("{dtype:?} {case:?}");
    let (ca, cb, co) = case.channels;
    let mut problem = conv3d::Problem::new(case.batch, case.dims, ca, co, case.kernel, case.stride).unwrap();
    if cb > 0 {
        problem = problem.with_second_input(cb).unwrap();
    }
    let random = |seed, len| rounded(uniform(seed, len), dtype);
    let (xa, xb) = (random(1, problem.input_len()), random(2, problem.second_len()));
    let (w, dy) = (random(3, problem.weight_len()), random(5, problem.output_len()));
    let bias = uniform(4, co);

    let x = |position: usize, c: usize| if c < ca { xa[position * ca + c] } else { xb[position * cb + c - ca] };
    let mut y_ref = vec![Sum::default(); dy.len()];
    y_ref.iter_mut().enumerate().for_each(|(i, sum)| sum.add(bias[i % co], 1.0));
    let mut dx_ref = [vec![Sum::default(); xa.len()], vec![Sum::default(); xb.len()]];
    let mut dw_ref = vec![Sum::default(); w.len()];
    case.for_each_product(|input, output, tap| {
        for c in 0..ca + cb {
            for o in 0..co {
                let (i_w, i_y) = ((tap * (ca + cb) + c) * co + o, output * co + o);
                y_ref[i_y].add(x(input, c), w[i_w]);
                dw_ref[i_w].add(x(input, c), dy[i_y]);
                let dx = if c < ca { &mut dx_ref[0][input * ca + c] } else { &mut dx_ref[1][input * cb + c - ca] };
                dx.add(dy[i_y], w[i_w]);
            }
        }
    });

    let (w, bias) = (context.upload_f32(&w).unwrap(), context.upload_f32(&bias).unwrap());
    let (xa, dy) = (put(context, &xa, dtype), put(context, &dy, dtype));
    let xb = (cb > 0).then(|| put(context, &xb, dtype));
    let y = nan(context, problem.output_len(), dtype);
    conv3d::forward(context, &problem, &xa, xb.as_ref(), &w, Some(&bias), &y).unwrap();
    assert_within_bounds(&format!("{name}: y"), &get(context, &y), &y_ref, dtype);

    let dxa = nan(context, problem.input_len(), dtype);
    let dxb = (cb > 0).then(|| nan(context, problem.second_len(), dtype));
    conv3d::backward_data(context, &problem, &w, &dy, &dxa, dxb.as_ref()).unwrap();
    assert_within_bounds(&format!("{name}: dx"), &get(context, &dxa), &dx_ref[0], dtype);
    if let Some(dxb) = dxb {
        assert_within_bounds(&format!("{name}: second dx"), &get(context, &dxb), &dx_ref[1], dtype);
    }

    let dw = nan(context, problem.weight_len(), Dtype::F32);
    conv3d::backward_weight(context, &problem, &xa, xb.as_ref(), &dy, &dw).unwrap();
    assert_within_bounds(&format!("{name}: dw"), &get(context, &dw), &dw_ref, Dtype::F32);
}

#[test]
fn tensor_cores_are_used_where_they_are() {
    let (context, _guard) = device();
    let caps = context.caps();
    let problem = |ci, co| conv3d::Problem::new(1, [4; 3], ci, co, [3; 3], [1; 3]).unwrap();
    let rule = Policy::default();
    let route = |problem: &Problem, dtype| Route::choose(problem, Pass::Forward, dtype, caps, &rule);
    for dtype in [Dtype::F16, Dtype::Bf16] {
        let tile = (caps.tensor_cores.iter()).any(|t| t.input == dtype.elem() && t.accumulator == Dtype::F32.elem());
        assert_eq!(route(&problem(32, 32), dtype) == Route::TensorCores, tile, "{dtype:?}");
        assert_ne!(route(&problem(1, 32), dtype), Route::TensorCores);
    }
    assert_ne!(route(&problem(32, 32), Dtype::F32), Route::TensorCores);
}

fn check_transposed(batch: usize, dims: [usize; 3], ci: usize, co: usize, stride: [usize; 3]) {
    let (context, _guard) = device();
    for dtype in types(context) {
        let name = format!("{dtype:?} {batch}x{dims:?} {ci}->{co} stride {stride:?}");
        let problem = conv_transpose3d::Problem::new(batch, dims, ci, co, stride).unwrap();
        let random = |seed, len| rounded(uniform(seed, len), dtype);
        let (x, w) = (random(1, problem.input_len()), random(2, problem.weight_len()));
        let (dy, bias) = (random(4, problem.output_len()), uniform(3, co));
        let mut y_ref = vec![Sum::default(); dy.len()];
        y_ref.iter_mut().enumerate().for_each(|(i, sum)| sum.add(bias[i % co], 1.0));
        let (mut dx_ref, mut dw_ref) = (vec![Sum::default(); x.len()], vec![Sum::default(); w.len()]);
        // Read as a strided convolution from the output to the input, without padding.
        let out = problem.out_dims();
        for position in 0..batch * out.iter().product::<usize>() {
            let (w_o, rest) = (position % out[2], position / out[2]);
            let (h_o, rest) = (rest % out[1], rest / out[1]);
            let (d_o, n) = (rest % out[0], rest / out[0]);
            let i = ((n * dims[0] + d_o / stride[0]) * dims[1] + h_o / stride[1]) * dims[2] + w_o / stride[2];
            let k = ((d_o % stride[0]) * stride[1] + h_o % stride[1]) * stride[2] + w_o % stride[2];
            for c in 0..ci {
                for o in 0..co {
                    let (i_w, i_y, i_x) = ((k * ci + c) * co + o, position * co + o, i * ci + c);
                    y_ref[i_y].add(x[i_x], w[i_w]);
                    dx_ref[i_x].add(dy[i_y], w[i_w]);
                    dw_ref[i_w].add(x[i_x], dy[i_y]);
                }
            }
        }
        let (w, bias) = (context.upload_f32(&w).unwrap(), context.upload_f32(&bias).unwrap());
        let (x, dy) = (put(context, &x, dtype), put(context, &dy, dtype));
        let y = nan(context, y_ref.len(), dtype);
        conv_transpose3d::forward(context, &problem, &x, &w, Some(&bias), &y).unwrap();
        assert_within_bounds(&format!("{name}: y"), &get(context, &y), &y_ref, dtype);
        let dx = nan(context, dx_ref.len(), dtype);
        conv_transpose3d::backward_data(context, &problem, &w, &dy, &dx).unwrap();
        assert_within_bounds(&format!("{name}: dx"), &get(context, &dx), &dx_ref, dtype);
        let dw = nan(context, dw_ref.len(), Dtype::F32);
        conv_transpose3d::backward_weight(context, &problem, &x, &dy, &dw).unwrap();
        assert_within_bounds(&format!("{name}: dw"), &get(context, &dw), &dw_ref, Dtype::F32);
    }
}

#[test]
fn plain_shapes() {
    check(&Case { batch: 1, dims: [3, 4, 5], channels: (8, 0, 8), kernel: [3; 3], stride: [1; 3] });
    check(&Case { batch: 2, dims: [4, 4, 4], channels: (16, 0, 16), kernel: [1; 3], stride: [1; 3] });
}

#[test]
fn kernels_and_strides_differ_along_the_axes() {
    for kernel in [[1, 3, 3], [3, 1, 3], [3, 3, 3], [1, 1, 1]] {
        for stride in [[1, 2, 2], [2, 2, 2], [2, 1, 1]] {
            check(&Case { batch: 2, dims: [3, 5, 4], channels: (8, 0, 12), kernel, stride });
        }
    }
}

#[test]
fn channels_are_no_multiple_of_a_tile() {
    for (ci, co) in [(1, 32), (4, 8), (5, 7), (9, 24), (12, 20), (33, 17), (32, 3), (24, 40)] {
        check(&Case { batch: 1, dims: [2, 3, 5], channels: (ci, 0, co), kernel: [3; 3], stride: [1; 3] });
    }
}

#[test]
fn two_inputs_are_read_as_their_concatenation() {
    for (ca, cb, co) in [(8, 8, 8), (16, 8, 12), (5, 9, 8)] {
        for stride in [[1, 1, 1], [2, 1, 2]] {
            check(&Case { batch: 2, dims: [2, 3, 4], channels: (ca, cb, co), kernel: [3, 3, 3], stride });
        }
    }
}

#[test]
fn many_blocks_and_parts() {
    check(&Case { batch: 2, dims: [4, 7, 9], channels: (20, 0, 72), kernel: [3, 1, 3], stride: [1; 3] });
    // Enough voxels that the gradient of the weights is summed in parts.
    let width = if is_slow() { 12 } else { 24 };
    check(&Case { batch: 2, dims: [16, 24, width], channels: (8, 0, 8), kernel: [1, 1, 1], stride: [1; 3] });
}

#[test]
fn transposed_convolutions() {
    for (ci, co) in [(8, 8), (16, 8), (12, 20), (3, 5)] {
        for stride in [[2, 2, 2], [1, 2, 2]] {
            check_transposed(2, [2, 3, 3], ci, co, stride);
        }
    }
}
