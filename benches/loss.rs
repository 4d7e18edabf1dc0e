//! Ignore-masked losses, forward and forward with backward. Throughput in FLOPs, bytes or voxels; the device by `VOXGRAD_DEVICE`.

#[path = "work/measure.rs"]
mod measure;
#[path = "work/mod.rs"]
mod work;

use criterion::{Criterion, criterion_group, criterion_main};

fn loss(criterion: &mut Criterion) {
    measure::group(criterion, "loss");
}

criterion_group!(benches, loss);
criterion_main!(benches);
