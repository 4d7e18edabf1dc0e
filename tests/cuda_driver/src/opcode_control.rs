//! Names of instructions to operations: returns, barriers, exchange between lanes.

use crate::counters::Kind;
use crate::decode::Decoder;
use crate::opcode::{Suffixes, simple};
use crate::parse::{Operand, PtxError};
use crate::program::{Atomic, File, Op, Shuffle, Slot, Type, Vote};

/// As [`crate::opcode::decode`].
pub(crate) fn control(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    match s.base {
        "exit" | "ret" => d.emit(Op::Return, &[], &[], Kind::Branch),
        "trap" | "brkpt" => d.emit(Op::Trap, &[], &[], Kind::Other),
        "membar" | "fence" => d.emit(Op::Fence, &[], &[], Kind::Other),
        "bar" | "barrier" => return barrier(d, s, operands),
        _ => d.emit(Op::Nothing, &[], &[], Kind::Other),
    }
    Ok(())
}

fn barrier(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    if s.take("warp") {
        s.take("sync");
        s.finish()?;
        let [mask] = operands else { return s.unknown() };
        let mask = d.read(mask, Type::U32)?;
        d.emit(Op::WarpBarrier, &[], &[mask], Kind::Barrier);
        return Ok(());
    }
    s.take("cta");
    // `bar` is `barrier.cta` with `.aligned`.
    let aligned = s.take("aligned") || s.base == "bar";
    let (sync, arrive, reduce) = (s.take("sync"), s.take("arrive"), s.take("red"));
    if reduce {
        let vote = s.one_of(&[("and", Vote::All), ("or", Vote::Any), ("popc", Vote::Ballot)]);
        s.ty()?;
        s.finish()?;
        let Some(vote) = vote else { return s.unknown() };
        let (result, id, threads, p) = match operands {
            [result, id, p] => (result, id, &Operand::Integer(0), p),
            [result, id, threads, p] => (result, id, threads, p),
            _ => return s.unknown(),
        };
        let ty = if vote == Vote::Ballot { Type::U32 } else { Type::Pred };
        let sources = [d.read(id, Type::U32)?, d.read(threads, Type::U32)?, d.read(p, Type::Pred)?];
        let result = d.write(result, ty)?;
        d.emit(Op::BarrierReduce(vote), &[result], &sources, Kind::Barrier);
        return Ok(());
    }
    s.take("all");
    s.finish()?;
    if sync == arrive {
        return s.unknown();
    }
    let (id, threads) = match operands {
        [id] if sync => (id, &Operand::Integer(0)),
        [id, threads] => (id, threads),
        _ => return s.unknown(),
    };
    let sources = [d.read(id, Type::U32)?, d.read(threads, Type::U32)?];
    d.emit(Op::Barrier { arrive, aligned }, &[], &sources, Kind::Barrier);
    Ok(())
}

/// As [`crate::opcode::decode`].
pub(crate) fn between_lanes(d: &mut Decoder, s: &mut Suffixes, operands: &[Operand]) -> Result<(), PtxError> {
    let synchronised = s.take("sync");
    match s.base {
        "activemask" => {
            s.ty()?;
            s.finish()?;
            let [result] = operands else { return s.unknown() };
            let result = d.write(result, Type::U32)?;
            d.emit(Op::ActiveMask, &[result], &[], Kind::Shuffle);
            Ok(())
        }
        _ if !synchronised => s.unknown(),
        "shfl" => {
            let shuffle = s.one_of(&[
                ("up", Shuffle::Up),
                ("down", Shuffle::Down),
                ("bfly", Shuffle::Xor),
                ("idx", Shuffle::Index),
            ]);
            s.ty()?;
            s.finish()?;
            let (Some(shuffle), [result, sources @ ..]) = (shuffle, operands) else { return s.unknown() };
            let results = result_and_predicate(d, result, Type::B32)?;
            let mut read = Vec::new();
            for operand in sources {
                read.push(d.read(operand, Type::B32)?);
            }
            if read.len() != 4 {
                return s.unknown();
            }
            d.emit(Op::Shuffle(shuffle), &results, &read, Kind::Shuffle);
            Ok(())
        }
        "vote" => {
            let vote =
                s.one_of(&[("all", Vote::All), ("any", Vote::Any), ("uni", Vote::Uniform), ("ballot", Vote::Ballot)]);
            let ty = s.ty()?;
            s.finish()?;
            let Some(vote) = vote else { return s.unknown() };
            simple(d, Op::Vote(vote), Kind::Shuffle, ty, &[Type::Pred, Type::B32], operands)
        }
        "match" => {
            let all = s.one_of(&[("all", true), ("any", false)]);
            let ty = s.ty()?;
            s.finish()?;
            let (Some(all), [result, a, mask]) = (all, operands) else { return s.unknown() };
            let results = result_and_predicate(d, result, Type::B32)?;
            let sources = [d.read(a, ty)?, d.read(mask, Type::B32)?];
            d.emit(Op::Match { all, ty }, &results, &sources, Kind::Shuffle);
            Ok(())
        }
        _ => {
            let atomic = s.one_of(&[
                ("add", Atomic::Add),
                ("min", Atomic::Min),
                ("max", Atomic::Max),
                ("and", Atomic::And),
                ("or", Atomic::Or),
                ("xor", Atomic::Xor),
            ]);
            let ty = s.ty()?;
            s.finish()?;
            let Some(atomic) = atomic.filter(|_| ty.bits() == 32 && !ty.is_float()) else { return s.unknown() };
            simple(d, Op::Reduce(atomic, ty), Kind::Shuffle, ty, &[ty, Type::B32], operands)
        }
    }
}

/// `d|p` or `d`
fn result_and_predicate(d: &mut Decoder, operand: &Operand, ty: Type) -> Result<[Slot; 2], PtxError> {
    match operand {
        Operand::Pair(result, p) => Ok([d.write(result, ty)?, d.write(p, Type::Pred)?]),
        result => Ok([d.write(result, ty)?, d.fresh(File::Predicate)]),
    }
}
