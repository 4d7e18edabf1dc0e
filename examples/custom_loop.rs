//! Tape, loss and optimiser by hand: a small U-Net learns to tell a sphere from its surroundings, of which one slice in four is
//! annotated.
//!
//! ```sh
//! cargo run --release --example custom_loop
//! ```

use std::path::Path;
use voxgrad::dataset::{DatasetJson, LabelManager};
use voxgrad::device;
use voxgrad::kernels::{Dtype, Scale};
use voxgrad::loss::NetworkLoss;
use voxgrad::nn::{Encoder, Network, Stage, UNetShape};
use voxgrad::optim::{Optimizer, poly_learning_rate};
use voxgrad::tape::{Tape, Var};
use voxgrad::tensor::{Shape, Tensor};

const DATASET: &str = r#"{"channel_names": {"0": "MRI"}, "numTraining": 1, "file_ending": ".nii.gz",
    "labels": {"background": 0, "sphere": 1, "ignore": 2}}"#;
const SIDE: usize = 16;
const STEPS: usize = 60;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let context = device::open(std::env::var("VOXGRAD_DEVICE").as_deref().unwrap_or("cpu").parse()?)?.context;
    let labels = LabelManager::new(&DatasetJson::parse(Path::new("dataset.json"), DATASET)?)?;
    let stage = |features, stride: usize, decoder_blocks| Stage {
        features,
        kernel: [3; 3],
        stride: [stride; 3],
        encoder_blocks: 2,
        decoder_blocks,
    };
    let stages = vec![stage(8, 1, 2), stage(16, 2, 2), stage(32, 2, 0)];
    let shape = UNetShape {
        channels_in: 1,
        heads: labels.num_segmentation_heads(),
        encoder: Encoder::Plain,
        stages,
        bias: true,
    };
    let loss = NetworkLoss::new(&context, &labels, &shape, 1, [SIDE; 3], false)?;
    let network = Network::new(&context, shape, 0)?;
    let optimizer = Optimizer { momentum: 0.9, ..Default::default() };

    // A bright sphere in a noisy image. Label 2 is ignored: nothing is learned from it.
    let inside = |voxel: usize| {
        let place = [voxel / (SIDE * SIDE), voxel / SIDE % SIDE, voxel % SIDE];
        place.iter().map(|&x| (x as f32 - 7.5).powi(2)).sum::<f32>() < 25.0
    };
    let noise = |voxel: usize| ((voxel * 7919 % 1009) as f32 / 1009.0 - 0.5) * 1.5;
    let voxels = 0..SIDE * SIDE * SIDE;
    let image: Vec<f32> = voxels.clone().map(|v| f32::from(u8::from(inside(v))) + noise(v)).collect();
    let annotated = |voxel: usize| (voxel / (SIDE * SIDE)).is_multiple_of(4);
    let map: Vec<u8> = voxels.clone().map(|v| if annotated(v) { u8::from(inside(v)) } else { 2 }).collect();
    let image = Tensor::upload(&context, Shape { batch: 1, dims: [SIDE; 3], channels: 1 }, &image)?;
    let (image, target) = (Var::data(image), context.upload(&map, Dtype::U8)?);

    for step in 0..STEPS {
        let mut tape = Tape::new(&context);
        let outputs = network.forward(&mut tape, &image, loss.levels())?;
        let (value, seeds) = loss.value_and_gradient(&context, &target, outputs, Scale::ONE)?;
        tape.backward(seeds)?;
        let rate = poly_learning_rate(0.02, step, STEPS) as f32;
        optimizer.step(&context, network.parameters(), rate, Scale::ONE)?;
        if step % 10 == 0 {
            println!("step {step}: loss {:.4}", context.download_f32(&value)?[0]);
        }
    }

    let logits = network.forward(&mut Tape::inference(&context), &image, 1)?[0].value().download(&context)?;
    let right = voxels.clone().filter(|&v| (logits[2 * v + 1] > logits[2 * v]) == inside(v)).count();
    println!(
        "{:.1} % of all voxels are right, three in four of them never annotated",
        100.0 * right as f64 / map.len() as f64
    );
    Ok(())
}
