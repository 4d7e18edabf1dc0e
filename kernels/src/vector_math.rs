//! Exponential and logarithm of vectors of f32 by polynomials, for ranges that losses need, with fewer operations than
//! CubeCL's own on the CPU runtime. A single lane, which is what a GPU's unit holds, takes the device's functions.

#![allow(missing_docs, reason = "`#[cube]` generates what has none")]

use cubecl::prelude::*;

/// Minimax polynomial of `2^f` for |f| <= 1/2, from the constant term up: relative error 2e-9 before rounding.
const EXP2_LOW: [f32; 4] = [1.0, std::f32::consts::LN_2, 0.240_226_48, 0.055_503_324];
const EXP2_HIGH: [f32; 3] = [0.009_618_437, 0.001_339_887_4, 0.000_153_533_62];
/// log2 of e, and what f32 leaves of it.
const LOG2_E: f32 = std::f32::consts::LOG2_E;
const LOG2_E_REST: f32 = (std::f64::consts::LOG2_E - std::f32::consts::LOG2_E as f64) as f32;
/// Added to a number t below 2^22, this rounds it, and leaves t + 127 in the lowest bits: the exponent of `2^t`.
const ROUND: f32 = 12_582_912.0 + 127.0;
/// Below this `exp` is 0; e to this is just above the smallest normal number.
const EXP_LEAST: f32 = -87.0;

/// Minimax polynomial of `(ln(1 + f) - f) / f^2` for `1/sqrt(2) <= 1 + f <= sqrt(2)`: `ln` is off by at most 3e-8 with
/// it.
const LN_LOW: [f32; 4] = [-0.499_999_82, 0.333_339_33, -0.250_025_84, 0.199_634_78];
const LN_HIGH: [f32; 4] = [-0.165_517_88, 0.148_836_82, -0.144_268_81, 0.089_795_32];
/// Bits of 1/sqrt(2) and of 1.
const SQRT_HALF: u32 = 0x3f35_04f3;
const ONE: u32 = 0x3f80_0000;

/// A polynomial of degree 3, from its constant term up. Its terms meet in pairs: what a thread waits for are operations
/// that need each other.
#[cube]
fn cubic<N: Size>(x: Vector<f32, N>, square: Vector<f32, N>, #[comptime] terms: [f32; 4]) -> Vector<f32, N> {
    let low = fma(x, Vector::new(terms[1]), Vector::new(terms[0]));
    let high = fma(x, Vector::new(terms[3]), Vector::new(terms[2]));
    fma(high, square, low)
}

/// `e^x` for x up to 88, to one unit in the last place; 0 below -87. NaN stays.
#[cube]
pub fn exp<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let lanes = N::value();
    if comptime!(lanes == 1) {
        x.exp()
    } else {
        let shifted = fma(x, Vector::new(LOG2_E), Vector::new(ROUND));
        let minus_whole = Vector::new(ROUND) - shifted;
        let part = fma(x, Vector::new(LOG2_E_REST), fma(x, Vector::new(LOG2_E), minus_whole));
        let exponent = Vector::<u32, N>::reinterpret(shifted) << Vector::new(23u32);
        let square = part * part;
        let high = fma(part, Vector::new(EXP2_HIGH[1]), Vector::new(EXP2_HIGH[0]));
        let high = fma(square, Vector::new(EXP2_HIGH[2]), high);
        let value = fma(high, square * square, cubic::<N>(part, square, EXP2_LOW));
        let value = value * Vector::<f32, N>::reinterpret(exponent);
        select_many(x.less_than(&Vector::new(EXP_LEAST)), Vector::new(0.0f32), value)
    }
}

/// The natural logarithm of a normal number above 0. Infinity and NaN stay.
#[cube]
pub fn ln<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let lanes = N::value();
    if comptime!(lanes == 1) {
        x.ln()
    } else {
        let bits = Vector::<u32, N>::reinterpret(x) + Vector::new(ONE - SQRT_HALF);
        let exponent = Vector::<f32, N>::cast_from(bits >> Vector::new(23u32)) - Vector::new(127.0f32);
        let mantissa = (bits & Vector::new(0x007f_ffffu32)) + Vector::new(SQRT_HALF);
        let f = Vector::<f32, N>::reinterpret(mantissa) - Vector::new(1.0f32);
        let square = f * f;
        let series = fma(cubic::<N>(f, square, LN_HIGH), square * square, cubic::<N>(f, square, LN_LOW));
        let of_mantissa = fma(square, series, f);
        let value = fma(exponent, Vector::new(std::f32::consts::LN_2), of_mantissa);
        select_many(x.less_than(&Vector::new(f32::INFINITY)), value, x)
    }
}
