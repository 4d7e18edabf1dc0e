//! All cubes of a launch, on all cores.

use crate::counters::Counters;
use crate::cube::Cube;
use crate::memory::{Memory, View};
use crate::program::Program;
use crate::report::{Fault, Report};
use crate::warp::Shape;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Reports of a launch beyond which no more are kept.
const MOST_REPORTS: usize = 64;

/// A kernel with its arguments.
pub struct Launch<'a> {
    /// What runs.
    pub program: &'a Program,
    /// How much of it.
    pub shape: Shape,
    /// The arguments as the kernel's parameters lie in memory.
    pub parameters: Vec<u8>,
    /// What is allocated.
    pub view: View,
    /// For messages.
    pub memory: &'a Memory,
    /// Of the device, from 1.
    pub number: u32,
    /// Instructions that one warp may execute.
    pub limit: u64,
    found: Mutex<Vec<Report>>,
    stopped: AtomicBool,
}

impl<'a> Launch<'a> {
    /// Nothing runs yet.
    pub fn new(
        program: &'a Program,
        shape: Shape,
        parameters: Vec<u8>,
        memory: &'a Memory,
        number: u32,
        limit: u64,
    ) -> Self {
        let view = memory.view(number);
        let (found, stopped) = (Mutex::default(), AtomicBool::new(false));
        Self { program, shape, parameters, view, memory, number, limit, found, stopped }
    }

    /// Runs all cubes; what was counted, and what was found.
    pub fn run(self, threads: usize) -> (Counters, Vec<Report>) {
        let cubes: u64 = self.shape.cubes.iter().map(|count| u64::from(*count)).product();
        let next = AtomicU64::new(0);
        let work = || {
            let mut cube = Cube::new(&self);
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= cubes || self.is_stopped() {
                    return cube.counters;
                }
                if cube.run(number).is_err() {
                    self.stopped.store(true, Ordering::Relaxed);
                }
            }
        };
        let mut counters = Counters::default();
        let workers = (threads as u64).min(cubes).max(1);
        std::thread::scope(|scope| {
            let others: Vec<_> = (1..workers).map(|_| scope.spawn(work)).collect();
            counters.add(&work());
            for other in others {
                match other.join() {
                    Ok(part) => counters.add(&part),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
        });
        let mut found = self.found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        found.sort_by_key(|report| (report.line, report.fault, report.cube, report.thread));
        (counters, found)
    }

    /// Whether a fault has ended it.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }

    /// Keeps the first report of each kind and line.
    pub fn report(&self, report: Report) {
        let mut found = self.found.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let known = |other: &Report| other.fault == report.fault && other.line == report.line;
        if found.len() < MOST_REPORTS && !found.iter().any(known) || report.fault == Fault::Trap {
            found.push(report);
        }
    }
}
