//! Instructions on integers, lane by lane.

use crate::program::{Integer, Slot, Type};
use crate::warp::Warp;

impl Warp {
    /// Executes an instruction on integers.
    pub(crate) fn integer(&mut self, integer: Integer, ty: Type, o: &[Slot], mask: u32) {
        match (ty.bits(), ty.is_signed(), ty) {
            (_, _, Type::U16x2 | Type::S16x2) => self.integer_pairs(integer, ty, o, mask),
            (16, false, _) => self.integer_16(integer, false, o, mask),
            (16, true, _) => self.integer_16(integer, true, o, mask),
            (64, signed, _) => self.integer_64(integer, signed, o, mask),
            (_, signed, _) => self.integer_32(integer, signed, o, mask),
        }
    }

    fn integer_32(&mut self, integer: Integer, signed: bool, o: &[Slot], mask: u32) {
        let wide = |a: u32| if signed { i64::from(a as i32) } else { i64::from(a) };
        match integer {
            Integer::Add => self.two(o, mask, u32::wrapping_add),
            Integer::Sub => self.two(o, mask, u32::wrapping_sub),
            Integer::MulLow => self.two(o, mask, u32::wrapping_mul),
            Integer::MadLow => self.three(o, mask, |a: u32, b: u32, c: u32| a.wrapping_mul(b).wrapping_add(c)),
            Integer::And => self.two(o, mask, |a: u32, b: u32| a & b),
            Integer::Or => self.two(o, mask, |a: u32, b: u32| a | b),
            Integer::Xor => self.two(o, mask, |a: u32, b: u32| a ^ b),
            Integer::Not => self.one(o, mask, |a: u32| !a),
            Integer::ShiftLeft => self.two(o, mask, |a: u32, b: u32| a.checked_shl(b).unwrap_or(0)),
            Integer::ShiftRight if signed => self.two(o, mask, |a: i32, b: u32| a >> b.min(31)),
            Integer::ShiftRight => self.two(o, mask, |a: u32, b: u32| a.checked_shr(b).unwrap_or(0)),
            Integer::Min if signed => self.two(o, mask, i32::min),
            Integer::Max if signed => self.two(o, mask, i32::max),
            Integer::Min => self.two(o, mask, u32::min),
            Integer::Max => self.two(o, mask, u32::max),
            Integer::MinRelu => self.two(o, mask, |a: i32, b: i32| a.min(b).max(0)),
            Integer::MaxRelu => self.two(o, mask, |a: i32, b: i32| a.max(b).max(0)),
            Integer::AddSaturated => self.two(o, mask, i32::saturating_add),
            Integer::SubSaturated => self.two(o, mask, i32::saturating_sub),
            Integer::MulHigh => self.two(o, mask, |a, b| (wide(a).wrapping_mul(wide(b)) as u64 >> 32) as u32),
            Integer::MadHigh => self
                .three(o, mask, |a, b, c: u32| ((wide(a).wrapping_mul(wide(b)) as u64 >> 32) as u32).wrapping_add(c)),
            Integer::MulWide => self.two(o, mask, |a, b| wide(a).wrapping_mul(wide(b))),
            Integer::MadWide => self.three(o, mask, |a, b, c: i64| wide(a).wrapping_mul(wide(b)).wrapping_add(c)),
            // Division by zero gives all ones on a GPU.
            Integer::Div if signed => {
                self.two(o, mask, |a: i32, b: i32| if b == 0 { -1 } else { a.wrapping_div(b) });
            }
            Integer::Rem if signed => self.two(o, mask, |a: i32, b: i32| if b == 0 { a } else { a.wrapping_rem(b) }),
            Integer::Div => self.two(o, mask, |a: u32, b: u32| a.checked_div(b).unwrap_or(u32::MAX)),
            Integer::Rem => self.two(o, mask, |a: u32, b: u32| a.checked_rem(b).unwrap_or(a)),
            Integer::Abs => self.one(o, mask, i32::wrapping_abs),
            Integer::Neg => self.one(o, mask, i32::wrapping_neg),
            Integer::LogicalNot => self.one(o, mask, |a: u32| u32::from(a == 0)),
            Integer::PopulationCount => self.one(o, mask, u32::count_ones),
            Integer::LeadingZeros => self.one(o, mask, u32::leading_zeros),
            Integer::Reverse => self.one(o, mask, u32::reverse_bits),
            Integer::ExtractField => self.three(o, mask, |a: u32, from: u32, length: u32| {
                extract_field(u64::from(a), 32, signed, from, length) as u32
            }),
            Integer::InsertField => {
                let (a, b) = (self.get::<u32>(o[1]), self.get::<u32>(o[2]));
                let (from, length) = (self.get::<u32>(o[3]), self.get::<u32>(o[4]));
                let f = |i: usize| insert_field(u64::from(a[i]), u64::from(b[i]), 32, from[i], length[i]) as u32;
                self.put(o[0], &std::array::from_fn(f), mask);
            }
            Integer::FindTop(amount) => {
                self.one(o, mask, |a: u32| {
                    find_top(if signed { a as i32 as i64 as u64 } else { u64::from(a) }, 32, amount)
                });
            }
            Integer::SumOfDifferences => {
                self.three(o, mask, |a, b, c: u32| c.wrapping_add(wide(a).abs_diff(wide(b)) as u32));
            }
            Integer::Permute => self.three(o, mask, permute),
            Integer::Lop3(table) => self.three(o, mask, |a, b, c| lop3(a, b, c, table)),
            Integer::Funnel { left, wrap } => self.three(o, mask, |low: u32, high: u32, by: u32| {
                let by = if wrap { by & 31 } else { by.min(32) };
                let both = u64::from(high) << 32 | u64::from(low);
                if left { ((both << by) >> 32) as u32 } else { (both >> by) as u32 }
            }),
            Integer::Dot4(a_signed, b_signed) => self.three(o, mask, |a: u32, b: u32, c: u32| {
                let byte = |word: u32, i: usize, signed: bool| {
                    let byte = word.to_le_bytes()[i];
                    if signed { i32::from(byte as i8) } else { i32::from(byte) }
                };
                let products = (0..4).map(|i| byte(a, i, a_signed) * byte(b, i, b_signed));
                c.wrapping_add(products.sum::<i32>() as u32)
            }),
        }
    }

    fn integer_64(&mut self, integer: Integer, signed: bool, o: &[Slot], mask: u32) {
        let wide = |a: u64| if signed { i128::from(a as i64) } else { i128::from(a) };
        let high = |a: u64, b: u64| (wide(a).wrapping_mul(wide(b)) as u128 >> 64) as u64;
        match integer {
            Integer::Add => self.two(o, mask, u64::wrapping_add),
            Integer::Sub => self.two(o, mask, u64::wrapping_sub),
            Integer::MulLow | Integer::MulWide => self.two(o, mask, u64::wrapping_mul),
            Integer::MadLow | Integer::MadWide => {
                self.three(o, mask, |a: u64, b: u64, c: u64| a.wrapping_mul(b).wrapping_add(c));
            }
            Integer::And => self.two(o, mask, |a: u64, b: u64| a & b),
            Integer::Or => self.two(o, mask, |a: u64, b: u64| a | b),
            Integer::Xor => self.two(o, mask, |a: u64, b: u64| a ^ b),
            Integer::Not => self.one(o, mask, |a: u64| !a),
            Integer::ShiftLeft => self.two(o, mask, |a: u64, b: u32| a.checked_shl(b).unwrap_or(0)),
            Integer::ShiftRight if signed => self.two(o, mask, |a: i64, b: u32| a >> b.min(63)),
            Integer::ShiftRight => self.two(o, mask, |a: u64, b: u32| a.checked_shr(b).unwrap_or(0)),
            Integer::Min if signed => self.two(o, mask, i64::min),
            Integer::Max if signed => self.two(o, mask, i64::max),
            Integer::Min => self.two(o, mask, u64::min),
            Integer::Max => self.two(o, mask, u64::max),
            Integer::AddSaturated => self.two(o, mask, i64::saturating_add),
            Integer::SubSaturated => self.two(o, mask, i64::saturating_sub),
            Integer::MulHigh => self.two(o, mask, high),
            Integer::MadHigh => self.three(o, mask, |a, b, c: u64| high(a, b).wrapping_add(c)),
            Integer::Div if signed => {
                self.two(o, mask, |a: i64, b: i64| if b == 0 { -1 } else { a.wrapping_div(b) });
            }
            Integer::Rem if signed => self.two(o, mask, |a: i64, b: i64| if b == 0 { a } else { a.wrapping_rem(b) }),
            Integer::Div => self.two(o, mask, |a: u64, b: u64| a.checked_div(b).unwrap_or(u64::MAX)),
            Integer::Rem => self.two(o, mask, |a: u64, b: u64| a.checked_rem(b).unwrap_or(a)),
            Integer::Abs => self.one(o, mask, i64::wrapping_abs),
            Integer::Neg => self.one(o, mask, i64::wrapping_neg),
            Integer::LogicalNot => self.one(o, mask, |a: u64| u64::from(a == 0)),
            Integer::PopulationCount => self.one(o, mask, u64::count_ones),
            Integer::LeadingZeros => self.one(o, mask, u64::leading_zeros),
            Integer::Reverse => self.one(o, mask, u64::reverse_bits),
            Integer::ExtractField => {
                self.three(o, mask, |a: u64, from: u32, length: u32| extract_field(a, 64, signed, from, length))
            }
            Integer::InsertField => {
                let (a, b) = (self.get::<u64>(o[1]), self.get::<u64>(o[2]));
                let (from, length) = (self.get::<u32>(o[3]), self.get::<u32>(o[4]));
                let f = |i: usize| insert_field(a[i], b[i], 64, from[i], length[i]);
                self.put(o[0], &std::array::from_fn(f), mask);
            }
            Integer::FindTop(amount) => {
                self.one(o, mask, |a: u64| find_top(a, if signed { 64 } else { 65 }, amount));
            }
            Integer::SumOfDifferences => {
                self.three(o, mask, |a, b, c: u64| c.wrapping_add(wide(a).abs_diff(wide(b)) as u64));
            }
            Integer::MinRelu
            | Integer::MaxRelu
            | Integer::Permute
            | Integer::Lop3(_)
            | Integer::Funnel { .. }
            | Integer::Dot4(..) => {
                unreachable!("these only exist for 32 bits, which decoding sees to")
            }
        }
    }

    /// Through 32 bits, which all lower bits come out right from.
    fn integer_16(&mut self, integer: Integer, signed: bool, o: &[Slot], mask: u32) {
        let wide = |a: u16| if signed { a as i16 as i32 as u32 } else { u32::from(a) };
        match integer {
            Integer::MulWide => self.two(o, mask, |a, b| wide(a).wrapping_mul(wide(b))),
            Integer::MadWide => self.three(o, mask, |a, b, c: u32| wide(a).wrapping_mul(wide(b)).wrapping_add(c)),
            Integer::MulHigh => self.two(o, mask, |a, b| (wide(a).wrapping_mul(wide(b)) >> 16) as u16),
            Integer::MadHigh => {
                self.three(o, mask, |a, b, c: u16| ((wide(a).wrapping_mul(wide(b)) >> 16) as u16).wrapping_add(c))
            }
            Integer::ShiftLeft => self.two(o, mask, |a: u16, b: u32| a.checked_shl(b).unwrap_or(0)),
            Integer::ShiftRight if signed => self.two(o, mask, |a: i16, b: u32| a >> b.min(15)),
            Integer::ShiftRight => self.two(o, mask, |a: u16, b: u32| a.checked_shr(b).unwrap_or(0)),
            Integer::Div if signed => {
                self.two(o, mask, |a: i16, b: i16| if b == 0 { -1 } else { a.wrapping_div(b) });
            }
            Integer::Rem if signed => self.two(o, mask, |a: i16, b: i16| if b == 0 { a } else { a.wrapping_rem(b) }),
            Integer::Div => self.two(o, mask, |a: u16, b: u16| a.checked_div(b).unwrap_or(u16::MAX)),
            Integer::Rem => self.two(o, mask, |a: u16, b: u16| a.checked_rem(b).unwrap_or(a)),
            Integer::Min if signed => self.two(o, mask, i16::min),
            Integer::Max if signed => self.two(o, mask, i16::max),
            Integer::Min => self.two(o, mask, u16::min),
            Integer::Max => self.two(o, mask, u16::max),
            Integer::Abs => self.one(o, mask, i16::wrapping_abs),
            Integer::LogicalNot => self.one(o, mask, |a: u16| u16::from(a == 0)),
            Integer::SumOfDifferences => {
                self.three(o, mask, |a, b, c: u16| c.wrapping_add((wide(a) as i32).abs_diff(wide(b) as i32) as u16));
            }
            other => self.integer_32(other, signed, o, mask),
        }
    }

    fn integer_pairs(&mut self, integer: Integer, ty: Type, o: &[Slot], mask: u32) {
        let signed = ty == Type::S16x2;
        let f = |a: u16, b: u16| match integer {
            Integer::Add => a.wrapping_add(b),
            Integer::Sub => a.wrapping_sub(b),
            Integer::Min if signed => (a as i16).min(b as i16) as u16,
            Integer::Max if signed => (a as i16).max(b as i16) as u16,
            Integer::Min => a.min(b),
            Integer::Max => a.max(b),
            _ => (a as i16).wrapping_neg() as u16,
        };
        match o.len() {
            2 => self.one(o, mask, |a: [u16; 2]| [f(a[0], a[0]), f(a[1], a[1])]),
            _ => self.two(o, mask, |a: [u16; 2], b: [u16; 2]| [f(a[0], b[0]), f(a[1], b[1])]),
        }
    }
}

fn extract_field(a: u64, bits: u32, signed: bool, from: u32, length: u32) -> u64 {
    let (from, length) = (from & 0xff, length & 0xff);
    let sign_at = (from + length).saturating_sub(1).min(bits - 1);
    let sign = signed && length > 0 && a >> sign_at & 1 == 1;
    let kept = a.checked_shr(from).unwrap_or(0);
    let length = length.min(bits.saturating_sub(from));
    let field = if length >= 64 { kept } else { kept & ((1 << length) - 1) };
    if sign && length < 64 { field | u64::MAX << length } else { field }
}

fn insert_field(a: u64, b: u64, bits: u32, from: u32, length: u32) -> u64 {
    let (from, length) = (from & 0xff, (length & 0xff).min(bits.saturating_sub(from & 0xff)));
    let ones = if length >= 64 { u64::MAX } else { (1 << length) - 1 };
    let mask = ones.checked_shl(from).unwrap_or(0);
    b & !mask | a.checked_shl(from).unwrap_or(0) & mask
}

/// `bfind`; bits: 32 of any kind extended to 64, 64 with a sign, 65 for 64 without.
fn find_top(a: u64, bits: u32, amount: bool) -> u32 {
    let inverted = if bits != 65 && (a as i64) < 0 { !a } else { a };
    let top = if bits == 32 { 31 } else { 63 };
    match inverted.checked_ilog2() {
        Some(at) if amount => top - at,
        Some(at) => at,
        None => u32::MAX,
    }
}

fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = (u64::from(b) << 32 | u64::from(a)).to_le_bytes();
    let byte = |i: u32| {
        let nibble = selector >> (4 * i) & 0xf;
        let value = bytes[nibble as usize & 7];
        u32::from(if nibble & 8 == 0 { value } else { (value as i8 >> 7) as u8 }) << (8 * i)
    };
    byte(0) | byte(1) | byte(2) | byte(3)
}

fn lop3(a: u32, b: u32, c: u32, table: u8) -> u32 {
    (0..8).filter(|row| table >> row & 1 == 1).fold(0, |all, row| {
        let pick = |value: u32, bit: u32| if row >> bit & 1 == 1 { value } else { !value };
        all | pick(a, 2) & pick(b, 1) & pick(c, 0)
    })
}
