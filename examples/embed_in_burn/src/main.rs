//! Times voxgrad's loss inside Burn beside Burn's own operations: value and gradient with respect to the logits.
//!
//! Usage: embed_in_burn [DEVICE] [SIDE] [REPEATS], DEVICE one of cpu, vulkan, cuda as far as this build has it.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use embed_in_burn::{DiceEntropy, composed_loss};
use std::error::Error;
use std::time::Instant;
use voxgrad_kernels::loss::{LossSettings, Target};

const BATCH: usize = 2;
const CLASSES: usize = 4;
/// Compilation and Burn's autotune are over after this many runs.
const WARM_UP: usize = 5;

fn open(name: &str) -> Result<Device, Box<dyn Error>> {
    match name {
        #[cfg(feature = "cpu")]
        "cpu" => Ok(Device::cpu()),
        #[cfg(feature = "vulkan")]
        "vulkan" => Ok(Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "cuda")]
        "cuda" => Ok(Device::cuda(0)),
        other => Err(format!("this build has no device {other}").into()),
    }
}

/// Seconds until value and gradient are there, and the value.
fn time(
    device: &Device,
    logits: &Tensor<5>,
    loss: &dyn Fn(Tensor<5>) -> Result<Tensor<1>, Box<dyn Error>>,
) -> Result<(f64, f32), Box<dyn Error>> {
    let start = Instant::now();
    let logits = logits.clone().require_grad();
    let value = loss(logits.clone())?;
    let gradients = value.backward();
    let gradient = logits.grad(&gradients).ok_or("no gradient")?;
    // Reading one number forces what Burn has queued up, and the device is drained before the clock stops.
    let _ = gradient.slice([0..1, 0..1, 0..1, 0..1, 0..1]).into_data();
    device.sync().map_err(|error| format!("{error:?}"))?;
    let seconds = start.elapsed().as_secs_f64();
    Ok((seconds, value.into_scalar::<f32>()))
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let name = arguments.first().map_or("cpu", String::as_str);
    let side: usize = arguments.get(1).map_or(Ok(32), |text| text.parse())?;
    let repeats: usize = arguments.get(2).map_or(Ok(9), |text| text.parse())?;
    let device = open(name)?;
    let voxels = BATCH * side * side * side;

    let logits = (0..voxels * CLASSES).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
    let logits = TensorData::new::<f32, _>(logits, [BATCH, side, side, side, CLASSES]);
    let logits = Tensor::<5>::from_data(logits, &device.clone().autodiff());
    let numbers: Vec<u8> = (0..voxels).map(|i| (i * 7 / 3 % (CLASSES + 1)) as u8).collect();
    let shape = [BATCH, side, side, side];
    let bytes = Tensor::<4, Int>::from_data(TensorData::new(numbers.clone(), shape), (&device, DType::U8));
    let integers: Vec<i32> = numbers.into_iter().map(i32::from).collect();
    let integers = Tensor::<4, Int>::from_data(TensorData::new(integers, shape), &device);

    let settings = LossSettings::new(Target::Labels { classes: CLASSES }, Some(CLASSES as u16), false);
    let fused = DiceEntropy::new(&device, &settings, BATCH, [side; 3])?;
    let losses: [(&str, &dyn Fn(Tensor<5>) -> Result<Tensor<1>, Box<dyn Error>>); 2] = [
        ("voxgrad", &|logits| Ok(fused.forward(logits, bytes.clone())?)),
        ("Burn's operations", &|logits| Ok(composed_loss(logits, integers.clone(), CLASSES as i32))),
    ];
    let mut seconds = [Vec::new(), Vec::new()];
    let mut values = [0.0; 2];
    // In turns, so that whatever else the machine does meets both.
    for round in 0..WARM_UP + repeats.max(1) {
        for (i, (_, loss)) in losses.iter().enumerate() {
            let (time, value) = time(&device, &logits, loss)?;
            values[i] = value;
            if round >= WARM_UP {
                seconds[i].push(time);
            }
        }
    }
    println!("Dice + cross-entropy and gradient, {BATCH}x{side}x{side}x{side}x{CLASSES}, {device:?}, {repeats} rounds");
    for (i, (who, _)) in losses.iter().enumerate() {
        seconds[i].sort_by(f64::total_cmp);
        let (median, least) = (seconds[i][seconds[i].len() / 2], seconds[i][0]);
        println!("{who}: value {:.6}, median {median:.5} s, least {least:.5} s", values[i]);
    }
    Ok(())
}
