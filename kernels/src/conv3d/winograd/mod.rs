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
mod grid;
pub(super) mod scratch;
mod take;
mod tiles;
pub(super) mod weight_gradient;
mod weights;

pub(super) use grid::fits;
