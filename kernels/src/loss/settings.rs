//! Which loss, and of what.

use crate::Buffer;

pub(super) const OPERATION: &str = "loss";

/// What the channels of the logits mean.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Exclusive classes: channel k is the score of label k, label 0 is background. 1 to 1024 classes.
    Labels {
        /// Number of channels, and of labels from 0 on.
        classes: usize,
    },
    /// Overlapping regions: channel k is the score of the k-th region.
    Regions {
        /// Number of labels from 0 on, background included; larger ones in the map are treated as ignored.
        labels: usize,
        /// For every region the labels that belong to it. 1 to 1024 regions.
        regions: Vec<Vec<u16>>,
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

    /// Labels that count, from 0 on.
    pub fn labels(&self) -> usize {
        match self {
            Self::Labels { classes } => *classes,
            Self::Regions { labels, .. } => *labels,
        }
    }
}

/// How the (binary) cross-entropies of the voxels become one number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Entropy {
    /// nnU-Net's: the mean over the annotated voxels. For regions with a declared ignore label the sum over all
    /// regions divided by the number of annotated voxels, so that it grows with the number of regions; without
    /// one the mean over voxels and regions.
    Mean,
    /// Regions only: the mean over annotated voxels and regions, whether or not an ignore label is declared.
    MeanOverRegions,
    /// Labels only, nnU-Net's `TopKLoss`: the mean of the `percent` % largest of *all* voxels of the batch, where
    /// ignored voxels count as 0. That are `voxels * percent / 100` voxels without the fraction, at least one.
    TopK {
        /// More than 0, at most 100. nnU-Net: 10.
        percent: f32,
    },
}

/// How the Dice term is formed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DiceSettings {
    /// Sum I, P, G over the batch before dividing.
    pub batch: bool,
    /// Labels: the background (class 0) has a Dice term too. Regions, and a single class, always have all terms.
    pub background: bool,
    /// Added to numerator and denominator. nnU-Net: 1e-5.
    pub smooth: f32,
    /// Least value of the intersection I; what is raised to it has no gradient of its own. nnU-Net: none.
    pub clip_tp: Option<f32>,
}

/// Which loss.
#[derive(Clone, Debug, PartialEq)]
pub struct LossSettings {
    /// Meaning of the channels.
    pub target: Target,
    /// The labels of voxels that nobody annotated, as far as the data set declares them; none of them may be one
    /// of the target's labels. Every label beyond the target's is treated as ignored, listed here or not; but with
    /// none listed the kernels expect annotated voxels and look for no gaps to skip, and [`Entropy::Mean`] of
    /// regions has another denominator.
    pub ignore: Vec<u16>,
    /// How cross-entropies become one number.
    pub entropy: Entropy,
    /// The Dice term.
    pub dice: DiceSettings,
    /// Factor of the (binary) cross-entropy; with 0 it is not computed and reported as 0. nnU-Net: 1.
    pub weight_ce: f32,
    /// Factor of the Dice term; with 0 it is not computed and reported as 0. nnU-Net: 1.
    pub weight_dice: f32,
}

impl LossSettings {
    /// nnU-Net's settings for a target.
    pub fn new(target: Target, ignore: Option<u16>, batch_dice: bool) -> Self {
        Self {
            target,
            ignore: ignore.into_iter().collect(),
            entropy: Entropy::Mean,
            dice: DiceSettings { batch: batch_dice, background: false, smooth: 1e-5, clip_tp: None },
            weight_ce: 1.0,
            weight_dice: 1.0,
        }
    }

    /// Number of classes with a Dice term: all regions; of labels those without the background, unless it is
    /// asked for.
    pub fn dice_classes(&self) -> usize {
        self.target.channels() - self.first_dice()
    }

    pub(super) fn first_dice(&self) -> usize {
        // With one class only there would be no term at all: nnU-Net has no such case.
        usize::from(matches!(self.target, Target::Labels { classes } if classes > 1) && !self.dice.background)
    }
}

/// What is known about the voxels: labels, and optionally which classes nobody looked for and how much a voxel
/// counts.
#[derive(Clone, Copy, Debug)]
pub struct Annotation<'a> {
    /// `[batch, depth, height, width]` at full resolution: u8, or u16 where labels exceed 255.
    pub labels: &'a Buffer,
    /// For every sample the set of classes (regions) that nobody annotated in it: `[batch, ceil(channels / 32)]`,
    /// bit `c % 32` of word `c / 32`. Background (label 0 of [`Target::Labels`]) cannot be missing, and of regions
    /// not all.
    pub missing: Option<&'a [u32]>,
    /// Weights of the voxels, `[batch, depth, height, width]` at full resolution: u8 (255 is 1), f16 or f32, finite.
    /// A voxel whose weight is 0 (or negative, or not a number) is ignored.
    pub weights: Option<&'a Buffer>,
}

impl<'a> From<&'a Buffer> for Annotation<'a> {
    fn from(labels: &'a Buffer) -> Self {
        Self { labels, missing: None, weights: None }
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
