//! What the kernels of a loss are compiled for, and how the rows of their partial sums look.

use super::{Entropy, LossSettings, Target};
use crate::Caps;

/// Voxels in a chunk. A chunk lies in one sample of one level and is what one partial sum covers: short enough that
/// its f32 sums lose nothing (256 terms a lane with eight lanes), long enough that the partial sums are few.
const CHUNK: usize = 2048;
/// The same where a unit owns a channel: every voxel has a cube's attention.
const OWNED_CHUNK: usize = 1024;
/// Up to this many classes a thread compares each with the label, which is then cheaper than looking one up.
const COMPARED_CLASSES: usize = 8;
/// Up to this many classes a GPU's unit keeps the sums of all of them in registers.
const REGISTER_CLASSES: usize = 16;
/// Units of a cube where a unit owns a channel: with more channels it owns several.
const OWNING_UNITS: usize = 256;
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
pub(super) struct Plan {
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
    /// Units that share a chunk: 1 where units are threads.
    pub(super) walkers: usize,
    /// A unit owns a channel instead of walking over voxels with all of them.
    pub(super) owned: bool,
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

impl Plan {
    /// The plan for annotations without weights and missing classes.
    pub(super) fn new(settings: &LossSettings, levels: usize, coarse: bool, caps: &Caps) -> Self {
        let target = &settings.target;
        let classes = target.channels();
        let threads = caps.cores.is_some();
        let owned = !threads && classes > REGISTER_CLASSES;
        let owning = classes.next_multiple_of(64).min(OWNING_UNITS).min(caps.max_units as usize);
        let top_k = matches!(settings.entropy, Entropy::TopK { .. });
        Self {
            classes,
            labels: target.labels(),
            regions: matches!(target, Target::Regions { .. }),
            levels,
            coarse,
            chunk: if owned { OWNED_CHUNK } else { CHUNK },
            walkers: match (threads, owned) {
                (true, _) => 1,
                (false, true) => owning,
                (false, false) => caps.cube_units() as usize,
            },
            owned,
            skip: !settings.ignore.is_empty(),
            // Four classes of sixteen lanes are about 300 operations; more only cost compile time.
            unroll: classes <= if threads { 4 } else { REGISTER_CLASSES },
            per_voxel: threads && classes > COMPARED_CLASSES,
            entropy: settings.weight_ce != 0.0 && !top_k,
            top_k: settings.weight_ce != 0.0 && top_k,
            dice: settings.weight_dice != 0.0,
            weighting: Weighting::None,
            missing: false,
        }
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

    /// Voxels that a unit handles at once.
    pub(super) fn lanes(&self, caps: &Caps) -> usize {
        if self.walkers == 1 { caps.lanes.next_power_of_two().clamp(4, 16) } else { 1 }
    }

    /// Rows of partial sums of a chunk.
    pub(super) fn rows(&self) -> usize {
        if self.owned { (self.walkers / self.classes).max(1) } else { self.walkers }
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

    fn plan(classes: usize, caps: &Caps) -> Plan {
        Plan::new(&LossSettings::new(Target::Labels { classes }, None, false), 1, false, caps)
    }

    #[test]
    fn threads_walk_alone_over_vectors_and_never_own_channels() {
        for (lanes, expected) in [(1, 4), (4, 4), (8, 8), (16, 16)] {
            for classes in [1, 4, 14, 255, 1024] {
                let caps = caps(Some(2), lanes);
                let plan = plan(classes, &caps);
                assert_eq!((plan.walkers, plan.lanes(&caps), plan.owned, plan.rows()), (1, expected, false, 1));
            }
        }
    }

    #[test]
    fn units_of_a_gpu_keep_at_most_16_channels() {
        let caps = caps(None, 4);
        for classes in 1..=1024 {
            let plan = plan(classes, &caps);
            assert_eq!((plan.lanes(&caps), plan.per_voxel, plan.owned), (1, false, classes > 16));
            assert!(plan.owned || plan.unroll);
            assert!(plan.walkers <= 256 && plan.walkers.is_multiple_of(64));
            assert!(!plan.owned || plan.walkers >= classes.min(256));
        }
    }

    #[test]
    fn partial_sums_are_less_than_a_hundredth_of_the_logits() {
        let caps = caps(Some(2), 16);
        for classes in [4, 14, 62, 118, 1023] {
            let plan = plan(classes, &caps);
            assert!(100 * plan.slots() * plan.rows() < plan.chunk * classes);
        }
    }

    #[test]
    fn what_is_off_has_no_sums() {
        let caps = caps(Some(2), 16);
        let mut settings = LossSettings::new(Target::Labels { classes: 5 }, None, false);
        let slots = |settings: &LossSettings| Plan::new(settings, 1, false, &caps).slots();
        assert_eq!(slots(&settings), 21);
        settings.weight_dice = 0.0;
        assert_eq!(slots(&settings), 6);
        (settings.weight_dice, settings.weight_ce) = (1.0, 0.0);
        assert_eq!(slots(&settings), 16);
    }
}
