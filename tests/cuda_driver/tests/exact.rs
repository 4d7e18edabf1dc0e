//! Arithmetic against numbers of any length, over edge values.

mod common;

use common::apply;
use cuda::arithmetic::{BF16, F16, F32, Format};
use num_bigint::{BigInt, Sign};

/// Values are integers times 2^-SCALE here: below the product of two of the smallest f32.
const SCALE: u32 = 320;

#[derive(Clone, Copy, PartialEq, Debug)]
enum Mode {
    Nearest,
    Zero,
    Down,
    Up,
}

const MODES: [(&str, Mode); 4] = [("rn", Mode::Nearest), ("rz", Mode::Zero), ("rm", Mode::Down), ("rp", Mode::Up)];

#[derive(Clone, Debug)]
enum Exact {
    Number(BigInt, bool),
    Infinite(bool),
    NotANumber,
}

fn exact(bits: u64, format: Format) -> Exact {
    let Format { mantissa, exponent } = format;
    let negative = bits >> (mantissa + exponent) & 1 == 1;
    let digits = bits & ((1 << mantissa) - 1);
    let power = (bits >> mantissa & ((1 << exponent) - 1)) as u32;
    let bias = (1u32 << (exponent - 1)) - 1;
    if power == (1 << exponent) - 1 {
        return if digits == 0 { Exact::Infinite(negative) } else { Exact::NotANumber };
    }
    let (digits, power) = if power == 0 { (digits, 1) } else { (digits | 1 << mantissa, power) };
    // The last digit counts 2^(power - bias - mantissa).
    let value = BigInt::from(digits) << (SCALE + power - bias - mantissa);
    Exact::Number(if negative { -value } else { value }, negative)
}

/// `tail`: the exact value is a little further from zero than the number.
fn rounded(value: &BigInt, tail: bool, negative_zero: bool, format: Format, mode: Mode) -> u64 {
    let Format { mantissa, exponent } = format;
    let sign_bit = 1 << (mantissa + exponent);
    let negative = value.sign() == Sign::Minus;
    if value.sign() == Sign::NoSign && !tail {
        return if negative_zero { sign_bit } else { 0 };
    }
    let magnitude = value.magnitude().clone();
    let bias = (1i64 << (exponent - 1)) - 1;
    let power = (magnitude.bits() as i64 - 1 - i64::from(SCALE)).max(1 - bias);
    // Units of the last place.
    let shift = (power - i64::from(mantissa) + i64::from(SCALE)) as u64;
    let units = &magnitude >> shift;
    let rest = &magnitude - (&units << shift);
    let twice = rest << 1u32;
    let one = num_bigint::BigUint::from(1u32) << shift;
    let odd = units.bit(0);
    let inexact = twice.bits() > 0 || tail;
    let up = match mode {
        Mode::Nearest => twice > one || twice == one && (tail || odd),
        Mode::Zero => false,
        Mode::Down => negative && inexact,
        Mode::Up => !negative && inexact,
    };
    let units: u64 = (units + u32::from(up)).try_into().unwrap();
    let bits = (((power + bias - 1) as u64) << mantissa) + units;
    let infinity = ((1u64 << exponent) - 1) << mantissa;
    let finite = match mode {
        Mode::Nearest => false,
        Mode::Zero => true,
        Mode::Down => !negative,
        Mode::Up => negative,
    };
    let bits = if bits >= infinity { if finite { infinity - 1 } else { infinity } } else { bits };
    bits | if negative { sign_bit } else { 0 }
}

fn not_a_number(format: Format) -> u64 {
    if format == F32 { 0x7fff_ffff } else { 0x7fff }
}

fn infinity(negative: bool, format: Format) -> u64 {
    (((1 << format.exponent) - 1) << format.mantissa) | u64::from(negative) << (format.mantissa + format.exponent)
}

fn fma(values: [u64; 3], format: Format, mode: Mode) -> u64 {
    let [a, b, c] = values.map(|bits| exact(bits, format));
    let nan = not_a_number(format);
    let sign = |x: &Exact| matches!(x, Exact::Number(_, true) | Exact::Infinite(true));
    let negative = sign(&a) != sign(&b);
    match (a, b, c) {
        (Exact::NotANumber, ..) | (_, Exact::NotANumber, _) | (_, _, Exact::NotANumber) => nan,
        (Exact::Infinite(_), Exact::Number(zero, _), _) | (Exact::Number(zero, _), Exact::Infinite(_), _)
            if zero == BigInt::ZERO =>
        {
            nan
        }
        (Exact::Infinite(_), _, Exact::Infinite(c)) | (_, Exact::Infinite(_), Exact::Infinite(c)) if c != negative => {
            nan
        }
        (Exact::Infinite(_), ..) | (_, Exact::Infinite(_), _) => infinity(negative, format),
        (_, _, Exact::Infinite(c)) => infinity(c, format),
        (Exact::Number(a, _), Exact::Number(b, _), Exact::Number(c, c_negative)) => {
            let product = (a * b) >> SCALE;
            let sum = product + c;
            let both = if negative == c_negative { negative } else { mode == Mode::Down };
            rounded(&sum, false, both, format, mode)
        }
    }
}

const EDGES_F32: [u32; 30] = [
    0,
    0x8000_0000,
    1,
    0x8000_0001,
    2,
    0x007f_ffff,
    0x0080_0000,
    0x8080_0000,
    0x0080_0001,
    0x3f80_0000,
    0xbf80_0000,
    0x3f80_0001,
    0x3f7f_ffff,
    0x4000_0000,
    0x4040_0000,
    0x3f00_0000,
    0x4b80_0000,
    0x4b80_0001,
    0xcb7f_ffff,
    0x7f7f_ffff,
    0xff7f_ffff,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0x7f80_0001,
    0xffff_ffff,
    0x3eaa_aaab,
    0x1f80_0000,
    0x2000_0001,
    0x7e80_0000,
];

/// Numbers that follow one another without an order.
fn shuffled(count: usize, seed: u64) -> Vec<u64> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) ^ (state << 7)
    };
    (0..count).map(|_| next()).collect()
}

fn triples_f32() -> Vec<[u64; 3]> {
    let edges = &EDGES_F32.map(u64::from);
    let mut triples: Vec<[u64; 3]> =
        edges.iter().flat_map(|a| edges.iter().flat_map(move |b| edges.iter().map(move |c| [*a, *b, *c]))).collect();
    let random = shuffled(6000, 1);
    triples.extend(random.chunks(3).map(|x| [0, 1, 2].map(|i| x[i] & 0xffff_ffff)));
    // Of similar size, where sums cancel.
    triples.extend(random.chunks(3).map(|x| [0, 1, 2].map(|i| 0x3f80_0000 | x[i] & 0x80ff_ffff)));
    triples
}

fn check(instruction: &str, bits: u32, values: &[[u64; 3]], wanted: impl Fn([u64; 3]) -> u64) {
    let results = apply(instruction, [bits; 4], values);
    for (values, result) in values.iter().zip(results) {
        let wanted = wanted(*values);
        assert_eq!(result, wanted, "{instruction} of {values:#x?}: {result:#x} for {wanted:#x}");
    }
}

#[test]
fn single_precision_in_all_rounding_modes() {
    let one = 0x3f80_0000;
    for (suffix, mode) in MODES {
        let triples = triples_f32();
        check(&format!("fma.{suffix}.f32 d, a, b, c;"), 32, &triples, |values| fma(values, F32, mode));
        let pairs: Vec<_> = triples.iter().step_by(7).copied().collect();
        check(&format!("add.{suffix}.f32 d, a, b;"), 32, &pairs, |[a, b, _]| fma([a, one, b], F32, mode));
        // A product that is exactly zero has its own sign, whatever the mode: plus a zero of that sign.
        let product = |[a, b, _]: [u64; 3]| fma([a, b, (a ^ b) & 0x8000_0000], F32, mode);
        check(&format!("mul.{suffix}.f32 d, a, b;"), 32, &pairs, product);
        let negated = |b: u64| b ^ 0x8000_0000;
        check(&format!("sub.{suffix}.f32 d, a, b;"), 32, &pairs, |[a, b, _]| fma([a, one, negated(b)], F32, mode));
    }
}

#[test]
fn quotients_and_roots_in_all_rounding_modes() {
    let values: Vec<[u64; 3]> = triples_f32().into_iter().step_by(5).collect();
    for (suffix, mode) in MODES {
        let quotient = |[a, b, _]: [u64; 3]| {
            let negative = (a ^ b) >> 31 & 1 == 1;
            match (exact(a, F32), exact(b, F32)) {
                (Exact::NotANumber, _) | (_, Exact::NotANumber) | (Exact::Infinite(_), Exact::Infinite(_)) => {
                    0x7fff_ffff
                }
                (Exact::Infinite(_), _) => infinity(negative, F32),
                (_, Exact::Infinite(_)) => u64::from(negative) << 31,
                (Exact::Number(a, _), Exact::Number(b, _)) if b == BigInt::ZERO => {
                    if a == BigInt::ZERO {
                        0x7fff_ffff
                    } else {
                        infinity(negative, F32)
                    }
                }
                (Exact::Number(a, _), Exact::Number(b, _)) => {
                    let scaled = a.clone() << SCALE;
                    let whole = &scaled / &b;
                    let tail = &whole * &b != scaled;
                    rounded(&whole, tail, negative, F32, mode)
                }
            }
        };
        check(&format!("div.{suffix}.f32 d, a, b;"), 32, &values, quotient);
        check(&format!("rcp.{suffix}.f32 d, a;"), 32, &values, |[a, ..]| quotient([0x3f80_0000, a, 0]));
        check(&format!("sqrt.{suffix}.f32 d, a;"), 32, &values, |[a, ..]| match exact(a, F32) {
            Exact::Infinite(false) => infinity(false, F32),
            Exact::Number(value, negative) if value == BigInt::ZERO => u64::from(negative) << 31,
            Exact::Number(value, false) => {
                let scaled = value << SCALE;
                let root = scaled.sqrt();
                let tail = &root * &root != scaled;
                rounded(&root, tail, false, F32, mode)
            }
            _ => 0x7fff_ffff,
        });
    }
}

/// All values of one operand, with edge values for the others.
fn triples_16(format: Format) -> Vec<[u64; 3]> {
    let infinity = ((1u64 << format.exponent) - 1) << format.mantissa;
    let one = ((1u64 << (format.exponent - 1)) - 1) << format.mantissa;
    let edges = [
        [one, 0],
        [one + 1, 1],
        [one - 1, 0x8001],
        [0x8000, 0x8000],
        [one | 0x8000, one],
        [infinity, one],
        [infinity - 1, 0x8000 | (infinity - 1)],
        [one / 2, one + 3],
        [3, one / 2],
        [0x7fff, 0],
        [one + 0x55, infinity | 0x8000],
        [one + 5, 0x8000 | (one + 9)],
    ];
    edges.iter().flat_map(|[b, c]| (0..0x1_0000).map(move |a| [a, *b, *c])).collect()
}

#[test]
fn sixteen_bits_over_all_values_of_an_operand() {
    for (name, format) in [("f16", F16), ("bf16", BF16)] {
        let one = ((1u64 << (format.exponent - 1)) - 1) << format.mantissa;
        let triples = triples_16(format);
        check(&format!("fma.rn.{name} d, a, b, c;"), 16, &triples, |values| fma(values, format, Mode::Nearest));
        let pairs = &triples[..4 * 0x1_0000];
        if name == "f16" {
            check("add.rn.f16 d, a, b;", 16, pairs, |[a, b, _]| fma([a, one, b], format, Mode::Nearest));
            let product = |[a, b, _]: [u64; 3]| fma([a, b, (a ^ b) & 0x8000], format, Mode::Nearest);
            check("mul.rn.f16 d, a, b;", 16, pairs, product);
        }
        // Both halves of a packed instruction.
        let packed: Vec<_> = triples.iter().step_by(17).map(|v| v.map(|x| x << 16 | (x ^ 0x8000))).collect();
        check(&format!("fma.rn.{name}x2 d, a, b, c;"), 32, &packed, |values| {
            let half = |shift: u32| fma(values.map(|x| x >> shift & 0xffff), format, Mode::Nearest);
            half(16) << 16 | half(0)
        });
    }
}

/// What is said to be found is found: rounding twice differs from rounding once on these values.
#[test]
fn a_product_that_is_rounded_twice_is_noticed() {
    for (name, bits, format, values) in [("f32", 32, F32, triples_f32()), ("f16", 16, F16, triples_16(F16))] {
        let twice = format!("mul.rn.{name} d, a, b;\nadd.rn.{name} d, d, c;");
        let results = apply(&twice, [bits; 4], &values);
        let wrong =
            values.iter().zip(results).filter(|(values, result)| *result != fma(**values, format, Mode::Nearest));
        assert!(wrong.count() > 100, "{name}");
    }
}

#[test]
fn conversions_between_floating_point_types() {
    let wide: Vec<[u64; 3]> = triples_f32().into_iter().step_by(3).collect();
    for (suffix, mode) in MODES {
        for (name, format) in [("f16", F16), ("bf16", BF16)] {
            if name == "bf16" && !["rn", "rz"].contains(&suffix) {
                continue;
            }
            let narrow = |a: u64| match exact(a, F32) {
                Exact::Number(value, negative) => rounded(&value, false, negative, format, mode),
                Exact::Infinite(negative) => infinity(negative, format),
                Exact::NotANumber => not_a_number(format),
            };
            let results = apply(&format!("cvt.{suffix}.{name}.f32 d, a;"), [32, 32, 32, 16], &wide);
            for ([a, ..], result) in wide.iter().zip(results) {
                assert_eq!(result, narrow(*a), "cvt.{suffix}.{name}.f32 of {a:#x}");
            }
            if suffix == "rn" {
                let results = apply(&format!("cvt.rn.{name}x2.f32 d, a, b;"), [32; 4], &wide);
                for ([a, b, _], result) in wide.iter().zip(results) {
                    assert_eq!(result, narrow(*a) << 16 | narrow(*b), "cvt.rn.{name}x2.f32 of {a:#x} and {b:#x}");
                }
            }
        }
    }
    let all: Vec<[u64; 3]> = (0..0x1_0000).map(|a| [a, 0, 0]).collect();
    for (name, format) in [("f16", F16), ("bf16", BF16)] {
        let results = apply(&format!("cvt.f32.{name} d, a;"), [16, 32, 32, 32], &all);
        for ([a, ..], result) in all.iter().zip(results) {
            let wanted = match exact(*a, format) {
                Exact::Number(value, negative) => rounded(&value, false, negative, F32, Mode::Nearest),
                Exact::Infinite(negative) => infinity(negative, F32),
                Exact::NotANumber => 0x7fff_ffff,
            };
            assert_eq!(result, wanted, "cvt.f32.{name} of {a:#x}");
        }
    }
}

#[test]
fn subnormal_numbers_are_flushed() {
    let values = triples_f32();
    let flush = |bits: u64| if bits >> 23 & 0xff == 0 { bits & 0x8000_0000 } else { bits };
    check("fma.rn.ftz.f32 d, a, b, c;", 32, &values, |v| flush(fma(v.map(flush), F32, Mode::Nearest)));
    check("mul.rn.ftz.f32 d, a, b;", 32, &values[..900], |[a, b, _]| {
        let (a, b) = (flush(a), flush(b));
        flush(fma([a, b, (a ^ b) & 0x8000_0000], F32, Mode::Nearest))
    });
}
