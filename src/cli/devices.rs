//! `voxgrad devices`.

use voxgrad::device;

/// Prints a line or two for every device.
pub fn run() -> anyhow::Result<()> {
    let all = device::list();
    if all.is_empty() {
        println!("no device: this build has none of the features cpu, vulkan, cuda");
    }
    for found in all {
        let caps = &found.caps;
        let software = if found.software { ", software: used only when asked for" } else { "" };
        println!("{:<10} {}{software}", found.choice.to_string(), found.name);
        let memory = caps.memory.map_or("memory unknown".to_string(), |bytes| format!("{} memory", gibibytes(bytes)));
        let width = match (caps.cores, caps.plane) {
            (Some(cores), _) => format!("{cores} cores, vectors of {} f32", caps.lanes),
            (None, Some(plane)) => format!("planes of {plane} units"),
            (None, None) => "no plane operations".to_string(),
        };
        let types = match (caps.f16, caps.bf16) {
            (true, true) => "f32, f16, bf16",
            (true, false) => "f32, f16",
            (false, true) => "f32, bf16",
            (false, false) => "f32",
        };
        println!("           {memory}, largest buffer {}, {width}, {types}", gibibytes(caps.max_buffer));
        let tiles: Vec<String> = caps
            .tensor_cores
            .iter()
            .map(|t| format!("{}x{}x{} {} to {}", t.m, t.n, t.k, t.input, t.accumulator))
            .collect();
        match tiles.is_empty() {
            true => println!("           no tensor-core tiles"),
            false => println!("           tensor-core tiles: {}", tiles.join(", ")),
        }
    }
    Ok(())
}

fn gibibytes(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1u64 << 30) as f64)
}
