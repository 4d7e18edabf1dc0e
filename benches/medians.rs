//! Prints one line an item, `id seconds`: what `scripts/compare.sh` sets beside the same ids of
//! `benches/peers/torch_peers.py`. Usage: `cargo bench --bench medians -- [GROUP] [REPEATS]`.

#[path = "work/mod.rs"]
mod work;

use std::time::Instant;

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let group = arguments.next().unwrap_or_else(|| "all".into());
    let repeats: usize = arguments.next().map_or(11, |text| text.parse().expect("REPEATS is a number"));
    let context = work::context();
    for item in work::items(&context) {
        if group != "all" && !item.id.starts_with(&group) {
            continue;
        }
        let mut run = (item.prepare)(&context);
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
        let median = seconds[repeats / 2];
        match item.flops {
            Some(flops) => println!("{} {median:.6} # {:.1} GFLOP/s", item.id, flops as f64 / median / 1e9),
            None => println!("{} {median:.6}", item.id),
        }
    }
}
