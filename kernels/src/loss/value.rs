//! The loss, and its gradient, of checked buffers.

use super::pass::{Gradient, LossPass};
use super::problem::Problem;
use super::settings::{Annotation, Entropy, OPERATION, Target};
use crate::{Buffer, Context, Dtype, KernelError, Scale};

/// The loss and its gradient with respect to the logits of all levels.
///
/// * `annotation`: labels, and what else is known of the voxels; a buffer of labels alone by `(&labels).into()`.
/// * `logits`, `gradients`: one for each level of the problem, `[batch, depth, height, width, classes]` of that
///   level; those of a level of weight 0 are neither checked nor touched.
/// * `scale`: factor on the gradient alone, for f16 training; else [`Scale::ONE`].
/// * `loss`: f32, [`Problem::loss_len`] values, overwritten, each summed over the levels with their weights:
///   `[total, ce or bce, dice, Dice coefficient of each Dice class.., cross-entropy part of each channel..]`.
///   `ce` and `dice` (negative, -1 at best) are without `weight_ce` and `weight_dice`. For labels the coefficients
///   begin with class 1 (with class 0 if the background has a term), for regions with the first. Without batch
///   Dice they are the means over the samples in which the class has a term, and 0 where there is none. The
///   cross-entropy parts sum to `ce`: of labels that of the voxels with label c, of regions that of region c.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] for a buffer that does not fit, [`KernelError::Unsupported`]
/// for f16 or bf16 logits on a device without, and for [`Scale::Dynamic`] with [`Entropy::TopK`].
pub fn value_and_gradient(
    context: &Context,
    problem: &Problem,
    annotation: &Annotation,
    logits: &[&Buffer],
    gradients: &[Gradient],
    scale: Scale,
    loss: &Buffer,
) -> Result<(), KernelError> {
    if gradients.len() != problem.levels.len() {
        let expected = problem.levels.len();
        return Err(KernelError::shape(OPERATION, "number of gradients", expected, gradients.len()));
    }
    check_buffers(context, problem, annotation, logits, loss)?;
    for level in &problem.active {
        if let Gradient::Into(buffer) = gradients[*level] {
            buffer.check(OPERATION, "gradient", problem.logits_len(*level), logits[*level].dtype())?;
        }
    }
    if scale.is_dynamic() && matches!(problem.settings.entropy, Entropy::TopK { .. }) {
        // The coefficients then hold more than factors of the gradient.
        let feature = "a loss scale on the device for the largest cross-entropies";
        return Err(KernelError::Unsupported { operation: OPERATION, feature });
    }
    let pass = LossPass::new(context, problem, annotation, logits)?;
    let sums = pass.sums()?;
    let coefficients = pass.finish(&sums, loss, scale)?;
    pass.gradient(&sums, &coefficients, gradients)
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
    let pass = LossPass::new(context, problem, annotation, logits)?;
    let sums = pass.sums()?;
    pass.finish(&sums, loss, Scale::ONE)?;
    Ok(())
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
    check_annotation(context, problem, annotation)?;
    loss.check(OPERATION, "loss", problem.loss_len(), Dtype::F32)?;
    let dtype = logits[problem.active[0]].dtype();
    for level in &problem.active {
        let (buffer, caps) = (logits[*level], context.caps());
        match buffer.dtype() {
            Dtype::F32 => (),
            Dtype::F16 if caps.f16 => (),
            Dtype::Bf16 if caps.bf16 => (),
            Dtype::F16 => return Err(KernelError::Unsupported { operation: OPERATION, feature: "f16" }),
            Dtype::Bf16 => return Err(KernelError::Unsupported { operation: OPERATION, feature: "bf16" }),
            actual => return Err(wrong_dtype("logits", "f32, f16 or bf16", actual)),
        }
        // All levels are one launch: their logits have one type.
        buffer.check(OPERATION, "logits", problem.logits_len(*level), dtype)?;
    }
    Ok(())
}

fn wrong_dtype(what: &'static str, expected: &'static str, actual: Dtype) -> KernelError {
    KernelError::Dtype { operation: OPERATION, what, expected, actual }
}

fn check_annotation(context: &Context, problem: &Problem, annotation: &Annotation) -> Result<(), KernelError> {
    let target = &problem.settings.target;
    match annotation.labels.dtype() {
        Dtype::U8 if target.labels() > 256 => return Err(wrong_dtype("labels beyond 255", "u16", Dtype::U8)),
        Dtype::U8 | Dtype::U16 => (),
        actual => return Err(wrong_dtype("labels", "u8 or u16", actual)),
    }
    annotation.labels.check(OPERATION, "labels", problem.label_len(), annotation.labels.dtype())?;
    if let Some(weights) = annotation.weights {
        match weights.dtype() {
            Dtype::F16 if !context.caps().f16 => {
                return Err(KernelError::Unsupported { operation: OPERATION, feature: "f16" });
            }
            Dtype::U8 | Dtype::F16 | Dtype::F32 => (),
            actual => return Err(wrong_dtype("weights", "u8, f16 or f32", actual)),
        }
        weights.check(OPERATION, "weights", problem.label_len(), weights.dtype())?;
    }
    match annotation.missing {
        Some(missing) => check_missing(target, problem.batch, missing),
        None => Ok(()),
    }
}

fn check_missing(target: &Target, batch: usize, missing: &[u32]) -> Result<(), KernelError> {
    let channels = target.channels();
    let words = channels.div_ceil(32);
    let wrong = |expected: String, actual: &dyn std::fmt::Debug| {
        Err(KernelError::shape(OPERATION, "missing classes", format_args!("{expected}"), actual))
    };
    if missing.len() != batch * words {
        return wrong(format!("{} words", batch * words), &missing.len());
    }
    for (sample, set) in missing.chunks(words).enumerate() {
        if u64::from(set[words - 1]) >> (channels - 32 * (words - 1)) != 0 {
            return wrong(format!("classes below {channels} in sample {sample}"), &set);
        }
        if matches!(target, Target::Labels { .. }) && set[0] & 1 == 1 {
            return wrong(format!("classes without the background in sample {sample}"), &set);
        }
        if set.iter().map(|word| word.count_ones() as usize).sum::<usize>() == channels {
            return wrong(format!("not all classes in sample {sample}"), &set);
        }
    }
    Ok(())
}
