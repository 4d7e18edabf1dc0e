//! nnU-Net's optimiser: SGD with Nesterov momentum and weight decay on every parameter, gradients clipped to a global
//! norm, and a polynomial learning rate.

use crate::error::Result;
use crate::kernels::optimizer::{self, Gradient, Guard, Sgd};
use crate::kernels::{Buffer, Context, Dtype, Scale};
use crate::parameters::Parameters;

/// Settings of SGD as nnU-Net uses it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Optimizer {
    /// Share of the momentum that is kept.
    pub momentum: f32,
    /// Added to the gradient, times the parameter.
    pub weight_decay: f32,
    /// Largest global L2 norm of the gradient.
    pub clip_norm: f32,
}

impl Default for Optimizer {
    /// nnU-Net's.
    fn default() -> Self {
        Self { momentum: 0.99, weight_decay: 3e-5, clip_norm: 12.0 }
    }
}

impl Optimizer {
    /// Updates all trained parameters from their gradients, which are those of a loss times `scale`. Returns `[norm, 1 if not
    /// finite]` on the device; a gradient that is not finite leaves everything as it was. A dynamic scale moves on.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn step(&self, context: &Context, parameters: &Parameters, learning_rate: f32, scale: Scale) -> Result<Buffer> {
        let [values, gradients, momenta] = parameters.trained()?;
        let norm = context.empty(2, Dtype::F32)?;
        optimizer::gradient_norm(context, &gradients, scale, &norm)?;
        let guard = Some(Guard { norm: &norm, max_norm: self.clip_norm, skip_non_finite: true });
        let gradient = Gradient { values: &gradients, scale, guard };
        let Self { momentum, weight_decay, .. } = *self;
        let sgd = Sgd { learning_rate, momentum, weight_decay, nesterov: true };
        optimizer::sgd_step(context, &sgd, &gradient, &values, &momenta)?;
        if let Scale::Dynamic(scale) = scale {
            scale.update(context, &norm)?;
        }
        Ok(norm)
    }
}

/// nnU-Net's learning rate: `initial * (1 - epoch / epochs)^0.9`, constant inside an epoch.
pub fn poly_learning_rate(initial: f64, epoch: usize, epochs: usize) -> f64 {
    initial * (1.0 - epoch as f64 / epochs as f64).powf(0.9)
}
