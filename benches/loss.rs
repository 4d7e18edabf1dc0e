//! Ignore-masked losses beside a plain copy: `cargo bench --bench loss [-- TEXT [REPEATS]]`, only ids that contain TEXT;
//! the device by `VOXGRAD_DEVICE`.
//!
//! REPEATS is 11 unless given, and fewer where they would take more than two seconds. One line an item: id, median
//! seconds, GB/s, percent of the bandwidth of a copy, and extra bytes. The bytes are those that have to be moved at least:
//! logits are read twice and their gradient is written, labels are read twice. Where whole groups of voxels are ignored
//! fewer are moved, so that more than 100 % is possible. The copy moves as many bytes on the same device, in turns with the
//! item. Extra bytes are the most that one run holds at once, beside logits, gradient, labels and result.

#[path = "work/mod.rs"]
mod work;

use std::time::{Duration, Instant};
use voxgrad::kernels::{Buffer, Context, Dtype, elementwise};
use work::Amount;

/// An item that takes long is repeated less often, but this often.
const FEWEST: usize = 3;
const LONGEST: Duration = Duration::from_secs(2);

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|a| !a.starts_with("--"));
    let text = arguments.next().unwrap_or_default();
    let repeats: usize = arguments.next().map_or(11, |text| text.parse().expect("REPEATS is a number"));
    let place = work::Place::open();
    let context = &place.context;
    println!("# id seconds GB/s percent_of_copy extra_bytes");
    for item in work::items(&place, "loss") {
        if !item.id.contains(&text) {
            continue;
        }
        let (Amount::Bytes(bytes) | Amount::Flops(bytes) | Amount::Voxels(bytes)) = item.amount;
        let mut run = (item.prepare)(context);
        // The first run compiles; the second finds warm pools.
        run();
        run();
        let before = context.held_bytes();
        context.reset_peak();
        run();
        let extra = context.peak_bytes() - before;
        let elements = (bytes / 8) as usize;
        let (from, to) = (work::upload(context, elements, 5), context.empty(elements, Dtype::F32).expect("memory"));
        copy(context, &from, &to);
        let (mut seconds, mut of_copy) = (Vec::new(), Vec::new());
        let start = Instant::now();
        while seconds.len() < repeats && (seconds.len() < FEWEST || start.elapsed() < LONGEST) {
            seconds.push(timed(&mut run));
            of_copy.push(timed(&mut || copy(context, &from, &to)));
        }
        let (seconds, of_copy) = (median(seconds), median(of_copy));
        let (rate, share) = (bytes as f64 / seconds / 1e9, 100.0 * of_copy / seconds);
        println!("{} {seconds:.6} {rate:.1} {share:.0} {extra}", item.id);
    }
}

fn timed(run: &mut dyn FnMut()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn copy(context: &Context, from: &Buffer, to: &Buffer) {
    elementwise::copy(context, from, to).expect("copy");
    context.finish([to]).expect("finish");
}
