//! Scratch of both kernels: bounds that follow their launch functions.

use super::{BLOCK_BYTES, Extents, FEW_TILES, PLANE, POINTS, block_of, vectors_of};
use super::{convolution::OUTPUTS, weight_gradient::GROUP_CHANNELS};
use crate::Caps;
use crate::conv3d::gather::widest_vector;

/// The sizes that scratch depends on. All inputs count as one.
pub(crate) struct Sizes {
    pub batch: usize,
    pub dims: [usize; 3],
    pub deep: bool,
    pub channels_in: usize,
    pub channels_out: usize,
}

/// Rows of a product's last block that hold no tile, at most.
const PADDING: usize = 11;

impl Sizes {
    fn tiles(&self) -> usize {
        Extents::new(self.batch, self.dims, self.deep).count()
    }

    fn points(&self) -> usize {
        if self.deep { POINTS * PLANE } else { PLANE }
    }

    /// Bytes beside the operands of a convolution, whose weights are packed first if they are to be transposed.
    pub fn convolution(&self, caps: &Caps, transposed: bool) -> u64 {
        let units = caps.cube_units() as usize;
        let vectors_out = self.channels_out / widest_vector(caps, self.channels_out);
        let groups = match vectors_out / vectors_of(vectors_out) {
            blocks if blocks.is_multiple_of(units) && self.tiles() < units * FEW_TILES => units,
            _ => 1,
        };
        let sums = if self.deep { 2 * OUTPUTS * self.channels_out / groups } else { 0 };
        let tile = PLANE * (self.channels_in + self.channels_out / groups);
        let most = (BLOCK_BYTES / (4 * (tile + 2 * OUTPUTS * self.channels_out / groups))).clamp(FEW_TILES, 192);
        let block = block_of(self.tiles(), units / groups, most);
        let scratch = units * ((block + PADDING) * tile + block * sums);
        let pairs = self.channels_in * self.channels_out;
        let packed = if transposed { self.points() / PLANE * 9 * pairs } else { 0 };
        // Points lie one vector farther apart than is needed.
        let apart = caps.lanes.next_power_of_two() * self.points() * vectors_out;
        // Packed weights are gone when the scratch is allocated.
        4 * (scratch.max(packed) + self.points() * pairs + apart) as u64
    }

    /// Bytes beside the operands of the gradient of the weights.
    pub fn weight_gradient(&self, caps: &Caps) -> u64 {
        let units = caps.cube_units() as usize;
        let vectors_out = self.channels_out / widest_vector(caps, self.channels_out);
        let parts = vectors_out / vectors_of(vectors_out);
        let groups = (1..=units.min(parts))
            .rev()
            .find(|&groups| parts.is_multiple_of(groups) && self.channels_out / groups >= GROUP_CHANNELS)
            .unwrap_or(1);
        let tile = PLANE * (self.channels_in + self.channels_out / groups);
        let most = (BLOCK_BYTES / (4 * tile)).clamp(FEW_TILES, 192);
        let block = block_of(self.tiles(), (units / groups).max(1), most);
        let splits = (units / groups).clamp(1, self.tiles().div_ceil(block).max(1));
        // Points lie one vector farther apart than is needed; one more stands for coefficients that nobody uses.
        let apart = caps.lanes.next_power_of_two() * (2 * units * PLANE + splits * self.points() + 1);
        4 * (units * block * tile + splits * self.points() * self.channels_in * self.channels_out + apart) as u64
    }
}
