//! Winograd's convolution in f32 for stride 1: F(2, 3) along the depth and the height, where the kernel has three taps, and
//! F(4, 3) along the width.
//!
//! Two neighbouring outputs of three taps need 4 products instead of 6, and four need 6 instead of 12. With `d` the inputs
//! that they see, `g` the taps and `*` the product element by element (S. Winograd 1980; A. Lavin, S. Gray, "Fast algorithms
//! for convolutional neural networks", CVPR 2016):
//!
//! ```text
//! y = Aᵀ ((G g) * (Bᵀ d))
//!
//! F(2, 3):   1  0 -1  0          1    0    0         1  1  1  0
//!       Bᵀ = 0  1  1  0     G =  1/2  1/2  1/2   Aᵀ = 0  1 -1 -1
//!            0 -1  1  0          1/2 -1/2  1/2
//!            0  1  0 -1          0    0    1
//! ```
//!
//! F(4, 3) evaluates polynomials at 0, ±a, ±b and infinity, with a = 3/4 and b = 3/2: of the choices that were tried these
//! round least, and all their powers are exact in f32. With `n(p)` the product of the differences between `p` and the
//! other finite points,
//!
//! ```text
//!      a²b²   0    -a²-b²   0     1  0          1/n(0)   0      0              1  1  1  1  1  0
//!      0     -ab²  -b²      a     1  0          1/n(a)  a/n(a) a²/n(a)         0  a -a  b -b  0
//! Bᵀ = 0      ab²  -b²     -a     1  0     G =  1/n(a) -a/n(a) a²/n(a)    Aᵀ = 0  a² a² b² b² 0
//!      0     -a²b  -a²      b     1  0          1/n(b)  b/n(b) b²/n(b)         0  a³ -a³ b³ -b³ 1
//!      0      a²b  -a²     -b     1  0          1/n(b) -b/n(b) b²/n(b)
//!      0      a²b²  0    -a²-b²   0  1          0        0      1
//! ```
//!
//! Applied along every axis in turn, a tile of 2 x 2 x 4 outputs (1 x 2 x 4 for a kernel of 1 x 3 x 3) takes 96 (24)
//! *points* instead of 432 (72) products. At each point the channels of all tiles make a matrix product
//! `[tiles, channels in] x [channels in, channels out]`, where the time goes. The gradient of the input is the same
//! convolution with flipped and transposed weights; the gradient of the weights is the transposed identity
//! `dg = Gᵀ ((Bᵀ d) * (A dy))`, whose products sum over tiles.
//!
//! Points along the height and the width are computed together, points along the depth one after the other: so a core's
//! scratch holds 24 points of a block of tiles and stays in its cache.

pub(super) mod convolution;
pub(super) mod scratch;
mod take;
mod tiles;
pub(super) mod weight_gradient;
mod weights;

use super::problem::Problem;
use crate::{Caps, Dtype};
use cubecl::prelude::*;

/// Whether Winograd's algorithm can compute a problem, in all passes.
pub(super) fn fits(problem: &Problem, dtype: Dtype, caps: &Caps) -> bool {
    let channels = [problem.channels_in(), problem.second_channels(), problem.channels_out()];
    caps.cores.is_some()
        && dtype == Dtype::F32
        && problem.stride() == [1; 3]
        && matches!(problem.kernel(), [1 | 3, 3, 3])
        && problem.output_len() > 0
        && channels.iter().all(|c| c.is_multiple_of(8))
}

/// Points along the depth and the height: products that two outputs of three taps need.
const POINTS: usize = 4;

/// Outputs of a tile along the width, and the points that they need.
const WIDE_OUTPUTS: usize = 4;
const WIDE_POINTS: usize = 6;

/// Outputs of a tile at one position along the depth.
const OUTPUTS: usize = 2 * WIDE_OUTPUTS;

/// Points of one point along the depth.
const PLANE: usize = POINTS * WIDE_POINTS;

/// The finite points along the width other than 0 are ±`A` and ±`B`.
const A: f32 = 0.75;
const B: f32 = 1.5;
const A2: f32 = A * A;
const B2: f32 = B * B;

/// Reciprocal products of the differences between a point and the other finite ones: of 0, of ±`A`, of ±`B`.
const OF_ZERO: f32 = 1.0 / (A2 * B2);
const OF_A: f32 = 1.0 / (2.0 * A2 * (A2 - B2));
const OF_B: f32 = 1.0 / (2.0 * B2 * (B2 - A2));

/// Bytes of scratch that a block of tiles may take of a core's second-level cache.
const BLOCK_BYTES: usize = 256 << 10;

/// Tiles over which reading the weights' points, or adding to their gradient's, is cheap beside the products.
const FEW_TILES: usize = 32;

/// Rows of tiles that are walked through the whole depth, at most. Measured: the steps of a network with 32 channels at full
/// resolution take 3 to 7 % less than with whole planes.
const STRIP: usize = 4;

/// A grid of tiles over `[batch, depth, height, width]` positions, of inputs and of outputs alike.
#[derive(CubeType, CubeLaunch)]
struct Grid {
    depth: usize,
    height: usize,
    width: usize,
    tiles_depth: usize,
    tiles_height: usize,
    tiles_width: usize,
    /// Rows of tiles that are walked through the whole depth before the next ones: see [`place_of`].
    strip: usize,
}

/// What a convolution's kernel works on.
#[derive(CubeType, CubeLaunch)]
struct Numbers {
    /// Vectors of channels of the inputs.
    vectors_first: usize,
    vectors_second: usize,
    channels_in: usize,
    /// Vectors of channels of the output.
    vectors_out: usize,
    /// Parts of the output channels that are worked on apart.
    groups: usize,
    tiles: usize,
    /// Tiles of a block, and blocks.
    block: usize,
    blocks: usize,
    /// Distance of points and of units in the scratch of the input's points, and of the products, in vectors.
    input_stride: usize,
    product_stride: usize,
    sums_stride: usize,
    /// Distance of points of the weights, in vectors.
    weight_stride: usize,
    batch: usize,
    units: usize,
    /// Of the leaky ReLU behind the norm whose sums are taken.
    slope: f32,
    grid: Grid,
}

/// The extents of a grid on the host.
#[derive(Clone, Copy, Debug)]
struct Extents {
    batch: usize,
    dims: [usize; 3],
    tiles: [usize; 3],
}

impl Extents {
    /// Tiles of four outputs along the width, two along the height, and two along the depth if it has three taps.
    fn new(batch: usize, dims: [usize; 3], deep: bool) -> Self {
        let depth = if deep { dims[0].div_ceil(2) } else { dims[0] };
        Self { batch, dims, tiles: [depth, dims[1].div_ceil(2), dims[2].div_ceil(WIDE_OUTPUTS)] }
    }

    /// Number of tiles.
    fn count(&self) -> usize {
        self.batch * self.tiles.iter().product::<usize>()
    }

    fn launch(&self) -> GridLaunch {
        let ([depth, height, width], [tiles_depth, tiles_height, tiles_width]) = (self.dims, self.tiles);
        let strip = (1..=STRIP).rev().find(|&strip| tiles_height.is_multiple_of(strip)).unwrap_or(1);
        GridLaunch::new(depth, height, width, tiles_depth, tiles_height, tiles_width, strip)
    }
}

/// Sample, and place along depth and height, of a row of tiles. Rows follow each other along the height within a strip, then
/// along the depth: the planes that windows of neighbouring depths share are then still in the cache.
#[cube]
fn place_of(row: usize, grid: &Grid) -> (usize, usize, usize) {
    let in_strip = row % grid.strip;
    let row = row / grid.strip;
    let depth = row % grid.tiles_depth;
    let row = row / grid.tiles_depth;
    let strips = grid.tiles_height / grid.strip;
    (row / strips, depth, row % strips * grid.strip + in_strip)
}

/// Tiles of one block: near `most`, but so that each of `units` cores gets the same number of equal blocks.
fn block_of(tiles: usize, units: usize, most: usize) -> usize {
    let rounds = tiles.div_ceil(units * most.max(1)).max(1);
    tiles.div_ceil(units * rounds).max(1)
}

/// Vectors of output channels that a product holds in registers, of `all`.
fn vectors_of(all: usize) -> usize {
    match all {
        v if v % 2 == 0 => 2,
        v if v % 3 == 0 => 3,
        _ => 1,
    }
}
