//! nnU-Net's initialisation: He normal for leaky ReLU of slope 0.01, biases 0, norm scales 1 and shifts 0. The scale of the last
//! norm of a residual block is 0, so that a block begins as its skip.

use crate::error::Result;
use crate::kernels::Context;
use crate::parameters::{ParameterKind, Parameters};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};
use std::cell::RefCell;

/// Fills the store with fresh values. The same seed gives the same network on every device.
pub(super) fn he_normal(context: &Context, parameters: &Parameters, seed: u64) -> Result<()> {
    if context.is_dry() {
        return Ok(());
    }
    let rng = RefCell::new(ChaCha8Rng::seed_from_u64(seed));
    parameters.write_values(context, |parameter, values| {
        let gain = (2.0f64 / (1.0 + 0.01f64 * 0.01)).sqrt();
        // PyTorch's fan-in of a transposed convolution counts its *output* channels, since it reads the second
        // extent of the weight.
        let fan_in = match parameter.kind() {
            ParameterKind::ConvWeight { kernel, inputs, .. } => kernel.iter().product::<usize>() * inputs,
            ParameterKind::TransposedConvWeight { kernel, outputs, .. } => kernel.iter().product::<usize>() * outputs,
            ParameterKind::Vector { .. } => {
                let one = parameter.name().ends_with("norm.weight") && !parameter.name().ends_with("conv2.norm.weight");
                return values.fill(if one { 1.0 } else { 0.0 });
            }
        };
        let deviation = gain / (fan_in as f64).sqrt();
        let rng = &mut *rng.borrow_mut();
        for value in values {
            let normal: f64 = StandardNormal.sample(rng);
            *value = (deviation * normal) as f32;
        }
    })
}
