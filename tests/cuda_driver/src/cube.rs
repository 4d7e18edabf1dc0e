//! One cube: its warps take turns, meet at barriers, and go different ways at branches.

use crate::access::{self, lanes};
use crate::counters::Counters;
use crate::launch::Launch;
use crate::memory;
use crate::program::{Instruction, Op, Program, Slot, Space, Type, Vote};
use crate::report::{Fault, Report};
use crate::shared::{Conflict, Shared, Who};
use crate::warp::{FULL, LANES, Path, State, Warp, thread_of};

/// Instructions of a warp before the next one has its turn: warps may wait for one another in loops.
const TURN: u64 = 4096;
/// Named barriers of a cube.
const BARRIERS: usize = 16;

/// The launch is over: a report says why.
#[derive(Debug)]
pub struct Stop;

/// A worker's cube, reused for the next one.
pub struct Cube<'a> {
    /// What is launched.
    pub launch: &'a Launch<'a>,
    /// Of the launch.
    pub program: &'a Program,
    /// Its shared memory.
    pub shared: Shared,
    /// What was counted in all cubes of the worker.
    pub counters: Counters,
    /// For each instruction the number of the allocation that it accessed last.
    pub cached: Vec<u32>,
    /// The instruction at hand.
    pub at: u32,
    /// For global memory.
    pub who: memory::Cube,
    index: [u32; 3],
    warps: Vec<Warp>,
    arrived: [u32; BARRIERS],
}

impl<'a> Cube<'a> {
    /// Without a cube yet.
    pub fn new(launch: &'a Launch<'a>) -> Self {
        Self {
            launch,
            program: launch.program,
            shared: Shared::default(),
            counters: Counters::default(),
            cached: vec![0; launch.program.instructions.len()],
            at: 0,
            who: memory::Cube::new(0, launch.number, 4),
            index: [0; 3],
            warps: Vec::new(),
            arrived: [0; BARRIERS],
        }
    }

    /// Runs a cube from its start to its end.
    ///
    /// # Errors
    ///
    /// After a fault that a kernel cannot go on after, here or in another cube.
    pub fn run(&mut self, number: u64) -> Result<(), Stop> {
        let shape = &self.launch.shape;
        let [x, y, _] = shape.cubes.map(u64::from);
        self.index = [number % x, number / x % y, number / x / y].map(|i| i as u32);
        self.who = memory::Cube::new(number, self.launch.number, self.program.global_granule);
        self.shared.start(shape.total_shared as usize, self.program.shared_granule);
        self.arrived = [0; BARRIERS];
        let count = shape.units.iter().product::<u32>().div_ceil(LANES as u32);
        let mut warps = std::mem::take(&mut self.warps);
        warps.resize_with(count as usize, Warp::default);
        for (number, warp) in warps.iter_mut().enumerate() {
            warp.start(self.program, shape, self.index, number as u32);
        }
        let result = self.take_turns(&mut warps);
        self.warps = warps;
        result
    }

    fn take_turns(&mut self, warps: &mut [Warp]) -> Result<(), Stop> {
        loop {
            let mut moved = false;
            for warp in warps.iter_mut().filter(|warp| warp.state == State::Ready) {
                moved = true;
                self.turn(warp)?;
            }
            if warps.iter().all(|warp| warp.state == State::Done) {
                return Ok(());
            }
            if !self.open_barriers(warps) && !moved {
                return Err(self.deadlock(warps));
            }
        }
    }

    /// Lets the warps go on whose barrier is complete; whether there are any.
    fn open_barriers(&mut self, warps: &mut [Warp]) -> bool {
        let mut opened = false;
        for barrier in 0..BARRIERS as u32 {
            let waits = |warp: &Warp| match warp.state {
                State::Waiting { barrier: id, threads, .. } if id == barrier => Some(threads),
                _ => None,
            };
            let Some(threads) = warps.iter().find_map(waits) else { continue };
            // Threads that returned are not waited for.
            let wanted = match threads {
                0 => warps.iter().filter(|warp| warp.state != State::Done).count() as u32 * LANES as u32,
                threads => threads,
            };
            let waiting = warps.iter().filter(|warp| waits(warp).is_some()).count() as u32 * LANES as u32;
            if waiting + self.arrived[barrier as usize] < wanted {
                continue;
            }
            self.arrived[barrier as usize] = 0;
            self.shared.barrier();
            let predicates = warps.iter().filter(|warp| waits(warp).is_some()).map(|warp| match warp.state {
                State::Waiting { predicate, .. } => (predicate & warp.lanes, warp.lanes),
                _ => (0, 0),
            });
            let (any, all, count) = predicates.fold((false, true, 0), |(any, all, count), (p, lanes)| {
                (any | (p != 0), all & (p == lanes), count + p.count_ones())
            });
            for warp in warps.iter_mut().filter(|warp| waits(warp).is_some()) {
                self.finish_reduction(warp, any, all, count);
                warp.state = State::Ready;
            }
            opened = true;
        }
        opened
    }

    /// The warp has gone past its barrier already: the instruction before is `barrier.red`, if it was that.
    fn finish_reduction(&self, warp: &mut Warp, any: bool, all: bool, count: u32) {
        let Some(path) = warp.paths.last().copied() else { return };
        let instruction = &self.program.instructions[path.at as usize - 1];
        if let Op::BarrierReduce(vote) = instruction.op {
            let result = self.program.operands(instruction)[0];
            match vote {
                Vote::Ballot => warp.put(result, &[count; LANES], path.mask),
                Vote::All => warp.put_predicate(result, if all { FULL } else { 0 }, path.mask),
                _ => warp.put_predicate(result, if any { FULL } else { 0 }, path.mask),
            }
        }
    }

    fn deadlock(&self, warps: &[Warp]) -> Stop {
        let mut waiting: Vec<(u32, u32)> = Vec::new();
        let mut first = None;
        for warp in warps {
            if let State::Waiting { barrier, line, .. } = warp.state {
                first.get_or_insert((warp.number, line));
                if !waiting.contains(&(barrier, line)) {
                    waiting.push((barrier, line));
                }
            }
        }
        let places: Vec<String> =
            waiting.iter().map(|(barrier, line)| format!("barrier {barrier} in PTX line {line}")).collect();
        let detail = format!("all warps wait, at {}", places.join(" and "));
        let (warp, line) = first.unwrap_or_default();
        self.report(Fault::Deadlock, line, warp, 0, None, detail);
        Stop
    }

    /// Runs a warp until it waits, returns, or has had its turn.
    fn turn(&mut self, warp: &mut Warp) -> Result<(), Stop> {
        let program = self.program;
        let end = warp.executed + TURN;
        while warp.executed < end {
            let Some(path) = warp.paths.last_mut() else {
                warp.state = State::Done;
                return Ok(());
            };
            if path.at == path.until || path.mask == 0 {
                warp.paths.pop();
                continue;
            }
            let Path { at, mask: active, .. } = *path;
            self.at = at;
            let instruction = &program.instructions[at as usize];
            path.at += 1;
            warp.executed += 1;
            let mask = match instruction.guard {
                Slot::SINK => active,
                guard if instruction.guard_inverted => active & !warp.predicate(guard),
                guard => active & warp.predicate(guard),
            };
            self.counters.instructions[instruction.kind as usize] += 1;
            self.counters.active_lanes += u64::from(mask.count_ones());
            let o = program.operands(instruction);
            match instruction.op {
                Op::Branch { target, reconverge } => self.branch(warp, at, active, mask, target, reconverge),
                _ if mask == 0 => {}
                op if warp.calculate(op, o, mask) => self.count_products(op, mask),
                op => {
                    if self.control(warp, instruction, op, o, active, mask)? {
                        return Ok(());
                    }
                }
            }
        }
        if warp.executed > self.launch.limit {
            let detail = format!("a warp has executed {} instructions", warp.executed);
            return Err(self.fatal(Fault::InstructionLimit, warp.number, 0, None, detail));
        }
        if self.launch.is_stopped() { Err(Stop) } else { Ok(()) }
    }

    #[inline]
    fn count_products(&mut self, op: Op, mask: u32) {
        if let Op::Float(crate::program::Float::Fma, ty, _) = op {
            let packed = matches!(ty, Type::F16x2 | Type::Bf16x2);
            self.counters.fused_multiply_adds += u64::from(mask.count_ones()) << u32::from(packed);
        }
    }

    fn branch(&mut self, warp: &mut Warp, at: u32, active: u32, taken: u32, target: u32, reconverge: u32) {
        self.counters.branches += 1;
        if taken == active {
            if let Some(path) = warp.paths.last_mut() {
                path.at = target;
            }
        } else if taken != 0 {
            self.diverge(warp, &[(at + 1, active & !taken), (target, taken)], reconverge);
        }
    }

    fn diverge(&mut self, warp: &mut Warp, ways: &[(u32, u32)], reconverge: u32) {
        self.counters.divergent_branches += 1;
        if let Some(path) = warp.paths.last_mut() {
            if path.until == reconverge {
                // Those below wait at the same place already.
                warp.paths.pop();
            } else {
                path.at = reconverge;
            }
        }
        for &(at, mask) in ways {
            if at != reconverge {
                warp.paths.push(Path { at, until: reconverge, mask });
            }
        }
    }

    /// Everything that is more than arithmetic; whether the warp has to wait.
    fn control(
        &mut self,
        warp: &mut Warp,
        instruction: &Instruction,
        op: Op,
        o: &[Slot],
        active: u32,
        mask: u32,
    ) -> Result<bool, Stop> {
        match op {
            Op::Load(access) => self.load(warp, access, o, mask)?,
            Op::Store(access) => self.store(warp, access, o, mask)?,
            Op::Atomic(atomic, access) => self.update(warp, atomic, access, o, mask)?,
            Op::ToGeneric(space) => {
                let values = warp.get::<u64>(o[1]).map(|address| address.wrapping_add(access::window(space)));
                warp.put(o[0], &values, mask);
            }
            Op::FromGeneric(space) => {
                let values = warp.get::<u64>(o[1]).map(|address| address.wrapping_sub(access::window(space)));
                warp.put(o[0], &values, mask);
            }
            Op::IsSpace(space) => {
                let addresses = warp.get::<u64>(o[1]);
                let is = |lane: usize| access::from_generic(addresses[lane]).0 == space;
                let value = (0..LANES).fold(0, |all, lane| all | u32::from(is(lane)) << lane);
                warp.put_predicate(o[0], value, mask);
            }
            Op::BranchIndexed { table, reconverge } => self.branch_indexed(warp, o[0], table, active, reconverge)?,
            Op::Return => {
                warp.paths.iter_mut().for_each(|path| path.mask &= !mask);
                warp.paths.retain(|path| path.mask != 0);
            }
            Op::Trap => {
                let lane = mask.trailing_zeros() as usize;
                return Err(self.fatal(Fault::Trap, warp.number, lane, None, "the kernel gave up".to_string()));
            }
            Op::Barrier { arrive, aligned } => return self.barrier(warp, instruction.line, o, mask, aligned, arrive),
            Op::BarrierReduce(_) => {
                let predicate = warp.predicate(o[3]);
                self.barrier(warp, instruction.line, &o[1..], mask, true, false)?;
                if let State::Waiting { predicate: brought, .. } = &mut warp.state {
                    *brought = predicate;
                }
                return Ok(true);
            }
            Op::WarpBarrier => {
                let members = warp.get::<u32>(o[0]);
                self.check_members(warp, &members, mask)?;
                // Lanes that are not there hold nobody up.
                warp.stamps.advance(mask | !Self::live(warp));
            }
            Op::Fence | Op::Nothing => {}
            Op::Shuffle(shuffle) => self.shuffle(warp, shuffle, o, mask)?,
            Op::Vote(_) | Op::Match { .. } | Op::Reduce(..) => self.agree(warp, op, o, mask)?,
            Op::ActiveMask => warp.put(o[0], &[mask; LANES], mask),
            Op::Clock => {
                let clock = [warp.executed; LANES];
                warp.put_bits(o[0], &clock, mask);
            }
            Op::TileLoad(tile, space, offset) => {
                self.whole_warp(warp, mask)?;
                self.load_tile(warp, tile, space, offset, o)?;
            }
            Op::TileStore(tile, space, offset) => {
                self.whole_warp(warp, mask)?;
                self.store_tile(warp, tile, space, offset, o)?;
            }
            Op::Product(product) => {
                self.whole_warp(warp, mask)?;
                self.multiply(warp, product, o);
            }
            Op::MatrixLoad { count, transpose, space, offset } => {
                self.whole_warp(warp, mask)?;
                self.load_matrices(warp, count as usize, transpose, space, offset, o)?;
            }
            Op::MatrixStore { count, transpose, space, offset } => {
                self.whole_warp(warp, mask)?;
                self.store_matrices(warp, count as usize, transpose, space, offset, o)?;
            }
            Op::CopyAsync { bytes, to_offset, from_offset } => {
                self.copy_async(warp, bytes as usize, [to_offset, from_offset], o, mask)?;
            }
            Op::CopyCommit => {
                let group = warp.groups;
                for copy in warp.pending.iter_mut().filter(|copy| mask >> copy.lane & 1 == 1) {
                    copy.group.get_or_insert(group);
                }
                warp.groups += 1;
            }
            Op::CopyWait(outstanding) => self.copy_wait(warp, outstanding, mask),
            _ => unreachable!("calculations and branches are done before"),
        }
        Ok(false)
    }

    fn branch_indexed(
        &mut self,
        warp: &mut Warp,
        index: Slot,
        table: u32,
        active: u32,
        reconverge: u32,
    ) -> Result<(), Stop> {
        self.counters.branches += 1;
        let table = &self.program.tables[table as usize];
        let index = warp.get::<u32>(index);
        if let Some(lane) = lanes(active).find(|lane| index[*lane] as usize >= table.len()) {
            let detail = format!("target {} of {}", index[lane], table.len());
            return Err(self.fatal(Fault::Trap, warp.number, lane, None, detail));
        }
        let mut ways: Vec<(u32, u32)> = Vec::new();
        for lane in lanes(active) {
            let target = table[index[lane] as usize];
            match ways.iter_mut().find(|(at, _)| *at == target) {
                Some((_, mask)) => *mask |= 1 << lane,
                None => ways.push((target, 1 << lane)),
            }
        }
        match (&ways[..], warp.paths.last_mut()) {
            ([(target, _)], Some(path)) => path.at = *target,
            _ => self.diverge(warp, &ways, reconverge),
        }
        Ok(())
    }

    /// Lanes that have not returned.
    pub(crate) fn live(warp: &Warp) -> u32 {
        warp.paths.iter().fold(0, |live, path| live | path.mask)
    }

    fn barrier(
        &mut self,
        warp: &mut Warp,
        line: u32,
        o: &[Slot],
        mask: u32,
        aligned: bool,
        arrive: bool,
    ) -> Result<bool, Stop> {
        self.counters.barriers += 1;
        let lane = mask.trailing_zeros() as usize;
        let (barrier, threads) = (warp.get::<u32>(o[0])[lane], warp.get::<u32>(o[1])[lane]);
        let live = Self::live(warp);
        if mask != live {
            let missing = (live & !mask).trailing_zeros();
            let detail = format!(
                "lanes {mask:#010x} of {live:#010x} arrive{}, lane {missing} is elsewhere",
                if aligned { " together" } else { "" }
            );
            return Err(self.fatal(Fault::DivergentBarrier, warp.number, lane, None, detail));
        }
        if barrier as usize >= BARRIERS || threads % LANES as u32 != 0 {
            let detail = format!("barrier {barrier} for {threads} threads: there are {BARRIERS}, for whole warps");
            return Err(self.fatal(Fault::DivergentBarrier, warp.number, lane, None, detail));
        }
        if arrive {
            self.arrived[barrier as usize] += LANES as u32;
            return Ok(false);
        }
        warp.state = State::Waiting { barrier, threads, predicate: 0, line };
        Ok(true)
    }

    /// `wmma` and `mma` are for all 32 lanes.
    fn whole_warp(&self, warp: &Warp, mask: u32) -> Result<(), Stop> {
        if mask == FULL {
            return Ok(());
        }
        let lane = (!mask).trailing_zeros() as usize;
        let detail = format!("lanes {mask:#010x} execute what all lanes have to");
        Err(self.fatal(Fault::MissingLanes, warp.number, lane, None, detail))
    }

    /// An access in words.
    pub fn describe(&self, conflict: Conflict) -> String {
        let verb = if conflict.wrote { "written" } else { "read" };
        let who = match conflict.who {
            Who::Thread(thread) => {
                let [x, y, z] = thread_of(self.launch.shape.units, u32::from(thread));
                format!("thread ({x}, {y}, {z})")
            }
            Who::Warp(warp) => format!("warp {warp}"),
            Who::Many => "several warps".to_string(),
        };
        format!("{who} had {verb} it since the last barrier")
    }

    /// Reports something that the kernel can go on after.
    pub fn note(&self, fault: Fault, warp: u32, lane: usize, address: Option<u64>, detail: String) {
        let line = self.program.instructions[self.at as usize].line;
        self.report(fault, line, warp, lane, address, detail);
    }

    /// Reports something that ends the launch.
    pub fn fatal(&self, fault: Fault, warp: u32, lane: usize, address: Option<u64>, detail: String) -> Stop {
        self.note(fault, warp, lane, address, detail);
        Stop
    }

    fn report(&self, fault: Fault, line: u32, warp: u32, lane: usize, address: Option<u64>, detail: String) {
        self.launch.report(Report {
            fault,
            kernel: self.program.name.clone(),
            line,
            cube: self.index,
            thread: thread_of(self.launch.shape.units, warp * LANES as u32 + lane as u32),
            address,
            detail,
        });
    }

    /// The space that a generic address is in.
    pub fn is_shared(space: Space, address: u64) -> bool {
        space == Space::Shared || space == Space::Generic && access::from_generic(address).0 == Space::Shared
    }
}
