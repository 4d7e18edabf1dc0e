//! What a check found, and where.

use std::fmt;

/// What a kernel did that it must not do.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fault {
    OutOfBounds,
    Freed,
    Misaligned,
    NeverWritten,
    SharedRace,
    GlobalRace,
    DivergentBarrier,
    Deadlock,
    MissingLanes,
    Trap,
    InstructionLimit,
    Launch,
}

impl Fault {
    /// The code that the launch returns: those of CUDA for what a GPU notices too.
    pub fn code(self) -> i32 {
        match self {
            Self::OutOfBounds | Self::Freed => 700,
            Self::Misaligned => 716,
            Self::Trap => 715,
            Self::InstructionLimit => 702,
            Self::Launch => 1,
            _ => 719,
        }
    }

    /// Whether a kernel cannot go on after it.
    pub fn is_fatal(self) -> bool {
        !matches!(self, Self::NeverWritten | Self::SharedRace | Self::GlobalRace)
    }

    fn name(self) -> &'static str {
        match self {
            Self::OutOfBounds => "access out of bounds",
            Self::Freed => "access of freed memory",
            Self::Misaligned => "misaligned access",
            Self::NeverWritten => "read of memory that nobody wrote",
            Self::SharedRace => "race in shared memory",
            Self::GlobalRace => "race between cubes in global memory",
            Self::DivergentBarrier => "barrier in divergent code",
            Self::Deadlock => "deadlock",
            Self::MissingLanes => "warp operation without some of its lanes",
            Self::Trap => "trap",
            Self::InstructionLimit => "limit of instructions reached",
            Self::Launch => "launch refused",
        }
    }
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// What.
    pub fault: Fault,
    /// In which kernel.
    pub kernel: String,
    /// Of its PTX.
    pub line: u32,
    /// x, y, z of the cube.
    pub cube: [u32; 3],
    /// x, y, z of the thread.
    pub thread: [u32; 3],
    /// Of memory, if it is about that.
    pub address: Option<u64>,
    /// In words.
    pub detail: String,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fault, kernel, line, cube: [x, y, z], thread: [i, j, k], address, detail } = self;
        write!(f, "{}: {detail}", fault.name())?;
        if let Some(address) = address {
            write!(f, ", address {address:#x}")?;
        }
        write!(f, ", kernel {kernel}, PTX line {line}, cube ({x}, {y}, {z}), thread ({i}, {j}, {k})")
    }
}
