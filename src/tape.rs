//! Reverse-mode differentiation: a tape of closures.
//!
//! Every operation pushes one closure that turns the gradient of its output into the gradients of its inputs. The
//! order of pushing is already topological, so backward pops closures from the end: each is consumed and drops what it
//! kept as soon as it has run, and memory falls as backward proceeds. Gradients of parameters do not travel over the
//! tape: a closure writes them where the parameter store keeps them.

use crate::error::Result;
use crate::kernels::instance_norm::{self, Norm};
use crate::kernels::{Buffer, Context, elementwise};
use crate::parameters::Parameter;
use crate::tensor::Tensor;

/// Turns the gradient of an output into the gradients of the inputs, in the order in which they were recorded; `None`
/// for an input that needs none.
type Backward = Box<dyn FnOnce(Tensor) -> Result<Vec<Option<Tensor>>>>;

/// A tensor that takes part in differentiation.
#[derive(Clone, Debug)]
pub struct Var {
    tensor: Tensor,
    /// Place of the gradient; `None` for data, which has no gradient.
    id: Option<usize>,
    /// How to compute the value again.
    normalised: Option<Box<Normalised>>,
}

/// What an instance norm and its activation are computed from: the tensor before them, which their own backward needs
/// too, and a few numbers a channel.
#[derive(Clone, Debug)]
pub struct Normalised {
    pub(crate) problem: instance_norm::Problem,
    pub(crate) raw: Tensor,
    /// f32 `[batch, 2, channels]`: mean and inverse deviation.
    pub(crate) statistics: Buffer,
    pub(crate) weight: Parameter,
    pub(crate) bias: Parameter,
}

impl Normalised {
    /// What normalises, as the kernels take it.
    pub(crate) fn norm(&self) -> Norm<'_> {
        Norm { statistics: &self.statistics, gamma: self.weight.value(), beta: self.bias.value() }
    }

    /// Normalises and activates into a new tensor: the same bits every time.
    pub(crate) fn activate(&self, context: &Context) -> Result<Tensor> {
        let raw = self.raw.buffer();
        let output = Tensor::empty(context, self.raw.shape(), raw.dtype())?;
        instance_norm::apply(context, &self.problem, raw, &self.norm(), output.buffer())?;
        Ok(output)
    }
}

/// A value as backward keeps it.
pub(crate) enum Kept {
    Stored(Tensor),
    Recomputed(Box<Normalised>),
}

impl Kept {
    /// The value; a new tensor if it has to be computed again, which should be dropped as soon as it was used.
    pub(crate) fn tensor(&self, context: &Context) -> Result<Tensor> {
        match self {
            Self::Stored(tensor) => Ok(tensor.clone()),
            Self::Recomputed(normalised) => normalised.activate(context),
        }
    }
}

impl Var {
    /// Data: no gradient flows into it.
    pub fn data(tensor: Tensor) -> Self {
        Self { tensor, id: None, normalised: None }
    }

    /// The value.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Whether backward has to compute a gradient for this.
    pub fn needs_gradient(&self) -> bool {
        self.id.is_some()
    }

    /// Tells backward that it need not keep the value.
    pub(crate) fn recomputed_from(mut self, normalised: Normalised) -> Self {
        self.normalised = Some(Box::new(normalised));
        self
    }

    /// The value as an operation's backward should keep it.
    pub(crate) fn keep(&self) -> Kept {
        match &self.normalised {
            Some(normalised) => Kept::Recomputed(normalised.clone()),
            None => Kept::Stored(self.tensor.clone()),
        }
    }
}

struct Step {
    output: usize,
    inputs: Vec<Option<usize>>,
    backward: Backward,
}

/// What is done together, or again, instead of going through memory. But for `recompute_activations`, which gives the same
/// bits, the results differ by rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fusion {
    /// Whether backward computes normalised activations again from the convolution's output, which it keeps anyway,
    /// instead of keeping both. Costs a pass over the tensor (one read, one write) for each operation that reads it.
    pub recompute_activations: bool,
    /// Whether a convolution before an instance norm takes the moments of its output while it stores it. Saves the pass over
    /// the output that does nothing else.
    pub moments_by_convolution: bool,
    /// Whether the gradient of a convolution's bias before an instance norm, which takes every constant out again, is left at
    /// the 0 that it is; computed, it is a sum of rounding errors. Saves a pass over the gradient of the output.
    pub no_bias_gradient_before_norm: bool,
}

impl Fusion {
    /// Every operation on its own, and nothing computed twice: what the fused ones are tested against.
    pub const NONE: Self =
        Self { recompute_activations: false, moments_by_convolution: false, no_bias_gradient_before_norm: false };
}

impl Default for Fusion {
    fn default() -> Self {
        Self { recompute_activations: true, moments_by_convolution: true, no_bias_gradient_before_norm: true }
    }
}

/// The record of one forward pass.
pub struct Tape {
    context: Context,
    fusion: Fusion,
    recording: bool,
    steps: Vec<Step>,
    variables: usize,
}

impl Tape {
    /// A tape that records, for training.
    pub fn new(context: &Context) -> Self {
        Self { context: context.clone(), fusion: Fusion::default(), recording: true, steps: Vec::new(), variables: 0 }
    }

    /// A tape that keeps nothing, for inference.
    pub fn inference(context: &Context) -> Self {
        Self { recording: false, ..Self::new(context) }
    }

    /// The same with other settings.
    pub fn with_fusion(self, fusion: Fusion) -> Self {
        Self { fusion, ..self }
    }

    /// The settings.
    pub fn fusion(&self) -> Fusion {
        self.fusion
    }

    /// Where operations launch.
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Whether backward can follow.
    pub fn is_recording(&self) -> bool {
        self.recording
    }

    /// Registers the output of an operation with what backward has to do for it.
    pub fn record(
        &mut self,
        output: Tensor,
        inputs: &[&Var],
        backward: impl FnOnce(Tensor) -> Result<Vec<Option<Tensor>>> + 'static,
    ) -> Var {
        if !self.recording {
            return Var::data(output);
        }
        let id = self.variables;
        self.variables += 1;
        let inputs = inputs.iter().map(|input| input.id).collect();
        self.steps.push(Step { output: id, inputs, backward: Box::new(backward) });
        Var { tensor: output, id: Some(id), normalised: None }
    }

    /// Runs backward from the given outputs and their gradients, and consumes the tape.
    ///
    /// # Errors
    /// Of any operation's backward.
    pub fn backward(mut self, seeds: Vec<(Var, Tensor)>) -> Result<()> {
        let mut gradients: Vec<Option<Tensor>> = vec![None; self.variables];
        for (output, gradient) in seeds {
            arrive(&self.context, &mut gradients, output.id, gradient)?;
        }
        while let Some(step) = self.steps.pop() {
            // An output that nothing used has no gradient: nothing to do.
            let Some(gradient) = gradients[step.output].take() else { continue };
            for (input, gradient) in step.inputs.into_iter().zip((step.backward)(gradient)?) {
                if let Some(gradient) = gradient {
                    arrive(&self.context, &mut gradients, input, gradient)?;
                }
            }
        }
        Ok(())
    }
}

/// The first gradient of a variable is moved in, later ones are added to it in place.
fn arrive(
    context: &Context,
    gradients: &mut [Option<Tensor>],
    variable: Option<usize>,
    gradient: Tensor,
) -> Result<()> {
    if let Some(id) = variable {
        match &gradients[id] {
            None => gradients[id] = Some(gradient),
            Some(sum) => elementwise::add_assign(context, sum.buffer(), gradient.buffer())?,
        }
    }
    Ok(())
}
