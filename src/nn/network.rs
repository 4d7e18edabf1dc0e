//! A network of any architecture, as training, prediction and checkpoints see it.

use super::residual::ResidualEncoderUNet;
use super::shape::{Encoder, UNetShape};
use super::unet::PlainConvUNet;
use crate::error::Result;
use crate::kernels::Context;
use crate::parameters::Parameters;
use crate::tape::{Tape, Var};

/// A network with its parameters on a device.
#[derive(Debug)]
#[non_exhaustive]
pub enum Network {
    /// nnU-Net's default.
    Plain(PlainConvUNet),
    /// That of nnU-Net's ResEnc presets.
    Residual(ResidualEncoderUNet),
}

impl Network {
    /// Allocates the network of a shape and initialises it from a seed.
    ///
    /// # Errors
    /// As [`PlainConvUNet::new`].
    pub fn new(context: &Context, shape: UNetShape, seed: u64) -> Result<Self> {
        match shape.encoder {
            Encoder::Plain => PlainConvUNet::new(context, shape, seed).map(Self::Plain),
            Encoder::Residual => ResidualEncoderUNet::new(context, shape, seed).map(Self::Residual),
        }
    }

    /// The network's shape.
    pub fn shape(&self) -> &UNetShape {
        match self {
            Self::Plain(network) => network.shape(),
            Self::Residual(network) => network.shape(),
        }
    }

    /// The parameters under nnU-Net's names.
    pub fn parameters(&self) -> &Parameters {
        match self {
            Self::Plain(network) => network.parameters(),
            Self::Residual(network) => network.parameters(),
        }
    }

    /// Logits of the `levels` finest resolutions, full resolution first: `[batch, depth, height, width, heads]`.
    ///
    /// # Errors
    /// [`NetworkError::Architecture`](crate::error::NetworkError::Architecture) if an extent of `x` is no multiple of [`UNetShape::divisor`].
    pub fn forward(&self, tape: &mut Tape, x: &Var, levels: usize) -> Result<Vec<Var>> {
        match self {
            Self::Plain(network) => network.forward(tape, x, levels),
            Self::Residual(network) => network.forward(tape, x, levels),
        }
    }
}
