//! The device's own ceiling: how many multiply-adds a second its units reach when nothing else is in their way.

use cubecl::prelude::*;
use std::time::Instant;
use voxgrad::kernels::{Context, Dtype};

/// Independent chains of multiply-adds in a unit: enough to hide their latency on every device seen so far (a core with
/// two pipes of four cycles needs eight).
const CHAINS: usize = 12;

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

/// FLOPs a second in f32, a multiply-add counted as two: the best of ten runs.
pub fn flops(context: &Context) -> f64 {
    let caps = context.caps();
    let lanes = caps.lanes.next_power_of_two();
    let (cubes, units, mut rounds) = match caps.cores {
        Some(cores) => (1, cores, 4_000_000),
        None => (4096, 256, 16),
    };
    let output = context.empty((cubes * units) as usize * lanes, Dtype::F32).expect("allocation");
    let run = |rounds: usize| {
        let (count, dim) = (CubeCount::Static(cubes, 1, 1), CubeDim::new_1d(units));
        let start = Instant::now();
        multiply_add_kernel::launch(context.client(), count, dim, lanes, output.arg(), 0.5, rounds);
        context.finish([&output]).expect("finish");
        start.elapsed().as_secs_f64()
    };
    let fastest = |runs: usize, rounds| (0..runs).map(|_| run(rounds)).fold(f64::INFINITY, f64::min);
    // The first run compiles. Then long enough that a launch costs nothing beside it: GPUs differ a thousandfold.
    run(rounds);
    while fastest(3, rounds) < 0.02 {
        rounds *= 2;
    }
    let flops = 2.0 * (CHAINS * lanes * rounds) as f64 * f64::from(cubes * units);
    flops / fastest(10, rounds)
}
