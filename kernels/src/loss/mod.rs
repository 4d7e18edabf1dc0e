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
mod settings;
#[allow(clippy::collapsible_if, reason = "conditions of compile time and of run time stay apart")]
mod sigmoid;
mod softmax;
mod top_k;
mod value;
mod walk;

pub use pass::Gradient;
pub use problem::Problem;
pub use settings::{Annotation, DiceSettings, Entropy, Level, LossSettings, Target};
pub use value::{value, value_and_gradient};
