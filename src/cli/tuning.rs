//! Algorithms that are measured before training.

use voxgrad::device::Device;
use voxgrad::kernels::Context;
use voxgrad::train::{Model, Settings};
use voxgrad::tune;

/// The device, with the algorithms that are the fastest on it for each convolution of a network: measured now, unless an
/// earlier run has.
pub fn tuned(device: &Device, model: &Model, settings: &Settings) -> anyhow::Result<Context> {
    let (patch, _) = model.configuration.three_dimensional()?;
    let problems = tune::convolutions(&device.context, &model.architecture()?, model.configuration.batch_size, patch)?;
    let identity = tune::identity(device);
    let file = tune::cache_file(&identity);
    let mut table = match &file {
        Some(file) => tune::Table::read(file, &identity).unwrap_or_else(|error| {
            eprintln!("note: {error}; measuring anew");
            tune::Table::new(&identity)
        }),
        None => tune::Table::new(&identity),
    };
    let dtype = settings.precision.dtype();
    let measured = table.complete(&device.context, &problems, dtype, |problem, pass, times| {
        let [depth, height, width] = problem.in_dims();
        let inputs = problem.channels_in() + problem.second_channels();
        let times: Vec<String> = times.iter().map(|(name, ms)| format!("{name} {ms:.2} ms")).collect();
        println!(
            "measured: {inputs} to {} channels, {depth}x{height}x{width}, {pass}: {}",
            problem.channels_out(),
            times.join(", ")
        );
    })?;
    match &file {
        Some(file) if measured > 0 => {
            table.write(file)?;
            println!("kept {measured} measurements in {}", file.display());
        }
        Some(_) if table.policy().choices() == 0 => println!("tuning: one algorithm only for each convolution"),
        Some(file) => println!("algorithms as measured in {}", file.display()),
        None => eprintln!("note: no cache folder in the environment; the measurements are not kept"),
    }
    Ok(table.policy().on(&device.context))
}
