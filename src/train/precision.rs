//! The type that training keeps activations in.

use crate::error::Result;
use crate::kernels::{Caps, Dtype, KernelError};
use serde::{Deserialize, Serialize};

/// In which type activations and their gradients are kept, and convolutions multiply. Weights, momenta, statistics and
/// all sums are f32 in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits throughout.
    #[default]
    F32,
    /// 16 bits with 11 for the mantissa, and dynamic loss scaling: nnU-Net's own way on GPUs.
    F16,
    /// 16 bits with the range of f32 and 8 bits for the mantissa; needs no loss scaling.
    Bf16,
}

impl Precision {
    /// The type of activations.
    pub fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::Bf16,
        }
    }

    /// Whether small gradients would vanish without a loss scale.
    pub fn needs_loss_scale(self) -> bool {
        self == Self::F16
    }

    /// Refuses a type that the device does not have.
    ///
    /// # Errors
    /// [`KernelError::Unsupported`].
    pub fn check(self, caps: &Caps) -> Result<()> {
        let (there, feature) = match self {
            Self::F32 => return Ok(()),
            Self::F16 => (caps.f16, "f16"),
            Self::Bf16 => (caps.bf16, "bf16"),
        };
        match there {
            true => Ok(()),
            false => Err(KernelError::Unsupported { operation: "this precision", feature }.into()),
        }
    }
}

impl std::str::FromStr for Precision {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "f32" => Ok(Self::F32),
            "f16" => Ok(Self::F16),
            "bf16" => Ok(Self::Bf16),
            _ => Err(format!("`{text}` is no precision: write f32, f16 or bf16")),
        }
    }
}

impl std::fmt::Display for Precision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}
