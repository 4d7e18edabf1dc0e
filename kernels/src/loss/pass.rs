//! The plan of a level's kernels, and their launches.

use super::finish::{Finish, WeightsLaunch, finish_kernel, reduce_kernel};
use super::owned::{self, OWNED_CHUNK};
use super::walk::{CHUNK, ExtentLaunch};
use super::{Gradient, LossSettings, OPERATION, Problem, Target, sigmoid, softmax};
use crate::{Buffer, Caps, Context, Dtype, KernelError};
use cubecl::prelude::*;

/// What the kernels of a level are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    /// Channels of the logits.
    pub(super) classes: usize,
    /// The channels are regions.
    pub(super) regions: bool,
    /// Units that share a chunk: 1 where units are threads.
    pub(super) walkers: usize,
    /// Groups of ignored voxels are not read.
    pub(super) skip: bool,
    /// The level has the label map's resolution.
    pub(super) full: bool,
    /// The loop over classes is unrolled and its sums are registers.
    pub(super) unroll: bool,
    /// The labelled class of a voxel is looked up, instead of compared with every class.
    pub(super) per_voxel: bool,
}

/// Up to this many classes a thread compares each with the label, which is then cheaper than looking one up.
const COMPARED_CLASSES: usize = 8;
/// Up to this many classes a GPU's unit keeps the sums of all of them in registers.
const REGISTER_CLASSES: usize = 16;
/// More units than cores, since chunks without annotation are done at once: the runtime gives the next unit to
/// the core that is free.
const UNITS_PER_CORE: u32 = 4;
/// Rows that a GPU's unit adds up; a thread adds up all of them.
const ROWS_PER_UNIT: usize = 128;

impl Plan {
    fn new(settings: &LossSettings, full: bool, caps: &Caps) -> Self {
        let target = &settings.target;
        let classes = target.channels();
        let threads = caps.cores.is_some();
        Self {
            classes,
            regions: matches!(target, Target::Regions { .. }),
            walkers: if threads { 1 } else { caps.cube_units() as usize },
            skip: !settings.ignore.is_empty(),
            full,
            // Four classes of eight lanes are about 150 operations; more only cost compile time.
            unroll: classes <= if threads { 4 } else { REGISTER_CLASSES },
            per_voxel: threads && classes > COMPARED_CLASSES,
        }
    }

    /// The plan of the sums where a unit owns a channel: a multiple of 64 units, at least one a channel.
    fn owned(self, caps: &Caps) -> Option<Self> {
        let many = self.walkers > 1 && self.classes > REGISTER_CLASSES;
        let walkers = self.classes.next_multiple_of(64).min(caps.max_units as usize);
        (many && walkers >= self.classes).then_some(Self { walkers, ..self })
    }

    /// Voxels that a unit handles at once.
    fn lanes(&self, caps: &Caps) -> usize {
        if self.walkers == 1 { caps.lanes.next_power_of_two().clamp(4, 16) } else { 1 }
    }

    /// What a label that does not count becomes, larger than all that do.
    pub(super) fn none(&self) -> u32 {
        if self.regions { sigmoid::NONE } else { self.classes as u32 }
    }
}

/// The launches of one level.
pub(super) struct Pass<'a> {
    context: &'a Context,
    problem: &'a Problem,
    level: usize,
    labels: &'a Buffer,
    logits: &'a Buffer,
    plan: Plan,
    /// The same where a unit owns a channel.
    owned: Option<Plan>,
}

/// What the sums leave behind for the gradient.
pub(super) struct Sums {
    sums: Buffer,
    counts: Buffer,
    /// `log sum exp` of every voxel, where units own channels.
    normalisers: Option<Buffer>,
}

impl<'a> Pass<'a> {
    pub(super) fn new(
        context: &'a Context,
        problem: &'a Problem,
        level: usize,
        labels: &'a Buffer,
        logits: &'a Buffer,
    ) -> Self {
        let full = problem.levels[level].dims == problem.dims;
        let plan = Plan::new(&problem.settings, full, context.caps());
        Self { context, problem, level, labels, logits, plan, owned: plan.owned(context.caps()) }
    }

    fn voxels(&self) -> usize {
        self.problem.batch * self.problem.voxels(self.level)
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
            u32::MAX,
        )
    }

    fn axes(&self) -> BufferArg {
        self.problem.axes[self.level].arg()
    }

    fn elem(&self) -> cubecl::ir::ElemType {
        self.logits.dtype().elem()
    }

    /// Cubes and units of the kernels over chunks.
    fn chunk_grid(&self) -> Result<(CubeCount, CubeDim), KernelError> {
        match self.context.caps().cores {
            // As many units for few chunks too: kernels are compiled for a number of units.
            Some(cores) => Ok((CubeCount::Static(1, 1, 1), CubeDim::new_1d(cores * UNITS_PER_CORE))),
            None => {
                let chunks = self.problem.batch * self.problem.voxels(self.level).div_ceil(CHUNK);
                self.grid(chunks * self.plan.walkers, self.plan.walkers)
            }
        }
    }

    /// Cubes of `units` for one item a unit.
    fn grid(&self, items: usize, units: usize) -> Result<(CubeCount, CubeDim), KernelError> {
        Ok((self.context.grid(OPERATION, items, units as u32)?, CubeDim::new_1d(units as u32)))
    }

    /// Pass 1 and the first half of pass 2: sums and counts of each sample.
    pub(super) fn sums(&self) -> Result<Sums, KernelError> {
        let (rows, sums) = match self.owned {
            Some(plan) => self.owned_sums(plan)?,
            None => self.chunk_sums()?,
        };
        self.reduce(rows, sums)
    }

    fn empty_rows(&self, rows: usize) -> Result<(Buffer, Buffer), KernelError> {
        let rows = rows * self.problem.batch;
        let sums = self.context.empty(rows * self.sum_slots(), Dtype::F32)?;
        Ok((sums, self.context.empty(rows * (self.plan.classes + 1), Dtype::U32)?))
    }

    fn sum_slots(&self) -> usize {
        if self.owned.is_some() { 3 * self.plan.classes } else { 2 * self.plan.classes + 1 }
    }

    fn chunk_sums(&self) -> Result<(usize, Sums), KernelError> {
        let plan = self.plan;
        let rows = self.problem.voxels(self.level).div_ceil(CHUNK) * plan.walkers;
        let (sums, counts) = self.empty_rows(rows)?;
        let (count, dim) = self.chunk_grid()?;
        let (client, lanes) = (self.context.client(), plan.lanes(self.context.caps()));
        let (logits, labels) = (self.logits.arg(), self.labels.arg());
        if plan.regions {
            sigmoid::sigmoid_sums_kernel::launch(
                client,
                count,
                dim,
                lanes,
                logits,
                labels,
                self.axes(),
                self.problem.regions.arg(),
                sums.arg(),
                counts.arg(),
                self.extent(),
                plan,
                self.elem(),
            );
        } else {
            softmax::softmax_sums_kernel::launch(
                client,
                count,
                dim,
                lanes,
                logits,
                labels,
                self.axes(),
                sums.arg(),
                counts.arg(),
                self.extent(),
                plan,
                self.elem(),
            );
        }
        self.context.launched();
        Ok((rows, Sums { sums, counts, normalisers: None }))
    }

    fn owned_sums(&self, plan: Plan) -> Result<(usize, Sums), KernelError> {
        let chunks = self.problem.voxels(self.level).div_ceil(OWNED_CHUNK);
        let rows = chunks * (plan.walkers / plan.classes);
        let (sums, counts) = self.empty_rows(rows)?;
        let client = self.context.client();
        let normalisers = if plan.regions { 1 } else { self.voxels() };
        let normalisers = self.context.empty(normalisers, Dtype::F32)?;
        if !plan.regions {
            let (count, dim) = self.grid(self.voxels(), self.plan.walkers)?;
            owned::normaliser_kernel::launch(
                client,
                count,
                dim,
                self.logits.arg(),
                self.labels.arg(),
                self.axes(),
                normalisers.arg(),
                self.extent(),
                plan,
                self.elem(),
            );
            self.context.launched();
        }
        let (count, dim) = self.grid(self.problem.batch * chunks * plan.walkers, plan.walkers)?;
        owned::owned_sums_kernel::launch(
            client,
            count,
            dim,
            self.logits.arg(),
            self.labels.arg(),
            self.axes(),
            self.problem.regions.arg(),
            normalisers.arg(),
            sums.arg(),
            counts.arg(),
            self.extent(),
            plan,
            self.elem(),
        );
        self.context.launched();
        Ok((rows, Sums { sums, counts, normalisers: Some(normalisers) }))
    }

    /// Adds rows up until one is left for each sample.
    fn reduce(&self, mut rows: usize, mut sums: Sums) -> Result<Sums, KernelError> {
        let (context, batch, slots) = (self.context, self.problem.batch, self.sum_slots());
        let units = context.caps().cube_units();
        while rows > 1 {
            let group = if context.caps().cores.is_some() { rows } else { ROWS_PER_UNIT };
            let groups = rows.div_ceil(group);
            let (reduced_sums, reduced_counts) = self.empty_rows(groups)?;
            let count = match context.caps().cores {
                Some(_) => CubeCount::Static(1, 1, 1),
                None => context.grid(OPERATION, batch * groups * (slots + self.plan.classes + 1), units)?,
            };
            reduce_kernel::launch(
                context.client(),
                count,
                CubeDim::new_1d(units),
                sums.sums.arg(),
                sums.counts.arg(),
                reduced_sums.arg(),
                reduced_counts.arg(),
                batch,
                rows,
                group,
                slots,
                self.plan.classes + 1,
            );
            context.launched();
            (sums.sums, sums.counts, rows) = (reduced_sums, reduced_counts, groups);
        }
        Ok(sums)
    }

    /// The second half of pass 2: the loss, and the coefficients of the gradient.
    pub(super) fn finish(
        &self,
        sums: &Sums,
        loss: &Buffer,
        scale: f32,
        overwrite: bool,
    ) -> Result<Buffer, KernelError> {
        let (context, settings, classes) = (self.context, &self.problem.settings, self.plan.classes);
        let coefficients = context.empty(2 * self.problem.batch * classes + 1, Dtype::F32)?;
        let finish = Finish {
            classes,
            sum_slots: self.sum_slots(),
            first_dice: settings.first_dice(),
            batch_dice: settings.dice.batch,
            channel_mean: self.plan.regions && settings.ignore.is_empty(),
            overwrite,
        };
        let weights = WeightsLaunch::new(
            self.problem.batch,
            self.problem.levels[self.level].weight,
            settings.weight_ce,
            settings.weight_dice,
            settings.dice.smooth,
            scale,
        );
        // A thread is faster than two for so little.
        let (count, dim) = match context.caps().cores {
            Some(_) => (CubeCount::Static(1, 1, 1), CubeDim::new_1d(1)),
            None => self.grid(classes + 1, self.plan.walkers)?,
        };
        finish_kernel::launch(
            context.client(),
            count,
            dim,
            sums.sums.arg(),
            sums.counts.arg(),
            coefficients.arg(),
            loss.arg(),
            weights,
            finish,
        );
        context.launched();
        Ok(coefficients)
    }

    /// Pass 3.
    pub(super) fn gradient(&self, sums: &Sums, coefficients: &Buffer, gradient: Gradient) -> Result<(), KernelError> {
        let gradient = match gradient {
            Gradient::Into(buffer) => buffer.arg(),
            // The logits are the first argument of all kernels.
            Gradient::InPlace => BufferArg::Alias { input_pos: 0, length: [self.logits.len()] },
        };
        match (&sums.normalisers, self.owned) {
            (Some(normalisers), Some(plan)) if !plan.regions => {
                self.owned_gradient(plan, normalisers, coefficients, gradient)
            }
            _ => self.chunk_gradient(coefficients, gradient),
        }
    }

    fn chunk_gradient(&self, coefficients: &Buffer, gradient: BufferArg) -> Result<(), KernelError> {
        let plan = self.plan;
        let (count, dim) = self.chunk_grid()?;
        let (client, lanes) = (self.context.client(), plan.lanes(self.context.caps()));
        let (logits, labels) = (self.logits.arg(), self.labels.arg());
        if plan.regions {
            sigmoid::sigmoid_gradient_kernel::launch(
                client,
                count,
                dim,
                lanes,
                logits,
                labels,
                self.axes(),
                self.problem.regions.arg(),
                coefficients.arg(),
                gradient,
                self.extent(),
                plan,
                self.elem(),
            );
        } else {
            softmax::softmax_gradient_kernel::launch(
                client,
                count,
                dim,
                lanes,
                logits,
                labels,
                self.axes(),
                coefficients.arg(),
                gradient,
                self.extent(),
                plan,
                self.elem(),
            );
        }
        self.context.launched();
        Ok(())
    }

    fn owned_gradient(
        &self,
        plan: Plan,
        normalisers: &Buffer,
        coefficients: &Buffer,
        gradient: BufferArg,
    ) -> Result<(), KernelError> {
        let (client, units) = (self.context.client(), self.plan.walkers);
        let means = self.context.empty(self.voxels(), Dtype::F32)?;
        let (count, dim) = self.grid(self.voxels(), units)?;
        owned::mean_kernel::launch(
            client,
            count,
            dim,
            self.logits.arg(),
            self.labels.arg(),
            self.axes(),
            normalisers.arg(),
            coefficients.arg(),
            means.arg(),
            self.extent(),
            plan,
            self.elem(),
        );
        self.context.launched();
        let (count, dim) = self.grid(self.logits.len(), units)?;
        owned::owned_gradient_kernel::launch(
            client,
            count,
            dim,
            self.logits.arg(),
            self.labels.arg(),
            self.axes(),
            normalisers.arg(),
            coefficients.arg(),
            means.arg(),
            gradient,
            self.extent(),
            plan,
            self.elem(),
        );
        self.context.launched();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caps(cores: Option<u32>, lanes: usize) -> Caps {
        Caps {
            cores,
            lanes,
            registers: 16,
            plane: None,
            shared_memory: 0,
            max_units: if cores.is_some() { 2 } else { 1024 },
            max_cubes: [65535, 65535],
            max_buffer: u64::MAX,
            memory: None,
            f16: false,
            bf16: false,
            tensor_cores: Vec::new(),
        }
    }

    fn plan(classes: usize, caps: &Caps) -> (Plan, Option<Plan>) {
        let plan = Plan::new(&LossSettings::new(Target::Labels { classes }, None, false), true, caps);
        (plan, plan.owned(caps))
    }

    #[test]
    fn threads_walk_alone_over_vectors_and_never_own_channels() {
        for (lanes, expected) in [(1, 4), (4, 4), (8, 8), (16, 16)] {
            for classes in [1, 4, 14, 255] {
                let caps = caps(Some(2), lanes);
                let (plan, owned) = plan(classes, &caps);
                assert_eq!((plan.walkers, plan.lanes(&caps), owned), (1, expected, None));
            }
        }
    }

    #[test]
    fn units_of_a_gpu_keep_at_most_16_channels() {
        let caps = caps(None, 4);
        for classes in 1..=255 {
            let (plan, owned) = plan(classes, &caps);
            assert_eq!((plan.lanes(&caps), plan.per_voxel), (1, false));
            assert_eq!(owned.is_some(), classes > 16);
            if let Some(owned) = owned {
                assert!(owned.walkers >= classes && owned.walkers <= 256 && owned.walkers % 64 == 0);
            } else {
                assert!(plan.unroll);
            }
        }
    }
}
