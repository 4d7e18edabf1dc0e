//! The device's own ceilings, measured: multiply-adds a second when nothing else is in their way, and bytes a second of a copy.

use crate::{Buffer, Context, Dtype, KernelError, Work, elementwise};
use cubecl::prelude::*;
use std::time::Instant;

/// Independent chains of multiply-adds in a unit: enough to hide their latency on every device seen so far (a core with
/// two pipes of four cycles needs eight).
const CHAINS: usize = 12;
/// Of so many runs the fastest counts.
const RUNS: usize = 10;
/// Bytes of each of the two buffers of a copy, where the device has room: more than a processor's last cache holds.
const COPIED: u64 = 128 << 20;

#[cube(launch)]
fn multiply_add_kernel<N: Size>(output: &mut [Vector<f32, N>], factor: f32, rounds: usize) {
    let mut sums = Array::<Vector<f32, N>>::new(CHAINS);
    #[unroll]
    for chain in 0..CHAINS {
        sums[chain] = Vector::new(f32::cast_from(chain as u32) * factor);
    }
    let factor = Vector::<f32, N>::new(factor);
    for _ in 0..rounds {
        #[unroll]
        for chain in 0..CHAINS {
            sums[chain] = fma(sums[chain], factor, factor);
        }
    }
    let mut sum = sums[0];
    #[unroll]
    for chain in 1..CHAINS {
        sum += sums[chain];
    }
    output[ABSOLUTE_POS] = sum;
}

/// FLOPs a second in f32, a multiply-add counted as two: the fastest of ten runs.
///
/// # Errors
/// [`KernelError::Device`] if the device fails.
pub fn multiply_add_rate(context: &Context) -> Result<f64, KernelError> {
    const OPERATION: &str = "multiply-add peak";
    let caps = context.caps();
    let lanes = caps.lanes.next_power_of_two();
    let (cubes, units, mut rounds) = match caps.cores {
        Some(cores) => (1, cores, 4_000_000),
        None => (4096, 256.min(caps.max_units), 16),
    };
    let output = context.empty(cubes * units as usize * lanes, Dtype::F32)?;
    let run = |rounds: usize| {
        seconds(context, &output, || {
            context.launch(OPERATION, Work::Cubes(cubes, CubeDim::new_1d(units)), |client, count, dim| {
                multiply_add_kernel::launch(client, count, dim, lanes, output.arg(), 0.5, rounds);
            })
        })
    };
    // The first run compiles. Then long enough that a launch costs nothing beside it: GPUs differ a thousandfold.
    run(rounds)?;
    while fastest(3, || run(rounds))? < 0.02 {
        rounds *= 2;
    }
    let flops = 2.0 * (CHAINS * lanes * rounds) as f64 * (cubes * units as usize) as f64;
    Ok(flops / fastest(RUNS, || run(rounds))?)
}

/// Bytes a second that a copy from one buffer to another reads and writes together: the fastest of ten runs.
///
/// # Errors
/// [`KernelError::Limit`] or [`KernelError::Device`] if the device fails.
pub fn copy_rate(context: &Context) -> Result<f64, KernelError> {
    let caps = context.caps();
    let room = caps.memory.map_or(caps.max_buffer, |memory| caps.max_buffer.min(memory / 8));
    let bytes = COPIED.min(room);
    let [from, to] = [(); 2].map(|()| context.empty((bytes / 4) as usize, Dtype::F32));
    let (from, to) = (from?, to?);
    // Memory that was never written may be one and the same page everywhere.
    elementwise::fill(context, &from, 1.0)?;
    let run = || seconds(context, &to, || elementwise::copy(context, &from, &to));
    run()?;
    Ok(2.0 * bytes as f64 / fastest(RUNS, run)?)
}

/// How long `work` takes until `output` is there.
fn seconds(
    context: &Context,
    output: &Buffer,
    work: impl FnOnce() -> Result<(), KernelError>,
) -> Result<f64, KernelError> {
    let began = Instant::now();
    work()?;
    context.finish([output])?;
    Ok(began.elapsed().as_secs_f64())
}

fn fastest(runs: usize, run: impl Fn() -> Result<f64, KernelError>) -> Result<f64, KernelError> {
    (0..runs).try_fold(f64::INFINITY, |fastest, _| Ok(fastest.min(run()?)))
}
