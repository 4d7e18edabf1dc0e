//! The classes and functions that a checkpoint may name, and what calling them means.

use super::fault::{Fault, damaged};
use super::value::{Element, Tensor, Value};

/// A class or function that a pickle may name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Global {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    Storage(Element),
    Device,
    Size,
    NumpyScalar,
    NumpyDtype,
    /// How bytes are written where pickles have none.
    Encode,
    /// A function of nnU-Net's, which stands for its name and is never called.
    KeepLargestComponent,
}

/// Module and name of nnU-Net's function that keeps the largest connected component.
pub(super) const KEEP_LARGEST: [&str; 2] =
    ["nnunetv2.postprocessing.remove_connected_components", "remove_all_but_largest_component_from_segmentation"];

impl Global {
    /// The one of this name, the only place where names become meaning.
    pub(super) fn of(module: &str, name: &str) -> Result<Self, Fault> {
        let known = match (module, name) {
            ("collections", "OrderedDict") => Some(Self::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Some(Self::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Some(Self::RebuildParameter),
            ("torch", "device") => Some(Self::Device),
            ("torch", "Size") => Some(Self::Size),
            ("numpy.core.multiarray" | "numpy._core.multiarray", "scalar") => Some(Self::NumpyScalar),
            ("numpy", "dtype") => Some(Self::NumpyDtype),
            ("_codecs", "encode") => Some(Self::Encode),
            named if [named.0, named.1] == KEEP_LARGEST => Some(Self::KeepLargestComponent),
            ("torch", storage) => {
                let found = Element::STORAGES.iter().find(|(class, _)| *class == storage);
                found.map(|(_, element)| Self::Storage(*element))
            }
            _ => None,
        };
        known.ok_or_else(|| Fault::Global(format!("{module}.{name}")))
    }
}

/// A numpy type, by which a scalar's bytes are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Numpy {
    Bool,
    Signed(usize),
    Unsigned(usize),
    Float(usize),
}

impl Numpy {
    /// From numpy's code, such as `f8`.
    pub(super) fn of(code: &str) -> Result<Self, Fault> {
        match code {
            "b1" => Ok(Self::Bool),
            "i1" => Ok(Self::Signed(1)),
            "i2" => Ok(Self::Signed(2)),
            "i4" => Ok(Self::Signed(4)),
            "i8" => Ok(Self::Signed(8)),
            "u1" => Ok(Self::Unsigned(1)),
            "u2" => Ok(Self::Unsigned(2)),
            "u4" => Ok(Self::Unsigned(4)),
            "u8" => Ok(Self::Unsigned(8)),
            "f2" => Ok(Self::Float(2)),
            "f4" => Ok(Self::Float(4)),
            "f8" => Ok(Self::Float(8)),
            _ => Err(damaged(format!("a numpy scalar of type {code:?}"))),
        }
    }

    /// The scalar in little-endian bytes.
    pub(super) fn scalar(self, bytes: &[u8]) -> Result<Value, Fault> {
        let (Self::Signed(size) | Self::Unsigned(size) | Self::Float(size)) = self else {
            return match bytes {
                [byte] => Ok(Value::Bool(*byte != 0)),
                _ => Err(damaged(format!("a numpy bool of {} bytes", bytes.len()))),
            };
        };
        if bytes.len() != size {
            return Err(damaged(format!("a numpy scalar of {} bytes instead of {size}", bytes.len())));
        }
        let bits = bytes.iter().rev().fold(0u64, |bits, &byte| bits << 8 | u64::from(byte));
        Ok(match self {
            Self::Float(2) => Value::Float(half::f16::from_bits(bits as u16).to_f64()),
            Self::Float(4) => Value::Float(f32::from_bits(bits as u32).into()),
            Self::Float(_) => Value::Float(f64::from_bits(bits)),
            Self::Signed(_) => {
                let unused = 64 - 8 * size as u32;
                Value::Int((bits << unused) as i64 >> unused)
            }
            _ => match i64::try_from(bits) {
                Ok(value) => Value::Int(value),
                Err(_) => Value::Float(bits as f64),
            },
        })
    }
}

/// The bytes that Python's `_codecs.encode(text, 'latin1')` gives.
pub(super) fn latin1(text: &str, encoding: &str) -> Result<Vec<u8>, Fault> {
    if !["latin1", "latin-1"].contains(&encoding) {
        return Err(damaged(format!("bytes in the encoding {encoding:?}")));
    }
    let byte = |letter: char| u8::try_from(u32::from(letter)).map_err(|_| damaged("text that is no latin1".into()));
    text.chars().map(byte).collect()
}

/// A view of a storage, checked to lie inside of it and to show no element twice.
pub(super) fn tensor(
    (storage, element, stored): (String, Element, usize),
    offset: &Value,
    shape: &Value,
    strides: &Value,
) -> Result<Tensor, Fault> {
    let indices = |value: &Value| value.items()?.iter().map(Value::as_index).collect::<Option<Vec<usize>>>();
    let (Some(offset), Some(shape), Some(strides)) = (offset.as_index(), indices(shape), indices(strides)) else {
        return Err(damaged(format!("the tensor of storage {storage:?} has no valid offset, shape or strides")));
    };
    let outside = || damaged(format!("a tensor of shape {shape:?} reaches beyond its storage {storage:?} of {stored}"));
    if shape.len() != strides.len() || shape.len() > 16 {
        return Err(damaged(format!("a tensor has the shape {shape:?} and the strides {strides:?}")));
    }
    let count = shape.iter().try_fold(1usize, |count, &n| count.checked_mul(n)).ok_or_else(outside)?;
    if count > 0 {
        let reach = |sum: usize, (&n, &stride): (&usize, &usize)| sum.checked_add((n - 1).checked_mul(stride)?);
        let last = shape.iter().zip(&strides).try_fold(offset, reach).ok_or_else(outside)?;
        // More elements than there are: something is shown twice, and a small file could ask for endless memory.
        if last >= stored || count > stored {
            return Err(outside());
        }
    }
    Ok(Tensor { storage, element, stored, offset, shape, strides })
}
