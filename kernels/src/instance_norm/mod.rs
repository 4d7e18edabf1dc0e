//! Instance normalisation with a leaky ReLU behind it, forward and backward.
//!
//! ```text
//! xhat = (x - mean) * rstd            mean, variance (biased) per sample and channel, rstd = 1 / sqrt(variance + eps)
//! z    = gamma * xhat + beta          y = z where z > 0, slope * z elsewhere
//! dz   = dy * (1 where z > 0, slope elsewhere)
//! dbeta = sum dz,  dgamma = sum dz * xhat             over samples and voxels
//! dx   = gamma * rstd * (dz - mean(dz) - xhat * mean(dz * xhat))     means over the voxels of a sample
//! ```
//!
//! These are `torch.nn.InstanceNorm3d(eps=1e-5, affine=True)` and `LeakyReLU(0.01)`, as nnU-Net has them after every
//! convolution.
//!
//! Layouts: activations `[batch, voxels, channels]` in f32, f16 or bf16; `gamma`, `beta` f32 `[channels]`;
//! `statistics` f32 `[batch, 2, channels]` (mean, rstd); `sums` f32 `[batch, 2, channels]` (sum dz, sum dz * xhat).
//!
//! Passes, with the bytes that they move per element of storage size s: statistics read s (nothing where the convolution
//! before them has taken [`Moments`] of what it stored), apply reads and writes 2s;
//! backward sums read 2s, backward apply moves 3s. Backward keeps `x` and the statistics; `z` is computed again, which
//! is cheaper than reading it.
//!
//! A residual block adds its skip before it activates: `y = leaky_relu(z + skip)` with `z` as above. [`apply_onto`] is that pass,
//! and [`gradient_parts_onto`] begins the way back: it takes the sums while it turns `dy` into the gradient of `z + skip`, which
//! is that of the skip too; behind it the norm's own gradient is that of a norm without activation.
//!
//! The statistics stay right where the mean is a thousand times the deviation: each task sums blocks of
//! differences from its running mean (at first: from its first row), and blocks and tasks are merged with Chan's formula
//! (Chan, Golub, LeVeque 1979: Updating formulae and a pairwise algorithm for computing sample variances).

mod apply;
mod backward;
pub(crate) mod epilogue;
mod forward;
mod problem;
mod residual;
mod statistics;

pub use apply::apply;
pub(crate) use apply::of_channels;
pub use backward::{backward, backward_apply, backward_sums, backward_sums_of_parts, gradient_parts};
pub use epilogue::{Coefficients, GradientParts, Moments};
pub use forward::forward;
pub use problem::{Norm, NormGradient, Problem};
pub use residual::{apply_onto, gradient_parts_onto};
pub use statistics::{coefficients, moments, statistics, statistics_of_moments};
