//! How a stored volume is cut into chunks, and how the values of one become a compressed block.

use std::ops::Range;

use ndarray::{ArrayView3, Axis, Slice};

/// A chunk of the volume: its number in C order, and its voxels.
#[derive(Debug, Clone)]
pub(crate) struct Chunk {
    pub(super) index: usize,
    pub(crate) range: [Range<usize>; 3],
}

impl Chunk {
    pub(super) fn extent(&self) -> [usize; 3] {
        self.range.clone().map(|range| range.len())
    }
}

/// How a volume is cut into chunks: C order, the last along an axis is shorter.
pub(super) struct Chunks {
    pub(super) shape: [usize; 3],
    pub(super) chunk: [usize; 3],
}

impl Chunks {
    pub(super) fn grid(&self) -> [usize; 3] {
        std::array::from_fn(|axis| self.shape[axis].div_ceil(self.chunk[axis]))
    }

    pub(super) fn count(&self) -> usize {
        self.grid().iter().product()
    }

    pub(super) fn range(&self, index: usize) -> [Range<usize>; 3] {
        let [_, height, width] = self.grid();
        let at = [index / (height * width), index / width % height, index % width];
        std::array::from_fn(|axis| {
            let start = at[axis] * self.chunk[axis];
            start..(start + self.chunk[axis]).min(self.shape[axis])
        })
    }
}

/// The voxels of one chunk.
pub(super) fn cut<'a, T>(volume: ArrayView3<'a, T>, range: &[Range<usize>; 3]) -> ArrayView3<'a, T> {
    let mut part = volume;
    for (axis, range) in range.iter().enumerate() {
        part.slice_axis_inplace(Axis(axis), Slice::from(range.clone()));
    }
    part
}

/// Regroups the bytes of `N`-byte values and compresses them.
pub(super) fn compress<const N: usize>(bytes: &[u8]) -> Vec<u8> {
    let words = bytes.as_chunks::<N>().0;
    let mut grouped = Vec::with_capacity(bytes.len());
    for byte in 0..N {
        grouped.extend(words.iter().map(|word| word[byte]));
    }
    lz4_flex::block::compress(&grouped)
}

/// Undoes the regrouping.
pub(super) fn interleave<const N: usize>(grouped: &[u8]) -> Vec<u8> {
    let values = grouped.len() / N;
    let planes: [&[u8]; N] = std::array::from_fn(|byte| &grouped[byte * values..][..values]);
    let mut words = vec![[0; N]; values];
    for (value, word) in words.iter_mut().enumerate() {
        *word = planes.map(|plane| plane[value]);
    }
    words.into_flattened()
}
