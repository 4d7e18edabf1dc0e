//! Mirroring against index arithmetic.

use voxgrad::augment::flip;

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
