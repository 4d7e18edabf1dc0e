//! Transposed convolution against a plain f64 loop over the definition.

use crate::common::{assert_close, device, read, uniform};
use voxgrad::kernels::Dtype;
use voxgrad::kernels::conv_transpose3d::{self, Problem};

const TOLERANCE: f64 = 2e-6;

fn check(batch: usize, dims: [usize; 3], ci: usize, co: usize, stride: [usize; 3]) {
    let (context, _guard) = device();
    let name = format!("{batch}x{dims:?} {ci}->{co} stride {stride:?}");
    let problem = Problem::new(batch, dims, ci, co, stride).unwrap();
    let out = problem.out_dims();
    let x = uniform(1, problem.input_len());
    let w = uniform(2, problem.weight_len());
    let b = uniform(3, co);
    let dy = uniform(4, problem.output_len());
    let mut y_ref: Vec<f64> = (0..dy.len()).map(|i| f64::from(b[i % co])).collect();
    let (mut dx_ref, mut dw_ref) = (vec![0.0; x.len()], vec![0.0; w.len()]);
    for position in 0..batch * out.iter().product::<usize>() {
        let (w_o, rest) = (position % out[2], position / out[2]);
        let (h_o, rest) = (rest % out[1], rest / out[1]);
        let (d_o, n) = (rest % out[0], rest / out[0]);
        let i = ((n * dims[0] + d_o / stride[0]) * dims[1] + h_o / stride[1]) * dims[2] + w_o / stride[2];
        let k = ((d_o % stride[0]) * stride[1] + h_o % stride[1]) * stride[2] + w_o % stride[2];
        for c in 0..ci {
            for o in 0..co {
                let (i_w, i_y) = ((k * ci + c) * co + o, position * co + o);
                let (value, weight, gradient) = (f64::from(x[i * ci + c]), f64::from(w[i_w]), f64::from(dy[i_y]));
                y_ref[i_y] += value * weight;
                dx_ref[i * ci + c] += gradient * weight;
                dw_ref[i_w] += value * gradient;
            }
        }
    }
    let up = |v: &[f32]| context.upload_f32(v).unwrap();
    let (x, w, b, dy) = (up(&x), up(&w), up(&b), up(&dy));
    let y = up(&vec![f32::NAN; y_ref.len()]);
    conv_transpose3d::forward(context, &problem, &x, &w, Some(&b), &y).unwrap();
    assert_close(&format!("{name}: y"), &read(context, &y), &y_ref, TOLERANCE);
    let dx = context.empty(dx_ref.len(), Dtype::F32).unwrap();
    conv_transpose3d::backward_data(context, &problem, &w, &dy, &dx).unwrap();
    assert_close(&format!("{name}: dx"), &read(context, &dx), &dx_ref, TOLERANCE);
    let dw = context.empty(dw_ref.len(), Dtype::F32).unwrap();
    conv_transpose3d::backward_weight(context, &problem, &x, &dy, &dw).unwrap();
    assert_close(&format!("{name}: dw"), &read(context, &dw), &dw_ref, TOLERANCE);
}

#[test]
fn every_stride() {
    for s in 0..8 {
        let stride = [1 + s / 4, 1 + s / 2 % 2, 1 + s % 2];
        check(2, [2, 3, 5], 4, 8, stride);
    }
}

#[test]
fn every_kind_of_channel_count() {
    for (ci, co) in [(1, 1), (3, 5), (16, 8), (24, 12), (64, 32)] {
        check(1, [2, 2, 7], ci, co, [2, 2, 2]);
    }
}

#[test]
fn a_stride_of_three_is_refused() {
    assert!(Problem::new(1, [2; 3], 1, 1, [3, 1, 1]).unwrap_err().to_string().contains("stride"));
}
