//! Which algorithm runs a convolution: what was chosen for its shape, else a fixed rule.

use super::gather::Method;
use super::{Algorithm, Pass, Problem, algorithm, igemm, winograd_fits};
use crate::{Caps, Context, Dtype};
use std::collections::HashMap;

/// Algorithms by shape, to be given to [`Context::with_choices`]: the fastest as measured on the device, for example. Shapes
/// that are not listed follow the rule, [`algorithm`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choices {
    by_shape: HashMap<(Problem, Pass, Dtype), Algorithm>,
}

impl Choices {
    /// Chooses for tensors of `dtype`. A choice that a device cannot run is ignored there: see [`applicable`].
    pub fn insert(&mut self, problem: Problem, pass: Pass, dtype: Dtype, algorithm: Algorithm) {
        self.by_shape.insert((problem, pass, dtype), algorithm);
    }

    /// What was chosen.
    pub fn get(&self, problem: &Problem, pass: Pass, dtype: Dtype) -> Option<Algorithm> {
        self.by_shape.get(&(problem.clone(), pass, dtype)).copied()
    }

    /// Number of choices.
    pub fn len(&self) -> usize {
        self.by_shape.len()
    }

    /// Whether everything follows the rule.
    pub fn is_empty(&self) -> bool {
        self.by_shape.is_empty()
    }
}

/// The algorithms that can compute a pass on a device with `caps`; [`algorithm`] is one of them.
pub fn applicable(problem: &Problem, pass: Pass, dtype: Dtype, caps: &Caps) -> Vec<Algorithm> {
    let others = [
        (winograd_fits(problem, dtype, caps), Algorithm::Winograd),
        (tensor_cores_fit(problem, pass, dtype, caps), Algorithm::TensorCores),
    ];
    let fitting = others.into_iter().filter(|&(fits, _)| fits).map(|(_, algorithm)| algorithm);
    std::iter::once(Algorithm::Direct).chain(fitting).collect()
}

/// Whether at least the first input's part of a pass can run on tensor cores.
pub(super) fn tensor_cores_fit(problem: &Problem, pass: Pass, dtype: Dtype, caps: &Caps) -> bool {
    let (inputs, outputs) = (problem.channels_in, problem.channels_out);
    match pass {
        Pass::Forward => problem.uses_tensor_cores(dtype, caps),
        Pass::DataGradient => {
            matches!(Method::choose(caps, dtype, [outputs, 0], inputs, usize::MAX), Method::TensorCores(_))
        }
        Pass::WeightGradient => {
            let layout = igemm::CHANNELS_BY_CHANNELS;
            igemm::Plan::choose(caps, dtype, layout, inputs, usize::MAX, outputs).is_some()
        }
    }
}

/// The algorithm of a pass, and the context to launch it on: without tensor cores where they were chosen against.
pub(super) fn chosen(context: &Context, problem: &Problem, pass: Pass, dtype: Dtype) -> (Context, Algorithm) {
    let caps = context.caps();
    let ruled = || (context.clone(), algorithm(problem, pass, dtype, caps));
    match context.choices().get(problem, pass, dtype) {
        // Tensor cores add up the products of the definition too.
        _ if context.is_exact() => (context.clone(), Algorithm::Direct),
        Some(Algorithm::Direct) => (context.without_tensor_cores(), Algorithm::Direct),
        Some(choice) if applicable(problem, pass, dtype, caps).contains(&choice) => (context.clone(), choice),
        _ => ruled(),
    }
}

/// The shape, for whoever lists choices.
impl Problem {
    /// Channels of the first input.
    pub fn channels_in(&self) -> usize {
        self.channels_in
    }

    /// Channels of the second input; 0 without one.
    pub fn second_channels(&self) -> usize {
        self.second_channels
    }

    /// Taps along depth, height, width.
    pub fn kernel(&self) -> [usize; 3] {
        self.kernel
    }

    /// Steps along depth, height, width.
    pub fn stride(&self) -> [usize; 3] {
        self.stride
    }
}
