//! What a kernel is after decoding: a flat list of instructions on numbered registers.
//!
//! Functions are expanded where they are called, and immediate values and special registers are registers that are
//! filled before a warp starts: an operand is then always a slot.

pub use crate::types::*;
use std::collections::HashMap;

/// What an instruction does. Operands in brackets: results, then sources.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op {
    Integer(Integer, Type),
    /// `add.cc`, `addc`, `sub.cc`, `subc`, `mad.cc`, ...: [d, carry out, a, b, carry in]
    Carry {
        subtract: bool,
        ty: Type,
    },
    Float(Float, Type, Mode),
    Logic(Logic),
    /// [p, q, a, b] or [p, q, a, b, c]
    Compare {
        comparison: Comparison,
        ty: Type,
        ftz: bool,
        combine: Option<Logic>,
        invert: bool,
    },
    /// [d, a, b] or [d, a, b, c]
    Set {
        comparison: Comparison,
        ty: Type,
        ftz: bool,
        to: Type,
        combine: Option<Logic>,
        invert: bool,
    },
    /// [d, a, b, p]
    Select,
    /// `slct`: [d, a, b, c], by the sign of c
    SelectBySign(Type),
    Move,
    /// [d, parts]: bits of a part
    Pack(u32),
    /// [parts, a]: bits of a part
    Unpack(u32),
    Convert(Conversion),
    /// [d, high, low]
    ConvertPair(Conversion),
    /// `testp`, the test's name by its first letters
    Test(FloatTest, Type),
    /// [values, address]
    Load(Access),
    /// [address, values]
    Store(Access),
    /// [d, address, b] or [d, address, b, c]
    Atomic(Atomic, Access),
    /// [address] in the space, to generic; or back
    ToGeneric(Space),
    FromGeneric(Space),
    /// [p, address]
    IsSpace(Space),
    Branch {
        target: u32,
        reconverge: u32,
    },
    /// [index]; the table of targets
    BranchIndexed {
        table: u32,
        reconverge: u32,
    },
    Return,
    Trap,
    /// [barrier, threads]; 0 threads are all
    Barrier {
        arrive: bool,
        aligned: bool,
    },
    /// `barrier.red`: [d, barrier, threads, p]
    BarrierReduce(Vote),
    /// [mask]
    WarpBarrier,
    Fence,
    /// [d, p, a, lane, clamp, mask]
    Shuffle(Shuffle),
    /// [d, a, mask]
    Vote(Vote),
    /// [d, p, a, mask]; all (else any)
    Match {
        all: bool,
        ty: Type,
    },
    /// [d, a, mask]
    Reduce(Atomic, Type),
    ActiveMask,
    /// [d]
    Clock,
    /// [registers, address, stride]
    TileLoad(Tile, Space, i64),
    /// [address, stride, registers]
    TileStore(Tile, Space, i64),
    /// [d, a, b, c]
    Product(Product),
    /// [registers, address]
    MatrixLoad {
        count: u8,
        transpose: bool,
        space: Space,
        offset: i64,
    },
    /// [address, registers]
    MatrixStore {
        count: u8,
        transpose: bool,
        space: Space,
        offset: i64,
    },
    /// [to, from, bytes read]
    CopyAsync {
        bytes: u8,
        to_offset: i64,
        from_offset: i64,
    },
    CopyCommit,
    /// Groups that may be outstanding.
    CopyWait(u32),
    Nothing,
}

/// One instruction.
#[derive(Clone, Copy, Debug)]
pub struct Instruction {
    /// What it does.
    pub op: Op,
    /// Its operands are `operands[first..first + count]` of the program.
    pub first: u32,
    /// See `first`.
    pub count: u8,
    /// The first so many operands are written.
    pub results: u8,
    /// The predicate it is executed under; [`Slot::SINK`] if always.
    pub guard: Slot,
    /// Executed where the predicate is false.
    pub guard_inverted: bool,
    /// In the PTX.
    pub line: u32,
    /// What it counts as.
    pub kind: crate::counters::Kind,
}

/// A register that does not change while a kernel runs.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Special {
    Thread(u8),
    CubeSize(u8),
    Cube(u8),
    CubeCount(u8),
    Lane,
    Warp,
    Warps,
    DynamicShared,
    TotalShared,
    /// Lanes: 0 equal, 1 less, 2 less or equal, 3 greater, 4 greater or equal.
    LaneMask(u8),
    Multiprocessor,
    Multiprocessors,
    Grid,
}

impl Special {
    /// `%tid.x` and so on.
    pub fn named(name: &str) -> Option<Self> {
        let axis = |special: fn(u8) -> Special, axis: &str| match axis {
            "x" => Some(special(0)),
            "y" => Some(special(1)),
            "z" => Some(special(2)),
            _ => None,
        };
        let name = name.strip_prefix('%')?;
        match name.split_once('.') {
            Some(("tid", rest)) => axis(Special::Thread, rest),
            Some(("ntid", rest)) => axis(Special::CubeSize, rest),
            Some(("ctaid", rest)) => axis(Special::Cube, rest),
            Some(("nctaid", rest)) => axis(Special::CubeCount, rest),
            Some(_) => None,
            None => Some(match name {
                "laneid" => Special::Lane,
                "warpid" => Special::Warp,
                "nwarpid" => Special::Warps,
                "dynamic_smem_size" => Special::DynamicShared,
                "total_smem_size" => Special::TotalShared,
                "lanemask_eq" => Special::LaneMask(0),
                "lanemask_lt" => Special::LaneMask(1),
                "lanemask_le" => Special::LaneMask(2),
                "lanemask_gt" => Special::LaneMask(3),
                "lanemask_ge" => Special::LaneMask(4),
                "smid" => Special::Multiprocessor,
                "nsmid" => Special::Multiprocessors,
                "gridid" => Special::Grid,
                _ => return None,
            }),
        }
    }
}

/// A kernel.
#[derive(Clone, Debug, Default)]
pub struct Program {
    /// Its entry point.
    pub name: String,
    /// In order of the text; a `Return` ends it.
    pub instructions: Vec<Instruction>,
    /// See [`Instruction::first`].
    pub operands: Vec<Slot>,
    /// Registers of each file.
    pub words: usize,
    /// See `words`.
    pub wides: usize,
    /// See `words`.
    pub predicates: usize,
    /// Registers with a fixed value.
    pub constants: Vec<(Slot, u64)>,
    /// Registers with a value that depends on the thread.
    pub specials: Vec<(Slot, Special)>,
    /// Of `brx.idx`: first instructions.
    pub tables: Vec<Vec<u32>>,
    /// Offset and bytes of each parameter.
    pub parameters: Vec<(usize, usize)>,
    /// Of all parameters.
    pub parameter_bytes: usize,
    /// Shared memory that the kernel declares with a size.
    pub static_shared: usize,
    /// Where the dynamic shared memory starts.
    pub dynamic_shared_offset: usize,
    /// Of one unit.
    pub local_bytes: usize,
    /// Units of a cube, where the kernel insists.
    pub required: Option<[u32; 3]>,
    /// Smallest access of shared memory in bytes, at most 4.
    pub shared_granule: usize,
    /// Smallest access of global memory in bytes, at most 4.
    pub global_granule: usize,
    /// Bytes and address of `.const` and `.global` variables, for messages.
    pub variables: HashMap<String, u64>,
}

impl Program {
    /// The operands of an instruction.
    #[inline(always)]
    pub fn operands(&self, instruction: &Instruction) -> &[Slot] {
        &self.operands[instruction.first as usize..][..instruction.count as usize]
    }
}
