//! Reverse-mode differentiation: a tape of closures.
//!
//! Every operation pushes one closure that turns the gradient of its output into the gradients of its inputs. The
//! order of pushing is already topological, so backward pops closures from the end: each is consumed and drops what it
//! kept as soon as it has run, and memory falls as backward proceeds. Gradients of parameters do not travel over the
//! tape: a closure writes them where the parameter store keeps them.

use crate::error::Result;
use crate::kernels::{Context, Dtype};
use crate::normalised::{TensorGradient, Value};
use crate::tensor::{Shape, Tensor};

pub use crate::fusion::Fusion;

/// Turns the gradient of an output into the gradients of the inputs, in the order in which they were recorded; `None`
/// for an input that needs none. The flag says whether the first input has no other use, so that its gradient is complete.
type Backward = Box<dyn FnOnce(TensorGradient, bool) -> Result<Vec<Option<TensorGradient>>>>;

/// A tensor that takes part in differentiation.
#[derive(Clone, Debug)]
pub struct Var {
    value: Value,
    /// Place of the gradient; `None` for data, which has no gradient.
    id: Option<usize>,
}

impl Var {
    /// Data: no gradient flows into it.
    pub fn data(tensor: Tensor) -> Self {
        Self { value: tensor.into(), id: None }
    }

    /// The value.
    pub fn value(&self) -> &Tensor {
        &self.value.tensor
    }

    /// Extents of the value.
    pub fn shape(&self) -> Shape {
        self.value().shape()
    }

    /// Type of the value's elements.
    pub fn dtype(&self) -> Dtype {
        self.value().buffer().dtype()
    }

    /// Whether backward has to compute a gradient for this.
    pub fn needs_gradient(&self) -> bool {
        self.id.is_some()
    }

    /// The value with what is known of it.
    pub(crate) fn known(&self) -> &Value {
        &self.value
    }
}

struct Step {
    output: usize,
    inputs: Vec<Option<usize>>,
    backward: Backward,
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
        let backward = |gradient: TensorGradient, _| -> Result<Vec<Option<TensorGradient>>> {
            let gradients = backward(gradient.tensor)?;
            Ok(gradients.into_iter().map(|gradient| gradient.map(TensorGradient::from)).collect())
        };
        self.record_value(output.into(), inputs, backward)
    }

    /// The same for an operation of whose output or gradient more is known than a tensor.
    pub(crate) fn record_value(
        &mut self,
        value: Value,
        inputs: &[&Var],
        backward: impl FnOnce(TensorGradient, bool) -> Result<Vec<Option<TensorGradient>>> + 'static,
    ) -> Var {
        if !self.recording {
            return Var::data(value.tensor);
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
        let mut gradients: Vec<Option<TensorGradient>> = self.uses.iter().map(|_| None).collect();
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
    gradients: &mut [Option<TensorGradient>],
    variable: Option<usize>,
    gradient: TensorGradient,
) -> Result<()> {
    if let Some(id) = variable {
        match &mut gradients[id] {
            None => gradients[id] = Some(gradient),
            Some(sum) => sum.add(context, &gradient)?,
        }
    }
    Ok(())
}
