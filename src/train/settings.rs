//! How long to train, and how.

use super::precision::Precision;
use crate::augment::Recipe;
use crate::compat::Compat;
use crate::optim::Optimizer;
use crate::sample::Sampling;
use serde::{Deserialize, Serialize};

/// How long to train. The defaults are nnU-Net's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Epochs.
    pub epochs: usize,
    /// SGD iterations of an epoch.
    pub iterations: usize,
    /// Validation batches after an epoch.
    pub validation_iterations: usize,
    /// Learning rate of the first epoch.
    pub learning_rate: f64,
    /// Share of SGD's momentum that is kept from step to step.
    pub momentum: f32,
    /// Axes (depth, height, width) along which patches are mirrored at random, and predictions averaged over mirrored
    /// copies. Leave out an axis along which left and right mean different labels.
    pub mirror: [bool; 3],
    /// What else is done to training patches. What earlier versions did, mirroring, stands for a missing value.
    #[serde(default = "mirroring")]
    pub augmentation: Recipe,
    /// Which cases training patches are cut from, and where.
    #[serde(default)]
    pub sampling: Sampling,
    /// Whether patches are placed, and the pseudo Dice is averaged, as nnU-Net does it or corrected.
    #[serde(default)]
    pub compat: Compat,
    /// Type of activations and their gradients. nnU-Net: f16 on GPUs.
    #[serde(default)]
    pub precision: Precision,
    /// Whether convolutions add up the products of the definition only, see [`Policy::with_exact`](crate::kernels::conv3d::Policy::with_exact): slower, and rounded a
    /// little less.
    #[serde(default)]
    pub exact: bool,
    /// Whether the algorithms of convolutions are those that were measured to be the fastest on the device
    /// ([`crate::tune`]): whoever makes the trainer measures them. Steps repeat bit for bit with the same ones only.
    #[serde(default)]
    pub tuned: bool,
    /// Seed of initial weights, patches and mirroring.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            epochs: 1000,
            iterations: 250,
            validation_iterations: 50,
            learning_rate: 0.01,
            momentum: Optimizer::default().momentum,
            mirror: [true; 3],
            augmentation: Recipe::default(),
            sampling: Sampling::NNUNET,
            compat: Compat::Corrected,
            precision: Precision::F32,
            exact: false,
            tuned: false,
            seed: 0,
        }
    }
}

fn mirroring() -> Recipe {
    Recipe::MIRROR
}
