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
//! The statistics stay right where the mean is a thousand times the deviation: each task sums blocks of
//! differences from its running mean (at first: from its first row), and blocks and tasks are merged with Chan's formula
//! (Chan, Golub, LeVeque 1979: Updating formulae and a pairwise algorithm for computing sample variances).

mod apply;
mod backward;
pub(crate) mod epilogue;
pub(crate) mod prologue;
mod statistics;

pub use apply::apply;
pub(crate) use apply::of_channels;
pub use backward::{
    backward, backward_apply, backward_sums, backward_sums_of_parts, gradient_coefficients, gradient_parts,
};
pub use epilogue::{GradientParts, Moments};
pub use prologue::{Coefficients, Operand};
pub use statistics::{coefficients, moments, statistics, statistics_of_moments};

use crate::reduce::{Walk, check_count};
use crate::{Buffer, Context, Dtype, KernelError};

const OPERATION: &str = "instance norm";

/// Shapes and settings of one normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Problem {
    batch: usize,
    voxels: usize,
    channels: usize,
    dtype: Dtype,
    slope: f32,
    epsilon: f32,
}

impl Problem {
    /// Activations `[batch, voxels, channels]` of type `dtype`, `voxels = depth * height * width`. `activation` is
    /// the slope of a leaky ReLU (nnU-Net: 0.01); `None` leaves it out. Epsilon is 1e-5.
    ///
    /// # Errors
    /// [`KernelError::Shape`] for empty shapes, [`KernelError::Dtype`] for integers.
    pub fn new(
        batch: usize,
        voxels: usize,
        channels: usize,
        dtype: Dtype,
        activation: Option<f32>,
    ) -> Result<Self, KernelError> {
        if batch == 0 || voxels == 0 || channels == 0 {
            return Err(KernelError::shape(OPERATION, "shape", "at least 1 everywhere", (batch, voxels, channels)));
        }
        if batch.checked_mul(voxels).and_then(|rows| rows.checked_mul(channels)).is_none() {
            return Err(KernelError::shape(OPERATION, "shape", "countable", (batch, voxels, channels)));
        }
        if !dtype.is_float() {
            return Err(KernelError::Dtype { operation: OPERATION, what: "x", expected: "floats", actual: dtype });
        }
        Ok(Self { batch, voxels, channels, dtype, slope: activation.unwrap_or(1.0), epsilon: 1e-5 })
    }

    /// The same with another epsilon.
    pub fn with_epsilon(self, epsilon: f32) -> Self {
        Self { epsilon, ..self }
    }

    /// Elements of `x`, `y`, `dx`, `dy`.
    pub fn elements(&self) -> usize {
        self.batch * self.voxels * self.channels
    }

    /// Elements of `statistics` and of `sums`.
    pub fn statistics_len(&self) -> usize {
        self.batch * 2 * self.channels
    }

    fn walk(&self, context: &Context, streams: usize) -> Result<Walk, KernelError> {
        check_count(context, OPERATION, self.elements())?;
        Ok(Walk::new(self.batch, self.voxels, self.channels, streams, context.caps()))
    }

    fn expect_norm(&self, norm: &Norm) -> Result<(), KernelError> {
        norm.statistics.check(OPERATION, "statistics", self.statistics_len(), Dtype::F32)?;
        norm.gamma.check(OPERATION, "gamma", self.channels, Dtype::F32)?;
        norm.beta.check(OPERATION, "beta", self.channels, Dtype::F32)
    }
}

/// What normalises: f32 buffers.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    /// `[batch, 2, channels]`: mean and 1 / sqrt(variance + epsilon).
    pub statistics: &'a Buffer,
    /// `[channels]`.
    pub gamma: &'a Buffer,
    /// `[channels]`.
    pub beta: &'a Buffer,
}

/// Where the gradients of the parameters go: f32 `[channels]` each, overwritten.
#[derive(Clone, Copy, Debug)]
pub struct NormGradient<'a> {
    /// `dgamma`.
    pub gamma: &'a Buffer,
    /// `dbeta`.
    pub beta: &'a Buffer,
}

/// Writes `statistics` and `y`. `norm.statistics` is an output.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if a buffer does not fit the problem, [`KernelError::Limit`]
/// beyond the device's index range. The same holds for all functions of this module.
pub fn forward(context: &Context, problem: &Problem, x: &Buffer, norm: &Norm, y: &Buffer) -> Result<(), KernelError> {
    statistics(context, problem, x, norm.statistics)?;
    apply(context, problem, x, norm, y)
}
