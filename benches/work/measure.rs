//! Runs a group of items under criterion.

use crate::work::{self, Amount};
use criterion::{Criterion, SamplingMode, Throughput};
use std::time::Duration;

pub fn group(criterion: &mut Criterion, name: &str) {
    let place = work::Place::open();
    let mut group = criterion.benchmark_group(name);
    group.sample_size(10).sampling_mode(SamplingMode::Flat).measurement_time(Duration::from_secs(3));
    for item in work::items(&place, name) {
        group.throughput(match item.amount {
            Amount::Flops(amount) | Amount::Voxels(amount) => Throughput::Elements(amount),
            Amount::Bytes(amount) => Throughput::Bytes(amount),
        });
        let mut run = (item.prepare)(&place.context);
        let id = item.id.strip_prefix(name).and_then(|id| id.strip_prefix('/')).unwrap_or(&item.id).to_string();
        group.bench_function(id, |bencher| bencher.iter(&mut run));
    }
    group.finish();
}
