//! Choosing training patches, and the buffers they are written to.
//!
//! nnU-Net's rules: cases uniformly with replacement; the last third of a batch is centred on a foreground voxel; with an
//! ignore label every other patch is centred on an annotated voxel, because a patch without annotation teaches nothing.

mod pool;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::compat::Compat;
use crate::error::{Error, PreprocessError, Result};
use crate::preprocess::ClassLocations;

pub use crate::patch::{ChunkCache, PatchSource, StoredPatches, patches_of};
pub use pool::{Pool, Unreadable};

/// Share of a batch that is forced to show foreground.
pub const FOREGROUND_OVERSAMPLING: f64 = 0.33;

/// Patches as they are cut out, before augmentation.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Batch {
    /// Number of patches.
    pub size: usize,
    /// Depth, height, width of a patch, margin included.
    pub patch: [usize; 3],
    /// Image channels.
    pub channels: usize,
    /// Images, `[batch, depth, height, width, channels]`.
    pub image: Vec<f32>,
    /// Labels, `[batch, depth, height, width]`: the ignore label as its value, nnU-Net's -1 where there is no image.
    pub labels: Vec<i16>,
}

impl Batch {
    /// Bytes of a batch of this size.
    pub fn bytes(size: usize, patch: [usize; 3], channels: usize) -> u64 {
        let voxels = (size * patch.iter().product::<usize>()) as u64;
        voxels * (channels * size_of::<f32>() + size_of::<i16>()) as u64
    }

    fn reshape(&mut self, size: usize, patch: [usize; 3], channels: usize) {
        (self.size, self.patch, self.channels) = (size, patch, channels);
        let voxels = self.voxels();
        self.image.resize(size * voxels * channels, 0.0);
        self.labels.resize(size * voxels, -1);
    }

    /// Voxels of one patch.
    pub fn voxels(&self) -> usize {
        self.patch.iter().product()
    }

    /// Image of one patch, `[depth, height, width, channels]`.
    pub fn image_of(&self, index: usize) -> &[f32] {
        let values = self.voxels() * self.channels;
        &self.image[index * values..][..values]
    }

    /// Labels of one patch, `[depth, height, width]`.
    pub fn labels_of(&self, index: usize) -> &[i16] {
        &self.labels[index * self.voxels()..][..self.voxels()]
    }

    /// Image and labels of one patch.
    pub fn sample_mut(&mut self, index: usize) -> (&mut [f32], &mut [i16]) {
        let voxels = self.voxels();
        let values = voxels * self.channels;
        (&mut self.image[index * values..][..values], &mut self.labels[index * voxels..][..voxels])
    }
}

/// Which patches are forced to show foreground.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Oversampling {
    /// The last third of every batch: of 2 patches the second.
    #[default]
    LastThird,
    /// Every patch by chance, with the share of patches that [`LastThird`](Self::LastThird) forces:
    /// `nnUNetTrainer_probabilisticOversampling`.
    SameShare,
    /// Every patch with this probability.
    Probability(f64),
}

/// Which cases patches are cut from, and where. The default is nnU-Net's.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Sampling {
    /// Which patches are forced to show foreground.
    pub oversampling: Oversampling,
    /// Whether a case is chosen as often as its share of all annotated voxels instead of as often as every other: for
    /// datasets in which some cases are annotated completely and others hardly.
    pub by_annotation: bool,
}

impl Sampling {
    /// nnU-Net's default.
    pub const NNUNET: Self = Self { oversampling: Oversampling::LastThird, by_annotation: false };
}

impl std::fmt::Display for Sampling {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.oversampling {
            Oversampling::LastThird => f.write_str("the last third of a batch shows foreground")?,
            Oversampling::SameShare => f.write_str("patches show foreground by chance")?,
            Oversampling::Probability(share) => write!(f, "patches show foreground with probability {share}")?,
        }
        f.write_str(if self.by_annotation { ", cases weighed by annotated voxels" } else { ", all cases alike" })
    }
}

/// Settings of patch sampling.
#[derive(Debug, Clone, PartialEq)]
pub struct PatchSampler {
    /// Patches per batch.
    pub batch_size: usize,
    /// Size of the patches that are cut out.
    pub patch: [usize; 3],
    /// Size that remains after augmentation; placement keeps *this* part inside the image. Equal to `patch` unless an
    /// augmentation needs a margin.
    pub final_patch: [usize; 3],
    /// Which patches are forced to show foreground.
    pub oversampling: Oversampling,
    /// Whether patches may hang over the far border as they do upstream.
    pub compat: Compat,
}

impl PatchSampler {
    /// nnU-Net's oversampling, no margin, patches kept inside the image.
    pub fn new(batch_size: usize, patch: [usize; 3]) -> Self {
        PatchSampler {
            batch_size,
            patch,
            final_patch: patch,
            oversampling: Oversampling::LastThird,
            compat: Compat::default(),
        }
    }

    /// Whether a patch is one of a batch's last third: of 2 the second, of 9 the last three, of 1 none.
    pub fn is_forced(&self, index: usize) -> bool {
        let free = (self.batch_size as f64 * (1.0 - FOREGROUND_OVERSAMPLING)).round_ties_even();
        index as f64 >= free
    }

    /// Whether a patch must show foreground, which some variants draw.
    fn draw_forced(&self, index: usize, rng: &mut ChaCha8Rng) -> bool {
        let share = match self.oversampling {
            Oversampling::LastThird => return self.is_forced(index),
            Oversampling::SameShare => {
                let forced = (0..self.batch_size).filter(|&index| self.is_forced(index)).count();
                forced as f64 / self.batch_size as f64
            }
            Oversampling::Probability(share) => share,
        };
        rng.random::<f64>() < share
    }

    /// Fills a batch with patches of randomly chosen cases.
    ///
    /// # Errors
    /// [`NoCases`](crate::error::DatasetError::NoCases), [`PreprocessError::ChannelCount`] if cases differ in their channels,
    /// [`CaseUnreadable`](crate::error::TrainError::CaseUnreadable) if a case cannot be read and the pool does not go on
    /// without it, [`NoReadableCase`](crate::error::TrainError::NoReadableCase) once none is left.
    pub fn fill<S: PatchSource>(&self, pool: &Pool<S>, rng: &mut ChaCha8Rng, batch: &mut Batch) -> Result<()> {
        let channels = pool.channels()?;
        batch.reshape(self.batch_size, self.patch, channels);
        for index in 0..self.batch_size {
            let forced = self.draw_forced(index, rng);
            loop {
                let case = pool.choose(rng);
                if case.channels() != channels {
                    let (case, found) = (case.name().into(), case.channels());
                    return Err(Error::Preprocess(PreprocessError::ChannelCount { case, found, expected: channels }));
                }
                let start = self.start(case, forced, rng);
                let (image, labels) = batch.sample_mut(index);
                // Drawn anew also where the case is known as unreadable already: patches then do not depend on which
                // thread came upon it first.
                if pool.is_readable(case, || case.copy_patch(start, self.patch, image, labels))? {
                    break;
                }
            }
        }
        Ok(())
    }

    /// First voxel of a patch of a case; negative, or beyond `shape - patch`, where the patch hangs over the image.
    pub fn start(&self, case: &impl PatchSource, forced: bool, rng: &mut ChaCha8Rng) -> [isize; 3] {
        let shape = case.shape();
        let bounds: [[isize; 2]; 3] = std::array::from_fn(|axis| self.bounds(axis, shape[axis]));
        match self.centre(case.class_locations(), forced, rng) {
            None => bounds.map(|[low, high]| low + rng.random_range(0..=(high - low).unsigned_abs()) as isize),
            Some(voxel) => std::array::from_fn(|axis| {
                let [low, high] = bounds[axis];
                let start = voxel[axis] as isize - (self.patch[axis] / 2) as isize;
                match self.compat {
                    Compat::Corrected => start.clamp(low, high),
                    Compat::Nnunet => start.max(low),
                }
            }),
        }
    }

    /// Lowest and highest start along an axis. A margin may hang over the image, the final patch only if it is larger.
    fn bounds(&self, axis: usize, shape: usize) -> [isize; 2] {
        let (patch, shape) = (self.patch[axis] as isize, shape as isize);
        let margin = patch - (self.final_patch[axis] as isize).min(patch);
        let margin = margin.max(patch - shape);
        [(-margin).div_euclid(2), shape + margin.div_euclid(2) + margin.rem_euclid(2) - patch]
    }

    /// The voxel a patch is centred on, if it is centred on one.
    fn centre(&self, locations: &ClassLocations, forced: bool, rng: &mut ChaCha8Rng) -> Option<[u32; 3]> {
        let annotated = locations.annotated.as_ref().filter(|list| !list.is_empty());
        let mut list = annotated;
        if forced {
            let classes = locations.foreground.iter().map(|(_, voxels)| voxels);
            let present: Vec<_> = classes.filter(|voxels| !voxels.is_empty()).collect();
            if !present.is_empty() {
                list = Some(present[rng.random_range(0..present.len())]);
            }
        }
        list.map(|voxels| voxels[rng.random_range(0..voxels.len())])
    }
}

/// Patch to cut out so that the final patch is covered after rotation by at most `limit` (radians, about any single axis)
/// and shrinking by 0.85: 128³ needs 205³ at 30 degrees.
pub fn patch_with_margin(patch: [usize; 3], limit: f64) -> [usize; 3] {
    let limit = limit.min(std::f64::consts::FRAC_PI_2);
    let (sin, cos) = limit.sin_cos();
    let [a, b, c] = patch.map(|n| n as f64);
    let largest = |values: [f64; 3]| values.iter().copied().fold(0.0, f64::max);
    let rotated = [
        largest([a, (a * cos - c * sin).abs(), (a * cos + b * sin).abs()]),
        largest([b, (b * cos + c * sin).abs(), (b * cos - a * sin).abs()]),
        largest([c, (c * cos - b * sin).abs(), (c * cos + a * sin).abs()]),
    ];
    rotated.map(|n| (n / 0.85) as usize)
}
