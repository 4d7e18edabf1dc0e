//! Types of elements.

use cubecl::ir::{ElemType, FloatKind, IntKind, UIntKind};

/// Element type of a [`Buffer`](crate::Buffer).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the names are the types")]
pub enum Dtype {
    F32,
    F16,
    Bf16,
    U8,
    U16,
    U32,
    I32,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F16 | Self::Bf16 | Self::U16 => 2,
            Self::F32 | Self::U32 | Self::I32 => 4,
        }
    }

    /// CubeCL's name of the type, for a kernel's `#[define]`.
    pub fn elem(self) -> ElemType {
        match self {
            Self::F32 => ElemType::Float(FloatKind::F32),
            Self::F16 => ElemType::Float(FloatKind::F16),
            Self::Bf16 => ElemType::Float(FloatKind::BF16),
            Self::U8 => ElemType::UInt(UIntKind::U8),
            Self::U16 => ElemType::UInt(UIntKind::U16),
            Self::U32 => ElemType::UInt(UIntKind::U32),
            Self::I32 => ElemType::Int(IntKind::I32),
        }
    }

    /// Whether this is one of the floating-point types.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::Bf16)
    }
}
