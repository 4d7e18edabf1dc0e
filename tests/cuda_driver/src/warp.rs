//! The 32 lanes that execute together: their registers, and where each of them is.

use crate::program::{File, Program, Slot, Special};
use crate::shared::Stamps;
use half::{bf16, f16};

/// Lanes of a warp.
pub const LANES: usize = 32;
/// All of them.
pub const FULL: u32 = u32::MAX;

/// Lanes at the same instruction.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    /// The next instruction.
    pub at: u32,
    /// Where they wait for the others.
    pub until: u32,
    /// Which.
    pub mask: u32,
}

/// What a warp can do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Go on.
    Ready,
    /// Nothing until others are at a barrier.
    Waiting {
        /// Its number.
        barrier: u32,
        /// How many it is for; 0: all of the cube.
        threads: u32,
        /// What the lanes brought to be reduced.
        predicate: u32,
        /// Of the PTX.
        line: u32,
    },
    /// All lanes have returned.
    Done,
}

/// A copy to shared memory that has not arrived.
#[derive(Clone, Copy, Debug)]
pub struct Pending {
    /// `None` until it is committed, then the number of its group.
    pub group: Option<u32>,
    /// The lane that asked for it.
    pub lane: u8,
    /// Offset in shared memory.
    pub to: u64,
    /// Bytes of it.
    pub bytes: u8,
    /// What was read.
    pub data: [u8; 16],
}

/// One warp of a cube.
pub struct Warp {
    /// Registers of up to 32 bits.
    pub words: Vec<[u32; LANES]>,
    /// Registers of 64 bits.
    pub wides: Vec<[u64; LANES]>,
    /// Registers of one bit.
    pub predicates: Vec<u32>,
    /// The innermost divergence last.
    pub paths: Vec<Path>,
    /// Lanes that exist.
    pub lanes: u32,
    /// In the cube.
    pub number: u32,
    /// What next.
    pub state: State,
    /// Local memory, lane by lane, and which of its bytes were written.
    pub local: Vec<u8>,
    /// See `local`.
    pub local_written: Vec<u8>,
    /// Synchronisations of the warp that each lane took part in.
    pub stamps: Stamps,
    /// Asynchronous copies.
    pub pending: Vec<Pending>,
    /// Groups of copies that were committed.
    pub groups: u32,
    /// Instructions so far.
    pub executed: u64,
}

/// What does not change from warp to warp.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Units of a cube.
    pub units: [u32; 3],
    /// Of the launch.
    pub cubes: [u32; 3],
    /// Bytes asked for at the launch.
    pub dynamic_shared: u32,
    /// All of a cube's bytes.
    pub total_shared: u32,
    /// Of the device.
    pub multiprocessors: u32,
}

impl Default for Warp {
    fn default() -> Self {
        Self {
            words: Vec::new(),
            wides: Vec::new(),
            predicates: Vec::new(),
            paths: Vec::new(),
            lanes: 0,
            number: 0,
            state: State::Done,
            local: Vec::new(),
            local_written: Vec::new(),
            stamps: Stamps::default(),
            pending: Vec::new(),
            groups: 0,
            executed: 0,
        }
    }
}

impl Warp {
    /// At the first instruction of a kernel, as warp `number` of a cube.
    pub fn start(&mut self, program: &Program, shape: &Shape, cube: [u32; 3], number: u32) {
        let units = shape.units.iter().product::<u32>();
        let lanes = (units - number * LANES as u32).min(LANES as u32);
        self.words.resize(program.words, [0; LANES]);
        self.wides.resize(program.wides, [0; LANES]);
        self.predicates.resize(program.predicates, 0);
        self.lanes = if lanes == 32 { FULL } else { (1 << lanes) - 1 };
        self.number = number;
        self.state = State::Ready;
        self.paths.clear();
        let end = program.instructions.len() as u32;
        self.paths.push(Path { at: 0, until: end, mask: self.lanes });
        self.local.resize(program.local_bytes * LANES, 0);
        self.local_written.clear();
        self.local_written.resize(program.local_bytes * LANES, 0);
        self.stamps = Stamps::default();
        self.pending.clear();
        self.groups = 0;
        self.executed = 0;
        for &(slot, value) in &program.constants {
            match slot.file() {
                File::Word => self.words[slot.index()] = [value as u32; LANES],
                File::Wide => self.wides[slot.index()] = [value; LANES],
                File::Predicate => self.predicates[slot.index()] = if value != 0 { FULL } else { 0 },
            }
        }
        for &(slot, special) in &program.specials {
            let values = &mut self.words[slot.index()];
            for (lane, value) in values.iter_mut().enumerate() {
                let thread = thread_of(shape.units, number * LANES as u32 + lane as u32);
                *value = match special {
                    Special::Thread(axis) => thread[axis as usize],
                    Special::CubeSize(axis) => shape.units[axis as usize],
                    Special::Cube(axis) => cube[axis as usize],
                    Special::CubeCount(axis) => shape.cubes[axis as usize],
                    Special::Lane => lane as u32,
                    Special::Warp => number,
                    Special::Warps => units.div_ceil(LANES as u32),
                    Special::DynamicShared => shape.dynamic_shared,
                    Special::TotalShared => shape.total_shared,
                    Special::LaneMask(0) => 1 << lane,
                    Special::LaneMask(1) => (1 << lane) - 1,
                    Special::LaneMask(2) => (2u64 << lane).wrapping_sub(1) as u32,
                    Special::LaneMask(3) => !(2u64 << lane).wrapping_sub(1) as u32,
                    Special::LaneMask(_) => !((1 << lane) - 1),
                    Special::Multiprocessor => cube[0] % shape.multiprocessors,
                    Special::Multiprocessors => shape.multiprocessors,
                    Special::Grid => 1,
                };
            }
        }
    }

    /// A register.
    #[inline(always)]
    pub fn get<T: Lane>(&self, slot: Slot) -> [T; LANES] {
        T::get(self, slot)
    }

    /// The lanes of a mask get new values.
    #[inline(always)]
    pub fn put<T: Lane>(&mut self, slot: Slot, values: &[T; LANES], mask: u32) {
        T::put(self, slot, values, mask);
    }

    /// A predicate.
    #[inline(always)]
    pub fn predicate(&self, slot: Slot) -> u32 {
        self.predicates[slot.index()]
    }

    /// The lanes of a mask get a new predicate.
    #[inline(always)]
    pub fn put_predicate(&mut self, slot: Slot, value: u32, mask: u32) {
        let old = &mut self.predicates[slot.index()];
        *old = *old & !mask | value & mask;
    }

    /// A register of either size as 64 bits; the upper ones are zero for 32.
    pub fn get_bits(&self, slot: Slot) -> [u64; LANES] {
        match slot.file() {
            File::Wide => self.wides[slot.index()],
            _ => each(&self.words[slot.index()], u64::from),
        }
    }

    /// The reverse of [`Warp::get_bits`].
    pub fn put_bits(&mut self, slot: Slot, values: &[u64; LANES], mask: u32) {
        match slot.file() {
            File::Wide => self.put(slot, values, mask),
            _ => self.put(slot, &each(values, |value| value as u32), mask),
        }
    }
}

/// x, y, z of a thread of a cube.
pub fn thread_of(units: [u32; 3], index: u32) -> [u32; 3] {
    [index % units[0], index / units[0] % units[1], index / units[0] / units[1]]
}

/// What a register can be taken for.
pub trait Lane: Copy + Default {
    /// All lanes.
    fn get(warp: &Warp, slot: Slot) -> [Self; LANES];
    /// Those of a mask.
    fn put(warp: &mut Warp, slot: Slot, values: &[Self; LANES], mask: u32);
}

/// A function of each lane. In a plain loop, which becomes vector code where `array::map` does not.
#[inline(always)]
pub fn each<T: Copy, U: Copy + Default>(values: &[T; LANES], f: impl Fn(T) -> U) -> [U; LANES] {
    let mut results = [U::default(); LANES];
    for (result, value) in results.iter_mut().zip(values) {
        *result = f(*value);
    }
    results
}

#[inline(always)]
fn blend<T: Copy>(old: &mut [T; LANES], new: &[T; LANES], mask: u32) {
    if mask == FULL {
        *old = *new;
    } else {
        for (lane, (old, new)) in old.iter_mut().zip(new).enumerate() {
            *old = if mask >> lane & 1 == 1 { *new } else { *old };
        }
    }
}

macro_rules! lanes {
    ($($ty:ty, $file:ident, $from:expr, $to:expr;)*) => {$(
        impl Lane for $ty {
            #[inline(always)]
            fn get(warp: &Warp, slot: Slot) -> [Self; LANES] {
                each(&warp.$file[slot.index()], $from)
            }

            #[inline(always)]
            fn put(warp: &mut Warp, slot: Slot, values: &[Self; LANES], mask: u32) {
                blend(&mut warp.$file[slot.index()], &each(values, $to), mask);
            }
        }
    )*};
}

lanes! {
    u32, words, |bits| bits, |value| value;
    i32, words, |bits| bits as i32, |value| value as u32;
    f32, words, f32::from_bits, f32::to_bits;
    u16, words, |bits| bits as u16, u32::from;
    i16, words, |bits| bits as i16, |value| u32::from(value as u16);
    f16, words, |bits| f16::from_bits(bits as u16), |value| u32::from(value.to_bits());
    bf16, words, |bits| bf16::from_bits(bits as u16), |value| u32::from(value.to_bits());
    [f16; 2], words, |bits| [f16::from_bits(bits as u16), f16::from_bits((bits >> 16) as u16)],
        |[low, high]| u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
    [bf16; 2], words, |bits| [bf16::from_bits(bits as u16), bf16::from_bits((bits >> 16) as u16)],
        |[low, high]| u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
    [u16; 2], words, |bits| [bits as u16, (bits >> 16) as u16], |[low, high]| u32::from(low) | u32::from(high) << 16;
    u64, wides, |bits| bits, |value| value;
    i64, wides, |bits| bits as i64, |value| value as u64;
    f64, wides, f64::from_bits, f64::to_bits;
}
