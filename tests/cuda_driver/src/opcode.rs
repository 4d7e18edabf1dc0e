//! Names of instructions with their suffixes to operations: arithmetic, moves, control. `opcode_memory` has the rest.

use crate::counters::Kind;
use crate::decode::Decoder;
use crate::parse::{Operand, PtxError};
use crate::program::{Comparison, Conversion, File, Float, FloatTest, Integer, Logic, Mode, Op, Rounding, Type};
use crate::{opcode_control, opcode_memory};

/// The suffixes of an instruction's name, taken one after the other; what is left at the end was not understood.
pub struct Suffixes<'a> {
    /// Before the first point.
    pub base: &'a str,
    words: Vec<&'a str>,
    opcode: &'a str,
    line: u32,
}

impl<'a> Suffixes<'a> {
    fn new(opcode: &'a str, line: u32) -> Self {
        let mut words = opcode.split('.');
        let base = words.next().unwrap_or_default();
        // Hints for caches, which change no value.
        let hint = |word: &&str| !word.starts_with("L1::") && !word.starts_with("L2::");
        Self { base, words: words.filter(hint).collect(), opcode, line }
    }

    /// Whether the suffix is there.
    pub fn take(&mut self, word: &str) -> bool {
        let found = self.words.iter().position(|w| *w == word);
        if let Some(at) = found {
            self.words.remove(at);
        }
        found.is_some()
    }

    /// The first of these that is there.
    pub fn one_of<T: Copy>(&mut self, choices: &[(&str, T)]) -> Option<T> {
        choices.iter().find(|(word, _)| self.take(word)).map(|(_, value)| *value)
    }

    /// The next suffix that is a type.
    pub fn ty(&mut self) -> Result<Type, PtxError> {
        let found = self.words.iter().position(|word| Type::named(word).is_some());
        let found = found.and_then(|at| Type::named(self.words.remove(at)));
        found.ok_or_else(|| PtxError::new(self.line, format!("`{}` names no type", self.opcode)))
    }

    /// Whether a type is left.
    pub fn has_type(&self) -> bool {
        self.words.iter().any(|word| Type::named(word).is_some())
    }

    /// The first suffix that satisfies something.
    pub fn find(&mut self, f: impl Fn(&str) -> bool) -> Option<&'a str> {
        self.words.iter().position(|word| f(word)).map(|at| self.words.remove(at))
    }

    /// `.rn` and so on.
    pub fn rounding(&mut self) -> Option<Rounding> {
        self.one_of(&[
            ("rn", Rounding::Nearest),
            ("rna", Rounding::NearestAway),
            ("rz", Rounding::Zero),
            ("rm", Rounding::Down),
            ("rp", Rounding::Up),
        ])
    }

    /// Complains about what is left.
    pub fn finish(&self) -> Result<(), PtxError> {
        match self.words.first() {
            Some(word) => {
                let reason = format!("`{}` is not implemented: `.{word}` is not known in it", self.opcode);
                Err(PtxError::new(self.line, reason))
            }
            None => Ok(()),
        }
    }

    /// The whole instruction is not known.
    pub fn unknown<T>(&self) -> Result<T, PtxError> {
        Err(PtxError::new(self.line, format!("the instruction `{}` is not implemented", self.opcode)))
    }

    fn mode(&mut self) -> Mode {
        Mode {
            rounding: self.rounding().unwrap_or(Rounding::Nearest),
            ftz: self.take("ftz"),
            saturate: self.take("sat"),
            nan: self.take("NaN"),
            relu: self.take("relu"),
        }
    }
}

/// Appends what an instruction does.
///
/// # Errors
///
/// If it is unknown, in a form that is, or has the wrong operands.
pub fn decode(decoder: &mut Decoder, opcode: &str, operands: &[Operand]) -> Result<(), PtxError> {
    let mut suffixes = Suffixes::new(opcode, decoder.line());
    let s = &mut suffixes;
    match s.base {
        "add" | "sub" | "mul" | "mad" | "fma" | "div" | "rem" | "min" | "max" | "abs" | "neg" | "addc" | "subc"
        | "madc" | "mul24" | "mad24" => arithmetic(decoder, s, operands),
        "sqrt" | "rsqrt" | "rcp" | "sin" | "cos" | "ex2" | "lg2" | "tanh" | "copysign" => {
            function(decoder, s, operands)
        }
        "and" | "or" | "xor" | "not" | "cnot" | "shl" | "shr" | "popc" | "clz" | "brev" | "bfe" | "bfi" | "bfind"
        | "sad" | "prmt" | "lop3" | "shf" | "dp4a" => bits(decoder, s, operands),
        "setp" | "set" | "selp" | "slct" | "testp" => compare(decoder, s, operands),
        "mov" => moves(decoder, s, operands),
        "cvt" => convert(decoder, s, operands),
        "exit" | "ret" | "trap" | "brkpt" | "bar" | "barrier" | "membar" | "fence" | "nanosleep" | "griddepcontrol"
        | "prefetch" | "prefetchu" | "discard" | "applypriority" => opcode_control::control(decoder, s, operands),
        "shfl" | "vote" | "match" | "activemask" | "redux" => opcode_control::between_lanes(decoder, s, operands),
        _ => opcode_memory::decode(decoder, s, operands),
    }
}

/// Reads sources of the same type and writes one result.
pub(crate) fn simple(
    d: &mut Decoder,
    op: Op,
    kind: Kind,
    to: Type,
    from: &[Type],
    operands: &[Operand],
) -> Result<(), PtxError> {
    if operands.len() != from.len() + 1 {
        return d.error(format!("{} operands are needed, there are {}", from.len() + 1, operands.len()));
    }
    let mut sources = Vec::new();
    for (operand, ty) in operands[1..].iter().zip(from) {
        sources.push(d.read(operand, *ty)?);
    }
    let result = d.write(&operands[0], to)?;
    d.emit(op, &[result], &sources, kind);
    Ok(())
}

fn float_kind(ty: Type) -> Kind {
    match ty {
        Type::F64 => Kind::Double,
        Type::F32 => Kind::Float,
        _ => Kind::Half,
    }
}

fn wider(ty: Type) -> Option<Type> {
    Some(match ty {
        Type::U16 => Type::U32,
        Type::S16 => Type::S32,
        Type::U32 => Type::U64,
        Type::S32 => Type::S64,
        _ => return None,
    })
}

fn arithmetic(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    let carry_out = s.take("cc");
    let size = s.one_of(&[("lo", 0), ("hi", 1), ("wide", 2)]);
    let base = s.base;
    let mut mode = s.mode();
    let (approximate, full) = (s.take("approx"), s.take("full"));
    let noftz = s.take("noftz");
    let xorsign = s.find(|word| word == "xorsign").is_some();
    let ty = s.ty()?;
    // `add.f32.bf16`: mixed precision.
    s.finish()?;
    if xorsign || noftz && base != "add" {
        return s.unknown();
    }
    if ty.is_float() {
        let float = match (base, operands.len()) {
            ("add", _) => Float::Add,
            ("sub", _) => Float::Sub,
            ("mul", _) => Float::Mul,
            ("fma" | "mad", _) => Float::Fma,
            ("div", _) => Float::Div,
            ("min", 4) => Float::Min3,
            ("max", 4) => Float::Max3,
            ("min", _) => Float::Min,
            ("max", _) => Float::Max,
            ("abs", _) => Float::Abs,
            ("neg", _) => Float::Neg,
            _ => return s.unknown(),
        };
        let whole = matches!(ty, Type::F32) || mode.rounding == Rounding::Nearest;
        let double = ty == Type::F64 && !matches!(float, Float::Fma);
        if !(whole || double) || size.is_some() || carry_out || matches!(ty, Type::Tf32) {
            return s.unknown();
        }
        if approximate || full {
            mode.rounding = Rounding::Nearest;
        }
        let sources = vec![ty; operands.len().max(1) - 1];
        return simple(d, Op::Float(float, ty, mode), float_kind(ty), ty, &sources, operands);
    }
    let carries = carry_out || matches!(base, "addc" | "subc" | "madc");
    if carries {
        return carry(d, s, operands, ty, size, carry_out);
    }
    let wide = wider(ty);
    let integer = match (base, size) {
        ("min", None) if mode.relu && ty == Type::S32 => Integer::MinRelu,
        ("max", None) if mode.relu && ty == Type::S32 => Integer::MaxRelu,
        _ if mode.relu || mode.nan || mode.ftz => return s.unknown(),
        ("add", None) if mode.saturate => Integer::AddSaturated,
        ("sub", None) if mode.saturate => Integer::SubSaturated,
        ("add", None) => Integer::Add,
        ("sub", None) => Integer::Sub,
        ("mul", Some(0)) => Integer::MulLow,
        ("mul", Some(1)) => Integer::MulHigh,
        ("mul", Some(2)) if wide.is_some() => Integer::MulWide,
        ("mad", Some(0)) => Integer::MadLow,
        ("mad", Some(1)) if !mode.saturate => Integer::MadHigh,
        ("mad", Some(2)) if wide.is_some() => Integer::MadWide,
        ("div", None) => Integer::Div,
        ("rem", None) => Integer::Rem,
        ("min", None) => Integer::Min,
        ("max", None) => Integer::Max,
        ("abs", None) => Integer::Abs,
        ("neg", None) => Integer::Neg,
        _ => return s.unknown(),
    };
    if mode.saturate && (ty != Type::S32 || !matches!(integer, Integer::AddSaturated | Integer::SubSaturated)) {
        return s.unknown();
    }
    let kind = if matches!(integer, Integer::Div | Integer::Rem) { Kind::Division } else { Kind::Integer };
    let to = if size == Some(2) { wide.unwrap_or(ty) } else { ty };
    let mut sources = vec![ty; operands.len().max(1) - 1];
    if let (Integer::MadWide, Some(last)) = (integer, sources.last_mut()) {
        *last = to;
    }
    simple(d, Op::Integer(integer, ty), kind, to, &sources, operands)
}

fn carry(
    d: &mut Decoder,
    s: &Suffixes,
    operands: &[Operand],
    ty: Type,
    size: Option<i32>,
    carry_out: bool,
) -> Result<(), PtxError> {
    let base = s.base;
    if !matches!(ty.bits(), 32 | 64) {
        return s.unknown();
    }
    let carry_register = d.carry();
    let into = if base.ends_with('c') { carry_register } else { d.constant(File::Predicate, 0) };
    let out = if carry_out { carry_register } else { d.fresh(File::Predicate) };
    let (a, b) = match (base, operands) {
        ("add" | "addc" | "sub" | "subc", [_, a, b]) => (d.read(a, ty)?, d.read(b, ty)?),
        ("mad" | "madc", [_, a, b, c]) => {
            let product = d.fresh(ty.file());
            let (a, b) = (d.read(a, ty)?, d.read(b, ty)?);
            let integer = if size == Some(1) { Integer::MulHigh } else { Integer::MulLow };
            d.emit(Op::Integer(integer, ty), &[product], &[a, b], Kind::Integer);
            (product, d.read(c, ty)?)
        }
        _ => return s.unknown(),
    };
    let result = d.write(&operands[0], ty)?;
    d.emit(Op::Carry { subtract: base.starts_with("sub"), ty }, &[result, out], &[a, b, into], Kind::Integer);
    Ok(())
}

fn function(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    let float = match s.base {
        "sqrt" => Float::Sqrt,
        "rsqrt" => Float::ReciprocalRoot,
        "rcp" => Float::Reciprocal,
        "sin" => Float::Sin,
        "cos" => Float::Cos,
        "ex2" => Float::Exp2,
        "lg2" => Float::Log2,
        "tanh" => Float::Tanh,
        _ => Float::CopySign,
    };
    s.take("approx");
    let mode = s.mode();
    let ty = s.ty()?;
    s.finish()?;
    let sources = vec![ty; operands.len().max(1) - 1];
    let kind = if float == Float::CopySign { float_kind(ty) } else { Kind::Transcendental };
    simple(d, Op::Float(float, ty, mode), kind, ty, &sources, operands)
}

fn bits(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    let shift_amount = s.take("shiftamt");
    let left = s.one_of(&[("l", true), ("r", false)]);
    let wrap = s.one_of(&[("wrap", true), ("clamp", false)]);
    if s.base == "dp4a" {
        let (a, b) = (s.ty()?, s.ty()?);
        s.finish()?;
        let op = Op::Integer(Integer::Dot4(a.is_signed(), b.is_signed()), a);
        return simple(d, op, Kind::Integer, a, &[a, b, a], operands);
    }
    let ty = s.ty()?;
    s.finish()?;
    let (op, to, from): (_, _, Vec<Type>) = match s.base {
        base @ ("and" | "or" | "xor" | "not") if ty == Type::Pred => {
            let logic = match base {
                "and" => Logic::And,
                "or" => Logic::Or,
                "xor" => Logic::Xor,
                _ => Logic::Not,
            };
            let [result, sources @ ..] = operands else { return s.unknown() };
            let mut read = Vec::new();
            for operand in sources {
                read.push(d.read(operand, Type::Pred)?);
            }
            let result = d.write(result, Type::Pred)?;
            let (Some(first), Some(last)) = (read.first().copied(), read.last().copied()) else { return s.unknown() };
            d.emit(Op::Logic(logic), &[result], &[first, last], Kind::Compare);
            return Ok(());
        }
        "and" => (Integer::And, ty, vec![ty; 2]),
        "or" => (Integer::Or, ty, vec![ty; 2]),
        "xor" => (Integer::Xor, ty, vec![ty; 2]),
        "not" => (Integer::Not, ty, vec![ty]),
        "cnot" => (Integer::LogicalNot, ty, vec![ty]),
        "shl" => (Integer::ShiftLeft, ty, vec![ty, Type::U32]),
        "shr" => (Integer::ShiftRight, ty, vec![ty, Type::U32]),
        "popc" => (Integer::PopulationCount, Type::U32, vec![ty]),
        "clz" => (Integer::LeadingZeros, Type::U32, vec![ty]),
        "brev" => (Integer::Reverse, ty, vec![ty]),
        "bfe" => (Integer::ExtractField, ty, vec![ty, Type::U32, Type::U32]),
        "bfi" => (Integer::InsertField, ty, vec![ty, ty, Type::U32, Type::U32]),
        "bfind" => (Integer::FindTop(shift_amount), Type::U32, vec![ty]),
        "sad" => (Integer::SumOfDifferences, ty, vec![ty; 3]),
        "prmt" => (Integer::Permute, ty, vec![ty; 3]),
        "lop3" => {
            let [operands @ .., Operand::Integer(table)] = operands else { return s.unknown() };
            let op = Op::Integer(Integer::Lop3(*table as u8), ty);
            return simple(d, op, Kind::Integer, ty, &[ty; 3], operands);
        }
        "shf" => match (left, wrap) {
            (Some(left), Some(wrap)) => (Integer::Funnel { left, wrap }, ty, vec![ty, ty, Type::U32]),
            _ => return s.unknown(),
        },
        _ => return s.unknown(),
    };
    simple(d, Op::Integer(op, ty), Kind::Integer, to, &from, operands)
}

const COMPARISONS: [(&str, Comparison); 18] = [
    ("eq", Comparison::Eq),
    ("ne", Comparison::Ne),
    ("lt", Comparison::Lt),
    ("le", Comparison::Le),
    ("gt", Comparison::Gt),
    ("ge", Comparison::Ge),
    ("lo", Comparison::Lt),
    ("ls", Comparison::Le),
    ("hi", Comparison::Gt),
    ("hs", Comparison::Ge),
    ("equ", Comparison::EqOrNan),
    ("neu", Comparison::NeOrNan),
    ("ltu", Comparison::LtOrNan),
    ("leu", Comparison::LeOrNan),
    ("gtu", Comparison::GtOrNan),
    ("geu", Comparison::GeOrNan),
    ("num", Comparison::IsNumber),
    ("nan", Comparison::IsNan),
];

fn compare(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    if s.base == "testp" {
        let test = s.one_of(&[
            ("finite", FloatTest::Finite),
            ("infinite", FloatTest::Infinite),
            ("number", FloatTest::Number),
            ("notanumber", FloatTest::NotANumber),
            ("normal", FloatTest::Normal),
            ("subnormal", FloatTest::Subnormal),
        ]);
        let ty = s.ty()?;
        let Some(test) = test else { return s.unknown() };
        s.finish()?;
        return simple(d, Op::Test(test, ty), Kind::Compare, Type::Pred, &[ty], operands);
    }
    let comparison = s.one_of(&COMPARISONS);
    let combine = s.one_of(&[("and", Logic::And), ("or", Logic::Or), ("xor", Logic::Xor)]);
    let ftz = s.take("ftz");
    let first = s.ty()?;
    match s.base {
        "selp" => {
            s.finish()?;
            simple(d, Op::Select, Kind::Move, first, &[first, first, Type::Pred], operands)
        }
        "slct" => {
            let by = s.ty()?;
            s.finish()?;
            simple(d, Op::SelectBySign(by), Kind::Move, first, &[first, first, by], operands)
        }
        base => {
            let (to, ty) = if base == "set" { (first, s.ty()?) } else { (Type::Pred, first) };
            s.finish()?;
            let (Some(comparison), [result, a, b, rest @ ..]) = (comparison, operands) else { return s.unknown() };
            let mut sources = vec![d.read(a, ty)?, d.read(b, ty)?];
            let mut invert = false;
            match (combine, rest) {
                (None, []) => {}
                (Some(_), [Operand::Not(name)]) => {
                    sources.push(d.register(name)?);
                    invert = true;
                }
                (Some(_), [c]) => sources.push(d.read(c, Type::Pred)?),
                _ => return s.unknown(),
            }
            if base == "set" {
                let result = d.write(result, to)?;
                let op = Op::Set { comparison, ty, ftz, to, combine, invert };
                d.emit(op, &[result], &sources, Kind::Compare);
                return Ok(());
            }
            let results = match result {
                Operand::Pair(p, q) => [d.write(p, Type::Pred)?, d.write(q, Type::Pred)?],
                p => [d.write(p, Type::Pred)?, d.fresh(File::Predicate)],
            };
            d.emit(Op::Compare { comparison, ty, ftz, combine, invert }, &results, &sources, Kind::Compare);
            Ok(())
        }
    }
}

fn moves(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    let ty = s.ty()?;
    s.finish()?;
    match operands {
        [result, Operand::Vector(parts)] => {
            let bits = ty.bits() / parts.len().max(1) as u32;
            let part = part_type(bits).map_or_else(|| s.unknown(), Ok)?;
            let mut sources = Vec::new();
            for operand in parts {
                sources.push(d.read(operand, part)?);
            }
            let result = d.write(result, ty)?;
            d.emit(Op::Pack(bits), &[result], &sources, Kind::Move);
        }
        [Operand::Vector(parts), source] => {
            let bits = ty.bits() / parts.len().max(1) as u32;
            let part = part_type(bits).map_or_else(|| s.unknown(), Ok)?;
            let source = d.read(source, ty)?;
            let mut results = Vec::new();
            for operand in parts {
                results.push(d.write(operand, part)?);
            }
            d.emit(Op::Unpack(bits), &results, &[source], Kind::Move);
        }
        [result, Operand::Name(name)] if ["%clock", "%clock64", "%globaltimer", "%clock_hi"].contains(&&name[..]) => {
            let result = d.write(result, ty)?;
            d.emit(Op::Clock, &[result], &[], Kind::Move);
        }
        [result, Operand::Name(name)] if name == "%activemask" => {
            let result = d.write(result, ty)?;
            d.emit(Op::ActiveMask, &[result], &[], Kind::Move);
        }
        [result, source] => {
            let wide_special = ty.file() == File::Wide && matches!(source, Operand::Name(name) if name == "%gridid");
            let source = if wide_special { d.constant(File::Wide, 1) } else { d.read(source, ty)? };
            let result = d.write(result, ty)?;
            d.emit(Op::Move, &[result], &[source], Kind::Move);
        }
        _ => return s.unknown(),
    }
    Ok(())
}

fn part_type(bits: u32) -> Option<Type> {
    match bits {
        8 => Some(Type::B8),
        16 => Some(Type::B16),
        32 => Some(Type::B32),
        _ => None,
    }
}

fn convert(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    let to_integer = s.one_of(&[
        ("rni", Rounding::Nearest),
        ("rzi", Rounding::Zero),
        ("rmi", Rounding::Down),
        ("rpi", Rounding::Up),
    ]);
    let rounding = s.rounding();
    let (ftz, saturate, relu) = (s.take("ftz"), s.take("sat"), s.take("relu"));
    let (to, from) = (s.ty()?, s.ty()?);
    s.finish()?;
    let conversion = Conversion {
        to,
        from,
        rounding: to_integer.or(rounding).unwrap_or(Rounding::Nearest),
        to_integer: to_integer.is_some() || from.is_float() && !to.is_float(),
        ftz,
        saturate,
        relu,
    };
    match operands {
        [result, source] => {
            // Registers may be wider than the types, whose lower bits are then meant.
            let source = d.read_any(source, from)?;
            let result = d.write_any(result, to)?;
            if source.file() == File::Predicate || result.file() == File::Predicate {
                return s.unknown();
            }
            d.emit(Op::Convert(conversion), &[result], &[source], Kind::Conversion);
            Ok(())
        }
        [_, _, _] if from == Type::F32 && matches!(to, Type::F16x2 | Type::Bf16x2) => {
            simple(d, Op::ConvertPair(conversion), Kind::Conversion, to, &[from, from], operands)
        }
        _ => s.unknown(),
    }
}
