//! 3D convolution against a plain f64 loop over the definition, in every mix of kernel and stride.

use crate::common::convolution::{Case, positions};
use crate::common::{assert_close, device, is_slow, read, uniform};
use voxgrad::kernels::conv3d::{self, Problem};
use voxgrad::kernels::{Buffer, Context, Dtype};

/// Kernel sums of up to some thousand products, f32 against f64.
const TOLERANCE: f64 = 2e-6;

fn check(case: &Case) {
    let (context, _guard) = device();
    let name = format!(
        "batch {} {:?} channels {:?} kernel {:?} stride {:?}",
        case.batch, case.dims, case.channels, case.kernel, case.stride
    );
    let (ca, cb, co, ci) = (case.channels.0, case.channels.1, case.channels.2, case.inputs());
    let mut problem = Problem::new(case.batch, case.dims, ca, co, case.kernel, case.stride).unwrap();
    if cb > 0 {
        problem = problem.with_second_input(cb).unwrap();
    }
    let voxels = case.batch * case.dims.iter().product::<usize>();
    let (xa, xb) = (uniform(1, voxels * ca), uniform(2, voxels * cb));
    let w = uniform(3, problem.weight_len());
    let b = uniform(4, co);
    let dy = uniform(5, problem.output_len());

    // The reference, channels of both inputs side by side.
    let x =
        |position: usize, c: usize| f64::from(if c < ca { xa[position * ca + c] } else { xb[position * cb + c - ca] });
    let mut y_ref: Vec<f64> = (0..problem.output_len()).map(|i| f64::from(b[i % co])).collect();
    let mut dxa_ref = vec![0.0; xa.len()];
    let mut dxb_ref = vec![0.0; xb.len()];
    let mut dw_ref = vec![0.0; w.len()];
    case.for_each_product(|input, output, tap| {
        for c in 0..ci {
            for o in 0..co {
                let (i_w, i_y) = ((tap * ci + c) * co + o, output * co + o);
                let (weight, gradient) = (f64::from(w[i_w]), f64::from(dy[i_y]));
                y_ref[i_y] += x(input, c) * weight;
                dw_ref[i_w] += x(input, c) * gradient;
                if c < ca {
                    dxa_ref[input * ca + c] += gradient * weight;
                } else {
                    dxb_ref[input * cb + c - ca] += gradient * weight;
                }
            }
        }
    });

    let up = |v: &[f32]| context.upload_f32(v).unwrap();
    let (xa, w, b, dy) = (up(&xa), up(&w), up(&b), up(&dy));
    let xb = (cb > 0).then(|| up(&xb));

    let y = guarded(context, problem.output_len());
    conv3d::forward(context, &problem, &xa, xb.as_ref(), &w, Some(&b), &y.0).unwrap();
    assert_close(&format!("{name}: y"), &y.read(context), &y_ref, TOLERANCE);

    let (dxa, dxb) = (guarded(context, problem.input_len()), guarded(context, problem.second_len()));
    conv3d::backward_data(context, &problem, &w, &dy, &dxa.0, (cb > 0).then_some(&dxb.0)).unwrap();
    assert_close(&format!("{name}: dx"), &dxa.read(context), &dxa_ref, TOLERANCE);
    if cb > 0 {
        assert_close(&format!("{name}: second dx"), &dxb.read(context), &dxb_ref, TOLERANCE);
    }

    let dw = guarded(context, problem.weight_len());
    conv3d::backward_weight(context, &problem, &xa, xb.as_ref(), &dy, &dw.0).unwrap();
    assert_close(&format!("{name}: dw"), &dw.read(context), &dw_ref, TOLERANCE);
}

/// A buffer full of NaN with 64 more elements behind it that nobody may touch.
struct Guarded(Buffer, Buffer);

const CANARY: f32 = 123.5;

fn guarded(context: &Context, len: usize) -> Guarded {
    let mut values = vec![f32::NAN; len];
    values.extend([CANARY; 64]);
    let whole = context.upload_f32(&values).unwrap();
    Guarded(whole.part(0, len).unwrap(), whole)
}

impl Guarded {
    fn read(&self, context: &Context) -> Vec<f32> {
        let mut values = read(context, &self.1);
        let behind = values.split_off(self.0.len());
        assert!(behind.iter().all(|&v| v == CANARY), "written behind the end of a buffer");
        values
    }
}

#[test]
fn every_mix_of_kernel_and_stride() {
    for kernel in positions([2, 2, 2]).map(|p| p.map(|k| 2 * k + 1)) {
        for stride in positions([2, 2, 2]).map(|p| p.map(|s| s + 1)) {
            check(&Case { batch: 2, dims: [4, 5, 7], channels: (3, 0, 4), kernel, stride });
        }
    }
}

#[test]
fn ragged_widths_meet_every_tile_edge() {
    for width in [1, 2, 3, 5, 6, 7, 11, 12, 13, 19] {
        check(&Case { batch: 1, dims: [2, 3, width], channels: (5, 0, 16), kernel: [3, 3, 3], stride: [1, 1, 1] });
        check(&Case { batch: 1, dims: [3, 2, width], channels: (2, 0, 8), kernel: [3, 3, 3], stride: [2, 2, 2] });
    }
}

#[test]
fn every_kind_of_channel_count() {
    // One input channel, one and three heads, odd counts, three vectors a tile, several blocks.
    for (ci, co) in [(1, 8), (4, 32), (32, 3), (8, 2), (8, 1), (7, 5), (12, 24), (16, 48), (20, 40), (9, 64)] {
        check(&Case { batch: 1, dims: [3, 4, 5], channels: (ci, 0, co), kernel: [3, 3, 3], stride: [1, 1, 1] });
    }
    check(&Case { batch: 2, dims: [3, 4, 9], channels: (32, 0, 3), kernel: [1, 1, 1], stride: [1, 1, 1] });
}

#[test]
fn two_inputs_are_read_as_their_concatenation() {
    for (ca, cb, co) in [(8, 8, 8), (16, 16, 16), (8, 4, 8), (3, 5, 4), (1, 2, 8)] {
        for stride in [[1, 1, 1], [2, 1, 2]] {
            check(&Case { batch: 2, dims: [3, 4, 7], channels: (ca, cb, co), kernel: [3, 3, 3], stride });
        }
    }
}

#[test]
fn shapes_of_real_networks() {
    if is_slow() {
        return eprintln!("skipped on a software device: shapes of real networks");
    }
    check(&Case { batch: 2, dims: [5, 7, 5], channels: (64, 0, 128), kernel: [3, 3, 3], stride: [1, 1, 1] });
    check(&Case { batch: 2, dims: [20, 28, 20], channels: (16, 0, 32), kernel: [3, 3, 3], stride: [2, 2, 2] });
    check(&Case { batch: 1, dims: [10, 32, 33], channels: (16, 16, 16), kernel: [1, 3, 3], stride: [1, 2, 2] });
}

#[test]
fn results_repeat_bit_for_bit() {
    let (context, _guard) = device();
    let problem = Problem::new(1, [4, 5, 6], 8, 16, [3, 3, 3], [1, 1, 1]).unwrap();
    let x = context.upload_f32(&uniform(1, problem.input_len())).unwrap();
    let dy = context.upload_f32(&uniform(2, problem.output_len())).unwrap();
    let run = || {
        let dw = context.empty(problem.weight_len(), Dtype::F32).unwrap();
        conv3d::backward_weight(context, &problem, &x, None, &dy, &dw).unwrap();
        read(context, &dw)
    };
    assert_eq!(run(), run());
}

#[test]
fn wrong_shapes_are_named() {
    let (context, _guard) = device();
    assert!(Problem::new(1, [4; 3], 1, 1, [2, 3, 3], [1; 3]).unwrap_err().to_string().contains("kernel"));
    assert!(Problem::new(1, [4; 3], 1, 1, [3; 3], [3, 1, 1]).unwrap_err().to_string().contains("stride"));
    assert!(Problem::new(1, [2048; 3], 1, 1, [3; 3], [1; 3]).unwrap_err().to_string().contains("smaller patch"));
    let problem = Problem::new(1, [2; 3], 1, 1, [3; 3], [1; 3]).unwrap();
    let (eight, two) = (context.upload_f32(&[0.0; 8]).unwrap(), context.upload_f32(&[0.0; 2]).unwrap());
    let w = context.upload_f32(&[0.0; 27]).unwrap();
    let error = conv3d::forward(context, &problem, &two, None, &w, None, &eight).unwrap_err();
    assert!(error.to_string().contains("input"), "{error}");
    let error = conv3d::forward(context, &problem, &eight, Some(&eight), &w, None, &eight).unwrap_err();
    assert!(error.to_string().contains("second input"), "{error}");
}
