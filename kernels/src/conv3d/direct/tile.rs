//! The register tile of the direct kernels: a few outputs along the width times a few vectors of output channels.
//!
//! Where a result has fewer channels than a register has lanes, a register holds several partial sums of each: `split`
//! neighbouring gathered values are loaded at once and repeated over the channels, lane `g * split + k` sums the products
//! of channel `g` with every `split`-th value from the `k`-th on, and the lanes of a channel are added at the end.

use crate::Caps;
use crate::conv3d::gather::Gather;
use cubecl::prelude::*;

/// Vector width and tile for `channels_out`, and for rows of `count` outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tile {
    /// Channels in a vector.
    pub lanes: usize,
    /// Vectors of channels in a tile.
    pub vectors: usize,
    /// Outputs along the width in a tile.
    pub width: usize,
    /// Partial sums of each channel in a register of `lanes * split` lanes.
    pub split: usize,
}

impl Tile {
    /// Chooses the tile. Measured on CPUs: with 16 registers (AVX2) 6 x 2 vectors is the fastest, more sums than about 12
    /// spill; with 32 (AVX-512) it is 12 x 2, or what divides the row best below that, while single vectors gain nothing
    /// beyond 12. Fewer than 8 sums leave the multiply-add units waiting for each other. A GPU has registers for 8 x 4 vectors of 4,
    /// which need half the loads of 6 x 2: 2.7 times as fast on Mesa's software driver.
    ///
    /// `gathered` are the channels of each input: a split has to divide all of them.
    fn choose(caps: &Caps, channels_out: usize, count: usize, gathered: [usize; 2]) -> Self {
        let lanes = caps.widest_vector(channels_out);
        let sums = if caps.cores.is_some() { (caps.registers * 3 / 4).min(24) } else { 32 };
        let blocks = channels_out / lanes;
        let vectors = match blocks {
            b if b % 4 == 0 && caps.cores.is_none() => 4,
            b if b % 2 == 0 => 2,
            b if b % 3 == 0 => 3,
            _ => 1,
        };
        // Estimated cycles of one row: the outputs that its last two tiles share are computed twice.
        let cost = |width: usize| count.div_ceil(width) * (width * vectors).max(8);
        let widest = (sums / vectors).clamp(1, count.max(1));
        let width = (1..=widest).rev().min_by_key(|&w| cost(w)).unwrap_or(1);
        Self { lanes, vectors, width, split: split_for(caps, lanes, gathered) }
    }

    /// The tile of an operation.
    pub fn of(gather: &Gather, caps: &Caps) -> Self {
        Self::choose(caps, gather.channels_out, gather.row(), gather.gathered())
    }

    /// Channels in a tile.
    pub fn channels(&self) -> usize {
        self.lanes * self.vectors
    }
}

/// How many channels of the other tensor a vector of `lanes` channels is filled up with, so that it is a whole register:
/// as many as divide all of `channels`. Only on CPUs; a GPU has no lanes to fill.
pub(super) fn split_for(caps: &Caps, lanes: usize, channels: [usize; 2]) -> usize {
    let mut split = if caps.cores.is_some() { caps.lanes.next_power_of_two() / lanes } else { 1 };
    while channels.iter().any(|count| !count.is_multiple_of(split)) {
        split /= 2;
    }
    split
}

/// `[k]` to `[g, k]`: the values once for each channel.
#[cube]
pub(super) fn repeat<E: Float, N: Size, K: Size>(values: Vector<E, K>, #[comptime] split: usize) -> Vector<f32, N> {
    if comptime!(split == 1) {
        Vector::new(f32::cast_from(values.extract(0usize)))
    } else {
        let values = Vector::<f32, K>::cast_from(values);
        let mut repeated = Vector::<f32, N>::empty();
        #[unroll]
        for lane in 0..N::value() {
            repeated.insert(lane, values.extract(comptime!(lane % split)));
        }
        repeated
    }
}
