//! Dynamic loss scaling for training in f16, as `torch.amp.GradScaler` does it: gradients are computed of a multiple of
//! the loss, so that small ones do not vanish in f16. The factor is doubled after 2000 usable steps in a row, and halved
//! after a step whose gradient overflowed, which is not taken.
//!
//! The state lives on the device. The loss's gradient, the gradient's norm and the optimiser read it there, and
//! [`LossScale::update`] moves it on after each step: no step waits for the host.

use crate::block::strip;
use crate::{Buffer, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

const OPERATION: &str = "loss scale";
/// Usable steps in a row before the scale grows.
const GROWTH_INTERVAL: u32 = 2000;

/// Where loss scaling stands: what a checkpoint keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScaleState {
    /// Factor on the loss's gradient.
    pub scale: f32,
    /// Usable steps since the scale last changed.
    pub good_steps: u32,
}

impl Default for LossScaleState {
    /// torch's: 65536.
    fn default() -> Self {
        Self { scale: 65536.0, good_steps: 0 }
    }
}

/// The state of loss scaling on a device. Clones share it.
#[derive(Clone, Debug)]
pub struct LossScale {
    /// f32 `[scale, 1 / scale, good steps]`: a f32 counts to 2000 exactly.
    state: Buffer,
}

/// How many times too large a gradient is.
#[derive(Clone, Copy, Debug)]
pub enum Scale<'a> {
    /// A number that the host knows.
    Fixed(f32),
    /// What the device's state says.
    Dynamic(&'a LossScale),
}

impl<'a> Scale<'a> {
    /// Without loss scaling.
    pub const ONE: Self = Self::Fixed(1.0);

    /// The scalar and the buffer by which a kernel undoes the scale: the scalar times `buffer[1]` where the scale is
    /// dynamic. `unread` is passed where there is no state.
    pub(crate) fn arguments(self, unread: &'a Buffer) -> (f32, &'a Buffer) {
        match self {
            Self::Fixed(scale) => (1.0 / scale, unread),
            Self::Dynamic(scale) => (1.0, scale.buffer()),
        }
    }

    pub(crate) fn is_dynamic(self) -> bool {
        matches!(self, Self::Dynamic(_))
    }
}

impl<'a> From<Option<&'a LossScale>> for Scale<'a> {
    /// Of a step that may have a loss scale.
    fn from(scale: Option<&'a LossScale>) -> Self {
        scale.map_or(Self::ONE, Self::Dynamic)
    }
}

/// Multiplies the `values` by the scale.
#[cube(launch_unchecked)]
fn apply_kernel(values: &mut [f32], state: &[f32], length: usize) {
    let (low, high) = strip(length);
    for i in low..high {
        values[i] *= state[0];
    }
}

/// `norm` is what [`crate::optimizer::gradient_norm`] writes.
#[cube(launch_unchecked)]
fn update_kernel(state: &mut [f32], norm: &[f32], #[comptime] interval: u32) {
    if ABSOLUTE_POS == 0 {
        let scale = state[0];
        let good = state[2] + 1.0f32;
        let grown = good == comptime!(interval as f32);
        let broken = norm[1] != 0.0f32;
        // Beyond the largest f32 there is no scale.
        let larger = select(scale > f32::MAX * 0.5f32, scale, scale * 2.0f32);
        let next = select(broken, scale * 0.5f32, select(grown, larger, scale));
        state[0] = next;
        state[1] = 1.0f32 / next;
        state[2] = select(broken || grown, 0.0f32, good);
    }
}

impl LossScale {
    /// Uploads a state.
    ///
    /// # Errors
    /// [`KernelError::Shape`] for a scale that is not a finite number above 0.
    pub fn new(context: &Context, state: LossScaleState) -> Result<Self, KernelError> {
        let LossScaleState { scale, good_steps } = state;
        if !(scale.is_finite() && scale > 0.0) {
            return Err(KernelError::shape(OPERATION, "scale", "finite and above 0", scale));
        }
        if good_steps >= GROWTH_INTERVAL {
            return Err(KernelError::shape(OPERATION, "good steps", "below 2000", good_steps));
        }
        Ok(Self { state: context.upload_f32(&[scale, 1.0 / scale, good_steps as f32])? })
    }

    /// Waits for the device and reads the state.
    ///
    /// # Errors
    /// [`KernelError::Device`] if a step failed.
    pub fn state(&self, context: &Context) -> Result<LossScaleState, KernelError> {
        let values = context.download_f32(&self.state)?;
        Ok(LossScaleState { scale: values[0], good_steps: values[2] as u32 })
    }

    /// f32 `[scale, 1 / scale, good steps]` on the device.
    pub(crate) fn buffer(&self) -> &Buffer {
        &self.state
    }

    /// Multiplies f32 `values` by the scale.
    pub(crate) fn apply(&self, context: &Context, values: &Buffer) -> Result<(), KernelError> {
        values.check(OPERATION, "values", values.len(), Dtype::F32)?;
        context.launch(OPERATION, Work::Items(values.len()), |client, count, dim| {
            // SAFETY: the strips cover the `len` elements of `values`; the state has three.
            unsafe { apply_kernel::launch_unchecked(client, count, dim, values.arg(), self.state.arg(), values.len()) }
        })
    }

    /// Moves on after a step: `norm` is `[norm, 1 if some element is not finite]` of the step's gradient, as
    /// [`gradient_norm`](crate::optimizer::gradient_norm) wrote it.
    ///
    /// # Errors
    /// [`KernelError::Shape`] or [`KernelError::Dtype`] if `norm` is something else.
    pub fn update(&self, context: &Context, norm: &Buffer) -> Result<(), KernelError> {
        norm.check(OPERATION, "norm", 2, Dtype::F32)?;
        context.launch(OPERATION, Work::Items(1), |client, count, dim| {
            // SAFETY: the state has three elements, the norm two.
            unsafe {
                update_kernel::launch_unchecked(client, count, dim, self.state.arg(), norm.arg(), GROWTH_INTERVAL)
            }
        })
    }
}
