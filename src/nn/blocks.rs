//! The layers that networks are made of: each is built by asking for its parameters, and computes with them later.

use super::shape::Stage;
use crate::error::Result;
use crate::ops::{self, ConvShape};
use crate::parameters::{Parameter, ParameterId, ParameterKind, Parameters, Scope};
use crate::tape::{Tape, Var};

/// Convolution, instance norm, leaky ReLU.
#[derive(Debug)]
pub(super) struct Block {
    weight: ParameterId,
    bias: Option<ParameterId>,
    norm_weight: ParameterId,
    norm_bias: ParameterId,
    features: usize,
    shape: ConvShape,
    /// The stage, from full resolution on, of a block whose convolution may be computed again for backward
    /// ([`Fusion::recompute_stages`](crate::tape::Fusion::recompute_stages)): one whose output a next block of the stage reads.
    inside: Option<usize>,
}

impl Block {
    pub(super) fn new(module: &mut Scope, shape: ConvShape, inputs: usize, features: usize, bias: bool) -> Self {
        let weight = ParameterKind::ConvWeight { kernel: shape.kernel, inputs, outputs: features };
        Self {
            weight: module.add("conv.weight", weight),
            bias: bias.then(|| module.vector("conv.bias", features)),
            norm_weight: module.vector("norm.weight", features),
            norm_bias: module.vector("norm.bias", features),
            features,
            shape,
            inside: None,
        }
    }

    /// The same, inside of a stage: nobody beyond it reads what it puts out.
    pub(super) fn inside(self, stage: usize) -> Self {
        Self { inside: Some(stage), ..self }
    }

    /// `count` blocks in a row, of stage `number` from full resolution on; the first with a stride and, where its input is a
    /// concatenation, with the channels of both.
    pub(super) fn several(
        module: &mut Scope,
        (number, stage): (usize, &Stage),
        count: usize,
        inputs: usize,
        stride: [usize; 3],
        bias: bool,
    ) -> Vec<Self> {
        let block = |i: usize| {
            let (inputs, stride) = if i == 0 { (inputs, stride) } else { (stage.features, [1; 3]) };
            let shape = ConvShape { kernel: stage.kernel, stride };
            let block = Self::new(&mut module.within(format_args!("convs.{i}")), shape, inputs, stage.features, bias);
            if i + 1 < count { block.inside(number) } else { block }
        };
        (0..count).map(block).collect()
    }

    /// Of `x`, or of the concatenation of `x` and `second`.
    pub(super) fn forward(
        &self,
        parameters: &Parameters,
        tape: &mut Tape,
        x: &Var,
        second: Option<&Var>,
    ) -> Result<Var> {
        let (convolution, norm) = self.of(parameters);
        let compute = match self.inside {
            Some(stage) if stage < tape.fusion().recompute_stages => ops::conv3d_norm_leaky_relu_again,
            _ => ops::conv3d_norm_leaky_relu,
        };
        compute(tape, x, second, convolution, norm, self.features, self.shape)
    }

    /// The same without the activation.
    pub(super) fn forward_linear(&self, parameters: &Parameters, tape: &mut Tape, x: &Var) -> Result<Var> {
        let (convolution, norm) = self.of(parameters);
        ops::conv3d_norm(tape, x, convolution, norm, self.features, self.shape)
    }

    /// The same with `skip` added before the activation.
    pub(super) fn forward_onto(&self, parameters: &Parameters, tape: &mut Tape, x: &Var, skip: &Var) -> Result<Var> {
        let (convolution, norm) = self.of(parameters);
        ops::conv3d_norm_onto_leaky_relu(tape, x, skip, convolution, norm, self.features, self.shape)
    }

    /// Weight and bias of the convolution, scale and shift of the norm.
    fn of<'a>(
        &self,
        parameters: &'a Parameters,
    ) -> ((&'a Parameter, Option<&'a Parameter>), (&'a Parameter, &'a Parameter)) {
        let convolution = (parameters.of(self.weight), self.bias.map(|bias| parameters.of(bias)));
        (convolution, (parameters.of(self.norm_weight), parameters.of(self.norm_bias)))
    }
}

/// Transposed convolution that undoes the stride of the stage below.
#[derive(Debug)]
pub(super) struct Upsampling {
    weight: ParameterId,
    bias: Option<ParameterId>,
    features: usize,
    stride: [usize; 3],
}

impl Upsampling {
    pub(super) fn new(module: &mut Scope, below: &Stage, features: usize, bias: bool) -> Self {
        let (kernel, inputs, outputs) = (below.stride, below.features, features);
        Self {
            weight: module.add("weight", ParameterKind::TransposedConvWeight { kernel, inputs, outputs }),
            bias: bias.then(|| module.vector("bias", features)),
            features,
            stride: below.stride,
        }
    }

    pub(super) fn forward(&self, parameters: &Parameters, tape: &mut Tape, x: &Var) -> Result<Var> {
        let (weight, bias) = (parameters.of(self.weight), self.bias.map(|bias| parameters.of(bias)));
        ops::conv_transpose3d(tape, x, weight, bias, self.features, self.stride)
    }
}

/// The 1x1x1 convolution to logits.
#[derive(Debug)]
pub(super) struct Head {
    weight: ParameterId,
    bias: ParameterId,
    heads: usize,
}

impl Head {
    pub(super) fn new(module: &mut Scope, inputs: usize, heads: usize) -> Self {
        Self {
            weight: module.add("weight", ParameterKind::ConvWeight { kernel: [1; 3], inputs, outputs: heads }),
            bias: module.vector("bias", heads),
            heads,
        }
    }

    pub(super) fn forward(&self, parameters: &Parameters, tape: &mut Tape, x: &Var) -> Result<Var> {
        let shape = ConvShape { kernel: [1; 3], stride: [1; 3] };
        ops::conv3d(tape, x, None, parameters.of(self.weight), Some(parameters.of(self.bias)), self.heads, shape)
    }
}
