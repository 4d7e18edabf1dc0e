//! Steps of SGD with momentum and of AdamW over flat f32 buffers, with torch's arithmetic.
//!
//! All parameters of a network lie in one buffer, their gradients and moments in buffers of the same layout. So a
//! step is three launches however many parameters there are: two for the norm of the gradient, one for the step,
//! which reads the norm on the device. The step never waits for the host.
//!
//! Parameters that never receive a gradient (nnU-Net's segmentation head of the lowest decoder level) are left
//! alone by torch: no weight decay, no momentum. They are skipped by passing [`Buffer::part`]s that leave them out;
//! a layout with all such parameters at the end needs one part.
//!
//! Moments start as zeros ([`crate::elementwise::fill`]); torch's first step, `momentum = gradient`, is then the
//! general one.
//!
//! Bytes per parameter: 4 for the norm, 20 for SGD, 28 for AdamW.

use crate::block::strip;
use crate::elementwise::lanes_of;
use crate::reduce::{Path, Walk, check_count, gather_parts, rows_of, share};
use crate::{Buffer, Context, Dtype, KernelError, Scale, Work};
use cubecl::prelude::*;

/// What a step does with the gradient's norm.
#[derive(Clone, Copy, Debug)]
pub struct Guard<'a> {
    /// f32 `[2]` as [`gradient_norm`] writes it.
    pub norm: &'a Buffer,
    /// The gradient is multiplied by `min(1, max_norm / (norm + 1e-6))` (torch's `clip_grad_norm_`; nnU-Net: 12).
    /// Infinity clips nothing.
    pub max_norm: f32,
    /// Leave parameters and moments as they are if some gradient is infinite or NaN (torch's `GradScaler`).
    pub skip_non_finite: bool,
}

/// A gradient and how it is to be used.
#[derive(Clone, Copy, Debug)]
pub struct Gradient<'a> {
    /// f32, in the layout of the parameters.
    pub values: &'a Buffer,
    /// Its loss scale, by which it is divided.
    pub scale: Scale<'a>,
    /// Clipping and skipping; `None` takes every gradient as it is.
    pub guard: Option<Guard<'a>>,
}

/// Settings of `torch.optim.SGD` (dampening 0).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Step size.
    pub learning_rate: f32,
    /// Share of the momentum that is kept.
    pub momentum: f32,
    /// Added to the gradient, times the parameter, after clipping.
    pub weight_decay: f32,
    /// Look ahead: step along `gradient + momentum * buffer`.
    pub nesterov: bool,
}

/// Settings of `torch.optim.AdamW` (no AMSGrad).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Step size.
    pub learning_rate: f32,
    /// Decay rates of the first and the second moment.
    pub betas: [f32; 2],
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Parameters shrink by `learning_rate * weight_decay` before the step.
    pub weight_decay: f32,
}

impl Default for AdamW {
    /// torch's defaults.
    fn default() -> Self {
        Self { learning_rate: 1e-3, betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 1e-2 }
    }
}

// ------------------------------------------------------------------------------------------------ kernels

/// What a gradient is multiplied by to undo the loss scale. `state` is that of a [`LossScale`](crate::LossScale) if `dynamic`.
#[cube]
fn inverse(state: &[f32], fixed: f32, #[comptime] dynamic: bool) -> f32 {
    if comptime!(dynamic) { state[1] } else { fixed }
}

/// `partial` is `[tasks, 2, width]`: sums of squares, and numbers of infinite or NaN elements.
#[cube(launch_unchecked)]
fn norm_parts_kernel<N: Size>(
    gradient: &[Vector<f32, N>],
    state: &[f32],
    partial: &mut [Vector<f32, N>],
    inverse_scale: f32,
    path: &Path,
    #[comptime] tile: usize,
    #[comptime] chunked: bool,
    #[comptime] dynamic: bool,
) {
    let scale = Vector::<f32, N>::new(inverse(state, inverse_scale, dynamic));
    let largest = Vector::<f32, N>::new(f32::MAX);
    let groups = path.groups;
    let (task_low, task_high, tile_low, tile_high) = share(path, tile, chunked);
    for task in task_low..task_high {
        let (first, step, count) = rows_of(task, path, chunked);
        for g in tile_low * tile..tile_high * tile {
            partial[task * 2 * groups + g] = Vector::zeroed();
            partial[(task * 2 + 1) * groups + g] = Vector::zeroed();
        }
        for low in range_stepped(0, count, path.block) {
            let high = (low + path.block).min(count);
            for at in tile_low..tile_high {
                let mut squares = Array::<Vector<f32, N>>::new(tile);
                let mut broken = Array::<Vector<f32, N>>::new(tile);
                for i in low..high {
                    let from = (first + i * step) * groups + at * tile;
                    #[unroll]
                    for t in 0..tile {
                        let g = gradient[from + t];
                        let scaled = g * scale;
                        squares[t] += scaled * scaled;
                        // False for NaN too, on every runtime.
                        let finite = g.abs().less_equal(&largest);
                        broken[t] += select_many(finite, Vector::new(0.0f32), Vector::new(1.0f32));
                    }
                }
                let to = task * 2 * groups + at * tile;
                #[unroll]
                for t in 0..tile {
                    partial[to + t] += squares[t];
                    partial[to + groups + t] += broken[t];
                }
            }
        }
    }
}

/// `[parts, 2, width]` -> `[norm, 1 if some element is not finite]`.
#[cube(launch_unchecked)]
fn norm_kernel(partial: &[f32], norm: &mut [f32], parts: usize, width: usize) {
    if ABSOLUTE_POS == 0 {
        let mut squares = 0.0f32;
        let mut broken = 0.0f32;
        for part in 0..parts {
            for e in 0..width {
                squares += partial[part * 2 * width + e];
                broken += partial[(part * 2 + 1) * width + e];
            }
        }
        norm[0] = squares.sqrt();
        norm[1] = select(broken > 0.0f32, 1.0f32, 0.0f32);
    }
}

/// Whether a step is taken, and by which factor of its gradient.
#[derive(CubeType, CubeLaunch)]
struct Admission {
    /// What [`gradient_norm`] wrote, where a guard looks at it.
    norm: Box<[f32]>,
    /// Of the loss scale, where there is one.
    state: Box<[f32]>,
    inverse_scale: f32,
    max_norm: f32,
    skip: u32,
}

/// The factor that unscales and clips the gradient, and whether the step is to be taken.
#[cube]
fn admit(admission: &Admission, #[comptime] guarded: bool, #[comptime] dynamic: bool) -> (f32, bool) {
    let inverse_scale = if comptime!(dynamic) { admission.state[1] } else { admission.inverse_scale };
    if comptime!(guarded) {
        let ratio = admission.max_norm / (admission.norm[0] + 1e-6f32);
        // Not min(): a NaN norm has to reach the parameters, as it does in torch, unless skipping is asked for.
        let clip = select(ratio > 1.0f32, 1.0f32, ratio);
        (inverse_scale * clip, admission.skip == 0 || admission.norm[1] == 0.0f32)
    } else {
        (inverse_scale, true.runtime())
    }
}

#[derive(CubeType, CubeLaunch)]
struct SgdNumbers {
    learning_rate: f32,
    momentum: f32,
    weight_decay: f32,
    vectors: usize,
}

#[cube(launch_unchecked)]
fn sgd_kernel<N: Size>(
    gradient: &[Vector<f32, N>],
    parameters: &mut [Vector<f32, N>],
    moment: &mut [Vector<f32, N>],
    admission: Admission,
    s: SgdNumbers,
    #[comptime] nesterov: bool,
    #[comptime] guarded: bool,
    #[comptime] dynamic: bool,
) {
    let (factor, taken) = admit(&admission, guarded, dynamic);
    if taken {
        let (low, high) = strip(s.vectors);
        for i in low..high {
            let p = parameters[i];
            let g = gradient[i] * Vector::new(factor) + p * Vector::new(s.weight_decay);
            let m = moment[i] * Vector::new(s.momentum) + g;
            moment[i] = m;
            let direction = if comptime!(nesterov) { g + m * Vector::new(s.momentum) } else { m };
            parameters[i] = p - direction * Vector::new(s.learning_rate);
        }
    }
}

#[derive(CubeType, CubeLaunch)]
struct AdamWNumbers {
    /// `learning_rate / (1 - beta1^t)`.
    rate: f32,
    /// `1 / sqrt(1 - beta2^t)`.
    root: f32,
    /// `1 - learning_rate * decay`.
    keep: f32,
    beta1: f32,
    beta2: f32,
    epsilon: f32,
    vectors: usize,
}

#[cube(launch_unchecked)]
fn adamw_kernel<N: Size>(
    gradient: &[Vector<f32, N>],
    parameters: &mut [Vector<f32, N>],
    first: &mut [Vector<f32, N>],
    second: &mut [Vector<f32, N>],
    admission: Admission,
    s: AdamWNumbers,
    #[comptime] guarded: bool,
    #[comptime] dynamic: bool,
) {
    let (factor, taken) = admit(&admission, guarded, dynamic);
    if taken {
        let (low, high) = strip(s.vectors);
        for i in low..high {
            let g = gradient[i] * Vector::new(factor);
            let m = first[i] + (g - first[i]) * Vector::new(1.0f32 - s.beta1);
            let v = second[i] * Vector::new(s.beta2) + g * g * Vector::new(1.0f32 - s.beta2);
            first[i] = m;
            second[i] = v;
            let denominator = v.sqrt() * Vector::new(s.root) + Vector::new(s.epsilon);
            parameters[i] = parameters[i] * Vector::new(s.keep) - m / denominator * Vector::new(s.rate);
        }
    }
}

// ----------------------------------------------------------------------------------------------- launches

/// L2 norm of `gradient / scale`, and whether it is usable, left on the device:
/// `norm = [norm, 1 if some element is infinite or NaN, else 0]`, f32 `[2]`.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if the buffers do not fit, [`KernelError::Limit`] beyond the
/// device's index range.
pub fn gradient_norm(context: &Context, gradient: &Buffer, scale: Scale, norm: &Buffer) -> Result<(), KernelError> {
    const OPERATION: &str = "gradient norm";
    if gradient.is_empty() {
        return Err(KernelError::shape(OPERATION, "gradient", "at least 1 element", 0));
    }
    gradient.check(OPERATION, "gradient", gradient.len(), Dtype::F32)?;
    norm.check(OPERATION, "norm", 2, Dtype::F32)?;
    check_count(context, OPERATION, gradient.len())?;
    let walk = Walk::new(1, gradient.len(), 1, 1, context.caps());
    let partial = context.empty(walk.parts * 2 * walk.width, Dtype::F32)?;
    let (inverse_scale, state) = scale.arguments(gradient);
    context.launch(OPERATION, walk.work(), |client, count, dim| {
        // SAFETY: the walk covers the gradient's `len` elements, and `parts * 2 * width` of `partial`.
        unsafe {
            norm_parts_kernel::launch_unchecked(
                client,
                count,
                dim,
                walk.lanes,
                gradient.arg(),
                state.arg(),
                partial.arg(),
                inverse_scale,
                walk.arg(),
                walk.tile,
                walk.chunked,
                scale.is_dynamic(),
            )
        }
    })?;
    let (partial, parts) = gather_parts(context, OPERATION, partial, 1, walk.parts, 2 * walk.width)?;
    context.launch(OPERATION, Work::Items(1), |client, count, dim| {
        // SAFETY: `partial` holds `parts * 2 * width` elements, `norm` two.
        unsafe { norm_kernel::launch_unchecked(client, count, dim, partial.arg(), norm.arg(), parts, walk.width) }
    })
}

/// One step of SGD: `g += weight_decay * p; m = momentum * m + g; p -= learning_rate * (g + momentum * m)` (without
/// Nesterov, along `m`). `parameters` and `momentum` are f32, as long as the gradient; `momentum` starts as zeros.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if the buffers do not fit, [`KernelError::Limit`] beyond the
/// device's index range.
pub fn sgd_step(
    context: &Context,
    sgd: &Sgd,
    gradient: &Gradient,
    parameters: &Buffer,
    momentum: &Buffer,
) -> Result<(), KernelError> {
    const OPERATION: &str = "SGD step";
    let step = Step::new(context, OPERATION, gradient, parameters, &[momentum])?;
    context.launch(OPERATION, step.work, |client, count, dim| {
        // SAFETY: gradient, parameters and momentum have `len` elements, the strips cover their `len / lanes` vectors;
        // the norm is only read where it is given, and has two elements then.
        unsafe {
            sgd_kernel::launch_unchecked(
                client,
                count,
                dim,
                step.lanes,
                gradient.values.arg(),
                parameters.arg(),
                momentum.arg(),
                step.admission(),
                SgdNumbersLaunch::new(sgd.learning_rate, sgd.momentum, sgd.weight_decay, step.vectors),
                sgd.nesterov,
                gradient.guard.is_some(),
                gradient.scale.is_dynamic(),
            )
        }
    })
}

/// One step of AdamW (decoupled weight decay, bias correction). `number` counts steps from 1. `parameters` and the
/// moments are f32, as long as the gradient; the moments start as zeros.
///
/// A step that is skipped on the device for a non-finite gradient still has a number here, where torch does not
/// count it.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if the buffers do not fit or `number` is 0,
/// [`KernelError::Limit`] beyond the device's index range.
pub fn adamw_step(
    context: &Context,
    adamw: &AdamW,
    number: u32,
    gradient: &Gradient,
    parameters: &Buffer,
    moments: [&Buffer; 2],
) -> Result<(), KernelError> {
    const OPERATION: &str = "AdamW step";
    if number == 0 {
        return Err(KernelError::shape(OPERATION, "number of the step", "at least 1", 0));
    }
    let step = Step::new(context, OPERATION, gradient, parameters, &moments)?;
    let [beta1, beta2] = adamw.betas.map(f64::from);
    let correction = |beta: f64| 1.0 - beta.powf(f64::from(number));
    context.launch(OPERATION, step.work, |client, count, dim| {
        // SAFETY: gradient, parameters and moments have `len` elements, the strips cover their `len / lanes` vectors; the
        // norm is only read where it is given, and has two elements then.
        unsafe {
            adamw_kernel::launch_unchecked(
                client,
                count,
                dim,
                step.lanes,
                gradient.values.arg(),
                parameters.arg(),
                moments[0].arg(),
                moments[1].arg(),
                step.admission(),
                AdamWNumbersLaunch::new(
                    (f64::from(adamw.learning_rate) / correction(beta1)) as f32,
                    (1.0 / correction(beta2).sqrt()) as f32,
                    (1.0 - f64::from(adamw.learning_rate) * f64::from(adamw.weight_decay)) as f32,
                    adamw.betas[0],
                    adamw.betas[1],
                    adamw.epsilon,
                    step.vectors,
                ),
                gradient.guard.is_some(),
                gradient.scale.is_dynamic(),
            )
        }
    })
}

/// The checks and the launch shape that both optimisers share.
struct Step<'a> {
    work: Work,
    lanes: usize,
    vectors: usize,
    /// The guard's norm; without a guard the gradient, which the kernel then does not read as a norm.
    norm: &'a Buffer,
    /// Of the loss scale; without one the gradient, which the kernel then does not read as a state.
    state: &'a Buffer,
    inverse_scale: f32,
    max_norm: f32,
    skip: u32,
}

impl<'a> Step<'a> {
    fn new(
        context: &Context,
        operation: &'static str,
        gradient: &Gradient<'a>,
        parameters: &Buffer,
        moments: &[&Buffer],
    ) -> Result<Self, KernelError> {
        let len = parameters.len();
        parameters.check(operation, "parameters", len, Dtype::F32)?;
        gradient.values.check(operation, "gradient", len, Dtype::F32)?;
        for moment in moments {
            moment.check(operation, "moment", len, Dtype::F32)?;
        }
        let (norm, max_norm, skip) = match gradient.guard {
            Some(guard) => {
                guard.norm.check(operation, "norm", 2, Dtype::F32)?;
                (guard.norm, guard.max_norm, u32::from(guard.skip_non_finite))
            }
            None => (gradient.values, f32::INFINITY, 0),
        };
        check_count(context, operation, len)?;
        let lanes = lanes_of(context, len);
        let (inverse_scale, state) = gradient.scale.arguments(gradient.values);
        Ok(Self {
            work: Work::Items(len / lanes),
            lanes,
            vectors: len / lanes,
            norm,
            state,
            inverse_scale,
            max_norm,
            skip,
        })
    }

    fn admission(&self) -> AdmissionLaunch {
        let Self { norm, state, inverse_scale, max_norm, skip, .. } = *self;
        AdmissionLaunch::new(norm.arg(), state.arg(), inverse_scale, max_norm, skip)
    }
}
