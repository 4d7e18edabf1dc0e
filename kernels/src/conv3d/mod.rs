//! 3D convolution with "same" padding, as nnU-Net's blocks use it: kernels of 1 and 3 per axis in any mix,
//! strides of 1 and 2 per axis in any mix, with bias; forward, and the gradients of input, weights and bias.
//!
//! The input may be the concatenation of two tensors along the channels, which is then never written.

mod choices;
pub(crate) mod gather;
pub(crate) mod igemm;
pub(crate) mod pack;
pub(crate) mod tiled;
pub(crate) mod weight_gradient;
mod winograd;
mod workspace;

use crate::instance_norm::Moments;
use crate::{Buffer, Caps, Context, Dtype, KernelError};
pub use choices::{Choices, applicable};
use choices::{chosen, tensor_cores_fit};
use gather::{Gather, Method};
use pack::Packing;
use weight_gradient::WeightGradient;
use winograd::convolution::Convolution;
use winograd::weight_gradient::WeightGradient as WinogradWeightGradient;

pub use workspace::{transposed_workspace_bytes, workspace_bytes};

const OPERATION: &str = "conv3d";

/// The shapes of one convolution. Axes are depth, height, width.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    batch: usize,
    in_dims: [usize; 3],
    channels_in: usize,
    second_channels: usize,
    channels_out: usize,
    kernel: [usize; 3],
    stride: [usize; 3],
}

impl Problem {
    /// A convolution of `[batch, in_dims, channels_in]` to `channels_out` channels.
    ///
    /// # Errors
    /// [`KernelError::Shape`] for a kernel extent other than 1 and 3, a stride other than 1 and 2, or no channels;
    /// [`KernelError::Limit`] if input or output have more elements than a GPU's 32-bit index reaches.
    pub fn new(
        batch: usize,
        in_dims: [usize; 3],
        channels_in: usize,
        channels_out: usize,
        kernel: [usize; 3],
        stride: [usize; 3],
    ) -> Result<Self, KernelError> {
        if kernel.iter().any(|k| ![1, 3].contains(k)) {
            return Err(KernelError::shape(OPERATION, "kernel", "1 or 3 along each axis", kernel));
        }
        if stride.iter().any(|s| ![1, 2].contains(s)) {
            return Err(KernelError::shape(OPERATION, "stride", "1 or 2 along each axis", stride));
        }
        if channels_in == 0 || channels_out == 0 {
            return Err(KernelError::shape(OPERATION, "channels", "at least 1", (channels_in, channels_out)));
        }
        let problem = Self { batch, in_dims, channels_in, second_channels: 0, channels_out, kernel, stride };
        problem.check_index()?;
        Ok(problem)
    }

    /// The same convolution over two inputs of equal extent: the channels of the second follow those of the
    /// first, as in the decoder's concatenation.
    ///
    /// # Errors
    /// As [`Problem::new`].
    pub fn with_second_input(mut self, channels: usize) -> Result<Self, KernelError> {
        self.second_channels = channels;
        self.check_index()?;
        Ok(self)
    }

    fn check_index(&self) -> Result<(), KernelError> {
        let in_voxels = self.batch * self.in_dims.iter().product::<usize>();
        let largest = (in_voxels * self.channels_in.max(self.second_channels)).max(self.output_len());
        if largest > i32::MAX as usize {
            let (actual, limit) = (largest as u64, i32::MAX as u64);
            return Err(KernelError::Limit { operation: OPERATION, what: "elements of a tensor", actual, limit });
        }
        Ok(())
    }

    /// Extent of the output: `ceil(input / stride)` along each axis.
    pub fn out_dims(&self) -> [usize; 3] {
        std::array::from_fn(|a| self.in_dims[a].div_ceil(self.stride[a]))
    }

    /// Extent of the input.
    pub fn in_dims(&self) -> [usize; 3] {
        self.in_dims
    }

    /// Number of samples.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Channels of the output.
    pub fn channels_out(&self) -> usize {
        self.channels_out
    }

    /// Elements of the first input, `[batch, depth, height, width, channels]`.
    pub fn input_len(&self) -> usize {
        self.batch * self.in_dims.iter().product::<usize>() * self.channels_in
    }

    /// Elements of the second input; 0 without one.
    pub fn second_len(&self) -> usize {
        self.batch * self.in_dims.iter().product::<usize>() * self.second_channels
    }

    /// Elements of the output.
    pub fn output_len(&self) -> usize {
        self.batch * self.out_dims().iter().product::<usize>() * self.channels_out
    }

    /// Elements of the weights `[kd, kh, kw, channels in, channels out]`.
    pub fn weight_len(&self) -> usize {
        self.kernel.iter().product::<usize>() * (self.channels_in + self.second_channels) * self.channels_out
    }

    /// Floating-point operations of the forward pass, counting a multiply-add as two and padding as work. Each of
    /// the two large gradients takes as many.
    pub fn flops(&self) -> u64 {
        let voxels = self.batch * self.out_dims().iter().product::<usize>();
        2 * voxels as u64 * self.weight_len() as u64
    }

    /// Whether the forward pass of `dtype` activations runs on tensor cores. It does where the device has a product of this
    /// 16-bit type with f32 sums, and input and output channels fill at least half of its tile; else, as always in f32, it
    /// runs on register tiles. The gradients follow the same rule, each with the channels that it sums over.
    pub fn uses_tensor_cores(&self, dtype: Dtype, caps: &Caps) -> bool {
        matches!(self.method(dtype, caps), Method::TensorCores(_))
    }

    fn method(&self, dtype: Dtype, caps: &Caps) -> Method {
        let gathered = [self.channels_in, self.second_channels];
        Method::choose(caps, dtype, gathered, self.channels_out, self.out_dims()[2])
    }

    fn pad(&self) -> [usize; 3] {
        self.kernel.map(|k| (k - 1) / 2)
    }

    fn check_inputs(&self, x: &Buffer, second: Option<&Buffer>) -> Result<(), KernelError> {
        x.check(OPERATION, "input", self.input_len(), x.dtype())?;
        let second_len = second.map_or(0, Buffer::len);
        if second_len != self.second_len() {
            return Err(KernelError::shape(OPERATION, "elements of the second input", self.second_len(), second_len));
        }
        if let Some(second) = second {
            second.check(OPERATION, "second input", self.second_len(), x.dtype())?;
        }
        Ok(())
    }
}

/// How a convolution is computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// The products of the definition, added up in registers.
    Direct,
    /// Winograd's F(4, 3) along the width and F(2, 3) along the other axes of three taps: fewer products, other rounding.
    Winograd,
    /// The products of the definition, from 16-bit factors on tensor cores.
    TensorCores,
}

/// What is computed for a [`Problem`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// The output.
    Forward,
    /// The gradient of the inputs.
    DataGradient,
    /// The gradient of the weights.
    WeightGradient,
}

/// The algorithm that is the faster one on a device with `caps`, for tensors of `dtype`. Measured on two cores with AVX-512:
/// below 32 channels the transforms cost what the products save, and so they do in the gradients of a network's lowest
/// stages, whose few voxels do not pay for transforming `256 x 256` weights.
pub fn algorithm(problem: &Problem, pass: Pass, dtype: Dtype, caps: &Caps) -> Algorithm {
    let gathered = problem.channels_in + problem.second_channels;
    let least = gathered.min(problem.channels_out);
    let pays = least >= 32 && (pass == Pass::Forward || least < 256);
    if pays && winograd_fits(problem, dtype, caps) {
        return Algorithm::Winograd;
    }
    if tensor_cores_fit(problem, pass, dtype, caps) { Algorithm::TensorCores } else { Algorithm::Direct }
}

/// Whether Winograd's algorithm can compute a problem, in all passes.
fn winograd_fits(problem: &Problem, dtype: Dtype, caps: &Caps) -> bool {
    let channels = [problem.channels_in, problem.second_channels, problem.channels_out];
    caps.cores.is_some()
        && dtype == Dtype::F32
        && problem.stride == [1; 3]
        && matches!(problem.kernel, [1 | 3, 3, 3])
        && problem.output_len() > 0
        && channels.iter().all(|c| c.is_multiple_of(8))
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
    launch_forward(context, problem, x, second, w, bias, y, false).map(|_| ())
}

/// The same as [`forward`], and the moments of every sample and channel of `y`, as an instance norm needs them, without a
/// pass over `y`. `None` where the kernel cannot take them: on tensor cores whose tile does not share out
/// its columns evenly, and on shared memory.
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
    launch_forward(context, problem, x, second, w, bias, y, true)
}

#[allow(clippy::too_many_arguments, reason = "the private body of two functions")]
fn launch_forward(
    context: &Context,
    problem: &Problem,
    x: &Buffer,
    second: Option<&Buffer>,
    w: &Buffer,
    bias: Option<&Buffer>,
    y: &Buffer,
    with_moments: bool,
) -> Result<Option<Moments>, KernelError> {
    problem.check_inputs(x, second)?;
    w.check(OPERATION, "weights", problem.weight_len(), Dtype::F32)?;
    if let Some(bias) = bias {
        bias.check(OPERATION, "bias", problem.channels_out, Dtype::F32)?;
    }
    y.check(OPERATION, "output", problem.output_len(), x.dtype())?;
    let (context, algorithm) = &chosen(context, problem, Pass::Forward, x.dtype());
    let out_dims = problem.out_dims();
    let method = problem.method(x.dtype(), context.caps());
    let (block, split, dtype) = method.packing(x.dtype(), problem.channels_out);
    let packing = Packing {
        kernel: problem.kernel,
        rows: problem.channels_in + problem.second_channels,
        columns: problem.channels_out,
        taps: problem.kernel,
        first: [0; 3],
        step: [1; 3],
        transposed: false,
        out_first: 0,
        out_count: problem.channels_out,
        block,
        split,
        first_input: problem.channels_in,
        dtype,
    };
    let second = second.map(|second| (second, problem.second_channels));
    let moments = |parts: usize| match with_moments {
        true => Moments::new(context, problem.batch, parts, problem.channels_out).map(Some),
        false => Ok(None),
    };
    if *algorithm == Algorithm::Winograd {
        let moments = moments(context.caps().cube_units() as usize)?;
        Convolution {
            batch: problem.batch,
            dims: problem.in_dims,
            input: x,
            channels_in: problem.channels_in,
            second,
            deep: problem.kernel[0] == 3,
            bias,
            output: y,
            channels_out: problem.channels_out,
            moments: moments.as_ref(),
        }
        .launch(context, w, packing)?;
        return Ok(moments);
    }
    let packed = packing.run(context, w)?;
    let mut gather = Gather {
        batch: problem.batch,
        input: x,
        channels_in: problem.channels_in,
        second,
        in_dims: problem.in_dims,
        weights: &packed,
        bias,
        output: y,
        out_dims,
        channels_out: problem.channels_out,
        taps: problem.kernel,
        in_step: problem.stride,
        pad: problem.pad(),
        count: out_dims,
        out_step: [1; 3],
        out_offset: [0; 3],
        method,
        moments: None,
    };
    let moments = match method {
        Method::TensorCores(plan) if !plan.merges_columns() => None,
        Method::Tiled(_) => None,
        _ => moments(gather.parts(context))?,
    };
    gather.moments = moments.as_ref();
    gather.launch(context)?;
    Ok(moments)
}

/// The gradient of the input: `dx` of the first, and `second_dx` of the second if there is one.
///
/// With stride 2 the input positions fall into parities, each with taps of its own; every parity is one launch, and
/// no product with a zero between the strides is computed.
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
    problem.check_inputs(dx, second_dx)?;
    w.check(OPERATION, "weights", problem.weight_len(), Dtype::F32)?;
    dy.check(OPERATION, "gradient of the output", problem.output_len(), dx.dtype())?;
    let outputs =
        [Some((dx, 0, problem.channels_in)), second_dx.map(|d| (d, problem.channels_in, problem.second_channels))];
    let (context, algorithm) = &chosen(context, problem, Pass::DataGradient, dx.dtype());
    for (dx, first_channel, channels) in outputs.into_iter().flatten() {
        if *algorithm == Algorithm::Winograd {
            let packing = Packing {
                kernel: problem.kernel,
                rows: problem.channels_in + problem.second_channels,
                columns: problem.channels_out,
                taps: problem.kernel,
                first: problem.kernel.map(|k| k - 1),
                step: [-1; 3],
                transposed: true,
                out_first: first_channel,
                out_count: channels,
                block: channels,
                split: 1,
                first_input: problem.channels_out,
                dtype: Dtype::F32,
            };
            Convolution {
                batch: problem.batch,
                dims: problem.in_dims,
                input: dy,
                channels_in: problem.channels_out,
                second: None,
                deep: problem.kernel[0] == 3,
                bias: None,
                output: dx,
                channels_out: channels,
                moments: None,
            }
            .launch(context, w, packing)?;
            continue;
        }
        for parity in parities(problem.stride) {
            data_gradient_of_parity(context, problem, w, dy, dx, first_channel, channels, parity)?;
        }
    }
    Ok(())
}

/// All positions inside one step of the stride.
pub(crate) fn parities(stride: [usize; 3]) -> impl Iterator<Item = [usize; 3]> {
    (0..stride[0]).flat_map(move |d| (0..stride[1]).flat_map(move |h| (0..stride[2]).map(move |w| [d, h, w])))
}

#[allow(clippy::too_many_arguments, reason = "the private body of one loop")]
fn data_gradient_of_parity(
    context: &Context,
    problem: &Problem,
    w: &Buffer,
    dy: &Buffer,
    dx: &Buffer,
    first_channel: usize,
    channels: usize,
    parity: [usize; 3],
) -> Result<(), KernelError> {
    // Along an axis, input i meets output (i + pad - k) / stride for the taps k that make it whole. Taps are
    // visited from the last to the first, which is from the first output to the last.
    let axis = |a: usize| -> (Vec<usize>, usize) {
        let (k, s, pad) = (problem.kernel[a], problem.stride[a], problem.pad()[a]);
        let taps: Vec<usize> = (0..k).rev().filter(|tap| (parity[a] + pad + s * k - tap).is_multiple_of(s)).collect();
        // The first output that is met, counted from i / stride: negative by `pad` of the gather.
        let lead = taps.first().map_or(0, |&tap| if parity[a] + pad >= tap { 0 } else { (tap - parity[a] - pad) / s });
        (taps, lead)
    };
    let axes: [(Vec<usize>, usize); 3] = std::array::from_fn(axis);
    let count: [usize; 3] =
        std::array::from_fn(|a| (problem.in_dims[a] + problem.stride[a] - 1 - parity[a]) / problem.stride[a]);
    let taps: [usize; 3] = std::array::from_fn(|a| axes[a].0.len());
    let method = Method::choose(context.caps(), dy.dtype(), [problem.channels_out, 0], channels, count[2]);
    let (block, split, dtype) = method.packing(dy.dtype(), channels);
    let packed = Packing {
        kernel: problem.kernel,
        rows: problem.channels_in + problem.second_channels,
        columns: problem.channels_out,
        taps,
        first: std::array::from_fn(|a| axes[a].0.first().copied().unwrap_or(0)),
        step: std::array::from_fn(
            |a| if axes[a].0.len() > 1 { axes[a].0[1] as isize - axes[a].0[0] as isize } else { -1 },
        ),
        transposed: true,
        out_first: first_channel,
        out_count: channels,
        block,
        split,
        first_input: problem.channels_out,
        dtype,
    }
    .run(context, w)?;
    Gather {
        batch: problem.batch,
        input: dy,
        channels_in: problem.channels_out,
        second: None,
        in_dims: problem.out_dims(),
        weights: &packed,
        bias: None,
        output: dx,
        out_dims: problem.in_dims,
        channels_out: channels,
        taps,
        in_step: [1; 3],
        pad: std::array::from_fn(|a| axes[a].1),
        count,
        out_step: problem.stride,
        out_offset: parity,
        method,
        moments: None,
    }
    .launch(context)
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
    let (context, algorithm) = &chosen(context, problem, Pass::WeightGradient, x.dtype());
    if *algorithm == Algorithm::Winograd {
        return WinogradWeightGradient {
            batch: problem.batch,
            dims: problem.in_dims,
            input: x,
            channels_in: problem.channels_in,
            second: second.map(|second| (second, problem.second_channels)),
            deep: problem.kernel[0] == 3,
            output_gradient: dy,
            channels_out: problem.channels_out,
            gradient: dw,
        }
        .launch(context);
    }
    let all = problem.channels_in + problem.second_channels;
    let inputs = [Some((x, 0, problem.channels_in)), second.map(|s| (s, problem.channels_in, problem.second_channels))];
    for (x, first_channel, channels) in inputs.into_iter().flatten() {
        WeightGradient {
            batch: problem.batch,
            strided: x,
            rows: channels,
            in_dims: problem.in_dims,
            dense: dy,
            columns: problem.channels_out,
            out_dims: problem.out_dims(),
            taps: problem.kernel,
            step: problem.stride,
            pad: problem.pad(),
            gradient: dw,
            first: first_channel * problem.channels_out,
            tap_stride: all * problem.channels_out,
            row_stride: problem.channels_out,
            column_stride: 1,
        }
        .launch(context)?;
    }
    Ok(())
}
