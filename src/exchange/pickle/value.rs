//! What a checkpoint's pickle may hold.

use serde_json::{Map, Number};

/// Element type of a tensor, as PyTorch's storages name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// `torch.float64`.
    Double,
    /// `torch.float32`.
    Float,
    /// `torch.float16`.
    Half,
    /// `torch.bfloat16`.
    BFloat16,
    /// `torch.int64`.
    Long,
    /// `torch.int32`.
    Int,
    /// `torch.int16`.
    Short,
    /// `torch.int8`.
    Char,
    /// `torch.uint8`.
    Byte,
    /// `torch.bool`.
    Bool,
}

impl Element {
    /// Every type, with the class of its storages in PyTorch.
    pub(super) const STORAGES: [(&'static str, Self); 10] = [
        ("DoubleStorage", Self::Double),
        ("FloatStorage", Self::Float),
        ("HalfStorage", Self::Half),
        ("BFloat16Storage", Self::BFloat16),
        ("LongStorage", Self::Long),
        ("IntStorage", Self::Int),
        ("ShortStorage", Self::Short),
        ("CharStorage", Self::Char),
        ("ByteStorage", Self::Byte),
        ("BoolStorage", Self::Bool),
    ];

    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::Double | Self::Long => 8,
            Self::Float | Self::Int => 4,
            Self::Half | Self::BFloat16 | Self::Short => 2,
            Self::Char | Self::Byte | Self::Bool => 1,
        }
    }
}

/// A tensor: a strided view of a storage, whose bytes lie in an entry of their own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Name of the storage.
    pub storage: String,
    /// Type of its elements.
    pub element: Element,
    /// Elements of the whole storage.
    pub stored: usize,
    /// The first element of the view.
    pub offset: usize,
    /// Extent along each axis.
    pub shape: Vec<usize>,
    /// Elements from one index to the next along each axis.
    pub strides: Vec<usize>,
}

impl Tensor {
    /// All of a storage of f32, in the order of its axes.
    pub fn contiguous(storage: String, shape: &[usize]) -> Self {
        let mut strides = vec![1; shape.len()];
        for axis in (1..shape.len()).rev() {
            strides[axis - 1] = strides[axis] * shape[axis];
        }
        let stored = shape.iter().product();
        Self { storage, element: Element::Float, stored, offset: 0, shape: shape.to_vec(), strides }
    }
}

/// A plain value, a container of plain values, or a tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Python's `None`.
    None,
    /// A truth value.
    Bool(bool),
    /// An integer.
    Int(i64),
    /// A float, numpy's scalars among them.
    Float(f64),
    /// A string.
    Text(String),
    /// Bytes.
    Bytes(Vec<u8>),
    /// A list.
    List(Vec<Value>),
    /// A tuple.
    Tuple(Vec<Value>),
    /// A dict or an `OrderedDict`, in its order.
    Dict(Vec<(Value, Value)>),
    /// A `torch.device`, such as `cuda:0`.
    Device(String),
    /// A tensor.
    Tensor(Tensor),
    /// nnU-Net's function that keeps the largest connected component, by name only.
    KeepLargestComponent,
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl Value {
    /// A dict with strings as keys.
    pub fn dict<'a>(entries: impl IntoIterator<Item = (&'a str, Value)>) -> Self {
        Self::Dict(entries.into_iter().map(|(key, value)| (key.into(), value)).collect())
    }

    /// An entry of a dict; the last one of its name, as in Python.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let Self::Dict(entries) = self else { return None };
        entries.iter().rev().find(|(k, _)| matches!(k, Self::Text(text) if text == key)).map(|(_, value)| value)
    }

    /// A string.
    pub fn as_text(&self) -> Option<&str> {
        if let Self::Text(text) = self { Some(text) } else { None }
    }

    /// An integer from 0.
    pub fn as_index(&self) -> Option<usize> {
        if let Self::Int(value) = self { usize::try_from(*value).ok() } else { None }
    }

    /// A number; integers and truth values count.
    pub fn as_number(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            Self::Int(value) => Some(*value as f64),
            Self::Bool(value) => Some(f64::from(u8::from(*value))),
            _ => None,
        }
    }

    /// The items of a list or tuple.
    pub fn items(&self) -> Option<&[Value]> {
        if let Self::List(items) | Self::Tuple(items) = self { Some(items) } else { None }
    }

    /// The same in JSON, if JSON can say it: keys become strings, tuples lists.
    pub fn to_json(&self) -> Option<serde_json::Value> {
        use serde_json::Value as Json;
        Some(match self {
            Self::None => Json::Null,
            Self::Bool(value) => Json::Bool(*value),
            Self::Int(value) => Json::Number((*value).into()),
            Self::Float(value) => Json::Number(Number::from_f64(*value)?),
            Self::Text(text) => Json::String(text.clone()),
            Self::List(items) | Self::Tuple(items) => {
                Json::Array(items.iter().map(Self::to_json).collect::<Option<_>>()?)
            }
            Self::Dict(entries) => {
                let mut object = Map::new();
                for (key, value) in entries {
                    let key = match key {
                        Self::Text(text) => text.clone(),
                        Self::Int(number) => number.to_string(),
                        _ => return None,
                    };
                    object.insert(key, value.to_json()?);
                }
                Json::Object(object)
            }
            Self::Bytes(_) | Self::Device(_) | Self::Tensor(_) | Self::KeepLargestComponent => return None,
        })
    }

    /// The same from JSON.
    pub fn from_json(json: &serde_json::Value) -> Self {
        use serde_json::Value as Json;
        match json {
            Json::Null => Self::None,
            Json::Bool(value) => Self::Bool(*value),
            Json::Number(number) => match number.as_i64() {
                Some(value) => Self::Int(value),
                None => Self::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Json::String(text) => Self::Text(text.clone()),
            Json::Array(items) => Self::List(items.iter().map(Self::from_json).collect()),
            Json::Object(object) => {
                Self::Dict(object.iter().map(|(key, value)| (key.as_str().into(), Self::from_json(value))).collect())
            }
        }
    }
}
