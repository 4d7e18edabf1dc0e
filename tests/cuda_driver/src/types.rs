//! The vocabulary of instructions: types, registers, state spaces, and what there is to do.

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
    /// The smaller one, or 0 if that is negative.
    MinRelu,
    /// The larger one, or 0 if that is negative.
    MaxRelu,
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
