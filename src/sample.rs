//! Choosing training patches, and the buffers they are written to.
//!
//! nnU-Net's rules: cases uniformly with replacement; the last third of a batch is centred on a foreground voxel; with an
//! ignore label every other patch is centred on an annotated voxel, because a patch without annotation teaches nothing.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::compat::Compat;
use crate::error::{Error, PreprocessError, Result, TrainError};
use crate::preprocess::ClassLocations;

pub use crate::patch::{ChunkCache, PatchSource, StoredPatches, patches_of};

/// Share of a batch that is forced to show foreground.
pub const FOREGROUND_OVERSAMPLING: f64 = 0.33;

/// Patches of a training step.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Batch {
    /// Number of patches.
    pub size: usize,
    /// Depth, height, width of a patch.
    pub patch: [usize; 3],
    /// Image channels.
    pub channels: usize,
    /// Images, `[batch, depth, height, width, channels]`.
    pub image: Vec<f32>,
    /// Labels with the ignore label as its value, `[batch, depth, height, width]`.
    pub target: Vec<u8>,
}

impl Batch {
    /// A batch of zeros.
    pub fn new(size: usize, patch: [usize; 3], channels: usize) -> Self {
        let mut batch = Batch::default();
        batch.reshape(size, patch, channels);
        batch
    }

    fn reshape(&mut self, size: usize, patch: [usize; 3], channels: usize) {
        (self.size, self.patch, self.channels) = (size, patch, channels);
        let voxels = self.voxels();
        self.image.resize(size * voxels * channels, 0.0);
        self.target.resize(size * voxels, 0);
    }

    /// Voxels of one patch.
    pub fn voxels(&self) -> usize {
        self.patch.iter().product()
    }

    /// Image and target of one patch.
    pub fn sample_mut(&mut self, index: usize) -> (&mut [f32], &mut [u8]) {
        let voxels = self.voxels();
        let values = voxels * self.channels;
        (&mut self.image[index * values..][..values], &mut self.target[index * voxels..][..voxels])
    }
}

/// Patches before augmentation, with nnU-Net's label -1 where there is no image.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct RawBatch {
    /// Number of patches.
    pub size: usize,
    /// Depth, height, width of a patch, margin included.
    pub patch: [usize; 3],
    /// Image channels.
    pub channels: usize,
    /// Images, `[batch, depth, height, width, channels]`.
    pub image: Vec<f32>,
    /// Labels, `[batch, depth, height, width]`.
    pub labels: Vec<i16>,
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
    /// Share of the batch that is forced to show foreground.
    pub oversampling: f64,
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
            oversampling: FOREGROUND_OVERSAMPLING,
            compat: Compat::default(),
        }
    }

    /// Whether a patch of the batch must show foreground: of 2 the second, of 9 the last three, of 1 none.
    pub fn is_forced(&self, index: usize) -> bool {
        let free = (self.batch_size as f64 * (1.0 - self.oversampling)).round_ties_even();
        index as f64 >= free
    }

    /// Fills a batch with patches of randomly chosen cases.
    ///
    /// # Errors
    /// [`TrainError::NoCases`](crate::error::TrainError::NoCases), [`PreprocessError::ChannelCount`](crate::error::PreprocessError::ChannelCount) if cases differ in their channels, or what reading a case gives.
    pub fn fill<S: PatchSource>(&self, cases: &[S], rng: &mut ChaCha8Rng, batch: &mut Batch) -> Result<()> {
        let channels = cases.first().ok_or(Error::Train(TrainError::NoCases))?.channels();
        batch.reshape(self.batch_size, self.patch, channels);
        self.each(cases, channels, rng, |index, case, start| {
            let (image, target) = batch.sample_mut(index);
            case.copy_patch(start, self.patch, image, target)
        })
    }

    /// The same patches as they are before augmentation.
    ///
    /// # Errors
    /// As [`PatchSampler::fill`].
    pub fn fill_raw<S: PatchSource>(&self, cases: &[S], rng: &mut ChaCha8Rng, batch: &mut RawBatch) -> Result<()> {
        let channels = cases.first().ok_or(Error::Train(TrainError::NoCases))?.channels();
        (batch.size, batch.patch, batch.channels) = (self.batch_size, self.patch, channels);
        let voxels: usize = self.patch.iter().product();
        batch.image.resize(batch.size * voxels * channels, 0.0);
        batch.labels.resize(batch.size * voxels, -1);
        self.each(cases, channels, rng, |index, case, start| {
            let image = &mut batch.image[index * voxels * channels..][..voxels * channels];
            let labels = &mut batch.labels[index * voxels..][..voxels];
            case.copy_raw_patch(start, self.patch, image, labels)
        })
    }

    /// Chooses a case and a place in it for every patch of a batch.
    fn each<S: PatchSource>(
        &self,
        cases: &[S],
        channels: usize,
        rng: &mut ChaCha8Rng,
        mut copy: impl FnMut(usize, &S, [isize; 3]) -> Result<()>,
    ) -> Result<()> {
        for index in 0..self.batch_size {
            let case = &cases[rng.random_range(0..cases.len())];
            if case.channels() != channels {
                let (case, found) = (case.name().into(), case.channels());
                return Err(Error::Preprocess(PreprocessError::ChannelCount { case, found, expected: channels }));
            }
            copy(index, case, self.start(case, self.is_forced(index), rng))?;
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

/// Where a random stream stands, for checkpoints.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RandomState {
    seed: [u8; 32],
    stream: u64,
    position: u64,
}

impl RandomState {
    /// The present state of a generator.
    pub fn of(rng: &ChaCha8Rng) -> Self {
        RandomState {
            seed: rng.get_seed(),
            stream: rng.get_stream(),
            // Counted in 32-bit words: training would take millennia to leave 64 bits.
            position: rng.get_word_pos() as u64,
        }
    }

    /// A generator that goes on from here.
    pub fn restore(&self) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::from_seed(self.seed);
        rng.set_stream(self.stream);
        rng.set_word_pos(u128::from(self.position));
        rng
    }
}
