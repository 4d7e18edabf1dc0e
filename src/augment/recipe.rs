//! What is done to training patches, and how large they have to be before.

use crate::error::{Error, Result, TrainError};
use crate::kernels::augment::LabelRule;
use crate::sample::{Oversampling, patch_with_margin};
use serde::{Deserialize, Serialize};

/// Where the longest side of a patch is more than this many times its depth, nnU-Net rotates and scales in the plane
/// of height and width only.
const ANISOTROPY: f64 = 3.0;

/// Which transforms there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transforms {
    /// All that nnU-Net's trainer has: [`Draw`](super::Draw) lists them.
    Nnunet,
    /// Mirroring alone.
    Mirror,
    /// None.
    None,
}

impl std::fmt::Display for Transforms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Nnunet => "nnunet",
            Self::Mirror => "mirror",
            Self::None => "none",
        })
    }
}

impl std::str::FromStr for Transforms {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "nnunet" => Ok(Self::Nnunet),
            "mirror" => Ok(Self::Mirror),
            "none" => Ok(Self::None),
            _ => Err(format!("`{text}` is no augmentation: nnunet, mirror or none")),
        }
    }
}

/// What is done to training patches. The default is nnU-Net's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recipe {
    /// The transforms.
    pub transforms: Transforms,
    /// Whether anisotropic patches are rotated and scaled in the plane of height and width only, as nnU-Net does.
    pub dummy_2d: bool,
    /// Whether labels are those of the nearest voxel instead of the vote of eight.
    pub nearest_labels: bool,
}

impl Default for Recipe {
    fn default() -> Self {
        Self::NNUNET
    }
}

impl std::fmt::Display for Recipe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let nearest = if self.nearest_labels { ", labels of the nearest voxel" } else { "" };
        let in_space = if self.dummy_2d { "" } else { ", never in the plane only" };
        write!(f, "{}{nearest}{in_space}", self.transforms)
    }
}

impl Recipe {
    /// nnU-Net's default.
    pub const NNUNET: Self = Self { transforms: Transforms::Nnunet, dummy_2d: true, nearest_labels: false };
    /// Mirroring alone.
    pub const MIRROR: Self = Self { transforms: Transforms::Mirror, dummy_2d: true, nearest_labels: false };
    /// Nothing.
    pub const NONE: Self = Self { transforms: Transforms::None, dummy_2d: true, nearest_labels: false };

    pub(super) fn label_rule(&self) -> LabelRule {
        if self.nearest_labels { LabelRule::Nearest } else { LabelRule::Vote }
    }

    /// Sizes and angles for patches that are `patch` voxels in the end.
    pub fn geometry(&self, patch: [usize; 3]) -> Geometry {
        let longest = patch.iter().copied().max().unwrap_or(0) as f64;
        let in_plane = self.dummy_2d && longest / patch[0] as f64 > ANISOTROPY;
        let rotation: f64 = if in_plane { 180.0 } else { 30.0 };
        let initial = match self.transforms {
            Transforms::Mirror | Transforms::None => patch,
            Transforms::Nnunet => {
                let [depth, height, width] = patch_with_margin(patch, rotation.to_radians());
                [if in_plane { patch[0] } else { depth }, height, width]
            }
        };
        Geometry { patch, initial, in_plane, rotation: rotation.to_radians() }
    }
}

/// Sizes and angles of a recipe for one patch size.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Geometry {
    /// Patches as the network sees them.
    pub patch: [usize; 3],
    /// Patches as they are cut out.
    pub initial: [usize; 3],
    /// Whether depth takes no part in rotation, scaling and resolution.
    pub in_plane: bool,
    /// Largest angle of rotation to either side, in radians.
    pub rotation: f64,
}

/// A trainer class of nnU-Net, as far as it differs from the default in ways that voxgrad has too.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainerVariant {
    /// Its name.
    pub name: String,
    /// Number of epochs, if not 1000.
    pub epochs: Option<usize>,
    /// Its augmentation.
    pub recipe: Recipe,
    /// Which patches it forces to show foreground.
    pub oversampling: Oversampling,
    /// Axes that training and prediction mirror along.
    pub mirror: [bool; 3],
}

/// Trainers without a number of epochs in their names.
const PLAIN: [(&str, Recipe, [bool; 3], Option<usize>); 9] = {
    const NNUNET: Recipe = Recipe::NNUNET;
    const NEAREST: Recipe = Recipe { nearest_labels: true, ..NNUNET };
    const ONLY_01: [bool; 3] = [true, true, false];
    [
        ("nnUNetTrainer", NNUNET, [true; 3], None),
        ("nnUNetTrainerNoDA", Recipe::NONE, [false; 3], None),
        ("nnUNetTrainerNoMirroring", NNUNET, [false; 3], None),
        ("nnUNetTrainer_onlyMirror01", NNUNET, ONLY_01, None),
        ("nnUNetTrainer_onlyMirror01_1500ep", NNUNET, ONLY_01, Some(1500)),
        ("nnUNetTrainer_noDummy2DDA", Recipe { dummy_2d: false, ..NNUNET }, [true; 3], None),
        ("nnUNetTrainer_DASegOrd0", NEAREST, [true; 3], None),
        ("nnUNetTrainer_DASegOrd0_NoMirroring", NEAREST, [false; 3], None),
        ("nnUNetTrainer_onlyMirror01_DASegOrd0", NEAREST, ONLY_01, None),
    ]
};
/// nnU-Net has a trainer for each of these numbers of epochs.
const EPOCHS: [usize; 12] = [1, 5, 10, 20, 50, 100, 250, 500, 750, 2000, 4000, 8000];
/// And for these, one without mirroring.
const EPOCHS_WITHOUT_MIRRORING: [usize; 4] = [250, 2000, 4000, 8000];
/// Trainers that force patches to show foreground by chance.
const BY_CHANCE: [(&str, Oversampling); 3] = [
    ("nnUNetTrainer_probabilisticOversampling", Oversampling::SameShare),
    ("nnUNetTrainer_probabilisticOversampling_033", Oversampling::Probability(0.33)),
    ("nnUNetTrainer_probabilisticOversampling_010", Oversampling::Probability(0.1)),
];

impl TrainerVariant {
    /// All that there are, in the order in which they are listed.
    pub fn all() -> Vec<Self> {
        let default = Self {
            name: String::new(),
            epochs: None,
            recipe: Recipe::NNUNET,
            oversampling: Oversampling::LastThird,
            mirror: [true; 3],
        };
        let plain = PLAIN.iter().map(|&(name, recipe, mirror, epochs)| Self {
            name: name.into(),
            epochs,
            recipe,
            mirror,
            ..default.clone()
        });
        let with_epochs = |epochs: usize, suffix: &str, mirror| Self {
            name: format!("nnUNetTrainer_{epochs}{}{suffix}", if epochs == 1 { "epoch" } else { "epochs" }),
            epochs: Some(epochs),
            mirror,
            ..default.clone()
        };
        let by_chance = |&(name, oversampling): &(&str, _)| Self { name: name.into(), oversampling, ..default.clone() };
        plain
            .chain(EPOCHS.iter().map(|&epochs| with_epochs(epochs, "", [true; 3])))
            .chain(EPOCHS_WITHOUT_MIRRORING.iter().map(|&epochs| with_epochs(epochs, "_NoMirroring", [false; 3])))
            .chain(BY_CHANCE.iter().map(by_chance))
            .collect()
    }

    /// The variant of a name.
    ///
    /// # Errors
    /// [`TrainError::UnknownTrainer`] with the names that there are.
    pub fn of(name: &str) -> Result<Self> {
        let all = Self::all();
        match all.iter().find(|variant| variant.name == name) {
            Some(variant) => Ok(variant.clone()),
            None => {
                let known = all.into_iter().map(|variant| variant.name).collect::<Vec<_>>().join(", ");
                Err(Error::Train(TrainError::UnknownTrainer { name: name.into(), known }))
            }
        }
    }
}
