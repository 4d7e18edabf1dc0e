//! What a launch did, counted as a GPU's profiler would.

use std::fmt::Write;

/// Kinds of instructions.
#[allow(missing_docs)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    Integer,
    /// Integer division and remainder, which a GPU does in some twenty instructions.
    Division,
    Float,
    Half,
    Double,
    /// `ex2`, `lg2`, `rcp`, `sqrt`, `rsqrt`, `sin`, `cos`, `tanh`.
    Transcendental,
    Conversion,
    Move,
    Compare,
    Branch,
    GlobalLoad,
    GlobalStore,
    SharedLoad,
    SharedStore,
    OtherMemory,
    Atomic,
    Barrier,
    Shuffle,
    Tensor,
    Other,
}

/// Names of [`Kind`] in the order of its values.
pub const KINDS: [&str; 20] = [
    "integer",
    "division",
    "float",
    "half",
    "double",
    "transcendental",
    "conversion",
    "move",
    "compare",
    "branch",
    "global_load",
    "global_store",
    "shared_load",
    "shared_store",
    "other_memory",
    "atomic",
    "barrier",
    "shuffle",
    "tensor",
    "other",
];

/// Counts of one launch, or of a part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Instructions of warps by [`Kind`].
    pub instructions: [u64; KINDS.len()],
    /// Fused multiply-adds of lanes; two for a packed one.
    pub fused_multiply_adds: u64,
    /// Multiply-adds of tensor cores.
    pub tensor_multiply_adds: u64,
    /// Sectors of 32 bytes that loads asked for, each instruction of a warp by itself.
    pub load_sectors: u64,
    /// The least that loads of so many bytes, each instruction by itself, could do with.
    pub load_sectors_least: u64,
    /// Different sectors that were loaded in the launch.
    pub load_sectors_unique: u64,
    /// As `load_sectors`, of stores.
    pub store_sectors: u64,
    /// As `load_sectors_least`, of stores.
    pub store_sectors_least: u64,
    /// As `load_sectors_unique`, of stores.
    pub store_sectors_unique: u64,
    /// Passes over the 32 banks of shared memory.
    pub shared_wavefronts: u64,
    /// Passes that accesses of so many different bytes could do with.
    pub shared_wavefronts_least: u64,
    /// Warps that arrived at a barrier.
    pub barriers: u64,
    /// Branches of warps.
    pub branches: u64,
    /// Those after which lanes went different ways.
    pub divergent_branches: u64,
    /// Lanes that executed, over all instructions.
    pub active_lanes: u64,
}

impl Counters {
    /// Adds those of another part of the launch.
    pub fn add(&mut self, other: &Self) {
        self.instructions.iter_mut().zip(other.instructions).for_each(|(sum, count)| *sum += count);
        let pairs = [
            (&mut self.fused_multiply_adds, other.fused_multiply_adds),
            (&mut self.tensor_multiply_adds, other.tensor_multiply_adds),
            (&mut self.load_sectors, other.load_sectors),
            (&mut self.load_sectors_least, other.load_sectors_least),
            (&mut self.load_sectors_unique, other.load_sectors_unique),
            (&mut self.store_sectors, other.store_sectors),
            (&mut self.store_sectors_least, other.store_sectors_least),
            (&mut self.store_sectors_unique, other.store_sectors_unique),
            (&mut self.shared_wavefronts, other.shared_wavefronts),
            (&mut self.shared_wavefronts_least, other.shared_wavefronts_least),
            (&mut self.barriers, other.barriers),
            (&mut self.branches, other.branches),
            (&mut self.divergent_branches, other.divergent_branches),
            (&mut self.active_lanes, other.active_lanes),
        ];
        pairs.into_iter().for_each(|(sum, count)| *sum += count);
    }

    /// Of all kinds.
    pub fn total(&self) -> u64 {
        self.instructions.iter().sum()
    }

    /// One line of JSON: what was launched, then every count.
    pub fn json(&self, kernel: &str, cubes: [u32; 3], units: [u32; 3], shared_bytes: usize) -> String {
        let mut line = format!(
            r#"{{"kernel":"{kernel}","cubes":{cubes:?},"units":{units:?},"shared_bytes":{shared_bytes},"warp_instructions":{}"#,
            self.total()
        );
        for (name, count) in KINDS.iter().zip(self.instructions) {
            let _ = write!(line, r#","{name}":{count}"#);
        }
        let counts = [
            ("fused_multiply_adds", self.fused_multiply_adds),
            ("tensor_multiply_adds", self.tensor_multiply_adds),
            ("load_sectors", self.load_sectors),
            ("load_sectors_least", self.load_sectors_least),
            ("load_sectors_unique", self.load_sectors_unique),
            ("store_sectors", self.store_sectors),
            ("store_sectors_least", self.store_sectors_least),
            ("store_sectors_unique", self.store_sectors_unique),
            ("shared_wavefronts", self.shared_wavefronts),
            ("shared_wavefronts_least", self.shared_wavefronts_least),
            ("barriers", self.barriers),
            ("branches", self.branches),
            ("divergent_branches", self.divergent_branches),
            ("active_lanes", self.active_lanes),
        ];
        for (name, count) in counts {
            let _ = write!(line, r#","{name}":{count}"#);
        }
        line.push('}');
        line
    }
}
