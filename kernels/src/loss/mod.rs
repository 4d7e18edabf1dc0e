//! Segmentation losses on sparse annotations, value and gradient, for all deep-supervision levels at once: soft Dice
//! and (binary) cross-entropy, together or alone.
//!
//! The defaults are those of nnU-Net v2 (`DC_and_CE_loss`, `DC_and_BCE_loss`, `TopKLoss`, `clip_tp` of
//! `SoftDiceLoss`). With p the softmax (labels) or sigmoid (regions) of the logits z, y the one-hot target, and w the
//! weight of a voxel: 0 where it is ignored, else 1 or what a weight map says:
//!
//! ```text
//! I = sum w p y,  P = sum w p,  G = sum w y             for each sample and class
//! dice  = - mean (2 I + s) / max(P + G + s, 1e-8)       over samples and classes; sums over samples first with batch
//!                                                       Dice; of labels without the background (class 0) unless asked
//!         with clip_tp c, and I' = max(I, c):           - mean (2 I' + s) / max(2 I' + (P - I) + (G - I) + s, 1e-8);
//!                                                       where I < c, I' is a constant
//! ce    = sum w (-log p[label]) / sum w                 over the whole batch, 0 if nothing is annotated
//! bce   = sum w (max(z, 0) - z y + log(1 + exp(-|z|))) / n       over voxels and regions, with
//!         n = sum w                                     if an ignore label is declared: regions are not counted, as in
//!                                                       nnU-Net
//!         n = sum over samples  w regions               without one, or with MeanOverRegions
//! top k = sum of the k largest w (-log p[label]) / k    k = percent of all voxels, of which ignored ones count as 0;
//!                                                       voxels that equal the k-th largest share the last places
//! total = sum over levels  weight (weight_ce ce + weight_dice dice)
//! ```
//!
//! Classes that nobody annotated in a sample ([`Annotation::missing`]) are not taken for absent. Of labels: a missing
//! class has no Dice term in that sample; with batch Dice its sums leave the sample out, and a class that is missing
//! in every sample has no term; the mean is over the terms that there are, and 0 without any. Its voxels lie in the
//! background there, so that the cross-entropy of a background voxel is `-log(p[0] + sum of the missing p)`, and the
//! background's Dice term, if there is one, is of that sum. A voxel whose label is missing in its sample is ignored. Of
//! regions: a missing one has neither Dice nor cross-entropy in that sample, and is not counted in `n` where regions
//! are.
//!
//! Layouts: logits and gradient `[batch, depth, height, width, classes]` in f32, f16 or bf16, all levels the same, one
//! buffer a level; labels `[batch, depth, height, width]` in u8 or u16 at full resolution, for all levels: a coarser
//! level reads the voxel `floor((i + 0.5) in / out)` on each axis (nearest-exact), of the weight map too. One-hot
//! targets, region channels and downsampled targets never exist.
//!
//! The gradient of Dice with respect to p of a class is `A y + B`, with the coefficients A and B of that sample and class that
//! `finish` makes of the sums: no kernel over voxels knows the formula. Another overlap of I, P and G (Tversky, say) is a
//! setting of [`DiceSettings`], `finish.rs`, and its numbers in `pass.rs`.
//!
//! A voxel is ignored if its label is not one of the target's (255, say, or a declared ignore label), if its weight is
//! not above 0, or if its label is missing. Its logits, NaN and infinity included, reach neither value nor gradient,
//! and its gradient is exactly zero. Where a whole group of voxels is ignored, its logits are not read.
//!
//! Three passes over all levels, each one launch, none of which waits for the host: (1) partial sums of chunks of 2048
//! voxels; (2) their totals in a fixed order, the loss and the coefficients of the gradient, on the device; (3) the
//! gradient, from logits and labels again: keeping probabilities would cost more bytes than computing them twice.
//! Bytes: `voxels (3 classes size(logit) + 2)`, less where nothing is annotated. On a device that copies at most `b`
//! bytes a second they take at least `voxels (3 classes size(logit) + 2) / b`: for two patches of 128^3 voxels and four
//! classes in f32, 210 MB.
//!
//! Memory beyond the arguments: a row of at most `4 classes + 1` sums for each chunk, less than a hundredth of the
//! logits, and nothing for a voxel, however many classes there are. On a GPU a cube takes a chunk, and its units add
//! up in up to 15 KiB of shared memory. On Vulkan drivers whose shared memory CubeCL's compiler breaks
//! ([`Caps::shared_memory`](crate::Caps) is 0: software drivers of old) a unit takes a chunk, as a thread does, but a
//! shorter one: up to 4 classes less than a hundredth of f32 logits, with 5 to 16 `40 (classes + 1) / 65536` of them,
//! and twice that of 16-bit logits. More than 16 classes are refused there.
//!
//! Where only the k largest cross-entropies count, they are stored, an f32 a voxel, and read three times to find the k-th
//! and once more to write the gradient. Results repeat bit for bit, and on the CPU runtime they do not depend on the
//! number of cores.

mod channels;
mod cube;
mod cube_sigmoid;
#[allow(clippy::collapsible_if, reason = "conditions of compile time and of run time stay apart")]
mod cube_softmax;
#[allow(clippy::collapsible_if, reason = "conditions of compile time and of run time stay apart")]
mod finish;
mod pass;
mod plan;
mod problem;
#[allow(clippy::collapsible_if, reason = "conditions of compile time and of run time stay apart")]
mod sigmoid;
mod softmax;
mod top_k;
mod walk;

pub use problem::{Annotation, DiceSettings, Entropy, Level, LossSettings, Problem, Target};

use crate::{Buffer, Context, Dtype, KernelError, Scale};
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
    let pass = Pass::new(context, problem, annotation, logits)?;
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
    let pass = Pass::new(context, problem, annotation, logits)?;
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
