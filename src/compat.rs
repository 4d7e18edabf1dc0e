//! One switch for the places where nnU-Net's behaviour looks like a defect.

use serde::{Deserialize, Serialize};

/// Whether known upstream defects are corrected or reproduced.
///
/// | where | [`Corrected`](Compat::Corrected) (default) | [`Nnunet`](Compat::Nnunet) |
/// |---|---|---|
/// | intensity statistics of the fingerprint | ignored voxels are not foreground | they count as foreground |
/// | masked z-score of sparse labels | ignore-labelled air stays outside the mask, as at inference | it is normalised with the brain |
/// | patch placement around a voxel | kept inside the image at both borders | only at the lower border |
/// | moving average of the pseudo Dice | an epoch without a defined Dice leaves it unchanged | it becomes NaN for good |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compat {
    /// Known defects are corrected.
    #[default]
    Corrected,
    /// nnU-Net 2.8's behaviour, defects included.
    Nnunet,
}

impl std::fmt::Display for Compat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Corrected => "corrected",
            Self::Nnunet => "nnunet",
        })
    }
}
