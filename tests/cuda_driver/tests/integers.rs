//! Integer instructions and comparisons against arithmetic of 128 bits, over edge values.

mod common;

use common::apply;

/// Pairs of edge values of so many bits, with a third operand.
fn triples(bits: u32) -> Vec<[u64; 3]> {
    let ones = u64::MAX >> (64 - bits);
    let top = 1 << (bits - 1);
    let edges = [
        0,
        1,
        2,
        3,
        7,
        8,
        15,
        16,
        31,
        32,
        33,
        63,
        64,
        100,
        top - 1,
        top,
        top + 1,
        ones - 1,
        ones,
        0x5555_5555_5555_5555 & ones,
        0x1234_5678_9abc_def0 & ones,
        0xff,
        0x100,
        0x8080,
    ];
    let pairs = edges.iter().flat_map(|a| edges.iter().map(move |b| (*a, *b)));
    pairs.enumerate().map(|(i, (a, b))| [a & ones, b & ones, edges[i * 5 % edges.len()] & ones]).collect()
}

fn signed(value: u64, bits: u32) -> i128 {
    i128::from((value << (64 - bits)) as i64 >> (64 - bits))
}

/// As a signed or an unsigned number.
fn number(value: u64, ty: char, bits: u32) -> i128 {
    if ty == 's' { signed(value, bits) } else { i128::from(value) }
}

fn check(instruction: &str, bits: [u32; 4], values: &[[u64; 3]], wanted: impl Fn([u64; 3]) -> i128) {
    let ones = u64::MAX >> (64 - bits[3]);
    for (values, result) in values.iter().zip(apply(instruction, bits, values)) {
        let wanted = wanted(*values) as u64 & ones;
        assert_eq!(result, wanted, "{instruction} of {values:#x?}: {result:#x} for {wanted:#x}");
    }
}

#[test]
fn arithmetic_of_all_sizes() {
    for bits in [16, 32, 64] {
        for ty in ['u', 's'] {
            let (values, same) = (triples(bits), [bits; 4]);
            let n = |x: u64| number(x, ty, bits);
            let name = format!("{ty}{bits}");
            check(&format!("add.{name} d, a, b;"), same, &values, |[a, b, _]| n(a) + n(b));
            check(&format!("sub.{name} d, a, b;"), same, &values, |[a, b, _]| n(a) - n(b));
            check(&format!("mul.lo.{name} d, a, b;"), same, &values, |[a, b, _]| n(a).wrapping_mul(n(b)));
            check(&format!("mul.hi.{name} d, a, b;"), same, &values, |[a, b, _]| match ty {
                's' => (n(a) * n(b)) >> bits,
                _ => ((a as u128 * b as u128) >> bits) as i128,
            });
            check(&format!("mad.lo.{name} d, a, b, c;"), same, &values, |[a, b, c]| {
                n(a).wrapping_mul(n(b)).wrapping_add(n(c))
            });
            check(&format!("min.{name} d, a, b;"), same, &values, |[a, b, _]| n(a).min(n(b)));
            check(&format!("max.{name} d, a, b;"), same, &values, |[a, b, _]| n(a).max(n(b)));
            let divisible: Vec<_> = values.iter().filter(|[_, b, _]| *b != 0).copied().collect();
            check(&format!("div.{name} d, a, b;"), same, &divisible, |[a, b, _]| n(a) / n(b));
            check(&format!("rem.{name} d, a, b;"), same, &divisible, |[a, b, _]| n(a) % n(b));
            // Shifts beyond the size: zeros, or the sign.
            check(&format!("shr.{name} d, a, b;"), [bits, 32, 32, bits], &values, |[a, b, _]| {
                n(a) >> (b & 0xffff_ffff).min(100)
            });
            if bits < 64 {
                let wide = [bits, bits, 2 * bits, 2 * bits];
                check(&format!("mul.wide.{name} d, a, b;"), wide, &values, |[a, b, _]| n(a) * n(b));
                check(&format!("mad.wide.{name} d, a, b, c;"), wide, &values, |[a, b, c]| {
                    (n(a) * n(b)).wrapping_add(i128::from(c))
                });
            }
            let orders: [(&str, fn(i128, i128) -> bool); 6] = [
                ("eq", |a, b| a == b),
                ("ne", |a, b| a != b),
                ("lt", |a, b| a < b),
                ("le", |a, b| a <= b),
                ("gt", |a, b| a > b),
                ("ge", |a, b| a >= b),
            ];
            for (order, holds) in orders {
                let instruction = format!("setp.{order}.{name} d, a, b;");
                check(&instruction, [bits, bits, bits, 1], &values, |[a, b, _]| i128::from(holds(n(a), n(b))));
            }
        }
        if bits == 32 {
            for (name, of) in [("min", i128::min as fn(i128, i128) -> i128), ("max", i128::max)] {
                let instruction = format!("{name}.relu.s32 d, a, b;");
                check(&instruction, [32; 4], &triples(32), |[a, b, _]| of(signed(a, 32), signed(b, 32)).max(0));
            }
        }
        let values = triples(bits);
        check(&format!("shl.b{bits} d, a, b;"), [bits, 32, 32, bits], &values, |[a, b, _]| {
            let by = b & 0xffff_ffff;
            if by >= 64 { 0 } else { i128::from(a) << by }
        });
        check(&format!("neg.s{bits} d, a;"), [bits; 4], &values, |[a, ..]| -signed(a, bits));
        check(&format!("abs.s{bits} d, a;"), [bits; 4], &values, |[a, ..]| signed(a, bits).abs());
        check(&format!("not.b{bits} d, a;"), [bits; 4], &values, |[a, ..]| !i128::from(a));
        check(&format!("and.b{bits} d, a, b;"), [bits; 4], &values, |[a, b, _]| i128::from(a & b));
        check(&format!("xor.b{bits} d, a, b;"), [bits; 4], &values, |[a, b, _]| i128::from(a ^ b));
    }
}

#[test]
fn bits_are_counted_moved_and_cut_out() {
    for bits in [32, 64] {
        let values = triples(bits);
        let to_32 = [bits, bits, bits, 32];
        check(&format!("popc.b{bits} d, a;"), to_32, &values, |[a, ..]| i128::from(a.count_ones()));
        check(&format!("clz.b{bits} d, a;"), to_32, &values, |[a, ..]| {
            (0..bits).take_while(|i| a >> (bits - 1 - i) & 1 == 0).count() as i128
        });
        check(&format!("brev.b{bits} d, a;"), [bits; 4], &values, |[a, ..]| {
            (0..bits).filter(|i| a >> i & 1 == 1).fold(0, |all, i| all | 1 << (bits - 1 - i))
        });
        for ty in ['u', 's'] {
            // As PTX's manual writes it.
            check(&format!("bfe.{ty}{bits} d, a, b, c;"), [bits, 32, 32, bits], &values, |[a, from, length]| {
                let (from, length) = ((from & 0xff) as u32, (length & 0xff) as u32);
                let sign_at = (from + length).saturating_sub(1).min(bits - 1);
                let sign = ty == 's' && length != 0 && a >> sign_at & 1 == 1;
                let bit = |i: u32| if i < length && from + i < bits { a >> (from + i) & 1 == 1 } else { sign };
                (0..bits).filter(|i| bit(*i)).fold(0, |all, i| all | 1 << i)
            });
            check(&format!("bfind.{ty}{bits} d, a;"), to_32, &values, |[a, ..]| {
                let negative = ty == 's' && a >> (bits - 1) == 1;
                let different = |i: &u32| (a >> i & 1 == 1) != negative;
                (0..bits).rev().find(different).map_or(-1, i128::from)
            });
        }
        let insert = format!("bfi.b{bits} d, a, b, %r30, %r31;");
        let fields =
            "cvt.u32.u64 %r30, %rd12;\nand.b32 %r31, %r30, 63;\nshr.u32 %r30, %r30, 3;\nand.b32 %r30, %r30, 63;\n";
        check(&format!("{fields}{insert}"), [bits; 4], &values, |[a, b, c]| {
            let (from, length) = ((c as u32) >> 3 & 63, c as u32 & 63);
            let inside = |i: u32| i >= from && i < from + length;
            let bit = |i: u32| if inside(i) { a >> (i - from) & 1 } else { b >> i & 1 };
            (0..bits).fold(0, |all, i| all | i128::from(bit(i)) << i)
        });
    }
    let values = triples(32);
    for table in [0x00, 0x96, 0xe8, 0xca, 0x3c, 0xff] {
        check(&format!("lop3.b32 d, a, b, c, {table};"), [32; 4], &values, |[a, b, c]| {
            let row = |i: u64| (a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1;
            (0..32).fold(0, |all, i| all | i128::from(table >> row(i) & 1) << i)
        });
    }
    check("prmt.b32 d, a, b, c;", [32; 4], &values, |[a, b, c]| {
        let bytes = b << 32 | a;
        let byte = |i: u64| {
            let byte = bytes >> (8 * (c >> (4 * i) & 7)) & 0xff;
            if c >> (4 * i + 3) & 1 == 1 { if byte >> 7 == 1 { 0xff } else { 0 } } else { byte }
        };
        (0..4).fold(0, |all, i| all | i128::from(byte(i)) << (8 * i))
    });
    check("shf.l.wrap.b32 d, a, b, c;", [32; 4], &values, |[a, b, c]| i128::from((b << 32 | a) << (c & 31) >> 32));
    check("shf.r.wrap.b32 d, a, b, c;", [32; 4], &values, |[a, b, c]| i128::from((b << 32 | a) >> (c & 31)));
    check("shf.r.clamp.b32 d, a, b, c;", [32; 4], &values, |[a, b, c]| i128::from((b << 32 | a) >> c.min(32)));
    let carried = "add.cc.u32 %r30, a, b;\naddc.u32 d, a, c;";
    check(carried, [32; 4], &values, |[a, b, c]| i128::from(a + c + ((a + b) >> 32)));
    let borrowed = "sub.cc.u32 %r30, a, b;\nsubc.u32 d, a, c;";
    check(borrowed, [32; 4], &values, |[a, b, c]| i128::from(a) - i128::from(c) - i128::from(a < b));
}

#[test]
fn conversions_of_integers() {
    let values = triples(64);
    for (from_ty, from) in [('u', 16), ('s', 16), ('u', 32), ('s', 32), ('u', 64), ('s', 64)] {
        let ones = u64::MAX >> (64 - from);
        let values: Vec<_> = values.iter().map(|v| v.map(|x| x & ones)).collect();
        let n = |a: u64| number(a, from_ty, from);
        for (to_ty, to) in [('u', 16), ('s', 16), ('u', 32), ('s', 32), ('u', 64), ('s', 64)] {
            let sizes = [from, from, from, to];
            check(&format!("cvt.{to_ty}{to}.{from_ty}{from} d, a;"), sizes, &values, |[a, ..]| n(a));
            let (least, most) = if to_ty == 's' { (-(1 << (to - 1)), (1 << (to - 1)) - 1) } else { (0, (1 << to) - 1) };
            let instruction = format!("cvt.sat.{to_ty}{to}.{from_ty}{from} d, a;");
            check(&instruction, sizes, &values, |[a, ..]| n(a).clamp(least, most));
            // To whole numbers and back through f64, whose numbers here are exact up to 2^53.
            let small: Vec<_> = values.iter().filter(|[a, ..]| n(*a).abs() < 1 << 53).copied().collect();
            let through = format!("cvt.rn.f64.{from_ty}{from} %rd30, a;\ncvt.rzi.{to_ty}{to}.f64 d, %rd30;");
            check(&through, sizes, &small, |[a, ..]| n(a).clamp(least, most));
        }
        let instruction = format!("cvt.rn.f32.{from_ty}{from} d, a;");
        check(&instruction, [from, from, from, 32], &values, |[a, ..]| i128::from((n(a) as f32).to_bits()));
    }
    let floats: Vec<[u64; 3]> =
        [0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.7, 2.7, 3e9, -3e9, 1e20, f32::NAN, f32::INFINITY, 0.49999997]
            .map(|x: f32| [u64::from(x.to_bits()), 0, 0])
            .to_vec();
    let rounds: [(&str, fn(f64) -> f64); 4] =
        [("rni", f64::round_ties_even), ("rzi", f64::trunc), ("rmi", f64::floor), ("rpi", f64::ceil)];
    for (suffix, round) in rounds {
        check(&format!("cvt.{suffix}.s32.f32 d, a;"), [32; 4], &floats, |[a, ..]| {
            let value = f64::from(f32::from_bits(a as u32));
            if value.is_nan() { 0 } else { (round(value) as i128).clamp(i128::from(i32::MIN), i128::from(i32::MAX)) }
        });
    }
}

#[test]
fn lanes_exchange_values() {
    let values: Vec<[u64; 3]> = (0..32).map(|i| [1000 + i, i, 0]).collect();
    let shuffled = |what: &str| apply(&format!("shfl.sync.{what}, -1;"), [32; 4], &values);
    let wanted = |f: fn(u64) -> u64| (0..32).map(|lane| 1000 + f(lane)).collect::<Vec<u64>>();
    assert_eq!(shuffled("bfly.b32 d, a, 5, 31"), wanted(|lane| lane ^ 5));
    assert_eq!(shuffled("up.b32 d, a, 3, 0"), wanted(|lane| if lane < 3 { lane } else { lane - 3 }));
    assert_eq!(shuffled("down.b32 d, a, 3, 31"), wanted(|lane| if lane + 3 > 31 { lane } else { lane + 3 }));
    assert_eq!(shuffled("idx.b32 d, a, 9, 31"), wanted(|_| 9));
    // In segments of eight lanes.
    assert_eq!(shuffled("idx.b32 d, a, 3, 6175"), wanted(|lane| lane / 8 * 8 + 3));
    assert_eq!(shuffled("down.b32 d, a, 2, 6175"), wanted(|lane| if lane % 8 > 5 { lane } else { lane + 2 }));
    assert_eq!(shuffled("up.b32 d, a, 2, 6144"), wanted(|lane| if lane % 8 < 2 { lane } else { lane - 2 }));
    let ballot = "setp.gt.u32 %p5, a, 1011;\nvote.sync.ballot.b32 d, %p5, -1;";
    assert_eq!(apply(ballot, [32; 4], &values), vec![0xffff_f000; 32]);
    let voted = "setp.gt.u32 %p5, a, 1011;\nvote.sync.any.pred %p6, %p5, -1;\nselp.u32 d, 1, 0, %p6;";
    assert_eq!(apply(voted, [32; 4], &values), vec![1; 32]);
    assert_eq!(apply("redux.sync.add.s32 d, b, -1;", [32; 4], &values), vec![496; 32]);
    assert_eq!(apply("redux.sync.max.u32 d, a, -1;", [32; 4], &values), vec![1031; 32]);
}

#[test]
fn lanes_that_go_different_ways_meet_again() {
    let values: Vec<[u64; 3]> = (0..100).map(|i| [i, i % 7, 0]).collect();
    // Each lane loops as often as its own value says; then all shuffle together.
    let looped = "mov.u32 d, 0;\nmov.u32 %r30, 0;\nagain:\nsetp.ge.u32 %p5, %r30, b;\n@%p5 bra out;\nadd.u32 d, d, a;\n\
                  add.u32 %r30, %r30, 1;\nbra again;\nout:\nactivemask.b32 %r31;\npopc.b32 %r31, %r31;\nshl.b32 %r31, %r31, 16;\n\
                  add.u32 d, d, %r31;";
    for (values, result) in values.iter().zip(apply(looped, [32; 4], &values)) {
        let lanes = if values[0] < 96 { 32 } else { 4 };
        assert_eq!(result, values[0] * values[1] + (lanes << 16), "{values:?}");
    }
    let table = "table: .branchtargets zero, one, two, three;\nand.b32 %r30, a, 3;\nbrx.idx %r30, table;\nzero:\nmov.u32 d, 10;\n\
                 bra out;\none:\nmov.u32 d, 11;\nbra out;\ntwo:\nmov.u32 d, 12;\nbra out;\nthree:\nmov.u32 d, 13;\nout:";
    for (values, result) in values.iter().zip(apply(table, [32; 4], &values)) {
        assert_eq!(result, 10 + values[0] % 4);
    }
}
