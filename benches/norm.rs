//! Instance norm and leaky ReLU. Throughput in FLOPs, bytes or voxels; the device by `VOXGRAD_DEVICE`.

#[path = "work/measure.rs"]
mod measure;
#[path = "work/mod.rs"]
mod work;

use criterion::{Criterion, criterion_group, criterion_main};

fn norm(criterion: &mut Criterion) {
    measure::group(criterion, "norm");
}

criterion_group!(benches, norm);
criterion_main!(benches);
