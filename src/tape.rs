//! Reverse-mode differentiation: a tape of closures.
//!
//! Every operation pushes one closure that turns the gradient of its output into the gradients of its inputs. The
//! order of pushing is already topological, so backward pops closures from the end: each is consumed and drops what it
//! kept as soon as it has run, and memory falls as backward proceeds. Gradients of parameters do not travel over the
//! tape: a closure writes them where the parameter store keeps them.

use crate::error::Result;
use crate::kernels::{Context, elementwise};
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
}

impl Var {
    /// Data: no gradient flows into it.
    pub fn data(tensor: Tensor) -> Self {
        Self { tensor, id: None }
    }

    /// The value.
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Whether backward has to compute a gradient for this.
    pub fn needs_gradient(&self) -> bool {
        self.id.is_some()
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
    recording: bool,
    steps: Vec<Step>,
    variables: usize,
}

impl Tape {
    /// A tape that records, for training.
    pub fn new(context: &Context) -> Self {
        Self { context: context.clone(), recording: true, steps: Vec::new(), variables: 0 }
    }

    /// A tape that keeps nothing, for inference.
    pub fn inference(context: &Context) -> Self {
        Self { recording: false, ..Self::new(context) }
    }

    /// Where operations launch.
    pub fn context(&self) -> &Context {
        &self.context
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
        Var { tensor: output, id: Some(id) }
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
