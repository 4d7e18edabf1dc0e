//! What rounds nothing (minimum, comparison, sign), f64, packed pairs, and PTX's approximations, against plain formulas.

mod common;

use common::apply;
use half::{bf16, f16};

/// Values around which the rules change, and some between.
const EDGES: [f32; 26] = [
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    1.17549421e-38,
    1.17549435e-38,
    -1.17549435e-38,
    0.3,
    0.5,
    -0.5,
    0.99999994,
    1.0,
    -1.0,
    1.0000001,
    1.5,
    2.5,
    -2.5,
    3.1415927,
    -77.7,
    126.5,
    1e10,
    -3e38,
    f32::MAX,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::NAN,
];

fn pairs() -> Vec<[f32; 2]> {
    EDGES.iter().flat_map(|a| EDGES.iter().map(|b| [*a, *b])).collect()
}

/// A type as bits and as f64.
struct Kind {
    name: &'static str,
    bits: u32,
    nan: u64,
    pack: fn(f32) -> u64,
    value: fn(u64) -> f64,
}

const F32: Kind = Kind {
    name: "f32",
    bits: 32,
    nan: 0x7fff_ffff,
    pack: |x| u64::from(x.to_bits()),
    value: |x| f64::from(f32::from_bits(x as u32)),
};
const F16: Kind = Kind {
    name: "f16",
    bits: 16,
    nan: 0x7fff,
    pack: |x| u64::from(f16::from_f32(x).to_bits()),
    value: |x| f16::from_bits(x as u16).to_f64(),
};
const BF16: Kind = Kind {
    name: "bf16",
    bits: 16,
    nan: 0x7fff,
    pack: |x| u64::from(bf16::from_f32(x).to_bits()),
    value: |x| bf16::from_bits(x as u16).to_f64(),
};

/// Smaller in the order in which -0 comes before +0; a number rather than NaN.
fn least(kind: &Kind, a: u64, b: u64, largest: bool) -> u64 {
    let (x, y) = ((kind.value)(a), (kind.value)(b));
    match (x.is_nan(), y.is_nan()) {
        (true, true) => kind.nan,
        (true, false) => b,
        (false, true) => a,
        _ if (x.total_cmp(&y).is_lt()) != largest => a,
        _ => b,
    }
}

#[test]
fn minima_comparisons_and_signs() {
    for kind in [F32, F16, BF16] {
        let Kind { name, bits, .. } = kind;
        let values: Vec<[u64; 3]> = pairs().iter().map(|[a, b]| [(kind.pack)(*a), (kind.pack)(*b), 0]).collect();
        let check = |instruction: &str, result_bits: u32, wanted: &dyn Fn(u64, u64) -> u64| {
            let results = apply(instruction, [bits, bits, bits, result_bits], &values);
            for ([a, b, _], result) in values.iter().zip(results) {
                assert_eq!(result, wanted(*a, *b), "{instruction} of {a:#x} and {b:#x}");
            }
        };
        check(&format!("min.{name} d, a, b;"), bits, &|a, b| least(&kind, a, b, false));
        check(&format!("max.{name} d, a, b;"), bits, &|a, b| least(&kind, a, b, true));
        check(&format!("max.NaN.{name} d, a, b;"), bits, &|a, b| {
            if (kind.value)(a).is_nan() || (kind.value)(b).is_nan() { kind.nan } else { least(&kind, a, b, true) }
        });
        let (sign, is_nan) = (1u64 << (bits - 1), |a: u64| (kind.value)(a).is_nan());
        for (operation, sign_of) in [("neg", (|a, sign| a ^ sign) as fn(u64, u64) -> u64), ("abs", |a, sign| a & !sign)]
        {
            let results = apply(&format!("{operation}.{name} d, a;"), [bits; 4], &values);
            for ([a, ..], result) in values.iter().zip(results) {
                // Which NaN it is, PTX leaves open.
                let right = if is_nan(*a) { is_nan(result) } else { result == sign_of(*a, sign) };
                assert!(right, "{operation}.{name} of {a:#x}: {result:#x}");
            }
        }
        let orders: [(&str, fn(f64, f64) -> bool); 6] = [
            ("eq", |a, b| a == b),
            ("ne", |a, b| a != b),
            ("lt", |a, b| a < b),
            ("le", |a, b| a <= b),
            ("gt", |a, b| a > b),
            ("ge", |a, b| a >= b),
        ];
        for (order, holds) in orders {
            for (suffix, unordered) in [("", false), ("u", true)] {
                check(&format!("setp.{order}{suffix}.{name} d, a, b;"), 1, &|a, b| {
                    let (a, b) = ((kind.value)(a), (kind.value)(b));
                    u64::from(if a.is_nan() || b.is_nan() { unordered } else { holds(a, b) })
                });
            }
        }
        for (order, wanted) in [("num", false), ("nan", true)] {
            check(&format!("setp.{order}.{name} d, a, b;"), 1, &|a, b| u64::from((is_nan(a) || is_nan(b)) == wanted));
        }
    }
}

#[test]
fn whole_numbers_and_saturation_in_single_precision() {
    let values: Vec<[u64; 3]> = EDGES.iter().map(|a| [u64::from(a.to_bits()), 0, 0]).collect();
    let rounds: [(&str, fn(f32) -> f32); 5] = [
        ("cvt.rni.f32.f32", f32::round_ties_even),
        ("cvt.rzi.f32.f32", f32::trunc),
        ("cvt.rmi.f32.f32", f32::floor),
        ("cvt.rpi.f32.f32", f32::ceil),
        // Not a number becomes +0.
        ("cvt.sat.f32.f32", |x| if x > 0.0 { x.min(1.0) } else { 0.0 }),
    ];
    for (instruction, round) in rounds {
        for ([a, ..], result) in values.iter().zip(apply(&format!("{instruction} d, a;"), [32; 4], &values)) {
            let (value, result) = (f32::from_bits(*a as u32), f32::from_bits(result as u32));
            if value.is_nan() && !instruction.contains("sat") {
                assert!(result.is_nan(), "{instruction} of {value}: {result}");
            } else {
                assert_eq!(result.to_bits(), round(value).to_bits(), "{instruction} of {value}: {result}");
            }
        }
    }
}

#[test]
fn double_precision_is_that_of_the_processor() {
    let wide = |x: f32| if x == 0.3 { 0.3f64 } else { f64::from(x) * 1.000000000000123 };
    let values: Vec<[u64; 3]> = pairs()
        .iter()
        .enumerate()
        .map(|(i, [a, b])| [wide(*a).to_bits(), wide(*b).to_bits(), wide(EDGES[i % 26]).to_bits()])
        .collect();
    let operations: [(&str, fn(f64, f64, f64) -> f64); 6] = [
        ("add.rn.f64 d, a, b;", |a, b, _| a + b),
        ("sub.rn.f64 d, a, b;", |a, b, _| a - b),
        ("mul.rn.f64 d, a, b;", |a, b, _| a * b),
        ("div.rn.f64 d, a, b;", |a, b, _| a / b),
        ("fma.rn.f64 d, a, b, c;", f64::mul_add),
        ("sqrt.rn.f64 d, a;", |a, _, _| a.sqrt()),
    ];
    for (instruction, operation) in operations {
        for (values, result) in values.iter().zip(apply(instruction, [64; 4], &values)) {
            let ([a, b, c], result) = (values.map(f64::from_bits), f64::from_bits(result));
            let wanted = operation(a, b, c);
            let same = result.to_bits() == wanted.to_bits() || result.is_nan() && wanted.is_nan();
            assert!(same, "{instruction} of {a:e}, {b:e}, {c:e}: {result:e} for {wanted:e}");
        }
    }
    for ([a, ..], result) in values.iter().zip(apply("cvt.rn.f32.f64 d, a;", [64, 64, 64, 32], &values)) {
        let (result, wanted) = (f32::from_bits(result as u32), f64::from_bits(*a) as f32);
        assert!(result.to_bits() == wanted.to_bits() || result.is_nan() && wanted.is_nan(), "{a:#x}");
    }
}

/// Both halves, each against the operation in f64 rounded once: sums and products of two 16-bit numbers are exact there,
/// or so far apart that the second rounding changes nothing.
#[test]
fn packed_pairs() {
    let operations: [(&str, fn(f64, f64) -> f64); 3] =
        [("add", |a, b| a + b), ("sub", |a, b| a - b), ("mul", |a, b| a * b)];
    let pairs = pairs();
    for (kind, round) in [
        (F16, (|x| u64::from(f16::from_f64(x).to_bits())) as fn(f64) -> u64),
        (BF16, |x| u64::from(bf16::from_f64(x).to_bits())),
    ] {
        let half = |x: f32, y: f32| (kind.pack)(x) << 16 | (kind.pack)(y);
        let values: Vec<[u64; 3]> = pairs.iter().map(|[a, b]| [half(*a, *b), half(*b, 1.5), 0]).collect();
        for (name, operation) in operations {
            let packed = format!("{name}.{}x2 d, a, b;", kind.name);
            for ([a, b, _], result) in values.iter().zip(apply(&packed, [32; 4], &values)) {
                for shift in [0, 16] {
                    let [x, y] = [a, b].map(|bits| (kind.value)(bits >> shift & 0xffff));
                    let (wanted, result) = (operation(x, y), result >> shift & 0xffff);
                    let wanted = if wanted.is_nan() { kind.nan } else { round(wanted) };
                    assert_eq!(result, wanted, "{packed} of {x} and {y}: {result:#x} for {wanted:#x}");
                }
            }
        }
    }
}

#[test]
fn approximations_are_within_their_stated_error() {
    let mut inputs: Vec<f32> = EDGES.to_vec();
    inputs.extend((-2000..2000).map(|i| i as f32 * 0.061));
    inputs.extend((0..2000).map(|i| f32::from_bits(0x0100_0000 + i * 0x000f_a345)));
    let values: Vec<[u64; 3]> = inputs.iter().map(|x| [u64::from(x.to_bits()), 0, 0]).collect();
    // Relative and absolute error: one of both suffices.
    let operations: [(&str, f64, f64, fn(f64) -> f64); 9] = [
        ("ex2.approx.f32", 2f64.powi(-22), 0.0, f64::exp2),
        ("ex2.approx.ftz.f32", 2f64.powi(-22), 0.0, f64::exp2),
        ("lg2.approx.f32", 2f64.powi(-22), 2f64.powi(-22), f64::log2),
        ("rcp.approx.f32", 2f64.powi(-23), 0.0, f64::recip),
        ("sqrt.approx.f32", 2f64.powi(-23), 0.0, f64::sqrt),
        ("rsqrt.approx.f32", 2f64.powf(-22.9), 0.0, |x| 1.0 / x.sqrt()),
        ("sin.approx.f32", 0.0, 2f64.powf(-20.5), f64::sin),
        ("cos.approx.f32", 0.0, 2f64.powf(-20.5), f64::cos),
        ("tanh.approx.f32", 2f64.powi(-11), 0.0, f64::tanh),
    ];
    for (instruction, relative, absolute, function) in operations {
        let flushes = instruction.contains("ftz");
        for (input, result) in inputs.iter().zip(apply(&format!("{instruction} d, a;"), [32; 4], &values)) {
            let result = f32::from_bits(result as u32);
            if absolute > 0.0 && relative == 0.0 && input.abs() > std::f32::consts::PI {
                continue;
            }
            let wanted = function(f64::from(*input));
            let nearest = wanted as f32;
            let says = || format!("{instruction} of {input:e}: {result:e} for {wanted:e}");
            if wanted.is_nan() || nearest.is_infinite() || nearest == 0.0 {
                let same = result.to_bits() == nearest.to_bits() || result.is_nan() && wanted.is_nan();
                assert!(same || !wanted.is_nan() && nearest == 0.0 && result.abs() <= f32::from_bits(1), "{}", says());
            } else if flushes && nearest.abs() < f32::MIN_POSITIVE {
                assert_eq!(result, 0.0, "{}", says());
            } else {
                let error = (f64::from(result) - wanted).abs();
                // Subnormal results have fewer digits than the error is stated for.
                let bound = absolute.max(relative * wanted.abs()).max(2f64.powi(-149));
                assert!(error <= bound, "{}", says());
            }
        }
    }
}
