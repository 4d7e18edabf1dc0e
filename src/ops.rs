//! The operations a network is made of: each launches its forward kernels and records what backward launches.
//! No arithmetic happens here.

use crate::error::Result;
use crate::kernels::instance_norm::{self, Norm, NormGradient};
use crate::kernels::{Buffer, Dtype, conv_transpose3d, conv3d, reduce};
use crate::parameters::Parameter;
use crate::tape::{Tape, Var};
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
    let context = tape.context().clone();
    let Shape { batch, dims, channels } = x.tensor().shape();
    let mut problem = conv3d::Problem::new(batch, dims, channels, channels_out, shape.kernel, shape.stride)?;
    if let Some(second) = second {
        problem = problem.with_second_input(second.tensor().shape().channels)?;
    }
    let out_shape = Shape { batch, dims: problem.out_dims(), channels: channels_out };
    let output = Tensor::empty(&context, out_shape, x.tensor().buffer().dtype())?;
    conv3d::forward(
        &context,
        &problem,
        x.tensor().buffer(),
        second.map(|s| s.tensor().buffer()),
        weight.value(),
        bias.map(Parameter::value),
        output.buffer(),
    )?;

    let inputs: Vec<&Var> = std::iter::once(x).chain(second).collect();
    let (x, second) = (x.clone(), second.cloned());
    let (weight, bias) = (weight.clone(), bias.cloned());
    Ok(tape.record(output, &inputs, move |gradient| {
        let dy = gradient.buffer();
        conv3d::backward_weight(
            &context,
            &problem,
            x.tensor().buffer(),
            second.as_ref().map(|s| s.tensor().buffer()),
            dy,
            weight.gradient(),
        )?;
        if let Some(bias) = bias {
            reduce::channel_sum(&context, out_shape.voxels(), out_shape.channels, dy, bias.gradient())?;
        }
        if !x.needs_gradient() {
            return Ok(vec![]);
        }
        let like = |var: &Var| Tensor::empty(&context, var.tensor().shape(), dy.dtype());
        let dx = like(&x)?;
        let second_dx = second.as_ref().map(like).transpose()?;
        let second_buffer = second_dx.as_ref().map(Tensor::buffer);
        conv3d::backward_data(&context, &problem, weight.value(), dy, dx.buffer(), second_buffer)?;
        Ok(vec![Some(dx), second_dx])
    }))
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
    let x = x.clone();
    let (weight, bias) = (weight.clone(), bias.cloned());
    Ok(tape.record(output, &inputs, move |gradient| {
        let dy = gradient.buffer();
        conv_transpose3d::backward_weight(&context, &problem, x.tensor().buffer(), dy, weight.gradient())?;
        if let Some(bias) = bias {
            reduce::channel_sum(&context, out_shape.voxels(), out_shape.channels, dy, bias.gradient())?;
        }
        let dx = Tensor::empty(&context, x.tensor().shape(), dy.dtype())?;
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
    let shape = x.tensor().shape();
    let dtype = x.tensor().buffer().dtype();
    let voxels = shape.dims.iter().product();
    let problem = instance_norm::Problem::new(shape.batch, voxels, shape.channels, dtype, Some(LEAKY_RELU_SLOPE))?;
    let statistics = context.empty(problem.statistics_len(), Dtype::F32)?;
    let output = Tensor::empty(&context, shape, dtype)?;
    let norm = Norm { statistics: &statistics, gamma: weight.value(), beta: bias.value() };
    instance_norm::forward(&context, &problem, x.tensor().buffer(), &norm, output.buffer())?;

    let inputs = [x];
    let (x, weight, bias) = (x.clone(), weight.clone(), bias.clone());
    Ok(tape.record(output, &inputs, move |gradient| {
        let norm = Norm { statistics: &statistics, gamma: weight.value(), beta: bias.value() };
        let to = NormGradient { gamma: weight.gradient(), beta: bias.gradient() };
        let dx = Tensor::empty(&context, shape, dtype)?;
        let (x, dy) = (x.tensor().buffer(), gradient.buffer());
        instance_norm::backward(&context, &problem, x, &norm, dy, dx.buffer(), &to)?;
        Ok(vec![Some(dx)])
    }))
}
