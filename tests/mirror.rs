//! Mirroring against index arithmetic.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use voxgrad::augment::{flip, mirror};
use voxgrad::sample::Batch;

const DIMS: [usize; 3] = [3, 4, 5];

fn flipped_by_index(buffer: &[u32], channels: usize, axes: [bool; 3]) -> Vec<u32> {
    let [d, h, w] = DIMS;
    let mut out = Vec::new();
    for z in 0..d {
        for y in 0..h {
            for x in 0..w {
                let z = if axes[0] { d - 1 - z } else { z };
                let y = if axes[1] { h - 1 - y } else { y };
                let x = if axes[2] { w - 1 - x } else { x };
                let voxel = (z * h + y) * w + x;
                out.extend(&buffer[voxel * channels..(voxel + 1) * channels]);
            }
        }
    }
    out
}

#[test]
fn every_subset_of_axes() {
    for channels in [1, 2, 3] {
        let original: Vec<u32> = (0..60 * channels as u32).collect();
        for bits in 0..8 {
            let axes = [bits & 1 > 0, bits & 2 > 0, bits & 4 > 0];
            let mut buffer = original.clone();
            flip(&mut buffer, DIMS, channels, axes);
            assert_eq!(buffer, flipped_by_index(&original, channels, axes), "{axes:?}");
            flip(&mut buffer, DIMS, channels, axes);
            assert_eq!(buffer, original);
        }
    }
}

/// Image and target move together, each axis half of the time, forbidden axes never.
#[test]
fn patches_are_mirrored_independently() {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut counts = [0; 3];
    for _ in 0..250 {
        let mut batch = Batch::new(4, DIMS, 2);
        for (i, value) in batch.image.iter_mut().enumerate() {
            *value = (i / 2 % 60) as f32;
        }
        for (i, label) in batch.target.iter_mut().enumerate() {
            *label = (i % 60) as u8;
        }
        mirror(&mut batch, [true, false, true], &mut rng);
        for index in 0..4 {
            let (image, target) = batch.sample_mut(index);
            for (voxel, label) in target.iter().enumerate() {
                assert_eq!(image[2 * voxel], f32::from(*label));
                assert_eq!(image[2 * voxel + 1], f32::from(*label));
            }
            let first = target[0];
            counts[0] += usize::from(first / 20 == 2);
            counts[1] += usize::from(first / 5 % 4 == 3);
            counts[2] += usize::from(first % 5 == 4);
        }
    }
    assert_eq!(counts[1], 0);
    for axis in [0, 2] {
        assert!((430..570).contains(&counts[axis]), "{counts:?}");
    }
}
