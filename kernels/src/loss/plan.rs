//! What the kernels of a loss are compiled for, and how the rows of their partial sums look.

use super::settings::{Entropy, LossSettings, OPERATION, Target};
use crate::{Caps, KernelError};

/// Voxels in a chunk. A chunk lies in one sample of one level and is what one partial sum covers: short enough that
/// its f32 sums lose nothing (256 terms a lane with eight lanes), long enough that the partial sums are few.
const CHUNK: usize = 2048;
/// Up to this many classes a thread compares each with the label, which is then cheaper than looking one up.
const COMPARED_CLASSES: usize = 8;
/// On a GPU a unit has at most this many of a voxel's classes in registers, and their P. A row of shared memory for each
/// team is then at most 12 KiB a cube, so that many cubes find room on a multiprocessor.
const CLASSES_OF_UNIT: usize = 16;
/// The same of regions, with all of their sums.
const REGIONS_OF_UNIT: usize = 8;
/// Bytes of shared memory that are enough for all losses, and that every GPU has. Where it does not work, units are
/// taken for threads.
const LARGEST_SHARED: usize = 16 << 10;
/// Up to this many classes the loops of threads over classes are unrolled: four of sixteen lanes are about 300
/// operations; more only cost compile time.
const UNROLLED_CLASSES: usize = 4;
/// The most classes of a GPU's unit that walks alone, without shared memory: longer arrays of its own take minutes to
/// compile.
const ARRAY_CLASSES: usize = 16;
/// What is missing where there are more classes than that, and what to do about it.
const WANTED: &str = "shared memory that CubeCL can use, which a loss of more than 16 classes or regions needs; use the \
                      CPU, or a Vulkan driver with VK_KHR_workgroup_memory_explicit_layout (Mesa 26 or later has it)";
/// Voxels of a chunk that a unit without shared memory walks over alone, one by one.
const SINGLE_CHUNK: usize = 512;
/// Turns of all loops together after which Mesa's old software driver, which is what such units run on, leaves them.
const MOST_TURNS: usize = (1 << 16) - 1;
/// Logits of a vector that a GPU reads at once.
const LARGEST_VECTOR: usize = 4;
/// The coefficients of a level's gradient are `[batch, classes, (A, B)]` of Dice and then this many values: the weight
/// of a voxel's cross-entropy, and, where only the largest count, the bits of the least of them and the share in which
/// those that equal it count.
pub(super) const TAIL: usize = 3;

/// How weights of voxels are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Weighting {
    /// Every annotated voxel counts 1.
    None,
    /// 255 is 1.
    Bytes,
    /// As they are.
    Floats,
}

/// Everything that is known when a kernel is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct LossPlan {
    /// Channels of the logits.
    pub(super) classes: usize,
    /// Labels that count; an ignored voxel gets this number as its label.
    pub(super) labels: usize,
    /// The channels are regions.
    pub(super) regions: bool,
    /// Levels in a launch.
    pub(super) levels: usize,
    /// Some level is coarser than the label map.
    pub(super) coarse: bool,
    /// Voxels of a chunk.
    pub(super) chunk: usize,
    /// Units that share a chunk: 1 where units are threads, else a cube of them.
    pub(super) walkers: usize,
    /// Units of a cube that share a voxel, a power of two.
    pub(super) team: usize,
    /// Neighbouring channels that a unit of a team reads at once.
    pub(super) vector: usize,
    /// Groups of ignored voxels are not read.
    pub(super) skip: bool,
    /// The loop over classes is unrolled and its sums are registers.
    pub(super) unroll: bool,
    /// The labelled class of a voxel is looked up, instead of compared with every class.
    pub(super) per_voxel: bool,
    /// The (binary) cross-entropy is summed up.
    pub(super) entropy: bool,
    /// The cross-entropy of every voxel is stored, and only the largest count.
    pub(super) top_k: bool,
    /// The Dice term is computed.
    pub(super) dice: bool,
    /// Voxels have weights.
    pub(super) weighting: Weighting,
    /// Some classes were not annotated in some samples.
    pub(super) missing: bool,
}

impl LossPlan {
    /// The plan for annotations without weights and missing classes.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`] for more than 16 classes or regions on a GPU without shared memory.
    pub(super) fn new(settings: &LossSettings, levels: usize, coarse: bool, caps: &Caps) -> Result<Self, KernelError> {
        let target = &settings.target;
        let classes = target.channels();
        let regions = matches!(target, Target::Regions { .. });
        let threads = caps.cores.is_some() || caps.shared_memory < LARGEST_SHARED;
        let software = threads && caps.cores.is_none();
        if software && classes > ARRAY_CLASSES {
            return Err(KernelError::Unsupported { operation: OPERATION, feature: WANTED });
        }
        let (chunk, walkers) = match threads {
            // A voxel takes at most ten loops over the classes.
            true if software && classes > UNROLLED_CLASSES => (MOST_TURNS / (10 * classes + 10), 1),
            // One sum of more voxels would round too much.
            true if software => (SINGLE_CHUNK, 1),
            true => (CHUNK, 1),
            false => (CHUNK, 1 << caps.cube_units().ilog2()),
        };
        let of_unit = if regions { REGIONS_OF_UNIT } else { CLASSES_OF_UNIT };
        let top_k = matches!(settings.entropy, Entropy::TopK { .. });
        Ok(Self {
            classes,
            labels: target.labels(),
            regions,
            levels,
            coarse,
            chunk,
            walkers,
            team: if threads { 1 } else { classes.div_ceil(of_unit).next_power_of_two().min(walkers) },
            vector: 1 << classes.trailing_zeros().min(LARGEST_VECTOR.ilog2()),
            skip: !settings.ignore.is_empty(),
            unroll: classes <= UNROLLED_CLASSES,
            per_voxel: threads && classes > COMPARED_CLASSES,
            entropy: settings.weight_ce != 0.0 && !top_k,
            top_k: settings.weight_ce != 0.0 && top_k,
            dice: settings.weight_dice != 0.0,
            weighting: Weighting::None,
            missing: false,
        })
    }

    /// The same for annotations with weights or missing classes.
    pub(super) fn annotated(self, weighting: Weighting, missing: bool) -> Self {
        Self {
            weighting,
            missing,
            skip: self.skip || weighting != Weighting::None || missing,
            // The background then stands for several channels, which a look-up does not find.
            per_voxel: self.per_voxel && !missing,
            ..self
        }
    }

    /// Voxels that a thread handles at once.
    pub(super) fn lanes(&self, caps: &Caps) -> usize {
        // Old software drivers take minutes to compile loops over vectors.
        if caps.cores.is_none() { 1 } else { caps.lanes.next_power_of_two().clamp(4, 16) }
    }

    // Of a cube:

    /// Voxels that it handles at once.
    pub(super) fn teams(&self) -> usize {
        self.walkers / self.team
    }

    /// Vectors of a voxel.
    pub(super) fn vectors(&self) -> usize {
        self.classes / self.vector
    }

    /// Vectors of a unit.
    pub(super) fn mine(&self) -> usize {
        self.vectors().div_ceil(self.team)
    }

    /// Length of a team's row of sums in shared memory: without the P of exclusive labels, and a part at a time of
    /// regions.
    pub(super) fn shared_row(&self) -> usize {
        match (self.regions, self.dice) {
            (true, _) => self.classes,
            (false, true) => self.slots() - self.classes,
            (false, false) => self.slots(),
        }
    }

    /// Values in shared memory by which teams exchange `fields` of each unit, for two voxels in turn.
    pub(super) fn shares(&self, fields: usize) -> usize {
        if self.team > 1 { 2 * fields * self.walkers } else { 1 }
    }

    // A row of partial sums is `[P.., I.., G.., cross-entropy.., weight of the voxels]`, one value a class, without
    // what is not computed.

    /// Where the sums of `w p y` begin; those of `w p` begin at 0.
    pub(super) fn hits(&self) -> usize {
        self.classes
    }

    /// Where the sums of `w y` begin.
    pub(super) fn truth(&self) -> usize {
        2 * self.classes
    }

    /// Where the cross-entropies begin.
    pub(super) fn entropies(&self) -> usize {
        if self.dice { 3 * self.classes } else { 0 }
    }

    /// Where the sum of the voxels' weights is.
    pub(super) fn weight(&self) -> usize {
        self.entropies() + if self.entropy { self.classes } else { 0 }
    }

    /// Length of a row.
    pub(super) fn slots(&self) -> usize {
        self.weight() + 1
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

    fn plan(classes: usize, caps: &Caps) -> LossPlan {
        LossPlan::new(&LossSettings::new(Target::Labels { classes }, None, false), 1, false, caps).unwrap()
    }

    fn gpu() -> Caps {
        Caps { shared_memory: 48 << 10, ..caps(None, 4) }
    }

    fn regions(classes: usize) -> LossSettings {
        let regions = (0..classes).map(|r| vec![r as u16 % 7]).collect();
        LossSettings::new(Target::Regions { labels: 7, regions }, None, false)
    }

    #[test]
    fn threads_walk_alone_over_vectors() {
        for (lanes, expected) in [(1, 4), (4, 4), (8, 8), (16, 16)] {
            for classes in [1, 4, 14, 255, 1024] {
                let caps = caps(Some(2), lanes);
                let plan = plan(classes, &caps);
                assert_eq!((plan.walkers, plan.lanes(&caps)), (1, expected));
            }
        }
        // So do units of a GPU whose shared memory does not work, with few classes and not for too long.
        let caps = caps(None, 4);
        for classes in 1..=16 {
            let plan = plan(classes, &caps);
            assert_eq!((plan.walkers, plan.lanes(&caps)), (1, 1));
            let turns = plan.chunk * (9 * classes + 2) + 4 * classes;
            assert!(plan.unroll || turns <= MOST_TURNS, "{plan:?}");
        }
    }

    #[test]
    fn many_classes_without_shared_memory_are_refused_with_the_remedy() {
        for settings in [LossSettings::new(Target::Labels { classes: 17 }, None, false), regions(17)] {
            let refused = LossPlan::new(&settings, 1, false, &caps(None, 4)).unwrap_err();
            assert!(matches!(refused, KernelError::Unsupported { .. }));
            let words = refused.to_string();
            assert!(["16 classes", "use the CPU", "Mesa 26"].iter().all(|part| words.contains(part)), "{words}");
            for caps in [gpu(), caps(Some(2), 8)] {
                LossPlan::new(&settings, 1, false, &caps).unwrap();
            }
        }
    }

    #[test]
    fn a_cube_s_units_share_all_channels_in_few_registers_and_little_memory() {
        for classes in 1..=1024 {
            for settings in [LossSettings::new(Target::Labels { classes }, None, false), regions(classes)] {
                let plan = LossPlan::new(&settings, 1, false, &gpu()).unwrap().annotated(Weighting::None, true);
                assert_eq!(plan.teams() * plan.team, 64);
                assert_eq!(plan.vectors() * plan.vector, classes);
                assert!(plan.mine() * plan.team >= plan.vectors());
                assert!(plan.mine() * plan.vector <= 16, "{plan:?}");
                // The most that is exchanged where classes are missing: four fields in pass 1, five for the gradient.
                let pass_1 = 4 * (plan.teams() * plan.shared_row() + plan.shares(4));
                assert!(pass_1.max(4 * plan.shares(5)) <= LARGEST_SHARED, "{pass_1} bytes of {plan:?}");
                assert!(plan.classes <= plan.shared_row(), "no room for a part of all regions");
            }
        }
    }

    #[test]
    fn partial_sums_are_less_than_a_hundredth_of_the_logits() {
        for caps in [caps(Some(2), 16), gpu()] {
            for classes in [4, 14, 62, 118, 1023] {
                let plan = plan(classes, &caps);
                // f32 sums of logits of two bytes, and what remains of the rows after each step
                assert!(100 * 4 * (plan.slots() + plan.slots().div_ceil(100)) < 2 * plan.chunk * classes);
                // Cubes for a large GPU, in a batch of two
                assert!(2 * (128usize.pow(3)).div_ceil(plan.chunk) >= 500);
            }
        }
        // Old software drivers: with few classes only, and of f32 logits.
        let plan = plan(4, &caps(None, 4));
        assert!(100 * 4 * plan.slots() < 4 * plan.chunk * 4);
    }

    #[test]
    fn what_is_off_has_no_sums() {
        let caps = caps(Some(2), 16);
        let mut settings = LossSettings::new(Target::Labels { classes: 5 }, None, false);
        let slots = |settings: &LossSettings| LossPlan::new(settings, 1, false, &caps).unwrap().slots();
        assert_eq!(slots(&settings), 21);
        settings.weight_dice = 0.0;
        assert_eq!(slots(&settings), 6);
        (settings.weight_dice, settings.weight_ce) = (1.0, 0.0);
        assert_eq!(slots(&settings), 16);
    }
}
