//! Where the time of a training step goes, kernel by kernel, and its memory by kind.

use super::workload::{Prepared, Workload};
use crate::error::Result;
use crate::kernels::{self, Context, Launched};
use crate::train::MemoryPlan;
use serde::Serialize;
use std::time::Instant;

/// Of so many steps after the first the fastest counts.
const STEPS: usize = 5;

/// A training step, kernel by kernel. Seconds.
#[derive(Clone, Debug, Serialize)]
pub struct Profile {
    /// What the device can do at most.
    pub ceilings: Ceilings,
    /// The kernels of the fastest step after the first, those that take the most time first.
    pub kernels: Vec<KernelTimes>,
    /// Its launches, in order.
    pub launches: Vec<LaunchTimes>,
    /// All of it. Each launch is waited for before the next is made.
    pub step: f64,
    /// Of it, the time in which no kernel ran: before, between and behind the launches.
    pub between: f64,
    /// The fastest of as many steps in which nothing is recorded: launches are queued, and no kernel is waited for.
    pub unrecorded_step: f64,
    /// The first step of the process, recorded too: it compiles the kernels and touches memory for the first time.
    pub first_step: f64,
    /// The memory of a step.
    pub memory: MemoryUse,
}

/// What a device can do at most, as measured right before.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Ceilings {
    /// FLOPs a second in f32 of multiply-adds that wait for nothing, each counted as two.
    pub flops: f64,
    /// Bytes a second that a copy reads and writes together, of buffers larger than caches.
    pub copy: f64,
}

/// All launches of a kernel in a step. See [`Launched`] for how work is counted.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KernelTimes {
    /// File and line of its launch.
    pub kernel: String,
    /// What it belongs to.
    pub operation: &'static str,
    /// Launches.
    pub calls: usize,
    /// The forms in which it was compiled.
    pub forms: usize,
    /// Seconds of all.
    pub seconds: f64,
    /// Floating-point operations of all; 0 where memory is what limits the kernel.
    pub flops: u64,
    /// Bytes of the buffers of all.
    pub bytes: u64,
    /// Seconds that compiling these took: what their first launches took longer in the first step. None if that step did not
    /// launch the same kernels.
    pub compile: Option<f64>,
}

/// One launch in a step.
#[derive(Clone, Debug, Serialize)]
pub struct LaunchTimes {
    /// File and line.
    pub kernel: String,
    /// What it belongs to.
    pub operation: &'static str,
    /// Seconds.
    pub seconds: f64,
    /// As in [`KernelTimes::flops`].
    pub flops: u64,
    /// As in [`KernelTimes::bytes`].
    pub bytes: u64,
    /// Number of the form, counted from the first one launched in the step.
    pub form: usize,
    /// Seconds that it took in the first step, if that launched the same kernels.
    pub first: Option<f64>,
}

/// Bytes of a training step: planned, and what was held.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct MemoryUse {
    /// Weights, their gradients and momenta.
    pub parameters: u64,
    /// Images and labels.
    pub batch: u64,
    /// What forward keeps for backward.
    pub activations: u64,
    /// At the fullest moment beyond these: gradients of activations, and activations computed again.
    pub gradients: u64,
    /// At the same moment, what kernels have for themselves.
    pub scratch: u64,
    /// The sum of these.
    pub planned: u64,
    /// The most that was held at once.
    pub held: u64,
    /// What the runtime's pools keep beyond that.
    pub pool_overhead: u64,
}

/// A step that was recorded.
struct Recorded {
    began: Instant,
    ended: Instant,
    launched: Vec<Launched>,
}

impl Recorded {
    fn seconds(&self) -> f64 {
        (self.ended - self.began).as_secs_f64()
    }

    /// The gaps before, between and behind its launches.
    fn between(&self) -> f64 {
        let begins = self.launched.iter().map(|launch| launch.began).chain([self.ended]);
        let ends = std::iter::once(self.began).chain(self.launched.iter().map(Launched::ended));
        begins.zip(ends).map(|(next, before)| next.saturating_duration_since(before).as_secs_f64()).sum()
    }
}

impl Profile {
    /// Measures the device's ceilings, then a step on a batch of random data, recorded and not. Best in a process that has
    /// computed nothing before: what is compiled already is not compiled again. `observe` is told what comes next.
    ///
    /// # Errors
    /// [`NetworkError::DeviceMemory`](crate::error::NetworkError::DeviceMemory) for what the device cannot hold, or what it
    /// reports.
    pub fn measure(context: &Context, workload: &Workload, mut observe: impl FnMut(&'static str)) -> Result<Self> {
        let plan = workload.memory(context)?;
        plan.check(context.caps())?;
        observe("measuring what the device can do at most");
        let ceilings = Ceilings { flops: kernels::multiply_add_rate(context)?, copy: kernels::copy_rate(context)? };

        observe("the first step, which compiles the kernels");
        let profiled = context.profiled();
        let prepared = workload.on(&profiled)?;
        profiled.reset_peak();
        let first = prepared.recorded(&profiled)?;
        observe("steps in which every launch is timed");
        let mut fastest = prepared.recorded(&profiled)?;
        for _ in 1..STEPS {
            let step = prepared.recorded(&profiled)?;
            if step.seconds() < fastest.seconds() {
                fastest = step;
            }
        }
        let memory = MemoryUse::of(&plan, profiled.peak_bytes(), profiled.reserved_bytes());
        drop(prepared);

        observe("steps as they are in training");
        let prepared = workload.on(context)?;
        prepared.step(context)?;
        let mut unrecorded_step = f64::INFINITY;
        for _ in 0..STEPS {
            let began = Instant::now();
            prepared.step(context)?;
            unrecorded_step = unrecorded_step.min(began.elapsed().as_secs_f64());
        }
        let launches = launches(&fastest.launched, &first.launched);
        Ok(Self {
            ceilings,
            kernels: by_kernel(&launches),
            launches,
            step: fastest.seconds(),
            between: fastest.between(),
            unrecorded_step,
            first_step: first.seconds(),
            memory,
        })
    }
}

impl Prepared {
    /// A step, and waiting for it.
    fn step(&self, context: &Context) -> Result<()> {
        self.step.gradients(&self.image, &self.target)?;
        let norm = self.step.update(0.01)?;
        let [values, ..] = self.step.network().parameters().trained()?;
        Ok(context.finish([&norm, &values])?)
    }

    fn recorded(&self, profiled: &Context) -> Result<Recorded> {
        profiled.take_launched();
        let began = Instant::now();
        self.step(profiled)?;
        Ok(Recorded { began, ended: Instant::now(), launched: profiled.take_launched() })
    }
}

impl MemoryUse {
    fn of(plan: &MemoryPlan, held: u64, reserved: u64) -> Self {
        let MemoryPlan { parameters, batch, activations, temporaries, scratch, total, .. } = *plan;
        let gradients = temporaries - scratch;
        let pool_overhead = reserved.saturating_sub(held);
        Self { parameters, batch, activations, gradients, scratch, planned: total, held, pool_overhead }
    }
}

/// The launches of a step beside those of the first one.
fn launches(step: &[Launched], first: &[Launched]) -> Vec<LaunchTimes> {
    let same = step.len() == first.len() && step.iter().zip(first).all(|(a, b)| a.form == b.form);
    let first = |index: usize| same.then(|| first[index].took.as_secs_f64());
    let mut forms: Vec<u128> = Vec::new();
    let mut number = |form: u128| {
        forms.iter().position(|known| *known == form).unwrap_or_else(|| {
            forms.push(form);
            forms.len() - 1
        })
    };
    let mut times = |(index, launch): (usize, &Launched)| LaunchTimes {
        kernel: launch.kernel(),
        operation: launch.operation,
        seconds: launch.took.as_secs_f64(),
        flops: launch.flops,
        bytes: launch.bytes,
        form: number(launch.form),
        first: first(index),
    };
    step.iter().enumerate().map(&mut times).collect()
}

fn by_kernel(launches: &[LaunchTimes]) -> Vec<KernelTimes> {
    let mut kernels: Vec<KernelTimes> = Vec::new();
    for (index, launch) in launches.iter().enumerate() {
        let is_new = launches[..index].iter().all(|earlier| earlier.form != launch.form);
        let compile = launch.first.map(|first| if is_new { (first - launch.seconds).max(0.0) } else { 0.0 });
        let is_same = |known: &KernelTimes| known.kernel == launch.kernel && known.operation == launch.operation;
        let place = kernels.iter().position(is_same).unwrap_or_else(|| {
            kernels.push(KernelTimes::none(launch));
            kernels.len() - 1
        });
        let times = &mut kernels[place];
        times.calls += 1;
        times.forms += usize::from(is_new);
        times.seconds += launch.seconds;
        times.flops += launch.flops;
        times.bytes += launch.bytes;
        times.compile = times.compile.zip(compile).map(|(sum, more)| sum + more);
    }
    kernels.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
    kernels
}

impl KernelTimes {
    /// Of a launch's kernel, nothing yet.
    fn none(launch: &LaunchTimes) -> Self {
        let (kernel, operation) = (launch.kernel.clone(), launch.operation);
        Self { kernel, operation, calls: 0, forms: 0, seconds: 0.0, flops: 0, bytes: 0, compile: Some(0.0) }
    }
}
