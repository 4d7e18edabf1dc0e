//! What a convolution does to a tensor while it loads it: it normalises and activates the output of the convolution before, or
//! takes a gradient back through norm and activation. So neither tensor is ever written.
//!
//! With the coefficients of a sample's channel, in the words of the [module](super):
//!
//! ```text
//! centred = x - mean,   z = scale * centred + beta
//! Normalised:     y  = z where z > 0, slope * z elsewhere
//! NormGradient:   dz = dy * (1 where z > 0, slope elsewhere),   dx = scale * dz - constant - slant * centred
//! ```
//!
//! These are the formulas of `apply` and `backward_apply`, operation by operation: what is loaded has the bits that those
//! would have stored, but for what a compiler contracts.

use super::Problem;
use super::apply::{affine, leak};
use crate::{Buffer, Context, Dtype, KernelError};
use cubecl::prelude::*;

/// Rows of [`Coefficients`]: mean, scale = gamma * rstd, beta, rstd; and for a gradient constant and slant.
pub(crate) const MEAN: usize = 0;
pub(crate) const SCALE: usize = 1;
pub(crate) const BETA: usize = 2;
pub(crate) const RSTD: usize = 3;
const CONSTANT: usize = 4;
const SLANT: usize = 5;

/// A tensor as a convolution reads it.
#[derive(Clone, Copy, Debug)]
pub enum Operand<'a> {
    /// As it is stored.
    Stored(&'a Buffer),
    /// The instance norm and the leaky ReLU of `raw`.
    Normalised {
        /// `[batch, voxels, channels]`: what the norm reads.
        raw: &'a Buffer,
        /// Made by [`coefficients`](super::coefficients).
        by: &'a Coefficients,
    },
    /// The gradient of what instance norm and leaky ReLU read, from the gradient of what they put out.
    NormGradient {
        /// `[batch, voxels, channels]`: of the activated output.
        gradient: &'a Buffer,
        /// The same shape: what the norm read.
        raw: &'a Buffer,
        /// Made by [`gradient_coefficients`](super::gradient_coefficients).
        by: &'a Coefficients,
    },
}

impl<'a> Operand<'a> {
    /// The tensor whose place this takes: of the same shape and type.
    pub fn buffer(&self) -> &'a Buffer {
        match self {
            Self::Stored(buffer) | Self::Normalised { raw: buffer, .. } => buffer,
            Self::NormGradient { gradient, .. } => gradient,
        }
    }

    /// What the norm read; for the other kinds the tensor itself, to fill a kernel's argument.
    pub(crate) fn raw(&self) -> &'a Buffer {
        match self {
            Self::NormGradient { raw, .. } => raw,
            _ => self.buffer(),
        }
    }

    /// What a kernel does with each vector.
    pub(crate) fn load(&self) -> Load {
        match self {
            Self::Stored(_) => Load::Stored,
            Self::Normalised { .. } => Load::Normalised,
            Self::NormGradient { .. } => Load::NormGradient,
        }
    }

    /// `None` for a stored tensor.
    pub(crate) fn coefficients(&self) -> Option<&'a Coefficients> {
        match self {
            Self::Stored(_) => None,
            Self::Normalised { by, .. } | Self::NormGradient { by, .. } => Some(by),
        }
    }

    /// Refuses coefficients of another shape than `[batch, _, channels]`, of a forward pass where a gradient needs more, and a
    /// `raw` of another length or type.
    pub(crate) fn check(&self, operation: &'static str, batch: usize, channels: usize) -> Result<(), KernelError> {
        let Some(by) = self.coefficients() else { return Ok(()) };
        self.raw().check(operation, "input of the norm", self.buffer().len(), self.buffer().dtype())?;
        let expected = [batch, self.load().rows(), channels];
        if [by.batch, by.rows, by.channels] != expected {
            let actual = [by.batch, by.rows, by.channels];
            return Err(KernelError::shape(operation, "coefficients of the norm", expected, actual));
        }
        Ok(())
    }
}

/// What is compiled into a kernel for an [`Operand`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Load {
    Stored,
    Normalised,
    NormGradient,
}

impl Load {
    /// Rows of the coefficients.
    pub fn rows(self) -> usize {
        if self == Self::NormGradient { SLANT + 1 } else { RSTD + 1 }
    }
}

/// What normalising takes of every sample and channel: f32 `[batch, rows, channels]`.
#[derive(Clone, Debug)]
pub struct Coefficients {
    pub(crate) values: Buffer,
    pub(crate) batch: usize,
    pub(crate) rows: usize,
    pub(crate) channels: usize,
    pub(crate) slope: f32,
}

impl Coefficients {
    pub(super) fn new(context: &Context, problem: &Problem, load: Load) -> Result<Self, KernelError> {
        let (Problem { batch, channels, slope, .. }, rows) = (*problem, load.rows());
        let values = context.empty(batch * rows * channels, Dtype::F32)?;
        Ok(Self { values, batch, rows, channels, slope })
    }
}

/// Writes the coefficients of channel `c` of sample `n`; the last two of a gradient, from its sums.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernels")]
pub(super) fn write_coefficients(
    values: &mut [f32],
    n: usize,
    c: usize,
    channels: usize,
    mean: f32,
    rstd: f32,
    gamma: f32,
    beta: f32,
    sum: f32,
    product: f32,
    inverse_voxels: f32,
    #[comptime] load: Load,
) {
    let scale = rstd * gamma;
    let to = n * comptime!(load.rows()) * channels + c;
    values[to + MEAN * channels] = mean;
    values[to + SCALE * channels] = scale;
    values[to + BETA * channels] = beta;
    values[to + RSTD * channels] = rstd;
    if comptime!(load == Load::NormGradient) {
        values[to + CONSTANT * channels] = scale * sum * inverse_voxels;
        values[to + SLANT * channels] = scale * rstd * product * inverse_voxels;
    }
}

/// The coefficients of one vector of channels of sample `n`, for [`loaded`]; `vectors` are all of a sample's channels.
#[cube]
pub(crate) fn coefficients_at<N: Size>(
    values: &[Vector<f32, N>],
    n: usize,
    vectors: usize,
    vector: usize,
    #[comptime] load: Load,
) -> Array<Vector<f32, N>> {
    let rows = comptime!(load.rows());
    let mut all = Array::<Vector<f32, N>>::new(rows);
    if comptime!(load != Load::Stored) {
        #[unroll]
        for row in 0..rows {
            all[row] = values[(n * rows + row) * vectors + vector];
        }
    }
    all
}

/// One vector of an operand: of `value` and, for a gradient, of what the norm read.
#[cube]
pub(crate) fn loaded<N: Size>(
    value: Vector<f32, N>,
    raw: Vector<f32, N>,
    coefficients: &Array<Vector<f32, N>>,
    slope: Vector<f32, N>,
    #[comptime] load: Load,
) -> Vector<f32, N> {
    if comptime!(load == Load::Normalised) {
        let z = affine(value - coefficients[MEAN], coefficients[SCALE], coefficients[BETA]);
        leak(z, z, slope)
    } else if comptime!(load == Load::NormGradient) {
        let centred = raw - coefficients[MEAN];
        let z = affine(centred, coefficients[SCALE], coefficients[BETA]);
        let dz = leak(z, value, slope);
        dz * coefficients[SCALE] - coefficients[CONSTANT] - centred * coefficients[SLANT]
    } else {
        value
    }
}
