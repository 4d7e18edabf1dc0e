//! Dice plus cross-entropy on sparse annotations, value and gradient, for all deep-supervision levels.
//!
//! The losses are those of nnU-Net v2 (`DC_and_CE_loss`, `DC_and_BCE_loss` with memory-efficient soft Dice).
//! With p the softmax (labels) or sigmoid (regions), y the one-hot target, m = 1 where the voxel is annotated:
//!
//! ```text
//! I = sum p y m,  P = sum p m,  G = sum y m             for each sample and class
//! dice  = - mean (2 I + s) / max(G + P + s, 1e-8)       over samples and classes; sums over samples first with
//!                                                       batch_dice; labels leave the background (class 0) out
//! ce    = sum m (-log p[label]) / sum m                 over the whole batch, 0 if nothing is annotated
//! bce   = sum m (max(z, 0) - z y + log(1 + exp(-|z|))) / sum m        if an ignore label is declared: the
//!                                                       denominator does not count regions, as in nnU-Net;
//!                                                       without one the mean over voxels and regions
//! total = sum over levels  weight (weight_ce ce + weight_dice dice)
//! ```
//!
//! Layouts: logits and gradient `[batch, depth, height, width, classes]` in f32, f16 or bf16, one buffer a
//! level; labels `[batch, depth, height, width]` in u8 at full resolution, for all levels: a coarser level
//! reads the voxel `floor((i + 0.5) in / out)` on each axis (nearest-exact). One-hot targets, region channels
//! and downsampled targets never exist.
//!
//! A voxel is ignored if its label is the ignore value, or is not declared (255, say). Its logits, NaN and
//! infinity included, reach neither value nor gradient, and its gradient is exactly zero. Where a whole group
//! of voxels is ignored, its logits are not read.
//!
//! Three passes a level, none of which waits for the host: (1) partial sums of chunks of 2048 voxels; (2) their
//! totals in a fixed order, the loss and the coefficients of the gradient, on the device; (3) the gradient,
//! from logits and labels again: keeping probabilities would cost more bytes than computing them twice. Bytes:
//! `voxels (3 classes size(logit) + 2)`, less where nothing is annotated; on a GPU with more than 16 classes, two
//! logits and four f32 a voxel more. Results repeat bit for bit, and on the CPU runtime they do not depend on
//! the number of cores.

mod finish;
mod owned;
mod pass;
mod problem;
mod sigmoid;
mod softmax;
mod walk;

pub use problem::{Annotation, DiceSettings, Entropy, Level, LossSettings, Problem, Target};

use crate::{Buffer, Context, Dtype, KernelError, LossScale};
use pass::Pass;

const OPERATION: &str = "loss";

/// Where the gradient of a level goes.
#[derive(Clone, Copy, Debug)]
pub enum Gradient<'a> {
    /// Into a buffer of its own, of the shape and type of the logits and sharing no memory with them.
    Into(&'a Buffer),
    /// Over the logits.
    InPlace,
}

/// The loss and its gradient with respect to the logits of all levels.
///
/// * `annotation`: labels, and what else is known of the voxels; a buffer of labels alone by `(&labels).into()`.
/// * `logits`, `gradients`: one for each level of the problem, `[batch, depth, height, width, classes]` of that
///   level; those of a level of weight 0 are neither checked nor touched.
/// * `scale`: factor on the gradient alone, for f16 training; else 1.
/// * `loss`: f32, [`Problem::loss_len`] values, overwritten, each summed over the levels with their weights:
///   `[total, ce or bce, dice, Dice coefficient of each Dice class.., cross-entropy part of each channel..]`.
///   `ce` and `dice` (negative, -1 at best) are without `weight_ce` and `weight_dice`. For labels the coefficients
///   begin with class 1 (with class 0 if the background has a term), for regions with the first. Without batch
///   Dice they are the means over the samples in which the class has a term, and 0 where there is none. The
///   cross-entropy parts sum to `ce`: of labels that of the voxels with label c, of regions that of region c.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] for a buffer that does not fit, [`KernelError::Unsupported`]
/// for f16 or bf16 logits on a device without.
pub fn value_and_gradient(
    context: &Context,
    problem: &Problem,
    annotation: &Annotation,
    logits: &[&Buffer],
    gradients: &[Gradient],
    scale: f32,
    loss: &Buffer,
) -> Result<(), KernelError> {
    run(context, problem, annotation, logits, gradients, (scale, None), loss)
}

/// The same with the factor of a [`LossScale`], which stays on the device.
///
/// # Errors
/// As [`value_and_gradient`].
pub fn value_and_scaled_gradient(
    context: &Context,
    problem: &Problem,
    annotation: &Annotation,
    logits: &[&Buffer],
    gradients: &[Gradient],
    scale: &LossScale,
    loss: &Buffer,
) -> Result<(), KernelError> {
    run(context, problem, annotation, logits, gradients, (1.0, Some(scale)), loss)
}

fn run(
    context: &Context,
    problem: &Problem,
    annotation: &Annotation,
    logits: &[&Buffer],
    gradients: &[Gradient],
    (scale, dynamic): (f32, Option<&LossScale>),
    loss: &Buffer,
) -> Result<(), KernelError> {
    if gradients.len() != problem.levels.len() {
        let expected = problem.levels.len();
        return Err(KernelError::shape(OPERATION, "number of gradients", expected, gradients.len()));
    }
    check_buffers(context, problem, annotation, logits, loss)?;
    for level in active(problem) {
        if let Gradient::Into(buffer) = gradients[level] {
            buffer.expect(OPERATION, "gradient", problem.logits_len(level), logits[level].dtype())?;
        }
    }
    for (i, level) in active(problem).enumerate() {
        let pass = Pass::new(context, problem, level, annotation.labels, logits[level]);
        let sums = pass.sums()?;
        let coefficients = pass.finish(&sums, loss, scale, i == 0)?;
        if let Some(dynamic) = dynamic {
            // The gradient is linear in them.
            dynamic.apply(context, &coefficients)?;
        }
        pass.gradient(&sums, &coefficients, gradients[level])?;
    }
    Ok(())
}

/// The loss alone; arguments as in [`value_and_gradient`].
///
/// # Errors
/// As [`value_and_gradient`].
pub fn value(
    context: &Context,
    problem: &Problem,
    annotation: &Annotation,
    logits: &[&Buffer],
    loss: &Buffer,
) -> Result<(), KernelError> {
    check_buffers(context, problem, annotation, logits, loss)?;
    for (i, level) in active(problem).enumerate() {
        let pass = Pass::new(context, problem, level, annotation.labels, logits[level]);
        let sums = pass.sums()?;
        pass.finish(&sums, loss, 1.0, i == 0)?;
    }
    Ok(())
}

fn active(problem: &Problem) -> impl Iterator<Item = usize> {
    (0..problem.levels.len()).filter(|level| problem.levels[*level].weight > 0.0)
}

fn check_buffers(
    context: &Context,
    problem: &Problem,
    annotation: &Annotation,
    logits: &[&Buffer],
    loss: &Buffer,
) -> Result<(), KernelError> {
    if logits.len() != problem.levels.len() {
        let expected = problem.levels.len();
        return Err(KernelError::shape(OPERATION, "number of logit buffers", expected, logits.len()));
    }
    let voxels: usize = problem.dims.iter().product();
    let settings = &problem.settings;
    let unfinished = settings.entropy != Entropy::Mean
        || settings.dice.background
        || settings.dice.clip_tp.is_some()
        || settings.target.channels() > 255
        || annotation.missing.is_some()
        || annotation.weights.is_some();
    if unfinished {
        return Err(KernelError::Unsupported { operation: OPERATION, feature: "kernel for this variant" });
    }
    annotation.labels.expect(OPERATION, "labels", problem.batch * voxels, Dtype::U8)?;
    loss.expect(OPERATION, "loss", problem.loss_len(), Dtype::F32)?;
    for level in active(problem) {
        let (buffer, caps) = (logits[level], context.caps());
        match buffer.dtype() {
            Dtype::F32 => (),
            Dtype::F16 if caps.f16 => (),
            Dtype::Bf16 if caps.bf16 => (),
            Dtype::F16 => return Err(KernelError::Unsupported { operation: OPERATION, feature: "f16" }),
            Dtype::Bf16 => return Err(KernelError::Unsupported { operation: OPERATION, feature: "bf16" }),
            actual => {
                return Err(KernelError::Dtype {
                    operation: OPERATION,
                    what: "logits",
                    expected: "f32, f16 or bf16",
                    actual,
                });
            }
        }
        buffer.expect(OPERATION, "logits", problem.logits_len(level), buffer.dtype())?;
    }
    Ok(())
}
