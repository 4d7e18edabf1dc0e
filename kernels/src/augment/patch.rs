//! A sample of a batch, its extents, and how kernels divide it among units.

use crate::block::{only, strip};
use crate::reduce::check_count;
use crate::{Buffer, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

pub(super) const OPERATION: &str = "augmentation";

/// Extents of one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patch {
    pub(super) dims: [usize; 3],
    pub(super) channels: usize,
}

impl Patch {
    /// Depth, height, width in voxels, and channels.
    ///
    /// # Errors
    /// [`KernelError::Shape`] for empty patches, [`KernelError::Limit`] for those whose voxels or elements 31 bits do not
    /// count.
    pub fn new(dims: [usize; 3], channels: usize) -> Result<Self, KernelError> {
        if dims.contains(&0) || channels == 0 {
            return Err(KernelError::shape(OPERATION, "patch and channels", "at least 1 everywhere", (dims, channels)));
        }
        let all = [dims[0], dims[1], dims[2], channels];
        let elements = all.iter().try_fold(1u64, |product, &n| product.checked_mul(n as u64)).unwrap_or(u64::MAX);
        let limit = u64::from(u32::MAX / 2);
        if elements > limit {
            return Err(KernelError::Limit {
                operation: OPERATION,
                what: "elements of a patch",
                actual: elements,
                limit,
            });
        }
        Ok(Self { dims, channels })
    }

    /// Depth, height, width.
    pub fn dims(&self) -> [usize; 3] {
        self.dims
    }

    /// Image channels.
    pub fn channels(&self) -> usize {
        self.channels
    }

    /// Number of voxels.
    pub fn voxels(&self) -> usize {
        self.dims.iter().product()
    }

    /// Number of image values.
    pub fn elements(&self) -> usize {
        self.voxels() * self.channels
    }

    pub(super) fn rows(&self) -> usize {
        self.dims[0] * self.dims[1]
    }

    pub(super) fn extent(&self) -> ExtentLaunch {
        ExtentLaunch::new(self.dims[0], self.dims[1], self.dims[2])
    }

    /// Checks an f32 image of this patch.
    pub(super) fn check_image(&self, what: &'static str, image: &Buffer) -> Result<(), KernelError> {
        image.check(OPERATION, what, self.elements(), Dtype::F32)
    }

    pub(super) fn check_parameters<T>(&self, what: &'static str, values: &[T]) -> Result<(), KernelError> {
        if values.len() == self.channels {
            return Ok(());
        }
        Err(KernelError::shape(
            OPERATION,
            what,
            format_args!("one for each of {} channels", self.channels),
            values.len(),
        ))
    }
}

/// One sample of a batch in device memory.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// Extents of every sample of the batch.
    pub patch: Patch,
    /// Images `[batch, depth, height, width, channels]`.
    pub image: &'a Buffer,
    /// Codes or labels `[batch, depth, height, width]` in u8 or u16.
    pub labels: &'a Buffer,
    /// Index in the batch.
    pub index: usize,
}

impl Sample<'_> {
    /// Checks that the buffers hold the sample.
    pub(super) fn check(&self, context: &Context) -> Result<(), KernelError> {
        let batch = self.labels.len() / self.patch.voxels();
        if self.index >= batch {
            return Err(KernelError::shape(OPERATION, "sample", format_args!("below {batch}"), self.index));
        }
        self.labels.check(OPERATION, "labels", batch * self.patch.voxels(), self.labels.dtype())?;
        self.image.check(OPERATION, "image", batch * self.patch.elements(), self.image.dtype())?;
        let (labels, image) = (self.labels.dtype(), self.image.dtype());
        if !matches!(labels, Dtype::U8 | Dtype::U16) {
            return Err(KernelError::Dtype {
                operation: OPERATION,
                what: "labels",
                expected: "u8 or u16",
                actual: labels,
            });
        }
        if !image.is_float() {
            return Err(KernelError::Dtype { operation: OPERATION, what: "image", expected: "floats", actual: image });
        }
        check_count(context, OPERATION, self.image.len())
    }

    pub(super) fn check_f32(&self, context: &Context) -> Result<(), KernelError> {
        self.check(context)?;
        self.image.check(OPERATION, "image", self.image.len(), Dtype::F32)
    }

    pub(super) fn first_voxel(&self) -> usize {
        self.index * self.patch.voxels()
    }
}

/// Voxels along the axes, inside of kernels.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(super) struct Extent {
    pub depth: usize,
    pub height: usize,
    pub width: usize,
}

/// What this unit owns of `rows` rows of `width` voxels: rows `.0 .. .1`, and of each the voxels `.2 .. .3`.
#[cube]
pub(super) fn rows_and_voxels(rows: usize, width: usize, #[comptime] by_row: bool) -> (usize, usize, usize, usize) {
    if comptime!(by_row) {
        let (low, high) = strip(rows);
        (low, high, 0usize.runtime(), width)
    } else {
        let (low, high) = only(ABSOLUTE_POS / width, rows);
        let x = ABSOLUTE_POS % width;
        (low, high, x, x + 1)
    }
}

/// The work of a kernel that divides it with [`rows_and_voxels`], and whether by rows.
pub(super) fn row_work(context: &Context, patch: &Patch) -> (Work, bool) {
    let by_row = context.caps().cores.is_some();
    (Work::Items(if by_row { patch.rows() } else { patch.voxels() }), by_row)
}
