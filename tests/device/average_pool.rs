//! Average pooling against a plain f64 loop over the definition.

use crate::common::convolution::{get, put, types};
use crate::common::{assert_close, assert_no_device_panic, device, uniform};
use voxgrad::kernels::average_pool::{self, Problem};
use voxgrad::kernels::{Context, Dtype, KernelError};

/// Output of `x`, and the gradient of the input for `dy`.
fn reference(
    (batch, dims, channels): (usize, [usize; 3], usize),
    stride: [usize; 3],
    x: &[f32],
    dy: &[f32],
) -> [Vec<f64>; 2] {
    let out: [usize; 3] = std::array::from_fn(|a| dims[a] / stride[a]);
    let inside = stride.iter().product::<usize>() as f64;
    let (mut y, mut dx) = (vec![0.0; dy.len()], vec![0.0; x.len()]);
    for i in 0..x.len() {
        let (c, voxel) = (i % channels, i / channels);
        let at = [voxel / dims[2] / dims[1] % dims[0], voxel / dims[2] % dims[1], voxel % dims[2]];
        let n = voxel / dims.iter().product::<usize>();
        let to: [usize; 3] = std::array::from_fn(|a| at[a] / stride[a]);
        if n < batch && (0..3).all(|a| to[a] < out[a]) {
            let o = (((n * out[0] + to[0]) * out[1] + to[1]) * out[2] + to[2]) * channels + c;
            y[o] += f64::from(x[i]) / inside;
            dx[i] = f64::from(dy[o]) / inside;
        }
    }
    [y, dx]
}

/// `len` values of a type with 64 NaN behind them: the values, after a look at those.
fn guarded(context: &Context, len: usize, dtype: Dtype, write: impl FnOnce(&voxgrad::kernels::Buffer)) -> Vec<f32> {
    let all = put(context, &vec![f32::NAN; len + 64], dtype);
    write(&all.part(0, len).unwrap());
    let mut values = get(context, &all);
    assert!(values[len..].iter().all(|v| v.is_nan()), "wrote behind the output");
    values.truncate(len);
    values
}

fn check(context: &Context, types: &[Dtype], (batch, dims, channels): (usize, [usize; 3], usize), stride: [usize; 3]) {
    let problem = Problem::new(batch, dims, channels, stride).unwrap();
    for &dtype in types {
        let name = format!("{batch}x{dims:?}x{channels} by {stride:?} in {dtype:?}");
        let x = put(context, &uniform(1, problem.input_len()), dtype);
        let dy = put(context, &uniform(2, problem.output_len()), dtype);
        let shape = (batch, dims, channels);
        let [y_expected, dx_expected] = reference(shape, stride, &get(context, &x), &get(context, &dy));
        let y = guarded(context, problem.output_len(), dtype, |y| {
            average_pool::forward(context, &problem, &x, y).unwrap();
        });
        let dx = guarded(context, problem.input_len(), dtype, |dx| {
            average_pool::backward(context, &problem, &dy, dx).unwrap();
        });
        let tolerance = match dtype {
            Dtype::F16 => 3e-4,
            Dtype::Bf16 => 2.4e-3,
            _ => 1e-7,
        };
        assert_close(&format!("{name}: y"), &y, &y_expected, tolerance);
        assert_close(&format!("{name}: dx"), &dx, &dx_expected, tolerance);
    }
    assert_no_device_panic();
}

#[test]
fn every_stride() {
    let (context, _guard) = device();
    for s in 0..8 {
        let stride = [1 + s / 4, 1 + s / 2 % 2, 1 + s % 2];
        check(context, &[Dtype::F32], (2, [4, 6, 10], 8), stride);
    }
}

/// Also extents that the stride does not divide, and one output along an axis.
#[test]
fn every_kind_of_shape_and_type() {
    let (context, _guard) = device();
    let types = types(context);
    for (dims, channels, stride) in [
        ([3, 5, 7], 3, [1, 2, 2]),
        ([2, 3, 3], 1, [2, 2, 2]),
        ([1, 16, 16], 20, [1, 2, 2]),
        ([8, 12, 8], 32, [2, 2, 2]),
    ] {
        check(context, &types, (3, dims, channels), stride);
    }
}

/// A sum of outputs against its change along a random direction: pooling is linear, so the two are equal but for rounding.
#[test]
fn the_gradient_agrees_with_finite_differences() {
    let (context, _guard) = device();
    let problem = Problem::new(2, [5, 6, 8], 6, [1, 2, 2]).unwrap();
    let dy = uniform(3, problem.output_len());
    let objective = |x: &[f32]| -> f64 {
        let (x, y) = (context.upload_f32(x).unwrap(), context.empty(problem.output_len(), Dtype::F32).unwrap());
        average_pool::forward(context, &problem, &x, &y).unwrap();
        get(context, &y).iter().zip(&dy).map(|(y, dy)| f64::from(*y) * f64::from(*dy)).sum()
    };
    let (x, direction) = (uniform(1, problem.input_len()), uniform(2, problem.input_len()));
    let moved = |by: f32| -> Vec<f32> { x.iter().zip(&direction).map(|(x, d)| x + by * d).collect() };
    let numeric = objective(&moved(0.5)) - objective(&moved(-0.5));
    let (gradient, dx) = (context.upload_f32(&dy).unwrap(), context.empty(x.len(), Dtype::F32).unwrap());
    average_pool::backward(context, &problem, &gradient, &dx).unwrap();
    let along: f64 = get(context, &dx).iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
    assert!((along - numeric).abs() < 1e-5 * numeric.abs().max(1.0), "{along} along the gradient, {numeric} in fact");
}

#[test]
fn misuse_is_a_typed_error() {
    let (context, _guard) = device();
    for (batch, dims, channels, stride) in [
        (1, [4; 3], 1, [3, 1, 1]),
        (1, [4; 3], 1, [0, 1, 1]),
        (0, [4; 3], 1, [2; 3]),
        (1, [4; 3], 0, [2; 3]),
        (1, [4, 1, 4], 1, [2; 3]),
        (2, [usize::MAX, 4, 4], 1, [2; 3]),
    ] {
        let refused = Problem::new(batch, dims, channels, stride);
        assert!(matches!(refused, Err(KernelError::Shape { .. })), "{dims:?} by {stride:?}");
    }
    let problem = Problem::new(1, [4; 3], 2, [2; 3]).unwrap();
    let [x, y] = [problem.input_len(), problem.output_len()].map(|len| context.empty(len, Dtype::F32).unwrap());
    let half = put(context, &[0.0; 16], Dtype::F32);
    average_pool::forward(context, &problem, &x, &half).unwrap();
    let integers = context.empty(problem.input_len(), Dtype::U32).unwrap();
    assert!(matches!(average_pool::forward(context, &problem, &y, &x), Err(KernelError::Shape { .. })));
    assert!(matches!(average_pool::backward(context, &problem, &x, &y), Err(KernelError::Shape { .. })));
    assert!(matches!(average_pool::forward(context, &problem, &integers, &y), Err(KernelError::Dtype { .. })));
    assert_no_device_panic();
}
