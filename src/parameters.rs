//! The parameter store: every parameter under its nnU-Net state-dict name, all values, gradients and momenta in one
//! flat f32 buffer each, so that the optimiser needs few launches and a checkpoint is a plain walk.

use crate::error::{Error, NetworkError, Result};
use crate::kernels::{Buffer, Context, Dtype, elementwise};
use std::collections::HashMap;

/// Parts of the flat buffers start at multiples of this many elements (256 bytes, the strictest alignment that a
/// device asks of a part of a buffer). The gaps hold zeros.
const ALIGNMENT: usize = 64;

/// What a parameter is, which fixes its layout here and in PyTorch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParameterKind {
    /// `[kd, kh, kw, inputs, outputs]` here; `[outputs, inputs, kd, kh, kw]` in PyTorch.
    ConvWeight {
        /// Taps along depth, height, width.
        kernel: [usize; 3],
        /// Input channels.
        inputs: usize,
        /// Output channels.
        outputs: usize,
    },
    /// `[kd, kh, kw, inputs, outputs]` here; `[inputs, outputs, kd, kh, kw]` in PyTorch.
    TransposedConvWeight {
        /// Taps along depth, height, width.
        kernel: [usize; 3],
        /// Input channels.
        inputs: usize,
        /// Output channels.
        outputs: usize,
    },
    /// A bias, or the scale or shift of a norm: one value a channel.
    Vector {
        /// Channels.
        len: usize,
    },
}

impl ParameterKind {
    /// Number of elements.
    pub fn len(&self) -> usize {
        match *self {
            Self::ConvWeight { kernel, inputs, outputs } | Self::TransposedConvWeight { kernel, inputs, outputs } => {
                kernel.iter().product::<usize>() * inputs * outputs
            }
            Self::Vector { len } => len,
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Shape in PyTorch's layout.
    pub fn torch_shape(&self) -> Vec<usize> {
        match *self {
            Self::ConvWeight { kernel: [d, h, w], inputs, outputs } => vec![outputs, inputs, d, h, w],
            Self::TransposedConvWeight { kernel: [d, h, w], inputs, outputs } => vec![inputs, outputs, d, h, w],
            Self::Vector { len } => vec![len],
        }
    }

    /// For each element in PyTorch's order, its index here.
    fn torch_order(&self) -> Vec<usize> {
        let weight = |kernel: [usize; 3], inputs: usize, outputs: usize, transposed: bool| {
            let taps: usize = kernel.iter().product();
            let (slow, fast) = if transposed { (inputs, outputs) } else { (outputs, inputs) };
            let mut order = Vec::with_capacity(taps * inputs * outputs);
            for s in 0..slow {
                for f in 0..fast {
                    let (i, o) = if transposed { (s, f) } else { (f, s) };
                    order.extend((0..taps).map(|k| (k * inputs + i) * outputs + o));
                }
            }
            order
        };
        match *self {
            Self::ConvWeight { kernel, inputs, outputs } => weight(kernel, inputs, outputs, false),
            Self::TransposedConvWeight { kernel, inputs, outputs } => weight(kernel, inputs, outputs, true),
            Self::Vector { len } => (0..len).collect(),
        }
    }

    /// Values in PyTorch's layout from values in ours.
    pub fn to_torch(&self, values: &[f32]) -> Vec<f32> {
        self.torch_order().into_iter().map(|i| values[i]).collect()
    }

    /// Values in our layout from values in PyTorch's.
    pub fn from_torch(&self, torch: &[f32]) -> Vec<f32> {
        let mut values = vec![0.0; torch.len()];
        for (i, &value) in self.torch_order().into_iter().zip(torch) {
            values[i] = value;
        }
        values
    }
}

/// One parameter: views into the store's buffers. Clones share them.
#[derive(Clone, Debug)]
pub struct Parameter {
    name: String,
    kind: ParameterKind,
    offset: usize,
    value: Buffer,
    gradient: Buffer,
}

impl Parameter {
    /// nnU-Net's state-dict key, without aliases.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// All keys under which nnU-Net's state dict holds it, [`name`](Self::name) first. A block registers its convolution and its
    /// norm a second time, in a list of all modules, and the decoder registers the encoder.
    pub fn state_dict_keys(&self) -> Vec<String> {
        let mut keys = vec![self.name.clone()];
        for (module, place) in [(".conv.", ".all_modules.0."), (".norm.", ".all_modules.1.")] {
            if let Some((block, value)) = self.name.rsplit_once(module) {
                keys.push(format!("{block}{place}{value}"));
            }
        }
        if self.name.starts_with("encoder.") {
            keys.extend(keys.clone().iter().map(|key| format!("decoder.{key}")));
        }
        keys
    }

    /// What it is.
    pub fn kind(&self) -> ParameterKind {
        self.kind
    }

    /// The values, f32.
    pub fn value(&self) -> &Buffer {
        &self.value
    }

    /// Where backward writes the gradient, f32.
    pub fn gradient(&self) -> &Buffer {
        &self.gradient
    }
}

/// A parameter of a network, by its place in the store that was built with the network's layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ParameterId(usize);

/// Collects parameters while the layers of a network are described: a layer asks for what it needs and keeps the
/// [`ParameterId`]s, and [`ParameterBuilder::build`] allocates all of them at once. The order is that of PyTorch's optimiser.
#[derive(Debug, Default)]
pub struct ParameterBuilder {
    declared: Vec<(String, ParameterKind, bool)>,
}

impl ParameterBuilder {
    /// Where names begin.
    pub fn root(&mut self) -> Scope<'_> {
        Scope { builder: self, prefix: String::new(), untrained: false }
    }

    /// Allocates the store.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn build(self, context: &Context) -> Result<Parameters> {
        Parameters::new(context, self.declared)
    }
}

/// A module whose parameters are being collected: the prefix of their names.
#[derive(Debug)]
pub struct Scope<'a> {
    builder: &'a mut ParameterBuilder,
    prefix: String,
    untrained: bool,
}

impl Scope<'_> {
    /// A module inside of this one.
    pub fn within(&mut self, module: impl std::fmt::Display) -> Scope<'_> {
        Scope { prefix: format!("{}{module}.", self.prefix), builder: self.builder, untrained: self.untrained }
    }

    /// The same module, of parameters that never receive a gradient.
    pub fn untrained(self) -> Self {
        Self { untrained: true, ..self }
    }

    /// Adds a parameter.
    pub fn add(&mut self, name: &str, kind: ParameterKind) -> ParameterId {
        self.builder.declared.push((format!("{}{name}", self.prefix), kind, self.untrained));
        ParameterId(self.builder.declared.len() - 1)
    }

    /// Adds a parameter of one value for each of `len` channels.
    pub fn vector(&mut self, name: &str, len: usize) -> ParameterId {
        self.add(name, ParameterKind::Vector { len })
    }
}

/// All parameters of a network, in the order in which PyTorch's optimiser sees them.
#[derive(Debug)]
pub struct Parameters {
    list: Vec<Parameter>,
    by_name: HashMap<String, usize>,
    values: Buffer,
    gradients: Buffer,
    momenta: Buffer,
    trained: usize,
}

/// Name, shape and values of a parameter, in PyTorch's layout.
pub type NamedTensor = (String, Vec<usize>, Vec<f32>);

/// A flat state of the store that checkpoints save.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// The values.
    Value,
    /// The gradients of the last step.
    Gradient,
    /// The optimiser's momentum.
    Momentum,
}

impl Parameters {
    /// Allocates a store for `(name, kind, untrained)`; `untrained` parameters never receive a gradient and are left
    /// alone by the optimiser, as PyTorch skips parameters without gradient.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn new(context: &Context, declared: Vec<(String, ParameterKind, bool)>) -> Result<Self> {
        let padded = |kind: &ParameterKind| kind.len().next_multiple_of(ALIGNMENT);
        let size =
            |untrained: bool| -> usize { declared.iter().filter(|d| d.2 == untrained).map(|d| padded(&d.1)).sum() };
        // Untrained parameters lie behind the others, so that the optimiser runs over one range.
        let (trained, total) = (size(false), size(false) + size(true));
        let zeros = || -> Result<Buffer> {
            let buffer = context.empty(total, Dtype::F32)?;
            elementwise::fill(context, &buffer, 0.0)?;
            Ok(buffer)
        };
        let (values, gradients, momenta) = (zeros()?, zeros()?, zeros()?);
        let (mut next_trained, mut next_untrained) = (0, trained);
        let mut list = Vec::with_capacity(declared.len());
        for (name, kind, untrained) in declared {
            let next = if untrained { &mut next_untrained } else { &mut next_trained };
            let offset = *next;
            *next += padded(&kind);
            let value = values.part(offset, kind.len())?;
            let gradient = gradients.part(offset, kind.len())?;
            list.push(Parameter { name, kind, offset, value, gradient });
        }
        let by_name = list.iter().enumerate().map(|(i, p)| (p.name.clone(), i)).collect();
        Ok(Self { list, by_name, values, gradients, momenta, trained })
    }

    /// All parameters, in the optimiser's order.
    pub fn iter(&self) -> impl Iterator<Item = &Parameter> {
        self.list.iter()
    }

    /// The parameter that a layer of the same network asked for.
    ///
    /// # Panics
    /// May panic for the id of another network's parameter.
    pub fn of(&self, id: ParameterId) -> &Parameter {
        &self.list[id.0]
    }

    /// The parameter of a name.
    pub fn get(&self, name: &str) -> Option<&Parameter> {
        self.by_name.get(name).map(|&i| &self.list[i])
    }

    /// Number of learnable values.
    pub fn count(&self) -> usize {
        self.list.iter().map(|p| p.kind.len()).sum()
    }

    /// The flat range that the optimiser works on: values, gradients and momenta.
    ///
    /// # Errors
    /// None in practice: the range starts at 0.
    pub fn trained(&self) -> Result<[Buffer; 3]> {
        let part = |buffer: &Buffer| buffer.part(0, self.trained);
        Ok([part(&self.values)?, part(&self.gradients)?, part(&self.momenta)?])
    }

    /// Downloads one slot of every parameter, in PyTorch's layout.
    ///
    /// # Errors
    /// If what computed them failed.
    pub fn to_torch(&self, context: &Context, slot: Slot) -> Result<Vec<NamedTensor>> {
        let flat = context.download_f32(self.flat(slot))?;
        let one = |p: &Parameter| {
            (p.name.clone(), p.kind.torch_shape(), p.kind.to_torch(&flat[p.offset..p.offset + p.kind.len()]))
        };
        Ok(self.list.iter().map(one).collect())
    }

    /// Uploads one slot from values in PyTorch's layout, by name. Every parameter must be given, with its shape.
    ///
    /// # Errors
    /// [`NetworkError::State`] naming the first parameter that is missing or has another shape.
    pub fn load_torch<'a>(
        &self,
        context: &Context,
        slot: Slot,
        lookup: impl Fn(&str) -> Option<(&'a [usize], &'a [f32])>,
    ) -> Result<()> {
        let mut flat = vec![0.0; self.values.len()];
        for p in &self.list {
            let (shape, values) = lookup(&p.name).ok_or_else(|| {
                Error::Network(NetworkError::State { name: p.name.clone(), problem: "is missing".into() })
            })?;
            if shape != p.kind.torch_shape() {
                let problem = format!("has shape {shape:?}, this network has {:?}", p.kind.torch_shape());
                return Err(Error::Network(NetworkError::State { name: p.name.clone(), problem }));
            }
            flat[p.offset..p.offset + p.kind.len()].copy_from_slice(&p.kind.from_torch(values));
        }
        context.write(self.flat(slot), &flat)?;
        Ok(())
    }

    fn flat(&self, slot: Slot) -> &Buffer {
        match slot {
            Slot::Value => &self.values,
            Slot::Gradient => &self.gradients,
            Slot::Momentum => &self.momenta,
        }
    }

    /// Overwrites all values at once, in the store's own flat layout.
    pub(crate) fn write_values(&self, context: &Context, fill: impl Fn(&Parameter, &mut [f32])) -> Result<()> {
        let mut flat = vec![0.0; self.values.len()];
        for p in &self.list {
            fill(p, &mut flat[p.offset..p.offset + p.kind.len()]);
        }
        context.write(&self.values, &flat)?;
        Ok(())
    }
}
