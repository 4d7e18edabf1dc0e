//! Which loss, of which shapes: everything that is checked once.

use super::OPERATION;
use super::walk::CHUNK;
use crate::{Buffer, Context, Dtype, KernelError};

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

    pub(super) fn first_dice(&self) -> usize {
        // With one class only there would be no term at all: nnU-Net has no such case.
        usize::from(matches!(self, Self::Labels { classes } if *classes > 1))
    }

    /// Labels that count, from 0 on.
    pub(super) fn labels(&self) -> usize {
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

/// Shapes of a loss, checked, with its small tables on the device. Made once and used for every step.
#[derive(Clone, Debug)]
pub struct Problem {
    pub(super) settings: LossSettings,
    pub(super) batch: usize,
    pub(super) dims: [usize; 3],
    pub(super) levels: Vec<Level>,
    /// Of every level: shares of the label's index by depth, height and width coordinate.
    pub(super) axes: Vec<Buffer>,
    /// Bit sets of regions by label, with an empty one for "ignored" at 256.
    pub(super) regions: Buffer,
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

    /// Length of the loss vector, see [`value_and_gradient`](super::value_and_gradient).
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

    /// Voxels of a sample at a level.
    pub(super) fn voxels(&self, level: usize) -> usize {
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
