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
//! `voxels (3 classes size(logit) + 2)`, less where nothing is annotated. Results repeat bit for bit, and on
//! the CPU runtime they do not depend on the number of cores.

mod finish;
mod sigmoid;
mod softmax;
mod walk;

use crate::{Buffer, Caps, Context, Dtype, KernelError};
use cubecl::prelude::*;
use finish::{Finish, WeightsLaunch, finish_kernel, reduce_kernel};
use walk::{CHUNK, ExtentLaunch};

const OPERATION: &str = "loss";

/// What the channels of the logits mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Exclusive classes: channel k is the score of label k, label 0 is background. 1 to 255 classes.
    Labels {
        /// Number of channels, and of labels from 0 on.
        classes: usize,
    },
    /// Overlapping regions: channel k is the score of the k-th region.
    Regions {
        /// Number of labels from 0 on, background included; larger ones in the map are treated as ignored.
        labels: usize,
        /// For every region the labels that belong to it. 1 to 255 regions.
        regions: Vec<Vec<u8>>,
    },
}

impl Target {
    /// Number of channels of the logits.
    pub fn channels(&self) -> usize {
        match self {
            Self::Labels { classes } => *classes,
            Self::Regions { regions, .. } => regions.len(),
        }
    }

    /// Number of classes with a Dice term: without the background for labels, all for regions.
    pub fn dice_classes(&self) -> usize {
        self.channels() - self.first_dice()
    }

    fn first_dice(&self) -> usize {
        // With one class only there would be no term at all: nnU-Net has no such case.
        usize::from(matches!(self, Self::Labels { classes } if *classes > 1))
    }

    fn labels(&self) -> usize {
        match self {
            Self::Labels { classes } => *classes,
            Self::Regions { labels, .. } => *labels,
        }
    }
}

/// Which loss.
#[derive(Clone, Debug, PartialEq)]
pub struct LossSettings {
    /// Meaning of the channels.
    pub target: Target,
    /// The label of voxels that nobody annotated, if the data set declares one. It changes the denominator of
    /// the binary cross-entropy of regions even where no voxel has it.
    pub ignore: Option<u8>,
    /// Sum I, P, G over the batch before dividing.
    pub batch_dice: bool,
    /// Factor of the (binary) cross-entropy. nnU-Net: 1.
    pub weight_ce: f32,
    /// Factor of the Dice term. nnU-Net: 1.
    pub weight_dice: f32,
    /// Added to numerator and denominator of Dice. nnU-Net: 1e-5.
    pub smooth: f32,
}

impl LossSettings {
    /// nnU-Net's settings for a target.
    pub fn new(target: Target, ignore: Option<u8>, batch_dice: bool) -> Self {
        Self { target, ignore, batch_dice, weight_ce: 1.0, weight_dice: 1.0, smooth: 1e-5 }
    }
}

/// Size and weight of one deep-supervision level.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    /// Depth, height and width of its logits; at most those of the label map.
    pub dims: [usize; 3],
    /// Factor of this level's loss. A level of weight 0 is skipped: its buffers are not touched.
    pub weight: f32,
}

/// Where the gradient of a level goes.
#[derive(Clone, Copy, Debug)]
pub enum Gradient<'a> {
    /// Into a buffer of its own, of the shape and type of the logits.
    Into(&'a Buffer),
    /// Over the logits.
    InPlace,
}

/// Shapes of a loss, checked, with its small tables on the device. Made once and used for every step.
#[derive(Clone, Debug)]
pub struct Problem {
    settings: LossSettings,
    batch: usize,
    dims: [usize; 3],
    levels: Vec<Level>,
    /// Of every level: shares of the label's index by depth, height and width coordinate.
    axes: Vec<Buffer>,
    /// Bit sets of regions by label, with an empty one for "ignored" at 256.
    regions: Buffer,
}

impl Problem {
    /// Checks a loss for `batch` label maps of `dims` and the levels of a network, first the finest.
    ///
    /// # Errors
    /// [`KernelError::Shape`] for what does not fit together, [`KernelError::Limit`] for more elements than the
    /// kernels can index.
    pub fn new(
        context: &Context,
        settings: &LossSettings,
        batch: usize,
        dims: [usize; 3],
        levels: &[Level],
    ) -> Result<Self, KernelError> {
        check_settings(settings)?;
        if batch == 0 || dims.contains(&0) {
            return Err(KernelError::shape(OPERATION, "batch and dims", "at least 1", (batch, dims)));
        }
        check_count("voxels of the label map", batch, &dims, 1)?;
        for level in levels {
            if (0..3).any(|a| level.dims[a] == 0 || level.dims[a] > dims[a]) {
                return Err(KernelError::shape(OPERATION, "dims of a level", format!("1 to {dims:?}"), level.dims));
            }
            if !(level.weight.is_finite() && level.weight >= 0.0) {
                return Err(KernelError::shape(OPERATION, "weight of a level", "finite and >= 0", level.weight));
            }
            check_count("logits of a level", batch, &level.dims, settings.target.channels())?;
        }
        if levels.iter().all(|level| level.weight == 0.0) {
            return Err(KernelError::shape(OPERATION, "levels", "at least one of a weight > 0", levels));
        }
        let axes: Result<Vec<Buffer>, KernelError> =
            levels.iter().map(|level| context.upload(&axis_table(dims, level.dims), Dtype::U32)).collect();
        let regions = context.upload(&region_table(&settings.target), Dtype::U32)?;
        Ok(Self { settings: settings.clone(), batch, dims, levels: levels.to_vec(), axes: axes?, regions })
    }

    /// Length of the loss vector, see [`value_and_gradient`].
    pub fn loss_len(&self) -> usize {
        3 + self.settings.target.dice_classes()
    }

    /// Number of logits of a level.
    pub fn logits_len(&self, level: usize) -> usize {
        self.voxels(level) * self.batch * self.settings.target.channels()
    }

    /// The levels.
    pub fn levels(&self) -> &[Level] {
        &self.levels
    }

    fn voxels(&self, level: usize) -> usize {
        self.levels[level].dims.iter().product()
    }
}

fn check_settings(settings: &LossSettings) -> Result<(), KernelError> {
    let channels = settings.target.channels();
    if !(1..=255).contains(&channels) {
        return Err(KernelError::shape(OPERATION, "classes or regions", "1 to 255", channels));
    }
    if let Target::Regions { labels, regions } = &settings.target {
        if !(1..=256).contains(labels) {
            return Err(KernelError::shape(OPERATION, "labels", "1 to 256", labels));
        }
        if let Some(label) = regions.iter().flatten().find(|label| usize::from(**label) >= *labels) {
            return Err(KernelError::shape(OPERATION, "label of a region", format!("below {labels}"), label));
        }
    }
    let weights = [settings.weight_ce, settings.weight_dice, settings.smooth];
    if !weights.iter().all(|w| w.is_finite()) || settings.smooth < 0.0 {
        return Err(KernelError::shape(OPERATION, "weights and smooth", "finite, smooth >= 0", weights));
    }
    Ok(())
}

/// Indices are 32 bits wide on a GPU.
fn check_count(what: &'static str, batch: usize, dims: &[usize; 3], channels: usize) -> Result<(), KernelError> {
    let limit = u64::from(u32::MAX) - 4 * CHUNK as u64;
    let actual = dims.iter().chain([&batch, &channels]).fold(1u64, |n, d| n.saturating_mul(*d as u64));
    if actual > limit {
        return Err(KernelError::Limit { operation: OPERATION, what, actual, limit });
    }
    Ok(())
}

/// For each coordinate of a level along depth, height and width: what it adds to the index of its label, by
/// `floor((i + 0.5) in / out)`.
fn axis_table(dims: [usize; 3], level: [usize; 3]) -> Vec<u32> {
    let strides = [dims[1] * dims[2], dims[2], 1];
    (0..3)
        .flat_map(|a| (0..level[a]).map(move |i| ((2 * i + 1) * dims[a] / (2 * level[a]) * strides[a]) as u32))
        .collect()
}

fn region_table(target: &Target) -> Vec<u32> {
    let Target::Regions { regions, .. } = target else { return vec![0] };
    let words = regions.len().div_ceil(32);
    let mut table = vec![0; 257 * words];
    for (region, labels) in regions.iter().enumerate() {
        for label in labels {
            table[usize::from(*label) * words + region / 32] |= 1 << (region % 32);
        }
    }
    table
}

/// How the kernels walk; a part of what they are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Plan {
    /// Channels of the logits.
    classes: usize,
    /// Units that share a chunk: 1 where units are threads.
    walkers: usize,
    /// Groups of ignored voxels are not read.
    skip: bool,
    /// The level has the label map's resolution.
    full: bool,
    /// The loop over classes is unrolled and its sums are registers.
    unroll: bool,
    /// The labelled class of a voxel is looked up, instead of compared with every class.
    per_voxel: bool,
}

/// Up to this many classes a comparison with each is cheaper than looking up the labelled one.
const COMPARED_CLASSES: usize = 8;

impl Plan {
    fn new(problem: &Problem, level: usize, caps: &Caps) -> Self {
        let classes = problem.settings.target.channels();
        let threads = caps.cores.is_some();
        Self {
            classes,
            walkers: if threads { 1 } else { caps.cube_units() as usize },
            skip: problem.settings.ignore.is_some(),
            full: problem.levels[level].dims == problem.dims,
            unroll: classes <= if threads { 4 } else { 16 },
            per_voxel: classes > if threads { COMPARED_CLASSES } else { 16 },
        }
    }

    /// Voxels that a unit handles at once.
    fn lanes(&self, caps: &Caps) -> usize {
        if self.walkers == 1 { caps.lanes.next_power_of_two().clamp(4, 16) } else { 1 }
    }
}

/// Units of the kernels over chunks: more than cores, since chunks without annotation are done at once and
/// the runtime gives the next unit to the core that is free.
const UNITS_PER_CORE: u32 = 4;

/// The loss and its gradient with respect to the logits of all levels.
///
/// * `labels`: u8, `[batch, depth, height, width]`.
/// * `logits`, `gradients`: one for each level of the problem, `[batch, depth, height, width, classes]` of that
///   level; those of a level of weight 0 are neither checked nor touched.
/// * `scale`: factor on the gradient alone, for f16 training; else 1.
/// * `loss`: f32, [`Problem::loss_len`] values, overwritten, each summed over the levels with their weights:
///   `[total, ce or bce, dice, Dice coefficient of each class]`. `ce` and `dice` (negative, -1 at best) are
///   without `weight_ce` and `weight_dice`. For labels the coefficients begin with class 1, for regions with
///   the first. Without `batch_dice` they are the means over the samples.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] for a buffer that does not fit, [`KernelError::Unsupported`]
/// for f16 or bf16 logits on a device without.
pub fn value_and_gradient(
    context: &Context,
    problem: &Problem,
    labels: &Buffer,
    logits: &[&Buffer],
    gradients: &[Gradient],
    scale: f32,
    loss: &Buffer,
) -> Result<(), KernelError> {
    if gradients.len() != problem.levels.len() {
        let expected = problem.levels.len();
        return Err(KernelError::shape(OPERATION, "number of gradients", expected, gradients.len()));
    }
    check_buffers(context, problem, labels, logits, loss)?;
    for level in active(problem) {
        if let Gradient::Into(buffer) = gradients[level] {
            buffer.expect(OPERATION, "gradient", problem.logits_len(level), logits[level].dtype())?;
        }
    }
    for (i, level) in active(problem).enumerate() {
        let pass = Pass::new(context, problem, level, labels, logits[level])?;
        let (sums, counts) = pass.sums()?;
        let coefficients = pass.finish(&sums, &counts, loss, scale, i == 0)?;
        pass.gradient(&coefficients, gradients[level])?;
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
    labels: &Buffer,
    logits: &[&Buffer],
    loss: &Buffer,
) -> Result<(), KernelError> {
    check_buffers(context, problem, labels, logits, loss)?;
    for (i, level) in active(problem).enumerate() {
        let pass = Pass::new(context, problem, level, labels, logits[level])?;
        let (sums, counts) = pass.sums()?;
        pass.finish(&sums, &counts, loss, 1.0, i == 0)?;
    }
    Ok(())
}

fn active(problem: &Problem) -> impl Iterator<Item = usize> {
    (0..problem.levels.len()).filter(|level| problem.levels[*level].weight > 0.0)
}

fn check_buffers(
    context: &Context,
    problem: &Problem,
    labels: &Buffer,
    logits: &[&Buffer],
    loss: &Buffer,
) -> Result<(), KernelError> {
    if logits.len() != problem.levels.len() {
        let expected = problem.levels.len();
        return Err(KernelError::shape(OPERATION, "number of logit buffers", expected, logits.len()));
    }
    let voxels: usize = problem.dims.iter().product();
    labels.expect(OPERATION, "labels", problem.batch * voxels, Dtype::U8)?;
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

/// The launches of one level.
struct Pass<'a> {
    context: &'a Context,
    problem: &'a Problem,
    level: usize,
    labels: &'a Buffer,
    logits: &'a Buffer,
    plan: Plan,
    lanes: usize,
    units: u32,
    count: CubeCount,
}

impl<'a> Pass<'a> {
    fn new(
        context: &'a Context,
        problem: &'a Problem,
        level: usize,
        labels: &'a Buffer,
        logits: &'a Buffer,
    ) -> Result<Self, KernelError> {
        let caps = context.caps();
        let plan = Plan::new(problem, level, caps);
        let chunks = problem.voxels(level).div_ceil(CHUNK) * problem.batch;
        let (units, count) = match caps.cores {
            Some(cores) => {
                let units = (cores * UNITS_PER_CORE).min(chunks as u32);
                (units, CubeCount::Static(1, 1, 1))
            }
            None => {
                let units = plan.walkers as u32;
                (units, context.grid(OPERATION, chunks * plan.walkers, units)?)
            }
        };
        Ok(Self { context, problem, level, labels, logits, lanes: plan.lanes(caps), plan, units, count })
    }

    fn extent(&self) -> ExtentLaunch {
        let [depth, height, width] = self.problem.levels[self.level].dims.map(|d| d as u32);
        let settings = &self.problem.settings;
        ExtentLaunch::new(
            self.problem.batch,
            self.problem.voxels(self.level),
            self.problem.dims.iter().product(),
            depth,
            height,
            width,
            settings.target.labels() as u32,
            settings.ignore.map_or(u32::MAX, u32::from),
        )
    }

    /// Pass 1 and the first half of pass 2: per-sample sums and counts.
    fn sums(&self) -> Result<(Buffer, Buffer), KernelError> {
        let (context, problem, plan) = (self.context, self.problem, self.plan);
        let (sum_slots, count_slots) = (2 * plan.classes + 1, plan.classes + 1);
        let mut rows = plan.rows(problem.voxels(self.level));
        let mut sums = context.empty(problem.batch * rows * sum_slots, Dtype::F32)?;
        let mut counts = context.empty(problem.batch * rows * count_slots, Dtype::U32)?;
        let (client, dim) = (context.client(), CubeDim::new_1d(self.units));
        let (logits, labels, axes) = (self.logits.arg(), self.labels.arg(), self.problem.axes[self.level].arg());
        match problem.settings.target {
            Target::Labels { .. } => softmax::softmax_sums_kernel::launch(
                client,
                self.count.clone(),
                dim,
                self.lanes,
                logits,
                labels,
                axes,
                sums.arg(),
                counts.arg(),
                self.extent(),
                plan,
                self.logits.dtype().elem(),
            ),
            Target::Regions { .. } => sigmoid::sigmoid_sums_kernel::launch(
                client,
                self.count.clone(),
                dim,
                self.lanes,
                logits,
                labels,
                axes,
                problem.regions.arg(),
                sums.arg(),
                counts.arg(),
                self.extent(),
                plan,
                self.logits.dtype().elem(),
            ),
        }
        context.launched();

        // A GPU's unit adds few rows, a thread adds them all.
        let group = if context.caps().cores.is_some() { rows } else { 128 };
        while rows > 1 {
            let groups = rows.div_ceil(group);
            let reduced_sums = context.empty(problem.batch * groups * sum_slots, Dtype::F32)?;
            let reduced_counts = context.empty(problem.batch * groups * count_slots, Dtype::U32)?;
            let units = context.caps().cube_units();
            let count = match context.caps().cores {
                Some(_) => CubeCount::Static(1, 1, 1),
                None => context.grid(OPERATION, problem.batch * groups * (sum_slots + count_slots), units)?,
            };
            reduce_kernel::launch(
                client,
                count,
                CubeDim::new_1d(units),
                sums.arg(),
                counts.arg(),
                reduced_sums.arg(),
                reduced_counts.arg(),
                problem.batch,
                rows,
                group,
                sum_slots,
                count_slots,
            );
            context.launched();
            (sums, counts, rows) = (reduced_sums, reduced_counts, groups);
        }
        Ok((sums, counts))
    }

    /// The second half of pass 2: the loss, and the coefficients of the gradient.
    fn finish(
        &self,
        sums: &Buffer,
        counts: &Buffer,
        loss: &Buffer,
        scale: f32,
        overwrite: bool,
    ) -> Result<Buffer, KernelError> {
        let (context, problem, plan) = (self.context, self.problem, self.plan);
        let settings = &problem.settings;
        let coefficients = context.empty(2 * problem.batch * plan.classes + 1, Dtype::F32)?;
        let finish = Finish {
            classes: plan.classes,
            first_dice: settings.target.first_dice(),
            batch_dice: settings.batch_dice,
            channel_mean: matches!(settings.target, Target::Regions { .. }) && settings.ignore.is_none(),
            overwrite,
        };
        let weights = WeightsLaunch::new(
            problem.batch,
            problem.levels[self.level].weight,
            settings.weight_ce,
            settings.weight_dice,
            settings.smooth,
            scale,
        );
        let (units, count) = match context.caps().cores {
            Some(_) => (1, CubeCount::Static(1, 1, 1)),
            None => {
                let units = context.caps().cube_units();
                (units, context.grid(OPERATION, plan.classes + 1, units)?)
            }
        };
        finish_kernel::launch(
            context.client(),
            count,
            CubeDim::new_1d(units),
            sums.arg(),
            counts.arg(),
            coefficients.arg(),
            loss.arg(),
            weights,
            finish,
        );
        context.launched();
        Ok(coefficients)
    }

    /// Pass 3.
    fn gradient(&self, coefficients: &Buffer, gradient: Gradient) -> Result<(), KernelError> {
        let (client, dim) = (self.context.client(), CubeDim::new_1d(self.units));
        let (logits, labels, axes) = (self.logits.arg(), self.labels.arg(), self.problem.axes[self.level].arg());
        let gradient = match gradient {
            Gradient::Into(buffer) => buffer.arg(),
            // The logits are the first argument of both kernels.
            Gradient::InPlace => BufferArg::Alias { input_pos: 0, length: [self.logits.len()] },
        };
        match self.problem.settings.target {
            Target::Labels { .. } => softmax::softmax_gradient_kernel::launch(
                client,
                self.count.clone(),
                dim,
                self.lanes,
                logits,
                labels,
                axes,
                coefficients.arg(),
                gradient,
                self.extent(),
                self.plan,
                self.logits.dtype().elem(),
            ),
            Target::Regions { .. } => sigmoid::sigmoid_gradient_kernel::launch(
                client,
                self.count.clone(),
                dim,
                self.lanes,
                logits,
                labels,
                axes,
                self.problem.regions.arg(),
                coefficients.arg(),
                gradient,
                self.extent(),
                self.plan,
                self.logits.dtype().elem(),
            ),
        }
        self.context.launched();
        Ok(())
    }
}
