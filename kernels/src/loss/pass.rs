//! The launches of a loss.

use super::finish::{Finish, NumbersLaunch, TotalsLaunch, finish_kernel, reduce_kernel};
use super::plan::{Plan, TAIL, Weighting};
use super::problem::Reduction;
use super::walk::GridLaunch;
use super::{
    Annotation, Entropy, Gradient, OPERATION, Problem, cube_sigmoid, cube_softmax, owned, sigmoid, softmax, top_k,
};
use crate::{Buffer, Context, Dtype, KernelError, Work};
use cubecl::ir::ElemType;
use cubecl::prelude::*;

/// More units than cores, since chunks without annotation are done at once: the runtime gives the next unit to
/// the core that is free.
const UNITS_PER_CORE: u32 = 4;

/// The launches for one batch.
pub(super) struct Pass<'a> {
    context: &'a Context,
    problem: &'a Problem,
    labels: &'a Buffer,
    /// Of the voxels; where they have none something that is not read.
    weights: &'a Buffer,
    /// Of the active levels.
    logits: Vec<&'a Buffer>,
    /// The label (region) that a channel stands for; where no class is missing something that is not read.
    acting: Buffer,
    plan: Plan,
}

/// What pass 1 leaves behind.
pub(super) struct Sums {
    /// `[levels, batch]` rows.
    totals: Buffer,
    /// Where units own channels, `log sum exp` of every voxel.
    normalisers: Buffer,
    /// Where only the largest cross-entropies count: that of every voxel, their sums by label and what was selected.
    entropies: Buffer,
    largest: Buffer,
    selection: Buffer,
}

impl<'a> Pass<'a> {
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

    fn grid(&self) -> GridLaunch {
        let problem = self.problem;
        GridLaunch::new(
            problem.level_table.arg(),
            problem.axes.arg(),
            self.acting.arg(),
            problem.regions.arg(),
            problem.batch,
            problem.dims.iter().product(),
            problem.chunks,
            problem.voxels,
        )
    }

    fn logits<T: LaunchArg<RuntimeArg = BufferArg>>(&self) -> SequenceArg<T> {
        let mut sequence = SequenceArg::new();
        self.logits.iter().for_each(|logits| sequence.push(logits.arg()));
        sequence
    }

    fn types(&self) -> (ElemType, ElemType, ElemType) {
        (self.logits[0].dtype().elem(), self.labels.dtype().elem(), self.weights.dtype().elem())
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
        let normalisers = self.scratch(plan.owned && !plan.regions, problem.voxels)?;
        if plan.owned {
            self.owned_sums(&rows, &normalisers, &entropies)?;
        } else if plan.walkers > 1 {
            self.cube_sums(&rows, &entropies)?;
        } else {
            self.chunk_sums(&rows, &entropies)?;
        }
        let totals = self.reduce(rows, plan.slots(), &problem.reduction)?;
        let (largest, selection) = if plan.top_k { self.select_largest(&entropies)? } else { self.nothing_selected()? };
        Ok(Sums { totals, normalisers, entropies, largest, selection })
    }

    fn chunk_sums(&self, rows: &Buffer, entropies: &Buffer) -> Result<(), KernelError> {
        let plan = self.plan;
        let lanes = plan.lanes(self.context.caps());
        let (e, l, w) = self.types();
        self.context.launch(OPERATION, self.chunk_work(plan.walkers), |client, count, dim| {
            if plan.regions {
                sigmoid::sigmoid_sums_kernel::launch(
                    client,
                    count,
                    dim,
                    lanes,
                    self.logits(),
                    self.labels.arg(),
                    self.weights.arg(),
                    self.grid(),
                    rows.arg(),
                    plan,
                    e,
                    l,
                    w,
                );
            } else {
                softmax::softmax_sums_kernel::launch(
                    client,
                    count,
                    dim,
                    lanes,
                    self.logits(),
                    self.labels.arg(),
                    self.weights.arg(),
                    self.grid(),
                    rows.arg(),
                    entropies.arg(),
                    plan,
                    e,
                    l,
                    w,
                );
            }
        })
    }

    fn cube_sums(&self, rows: &Buffer, entropies: &Buffer) -> Result<(), KernelError> {
        let plan = self.plan;
        let (e, l, w) = self.types();
        self.context.launch(OPERATION, self.chunk_work(plan.walkers), |client, count, dim| {
            if plan.regions {
                cube_sigmoid::cube_sigmoid_sums_kernel::launch(
                    client,
                    count,
                    dim,
                    plan.vector,
                    self.logits(),
                    self.labels.arg(),
                    self.weights.arg(),
                    self.grid(),
                    rows.arg(),
                    plan,
                    e,
                    l,
                    w,
                );
            } else {
                cube_softmax::cube_softmax_sums_kernel::launch(
                    client,
                    count,
                    dim,
                    plan.vector,
                    self.logits(),
                    self.labels.arg(),
                    self.weights.arg(),
                    self.grid(),
                    rows.arg(),
                    entropies.arg(),
                    plan,
                    e,
                    l,
                    w,
                );
            }
        })
    }

    fn owned_sums(&self, rows: &Buffer, normalisers: &Buffer, entropies: &Buffer) -> Result<(), KernelError> {
        let plan = self.plan;
        let (e, l, w) = self.types();
        if !plan.regions {
            self.context.launch(OPERATION, Work::Items(self.problem.voxels), |client, count, dim| {
                owned::normaliser_kernel::launch(
                    client,
                    count,
                    dim,
                    self.logits(),
                    self.labels.arg(),
                    self.weights.arg(),
                    self.grid(),
                    normalisers.arg(),
                    entropies.arg(),
                    plan,
                    e,
                    l,
                    w,
                );
            })?;
        }
        self.context.launch(OPERATION, self.chunk_work(plan.walkers), |client, count, dim| {
            owned::owned_sums_kernel::launch(
                client,
                count,
                dim,
                self.logits(),
                self.labels.arg(),
                self.weights.arg(),
                self.grid(),
                normalisers.arg(),
                rows.arg(),
                plan,
                e,
                l,
                w,
            );
        })
    }

    /// Adds rows up until one is left for each level and sample.
    fn reduce(&self, mut rows: Buffer, slots: usize, steps: &[Reduction]) -> Result<Buffer, KernelError> {
        for step in steps {
            let totals = self.context.empty(step.count * slots, Dtype::F32)?;
            self.context.launch(OPERATION, Work::Items(step.count * slots), |client, count, dim| {
                reduce_kernel::launch(
                    client,
                    count,
                    dim,
                    rows.arg(),
                    step.ranges.arg(),
                    totals.arg(),
                    step.count,
                    slots,
                );
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
        let counting = Plan { walkers: if threads { 1 } else { context.caps().cube_units() as usize }, ..plan };
        for shift in top_k::SHIFTS {
            context.launch(OPERATION, self.chunk_work(counting.walkers), |client, count, dim| {
                top_k::histogram_kernel::launch(
                    client,
                    count,
                    dim,
                    entropies.arg(),
                    self.grid(),
                    state.arg(),
                    histograms.arg(),
                    shift,
                    counting,
                );
            })?;
            context.launch(OPERATION, Work::Items(plan.levels), |client, count, dim| {
                top_k::select_kernel::launch(
                    client,
                    count,
                    dim,
                    histograms.arg(),
                    state.arg(),
                    selection.arg(),
                    shift,
                    plan.levels,
                );
            })?;
        }
        let rows = context.empty(self.problem.chunks * plan.classes, Dtype::F32)?;
        let (_, l, w) = self.types();
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
    pub(super) fn finish(&self, sums: &Sums, loss: &Buffer, scale: f32) -> Result<Buffer, KernelError> {
        let (context, problem, plan) = (self.context, self.problem, self.plan);
        let settings = &problem.settings;
        let of_level = 2 * problem.batch * plan.classes + TAIL;
        let coefficients = context.empty(plan.levels * of_level, Dtype::F32)?;
        let finish = Finish {
            plan,
            first_dice: settings.first_dice(),
            batch_dice: settings.dice.batch,
            clip: settings.dice.clip_tp.is_some(),
            over_regions: plan.regions && (settings.ignore.is_empty() || settings.entropy == Entropy::MeanOverRegions),
        };
        let numbers = NumbersLaunch::new(
            problem.batch,
            settings.weight_ce,
            settings.weight_dice,
            settings.dice.smooth,
            settings.dice.clip_tp.unwrap_or(0.0),
            scale,
        );
        let totals = TotalsLaunch::new(
            sums.totals.arg(),
            sums.largest.arg(),
            sums.selection.arg(),
            problem.level_numbers.arg(),
            self.acting.arg(),
        );
        // A thread is faster than two for so little.
        let work = match context.caps().cores {
            Some(_) => Work::units(1, 1),
            // Small cubes: for larger ones NVIDIA's assembler keeps to half of the registers and spills.
            None => Work::units(plan.classes + 1, 32),
        };
        context.launch(OPERATION, work, |client, count, dim| {
            finish_kernel::launch(client, count, dim, totals, coefficients.arg(), loss.arg(), numbers, finish);
        })?;
        Ok(coefficients)
    }

    /// Pass 3.
    pub(super) fn gradient(
        &self,
        sums: &Sums,
        coefficients: &Buffer,
        gradients: &[Gradient],
    ) -> Result<(), KernelError> {
        let plan = self.plan;
        if plan.owned {
            return self.owned_gradient(sums, coefficients, gradients);
        }
        if plan.walkers > 1 {
            return self.cube_gradient(sums, coefficients, gradients);
        }
        let lanes = plan.lanes(self.context.caps());
        let (e, l, w) = self.types();
        self.context.launch(OPERATION, self.chunk_work(plan.walkers), |client, count, dim| {
            if plan.regions {
                sigmoid::sigmoid_gradient_kernel::launch(
                    client,
                    count,
                    dim,
                    lanes,
                    self.logits(),
                    self.labels.arg(),
                    self.weights.arg(),
                    self.grid(),
                    coefficients.arg(),
                    self.gradients(gradients),
                    plan,
                    e,
                    l,
                    w,
                );
            } else {
                softmax::softmax_gradient_kernel::launch(
                    client,
                    count,
                    dim,
                    lanes,
                    self.logits(),
                    self.labels.arg(),
                    self.weights.arg(),
                    self.grid(),
                    coefficients.arg(),
                    sums.entropies.arg(),
                    self.gradients(gradients),
                    plan,
                    e,
                    l,
                    w,
                );
            }
        })
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

    fn owned_gradient(&self, sums: &Sums, coefficients: &Buffer, gradients: &[Gradient]) -> Result<(), KernelError> {
        let (plan, voxels) = (self.plan, self.problem.voxels);
        let (e, l, w) = self.types();
        let means = self.scratch(!plan.regions, if plan.missing { 2 * voxels } else { voxels })?;
        if !plan.regions {
            self.context.launch(OPERATION, Work::Items(voxels), |client, count, dim| {
                owned::mean_kernel::launch(
                    client,
                    count,
                    dim,
                    self.logits(),
                    self.labels.arg(),
                    self.weights.arg(),
                    self.grid(),
                    sums.normalisers.arg(),
                    coefficients.arg(),
                    means.arg(),
                    plan,
                    e,
                    l,
                    w,
                );
            })?;
        }
        self.context.launch(OPERATION, Work::Items(voxels * plan.classes), |client, count, dim| {
            owned::owned_gradient_kernel::launch(
                client,
                count,
                dim,
                self.logits(),
                self.labels.arg(),
                self.weights.arg(),
                self.grid(),
                sums.normalisers.arg(),
                means.arg(),
                coefficients.arg(),
                sums.entropies.arg(),
                self.gradients(gradients),
                plan,
                e,
                l,
                w,
            );
        })
    }

    fn cube_gradient(&self, sums: &Sums, coefficients: &Buffer, gradients: &[Gradient]) -> Result<(), KernelError> {
        let plan = self.plan;
        let (e, l, w) = self.types();
        self.context.launch(OPERATION, self.chunk_work(plan.walkers), |client, count, dim| {
            if plan.regions {
                cube_sigmoid::cube_sigmoid_gradient_kernel::launch(
                    client,
                    count,
                    dim,
                    plan.vector,
                    self.logits(),
                    self.labels.arg(),
                    self.weights.arg(),
                    self.grid(),
                    coefficients.arg(),
                    self.gradients(gradients),
                    plan,
                    e,
                    l,
                    w,
                );
            } else {
                cube_softmax::cube_softmax_gradient_kernel::launch(
                    client,
                    count,
                    dim,
                    plan.vector,
                    self.logits(),
                    self.labels.arg(),
                    self.weights.arg(),
                    self.grid(),
                    coefficients.arg(),
                    sums.entropies.arg(),
                    self.gradients(gradients),
                    plan,
                    e,
                    l,
                    w,
                );
            }
        })
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
