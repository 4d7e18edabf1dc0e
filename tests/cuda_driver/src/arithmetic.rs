//! The numbers of PTX, one lane at a time: rounding, NaN, conversions.
//!
//! Sums and products are formed in f64 and rounded to odd there, which keeps what a second rounding needs to know.

use crate::program::{Atomic, Comparison, Conversion, FloatTest, Rounding, Type};
use half::{bf16, f16};

/// The only NaN that f32 instructions produce.
pub const NAN_F32: u32 = 0x7fff_ffff;
/// The only NaN that f16 and bf16 instructions produce.
pub const NAN_HALF: u16 = 0x7fff;

/// A binary format narrower than f64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Format {
    /// Bits after the leading one.
    pub mantissa: u32,
    /// Of the exponent.
    pub exponent: u32,
}

/// IEEE single precision.
pub const F32: Format = Format { mantissa: 23, exponent: 8 };
/// IEEE half precision.
pub const F16: Format = Format { mantissa: 10, exponent: 5 };
/// The upper half of an f32.
pub const BF16: Format = Format { mantissa: 7, exponent: 8 };

/// The value rounded to a format, as its bits.
pub fn narrow(value: f64, format: Format, rounding: Rounding) -> u32 {
    let Format { mantissa, exponent } = format;
    let sign = u32::from(value.is_sign_negative()) << (mantissa + exponent);
    let infinity = ((1 << exponent) - 1) << mantissa;
    if value.is_nan() {
        return if format == F32 { NAN_F32 } else { u32::from(NAN_HALF) };
    }
    if value.is_infinite() {
        return sign | infinity;
    }
    if value == 0.0 {
        return sign;
    }
    let bias = (1 << (exponent - 1)) - 1;
    let bits = value.to_bits();
    let raw = (bits >> 52) as i32 & 0x7ff;
    let (power, digits) = match raw {
        0 => (-1022, bits & ((1 << 52) - 1)),
        _ => (raw - 1023, bits & ((1 << 52) - 1) | 1 << 52),
    };
    let least = 1 - bias;
    let shift = (52 - mantissa) + (least - power).max(0) as u32;
    let (kept, rest, half) = match shift {
        0..=63 => (digits >> shift, digits & ((1 << shift) - 1), 1 << (shift - 1)),
        // Below half of the smallest number.
        _ => (0, 1, 2),
    };
    let up = match rounding {
        Rounding::Nearest => rest > half || rest == half && kept & 1 == 1,
        Rounding::NearestAway => rest >= half,
        Rounding::Zero => false,
        Rounding::Down => sign != 0 && rest != 0,
        Rounding::Up => sign == 0 && rest != 0,
    };
    let kept = kept as u32 + u32::from(up);
    // The leading one, if there is one, adds 1 to the exponent.
    let magnitude = (((power - least).max(0) as u32) << mantissa) + kept;
    if magnitude < infinity {
        return sign | magnitude;
    }
    let stays_finite = match rounding {
        Rounding::Nearest | Rounding::NearestAway => false,
        Rounding::Zero => true,
        Rounding::Down => sign == 0,
        Rounding::Up => sign != 0,
    };
    sign | if stays_finite { infinity - 1 } else { infinity }
}

/// A rounded result whose error has that sign, rounded to odd instead: inexact results have a last bit of 1.
fn to_odd(rounded: f64, error: f64) -> f64 {
    if error == 0.0 || error.is_nan() || rounded.is_infinite() || rounded.to_bits() & 1 == 1 {
        return rounded;
    }
    let towards_zero = (error > 0.0) != (rounded > 0.0);
    f64::from_bits(if towards_zero { rounded.to_bits() - 1 } else { rounded.to_bits() + 1 })
}

/// a + b rounded to odd.
pub fn add_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    let other = sum - a;
    to_odd(sum, (a - (sum - other)) + (b - other))
}

/// a / b rounded to odd.
pub fn divide_odd(a: f64, b: f64) -> f64 {
    let quotient = a / b;
    if quotient == 0.0 || !quotient.is_finite() {
        return quotient;
    }
    let rest = (-quotient).mul_add(b, a);
    to_odd(quotient, if b > 0.0 { rest } else { -rest })
}

/// The square root of a rounded to odd.
pub fn root_odd(a: f64) -> f64 {
    let root = a.sqrt();
    if root == 0.0 || !root.is_finite() { root } else { to_odd(root, (-root).mul_add(root, a)) }
}

/// An f64 result that is rounded in another way than to the nearest, from that and the sign of its error.
pub fn directed(rounded: f64, error: f64, rounding: Rounding) -> f64 {
    if error == 0.0 || error.is_nan() || rounded.is_nan() || rounded.is_infinite() && error.is_infinite() {
        return rounded;
    }
    let above = error < 0.0;
    match rounding {
        Rounding::Nearest | Rounding::NearestAway => rounded,
        Rounding::Down if above => rounded.next_down(),
        Rounding::Up if !above => rounded.next_up(),
        Rounding::Zero if above && rounded > 0.0 => rounded.next_down(),
        Rounding::Zero if !above && rounded < 0.0 => rounded.next_up(),
        _ => rounded,
    }
}

/// a * b + c in f32.
pub fn fma_f32(a: f32, b: f32, c: f32, rounding: Rounding) -> f32 {
    if rounding == Rounding::Nearest {
        return a.mul_add(b, c);
    }
    // The product is exact.
    sum_f32(f64::from(a) * f64::from(b), f64::from(c), rounding)
}

/// a + b, rounded once to f32.
#[inline(always)]
fn sum_f32(a: f64, b: f64, rounding: Rounding) -> f32 {
    let sum = a + b;
    let other = sum - a;
    let error = (a - (sum - other)) + (b - other);
    let near = sum as f32;
    let wide = f64::from(near);
    let (above, below) = (wide > sum || wide == sum && error < 0.0, wide < sum || wide == sum && error > 0.0);
    match rounding {
        Rounding::Down if above => near.next_down(),
        // A sum that is exactly zero is negative if rounded downwards, or if both terms are.
        Rounding::Down if sum == 0.0 && a.is_sign_negative() != b.is_sign_negative() => -0.0,
        Rounding::Up if below => near.next_up(),
        Rounding::Zero if above && near > 0.0 => near.next_down(),
        Rounding::Zero if below && near < 0.0 => near.next_up(),
        _ => near,
    }
}

/// a + b in f32.
pub fn add_f32(a: f32, b: f32, rounding: Rounding) -> f32 {
    if rounding == Rounding::Nearest {
        return a + b;
    }
    sum_f32(f64::from(a), f64::from(b), rounding)
}

/// a * b in f32.
pub fn mul_f32(a: f32, b: f32, rounding: Rounding) -> f32 {
    match rounding {
        Rounding::Nearest => a * b,
        _ => f32::from_bits(narrow(f64::from(a) * f64::from(b), F32, rounding)),
    }
}

/// a * b + c in f16.
pub fn fma_f16(a: f16, b: f16, c: f16) -> f16 {
    f16::from_bits(narrow(add_odd(a.to_f64() * b.to_f64(), c.to_f64()), F16, Rounding::Nearest) as u16)
}

/// a * b + c in bf16.
pub fn fma_bf16(a: bf16, b: bf16, c: bf16) -> bf16 {
    bf16::from_bits(narrow(add_odd(a.to_f64() * b.to_f64(), c.to_f64()), BF16, Rounding::Nearest) as u16)
}

/// To the nearest f16.
#[inline(always)]
pub fn to_f16(value: f32) -> f16 {
    if value.is_nan() { f16::from_bits(NAN_HALF) } else { f16::from_f32(value) }
}

/// To the nearest bf16.
#[inline(always)]
pub fn to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    bf16::from_bits(if value.is_nan() { NAN_HALF } else { rounded as u16 })
}

/// Subnormal numbers become zeros of their sign.
#[inline(always)]
pub fn flush(value: f32) -> f32 {
    if value.to_bits() & 0x7f80_0000 == 0 { f32::from_bits(value.to_bits() & 0x8000_0000) } else { value }
}

/// The smaller one; a number rather than NaN, -0 rather than +0.
#[inline(always)]
pub fn min_f64(a: f64, b: f64) -> f64 {
    if a.is_nan() || b < a || b == a && b.is_sign_negative() { b } else { a }
}

/// The larger one; a number rather than NaN, +0 rather than -0.
#[inline(always)]
pub fn max_f64(a: f64, b: f64) -> f64 {
    if a.is_nan() || b > a || b == a && b.is_sign_positive() { b } else { a }
}

/// [`min_f64`] in f32.
#[inline(always)]
pub fn min_f32(a: f32, b: f32) -> f32 {
    if a.is_nan() || b < a || b == a && b.is_sign_negative() { b } else { a }
}

/// [`max_f64`] in f32.
#[inline(always)]
pub fn max_f32(a: f32, b: f32) -> f32 {
    if a.is_nan() || b > a || b == a && b.is_sign_positive() { b } else { a }
}

/// The value of some bits of a floating-point type.
pub fn to_f64(bits: u64, ty: Type) -> f64 {
    match ty {
        Type::F16 => f16::from_bits(bits as u16).to_f64(),
        Type::Bf16 => bf16::from_bits(bits as u16).to_f64(),
        Type::F64 => f64::from_bits(bits),
        _ => f64::from(f32::from_bits(bits as u32)),
    }
}

/// The bits of a value in a floating-point type.
pub fn from_f64(value: f64, ty: Type, rounding: Rounding) -> u64 {
    match ty {
        Type::F16 => u64::from(narrow(value, F16, rounding)),
        Type::Bf16 => u64::from(narrow(value, BF16, rounding)),
        Type::F64 => value.to_bits(),
        Type::Tf32 => u64::from(narrow(value, Format { mantissa: 10, exponent: 8 }, rounding)) << 13,
        _ => u64::from(narrow(value, F32, rounding)),
    }
}

/// The lower bits of a register as an integer of a type, extended to 64 bits.
pub fn extend(bits: u64, ty: Type) -> u64 {
    let unused = 64 - ty.bits();
    if ty.is_signed() { ((bits << unused) as i64 >> unused) as u64 } else { bits << unused >> unused }
}

fn round_to_integer(value: f64, rounding: Rounding) -> f64 {
    match rounding {
        Rounding::Nearest => value.round_ties_even(),
        Rounding::NearestAway => value.round(),
        Rounding::Zero => value.trunc(),
        Rounding::Down => value.floor(),
        Rounding::Up => value.ceil(),
    }
}

/// `cvt`
pub fn convert(bits: u64, conversion: Conversion) -> u64 {
    let Conversion { to, from, rounding, to_integer, ftz, saturate, relu } = conversion;
    if !from.is_float() {
        let value = extend(bits, from);
        if to.is_float() {
            return integer_to_float(value, from.is_signed(), to, rounding);
        }
        return if saturate { clamp_integer(value, from.is_signed(), to) } else { extend(value, to) };
    }
    let mut value = to_f64(bits, from);
    if ftz && from == Type::F32 {
        value = f64::from(flush(value as f32));
    }
    if !to.is_float() {
        return float_to_integer(value, from, to, rounding);
    }
    if to_integer {
        value = round_to_integer(value, rounding);
    }
    if saturate {
        value = if value.is_nan() { 0.0 } else { max_f64(min_f64(value, 1.0), 0.0) };
    }
    if relu && value <= 0.0 {
        value = 0.0;
    }
    if to == from && !to_integer && value.is_nan() && to == Type::F64 {
        return bits;
    }
    let result = from_f64(value, to, rounding);
    if ftz && to == Type::F32 { u64::from(flush(f32::from_bits(result as u32)).to_bits()) } else { result }
}

fn integer_to_float(value: u64, signed: bool, to: Type, rounding: Rounding) -> u64 {
    let exact = if signed { i128::from(value as i64) } else { i128::from(value) };
    let near = exact as f64;
    let error = exact - near as i128;
    if to == Type::F64 {
        return directed(near, error as f64, rounding).to_bits();
    }
    from_f64(to_odd(near, error as f64), to, rounding)
}

fn limits(ty: Type) -> (i128, i128) {
    let bits = ty.bits();
    if ty.is_signed() { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) }
}

fn clamp_integer(value: u64, signed: bool, to: Type) -> u64 {
    let exact = if signed { i128::from(value as i64) } else { i128::from(value) };
    let (least, most) = limits(to);
    exact.clamp(least, most) as u64
}

fn float_to_integer(value: f64, from: Type, to: Type, rounding: Rounding) -> u64 {
    if value.is_nan() {
        let wide = from == Type::F64 || to.bits() == 64;
        return if wide { 1 << (to.bits() - 1) } else { 0 };
    }
    let (least, most) = limits(to);
    (round_to_integer(value, rounding) as i128).clamp(least, most) as u64
}

/// Of two numbers, or of anything with an order.
#[inline(always)]
pub fn compare<T: PartialOrd>(a: T, b: T, comparison: Comparison) -> bool {
    let unordered = a.partial_cmp(&b).is_none();
    match comparison {
        Comparison::Eq => a == b,
        Comparison::Ne => a != b && !unordered,
        Comparison::Lt => a < b,
        Comparison::Le => a <= b,
        Comparison::Gt => a > b,
        Comparison::Ge => a >= b,
        Comparison::EqOrNan => a == b || unordered,
        Comparison::NeOrNan => a != b || unordered,
        Comparison::LtOrNan => a < b || unordered,
        Comparison::LeOrNan => a <= b || unordered,
        Comparison::GtOrNan => a > b || unordered,
        Comparison::GeOrNan => a >= b || unordered,
        Comparison::IsNumber => !unordered,
        Comparison::IsNan => unordered,
    }
}

/// `testp`
pub fn test(value: f64, smallest_normal: f64, test: FloatTest) -> bool {
    let magnitude = value.abs();
    match test {
        FloatTest::Finite => value.is_finite(),
        FloatTest::Infinite => value.is_infinite(),
        FloatTest::Number => !value.is_nan(),
        FloatTest::NotANumber => value.is_nan(),
        FloatTest::Normal => value.is_finite() && magnitude >= smallest_normal,
        FloatTest::Subnormal => magnitude < smallest_normal && value != 0.0,
    }
}

/// What an atomic operation leaves in memory.
pub fn atomic(operation: Atomic, ty: Type, old: u64, b: u64, c: u64) -> u64 {
    let (old, b) = (extend(old, ty), extend(b, ty));
    let result = match operation {
        Atomic::Exchange => b,
        Atomic::CompareAndSwap => {
            if old == b {
                c
            } else {
                old
            }
        }
        Atomic::And => old & b,
        Atomic::Or => old | b,
        Atomic::Xor => old ^ b,
        Atomic::Increment => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        Atomic::Decrement => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
        Atomic::Min if ty.is_signed() => (old as i64).min(b as i64) as u64,
        Atomic::Max if ty.is_signed() => (old as i64).max(b as i64) as u64,
        Atomic::Min => old.min(b),
        Atomic::Max => old.max(b),
        Atomic::Add => match ty {
            Type::F16x2 | Type::Bf16x2 => {
                let one = if ty == Type::F16x2 { Type::F16 } else { Type::Bf16 };
                let low = atomic(operation, one, old & 0xffff, b & 0xffff, 0);
                low | atomic(operation, one, old >> 16 & 0xffff, b >> 16 & 0xffff, 0) << 16
            }
            // As `red.f32` on a GPU: subnormal numbers are flushed in global memory.
            Type::F32 => {
                let sum = f32::from_bits(old as u32) + f32::from_bits(b as u32);
                if sum.is_nan() { u64::from(NAN_F32) } else { u64::from(sum.to_bits()) }
            }
            Type::F64 => (f64::from_bits(old) + f64::from_bits(b)).to_bits(),
            Type::F16 | Type::Bf16 => from_f64(to_f64(old, ty) + to_f64(b, ty), ty, Rounding::Nearest),
            _ => old.wrapping_add(b),
        },
    };
    extend(result, if ty.is_float() { Type::B64 } else { ty }) & (u64::MAX >> (64 - ty.bits()))
}
