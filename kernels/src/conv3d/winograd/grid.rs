//! Which problems Winograd's algorithm computes, its constants, and the grid of its tiles.

use crate::conv3d::problem::Problem;
use crate::{Caps, Dtype};
use cubecl::prelude::*;

/// Whether Winograd's algorithm can compute a problem, in all passes.
pub(in crate::conv3d) fn fits(problem: &Problem, dtype: Dtype, caps: &Caps) -> bool {
    let channels = [problem.channels_in(), problem.second_channels(), problem.channels_out()];
    caps.cores.is_some()
        && dtype == Dtype::F32
        && problem.stride() == [1; 3]
        && matches!(problem.kernel(), [1 | 3, 3, 3])
        && problem.output_len() > 0
        && channels.iter().all(|c| c.is_multiple_of(8))
}

/// Points along the depth and the height: products that two outputs of three taps need.
pub(super) const POINTS: usize = 4;

/// Outputs of a tile along the width, and the points that they need.
pub(super) const WIDE_OUTPUTS: usize = 4;
pub(super) const WIDE_POINTS: usize = 6;

/// Outputs of a tile at one position along the depth.
pub(super) const OUTPUTS: usize = 2 * WIDE_OUTPUTS;

/// Points of one point along the depth.
pub(super) const PLANE: usize = POINTS * WIDE_POINTS;

/// The finite points along the width other than 0 are ±`A` and ±`B`.
pub(super) const A: f32 = 0.75;
pub(super) const B: f32 = 1.5;
pub(super) const A2: f32 = A * A;
pub(super) const B2: f32 = B * B;

/// Reciprocal products of the differences between a point and the other finite ones: of 0, of ±`A`, of ±`B`.
pub(super) const OF_ZERO: f32 = 1.0 / (A2 * B2);
pub(super) const OF_A: f32 = 1.0 / (2.0 * A2 * (A2 - B2));
pub(super) const OF_B: f32 = 1.0 / (2.0 * B2 * (B2 - A2));

/// Bytes of scratch that a block of tiles may take of a core's second-level cache.
pub(super) const BLOCK_BYTES: usize = 256 << 10;

/// Tiles over which reading the weights' points, or adding to their gradient's, is cheap beside the products.
pub(super) const FEW_TILES: usize = 32;

/// Rows of tiles that are walked through the whole depth, at most. Measured: the steps of a network with 32 channels at full
/// resolution take 3 to 7 % less than with whole planes.
pub(super) const STRIP: usize = 4;

/// A grid of tiles over `[batch, depth, height, width]` positions, of inputs and of outputs alike.
#[derive(CubeType, CubeLaunch)]
pub(super) struct TileGrid {
    pub depth: usize,
    pub height: usize,
    pub width: usize,
    pub tiles_depth: usize,
    pub tiles_height: usize,
    pub tiles_width: usize,
    /// Rows of tiles that are walked through the whole depth before the next ones: see [`place_of`].
    pub strip: usize,
}

/// What a convolution's kernel works on.
#[derive(CubeType, CubeLaunch)]
pub(super) struct PointsNumbers {
    /// Vectors of channels of the inputs.
    pub vectors_first: usize,
    pub vectors_second: usize,
    pub channels_in: usize,
    /// Vectors of channels of the output.
    pub vectors_out: usize,
    /// Parts of the output channels that are worked on apart.
    pub groups: usize,
    pub tiles: usize,
    /// Tiles of a block, and blocks.
    pub block: usize,
    pub blocks: usize,
    /// Distance of points and of units in the scratch of the input's points, and of the products, in vectors.
    pub input_stride: usize,
    pub product_stride: usize,
    pub sums_stride: usize,
    /// Distance of points of the weights, in vectors.
    pub weight_stride: usize,
    pub batch: usize,
    pub units: usize,
    /// Of the leaky ReLU behind the norm whose sums are taken.
    pub slope: f32,
    pub grid: TileGrid,
}

/// The extents of a grid on the host.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extents {
    pub batch: usize,
    pub dims: [usize; 3],
    pub tiles: [usize; 3],
}

impl Extents {
    /// Tiles of four outputs along the width, two along the height, and two along the depth if it has three taps.
    pub(super) fn new(batch: usize, dims: [usize; 3], deep: bool) -> Self {
        let depth = if deep { dims[0].div_ceil(2) } else { dims[0] };
        Self { batch, dims, tiles: [depth, dims[1].div_ceil(2), dims[2].div_ceil(WIDE_OUTPUTS)] }
    }

    /// Number of tiles.
    pub(super) fn count(&self) -> usize {
        self.batch * self.tiles.iter().product::<usize>()
    }

    pub(super) fn launch(&self) -> TileGridLaunch {
        let ([depth, height, width], [tiles_depth, tiles_height, tiles_width]) = (self.dims, self.tiles);
        let strip = (1..=STRIP).rev().find(|&strip| tiles_height.is_multiple_of(strip)).unwrap_or(1);
        TileGridLaunch::new(depth, height, width, tiles_depth, tiles_height, tiles_width, strip)
    }
}

/// Sample, and place along depth and height, of a row of tiles. Rows follow each other along the height within a strip, then
/// along the depth: the planes that windows of neighbouring depths share are then still in the cache.
#[cube]
pub(super) fn place_of(row: usize, grid: &TileGrid) -> (usize, usize, usize) {
    let in_strip = row % grid.strip;
    let row = row / grid.strip;
    let depth = row % grid.tiles_depth;
    let row = row / grid.tiles_depth;
    let strips = grid.tiles_height / grid.strip;
    (row / strips, depth, row % strips * grid.strip + in_strip)
}

/// Tiles of one block: near `most`, but so that each of `units` cores gets the same number of equal blocks.
pub(super) fn block_of(tiles: usize, units: usize, most: usize) -> usize {
    let rounds = tiles.div_ceil(units * most.max(1)).max(1);
    tiles.div_ceil(units * rounds).max(1)
}

/// Vectors of output channels that a product holds in registers, of `all`.
pub(super) fn vectors_of(all: usize) -> usize {
    match all {
        v if v % 2 == 0 => 2,
        v if v % 3 == 0 => 3,
        _ => 1,
    }
}
