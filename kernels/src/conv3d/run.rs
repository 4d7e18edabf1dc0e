//! The passes of a convolution: operands are checked, the route is chosen, and the operations of the pass are launched on it.

use super::gather::{Gather, WeightGradient, positions_inside};
use super::problem::{OPERATION, Pass, Problem};
use super::route::{Policy, Route};
use super::{direct, igemm, tiled, winograd};
use crate::instance_norm::epilogue::Epilogue;
use crate::instance_norm::{Coefficients, GradientParts, Moments};
use crate::{Buffer, Context, Dtype, KernelError};

/// Launches an operation that gathers.
pub(crate) fn gather(context: &Context, route: Route, gather: &Gather) -> Result<(), KernelError> {
    let packed =
        route.packing(gather, context.caps()).map(|packing| gather.weights.pack(context, packing)).transpose()?;
    let weights = packed.as_ref().unwrap_or(gather.weights.stored);
    match route {
        Route::Direct => direct::gather::launch(context, gather, weights),
        Route::Tiled => tiled::launch(context, gather, weights),
        Route::TensorCores => igemm::gather::launch(context, gather, weights),
        Route::Winograd => winograd::convolution::launch(context, gather),
    }
}

/// Launches a gradient of weights.
pub(crate) fn weight_gradient(context: &Context, route: Route, gradient: &WeightGradient) -> Result<(), KernelError> {
    match route {
        Route::Direct | Route::Tiled => direct::weight_gradient::launch(context, gradient),
        Route::TensorCores => igemm::weight_gradient::launch(context, gradient),
        Route::Winograd => winograd::weight_gradient::launch(context, gradient),
    }
}

fn chosen(context: &Context, problem: &Problem, pass: Pass, dtype: Dtype) -> Route {
    Route::choose(problem, pass, dtype, context.caps(), Policy::of(context))
}

/// `y = conv(x, w) + bias`.
///
/// `x`: `[batch, in_dims, channels_in]`, `second`: the same with its own channels, `w`: f32
/// `[kd, kh, kw, channels in, channels out]`, `bias`: f32 `[channels_out]`, `y`: `[batch, out_dims, channels_out]`.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if a buffer does not fit the problem.
pub fn forward(
    context: &Context,
    problem: &Problem,
    x: &Buffer,
    second: Option<&Buffer>,
    w: &Buffer,
    bias: Option<&Buffer>,
    y: &Buffer,
) -> Result<(), KernelError> {
    let (route, operation) = forward_operation(context, problem, x, second, w, bias, y)?;
    gather(context, route, &operation)
}

/// As [`forward`], and the moments of every sample and channel of `y`, as an instance norm needs them, without a pass over `y`;
/// `None` where the kernel cannot take them: on tensor cores whose tile does not share out its columns evenly.
///
/// # Errors
/// As [`forward`].
pub fn forward_with_moments(
    context: &Context,
    problem: &Problem,
    x: &Buffer,
    second: Option<&Buffer>,
    w: &Buffer,
    bias: Option<&Buffer>,
    y: &Buffer,
) -> Result<Option<Moments>, KernelError> {
    let (route, mut operation) = forward_operation(context, problem, x, second, w, bias, y)?;
    let moments = (route.moment_parts(&operation, context.caps()))
        .map(|parts| Moments::new(context, problem.batch(), parts, problem.channels_out()))
        .transpose()?;
    operation.epilogue = moments.as_ref().map_or(Epilogue::Nothing, Epilogue::Moments);
    gather(context, route, &operation)?;
    Ok(moments)
}

fn forward_operation<'a>(
    context: &Context,
    problem: &Problem,
    x: &'a Buffer,
    second: Option<&'a Buffer>,
    w: &'a Buffer,
    bias: Option<&'a Buffer>,
    y: &'a Buffer,
) -> Result<(Route, Gather<'a>), KernelError> {
    problem.check_inputs(x, second)?;
    w.check(OPERATION, "weights", problem.weight_len(), Dtype::F32)?;
    if let Some(bias) = bias {
        bias.check(OPERATION, "bias", problem.channels_out(), Dtype::F32)?;
    }
    y.check(OPERATION, "output", problem.output_len(), x.dtype())?;
    context.note(|| problem.clone());
    let route = chosen(context, problem, Pass::Forward, x.dtype());
    Ok((route, Gather::forward(problem, x, second, w, bias, y)))
}

/// The convolutions whose forward pass was asked for on a [`Context::dry`] one, each once, in the order of their first.
pub fn computed(dry: &Context) -> Vec<Problem> {
    let mut problems = Vec::new();
    for problem in dry.noted::<Problem>() {
        if !problems.contains(&problem) {
            problems.push(problem);
        }
    }
    problems
}

/// The instance norm with activation that has put out what a convolution reads.
#[derive(Clone, Copy, Debug)]
pub struct NormBefore<'a> {
    /// What the norm reads, of the shape of the convolution's input.
    pub raw: &'a Buffer,
    /// Made by [`coefficients`](crate::instance_norm::coefficients).
    pub by: &'a Coefficients,
}

/// The gradient of the input: `dx` of the first, and `second_dx` of the second if there is one.
///
/// With stride 2 the input positions fall into parities, each with taps of its own, and no product with a zero between the
/// strides is computed. On tensor cores and shared memory every parity is one launch.
///
/// # Errors
/// As [`forward`].
pub fn backward_data(
    context: &Context,
    problem: &Problem,
    w: &Buffer,
    dy: &Buffer,
    dx: &Buffer,
    second_dx: Option<&Buffer>,
) -> Result<(), KernelError> {
    data_gradient(context, problem, w, dy, dx, second_dx, None).map(|_| ())
}

/// As [`backward_data`], and of the norm `before` the first input the sums that the way back through it begins with, without a
/// pass over `dx`; `None` where the kernel cannot take them.
///
/// # Errors
/// As [`forward`]; [`KernelError::Shape`] if the norm is of another shape than the first input.
pub fn backward_data_with_sums(
    context: &Context,
    problem: &Problem,
    w: &Buffer,
    dy: &Buffer,
    dx: &Buffer,
    second_dx: Option<&Buffer>,
    before: NormBefore,
) -> Result<Option<GradientParts>, KernelError> {
    data_gradient(context, problem, w, dy, dx, second_dx, Some(before))
}

fn data_gradient(
    context: &Context,
    problem: &Problem,
    w: &Buffer,
    dy: &Buffer,
    dx: &Buffer,
    second_dx: Option<&Buffer>,
    before: Option<NormBefore>,
) -> Result<Option<GradientParts>, KernelError> {
    problem.check_inputs(dx, second_dx)?;
    w.check(OPERATION, "weights", problem.weight_len(), Dtype::F32)?;
    dy.check(OPERATION, "gradient of the output", problem.output_len(), dx.dtype())?;
    let route = chosen(context, problem, Pass::DataGradient, dx.dtype());
    let mut first = Gather::data_gradient(problem, w, dy, (0, problem.channels_in()), dx);
    let before = before.and_then(|before| Some((before, route.gradient_parts(&first, context.caps())?)));
    let parts = match before {
        Some((NormBefore { raw, by }, parts)) => {
            raw.check(OPERATION, "input of the norm before", problem.input_len(), dx.dtype())?;
            by.check(OPERATION, problem.batch(), problem.channels_in())?;
            Some(GradientParts::new(context, problem.batch(), parts, problem.channels_in())?)
        }
        None => None,
    };
    if let (Some(parts), Some((NormBefore { raw, by }, _))) = (&parts, before) {
        first.epilogue = Epilogue::GradientSums { parts, raw, by };
    }
    let behind = (problem.channels_in(), problem.second_channels());
    let second = second_dx.map(|second_dx| Gather::data_gradient(problem, w, dy, behind, second_dx));
    for operation in std::iter::once(first).chain(second) {
        if route.gathers_at_once() {
            gather(context, route, &operation)?;
            continue;
        }
        for parity in positions_inside(problem.stride()) {
            gather(context, route, &operation.of_parity(problem, parity))?;
        }
    }
    Ok(parts)
}

/// The gradient of the weights, f32 `[kd, kh, kw, channels in, channels out]`.
///
/// # Errors
/// As [`forward`].
pub fn backward_weight(
    context: &Context,
    problem: &Problem,
    x: &Buffer,
    second: Option<&Buffer>,
    dy: &Buffer,
    dw: &Buffer,
) -> Result<(), KernelError> {
    problem.check_inputs(x, second)?;
    dy.check(OPERATION, "gradient of the output", problem.output_len(), x.dtype())?;
    dw.check(OPERATION, "gradient of the weights", problem.weight_len(), Dtype::F32)?;
    let route = chosen(context, problem, Pass::WeightGradient, x.dtype());
    let operation = WeightGradient::of(problem, x, second, dy, dw);
    if route.joins_inputs() {
        return weight_gradient(context, route, &operation);
    }
    operation.by_input().try_for_each(|operation| weight_gradient(context, route, &operation))
}
