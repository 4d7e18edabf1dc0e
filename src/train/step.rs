//! One step of training: forward, loss, backward, clipping, SGD. Between [`Step::gradients`] and [`Step::update`] all gradients
//! lie in one buffer, the place to sum those of several devices.

use crate::error::Result;
use crate::kernels::{Buffer, Context, LossScale, Scale};
use crate::loss::NetworkLoss;
use crate::nn::Network;
use crate::optim::Optimizer;
use crate::tape::{Fusion, Tape, Var};
use crate::tensor::Tensor;

/// What a step needs: a network, what it is to learn, and how. Nothing of it waits for the device.
#[derive(Debug)]
pub struct Step {
    context: Context,
    network: Network,
    loss: NetworkLoss,
    optimizer: Optimizer,
    loss_scale: Option<LossScale>,
    fusion: Fusion,
}

impl Step {
    /// Steps of a network on activations of f32 or bf16; those of f16 need [`Step::with_loss_scale`].
    pub fn new(context: &Context, network: Network, loss: NetworkLoss, optimizer: Optimizer) -> Self {
        Self { context: context.clone(), network, loss, optimizer, loss_scale: None, fusion: Fusion::default() }
    }

    /// The same with a factor on the loss's gradient, or without one.
    pub fn with_loss_scale(self, loss_scale: impl Into<Option<LossScale>>) -> Self {
        Self { loss_scale: loss_scale.into(), ..self }
    }

    /// The same with other operations done together.
    pub fn with_fusion(self, fusion: Fusion) -> Self {
        Self { fusion, ..self }
    }

    /// The network as it is now.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// What is minimised.
    pub fn loss(&self) -> &NetworkLoss {
        &self.loss
    }

    /// The factor on the loss's gradient, if there is one.
    pub fn loss_scale(&self) -> Option<&LossScale> {
        self.loss_scale.as_ref()
    }

    /// Computes the gradients of all parameters, times the loss scale, where the store keeps them. `image` is
    /// `[batch, depth, height, width, channels]` in the type of the activations, `target` the label map
    /// `[batch, depth, height, width]` in u8, or u16 where labels exceed 255. Returns the loss, which stays on the device; see
    /// [`NetworkLoss::value_and_gradient`].
    ///
    /// # Errors
    /// If image or target have other shapes than network or loss were made for, or the device is out of memory.
    pub fn gradients(&self, image: &Tensor, target: &Buffer) -> Result<Buffer> {
        let mut tape = Tape::new(&self.context).with_fusion(self.fusion);
        let outputs = self.network.forward(&mut tape, &Var::data(image.clone()), self.loss.levels())?;
        let (loss, seeds) = self.loss.value_and_gradient(&self.context, target, outputs, self.scale())?;
        tape.backward(seeds)?;
        Ok(loss)
    }

    /// Moves the parameters along their gradients. Returns `[norm of the gradient, 1 if it is not finite]` on the device; a
    /// gradient that is not finite leaves the parameters as they are.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn update(&self, learning_rate: f32) -> Result<Buffer> {
        self.optimizer.step(&self.context, self.network.parameters(), learning_rate, self.scale())
    }

    fn scale(&self) -> Scale<'_> {
        self.loss_scale.as_ref().into()
    }
}
