//! The operations a network is made of: each launches its forward kernels and records what backward launches.
//! No arithmetic happens here.

use crate::error::Result;
use crate::kernels::conv3d::fused;
use crate::kernels::instance_norm::{self, Moments, NormGradient, Operand};
use crate::kernels::{Buffer, Dtype, conv_transpose3d, conv3d, elementwise, reduce};
use crate::parameters::Parameter;
use crate::tape::{Normalised, Tape, Var};
use crate::tensor::{Shape, Tensor};

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
    convolve(tape, x, second, weight, bias, channels_out, shape, false).map(|(output, _)| output)
}

/// What `nn` makes its blocks of: convolution, instance norm (epsilon 1e-5, affine, biased variance) and leaky ReLU, fused as
/// the tape's [`Fusion`](crate::tape::Fusion) says.
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
    let (weight, bias) = convolution;
    let (y, moments) = convolve(tape, x, second, weight, bias, channels_out, shape, true)?;
    normalise(tape, &y, moments, norm)
}

#[allow(clippy::too_many_arguments, reason = "the private body of two functions")]
fn convolve(
    tape: &mut Tape,
    x: &Var,
    second: Option<&Var>,
    weight: &Parameter,
    bias: Option<&Parameter>,
    channels_out: usize,
    shape: ConvShape,
    before_norm: bool,
) -> Result<(Var, Option<Moments>)> {
    let context = tape.context().clone();
    let Shape { batch, dims, channels } = x.tensor().shape();
    let mut problem = conv3d::Problem::new(batch, dims, channels, channels_out, shape.kernel, shape.stride)?;
    if let Some(second) = second {
        problem = problem.with_second_input(second.tensor().shape().channels)?;
    }
    let out_shape = Shape { batch, dims: problem.out_dims(), channels: channels_out };
    let output = Tensor::empty(&context, out_shape, x.tensor().buffer().dtype())?;
    let (first, second_buffer) = (x.tensor().buffer(), second.map(|s| s.tensor().buffer()));
    let bias_value = bias.map(Parameter::value);
    let (w, y) = (weight.value(), output.buffer());
    let moments = if before_norm && tape.fusion().moments_by_convolution {
        let (first, second) = (Operand::Stored(first), second_buffer.map(Operand::Stored));
        fused::forward(&context, &problem, first, second, w, bias_value, y, true)?
    } else {
        conv3d::forward(&context, &problem, first, second_buffer, w, bias_value, y)?;
        None
    };

    let zero_bias_gradient = before_norm && tape.fusion().no_bias_gradient_before_norm;
    let inputs: Vec<&Var> = std::iter::once(x).chain(second).collect();
    let (needs_gradient, x_shape) = (x.needs_gradient(), x.tensor().shape());
    let second_shape = second.map(|s| s.tensor().shape());
    let (x, second) = (x.keep(), second.map(Var::keep));
    let (weight, bias) = (weight.clone(), bias.cloned());
    let output = tape.record(output, &inputs, move |gradient| {
        let dy = gradient.buffer();
        {
            // Values computed again live no longer than the weight gradient takes.
            let x = x.tensor(&context)?;
            let second = second.as_ref().map(|s| s.tensor(&context)).transpose()?;
            let second_buffer = second.as_ref().map(Tensor::buffer);
            conv3d::backward_weight(&context, &problem, x.buffer(), second_buffer, dy, weight.gradient())?;
        }
        drop((x, second));
        match bias {
            Some(bias) if zero_bias_gradient => elementwise::fill(&context, bias.gradient(), 0.0)?,
            Some(bias) => reduce::channel_sum(&context, out_shape.voxels(), out_shape.channels, dy, bias.gradient())?,
            None => {}
        }
        if !needs_gradient {
            return Ok(vec![]);
        }
        let gradient_of = |shape: Shape| Tensor::empty(&context, shape, dy.dtype());
        let dx = gradient_of(x_shape)?;
        let second_dx = second_shape.map(gradient_of).transpose()?;
        let second_buffer = second_dx.as_ref().map(Tensor::buffer);
        conv3d::backward_data(&context, &problem, weight.value(), dy, dx.buffer(), second_buffer)?;
        Ok(vec![Some(dx), second_dx])
    });
    Ok((output, moments))
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
    let Shape { batch, dims, channels } = x.tensor().shape();
    let problem = conv_transpose3d::Problem::new(batch, dims, channels, channels_out, stride)?;
    let out_shape = Shape { batch, dims: problem.out_dims(), channels: channels_out };
    let output = Tensor::empty(&context, out_shape, x.tensor().buffer().dtype())?;
    let bias_value: Option<&Buffer> = bias.map(Parameter::value);
    conv_transpose3d::forward(&context, &problem, x.tensor().buffer(), weight.value(), bias_value, output.buffer())?;

    let inputs = [x];
    let (x, x_shape) = (x.keep(), x.tensor().shape());
    let (weight, bias) = (weight.clone(), bias.cloned());
    Ok(tape.record(output, &inputs, move |gradient| {
        let dy = gradient.buffer();
        conv_transpose3d::backward_weight(&context, &problem, x.tensor(&context)?.buffer(), dy, weight.gradient())?;
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
    normalise(tape, x, None, (weight, bias))
}

/// With the moments of `x`, where they were taken.
fn normalise(
    tape: &mut Tape,
    x: &Var,
    moments: Option<Moments>,
    (weight, bias): (&Parameter, &Parameter),
) -> Result<Var> {
    let context = tape.context().clone();
    let shape = x.tensor().shape();
    let dtype = x.tensor().buffer().dtype();
    let voxels = shape.dims.iter().product();
    let problem = instance_norm::Problem::new(shape.batch, voxels, shape.channels, dtype, Some(LEAKY_RELU_SLOPE))?;
    let statistics = context.empty(problem.statistics_len(), Dtype::F32)?;
    let (raw, weight, bias) = (x.tensor().clone(), weight.clone(), bias.clone());
    let normalised = Normalised { problem, raw, statistics, weight, bias };
    match moments {
        Some(moments) => {
            instance_norm::statistics_of_moments(&context, &problem, moments, &normalised.statistics)?;
        }
        None => instance_norm::statistics(&context, &problem, normalised.raw.buffer(), &normalised.statistics)?,
    }
    let output = normalised.activate(&context)?;

    let recipe = normalised.clone();
    let recompute = tape.fusion().recompute_activations && tape.is_recording();
    let var = tape.record(output, &[x], move |gradient| {
        let Normalised { raw, weight, bias, .. } = &normalised;
        let to = NormGradient { gamma: weight.gradient(), beta: bias.gradient() };
        let dx = Tensor::empty(&context, shape, dtype)?;
        let (x, dy) = (raw.buffer(), gradient.buffer());
        instance_norm::backward(&context, &problem, x, &normalised.norm(), dy, dx.buffer(), &to)?;
        Ok(vec![Some(dx)])
    });
    Ok(if recompute { var.recomputed_from(recipe) } else { var })
}
