//! The operations a network is made of: each launches its forward kernels and records what backward launches.
//! No arithmetic happens here.

use crate::error::Result;
use crate::kernels::instance_norm::{self, GradientParts, Moments};
use crate::kernels::{Context, Dtype, average_pool, conv_transpose3d, conv3d, elementwise, reduce};
use crate::normalised::{Convolution, Kept, Normalised, Raw, TensorGradient, Value};
use crate::parameters::Parameter;
use crate::tape::{Fusion, Tape, Var};
use crate::tensor::{Shape, Tensor};
use std::sync::{Arc, OnceLock};

/// Kernel and stride of a convolution along depth, height, width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvShape {
    /// Taps: 1 or 3 along each axis.
    pub kernel: [usize; 3],
    /// 1 or 2 along each axis.
    pub stride: [usize; 3],
}

/// Convolution with "same" padding of `x`, or of the concatenation of `x` and `second` along the channels.
///
/// # Errors
/// If shapes do not fit or the device is out of memory.
pub fn conv3d(
    tape: &mut Tape,
    x: &Var,
    second: Option<&Var>,
    weight: &Parameter,
    bias: Option<&Parameter>,
    channels_out: usize,
    shape: ConvShape,
) -> Result<Var> {
    let Convolved { output, inputs, backward, .. } =
        convolve(tape, x, second, (weight, bias), channels_out, shape, false)?;
    let context = tape.context().clone();
    Ok(tape.record_value(output.into(), &inputs, move |gradient, sole| backward.run(&context, gradient.tensor, sole)))
}

/// What `nn` makes its blocks of: convolution, instance norm (epsilon 1e-5, affine, biased variance) and leaky ReLU, fused as
/// the tape's [`Fusion`] says.
///
/// # Errors
/// If shapes do not fit or the device is out of memory.
pub fn conv3d_norm_leaky_relu(
    tape: &mut Tape,
    x: &Var,
    second: Option<&Var>,
    convolution: (&Parameter, Option<&Parameter>),
    norm: (&Parameter, &Parameter),
    channels_out: usize,
    shape: ConvShape,
) -> Result<Var> {
    let activation = Some(LEAKY_RELU_SLOPE);
    normalised_convolution(tape, x, second, convolution, norm, channels_out, shape, activation, true)
}

/// The same, whose convolution is computed again for backward instead of keeping what it puts out, where activations are computed
/// again too ([`Fusion::recompute_activations`]).
///
/// # Errors
/// If shapes do not fit or the device is out of memory.
pub fn conv3d_norm_leaky_relu_again(
    tape: &mut Tape,
    x: &Var,
    second: Option<&Var>,
    convolution: (&Parameter, Option<&Parameter>),
    norm: (&Parameter, &Parameter),
    channels_out: usize,
    shape: ConvShape,
) -> Result<Var> {
    let (keeps, activation) = (!tape.fusion().recompute_activations, Some(LEAKY_RELU_SLOPE));
    normalised_convolution(tape, x, second, convolution, norm, channels_out, shape, activation, keeps)
}

/// Convolution and instance norm with nothing behind them: the projection of a residual block's skip.
///
/// # Errors
/// If shapes do not fit or the device is out of memory.
pub fn conv3d_norm(
    tape: &mut Tape,
    x: &Var,
    convolution: (&Parameter, Option<&Parameter>),
    norm: (&Parameter, &Parameter),
    channels_out: usize,
    shape: ConvShape,
) -> Result<Var> {
    normalised_convolution(tape, x, None, convolution, norm, channels_out, shape, None, true)
}

#[allow(clippy::too_many_arguments, reason = "those of the two operations that it is")]
fn normalised_convolution(
    tape: &mut Tape,
    x: &Var,
    second: Option<&Var>,
    convolution: (&Parameter, Option<&Parameter>),
    norm: (&Parameter, &Parameter),
    channels_out: usize,
    shape: ConvShape,
    activation: Option<f32>,
    keeps: bool,
) -> Result<Var> {
    let Convolved { output, moments, inputs, backward } =
        convolve(tape, x, second, convolution, channels_out, shape, true)?;
    let context = tape.context().clone();
    let again = (!keeps && tape.is_recording()).then(|| backward.again(moments.is_some()));
    let normalised = normalise(tape, output, moments, norm, activation)?;
    let (output, normalised) = activated(tape, normalised, again)?;
    Ok(tape.record_value(output, &inputs, move |gradient, sole| {
        let dy = norm_gradient(&context, &normalised, gradient)?;
        drop(normalised);
        backward.run(&context, dy, sole)
    }))
}

/// The end of a residual block: convolution and instance norm, to which `skip` is added before the leaky ReLU.
///
/// # Errors
/// If shapes do not fit or the device is out of memory.
pub fn conv3d_norm_onto_leaky_relu(
    tape: &mut Tape,
    x: &Var,
    skip: &Var,
    convolution: (&Parameter, Option<&Parameter>),
    norm: (&Parameter, &Parameter),
    channels_out: usize,
    shape: ConvShape,
) -> Result<Var> {
    let Convolved { output, moments, mut inputs, backward } =
        convolve(tape, x, None, convolution, channels_out, shape, true)?;
    inputs.push(skip);
    let context = tape.context().clone();
    let normalised = normalise(tape, output, moments, norm, Some(LEAKY_RELU_SLOPE))?;
    let output = normalised.activate_onto(&context, skip.value())?;
    // What reads the output keeps it anyway.
    let kept = output.clone();
    Ok(tape.record_value(output.into(), &inputs, move |gradient, sole| {
        let (problem, raw) = (&normalised.problem, normalised.raw.tensor(&context)?);
        let (norm, onto) = (normalised.norm(), gradient.tensor);
        let parts =
            instance_norm::gradient_parts_onto(&context, problem, raw.buffer(), &norm, kept.buffer(), onto.buffer())?;
        drop(kept);
        let dy = norm_gradient_of_parts(&context, &normalised, &problem.without_activation(), parts, &onto)?;
        drop(normalised);
        let mut gradients = backward.run(&context, dy, sole)?;
        gradients.resize_with(1, || None);
        gradients.push(Some(onto.into()));
        Ok(gradients)
    }))
}

/// Average pooling whose window is its stride.
///
/// # Errors
/// If shapes do not fit or the device is out of memory.
pub fn average_pool(tape: &mut Tape, x: &Var, stride: [usize; 3]) -> Result<Var> {
    let context = tape.context().clone();
    let shape = x.shape();
    let problem = average_pool::Problem::new(shape.batch, shape.dims, shape.channels, stride)?;
    let output = Tensor::empty(&context, Shape { dims: problem.out_dims(), ..shape }, x.dtype())?;
    average_pool::forward(&context, &problem, x.value().buffer(), output.buffer())?;
    Ok(tape.record(output, &[x], move |gradient| {
        let dx = Tensor::empty(&context, shape, gradient.buffer().dtype())?;
        average_pool::backward(&context, &problem, gradient.buffer(), dx.buffer())?;
        Ok(vec![Some(dx)])
    }))
}

/// A convolution that was launched.
struct Convolved<'a> {
    output: Tensor,
    moments: Option<Moments>,
    inputs: Vec<&'a Var>,
    backward: ConvolutionBackward,
}

fn convolve<'a>(
    tape: &Tape,
    x: &'a Var,
    second: Option<&'a Var>,
    (weight, bias): (&Parameter, Option<&Parameter>),
    channels_out: usize,
    shape: ConvShape,
    before_norm: bool,
) -> Result<Convolved<'a>> {
    let (context, fusion) = (tape.context(), tape.fusion());
    let Shape { batch, dims, channels } = x.shape();
    let mut problem = conv3d::Problem::new(batch, dims, channels, channels_out, shape.kernel, shape.stride)?;
    if let Some(second) = second {
        problem = problem.with_second_input(second.shape().channels)?;
    }
    let out_shape = Shape { batch, dims: problem.out_dims(), channels: channels_out };
    let output = Tensor::empty(context, out_shape, x.dtype())?;
    let (first, behind) = (x.value().buffer(), second.map(|second| second.value().buffer()));
    let (w, b, y) = (weight.value(), bias.map(Parameter::value), output.buffer());
    let moments = if before_norm && fusion.moments_by_convolution {
        conv3d::forward_with_moments(context, &problem, first, behind, w, b, y)?
    } else {
        conv3d::forward(context, &problem, first, behind, w, b, y)?;
        None
    };
    let backward = ConvolutionBackward {
        problem,
        fusion,
        out_shape,
        dtype: x.dtype(),
        weight: weight.clone(),
        bias: bias.cloned(),
        zero_bias_gradient: before_norm && fusion.no_bias_gradient_before_norm,
        needs_gradient: x.needs_gradient(),
        x: (x.known().keep(), x.shape()),
        second: second.map(|second| (second.known().keep(), second.shape())),
        norm_before: x.known().norm.clone(),
    };
    let inputs = std::iter::once(x).chain(second).collect();
    Ok(Convolved { output, moments, inputs, backward })
}

/// What backward needs of a convolution.
struct ConvolutionBackward {
    problem: conv3d::Problem,
    fusion: Fusion,
    out_shape: Shape,
    dtype: Dtype,
    weight: Parameter,
    bias: Option<Parameter>,
    zero_bias_gradient: bool,
    /// Of the input; a second one always does.
    needs_gradient: bool,
    x: (Kept, Shape),
    second: Option<(Kept, Shape)>,
    /// What has put out the input.
    norm_before: Option<Arc<Normalised>>,
}

impl ConvolutionBackward {
    /// The convolution itself.
    fn again(&self, with_moments: bool) -> Convolution {
        Convolution {
            problem: self.problem.clone(),
            x: self.x.0.clone(),
            second: self.second.as_ref().map(|(kept, _)| kept.clone()),
            weight: self.weight.clone(),
            bias: self.bias.clone(),
            out_shape: self.out_shape,
            dtype: self.dtype,
            with_moments,
        }
    }

    /// Launches the gradients of weights, bias and inputs. `sole`: nobody else reads the first input.
    fn run(self, context: &Context, dy: Tensor, sole: bool) -> Result<Vec<Option<TensorGradient>>> {
        let dy = dy.buffer();
        {
            // Values computed again live no longer than the weight gradient takes.
            let x = self.x.0.tensor(context)?;
            let second = self.second.as_ref().map(|(kept, _)| kept.tensor(context)).transpose()?;
            let second = second.as_ref().map(Tensor::buffer);
            conv3d::backward_weight(context, &self.problem, x.buffer(), second, dy, self.weight.gradient())?;
        }
        match &self.bias {
            Some(bias) if self.zero_bias_gradient => elementwise::fill(context, bias.gradient(), 0.0)?,
            Some(bias) => {
                let Shape { channels, .. } = self.out_shape;
                reduce::channel_sum(context, self.out_shape.voxels(), channels, dy, bias.gradient())?;
            }
            None => {}
        }
        if !self.needs_gradient {
            return Ok(vec![]);
        }
        let (x_shape, second_shape) = (self.x.1, self.second.as_ref().map(|second| second.1));
        drop((self.x, self.second));
        let takes_sums = self.fusion.norm_sums_by_convolution && sole;
        let norm_before = self.norm_before.as_deref().filter(|norm| takes_sums && norm.coefficients.is_some());
        let raw = norm_before.map(|norm| norm.raw.tensor(context)).transpose()?;
        let before = norm_before.zip(raw.as_ref()).and_then(|(norm, raw)| norm.before(raw));
        let dx = Tensor::empty(context, x_shape, self.dtype)?;
        let second_dx = second_shape.map(|shape| Tensor::empty(context, shape, self.dtype)).transpose()?;
        let second_buffer = second_dx.as_ref().map(Tensor::buffer);
        let w = self.weight.value();
        let parts = match before {
            Some(before) => {
                conv3d::backward_data_with_sums(context, &self.problem, w, dy, dx.buffer(), second_buffer, before)?
            }
            None => {
                conv3d::backward_data(context, &self.problem, w, dy, dx.buffer(), second_buffer)?;
                None
            }
        };
        Ok(vec![Some(TensorGradient { tensor: dx, parts }), second_dx.map(TensorGradient::from)])
    }
}

/// Transposed convolution whose kernel is its stride.
///
/// # Errors
/// If shapes do not fit or the device is out of memory.
pub fn conv_transpose3d(
    tape: &mut Tape,
    x: &Var,
    weight: &Parameter,
    bias: Option<&Parameter>,
    channels_out: usize,
    stride: [usize; 3],
) -> Result<Var> {
    let context = tape.context().clone();
    let Shape { batch, dims, channels } = x.shape();
    let problem = conv_transpose3d::Problem::new(batch, dims, channels, channels_out, stride)?;
    let out_shape = Shape { batch, dims: problem.out_dims(), channels: channels_out };
    let output = Tensor::empty(&context, out_shape, x.dtype())?;
    let bias_value = bias.map(Parameter::value);
    conv_transpose3d::forward(&context, &problem, x.value().buffer(), weight.value(), bias_value, output.buffer())?;

    let inputs = [x];
    let (x, x_shape) = (x.known().keep(), x.shape());
    let (weight, bias) = (weight.clone(), bias.cloned());
    Ok(tape.record(output, &inputs, move |gradient| {
        let dy = gradient.buffer();
        let value = x.tensor(&context)?;
        conv_transpose3d::backward_weight(&context, &problem, value.buffer(), dy, weight.gradient())?;
        drop(value);
        drop(x);
        if let Some(bias) = bias {
            reduce::channel_sum(&context, out_shape.voxels(), out_shape.channels, dy, bias.gradient())?;
        }
        let dx = Tensor::empty(&context, x_shape, dy.dtype())?;
        conv_transpose3d::backward_data(&context, &problem, weight.value(), dy, dx.buffer())?;
        Ok(vec![Some(dx)])
    }))
}

/// Slope of nnU-Net's leaky ReLU.
const LEAKY_RELU_SLOPE: f32 = 0.01;

/// Instance norm (epsilon 1e-5, affine, biased variance) and leaky ReLU in one.
///
/// # Errors
/// If shapes do not fit or the device is out of memory.
pub fn instance_norm_leaky_relu(tape: &mut Tape, x: &Var, weight: &Parameter, bias: &Parameter) -> Result<Var> {
    let context = tape.context().clone();
    let normalised = normalise(tape, x.value().clone(), None, (weight, bias), Some(LEAKY_RELU_SLOPE))?;
    let (output, normalised) = activated(tape, normalised, None)?;
    Ok(tape.record_value(output, &[x], move |gradient, _| {
        let dx = norm_gradient(&context, &normalised, gradient)?;
        Ok(vec![Some(dx.into())])
    }))
}

/// Launches norm and activation. From then on what the norm has read is that of a convolution computed `again`, if there is one.
fn activated(tape: &Tape, mut normalised: Normalised, again: Option<Convolution>) -> Result<(Value, Arc<Normalised>)> {
    let output = normalised.activate(tape.context())?;
    if let Some(convolution) = again {
        normalised.raw = Raw::Again(Box::new(convolution), OnceLock::new());
    }
    let normalised = Arc::new(normalised);
    Ok((Value::normalised(output, normalised.clone(), tape.fusion().recompute_activations), normalised))
}

/// Launches the statistics of `raw`, of its moments where they were taken. `activation` is the slope of what follows.
fn normalise(
    tape: &Tape,
    raw: Tensor,
    moments: Option<Moments>,
    (weight, bias): (&Parameter, &Parameter),
    activation: Option<f32>,
) -> Result<Normalised> {
    let context = tape.context();
    let (Shape { batch, dims, channels }, dtype) = (raw.shape(), raw.buffer().dtype());
    let voxels = dims.iter().product();
    let problem = instance_norm::Problem::new(batch, voxels, channels, dtype, activation)?;
    let statistics = context.empty(problem.statistics_len(), Dtype::F32)?;
    let moments = match moments {
        Some(moments) => moments,
        None => instance_norm::moments(context, &problem, raw.buffer())?,
    };
    let (weight, bias) = (weight.clone(), bias.clone());
    let raw = Raw::Kept(raw);
    let mut normalised = Normalised { problem, raw, statistics, weight, bias, coefficients: None };
    if tape.fusion().norm_sums_by_convolution {
        let coefficients = instance_norm::coefficients(context, &problem, moments, &normalised.norm())?;
        normalised.coefficients = Some(coefficients);
    } else {
        instance_norm::statistics_of_moments(context, &problem, moments, &normalised.statistics)?;
    }
    Ok(normalised)
}

/// The gradient of a norm's input, and those of its parameters.
fn norm_gradient(context: &Context, normalised: &Normalised, gradient: TensorGradient) -> Result<Tensor> {
    let problem = &normalised.problem;
    let TensorGradient { tensor: dy, parts } = gradient;
    let parts = match parts {
        Some(parts) => parts,
        None => {
            let raw = normalised.raw.tensor(context)?;
            instance_norm::gradient_parts(context, problem, raw.buffer(), &normalised.norm(), dy.buffer())?
        }
    };
    norm_gradient_of_parts(context, normalised, problem, parts, &dy)
}

/// The same once the sums are taken. `problem` says what lies between the norm and `dy`.
fn norm_gradient_of_parts(
    context: &Context,
    normalised: &Normalised,
    problem: &instance_norm::Problem,
    parts: GradientParts,
    dy: &Tensor,
) -> Result<Tensor> {
    let (raw, norm) = (normalised.raw.tensor(context)?, normalised.norm());
    let sums = context.empty(problem.statistics_len(), Dtype::F32)?;
    instance_norm::backward_sums_of_parts(context, problem, parts, &sums, &normalised.gradient())?;
    let dx = Tensor::empty(context, raw.shape(), dy.buffer().dtype())?;
    instance_norm::backward_apply(context, problem, raw.buffer(), &norm, dy.buffer(), &sums, dx.buffer())?;
    Ok(dx)
}
