//! How the work of both kernels is divided, and the scratch that it takes.

use super::grid::{BLOCK_BYTES, Extents, FEW_TILES, OUTPUTS, PLANE, POINTS, block_of, vectors_of};
use crate::Caps;
use crate::conv3d::gather::{Gather, WeightGradient};

/// What the division depends on. Axes are depth, height, width.
#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    dims: [usize; 3],
    deep: bool,
    /// Of both inputs.
    channels_in: [usize; 2],
    channels_out: usize,
}

impl Sizes {
    fn tiles(&self) -> usize {
        Extents::new(self.batch, self.dims, self.deep).count()
    }

    fn lanes_in(&self, caps: &Caps) -> usize {
        caps.widest_vector(self.channels_in[0]).min(caps.widest_vector(self.channels_in[1]))
    }

    fn all_in(&self) -> usize {
        self.channels_in[0] + self.channels_in[1]
    }

    fn points(&self) -> usize {
        if self.deep { POINTS * PLANE } else { PLANE }
    }
}

/// Of a convolution. Strides, between points, are one vector longer than is needed: at a distance of a large power of two,
/// points would share few lines of a cache.
#[derive(Clone, Copy)]
pub(super) struct Scratch {
    pub lanes_in: usize,
    pub lanes_out: usize,
    /// Vectors of output channels that one product holds in registers, and tiles.
    pub vectors: usize,
    pub rows: usize,
    pub units: usize,
    /// Parts of the output channels that units work on apart.
    pub groups: usize,
    /// Tiles of a block.
    pub block: usize,
    pub input_stride: usize,
    pub product_stride: usize,
    pub sums_stride: usize,
}

impl Scratch {
    pub fn of(gather: &Gather, caps: &Caps) -> Self {
        let sizes = Sizes {
            batch: gather.batch,
            dims: gather.in_dims,
            deep: gather.taps[0] == 3,
            channels_in: gather.gathered(),
            channels_out: gather.channels_out,
        };
        Self::new(&sizes, caps)
    }

    fn new(sizes: &Sizes, caps: &Caps) -> Self {
        let tiles = sizes.tiles();
        let (lanes_in, lanes_out) = (sizes.lanes_in(caps), caps.widest_vector(sizes.channels_out));
        let vectors_out = sizes.channels_out / lanes_out;
        let vectors = vectors_of(vectors_out);
        let units = caps.cube_units() as usize;
        // Where tiles are few, units share the output channels instead: each reads fewer of the weights' points.
        let groups = match vectors_out / vectors {
            blocks if blocks.is_multiple_of(units) && tiles < units * FEW_TILES => units,
            _ => 1,
        };
        let outputs = sizes.channels_out / groups;
        let bytes_of_tile = (PLANE * (sizes.all_in() + outputs) + 2 * OUTPUTS * sizes.channels_out / groups) * 4;
        let block = block_of(tiles, units / groups, (BLOCK_BYTES / bytes_of_tile).clamp(FEW_TILES, 192));
        let rows = rows_of(caps, vectors, block);
        let room = block.next_multiple_of(rows);
        Self {
            lanes_in,
            lanes_out,
            vectors,
            rows,
            units,
            groups,
            block,
            input_stride: room * (sizes.all_in() / lanes_in) + 1,
            product_stride: room * (vectors_out / groups) + 1,
            sums_stride: if sizes.deep { block * (vectors_out / groups) * 2 * OUTPUTS } else { 0 },
        }
    }

    /// Elements of the inputs' points, of the products, and of the sums along the depth.
    pub fn input_len(&self) -> usize {
        self.units * PLANE * self.input_stride * self.lanes_in
    }

    pub fn products_len(&self) -> usize {
        self.units * PLANE * self.product_stride * self.lanes_out
    }

    pub fn sums_len(&self) -> usize {
        self.units * self.sums_stride * self.lanes_out
    }
}

/// Tiles in a product: as many sums as registers hold, and few rows without a tile.
fn rows_of(caps: &Caps, vectors: usize, block: usize) -> usize {
    let most = ((caps.registers * 3 / 4).min(16) / vectors).clamp(1, 12);
    let cost = |rows: usize| block.div_ceil(rows) * (rows * vectors).max(10);
    (1..=most).rev().min_by_key(|&rows| cost(rows)).unwrap_or(1)
}

/// Output channels of a group at least: with fewer, the input would be transformed again for little work.
const GROUP_CHANNELS: usize = 64;

/// Of a gradient of weights. Strides as in [`Scratch`].
#[derive(Clone, Copy)]
pub(super) struct GradientScratch {
    pub lanes_in: usize,
    pub lanes_out: usize,
    pub units: usize,
    /// Parts of the output channels that units work on apart, and parts of the tiles.
    pub groups: usize,
    pub splits: usize,
    /// Tiles of a block.
    pub block: usize,
    pub input_stride: usize,
    pub gradient_stride: usize,
    pub sums_stride: usize,
    points: usize,
}

impl GradientScratch {
    pub fn of(gradient: &WeightGradient, caps: &Caps) -> Self {
        let sizes = Sizes {
            batch: gradient.batch,
            dims: gradient.in_dims,
            deep: gradient.taps[0] == 3,
            channels_in: [gradient.rows, gradient.second.map_or(0, |(_, rows)| rows)],
            channels_out: gradient.columns,
        };
        Self::new(&sizes, caps)
    }

    fn new(sizes: &Sizes, caps: &Caps) -> Self {
        let tiles = sizes.tiles();
        let (lanes_in, lanes_out) = (sizes.lanes_in(caps), caps.widest_vector(sizes.channels_out));
        let vectors_out = sizes.channels_out / lanes_out;
        let units = caps.cube_units() as usize;
        // Where sums are large, units share the output channels instead of having sums of their own.
        let parts = vectors_out / vectors_of(vectors_out);
        let groups = (1..=units.min(parts))
            .rev()
            .find(|&groups| parts.is_multiple_of(groups) && sizes.channels_out / groups >= GROUP_CHANNELS)
            .unwrap_or(1);
        let bytes_of_tile = PLANE * (sizes.all_in() + sizes.channels_out / groups) * 4;
        let block = block_of(tiles, (units / groups).max(1), (BLOCK_BYTES / bytes_of_tile).clamp(FEW_TILES, 192));
        Self {
            lanes_in,
            lanes_out,
            units,
            groups,
            splits: (units / groups).clamp(1, tiles.div_ceil(block).max(1)),
            block,
            input_stride: block * (sizes.all_in() / lanes_in) + 1,
            gradient_stride: block * (vectors_out / groups) + 1,
            sums_stride: sizes.all_in() * vectors_out + 1,
            points: sizes.points(),
        }
    }

    /// Elements of the inputs' points, of the output gradient's, and of the sums.
    pub fn input_len(&self) -> usize {
        self.units * PLANE * self.input_stride * self.lanes_in
    }

    pub fn gradient_len(&self) -> usize {
        self.units * PLANE * self.gradient_stride * self.lanes_out
    }

    pub fn sums_len(&self) -> usize {
        self.splits * self.points * self.sums_stride * self.lanes_out
    }
}
