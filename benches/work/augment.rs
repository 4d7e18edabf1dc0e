//! Augmentation of training batches as nnU-Net draws it: upload of the larger patches, every transform, the finished batch.

use super::{Amount, Item, pattern};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use voxgrad::augment::{Augmenter, Recipe};
use voxgrad::kernels::Dtype;
use voxgrad::sample::Batch;

const BATCH: usize = 2;

/// Channels, patch and batches of a run: what a single one takes depends on what is drawn. The last patch is the one that
/// nnU-Net plans where memory alone limits it.
pub fn items() -> Vec<Item> {
    let all = [(1, [40, 56, 40], 32), (4, [64, 64, 64], 32), (1, [128, 128, 128], 4)];
    all.map(|(channels, patch, batches)| item(channels, patch, batches)).into()
}

fn item(channels: usize, patch: [usize; 3], batches: usize) -> Item {
    let [d, h, w] = patch;
    Item {
        id: format!("augment/{batches}-batches-in{channels}-b{BATCH}-{d}x{h}x{w}"),
        amount: Amount::Voxels((batches * BATCH * d * h * w) as u64),
        prepare: Box::new(move |context| {
            let context = context.clone();
            let augmenter = Augmenter::new(Recipe::NNUNET, patch, [true; 3], &vec![false; channels], 4, Dtype::F32);
            let initial = augmenter.geometry().initial;
            let [height, width] = [initial[1], initial[2]];
            let voxels = BATCH * initial.iter().product::<usize>();
            // Blocks of four labels and the ignore label.
            let label = |i: usize| {
                let (z, y, x) = (i / (height * width), i / width % height, i % width);
                ((z / 8 + y / 8 + x / 8) % 5) as i16
            };
            let raw = Batch {
                size: BATCH,
                patch: initial,
                channels,
                image: pattern(voxels * channels, 1),
                labels: (0..voxels).map(label).collect(),
            };
            Box::new(move || {
                let mut random = ChaCha8Rng::seed_from_u64(1);
                for _ in 0..batches {
                    let (image, target) = augmenter.batch(&context, &raw, &mut random).expect("batch");
                    context.finish([image.buffer(), &target]).expect("finish");
                }
            })
        }),
    }
}
