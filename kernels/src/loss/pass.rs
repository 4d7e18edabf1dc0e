//! The launches of a loss.

use super::finish::{Finish, FinishNumbersLaunch, TotalsLaunch, finish_kernel, reduce_kernel};
use super::plan::{LossPlan, TAIL, Weighting};
use super::problem::{Problem, Reduction};
use super::settings::{Annotation, Entropy, OPERATION};
use super::walk::LevelGridLaunch;
use super::{cube_sigmoid, cube_softmax, sigmoid, softmax, top_k};
use crate::{Buffer, Context, Dtype, KernelError, Scale, Work, elementwise};
use cubecl::prelude::*;

/// Where the gradient of a level goes.
#[derive(Clone, Copy, Debug)]
pub enum Gradient<'a> {
    /// Into a buffer of its own, of the shape and type of the logits and sharing no memory with them.
    Into(&'a Buffer),
    /// Over the logits.
    InPlace,
}

/// More units than cores, since chunks without annotation are done at once: the runtime gives the next unit to
/// the core that is free.
const UNITS_PER_CORE: u32 = 4;

/// Launches one of the kernels over chunks. All of them begin with logits, what is known about the voxels, and how units
/// walk over them, and are compiled for a plan and the types of logits, labels and weights. A macro, since CubeCL gives the
/// arguments of each kernel types of their own.
macro_rules! over_chunks {
    ($pass:expr, $width:expr, $file:ident::$kernel:ident, $($argument:expr),+) => {{
        let pass: &LossPass = $pass;
        pass.context.launch(OPERATION, pass.chunk_work(pass.plan.walkers), |client, count, dim| {
            let [e, l, w] = [pass.logits[0], pass.labels, pass.weights].map(|buffer| buffer.dtype().elem());
            $file::$kernel::launch(
                client,
                count,
                dim,
                $width,
                pass.logits(),
                pass.labels.arg(),
                pass.weights.arg(),
                pass.grid(),
                $($argument,)+
                pass.plan,
                e,
                l,
                w,
            );
        })
    }};
}

/// The launches for one batch.
pub(super) struct LossPass<'a> {
    context: &'a Context,
    problem: &'a Problem,
    labels: &'a Buffer,
    /// Of the voxels; where they have none something that is not read.
    weights: &'a Buffer,
    /// Of the active levels.
    logits: Vec<&'a Buffer>,
    /// The label (region) that a channel stands for; where no class is missing something that is not read.
    acting: Buffer,
    plan: LossPlan,
}

/// What pass 1 leaves behind.
pub(super) struct Sums {
    /// `[levels, batch]` rows.
    totals: Buffer,
    /// Where only the largest cross-entropies count: that of every voxel, their sums by label and what was selected.
    entropies: Buffer,
    largest: Buffer,
    selection: Buffer,
}

impl<'a> LossPass<'a> {
    /// Buffers are checked by the caller.
    pub(super) fn new(
        context: &'a Context,
        problem: &'a Problem,
        annotation: &Annotation<'a>,
        logits: &[&'a Buffer],
    ) -> Result<Self, KernelError> {
        let weighting = match annotation.weights.map(Buffer::dtype) {
            None => Weighting::None,
            Some(Dtype::U8) => Weighting::Bytes,
            Some(_) => Weighting::Floats,
        };
        let acting = match annotation.missing {
            Some(missing) => context.upload(&acting(problem, missing), Dtype::U32)?,
            None => problem.regions.clone(),
        };
        Ok(Self {
            context,
            problem,
            labels: annotation.labels,
            weights: annotation.weights.unwrap_or(annotation.labels),
            logits: problem.active.iter().map(|level| logits[*level]).collect(),
            acting,
            plan: problem.plan.annotated(weighting, annotation.missing.is_some()),
        })
    }

    fn grid(&self) -> LevelGridLaunch {
        let problem = self.problem;
        LevelGridLaunch::new(
            problem.level_table.arg(),
            problem.axes.arg(),
            self.acting.arg(),
            problem.regions.arg(),
            problem.batch,
            problem.dims.iter().product(),
            problem.chunks,
        )
    }

    fn logits<T: LaunchArg<RuntimeArg = BufferArg>>(&self) -> SequenceArg<T> {
        let mut sequence = SequenceArg::new();
        self.logits.iter().for_each(|logits| sequence.push(logits.arg()));
        sequence
    }

    /// The work of the kernels over chunks, of which a unit or a cube takes one.
    fn chunk_work(&self, walkers: usize) -> Work {
        match self.context.caps().cores {
            // As many units for few chunks too: kernels are compiled for a number of units.
            Some(cores) => Work::Cubes(1, CubeDim::new_1d(cores * UNITS_PER_CORE)),
            None if walkers == 1 => Work::Items(self.problem.chunks),
            None => Work::units(self.problem.chunks * walkers, walkers as u32),
        }
    }

    /// A buffer of `len` values where a kernel needs it, else something to pass.
    fn scratch(&self, needed: bool, len: usize) -> Result<Buffer, KernelError> {
        self.context.empty(if needed { len } else { 1 }, Dtype::F32)
    }

    /// Pass 1 and the first half of pass 2: the sums of each level and sample.
    pub(super) fn sums(&self) -> Result<Sums, KernelError> {
        let (problem, plan) = (self.problem, self.plan);
        let rows = self.context.empty(problem.chunks * plan.slots(), Dtype::F32)?;
        let entropies = self.scratch(plan.top_k, problem.voxels)?;
        let width = plan.lanes(self.context.caps());
        // A unit takes chunks of its own, or a cube of units shares one.
        match (plan.regions, plan.walkers) {
            (true, 1) => over_chunks!(self, width, sigmoid::sigmoid_sums_kernel, rows.arg()),
            (false, 1) => over_chunks!(self, width, softmax::softmax_sums_kernel, rows.arg(), entropies.arg()),
            (true, _) => over_chunks!(self, plan.vector, cube_sigmoid::cube_sigmoid_sums_kernel, rows.arg()),
            (false, _) => {
                over_chunks!(self, plan.vector, cube_softmax::cube_softmax_sums_kernel, rows.arg(), entropies.arg())
            }
        }?;
        let totals = self.reduce(rows, plan.slots(), &problem.reduction)?;
        let (largest, selection) = if plan.top_k { self.select_largest(&entropies)? } else { self.nothing_selected()? };
        Ok(Sums { totals, entropies, largest, selection })
    }

    /// Adds rows up until one is left for each level and sample.
    fn reduce(&self, mut rows: Buffer, slots: usize, steps: &[Reduction]) -> Result<Buffer, KernelError> {
        for step in steps {
            let totals = self.context.empty(step.count * slots, Dtype::F32)?;
            self.context.launch(OPERATION, Work::Items(step.count * slots), |client, count, dim| {
                let (rows, ranges) = (rows.arg(), step.ranges.arg());
                reduce_kernel::launch(client, count, dim, rows, ranges, totals.arg(), step.count, slots);
            })?;
            rows = totals;
        }
        Ok(rows)
    }

    fn nothing_selected(&self) -> Result<(Buffer, Buffer), KernelError> {
        Ok((self.scratch(false, 0)?, self.context.empty(1, Dtype::U32)?))
    }

    /// The sums of the largest cross-entropies by level, sample and label, and which they are.
    fn select_largest(&self, entropies: &Buffer) -> Result<(Buffer, Buffer), KernelError> {
        let (context, plan) = (self.context, self.plan);
        let histograms = context.upload(&vec![0u32; plan.levels * top_k::BINS], Dtype::U32)?;
        let state = context.upload(&self.problem.searches, Dtype::U32)?;
        let selection = context.empty(2 * plan.levels, Dtype::U32)?;
        // A histogram for each unit is for threads only.
        let threads = context.caps().cores.is_some();
        let counting = LossPlan { walkers: if threads { 1 } else { context.caps().cube_units() as usize }, ..plan };
        for shift in top_k::SHIFTS {
            context.launch(OPERATION, self.chunk_work(counting.walkers), |client, count, dim| {
                let (state, histograms) = (state.arg(), histograms.arg());
                let (entropies, grid) = (entropies.arg(), self.grid());
                top_k::histogram_kernel::launch(
                    client, count, dim, entropies, grid, state, histograms, shift, counting,
                );
            })?;
            context.launch(OPERATION, Work::Items(plan.levels), |client, count, dim| {
                let (histograms, state, selection) = (histograms.arg(), state.arg(), selection.arg());
                top_k::select_kernel::launch(client, count, dim, histograms, state, selection, shift, plan.levels);
            })?;
        }
        let rows = context.empty(self.problem.chunks * plan.classes, Dtype::F32)?;
        let [l, w] = [self.labels, self.weights].map(|buffer| buffer.dtype().elem());
        context.launch(OPERATION, Work::Items(self.problem.chunks), |client, count, dim| {
            top_k::largest_kernel::launch(
                client,
                count,
                dim,
                self.labels.arg(),
                self.weights.arg(),
                self.grid(),
                entropies.arg(),
                selection.arg(),
                rows.arg(),
                plan,
                l,
                w,
            );
        })?;
        Ok((self.reduce(rows, plan.classes, &self.problem.reduction)?, selection))
    }

    /// The second half of pass 2: the loss, and the coefficients of the gradient.
    pub(super) fn finish(&self, sums: &Sums, loss: &Buffer, scale: Scale) -> Result<Buffer, KernelError> {
        let (context, problem, plan) = (self.context, self.problem, self.plan);
        let settings = &problem.settings;
        let of_level = 2 * problem.batch * plan.classes + TAIL;
        let coefficients = context.empty(plan.levels * of_level, Dtype::F32)?;
        if scale.is_dynamic() {
            // All of them are multiplied by it, also those that nobody reads and `finish` leaves out.
            elementwise::fill(context, &coefficients, 0.0)?;
        }
        let finish = Finish {
            plan,
            first_dice: settings.first_dice(),
            batch_dice: settings.dice.batch,
            clip: settings.dice.clip_tp.is_some(),
            over_regions: plan.regions && (settings.ignore.is_empty() || settings.entropy == Entropy::MeanOverRegions),
        };
        let work = match context.caps().cores {
            // A thread is faster than two for so little.
            Some(_) => Work::Cubes(1, CubeDim::new_1d(1)),
            // Small cubes: for larger ones NVIDIA's assembler keeps to half of the registers and spills.
            None => Work::units(plan.classes + 1, 32),
        };
        context.launch(OPERATION, work, |client, count, dim| {
            let numbers = FinishNumbersLaunch::new(
                problem.batch,
                settings.weight_ce,
                settings.weight_dice,
                settings.dice.smooth,
                settings.dice.clip_tp.unwrap_or(0.0),
                if let Scale::Fixed(scale) = scale { scale } else { 1.0 },
            );
            let totals = TotalsLaunch::new(
                sums.totals.arg(),
                sums.largest.arg(),
                sums.selection.arg(),
                problem.level_numbers.arg(),
                self.acting.arg(),
            );
            finish_kernel::launch(client, count, dim, totals, coefficients.arg(), loss.arg(), numbers, finish);
        })?;
        if let Scale::Dynamic(scale) = scale {
            // The gradient is linear in them.
            scale.apply(context, &coefficients)?;
        }
        Ok(coefficients)
    }

    /// Pass 3.
    pub(super) fn gradient(
        &self,
        sums: &Sums,
        coefficients: &Buffer,
        gradients: &[Gradient],
    ) -> Result<(), KernelError> {
        let (plan, width) = (self.plan, self.plan.lanes(self.context.caps()));
        match (plan.regions, plan.walkers) {
            (true, 1) => {
                over_chunks!(
                    self,
                    width,
                    sigmoid::sigmoid_gradient_kernel,
                    coefficients.arg(),
                    self.gradients(gradients)
                )
            }
            (false, 1) => over_chunks!(
                self,
                width,
                softmax::softmax_gradient_kernel,
                coefficients.arg(),
                sums.entropies.arg(),
                self.gradients(gradients)
            ),
            (true, _) => over_chunks!(
                self,
                plan.vector,
                cube_sigmoid::cube_sigmoid_gradient_kernel,
                coefficients.arg(),
                self.gradients(gradients)
            ),
            (false, _) => over_chunks!(
                self,
                plan.vector,
                cube_softmax::cube_softmax_gradient_kernel,
                coefficients.arg(),
                sums.entropies.arg(),
                self.gradients(gradients)
            ),
        }
    }

    /// The buffers of the active levels' gradients.
    fn gradients<T: LaunchArg<RuntimeArg = BufferArg>>(&self, gradients: &[Gradient]) -> SequenceArg<T> {
        let mut sequence = SequenceArg::new();
        for (position, level) in self.problem.active.iter().enumerate() {
            sequence.push(match gradients[*level] {
                Gradient::Into(buffer) => buffer.arg(),
                // The logits are the first arguments of all kernels.
                Gradient::InPlace => BufferArg::alias(position, self.logits[position].len()),
            });
        }
        sequence
    }
}

/// For every sample the label (region) that each channel stands for, and behind them the number of channels.
fn acting(problem: &Problem, missing: &[u32]) -> Vec<u32> {
    let plan = &problem.plan;
    let words = plan.classes.div_ceil(32);
    // A missing class stands for the background, a missing region for none.
    let instead = if plan.regions { u32::MAX } else { 0 };
    let channel = |sample: usize, c: usize| {
        let gone = missing[sample * words + c / 32] >> (c % 32) & 1 == 1;
        if gone { instead } else { c as u32 }
    };
    (0..problem.batch)
        .flat_map(|sample| (0..plan.classes).map(move |c| channel(sample, c)).chain([plan.classes as u32]))
        .collect()
}
