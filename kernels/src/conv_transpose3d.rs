//! Transposed 3D convolution whose kernel equals its stride (1 or 2 per axis), as nnU-Net's decoder
//! upsamples: every output voxel comes from exactly one input voxel and one tap,
//!
//! `y[i * stride + k, o] = bias[o] + sum over channels c of x[i, c] * w[k, c, o]`.
//!
//! Forward gathers for every position inside the stride; the data gradient is a convolution with that kernel
//! and stride and no padding; the weight gradient is the convolution's with the tensors exchanged. All run on
//! the kernels of [`conv3d`](crate::conv3d).

use crate::conv3d::gather::{Gather, WeightGradient, positions_inside};
use crate::conv3d::pack::Weights;
use crate::conv3d::route::{Products, Route};
use crate::conv3d::{Pass, run};
use crate::instance_norm::epilogue::Epilogue;
use crate::{Buffer, Caps, Context, Dtype, KernelError};

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

    /// The route of a pass: the fastest that adds up the products of the definition.
    fn route(&self, pass: Pass, dtype: Dtype, caps: &Caps) -> Route {
        let (gathered, results) = (self.channels_in, self.channels_out);
        let products = match pass {
            Pass::Forward => Products::Gather { gathered: [gathered, 0], results },
            Pass::DataGradient => Products::Gather { gathered: [results, 0], results: gathered },
            Pass::WeightGradient => Products::Weights { rows: results, columns: gathered },
        };
        Route::by_definition(&[products], dtype, caps)
    }

    /// The stored weights as they are, read from input to output channels or back.
    fn weights<'a>(&self, stored: &'a Buffer, transposed: bool) -> Weights<'a> {
        let (gathered, results) = match transposed {
            true => (self.channels_out, self.channels_in),
            false => (self.channels_in, self.channels_out),
        };
        Weights {
            stored,
            kernel: self.stride,
            rows: self.channels_in,
            columns: self.channels_out,
            taps: self.stride,
            first: [0; 3],
            step: [1; 3],
            transposed,
            out_first: 0,
            out_count: results,
            first_input: gathered,
        }
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
    let route = problem.route(Pass::Forward, x.dtype(), context.caps());
    // A launch for every position inside the stride, or one for all.
    let all = Gather {
        batch: problem.batch,
        input: x,
        channels_in: problem.channels_in,
        second: None,
        in_dims: problem.in_dims,
        weights: problem.weights(w, false),
        bias,
        output: y,
        out_dims: problem.out_dims(),
        channels_out: problem.channels_out,
        taps: problem.stride,
        in_step: [1; 3],
        pad: [0; 3],
        count: problem.out_dims(),
        out_step: problem.stride,
        out_offset: [0; 3],
        spread: Some([1; 3]),
        epilogue: Epilogue::Nothing,
    };
    if route.gathers_at_once() {
        return run::gather(context, route, &all);
    }
    positions_inside(problem.stride).try_for_each(|position| {
        let weights = Weights { taps: [1; 3], first: position, ..all.weights };
        let one = Gather { weights, taps: [1; 3], count: problem.in_dims, out_offset: position, spread: None, ..all };
        run::gather(context, route, &one)
    })
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
    let route = problem.route(Pass::DataGradient, dy.dtype(), context.caps());
    let operation = Gather {
        batch: problem.batch,
        input: dy,
        channels_in: problem.channels_out,
        second: None,
        in_dims: problem.out_dims(),
        weights: problem.weights(w, true),
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
        epilogue: Epilogue::Nothing,
    };
    run::gather(context, route, &operation)
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
    let route = problem.route(Pass::WeightGradient, x.dtype(), context.caps());
    let operation = WeightGradient {
        batch: problem.batch,
        strided: dy,
        rows: problem.channels_out,
        second: None,
        in_dims: problem.out_dims(),
        dense: x,
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
    };
    run::weight_gradient(context, route, &operation)
}
