//! What predicting a case takes of the host's memory, beside what the device takes.

use super::SlidingWindow;

/// Bytes that the host holds at once while a case is predicted: the case itself, one window, the sums of the slices that
/// windows still reach, a slice that waits for the next one, and the labels of the whole image `raw` (depth, height,
/// width). `threads` rows are resampled at a time.
pub fn planned_host(window: &SlidingWindow, channels: usize, heads: usize, raw: [usize; 3], threads: usize) -> u64 {
    let product = |factors: &[usize]| factors.iter().fold(1u64, |product, &n| product.saturating_mul(n as u64));
    let ([depth, height, width], [_, image_height, image_width]) = (window.image, window.image);
    let [patch_depth, padded_height, padded_width] = [window.patch[0], window.padded[1], window.padded[2]];
    // Channels in f32, labels in two bytes.
    let case = product(&[depth, height, width, 4 * channels + 2]);
    // The image and its mirrored copy; logits, their mean over mirrored copies, and the weights.
    let patch = product(&[window.patch_voxels(), 8 * channels + 8 * heads + 4]);
    let sums = product(&[patch_depth, padded_height, padded_width, 4 * heads + 4]);
    let waiting = product(&[image_height, image_width, 4 * heads]);
    let rows = product(&[threads, image_width * 8 + raw.into_iter().max().unwrap_or(0) * 4, heads]);
    let labels = product(&[raw[0], raw[1], raw[2], 2]);
    [patch, sums, waiting, rows, labels].into_iter().fold(case, u64::saturating_add)
}

/// Bytes of the probabilities of all heads on the whole image `raw` (depth, height, width).
pub fn planned_probabilities(heads: usize, raw: [usize; 3]) -> u64 {
    raw.into_iter().chain([heads]).fold(4u64, |product, n| product.saturating_mul(n as u64))
}

/// Bytes of a case of `image` voxels, and of the labels of the whole image `raw` (depth, height, width): what the host holds
/// where windows are cut and added up on the device.
pub fn planned_case(image: [usize; 3], channels: usize, raw: [usize; 3]) -> u64 {
    let voxels = |extents: [usize; 3]| extents.into_iter().fold(1u64, |product, n| product.saturating_mul(n as u64));
    // Channels in f32, labels of both in two bytes.
    let case = voxels(image).saturating_mul(4 * channels as u64 + 2);
    case.saturating_add(voxels(raw).saturating_mul(2))
}
