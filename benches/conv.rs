//! Convolutions of the shapes that nnU-Net's networks are made of. Throughput in FLOPs, bytes or voxels; the device by `VOXGRAD_DEVICE`.

#[path = "work/measure.rs"]
mod measure;
#[path = "work/mod.rs"]
mod work;

use criterion::{Criterion, criterion_group, criterion_main};

fn conv(criterion: &mut Criterion) {
    measure::group(criterion, "conv");
}

criterion_group!(benches, conv);
criterion_main!(benches);
