//! A volume of activations on a device.

use crate::error::Result;
use crate::kernels::{Buffer, Context, Dtype, elementwise};

/// A contiguous `[batch, depth, height, width, channels]` array on a device. Clones share the memory.
#[derive(Clone, Debug)]
pub struct Tensor {
    buffer: Buffer,
    shape: Shape,
}

/// Extents of a [`Tensor`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Samples.
    pub batch: usize,
    /// Depth, height, width in voxels.
    pub dims: [usize; 3],
    /// Channels, innermost in memory.
    pub channels: usize,
}

impl Shape {
    /// Voxels of all samples.
    pub fn voxels(&self) -> usize {
        self.batch * self.dims.iter().product::<usize>()
    }

    /// Elements of all samples.
    pub fn len(&self) -> usize {
        self.voxels() * self.channels
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Tensor {
    /// Uninitialised memory of a shape.
    ///
    /// # Errors
    /// If the device has no buffer that large.
    pub fn empty(context: &Context, shape: Shape, dtype: Dtype) -> Result<Self> {
        Ok(Self { buffer: context.tensor(shape.len(), dtype)?, shape })
    }

    /// Copies `[batch, depth, height, width, channels]` values to the device.
    ///
    /// # Errors
    /// If the device has no buffer that large.
    ///
    /// # Panics
    /// If `values` has not the length of the shape.
    pub fn upload(context: &Context, shape: Shape, values: &[f32]) -> Result<Self> {
        assert_eq!(values.len(), shape.len(), "values of a tensor");
        Ok(Self { buffer: context.upload_f32(values)?, shape })
    }

    /// The same values, rounded to another floating-point type; shared, if it is the type that they have.
    ///
    /// # Errors
    /// If the device is out of memory.
    pub fn cast(&self, context: &Context, dtype: Dtype) -> Result<Self> {
        if self.buffer.dtype() == dtype {
            return Ok(self.clone());
        }
        let other = Self::empty(context, self.shape, dtype)?;
        elementwise::cast(context, &self.buffer, &other.buffer)?;
        Ok(other)
    }

    /// Waits for the device and copies the values back, as f32 whatever their type is.
    ///
    /// # Errors
    /// If what computed them failed.
    pub fn download(&self, context: &Context) -> Result<Vec<f32>> {
        Ok(context.download_f32(self.cast(context, Dtype::F32)?.buffer())?)
    }

    /// The memory.
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// The extents.
    pub fn shape(&self) -> Shape {
        self.shape
    }
}
