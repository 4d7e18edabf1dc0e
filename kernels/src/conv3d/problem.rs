//! The shapes of a convolution, checked once, and what is computed for them.

use crate::{Buffer, KernelError};

pub(super) const OPERATION: &str = "conv3d";

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

    /// Channels of the first input.
    pub fn channels_in(&self) -> usize {
        self.channels_in
    }

    /// Channels of the second input; 0 without one.
    pub fn second_channels(&self) -> usize {
        self.second_channels
    }

    /// Channels of the output.
    pub fn channels_out(&self) -> usize {
        self.channels_out
    }

    /// Taps along depth, height, width.
    pub fn kernel(&self) -> [usize; 3] {
        self.kernel
    }

    /// Steps along depth, height, width.
    pub fn stride(&self) -> [usize; 3] {
        self.stride
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

    /// Voxels before the first that the first tap sees.
    pub(super) fn pad(&self) -> [usize; 3] {
        self.kernel.map(|k| (k - 1) / 2)
    }

    /// Channels of both inputs.
    pub(super) fn all_channels_in(&self) -> usize {
        self.channels_in + self.second_channels
    }

    /// Channels of each input that there is.
    pub(super) fn inputs(&self) -> impl Iterator<Item = usize> {
        [self.channels_in, self.second_channels].into_iter().filter(|&channels| channels > 0)
    }

    pub(super) fn check_inputs(&self, x: &Buffer, second: Option<&Buffer>) -> Result<(), KernelError> {
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
