//! Mirroring of channels-last volumes on the host, in place.

/// Reverses axes (depth, height, width) of a buffer `[depth, height, width, channels]`.
///
/// ```
/// use voxgrad::augment::flip;
/// let mut two_voxels_of_two_channels = [1, 2, 3, 4];
/// flip(&mut two_voxels_of_two_channels, [1, 1, 2], 2, [false, false, true]);
/// assert_eq!(two_voxels_of_two_channels, [3, 4, 1, 2]);
/// ```
///
/// # Panics
/// If the buffer has not the length that its shape says.
pub fn flip<T>(buffer: &mut [T], dims: [usize; 3], channels: usize, axes: [bool; 3]) {
    let row = dims[2] * channels;
    let slab = dims[1] * row;
    assert_eq!(buffer.len(), dims[0] * slab, "buffer and shape disagree");
    if buffer.is_empty() {
        return;
    }
    if axes[0] {
        reverse_blocks(buffer, slab);
    }
    if axes[1] {
        for slab in buffer.chunks_exact_mut(slab) {
            reverse_blocks(slab, row);
        }
    }
    if axes[2] {
        for row in buffer.chunks_exact_mut(row) {
            // Reversing all values reverses the channels of each voxel too; they are put right again.
            row.reverse();
            if channels > 1 {
                row.chunks_exact_mut(channels).for_each(<[T]>::reverse);
            }
        }
    }
}

/// Reverses the order of blocks, keeping each block as it is.
fn reverse_blocks<T>(buffer: &mut [T], block: usize) {
    let count = buffer.len() / block;
    for first in 0..count / 2 {
        let second = count - 1 - first;
        let (head, tail) = buffer.split_at_mut(second * block);
        head[first * block..][..block].swap_with_slice(&mut tail[..block]);
    }
}
