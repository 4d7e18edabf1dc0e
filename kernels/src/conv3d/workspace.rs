//! The memory that convolutions take for a moment, counted from shapes: what they allocate beside their operands, and free
//! before they return.

use super::choices::chosen;
use super::winograd::workspace::Sizes;
use super::{Algorithm, Pass, Problem};
use crate::{Context, Dtype, conv_transpose3d};

/// Bytes that `pass` takes beside its operands of type `dtype`: a bound, and close where it is large.
pub fn workspace_bytes(context: &Context, problem: &Problem, pass: Pass, dtype: Dtype) -> u64 {
    let (context, algorithm) = chosen(context, problem, pass, dtype);
    let inputs = [problem.channels_in, problem.second_channels];
    let all = inputs[0] + inputs[1];
    let winograd = |channels_in, channels_out| Sizes {
        batch: problem.batch,
        dims: problem.in_dims,
        deep: problem.kernel[0] == 3,
        channels_in,
        channels_out,
    };
    if algorithm == Algorithm::Winograd {
        let caps = context.caps();
        return match pass {
            Pass::Forward => winograd(all, problem.channels_out).convolution(caps, false),
            // One input after the other.
            Pass::DataGradient => (inputs.into_iter().filter(|&channels| channels > 0))
                .map(|channels| winograd(problem.channels_out, channels).convolution(caps, true))
                .fold(0, u64::max),
            Pass::WeightGradient => winograd(all, problem.channels_out).weight_gradient(caps),
        };
    }
    let weights = 4 * problem.weight_len() as u64;
    match pass {
        Pass::Forward | Pass::DataGradient => weights + PLACEHOLDER_BYTES,
        Pass::WeightGradient => {
            let input = problem.input_len().max(problem.second_len());
            // A CPU's few units have whole weights to themselves.
            let parts = if context.caps().cores.is_some() { 0 } else { weights };
            weight_gradient_bytes(&context, parts, dtype, input + problem.output_len())
        }
    }
}

/// The same of a transposed convolution.
pub fn transposed_workspace_bytes(
    context: &Context,
    problem: &conv_transpose3d::Problem,
    pass: Pass,
    dtype: Dtype,
) -> u64 {
    let weights = 4 * problem.weight_len() as u64;
    match pass {
        Pass::Forward | Pass::DataGradient => weights + PLACEHOLDER_BYTES,
        Pass::WeightGradient => {
            weight_gradient_bytes(context, weights, dtype, problem.input_len() + problem.output_len())
        }
    }
}

/// The direct gradient of weights: `parts` bytes of sums that are added up later, and copies in f32 of operands of `elements`
/// 16-bit values on a CPU.
fn weight_gradient_bytes(context: &Context, parts: u64, dtype: Dtype, elements: usize) -> u64 {
    let copies = if context.caps().cores.is_some() && dtype != Dtype::F32 { 4 * elements as u64 } else { 0 };
    parts + copies + PARTS_BYTES
}

/// Room for the parts that sums are split into: where weights are few, so that all units are busy.
const PARTS_BYTES: u64 = 1 << 20;

/// What stands for moments where none are taken: a vector.
const PLACEHOLDER_BYTES: u64 = 64;
