//! Transposed 3D convolution whose kernel equals its stride (1 or 2 per axis), as nnU-Net's decoder
//! upsamples: every output voxel comes from exactly one input voxel and one tap,
//!
//! `y[i * stride + k, o] = bias[o] + sum over channels c of x[i, c] * w[k, c, o]`.
//!
//! Forward gathers for every position inside the stride; the data gradient is a convolution with that kernel
//! and stride and no padding; the weight gradient is the convolution's with the tensors exchanged. All run on
//! the kernels of [`conv3d`](crate::conv3d).

use crate::conv3d::gather::{Gather, Method};
use crate::conv3d::pack::Packing;
use crate::conv3d::parities;
use crate::conv3d::weight_gradient::WeightGradient;
use crate::instance_norm::Operand;
use crate::instance_norm::epilogue::Epilogue;
use crate::{Buffer, Context, Dtype, KernelError};

const OPERATION: &str = "conv_transpose3d";

/// The shapes of one transposed convolution. Axes are depth, height, width.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    batch: usize,
    in_dims: [usize; 3],
    channels_in: usize,
    channels_out: usize,
    stride: [usize; 3],
}

impl Problem {
    /// Upsamples `[batch, in_dims, channels_in]` by `stride` to `channels_out` channels.
    ///
    /// # Errors
    /// [`KernelError::Shape`] for a stride other than 1 and 2 or no channels; [`KernelError::Limit`] if the output
    /// has more elements than a GPU's 32-bit index reaches.
    pub fn new(
        batch: usize,
        in_dims: [usize; 3],
        channels_in: usize,
        channels_out: usize,
        stride: [usize; 3],
    ) -> Result<Self, KernelError> {
        if stride.iter().any(|s| ![1, 2].contains(s)) {
            return Err(KernelError::shape(OPERATION, "stride", "1 or 2 along each axis", stride));
        }
        if channels_in == 0 || channels_out == 0 {
            return Err(KernelError::shape(OPERATION, "channels", "at least 1", (channels_in, channels_out)));
        }
        let problem = Self { batch, in_dims, channels_in, channels_out, stride };
        let (actual, limit) = (problem.output_len().max(problem.input_len()) as u64, i32::MAX as u64);
        if actual > limit {
            return Err(KernelError::Limit { operation: OPERATION, what: "elements of a tensor", actual, limit });
        }
        Ok(problem)
    }

    /// Extent of the output: `input * stride`.
    pub fn out_dims(&self) -> [usize; 3] {
        std::array::from_fn(|a| self.in_dims[a] * self.stride[a])
    }

    /// Elements of the input `[batch, depth, height, width, channels in]`.
    pub fn input_len(&self) -> usize {
        self.batch * self.in_dims.iter().product::<usize>() * self.channels_in
    }

    /// Elements of the output `[batch, depth, height, width, channels out]`.
    pub fn output_len(&self) -> usize {
        self.batch * self.out_dims().iter().product::<usize>() * self.channels_out
    }

    /// Elements of the weights `[kd, kh, kw, channels in, channels out]`.
    pub fn weight_len(&self) -> usize {
        self.stride.iter().product::<usize>() * self.channels_in * self.channels_out
    }

    /// Floating-point operations of the forward pass; each of the two large gradients takes as many.
    pub fn flops(&self) -> u64 {
        2 * (self.output_len() * self.channels_in) as u64
    }

    fn check(&self, x: &Buffer, w: Option<&Buffer>, y: &Buffer) -> Result<(), KernelError> {
        x.check(OPERATION, "input or its gradient", self.input_len(), x.dtype())?;
        if let Some(w) = w {
            w.check(OPERATION, "weights or their gradient", self.weight_len(), Dtype::F32)?;
        }
        y.check(OPERATION, "output or its gradient", self.output_len(), x.dtype())
    }
}

/// `y = conv_transpose(x, w) + bias`. `x`: `[batch, in_dims, channels_in]`, `w`: f32
/// `[kd, kh, kw, channels in, channels out]`, `bias`: f32 `[channels_out]`, `y`: `[batch, out_dims, channels_out]`.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if a buffer does not fit the problem.
pub fn forward(
    context: &Context,
    problem: &Problem,
    x: &Buffer,
    w: &Buffer,
    bias: Option<&Buffer>,
    y: &Buffer,
) -> Result<(), KernelError> {
    problem.check(x, Some(w), y)?;
    if let Some(bias) = bias {
        bias.check(OPERATION, "bias", problem.channels_out, Dtype::F32)?;
    }
    let (dtype, caps) = (x.dtype(), context.caps());
    let method = Method::choose(caps, dtype, [problem.channels_in, 0], problem.channels_out, problem.in_dims[2]);
    let (block, split, dtype) = method.packing(dtype, problem.channels_out);
    // A launch for every position inside the stride, or one for all.
    let at_once = matches!(method, Method::Direct(_));
    let packing = Packing {
        kernel: problem.stride,
        rows: problem.channels_in,
        columns: problem.channels_out,
        taps: if at_once { problem.stride } else { [1; 3] },
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
    for position in parities(if at_once { [1; 3] } else { problem.stride }) {
        let packed = Packing { first: position, ..packing }.run(context, w)?;
        Gather {
            batch: problem.batch,
            input: Operand::Stored(x),
            channels_in: problem.channels_in,
            second: None,
            in_dims: problem.in_dims,
            weights: &packed,
            bias,
            output: y,
            out_dims: problem.out_dims(),
            channels_out: problem.channels_out,
            taps: packing.taps,
            in_step: [1; 3],
            pad: [0; 3],
            count: if at_once { problem.out_dims() } else { problem.in_dims },
            out_step: problem.stride,
            out_offset: position,
            spread: at_once.then_some([1; 3]),
            method,
            epilogue: Epilogue::Nothing,
        }
        .launch(context)?;
    }
    Ok(())
}

/// The gradient of the input, `dx`: `[batch, in_dims, channels_in]`.
///
/// # Errors
/// As [`forward`].
pub fn backward_data(
    context: &Context,
    problem: &Problem,
    w: &Buffer,
    dy: &Buffer,
    dx: &Buffer,
) -> Result<(), KernelError> {
    problem.check(dx, Some(w), dy)?;
    let (dtype, caps) = (dy.dtype(), context.caps());
    let method = Method::choose(caps, dtype, [problem.channels_out, 0], problem.channels_in, problem.in_dims[2]);
    let (block, split, dtype) = method.packing(dtype, problem.channels_in);
    let packed = Packing {
        kernel: problem.stride,
        rows: problem.channels_in,
        columns: problem.channels_out,
        taps: problem.stride,
        first: [0; 3],
        step: [1; 3],
        transposed: true,
        out_first: 0,
        out_count: problem.channels_in,
        block,
        split,
        first_input: problem.channels_out,
        dtype,
    }
    .run(context, w)?;
    Gather {
        batch: problem.batch,
        input: Operand::Stored(dy),
        channels_in: problem.channels_out,
        second: None,
        in_dims: problem.out_dims(),
        weights: &packed,
        bias: None,
        output: dx,
        out_dims: problem.in_dims,
        channels_out: problem.channels_in,
        taps: problem.stride,
        in_step: problem.stride,
        pad: [0; 3],
        count: problem.in_dims,
        out_step: [1; 3],
        out_offset: [0; 3],
        spread: None,
        method,
        epilogue: Epilogue::Nothing,
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
    dy: &Buffer,
    dw: &Buffer,
) -> Result<(), KernelError> {
    problem.check(x, Some(dw), dy)?;
    WeightGradient {
        batch: problem.batch,
        strided: Operand::Stored(dy),
        rows: problem.channels_out,
        in_dims: problem.out_dims(),
        dense: Operand::Stored(x),
        columns: problem.channels_in,
        out_dims: problem.in_dims,
        taps: problem.stride,
        step: problem.stride,
        pad: [0; 3],
        gradient: dw,
        first: 0,
        tap_stride: problem.channels_in * problem.channels_out,
        row_stride: 1,
        column_stride: problem.channels_out,
    }
    .launch(context)
}
