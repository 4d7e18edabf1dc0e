//! Where lanes that went different ways meet again, and which registers can share a place.

use crate::program::{File, Op, Program, Slot};

/// Basic blocks: their first instructions, in order, and after the last one the number of instructions.
struct Blocks {
    first: Vec<usize>,
    successors: Vec<Vec<usize>>,
}

/// Whether an instruction may be followed by another one than the next, and by the next one at all.
fn ends_block(program: &Program, at: usize) -> bool {
    matches!(program.instructions[at].op, Op::Branch { .. } | Op::BranchIndexed { .. } | Op::Return | Op::Trap)
}

fn blocks(program: &Program) -> Blocks {
    let len = program.instructions.len();
    let mut starts = vec![false; len + 1];
    starts[0] = true;
    for (at, instruction) in program.instructions.iter().enumerate() {
        if ends_block(program, at) {
            starts[at + 1] = true;
        }
        match instruction.op {
            Op::Branch { target, .. } => starts[target as usize] = true,
            Op::BranchIndexed { table, .. } => {
                program.tables[table as usize].iter().for_each(|target| starts[*target as usize] = true);
            }
            _ => {}
        }
    }
    let mut first: Vec<usize> = (0..len).filter(|at| starts[*at]).collect();
    let mut block_of = vec![0; len + 1];
    for (block, start) in first.iter().enumerate() {
        let end = first.get(block + 1).copied().unwrap_or(len);
        block_of[*start..end].fill(block);
    }
    let count = first.len();
    let successors = (0..count)
        .map(|block| {
            let last = first.get(block + 1).copied().unwrap_or(len) - 1;
            let instruction = &program.instructions[last];
            let falls = instruction.guard != Slot::SINK || !ends_block(program, last);
            let mut successors = Vec::new();
            match instruction.op {
                Op::Branch { target, .. } => successors.push(block_of[target as usize]),
                Op::BranchIndexed { table, .. } => {
                    successors.extend(program.tables[table as usize].iter().map(|target| block_of[*target as usize]));
                }
                _ => {}
            }
            if falls && block + 1 < count {
                successors.push(block + 1);
            }
            successors.sort_unstable();
            successors.dedup();
            successors
        })
        .collect();
    first.push(len);
    Blocks { first, successors }
}

/// Gives each branch the first instruction of its immediate post-dominator; the number of instructions where there is
/// none before the end.
pub fn reconverge(program: &mut Program) {
    let len = program.instructions.len() as u32;
    let Blocks { first, successors } = blocks(program);
    let count = successors.len();
    // Cooper, Harvey and Kennedy's algorithm on the reversed graph, whose entry is an exit that all returns lead to.
    let exit = count;
    let mut predecessors = vec![Vec::new(); count + 1];
    for (block, next) in successors.iter().enumerate() {
        let last = first[block + 1] - 1;
        if matches!(program.instructions[last].op, Op::Return | Op::Trap) {
            predecessors[exit].push(block);
        }
        next.iter().for_each(|successor| predecessors[*successor].push(block));
    }
    // A loop without an end hangs on the exit too, by one of its blocks.
    let mut endless = vec![false; count];
    let order = loop {
        let order = post_order(exit, &predecessors);
        let mut reached = vec![false; count + 1];
        order.iter().for_each(|block| reached[*block] = true);
        match (0..count).rev().find(|block| !reached[*block]) {
            Some(block) => {
                endless[block] = true;
                predecessors[exit].push(block);
            }
            None => break order,
        }
    };
    let mut number = vec![usize::MAX; count + 1];
    order.iter().enumerate().for_each(|(i, node)| number[*node] = i);
    let mut dominator = vec![usize::MAX; count + 1];
    dominator[exit] = exit;
    let mut changed = true;
    while changed {
        changed = false;
        for &block in order.iter().rev().filter(|block| **block != exit) {
            let last = first[block + 1] - 1;
            let leaves = matches!(program.instructions[last].op, Op::Return | Op::Trap) || endless[block];
            let next = successors[block].iter().copied().chain(leaves.then_some(exit));
            let mut best = usize::MAX;
            for successor in next.filter(|successor| dominator[*successor] != usize::MAX) {
                best = match best {
                    usize::MAX => successor,
                    _ => meet(best, successor, &dominator, &number),
                };
            }
            if best != usize::MAX && dominator[block] != best {
                dominator[block] = best;
                changed = true;
            }
        }
    }
    for block in 0..count {
        let at = match dominator[block] {
            usize::MAX => len,
            other if other == exit => len,
            other => first[other] as u32,
        };
        match &mut program.instructions[first[block + 1] - 1].op {
            Op::Branch { reconverge, .. } | Op::BranchIndexed { reconverge, .. } => *reconverge = at,
            _ => {}
        }
    }
}

fn post_order(root: usize, next: &[Vec<usize>]) -> Vec<usize> {
    let mut order = Vec::new();
    let mut seen = vec![false; next.len()];
    let mut stack = vec![(root, 0)];
    seen[root] = true;
    while let Some((node, tried)) = stack.pop() {
        match next[node].get(tried) {
            Some(&child) => {
                stack.push((node, tried + 1));
                if !seen[child] {
                    seen[child] = true;
                    stack.push((child, 0));
                }
            }
            None => order.push(node),
        }
    }
    order
}

fn meet(a: usize, b: usize, dominator: &[usize], number: &[usize]) -> usize {
    let (mut a, mut b) = (a, b);
    while a != b {
        while number[a] < number[b] {
            a = dominator[a];
        }
        while number[b] < number[a] {
            b = dominator[b];
        }
    }
    a
}

/// A set of registers of one file.
#[derive(Clone, PartialEq)]
struct Registers(Vec<u64>);

impl Registers {
    fn insert(&mut self, index: usize) {
        self.0[index / 64] |= 1 << (index % 64);
    }

    fn contains(&self, index: usize) -> bool {
        self.0[index / 64] >> (index % 64) & 1 == 1
    }
}

/// The registers in one word of a set.
fn members(word: usize, mut set: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (set != 0).then(|| set.trailing_zeros() as usize)?;
        set &= set - 1;
        Some(64 * word + bit)
    })
}

/// Renumbers the registers so that those that are never alive together share a place: compilers write PTX with a new
/// register for each value, and a warp's registers should stay in a CPU's cache.
pub fn allocate_registers(program: &mut Program) {
    let counts = [program.words, program.wides, program.predicates];
    let offsets = [0, counts[0], counts[0] + counts[1]];
    let all: usize = counts.iter().sum();
    let index = |slot: Slot| offsets[slot.file() as usize] + slot.index();
    let fixed: Vec<Slot> = program.constants.iter().map(|(slot, _)| *slot).collect();
    let fixed: Vec<Slot> = fixed.into_iter().chain(program.specials.iter().map(|(slot, _)| *slot)).collect();
    let mut is_fixed = vec![false; all];
    fixed.iter().for_each(|slot| is_fixed[index(*slot)] = true);

    let Blocks { first, successors } = blocks(program);
    let count = successors.len();
    let empty = Registers(vec![0; all.div_ceil(64)]);
    let (mut used, mut defined) = (vec![empty.clone(); count], vec![empty.clone(); count]);
    for block in 0..count {
        for at in first[block]..first[block + 1] {
            let instruction = program.instructions[at];
            let operands = program.operands(&instruction);
            let (results, sources) = operands.split_at(instruction.results as usize);
            let guard = (instruction.guard != Slot::SINK).then_some(instruction.guard);
            // Under a guard, the lanes that are left out keep their old values.
            let kept = results.iter().filter(|_| guard.is_some());
            for slot in sources.iter().chain(&guard).chain(kept).filter(|slot| **slot != Slot::SINK) {
                if !defined[block].contains(index(*slot)) {
                    used[block].insert(index(*slot));
                }
            }
            for slot in results.iter().filter(|slot| **slot != Slot::SINK) {
                defined[block].insert(index(*slot));
            }
        }
    }
    let mut live_in = used.clone();
    let mut live_out = vec![empty; count];
    let mut changed = true;
    while changed {
        changed = false;
        for block in (0..count).rev() {
            for word in 0..live_in[block].0.len() {
                let out = successors[block].iter().fold(0, |out, next| out | live_in[*next].0[word]);
                live_out[block].0[word] = out;
                let into = used[block].0[word] | out & !defined[block].0[word];
                changed |= into != live_in[block].0[word];
                live_in[block].0[word] = into;
            }
        }
    }

    // The span of instructions over which a register is alive, holes included.
    let mut spans = vec![(usize::MAX, 0); all];
    let mut touch = |register: usize, at: usize| {
        let span: &mut (usize, usize) = &mut spans[register];
        *span = (span.0.min(at), span.1.max(at));
    };
    for block in 0..count {
        for (word, (into, out)) in live_in[block].0.iter().zip(&live_out[block].0).enumerate() {
            members(word, *into).for_each(|register| touch(register, first[block]));
            members(word, *out).for_each(|register| touch(register, first[block + 1]));
        }
        for at in first[block]..first[block + 1] {
            let instruction = program.instructions[at];
            for slot in program.operands(&instruction).iter().chain([&instruction.guard]) {
                if *slot != Slot::SINK {
                    touch(index(*slot), at);
                }
            }
        }
    }
    let mut order: Vec<usize> = (0..all).filter(|register| spans[*register].0 != usize::MAX).collect();
    order.sort_by_key(|register| spans[*register].0);
    let mut renamed = vec![Slot::SINK; all];
    let mut totals = [0; 3];
    let files = [File::Word, File::Wide, File::Predicate];
    let file_of = |register: usize| (0..3).rev().find(|file| register >= offsets[*file]).unwrap_or(0);
    for slot in &fixed {
        let file = slot.file() as usize;
        renamed[index(*slot)] = Slot::new(files[file], totals[file]);
        totals[file] += 1;
    }
    let mut free: [Vec<usize>; 3] = Default::default();
    let mut active = std::collections::BinaryHeap::new();
    for register in order.into_iter().filter(|register| !is_fixed[*register]) {
        let (from, to) = spans[register];
        while let Some(&std::cmp::Reverse((end, file, place))) = active.peek() {
            if end >= from {
                break;
            }
            active.pop();
            let list: &mut Vec<usize> = &mut free[file];
            list.push(place);
        }
        let file = file_of(register);
        let place = free[file].pop().unwrap_or_else(|| {
            totals[file] += 1;
            totals[file] - 1
        });
        renamed[register] = Slot::new(files[file], place);
        active.push(std::cmp::Reverse((to, file, place)));
    }
    let rename = |slot: &mut Slot| {
        if *slot != Slot::SINK {
            *slot = renamed[index(*slot)];
        }
    };
    program.operands.iter_mut().for_each(rename);
    program.instructions.iter_mut().for_each(|instruction| rename(&mut instruction.guard));
    program.constants.iter_mut().for_each(|(slot, _)| rename(slot));
    program.specials.iter_mut().for_each(|(slot, _)| rename(slot));
    (program.words, program.wides, program.predicates) = (totals[0], totals[1], totals[2]);
}
