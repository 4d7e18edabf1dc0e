//! Planted errors that compute-sanitizer has to report: a sanitizer that stays silent on these proves nothing by staying
//! silent elsewhere. They are undefined behaviour on purpose, so they only run when asked for, on CUDA
//! (`scripts/gpu_checks.sh`).

use crate::common::{device, read};
use cubecl::prelude::*;

#[cube(launch_unchecked)]
fn write_far_outside(y: &mut [f32], far: usize) {
    y[far] = 1.0f32;
}

#[test]
#[ignore = "writes outside of its buffer: for compute-sanitizer on CUDA"]
fn planted_memcheck_error() {
    let (context, _guard) = device();
    let y = context.upload_f32(&[0.0; 64]).unwrap();
    // 16 GiB on: beyond the pool that the buffer is part of, where a sanitizer sees no allocation at all. Positions have 32 bits.
    let far = u32::MAX as usize;
    // SAFETY: none, on purpose; see the module's documentation.
    unsafe {
        write_far_outside::launch_unchecked(
            context.client(),
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(1),
            y.arg(),
            far,
        );
    }
    read(context, &y);
}

#[cube(launch_unchecked)]
fn exchange_without_barrier(y: &mut [f32], #[comptime] units: usize) {
    let mut shared = Shared::<[f32]>::new_slice(units);
    let unit = UNIT_POS as usize;
    shared[unit] = f32::cast_from(unit as u32);
    y[unit] = shared[units - 1 - unit];
}

#[test]
#[ignore = "reads shared memory that another unit writes: for compute-sanitizer on CUDA"]
fn planted_racecheck_error() {
    let (context, _guard) = device();
    let y = context.upload_f32(&[0.0; 256]).unwrap();
    // SAFETY: none, on purpose; see the module's documentation.
    unsafe {
        exchange_without_barrier::launch_unchecked(
            context.client(),
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(256),
            y.arg(),
            256,
        );
    }
    read(context, &y);
}
