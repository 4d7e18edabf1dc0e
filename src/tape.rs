//! Reverse-mode differentiation: a tape of closures.
//!
//! Every operation pushes one closure that turns the gradient of its output into the gradients of its inputs. The
//! order of pushing is already topological, so backward pops closures from the end: each is consumed and drops what it
//! kept as soon as it has run, and memory falls as backward proceeds. Gradients of parameters do not travel over the
//! tape: a closure writes them where the parameter store keeps them.

use crate::error::Result;
use crate::kernels::conv3d::fused::NormBefore;
use crate::kernels::instance_norm::{self, Coefficients, GradientParts, Norm, NormGradient, Operand};
use crate::kernels::{Buffer, Context, Dtype, elementwise};
use crate::parameters::Parameter;
use crate::tensor::{Shape, Tensor};
use std::sync::{Arc, OnceLock};

/// Turns the gradient of an output into the gradients of the inputs, in the order in which they were recorded; `None`
/// for an input that needs none. The flag says whether the first input has no other use, so that its gradient is complete.
type Backward = Box<dyn FnOnce(Gradient, bool) -> Result<Vec<Option<Gradient>>>>;

/// A gradient on its way back.
pub(crate) struct Gradient {
    pub tensor: Tensor,
    /// Of the gradient of a normalised value: what the norm's own backward begins with, if the kernel that stored the gradient
    /// has taken it.
    pub parts: Option<GradientParts>,
}

impl From<Tensor> for Gradient {
    fn from(tensor: Tensor) -> Self {
        Self { tensor, parts: None }
    }
}

/// A tensor that takes part in differentiation.
#[derive(Clone, Debug)]
pub struct Var {
    value: Value,
    /// Place of the gradient; `None` for data, which has no gradient.
    id: Option<usize>,
}

#[derive(Clone, Debug)]
enum Value {
    Stored(Tensor),
    /// What an instance norm and its activation put out: stored when somebody has to read it from memory, once.
    Normalised {
        of: Arc<Normalised>,
        stored: Arc<OnceLock<Tensor>>,
        recompute: bool,
    },
}

/// What an instance norm and its activation are computed from: the tensor before them, which their own backward needs
/// too, and a few numbers a channel.
#[derive(Debug)]
pub(crate) struct Normalised {
    pub problem: instance_norm::Problem,
    pub raw: Tensor,
    /// f32 `[batch, 2, channels]`: mean and inverse deviation.
    pub statistics: Buffer,
    pub weight: Parameter,
    pub bias: Parameter,
    /// For convolutions that normalise what they load, or take the sums of a gradient, where there are any.
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
        let raw = self.raw.buffer();
        let output = Tensor::empty(context, self.raw.shape(), raw.dtype())?;
        instance_norm::apply(context, &self.problem, raw, &self.norm(), output.buffer())?;
        Ok(output)
    }

    /// As the norm before a convolution that takes the sums of its gradient.
    pub fn before(&self) -> Option<NormBefore<'_>> {
        self.coefficients.as_ref().map(|by| NormBefore { raw: self.raw.buffer(), by })
    }

    /// For a kernel that can normalise what it loads.
    fn read(self: &Arc<Self>, context: &Context) -> Result<Read> {
        match &self.coefficients {
            Some(by) => Ok(Read::Normalised { of: self.clone(), by: by.clone() }),
            None => Ok(Read::Stored(self.activate(context)?)),
        }
    }
}

/// A value as backward keeps it.
#[derive(Debug)]
pub(crate) enum Kept {
    Stored(Tensor),
    Recomputed(Arc<Normalised>),
}

/// A value as a kernel reads it.
pub(crate) enum Read {
    Stored(Tensor),
    Normalised { of: Arc<Normalised>, by: Coefficients },
}

impl Kept {
    /// The value for kernels that can normalise what they load, or else (`loads` is false) the stored value: a new tensor if it
    /// has to be computed again, which should be dropped as soon as it was used.
    pub fn read(&self, context: &Context, loads: bool) -> Result<Read> {
        match self {
            Self::Recomputed(of) if loads => of.read(context),
            _ => Ok(Read::Stored(self.stored(context)?)),
        }
    }

    /// The stored value, as by [`Kept::read`].
    pub fn stored(&self, context: &Context) -> Result<Tensor> {
        match self {
            Self::Stored(tensor) => Ok(tensor.clone()),
            Self::Recomputed(normalised) => normalised.activate(context),
        }
    }
}

impl Read {
    /// As the kernels of a convolution take it.
    pub fn operand(&self) -> Operand<'_> {
        match self {
            Self::Stored(tensor) => Operand::Stored(tensor.buffer()),
            Self::Normalised { of, by } => Operand::Normalised { raw: of.raw.buffer(), by },
        }
    }
}

impl Var {
    /// Data: no gradient flows into it.
    pub fn data(tensor: Tensor) -> Self {
        Self { value: Value::Stored(tensor), id: None }
    }

    /// The value. One that was not stored so far is computed, and kept as long as this variable lives.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn value(&self, context: &Context) -> Result<Tensor> {
        match &self.value {
            Value::Stored(tensor) => Ok(tensor.clone()),
            Value::Normalised { of, stored, .. } => {
                if let Some(tensor) = stored.get() {
                    return Ok(tensor.clone());
                }
                let tensor = of.activate(context)?;
                Ok(stored.get_or_init(|| tensor).clone())
            }
        }
    }

    /// Extents of the value.
    pub fn shape(&self) -> Shape {
        self.layout().shape()
    }

    /// Type of the value's elements.
    pub fn dtype(&self) -> Dtype {
        self.layout().buffer().dtype()
    }

    /// A tensor of the value's shape and type.
    fn layout(&self) -> &Tensor {
        match &self.value {
            Value::Stored(tensor) => tensor,
            Value::Normalised { of, .. } => &of.raw,
        }
    }

    /// Whether backward has to compute a gradient for this.
    pub fn needs_gradient(&self) -> bool {
        self.id.is_some()
    }

    /// The value as a forward kernel reads it: from memory, unless the kernel can normalise what it `loads` and nobody before it
    /// had to store the value.
    pub(crate) fn read(&self, context: &Context, loads: bool) -> Result<Read> {
        match &self.value {
            Value::Normalised { of, stored, .. } if loads && stored.get().is_none() => of.read(context),
            _ => Ok(Read::Stored(self.value(context)?)),
        }
    }

    /// The norm that has put out the value.
    pub(crate) fn normalised(&self) -> Option<Arc<Normalised>> {
        match &self.value {
            Value::Stored(_) => None,
            Value::Normalised { of, .. } => Some(of.clone()),
        }
    }

    /// The value as an operation's backward should keep it.
    pub(crate) fn keep(&self) -> Kept {
        match &self.value {
            Value::Stored(tensor) => Kept::Stored(tensor.clone()),
            Value::Normalised { of, stored, recompute } => match stored.get() {
                Some(tensor) if !recompute => Kept::Stored(tensor.clone()),
                _ => Kept::Recomputed(of.clone()),
            },
        }
    }
}

struct Step {
    output: usize,
    inputs: Vec<Option<usize>>,
    backward: Backward,
}

/// What is done together, or again, instead of going through memory. Computing again and loading give the same bits as storing;
/// else the results differ by rounding.
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
    /// Whether convolutions normalise and activate their inputs while they load them, where their kernels can (see
    /// [`fused::loads`](crate::kernels::conv3d::fused::loads)): such inputs are never stored. Saves a pass of one read and one
    /// write for each, and computes every value as often as a kernel loads it.
    pub normalise_on_load: bool,
    /// Whether the two gradient convolutions take the gradient back through norm and activation while they load it, where the
    /// kernels of both can, and the bias gradient is not computed. Saves a pass of two reads and one write; both
    /// convolutions then read two tensors instead of one.
    pub norm_gradient_on_load: bool,
    /// Whether a convolution that stores the complete gradient of a normalised tensor takes the sums that the norm's
    /// own gradient begins with, where its kernel can. Saves a pass of two reads for an additional read in the convolution.
    pub norm_sums_by_convolution: bool,
}

impl Fusion {
    /// Every operation on its own, and nothing computed twice: what the fused ones are tested against.
    pub const NONE: Self = Self {
        recompute_activations: false,
        moments_by_convolution: false,
        no_bias_gradient_before_norm: false,
        normalise_on_load: false,
        norm_gradient_on_load: false,
        norm_sums_by_convolution: false,
    };

    /// All that there is: the least memory and the fewest launches.
    pub const ALL: Self = Self {
        recompute_activations: true,
        moments_by_convolution: true,
        no_bias_gradient_before_norm: true,
        normalise_on_load: true,
        norm_gradient_on_load: true,
        norm_sums_by_convolution: true,
    };
}

/// As fast as nothing fused on two cores with AVX-512, within the scatter of some percent, with fewer launches and less memory.
/// Loading through a norm is left out: Winograd's kernels load each value four to eight times, and what that costs is what the
/// saved passes take (benches/RESULTS.md).
impl Default for Fusion {
    fn default() -> Self {
        Self { normalise_on_load: false, norm_gradient_on_load: false, ..Self::ALL }
    }
}

/// The record of one forward pass.
pub struct Tape {
    context: Context,
    fusion: Fusion,
    recording: bool,
    steps: Vec<Step>,
    /// How many operations read each variable.
    uses: Vec<u32>,
}

impl Tape {
    /// A tape that records, for training.
    pub fn new(context: &Context) -> Self {
        Self {
            context: context.clone(),
            fusion: Fusion::default(),
            recording: true,
            steps: Vec::new(),
            uses: Vec::new(),
        }
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
        let backward = |gradient: Gradient, _| -> Result<Vec<Option<Gradient>>> {
            let gradients = backward(gradient.tensor)?;
            Ok(gradients.into_iter().map(|gradient| gradient.map(Gradient::from)).collect())
        };
        self.push(Value::Stored(output), inputs, backward)
    }

    /// The same for an operation whose gradient knows more than a tensor.
    pub(crate) fn record_with_parts(
        &mut self,
        output: Tensor,
        inputs: &[&Var],
        backward: impl FnOnce(Gradient, bool) -> Result<Vec<Option<Gradient>>> + 'static,
    ) -> Var {
        self.push(Value::Stored(output), inputs, backward)
    }

    /// The same for an operation that ends with a norm: its output is stored where [`Fusion`] says so, or when it is read.
    pub(crate) fn record_normalised(
        &mut self,
        output: &Arc<Normalised>,
        inputs: &[&Var],
        backward: impl FnOnce(Gradient, bool) -> Result<Vec<Option<Gradient>>> + 'static,
    ) -> Result<Var> {
        let stored = match self.fusion.normalise_on_load {
            true => OnceLock::new(),
            false if self.recording => OnceLock::from(output.activate(&self.context)?),
            false => return Ok(Var::data(output.activate(&self.context)?)),
        };
        let recompute = self.fusion.recompute_activations;
        let value = Value::Normalised { of: output.clone(), stored: Arc::new(stored), recompute };
        Ok(self.push(value, inputs, backward))
    }

    fn push(
        &mut self,
        value: Value,
        inputs: &[&Var],
        backward: impl FnOnce(Gradient, bool) -> Result<Vec<Option<Gradient>>> + 'static,
    ) -> Var {
        if !self.recording {
            return Var { value, id: None };
        }
        let id = self.uses.len();
        self.uses.push(0);
        let inputs: Vec<Option<usize>> = inputs.iter().map(|input| input.id).collect();
        inputs.iter().flatten().for_each(|&input| self.uses[input] += 1);
        self.steps.push(Step { output: id, inputs, backward: Box::new(backward) });
        Var { value, id: Some(id) }
    }

    /// Runs backward from the given outputs and their gradients, and consumes the tape.
    ///
    /// # Errors
    /// Of any operation's backward.
    pub fn backward(mut self, seeds: Vec<(Var, Tensor)>) -> Result<()> {
        let mut gradients: Vec<Option<Gradient>> = self.uses.iter().map(|_| None).collect();
        for (output, gradient) in seeds {
            // A seed is a use: what arrives from an operation is then not all.
            output.id.into_iter().for_each(|id| self.uses[id] += 1);
            arrive(&self.context, &mut gradients, output.id, gradient.into())?;
        }
        while let Some(step) = self.steps.pop() {
            // An output that nothing used has no gradient: nothing to do.
            let Some(gradient) = gradients[step.output].take() else { continue };
            let sole = step.inputs.first().copied().flatten().is_some_and(|input| self.uses[input] == 1);
            for (input, gradient) in step.inputs.into_iter().zip((step.backward)(gradient, sole)?) {
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
    gradients: &mut [Option<Gradient>],
    variable: Option<usize>,
    gradient: Gradient,
) -> Result<()> {
    if let Some(id) = variable {
        match &mut gradients[id] {
            None => gradients[id] = Some(gradient),
            Some(sum) => {
                elementwise::add_assign(context, sum.tensor.buffer(), gradient.tensor.buffer())?;
                sum.parts = None;
            }
        }
    }
    Ok(())
}
