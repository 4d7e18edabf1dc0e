//! Values and gradients that know of an instance norm: what can be computed again, and what has been taken on the way.

use crate::error::Result;
use crate::kernels::conv3d::{self, NormBefore};
use crate::kernels::instance_norm::{self, Coefficients, GradientParts, Norm, NormGradient};
use crate::kernels::{Buffer, Context, Dtype, elementwise};
use crate::parameters::Parameter;
use crate::tensor::{Shape, Tensor};
use std::sync::{Arc, OnceLock};

/// What an instance norm and its activation are computed from: the tensor before them, which their own backward needs
/// too, and a few numbers a channel.
#[derive(Debug)]
pub(crate) struct Normalised {
    pub problem: instance_norm::Problem,
    pub raw: Raw,
    /// f32 `[batch, 2, channels]`: mean and inverse deviation.
    pub statistics: Buffer,
    pub weight: Parameter,
    pub bias: Parameter,
    /// For convolutions that take the sums of a gradient, where there are any.
    pub coefficients: Option<Coefficients>,
}

impl Normalised {
    /// What normalises, as the kernels take it.
    pub fn norm(&self) -> Norm<'_> {
        Norm { statistics: &self.statistics, gamma: self.weight.value(), beta: self.bias.value() }
    }

    /// Where the gradients of its parameters go.
    pub fn gradient(&self) -> NormGradient<'_> {
        NormGradient { gamma: self.weight.gradient(), beta: self.bias.gradient() }
    }

    /// Normalises and activates into a new tensor: the same bits every time.
    pub fn activate(&self, context: &Context) -> Result<Tensor> {
        let raw = self.raw.tensor(context)?;
        let output = Tensor::empty(context, raw.shape(), raw.buffer().dtype())?;
        instance_norm::apply(context, &self.problem, raw.buffer(), &self.norm(), output.buffer())?;
        Ok(output)
    }

    /// Normalises, adds the skip of a residual block and activates, into a new tensor.
    pub fn activate_onto(&self, context: &Context, skip: &Tensor) -> Result<Tensor> {
        let raw = self.raw.tensor(context)?;
        let output = Tensor::empty(context, raw.shape(), raw.buffer().dtype())?;
        let (raw, skip) = (raw.buffer(), skip.buffer());
        instance_norm::apply_onto(context, &self.problem, raw, &self.norm(), skip, output.buffer())?;
        Ok(output)
    }

    /// As the norm before a convolution that takes the sums of its gradient; `raw` is its own.
    pub fn before<'a>(&'a self, raw: &'a Tensor) -> Option<NormBefore<'a>> {
        self.coefficients.as_ref().map(|by| NormBefore { raw: raw.buffer(), by })
    }
}

/// The tensor that a norm reads.
#[derive(Debug)]
pub(crate) enum Raw {
    /// As it was.
    Kept(Tensor),
    /// What a convolution puts out, computed again when it is first asked for.
    Again(Box<Convolution>, OnceLock<Tensor>),
}

impl Raw {
    /// The tensor: the same bits every time. One that was computed again lives as long as this.
    pub fn tensor(&self, context: &Context) -> Result<Tensor> {
        match self {
            Self::Kept(tensor) => Ok(tensor.clone()),
            Self::Again(convolution, computed) => match computed.get() {
                Some(tensor) => Ok(tensor.clone()),
                None => {
                    let tensor = convolution.output(context)?;
                    Ok(computed.get_or_init(|| tensor).clone())
                }
            },
        }
    }
}

/// A convolution with everything that it reads.
#[derive(Debug)]
pub(crate) struct Convolution {
    pub problem: conv3d::Problem,
    pub x: Kept,
    pub second: Option<Kept>,
    pub weight: Parameter,
    pub bias: Option<Parameter>,
    pub out_shape: Shape,
    pub dtype: Dtype,
    /// Whether its kernel takes moments: the same one computes the same bits.
    pub with_moments: bool,
}

impl Convolution {
    fn output(&self, context: &Context) -> Result<Tensor> {
        let output = Tensor::empty(context, self.out_shape, self.dtype)?;
        let (x, second) = (self.x.tensor(context)?, self.second.as_ref().map(|kept| kept.tensor(context)).transpose()?);
        let (x, second) = (x.buffer(), second.as_ref().map(Tensor::buffer));
        let (w, b, y) = (self.weight.value(), self.bias.as_ref().map(Parameter::value), output.buffer());
        match self.with_moments {
            true => conv3d::forward_with_moments(context, &self.problem, x, second, w, b, y).map(drop)?,
            false => conv3d::forward(context, &self.problem, x, second, w, b, y)?,
        }
        Ok(output)
    }
}

/// What an operation has put out.
#[derive(Clone, Debug)]
pub(crate) struct Value {
    pub tensor: Tensor,
    /// The norm that has put it out.
    pub norm: Option<Arc<Normalised>>,
    /// Whether backward computes it again instead of keeping it.
    recompute: bool,
}

impl From<Tensor> for Value {
    fn from(tensor: Tensor) -> Self {
        Self { tensor, norm: None, recompute: false }
    }
}

impl Value {
    /// Of a norm and its activation.
    pub fn normalised(tensor: Tensor, norm: Arc<Normalised>, recompute: bool) -> Self {
        Self { tensor, norm: Some(norm), recompute }
    }

    /// The value as an operation's backward should keep it.
    pub fn keep(&self) -> Kept {
        match &self.norm {
            Some(norm) if self.recompute => Kept::Recomputed(norm.clone()),
            _ => Kept::Stored(self.tensor.clone()),
        }
    }
}

/// A value as backward keeps it.
#[derive(Clone, Debug)]
pub(crate) enum Kept {
    Stored(Tensor),
    Recomputed(Arc<Normalised>),
}

impl Kept {
    /// The value: a new tensor if it has to be computed again, which should be dropped as soon as it was used.
    pub fn tensor(&self, context: &Context) -> Result<Tensor> {
        match self {
            Self::Stored(tensor) => Ok(tensor.clone()),
            Self::Recomputed(normalised) => normalised.activate(context),
        }
    }
}

/// A gradient on its way back.
pub(crate) struct TensorGradient {
    pub tensor: Tensor,
    /// Of the gradient of a normalised value: what the norm's own backward begins with, if the kernel that stored the gradient
    /// has taken it.
    pub parts: Option<GradientParts>,
}

impl From<Tensor> for TensorGradient {
    fn from(tensor: Tensor) -> Self {
        Self { tensor, parts: None }
    }
}

impl TensorGradient {
    /// Adds another gradient of the same variable, in place. What was taken of the first alone is then of no use.
    pub fn add(&mut self, context: &Context, more: &Self) -> Result<()> {
        elementwise::add_assign(context, self.tensor.buffer(), more.tensor.buffer())?;
        self.parts = None;
        Ok(())
    }
}
