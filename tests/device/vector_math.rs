//! Exponential and logarithm of vectors beside f64.

use crate::common::device;
use cubecl::prelude::*;
use voxgrad::kernels::{Context, Dtype, vector_math};

#[cube(launch)]
fn exp_kernel<N: Size>(x: &[Vector<f32, N>], y: &mut [Vector<f32, N>]) {
    for i in 0..x.len() {
        y[i] = vector_math::exp::<N>(x[i]);
    }
}

#[cube(launch)]
fn ln_kernel<N: Size>(x: &[Vector<f32, N>], y: &mut [Vector<f32, N>]) {
    for i in 0..x.len() {
        y[i] = vector_math::ln::<N>(x[i]);
    }
}

#[derive(Clone, Copy)]
enum Function {
    Exp,
    Ln,
}

/// Values of a function on the device, `lanes` at once.
fn values(context: &Context, function: Function, x: &[f32], lanes: usize) -> Vec<f32> {
    let padded: Vec<f32> = x.iter().copied().chain(std::iter::repeat(1.0)).take(x.len().next_multiple_of(16)).collect();
    let input = context.upload(&padded, Dtype::F32).unwrap();
    let output = context.upload(&vec![f32::NAN; padded.len()], Dtype::F32).unwrap();
    let (count, dim) = (CubeCount::Static(1, 1, 1), CubeDim::new_1d(1));
    let launch = match function {
        Function::Exp => exp_kernel::launch,
        Function::Ln => ln_kernel::launch,
    };
    launch(context.client(), count, dim, lanes, input.arg(), output.arg());
    let mut y: Vec<f32> = context.download(&output).unwrap();
    y.truncate(x.len());
    y
}

/// The distance of an f32 from the truth in units of the last place of the truth.
fn units(y: f32, truth: f64) -> f64 {
    let nearest = truth as f32;
    let unit = f64::from(f32::from_bits(nearest.abs().to_bits() + 1)) - f64::from(nearest.abs());
    (f64::from(y) - truth).abs() / unit
}

fn lanes(context: &Context) -> Vec<usize> {
    if context.caps().cores.is_some() { vec![1, 4, 8, 16] } else { vec![1] }
}

#[test]
fn exponentials_are_right_to_two_units_in_the_last_place() {
    let (context, _turn) = device();
    let x: Vec<f32> = (0..=50_000).map(|i| -87.0 + 175.0 * i as f32 / 50_000.0).collect();
    for lanes in lanes(context) {
        let y = values(context, Function::Exp, &x, lanes);
        // A GPU's own function is only right to a few more.
        let limit = if context.caps().cores.is_some() { 2.0 } else { 64.0 };
        for (x, y) in x.iter().zip(&y) {
            let units = units(*y, f64::from(*x).exp());
            assert!(units <= limit, "{lanes} lanes: e^{x} = {y}, {units} units");
        }
    }
}

#[test]
fn exponentials_of_far_numbers_and_of_none() {
    let (context, _turn) = device();
    let odd_nan = f32::from_bits(0x7fc0_1001);
    let x = [0.0, -0.0, -87.5, -1e4, f32::MIN, f32::NEG_INFINITY, f32::NAN, -f32::NAN, odd_nan];
    for lanes in lanes(context) {
        let y = values(context, Function::Exp, &x, lanes);
        assert_eq!(y[..2], [1.0, 1.0], "{lanes} lanes");
        assert!(y[2] < 1.1e-38, "{lanes} lanes: {}", y[2]);
        assert_eq!(y[3..6], [0.0; 3], "{lanes} lanes");
        assert!(y[6..].iter().all(|y| y.is_nan()), "{lanes} lanes: {y:?}");
    }
}

#[test]
fn logarithms_are_right_to_a_few_millionths_of_a_percent() {
    let (context, _turn) = device();
    let near_one = (0..50_000).map(|i| 1.0 + i as f32 / 12_500.0);
    let far = (0..2_000).map(|i| 1.2e-38 * 1.09f32.powi(i));
    let x: Vec<f32> = near_one.chain(far).filter(|x| x.is_finite()).collect();
    for lanes in lanes(context) {
        let y = values(context, Function::Ln, &x, lanes);
        let limit = if context.caps().cores.is_some() { 1.5e-7 } else { 5e-6 };
        for (x, y) in x.iter().zip(&y) {
            let truth = f64::from(*x).ln();
            assert!((f64::from(*y) - truth).abs() <= limit * truth.abs().max(0.25), "{lanes} lanes: ln {x} = {y}");
        }
    }
}

#[test]
fn logarithms_of_one_infinity_and_no_number() {
    let (context, _turn) = device();
    let odd_nan = f32::from_bits(0x7fc0_1001);
    let x = [1.0, f32::INFINITY, f32::NAN, odd_nan];
    for lanes in lanes(context) {
        let y = values(context, Function::Ln, &x, lanes);
        assert_eq!(y[..2], [0.0, f32::INFINITY], "{lanes} lanes");
        assert!(y[2..].iter().all(|y| y.is_nan()), "{lanes} lanes: {y:?}");
    }
}
