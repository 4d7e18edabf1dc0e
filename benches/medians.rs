//! Prints one line an item, `id seconds`: what `scripts/compare.sh` sets beside the same ids of
//! `benches/peers/torch_peers.py`. Usage: `cargo bench --bench medians -- GROUP [REPEATS [TEXT]]`, where only items whose
//! id contains TEXT run, and GROUP may be one whole id. On Linux the last line is the process's peak resident memory.

#[path = "work/mod.rs"]
mod work;

use std::time::Instant;
use voxgrad::kernels;
use work::Amount;

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let Some(group) = arguments.next() else {
        return eprintln!(
            "medians: cargo bench --bench medians -- conv|norm|loss|step|size|winograd|augment|all [REPEATS [TEXT]]"
        );
    };
    let repeats: usize = arguments.next().map_or(11, |text| text.parse().expect("REPEATS is a number"));
    let only = arguments.next().unwrap_or_default();
    let place = work::Place::open();
    let context = &place.context;
    let peak = kernels::multiply_add_rate(context).expect("multiply-add peak");
    let copy = kernels::copy_rate(context).expect("copy bandwidth");
    println!("# multiply-add peak {:.1} GFLOP/s, copy bandwidth {:.1} GB/s", peak / 1e9, copy / 1e9);
    for item in work::items(&place, &group).into_iter().filter(|item| item.id.contains(&only)) {
        let mut run = (item.prepare)(context);
        // The first run compiles; the second finds warm pools.
        run();
        run();
        let mut seconds: Vec<f64> = (0..repeats)
            .map(|_| {
                let start = Instant::now();
                run();
                start.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        let (median, fastest) = (seconds[repeats / 2], seconds[0]);
        let rate = match item.amount {
            Amount::Flops(flops) => {
                let rate = flops as f64 / median;
                format!("{:.1} GFLOP/s, {:.0} % of peak", rate / 1e9, 100.0 * rate / peak)
            }
            Amount::Bytes(bytes) => {
                let rate = bytes as f64 / median;
                format!("{:.1} GB/s, {:.0} % of copy bandwidth", rate / 1e9, 100.0 * rate / copy)
            }
            Amount::Voxels(voxels) => format!("{:.2} Mvoxel/s", voxels as f64 / median / 1e6),
        };
        println!("{} {median:.6} # {rate}, fastest {fastest:.6}", item.id);
    }
    if let Some(kilobytes) = peak_resident() {
        println!("# peak resident memory {:.1} MiB", kilobytes as f64 / 1024.0);
    }
}

/// Peak resident memory of this process in kB, where the system tells.
fn peak_resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok())
}
