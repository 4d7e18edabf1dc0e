//! Whole training steps. Throughput in FLOPs, bytes or voxels; the device by `VOXGRAD_DEVICE`.

#[path = "work/measure.rs"]
mod measure;
#[path = "work/mod.rs"]
mod work;

use criterion::{Criterion, criterion_group, criterion_main};

fn step(criterion: &mut Criterion) {
    measure::group(criterion, "step");
}

criterion_group!(benches, step);
criterion_main!(benches);
