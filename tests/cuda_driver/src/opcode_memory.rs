//! Names of instructions to operations: memory and tensor cores.

use crate::counters::Kind;
use crate::decode::Decoder;
use crate::opcode::Suffixes;
use crate::parse::{Operand, PtxError};
use crate::program::{Access, Atomic, File, Fragment, Op, Product, Slot, Space, Tile, Type};

/// As [`crate::opcode::decode`].
///
/// # Errors
///
/// The same.
pub fn decode(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    match s.base {
        "ld" | "ldu" => load(d, s, operands),
        "st" => store(d, s, operands),
        "atom" | "red" => atomic(d, s, operands),
        "cvta" => to_or_from_generic(d, s, operands),
        "isspacep" => {
            let space = space(s);
            s.finish()?;
            let [result, address] = operands else { return s.unknown() };
            let address = d.read(address, Type::B64)?;
            let result = d.write(result, Type::Pred)?;
            d.emit(Op::IsSpace(space), &[result], &[address], Kind::Integer);
            Ok(())
        }
        "wmma" => tiles(d, s, operands),
        "mma" => product(d, s, operands, true),
        "ldmatrix" | "stmatrix" => matrices(d, s, operands),
        "cp" => copies(d, s, operands),
        _ => s.unknown(),
    }
}

fn space(s: &mut Suffixes) -> Space {
    let spaces = [
        ("global", Space::Global),
        ("shared", Space::Shared),
        ("shared::cta", Space::Shared),
        ("local", Space::Local),
        ("param", Space::Param),
        ("param::entry", Space::Param),
        ("param::func", Space::Param),
        ("const", Space::Const),
    ];
    s.one_of(&spaces).unwrap_or(Space::Generic)
}

/// `.weak`, `.relaxed.gpu` and so on: whether other cubes may access it at the same time.
fn strength(s: &mut Suffixes) -> bool {
    let strong = s.take("relaxed") | s.take("acquire") | s.take("release") | s.take("volatile") | s.take("acq_rel");
    s.take("weak");
    s.one_of(&[("cta", 0), ("cluster", 1), ("gpu", 2), ("sys", 3)]);
    strong
}

fn memory_kind(space: Space, store: bool) -> Kind {
    match (space, store) {
        (Space::Global | Space::Generic | Space::Const, false) => Kind::GlobalLoad,
        (Space::Global | Space::Generic | Space::Const, true) => Kind::GlobalStore,
        (Space::Shared, false) => Kind::SharedLoad,
        (Space::Shared, true) => Kind::SharedStore,
        _ => Kind::OtherMemory,
    }
}

/// The smallest access decides over the resolution at which races are looked for.
fn note_granule(d: &mut Decoder, space: Space, bytes: usize) {
    if matches!(space, Space::Shared | Space::Generic) {
        d.program.shared_granule = d.program.shared_granule.min(bytes);
    }
    if matches!(space, Space::Global | Space::Generic | Space::Const) {
        d.program.global_granule = d.program.global_granule.min(bytes);
    }
}

fn access(s: &mut Suffixes) -> Result<Access, PtxError> {
    let space = space(s);
    let shared_between_cubes = strength(s);
    s.take("nc");
    let count = s.one_of(&[("v2", 2), ("v4", 4), ("v8", 8)]).unwrap_or(1);
    let ty = s.ty()?;
    s.finish()?;
    if count as usize * ty.bytes() > 32 || ty == Type::B128 {
        return s.unknown();
    }
    Ok(Access { space, ty, count, shared_between_cubes, offset: 0 })
}

fn load(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    let mut access = access(s)?;
    let [result, address] = operands else { return s.unknown() };
    let results = values(d, result, access, true)?;
    let (base, offset, variable) = d.address(address)?;
    (access.space, access.offset) = (variable.unwrap_or(access.space), offset);
    note_granule(d, access.space, access.ty.bytes());
    d.emit(Op::Load(access), &results, &[base], memory_kind(access.space, false));
    Ok(())
}

fn store(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    let mut access = access(s)?;
    let [address, source] = operands else { return s.unknown() };
    let (base, offset, variable) = d.address(address)?;
    (access.space, access.offset) = (variable.unwrap_or(access.space), offset);
    note_granule(d, access.space, access.ty.bytes());
    let mut sources = vec![base];
    sources.extend(values(d, source, access, false)?);
    d.emit(Op::Store(access), &[], &sources, memory_kind(access.space, true));
    Ok(())
}

/// The registers of a (vector) load or store.
fn values(d: &mut Decoder, operand: &Operand, access: Access, written: bool) -> Result<Vec<Slot>, PtxError> {
    let one = std::slice::from_ref(operand);
    let operands = if let Operand::Vector(parts) = operand { &parts[..] } else { one };
    if operands.len() != access.count as usize {
        return d.error(format!("{} registers are needed, there are {}", access.count, operands.len()));
    }
    let mut slots = Vec::new();
    for operand in operands {
        slots.push(if written { d.write_any(operand, access.ty)? } else { d.read_any(operand, access.ty)? });
    }
    if slots.iter().any(|slot| slot.file() == File::Predicate) {
        return d.error("predicates can be neither loaded nor stored");
    }
    Ok(slots)
}

fn atomic(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    let is_reduction = s.base == "red";
    let space = space(s);
    strength(s);
    let atomic = s.one_of(&[
        ("add", Atomic::Add),
        ("min", Atomic::Min),
        ("max", Atomic::Max),
        ("and", Atomic::And),
        ("or", Atomic::Or),
        ("xor", Atomic::Xor),
        ("exch", Atomic::Exchange),
        ("cas", Atomic::CompareAndSwap),
        ("inc", Atomic::Increment),
        ("dec", Atomic::Decrement),
    ]);
    s.take("noftz");
    let ty = s.ty()?;
    s.finish()?;
    let Some(atomic) = atomic else { return s.unknown() };
    let float = matches!(ty, Type::F32 | Type::F64 | Type::F16 | Type::Bf16 | Type::F16x2 | Type::Bf16x2);
    let fits = match atomic {
        Atomic::Add => true,
        Atomic::Min | Atomic::Max => !float,
        Atomic::Exchange | Atomic::CompareAndSwap => matches!(ty.bits(), 16 | 32 | 64),
        Atomic::Increment | Atomic::Decrement => ty == Type::U32,
        _ => !float,
    };
    if !fits || ty.bits() < 16 {
        return s.unknown();
    }
    let wanted = if atomic == Atomic::CompareAndSwap { 2 } else { 1 };
    let (result, rest) = match operands {
        [rest @ ..] if is_reduction => (None, rest),
        [result, rest @ ..] => (Some(result), rest),
        [] => return s.unknown(),
    };
    let [address, sources @ ..] = rest else { return s.unknown() };
    if sources.len() != wanted {
        return s.unknown();
    }
    let (base, offset, variable) = d.address(address)?;
    let space = variable.unwrap_or(space);
    let mut read = vec![base];
    for source in sources {
        read.push(d.read(source, ty)?);
    }
    let result = match result {
        Some(result) => d.write(result, ty)?,
        None => d.fresh(ty.file()),
    };
    note_granule(d, space, ty.bytes());
    let access = Access { space, ty, count: 1, shared_between_cubes: true, offset };
    d.emit(Op::Atomic(atomic, access), &[result], &read, Kind::Atomic);
    Ok(())
}

fn to_or_from_generic(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    let to = s.take("to");
    let space = space(s);
    let ty = s.ty()?;
    s.finish()?;
    let [result, source] = operands else { return s.unknown() };
    let source = d.read(source, ty)?;
    let result = d.write(result, ty)?;
    if ty.bits() != 64 || space == Space::Generic {
        return s.unknown();
    }
    let op = if to { Op::FromGeneric(space) } else { Op::ToGeneric(space) };
    d.emit(op, &[result], &[source], Kind::Integer);
    Ok(())
}

fn shape(s: &mut Suffixes) -> Option<[usize; 3]> {
    let word = s.find(|word| word.starts_with('m') && word.contains('n') && word.contains('k'))?;
    let (m, rest) = word[1..].split_once('n')?;
    let (n, k) = rest.split_once('k')?;
    Some([m.parse().ok()?, n.parse().ok()?, k.parse().ok()?])
}

/// Whether the first layout that is left is by rows.
fn layout(s: &mut Suffixes) -> Option<bool> {
    s.find(|word| word == "row" || word == "col").map(|word| word == "row")
}

/// Registers of a lane for a fragment of `wmma`.
pub fn tile_registers(shape: [usize; 3], fragment: Fragment, ty: Type) -> usize {
    let [m, n, k] = shape;
    match (fragment, ty) {
        // Each element is held twice or four times where the tile is small.
        (Fragment::A | Fragment::B, Type::F16) => 8,
        (Fragment::A, _) => m * k / 64,
        (Fragment::B, _) => n * k / 64,
        (Fragment::Sum, Type::F32) => m * n / 32,
        (Fragment::Sum, _) => m * n / 64,
    }
}

fn tiles(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    if s.take("mma") {
        return product(d, s, operands, false);
    }
    let (is_load, is_store) = (s.take("load"), s.take("store"));
    let fragment = s.one_of(&[("a", Fragment::A), ("b", Fragment::B), ("c", Fragment::Sum), ("d", Fragment::Sum)]);
    s.take("sync");
    s.take("aligned");
    let (shape, layout, space) = (shape(s), layout(s), space(s));
    let ty = s.ty()?;
    s.finish()?;
    let (Some(shape @ ([16, 16, 16] | [32, 8, 16] | [8, 32, 16])), Some(row_major), Some(fragment)) =
        (shape, layout, fragment)
    else {
        return s.unknown();
    };
    let known = match fragment {
        Fragment::Sum => matches!(ty, Type::F32 | Type::F16),
        _ => matches!(ty, Type::F16 | Type::Bf16),
    };
    if !known || is_load == is_store {
        return s.unknown();
    }
    let tile = Tile { shape, fragment, row_major, ty };
    let (vector, address, stride) = match operands {
        [Operand::Vector(vector), address, stride @ ..] if is_load => (vector, address, stride),
        [address, Operand::Vector(vector), stride @ ..] if is_store => (vector, address, stride),
        _ => return s.unknown(),
    };
    if vector.len() != tile_registers(shape, fragment, ty) {
        return d.error(format!("{} registers hold this fragment", tile_registers(shape, fragment, ty)));
    }
    let mut registers = Vec::new();
    for operand in vector {
        registers.push(if is_load { d.write(operand, Type::B32)? } else { d.read(operand, Type::B32)? });
    }
    let [m, n, k] = shape;
    let dense = match (fragment, row_major) {
        (Fragment::A, true) | (Fragment::B, false) => k,
        (Fragment::A, false) | (Fragment::Sum, false) => m,
        (Fragment::B, true) | (Fragment::Sum, true) => n,
    };
    let stride = match stride {
        [] => d.constant(File::Word, dense as u64),
        [stride] => d.read(stride, Type::U32)?,
        _ => return s.unknown(),
    };
    let (base, offset, variable) = d.address(address)?;
    let space = variable.unwrap_or(space);
    note_granule(d, space, ty.bytes());
    let kind = memory_kind(space, is_store);
    if is_load {
        d.emit(Op::TileLoad(tile, space, offset), &registers, &[base, stride], kind);
    } else {
        let mut sources = vec![base, stride];
        sources.extend(registers);
        d.emit(Op::TileStore(tile, space, offset), &[], &sources, kind);
    }
    Ok(())
}

fn product(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand], documented: bool) -> Result<(), PtxError> {
    s.take("sync");
    s.take("aligned");
    let shape = shape(s);
    let (a_rows, b_rows) = (layout(s), layout(s));
    let mut types = Vec::new();
    while s.has_type() {
        types.push(s.ty()?);
    }
    s.finish()?;
    let (d_type, ty, c_type) = match types[..] {
        [d, c] if !documented => (d, Type::F16, c),
        [d, a, b, c] if a == b => (d, a, c),
        _ => return s.unknown(),
    };
    let Some(shape) = shape else { return s.unknown() };
    let known_shape = match documented {
        true => matches!(shape, [16, 8, 8 | 16]) && a_rows == Some(true) && b_rows == Some(false),
        false => matches!(shape, [16, 16, 16] | [32, 8, 16] | [8, 32, 16]) && a_rows.is_some() && b_rows.is_some(),
    };
    let sums = |ty| ty == Type::F32 || ty == Type::F16;
    let known_types = sums(c_type)
        && sums(d_type)
        && (ty == Type::F16 || ty == Type::Bf16 && c_type == Type::F32 && d_type == Type::F32);
    if !known_shape || !known_types {
        return s.unknown();
    }
    let [m, n, k] = shape;
    let counts = match documented {
        true => {
            let sum = |ty| if ty == Type::F32 { m * n / 32 } else { m * n / 64 };
            [sum(d_type), m * k / 64, n * k / 64, sum(c_type)]
        }
        false => [
            tile_registers(shape, Fragment::Sum, d_type),
            tile_registers(shape, Fragment::A, ty),
            tile_registers(shape, Fragment::B, ty),
            tile_registers(shape, Fragment::Sum, c_type),
        ],
    };
    let mut registers: Vec<Vec<Slot>> = Vec::new();
    for (i, (operand, count)) in operands.iter().zip(counts).enumerate() {
        let one = std::slice::from_ref(operand);
        let vector = if let Operand::Vector(vector) = operand { &vector[..] } else { one };
        if vector.len() != count {
            return d.error(format!("operand {} has {} registers, {count} are needed", i + 1, vector.len()));
        }
        let mut slots = Vec::new();
        for operand in vector {
            slots.push(if i == 0 { d.write(operand, Type::B32)? } else { d.read(operand, Type::B32)? });
        }
        registers.push(slots);
    }
    let [results, a, b, c] = &registers[..] else { return s.unknown() };
    let sources: Vec<Slot> = a.iter().chain(b).chain(c).copied().collect();
    let product = Product { shape, ty, c: c_type, d: d_type, documented };
    d.emit(Op::Product(product), results, &sources, Kind::Tensor);
    Ok(())
}

fn matrices(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    s.take("sync");
    s.take("aligned");
    let is_load = s.base == "ldmatrix";
    let transpose = s.take("trans");
    let count = s.one_of(&[("x1", 1), ("x2", 2), ("x4", 4)]);
    let (square, space) = (s.take("m8n8"), space(s));
    let ty = s.ty()?;
    s.finish()?;
    let (vector, address) = match operands {
        [Operand::Vector(vector), address] if is_load => (vector, address),
        [address, Operand::Vector(vector)] if !is_load => (vector, address),
        _ => return s.unknown(),
    };
    let Some(count) = count.filter(|count| square && ty == Type::B16 && vector.len() == *count as usize) else {
        return s.unknown();
    };
    let mut registers = Vec::new();
    for operand in vector {
        registers.push(if is_load { d.write(operand, Type::B32)? } else { d.read(operand, Type::B32)? });
    }
    let (base, offset, variable) = d.address(address)?;
    let space = variable.unwrap_or(space);
    note_granule(d, space, 2);
    if is_load {
        d.emit(Op::MatrixLoad { count, transpose, space, offset }, &registers, &[base], Kind::SharedLoad);
    } else {
        let mut sources = vec![base];
        sources.extend(registers);
        d.emit(Op::MatrixStore { count, transpose, space, offset }, &[], &sources, Kind::SharedStore);
    }
    Ok(())
}

fn copies(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    if !s.take("async") {
        return s.unknown();
    }
    if s.take("commit_group") {
        s.finish()?;
        d.emit(Op::CopyCommit, &[], &[], Kind::Other);
        return Ok(());
    }
    if s.take("wait_all") {
        s.finish()?;
        d.emit(Op::CopyCommit, &[], &[], Kind::Other);
        d.emit(Op::CopyWait(0), &[], &[], Kind::Other);
        return Ok(());
    }
    if s.take("wait_group") {
        s.finish()?;
        let [Operand::Integer(groups)] = operands else { return s.unknown() };
        d.emit(Op::CopyWait(*groups as u32), &[], &[], Kind::Other);
        return Ok(());
    }
    let cache = s.one_of(&[("ca", true), ("cg", false)]);
    let spaces = s.take("shared") | s.take("shared::cta");
    let global = s.take("global");
    s.finish()?;
    let (Some(all), true, true, [to, from, Operand::Integer(bytes), read @ ..]) = (cache, spaces, global, operands)
    else {
        return s.unknown();
    };
    if !(*bytes == 16 || all && (*bytes == 4 || *bytes == 8)) {
        return s.unknown();
    }
    let (to, to_offset, _) = d.address(to)?;
    let (from, from_offset, _) = d.address(from)?;
    let read = match read {
        [] => d.constant(File::Word, *bytes),
        [read] => d.read(read, Type::U32)?,
        _ => return s.unknown(),
    };
    let op = Op::CopyAsync { bytes: *bytes as u8, to_offset, from_offset };
    d.emit(op, &[], &[to, from, read], Kind::GlobalLoad);
    Ok(())
}
