//! Instructions that only work on registers.

use crate::arithmetic::{self as numbers, NAN_F32, flush};
use crate::program::{Comparison, Float, Logic, Mode, Op, Rounding, Slot, Type};
use crate::warp::{FULL, LANES, Lane, Warp, each};
use half::{bf16, f16};

impl Warp {
    #[inline(always)]
    pub(crate) fn one<A: Lane, D: Lane>(&mut self, o: &[Slot], mask: u32, f: impl Fn(A) -> D) {
        let a = self.get::<A>(o[1]);
        self.put(o[0], &each(&a, f), mask);
    }

    #[inline(always)]
    pub(crate) fn two<A: Lane, B: Lane, D: Lane>(&mut self, o: &[Slot], mask: u32, f: impl Fn(A, B) -> D) {
        let (a, b) = (self.get::<A>(o[1]), self.get::<B>(o[2]));
        let mut d = [D::default(); LANES];
        for lane in 0..LANES {
            d[lane] = f(a[lane], b[lane]);
        }
        self.put(o[0], &d, mask);
    }

    #[inline(always)]
    pub(crate) fn three<A: Lane, B: Lane, C: Lane, D: Lane>(
        &mut self,
        o: &[Slot],
        mask: u32,
        f: impl Fn(A, B, C) -> D,
    ) {
        let (a, b, c) = (self.get::<A>(o[1]), self.get::<B>(o[2]), self.get::<C>(o[3]));
        let mut d = [D::default(); LANES];
        for lane in 0..LANES {
            d[lane] = f(a[lane], b[lane], c[lane]);
        }
        self.put(o[0], &d, mask);
    }

    /// Executes an instruction on registers in the lanes of a mask; false if it is of another kind.
    pub fn calculate(&mut self, op: Op, o: &[Slot], mask: u32) -> bool {
        match op {
            Op::Integer(integer, ty) => self.integer(integer, ty, o, mask),
            Op::Float(float, ty, mode) => self.float(float, ty, mode, o, mask),
            Op::Carry { subtract, ty } => self.carry(subtract, ty, o, mask),
            Op::Logic(logic) => {
                let value = combine(logic, self.predicate(o[1]), self.predicate(o[2]));
                self.put_predicate(o[0], value, mask);
            }
            Op::Compare { comparison, ty, ftz, combine: logic, invert } => {
                let (low, high) = self.compared(comparison, ty, ftz, o[2], o[3]);
                let by = logic.map(|logic| (logic, self.predicate(o[4]) ^ if invert { FULL } else { 0 }));
                let other = if matches!(ty, Type::F16x2 | Type::Bf16x2) { high } else { !low };
                let [p, q] = [low, other].map(|value| by.map_or(value, |(logic, c)| combine(logic, value, c)));
                self.put_predicate(o[0], p, mask);
                self.put_predicate(o[1], q, mask);
            }
            Op::Set { comparison, ty, ftz, to, combine: logic, invert } => {
                let (low, _) = self.compared(comparison, ty, ftz, o[1], o[2]);
                let by = logic.map(|logic| (logic, self.predicate(o[3]) ^ if invert { FULL } else { 0 }));
                let value = by.map_or(low, |(logic, c)| combine(logic, low, c));
                let yes = match to {
                    Type::F32 => 1f32.to_bits(),
                    Type::F16 => u32::from(f16::ONE.to_bits()),
                    Type::Bf16 => u32::from(bf16::ONE.to_bits()),
                    _ => u32::MAX,
                };
                self.put(o[0], &std::array::from_fn(|lane| if value >> lane & 1 == 1 { yes } else { 0u32 }), mask);
            }
            Op::Select => {
                let p = self.predicate(o[3]);
                match o[0].file() {
                    crate::program::File::Wide => {
                        let (a, b) = (self.get::<u64>(o[1]), self.get::<u64>(o[2]));
                        self.put(o[0], &std::array::from_fn(|i| if p >> i & 1 == 1 { a[i] } else { b[i] }), mask);
                    }
                    crate::program::File::Word => {
                        let (a, b) = (self.get::<u32>(o[1]), self.get::<u32>(o[2]));
                        self.put(o[0], &std::array::from_fn(|i| if p >> i & 1 == 1 { a[i] } else { b[i] }), mask);
                    }
                    crate::program::File::Predicate => {
                        let value = self.predicate(o[1]) & p | self.predicate(o[2]) & !p;
                        self.put_predicate(o[0], value, mask);
                    }
                }
            }
            Op::SelectBySign(by) => {
                let sign = self.get::<u32>(o[3]).map(|c| match by {
                    Type::F32 => f32::from_bits(c) >= 0.0,
                    _ => c as i32 >= 0,
                });
                let (a, b) = (self.get_bits(o[1]), self.get_bits(o[2]));
                self.put_bits(o[0], &std::array::from_fn(|i| if sign[i] { a[i] } else { b[i] }), mask);
            }
            Op::Move => match o[0].file() {
                crate::program::File::Wide => self.one(o, mask, |a: u64| a),
                crate::program::File::Word => self.one(o, mask, |a: u32| a),
                crate::program::File::Predicate => {
                    let value = self.predicate(o[1]);
                    self.put_predicate(o[0], value, mask);
                }
            },
            Op::Pack(bits) => {
                let mut packed = [0; LANES];
                for (part, slot) in o[1..].iter().enumerate() {
                    let values = self.get::<u32>(*slot);
                    for lane in 0..LANES {
                        let value = u64::from(values[lane]) & ((1 << bits) - 1);
                        packed[lane] |= value << (part as u32 * bits);
                    }
                }
                self.put_bits(o[0], &packed, mask);
            }
            Op::Unpack(bits) => {
                let (source, parts) = (o[o.len() - 1], &o[..o.len() - 1]);
                let packed = self.get_bits(source);
                for (part, slot) in parts.iter().enumerate() {
                    let value = packed.map(|all| (all >> (part as u32 * bits) & ((1 << bits) - 1)) as u32);
                    self.put(*slot, &value, mask);
                }
            }
            Op::Convert(conversion) => self.convert(conversion, o, mask),
            Op::ConvertPair(conversion) => {
                let (high, low) = (self.get::<f32>(o[1]), self.get::<f32>(o[2]));
                let one = if conversion.to == Type::F16x2 { Type::F16 } else { Type::Bf16 };
                let half = crate::program::Conversion { to: one, ..conversion };
                let fast = conversion.rounding == Rounding::Nearest && !conversion.relu && !conversion.saturate;
                let both: [u32; LANES] = std::array::from_fn(|i| match (fast, one) {
                    (true, Type::F16) => {
                        u32::from(numbers::to_f16(high[i]).to_bits()) << 16
                            | u32::from(numbers::to_f16(low[i]).to_bits())
                    }
                    (true, _) => {
                        u32::from(numbers::to_bf16(high[i]).to_bits()) << 16
                            | u32::from(numbers::to_bf16(low[i]).to_bits())
                    }
                    _ => {
                        let [high, low] =
                            [high[i], low[i]].map(|x| numbers::convert(u64::from(x.to_bits()), half) as u32);
                        high << 16 | low
                    }
                });
                self.put(o[0], &both, mask);
            }
            Op::Test(test, ty) => {
                let smallest = if ty == Type::F64 { f64::MIN_POSITIVE } else { f64::from(f32::MIN_POSITIVE) };
                let a = self.get_bits(o[1]);
                let holds = to_mask(|lane| numbers::test(numbers::to_f64(a[lane], ty), smallest, test));
                self.put_predicate(o[0], holds, mask);
            }
            _ => return false,
        }
        true
    }

    fn convert(&mut self, conversion: crate::program::Conversion, o: &[Slot], mask: u32) {
        use Type::*;
        let plain = conversion.rounding == Rounding::Nearest
            && !(conversion.saturate || conversion.relu || conversion.ftz || conversion.to_integer);
        let words = o[1].file() == crate::program::File::Word;
        match (conversion.to, conversion.from) {
            (F16, F32) if plain => self.one(o, mask, numbers::to_f16),
            (Bf16, F32) if plain => self.one(o, mask, numbers::to_bf16),
            (F32, F16) if plain => self.one(o, mask, |a: f16| canonical(a.to_f32())),
            (F32, Bf16) if plain => self.one(o, mask, |a: bf16| canonical(a.to_f32())),
            (F32, U32) if plain && words => self.one(o, mask, |a: u32| a as f32),
            (F32, S32) if plain && words => self.one(o, mask, |a: i32| a as f32),
            (U64 | S64, U32) if words => self.one(o, mask, |a: u32| u64::from(a)),
            (U64 | S64, S32) if words && !conversion.saturate => self.one(o, mask, |a: i32| i64::from(a)),
            (U32 | S32, U64 | S64) if !words && !conversion.saturate => self.one(o, mask, |a: u64| a as u32),
            _ => {
                let bits = self.get_bits(o[1]);
                let converted = std::array::from_fn(|lane| numbers::convert(bits[lane], conversion));
                // A register that is wider than the result holds it extended by its sign.
                let extended = match conversion.to.is_signed() {
                    true => converted.map(|value| numbers::extend(value, conversion.to)),
                    false => converted,
                };
                self.put_bits(o[0], &extended, mask);
            }
        }
    }

    fn carry(&mut self, subtract: bool, ty: Type, o: &[Slot], mask: u32) {
        let (a, b, into) = (self.get_bits(o[2]), self.get_bits(o[3]), self.predicate(o[4]));
        let most = u128::from(u64::MAX >> (64 - ty.bits()));
        let mut out = 0;
        let result = std::array::from_fn(|lane| {
            let (a, b, carry) = (u128::from(a[lane]), u128::from(b[lane]), u128::from(into >> lane & 1));
            let all = if subtract { a.wrapping_sub(b).wrapping_sub(carry) } else { a + b + carry };
            out |= u32::from(all > most) << lane;
            (all & most) as u64
        });
        self.put_bits(o[0], &result, mask);
        self.put_predicate(o[1], out, mask);
    }

    /// Of the lower halves and of the upper ones, for packed types.
    fn compared(&self, comparison: Comparison, ty: Type, ftz: bool, a: Slot, b: Slot) -> (u32, u32) {
        let flushed = |x: f32| if ftz { flush(x) } else { x };
        let word = |comparison| match ty {
            Type::U16 | Type::B16 => self.compare_as::<u16, _>(a, b, comparison, |x| x),
            Type::S16 => self.compare_as::<i16, _>(a, b, comparison, |x| x),
            Type::S32 => self.compare_as::<i32, _>(a, b, comparison, |x| x),
            Type::U64 | Type::B64 => self.compare_as::<u64, _>(a, b, comparison, |x| x),
            Type::S64 => self.compare_as::<i64, _>(a, b, comparison, |x| x),
            Type::F32 => self.compare_as::<f32, _>(a, b, comparison, flushed),
            Type::F64 => self.compare_as::<f64, _>(a, b, comparison, |x| x),
            Type::F16 => self.compare_as::<f16, _>(a, b, comparison, |x| x),
            Type::Bf16 => self.compare_as::<bf16, _>(a, b, comparison, |x| x),
            Type::F16x2 => self.compare_as::<[f16; 2], _>(a, b, comparison, |[low, _]| low),
            Type::Bf16x2 => self.compare_as::<[bf16; 2], _>(a, b, comparison, |[low, _]| low),
            _ => self.compare_as::<u32, _>(a, b, comparison, |x| x),
        };
        let high = match ty {
            Type::F16x2 => self.compare_as::<[f16; 2], _>(a, b, comparison, |[_, high]| high),
            Type::Bf16x2 => self.compare_as::<[bf16; 2], _>(a, b, comparison, |[_, high]| high),
            _ => 0,
        };
        (word(comparison), high)
    }

    #[inline(always)]
    fn compare_as<T: Lane, U: PartialOrd>(&self, a: Slot, b: Slot, comparison: Comparison, f: impl Fn(T) -> U) -> u32 {
        let (a, b) = (self.get::<T>(a), self.get::<T>(b));
        // One loop for each of the common ones, which the compiler turns into vector code.
        match comparison {
            Comparison::Eq => to_mask(|i| f(a[i]) == f(b[i])),
            Comparison::Lt => to_mask(|i| f(a[i]) < f(b[i])),
            Comparison::Gt => to_mask(|i| f(a[i]) > f(b[i])),
            Comparison::Le => to_mask(|i| f(a[i]) <= f(b[i])),
            Comparison::Ge => to_mask(|i| f(a[i]) >= f(b[i])),
            _ => to_mask(|i| numbers::compare(f(a[i]), f(b[i]), comparison)),
        }
    }

    fn float(&mut self, float: Float, ty: Type, mode: Mode, o: &[Slot], mask: u32) {
        match ty {
            Type::F32 => self.single(float, mode, o, mask),
            Type::F64 => self.double(float, mode, o, mask),
            Type::F16 => match (float, o.len()) {
                (_, 2) => self.one(o, mask, |a: f16| half_f16(float, mode, a, a, a)),
                (_, 3) => self.two(o, mask, |a: f16, b: f16| half_f16(float, mode, a, b, b)),
                _ => self.three(o, mask, |a: f16, b: f16, c: f16| half_f16(float, mode, a, b, c)),
            },
            Type::Bf16 => match o.len() {
                2 => self.one(o, mask, |a: bf16| half_bf16(float, mode, a, a, a)),
                3 => self.two(o, mask, |a: bf16, b: bf16| half_bf16(float, mode, a, b, b)),
                _ => self.three(o, mask, |a: bf16, b: bf16, c: bf16| half_bf16(float, mode, a, b, c)),
            },
            Type::F16x2 => {
                let f = |a: [f16; 2], b: [f16; 2], c: [f16; 2]| {
                    [half_f16(float, mode, a[0], b[0], c[0]), half_f16(float, mode, a[1], b[1], c[1])]
                };
                match o.len() {
                    2 => self.one(o, mask, |a| f(a, a, a)),
                    3 => self.two(o, mask, |a, b| f(a, b, b)),
                    _ => self.three(o, mask, f),
                }
            }
            _ => {
                let f = |a: [bf16; 2], b: [bf16; 2], c: [bf16; 2]| {
                    [half_bf16(float, mode, a[0], b[0], c[0]), half_bf16(float, mode, a[1], b[1], c[1])]
                };
                match o.len() {
                    2 => self.one(o, mask, |a| f(a, a, a)),
                    3 => self.two(o, mask, |a, b| f(a, b, b)),
                    _ => self.three(o, mask, f),
                }
            }
        }
    }

    fn single(&mut self, float: Float, mode: Mode, o: &[Slot], mask: u32) {
        let Mode { rounding, ftz, saturate, nan, .. } = mode;
        let into = |x: f32| if ftz { flush(x) } else { x };
        let out = |x: f32| {
            let x = canonical(if ftz { flush(x) } else { x });
            match saturate {
                true if x.is_nan() => 0.0,
                true => numbers::max_f32(numbers::min_f32(x, 1.0), 0.0),
                false => x,
            }
        };
        let plain = rounding == Rounding::Nearest && !ftz && !saturate;
        let precise = |x: f64| out(x as f32);
        let round = |x: f64| out(f32::from_bits(numbers::narrow(x, numbers::F32, rounding)));
        let bad = |a: f32, b: f32| nan && (a.is_nan() || b.is_nan());
        match float {
            Float::Add if plain => self.two(o, mask, |a: f32, b: f32| canonical(a + b)),
            Float::Sub if plain => self.two(o, mask, |a: f32, b: f32| canonical(a - b)),
            Float::Mul if plain => self.two(o, mask, |a: f32, b: f32| canonical(a * b)),
            Float::Fma if plain => self.three(o, mask, |a: f32, b: f32, c: f32| canonical(a.mul_add(b, c))),
            Float::Add => self.two(o, mask, |a, b| out(numbers::add_f32(into(a), into(b), rounding))),
            Float::Sub => self.two(o, mask, |a, b: f32| out(numbers::add_f32(into(a), -into(b), rounding))),
            Float::Mul => self.two(o, mask, |a, b| out(numbers::mul_f32(into(a), into(b), rounding))),
            Float::Fma => self.three(o, mask, |a, b, c| out(numbers::fma_f32(into(a), into(b), into(c), rounding))),
            Float::Div if rounding == Rounding::Nearest => {
                self.two(o, mask, |a: f32, b: f32| out(into(a) / into(b)));
            }
            Float::Div => {
                self.two(o, mask, |a: f32, b: f32| round(numbers::divide_odd(f64::from(into(a)), f64::from(into(b)))))
            }
            Float::Min => self.two(o, mask, |a, b| {
                if bad(a, b) { f32::from_bits(NAN_F32) } else { out(numbers::min_f32(into(a), into(b))) }
            }),
            Float::Max => self.two(o, mask, |a, b| {
                if bad(a, b) { f32::from_bits(NAN_F32) } else { out(numbers::max_f32(into(a), into(b))) }
            }),
            Float::Min3 | Float::Max3 => self.three(o, mask, |a, b, c| {
                let of = if float == Float::Min3 { numbers::min_f32 } else { numbers::max_f32 };
                if bad(a, b) || bad(a, c) { f32::from_bits(NAN_F32) } else { out(of(of(into(a), into(b)), into(c))) }
            }),
            Float::Abs => self.one(o, mask, |a: f32| into(a).abs()),
            Float::Neg => self.one(o, mask, |a: f32| -into(a)),
            Float::CopySign => self.two(o, mask, |a: f32, b: f32| b.copysign(a)),
            Float::Sqrt if rounding == Rounding::Nearest => self.one(o, mask, |a: f32| out(into(a).sqrt())),
            Float::Sqrt => self.one(o, mask, |a: f32| round(numbers::root_odd(f64::from(into(a))))),
            Float::Reciprocal if rounding == Rounding::Nearest => self.one(o, mask, |a: f32| out(1.0 / into(a))),
            Float::Reciprocal => self.one(o, mask, |a: f32| round(numbers::divide_odd(1.0, f64::from(into(a))))),
            Float::ReciprocalRoot => self.one(o, mask, |a: f32| match into(a) {
                // 1 / sqrt(-0) is minus infinity here.
                0.0 => f32::INFINITY.copysign(a),
                a => precise(1.0 / f64::from(a).sqrt()),
            }),
            Float::Sin => self.one(o, mask, |a: f32| precise(f64::from(into(a)).sin())),
            Float::Cos => self.one(o, mask, |a: f32| precise(f64::from(into(a)).cos())),
            Float::Exp2 => self.one(o, mask, |a: f32| out(into(a).exp2())),
            Float::Log2 => self.one(o, mask, |a: f32| out(into(a).log2())),
            Float::Tanh => self.one(o, mask, |a: f32| precise(f64::from(into(a)).tanh())),
        }
    }

    fn double(&mut self, float: Float, mode: Mode, o: &[Slot], mask: u32) {
        let Mode { rounding, .. } = mode;
        match float {
            Float::Add => self.two(o, mask, |a: f64, b: f64| sum_f64(a, b, rounding)),
            Float::Sub => self.two(o, mask, |a: f64, b: f64| sum_f64(a, -b, rounding)),
            Float::Mul => self.two(o, mask, |a: f64, b: f64| {
                let product = a * b;
                numbers::directed(product, a.mul_add(b, -product), rounding)
            }),
            Float::Fma => self.three(o, mask, |a: f64, b: f64, c: f64| a.mul_add(b, c)),
            Float::Div => self.two(o, mask, |a: f64, b: f64| quotient_f64(a, b, rounding)),
            Float::Reciprocal => self.one(o, mask, |a: f64| quotient_f64(1.0, a, rounding)),
            Float::Sqrt => self.one(o, mask, |a: f64| {
                let root = a.sqrt();
                numbers::directed(root, (-root).mul_add(root, a), rounding)
            }),
            Float::ReciprocalRoot => self.one(o, mask, |a: f64| match a {
                0.0 => f64::INFINITY.copysign(a),
                a => 1.0 / a.sqrt(),
            }),
            Float::Min => self.two(o, mask, numbers::min_f64),
            Float::Max => self.two(o, mask, numbers::max_f64),
            Float::Min3 => self.three(o, mask, |a, b, c| numbers::min_f64(numbers::min_f64(a, b), c)),
            Float::Max3 => self.three(o, mask, |a, b, c| numbers::max_f64(numbers::max_f64(a, b), c)),
            Float::Abs => self.one(o, mask, |a: f64| a.abs()),
            Float::Neg => self.one(o, mask, |a: f64| -a),
            Float::CopySign => self.two(o, mask, |a: f64, b: f64| b.copysign(a)),
            Float::Sin => self.one(o, mask, |a: f64| a.sin()),
            Float::Cos => self.one(o, mask, |a: f64| a.cos()),
            Float::Exp2 => self.one(o, mask, |a: f64| a.exp2()),
            Float::Log2 => self.one(o, mask, |a: f64| a.log2()),
            Float::Tanh => self.one(o, mask, |a: f64| a.tanh()),
        }
    }
}

#[inline(always)]
fn canonical(x: f32) -> f32 {
    if x.is_nan() { f32::from_bits(NAN_F32) } else { x }
}

#[inline(always)]
fn to_mask(holds: impl Fn(usize) -> bool) -> u32 {
    let mut bits = [0; LANES];
    for (lane, bit) in bits.iter_mut().enumerate() {
        *bit = u32::from(holds(lane)) << lane;
    }
    bits.iter().fold(0, |mask, bit| mask | bit)
}

fn combine(logic: Logic, a: u32, b: u32) -> u32 {
    match logic {
        Logic::And => a & b,
        Logic::Or => a | b,
        Logic::Xor => a ^ b,
        Logic::Not => !a,
    }
}

fn sum_f64(a: f64, b: f64, rounding: Rounding) -> f64 {
    let sum = a + b;
    if rounding == Rounding::Nearest {
        return sum;
    }
    if sum == 0.0 && rounding == Rounding::Down && a.is_sign_negative() != b.is_sign_negative() {
        return -0.0;
    }
    let other = sum - a;
    numbers::directed(sum, (a - (sum - other)) + (b - other), rounding)
}

fn quotient_f64(a: f64, b: f64, rounding: Rounding) -> f64 {
    let quotient = a / b;
    let rest = (-quotient).mul_add(b, a);
    numbers::directed(quotient, if b > 0.0 { rest } else { -rest }, rounding)
}

fn half_f16(float: Float, mode: Mode, a: f16, b: f16, c: f16) -> f16 {
    match float {
        Float::Abs => return f16::from_bits(a.to_bits() & 0x7fff),
        Float::Neg => return f16::from_bits(a.to_bits() ^ 0x8000),
        _ => {}
    }
    let flushed = |x: f16| if mode.ftz && x.to_bits() & 0x7c00 == 0 { f16::from_bits(x.to_bits() & 0x8000) } else { x };
    let (a, b, c) = (flushed(a), flushed(b), flushed(c));
    let result = match float {
        Float::Fma => flushed(numbers::fma_f16(a, b, c)),
        _ => flushed(numbers::to_f16(half_in_single(float, mode, a.to_f32(), b.to_f32(), c.to_f32()))),
    };
    finish_half(result.to_f32(), mode).map_or(result, numbers::to_f16)
}

fn half_bf16(float: Float, mode: Mode, a: bf16, b: bf16, c: bf16) -> bf16 {
    match float {
        Float::Abs => return bf16::from_bits(a.to_bits() & 0x7fff),
        Float::Neg => return bf16::from_bits(a.to_bits() ^ 0x8000),
        // Sums and products of bf16 are fused operations with 1 and -0.
        Float::Fma => {
            let result = numbers::fma_bf16(a, b, c);
            return finish_half(result.to_f32(), mode).map_or(result, numbers::to_bf16);
        }
        Float::Add | Float::Sub => {
            let c = if float == Float::Sub { bf16::from_bits(b.to_bits() ^ 0x8000) } else { b };
            let result = numbers::fma_bf16(a, bf16::ONE, c);
            return finish_half(result.to_f32(), mode).map_or(result, numbers::to_bf16);
        }
        Float::Mul => {
            let result = numbers::fma_bf16(a, b, bf16::NEG_ZERO);
            return finish_half(result.to_f32(), mode).map_or(result, numbers::to_bf16);
        }
        _ => {}
    }
    let result = numbers::to_bf16(half_in_single(float, mode, a.to_f32(), b.to_f32(), c.to_f32()));
    finish_half(result.to_f32(), mode).map_or(result, numbers::to_bf16)
}

/// What `.sat` and `.relu` make of a result, if anything.
fn finish_half(result: f32, mode: Mode) -> Option<f32> {
    if mode.saturate {
        return Some(if result.is_nan() { 0.0 } else { numbers::max_f32(numbers::min_f32(result, 1.0), 0.0) });
    }
    (mode.relu && result <= 0.0).then_some(0.0)
}

/// In f32, from which rounding once more to 16 bits is as good as rounding once.
fn half_in_single(float: Float, mode: Mode, a: f32, b: f32, c: f32) -> f32 {
    if mode.nan && (a.is_nan() || b.is_nan() || c.is_nan()) {
        return f32::NAN;
    }
    match float {
        Float::Add => a + b,
        Float::Sub => a - b,
        Float::Mul => a * b,
        Float::Min => numbers::min_f32(a, b),
        Float::Max => numbers::max_f32(a, b),
        Float::Min3 => numbers::min_f32(numbers::min_f32(a, b), c),
        Float::Max3 => numbers::max_f32(numbers::max_f32(a, b), c),
        Float::Exp2 => a.exp2(),
        Float::Tanh => f64::from(a).tanh() as f32,
        Float::Div => a / b,
        Float::Sqrt => a.sqrt(),
        Float::Reciprocal => 1.0 / a,
        Float::ReciprocalRoot => 1.0 / a.sqrt(),
        Float::Sin => a.sin(),
        Float::Cos => a.cos(),
        Float::Log2 => a.log2(),
        Float::CopySign => b.copysign(a),
        Float::Fma | Float::Abs | Float::Neg => unreachable!("done before"),
    }
}
