//! 3D convolution with "same" padding, as nnU-Net's blocks use it: kernels of 1 and 3 per axis in any mix,
//! strides of 1 and 2 per axis in any mix, with bias; forward, and the gradients of input, weights and bias.
//!
//! The input may be the concatenation of two tensors along the channels, which is then never written.

mod choices;
pub mod fused;
pub(crate) mod gather;
pub(crate) mod igemm;
pub(crate) mod pack;
pub(crate) mod tiled;
pub(crate) mod weight_gradient;
mod winograd;

use crate::instance_norm::Operand;
use crate::{Buffer, Caps, Context, Dtype, KernelError};
use choices::tensor_cores_fit;
pub use choices::{Choices, applicable};
pub(crate) use fused::parities;
use gather::Method;

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
/// below 16 channels the transforms cost what the products save, and so they do in the gradients of a network's lowest
/// stages, whose few voxels do not pay for transforming `256 x 256` weights.
pub fn algorithm(problem: &Problem, pass: Pass, dtype: Dtype, caps: &Caps) -> Algorithm {
    let gathered = problem.channels_in + problem.second_channels;
    let least = gathered.min(problem.channels_out);
    let pays = least >= 16 && (pass == Pass::Forward || least < 256);
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
    let (x, second) = (Operand::Stored(x), second.map(Operand::Stored));
    fused::forward(context, problem, x, second, w, bias, y, false).map(|_| ())
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
    fused::backward_data(context, problem, w, Operand::Stored(dy), dx, second_dx, None).map(|_| ())
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
    let (x, second) = (Operand::Stored(x), second.map(Operand::Stored));
    fused::backward_weight(context, problem, x, second, Operand::Stored(dy), dw)
}
