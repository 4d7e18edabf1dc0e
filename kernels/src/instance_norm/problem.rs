//! The shapes of a normalisation, and what normalises.

use crate::reduce::{Walk, check_count};
use crate::{Buffer, Context, Dtype, KernelError};

pub(super) const OPERATION: &str = "instance norm";

/// Shapes and settings of one normalisation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Problem {
    pub(super) batch: usize,
    pub(super) voxels: usize,
    pub(super) channels: usize,
    pub(super) dtype: Dtype,
    pub(super) slope: f32,
    pub(super) epsilon: f32,
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

    /// The same with nothing behind the norm.
    pub fn without_activation(self) -> Self {
        Self { slope: 1.0, ..self }
    }

    /// Elements of `x`, `y`, `dx`, `dy`.
    pub fn elements(&self) -> usize {
        self.batch * self.voxels * self.channels
    }

    /// Elements of `statistics` and of `sums`.
    pub fn statistics_len(&self) -> usize {
        self.batch * 2 * self.channels
    }

    pub(super) fn walk(&self, context: &Context, streams: usize) -> Result<Walk, KernelError> {
        check_count(context, OPERATION, self.elements())?;
        Ok(Walk::new(self.batch, self.voxels, self.channels, streams, context.caps()))
    }

    pub(super) fn expect_norm(&self, norm: &Norm) -> Result<(), KernelError> {
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
