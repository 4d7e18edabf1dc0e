//! What a kernel is after decoding: a flat list of instructions on numbered registers.
//!
//! Functions are expanded where they are called, and immediate values and special registers are registers that are
//! filled before a warp starts: an operand is then always a slot.

use std::collections::HashMap;

/// The type in an instruction's name.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Type {
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    Tf32,
    F32,
    F64,
    U16x2,
    S16x2,
}

impl Type {
    /// The type of that name.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "pred" => Self::Pred,
            "b8" => Self::B8,
            "b16" => Self::B16,
            "b32" => Self::B32,
            "b64" => Self::B64,
            "b128" => Self::B128,
            "u8" => Self::U8,
            "u16" => Self::U16,
            "u32" => Self::U32,
            "u64" => Self::U64,
            "s8" => Self::S8,
            "s16" => Self::S16,
            "s32" => Self::S32,
            "s64" => Self::S64,
            "f16" => Self::F16,
            "f16x2" => Self::F16x2,
            "bf16" => Self::Bf16,
            "bf16x2" => Self::Bf16x2,
            "tf32" => Self::Tf32,
            "f32" => Self::F32,
            "f64" => Self::F64,
            "u16x2" => Self::U16x2,
            "s16x2" => Self::S16x2,
            _ => return None,
        })
    }

    /// Of one value in memory.
    pub fn bytes(self) -> usize {
        match self {
            Self::Pred | Self::B8 | Self::U8 | Self::S8 => 1,
            Self::B16 | Self::U16 | Self::S16 | Self::F16 | Self::Bf16 => 2,
            Self::B64 | Self::U64 | Self::S64 | Self::F64 => 8,
            Self::B128 => 16,
            _ => 4,
        }
    }

    /// Of one value in a register.
    pub fn bits(self) -> u32 {
        8 * self.bytes() as u32
    }

    /// An integer with a sign.
    pub fn is_signed(self) -> bool {
        matches!(self, Self::S8 | Self::S16 | Self::S32 | Self::S64 | Self::S16x2)
    }

    /// A number with an exponent.
    pub fn is_float(self) -> bool {
        use Type::*;
        matches!(self, F16 | F16x2 | Bf16 | Bf16x2 | Tf32 | F32 | F64)
    }

    /// The file of registers that holds it.
    pub fn file(self) -> File {
        match self {
            Self::Pred => File::Predicate,
            Self::B64 | Self::U64 | Self::S64 | Self::F64 => File::Wide,
            _ => File::Word,
        }
    }
}

/// Registers come in three files.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum File {
    /// Up to 32 bits of each lane. Of a shorter value, the upper bits are anything.
    Word,
    /// 64 bits of each lane.
    Wide,
    /// One bit of each lane.
    Predicate,
}

/// A register: its file and its number in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Slot(pub u32);

impl Slot {
    /// Takes what is written to it and is never read: `_`.
    pub const SINK: Self = Self(u32::MAX);

    /// Register `index` of a file.
    pub fn new(file: File, index: usize) -> Self {
        Self((file as u32) << 30 | index as u32)
    }

    /// Of [`Slot::new`].
    pub fn file(self) -> File {
        match self.0 >> 30 {
            0 => File::Word,
            1 => File::Wide,
            _ => File::Predicate,
        }
    }

    /// Of [`Slot::new`].
    #[inline(always)]
    pub fn index(self) -> usize {
        (self.0 & 0x3fff_ffff) as usize
    }
}

/// A part of the address space.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Space {
    Generic,
    Global,
    Shared,
    Local,
    Param,
    Const,
}

/// How a result that is no number of the format becomes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rounding {
    /// To the nearest, ties to the even one.
    Nearest,
    /// To the nearest, ties away from zero.
    NearestAway,
    /// Towards zero.
    Zero,
    /// Downwards.
    Down,
    /// Upwards.
    Up,
}

/// Suffixes of floating-point instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Mode {
    /// Of the result.
    pub rounding: Rounding,
    /// Subnormal operands and results become zeros.
    pub ftz: bool,
    /// The result is clamped to [0, 1].
    pub saturate: bool,
    /// `min`, `max`: a NaN operand makes the result NaN.
    pub nan: bool,
    /// Negative results become 0.
    pub relu: bool,
}

/// Operations on integers.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Integer {
    Add,
    AddSaturated,
    Sub,
    SubSaturated,
    MulLow,
    MulHigh,
    MulWide,
    MadLow,
    MadHigh,
    MadWide,
    Div,
    Rem,
    Abs,
    Neg,
    Min,
    Max,
    And,
    Or,
    Xor,
    Not,
    LogicalNot,
    ShiftLeft,
    ShiftRight,
    PopulationCount,
    LeadingZeros,
    Reverse,
    ExtractField,
    InsertField,
    /// `bfind`; with `.shiftamt`.
    FindTop(bool),
    SumOfDifferences,
    Permute,
    /// The truth table.
    Lop3(u8),
    /// Left (else right); wrapped (else clamped).
    Funnel {
        left: bool,
        wrap: bool,
    },
    /// `dp4a`; signs of the operands.
    Dot4(bool, bool),
}

/// Operations on floating-point numbers.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Float {
    Add,
    Sub,
    Mul,
    Fma,
    Div,
    Min,
    Max,
    Min3,
    Max3,
    Abs,
    Neg,
    Sqrt,
    Reciprocal,
    ReciprocalRoot,
    Sin,
    Cos,
    Exp2,
    Log2,
    Tanh,
    CopySign,
}

/// Comparisons; the `Or` ones hold for NaN too.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Comparison {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    EqOrNan,
    NeOrNan,
    LtOrNan,
    LeOrNan,
    GtOrNan,
    GeOrNan,
    IsNumber,
    IsNan,
}

/// On predicates.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Logic {
    And,
    Or,
    Xor,
    Not,
}

/// `cvt`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Conversion {
    /// The result's type.
    pub to: Type,
    /// The operand's type.
    pub from: Type,
    /// Of the result.
    pub rounding: Rounding,
    /// `.rni`, `.rzi`, `.rmi`, `.rpi`: to an integer, which may be in a floating-point format.
    pub to_integer: bool,
    /// `.ftz`
    pub ftz: bool,
    /// `.sat`
    pub saturate: bool,
    /// `.relu`
    pub relu: bool,
}

/// What an atomic operation does to memory.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Atomic {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exchange,
    CompareAndSwap,
    Increment,
    Decrement,
}

/// Where a lane gets its value from.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shuffle {
    Up,
    Down,
    Xor,
    Index,
}

/// `vote`
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Vote {
    All,
    Any,
    Uniform,
    Ballot,
}

/// Which operand of a matrix product a fragment is.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fragment {
    A,
    B,
    Sum,
}

/// A tile of `wmma` in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// m, n, k.
    pub shape: [usize; 3],
    /// Which operand.
    pub fragment: Fragment,
    /// Rows are contiguous (else columns).
    pub row_major: bool,
    /// Of the elements.
    pub ty: Type,
}

/// `wmma.mma` and `mma`: D = A B + C.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Product {
    /// m, n, k.
    pub shape: [usize; 3],
    /// Of A and B.
    pub ty: Type,
    /// Of C.
    pub c: Type,
    /// Of D.
    pub d: Type,
    /// `mma`, whose fragments PTX lays down, else `wmma`, whose fragments it does not.
    pub documented: bool,
}

/// An access of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// Where.
    pub space: Space,
    /// Of one element.
    pub ty: Type,
    /// Elements of a lane.
    pub count: u8,
    /// `.relaxed`, `.acquire`, `.release`, `.volatile`: other cubes may access it at the same time.
    pub shared_between_cubes: bool,
    /// Added to the address.
    pub offset: i64,
}

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

/// `testp`
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FloatTest {
    Finite,
    Infinite,
    Number,
    NotANumber,
    Normal,
    Subnormal,
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
