//! Single samples become those of a batch: the centre crop, mirroring, masking, the storage type and the codes' return to
//! labels. Reads and writes the image once.

use super::patch::{Extent, ExtentLaunch, OPERATION, Sample, row_work, rows_and_voxels};
use super::spatial::Region;
use crate::elementwise::lanes_of;
use crate::{Context, Dtype, KernelError};
use cubecl::prelude::*;

/// The source's voxels begin at `first`, the destination's at `first_out`; the box at `start` in the source.
/// Bits 0, 1, 2 of `mirrored` are depth, height, width; `masked` has a word for every channel, and vectors one lane where it
/// counts. A voxel has `vectors` vectors of channels.
#[cube(launch_unchecked)]
fn finish_kernel<E: Float, L: Int, T: Int, N: Size>(
    image: &[Vector<f32, N>],
    labels: &[L],
    image_out: &mut [Vector<E, N>],
    labels_out: &mut [T],
    masked: &[u32],
    first: usize,
    first_out: usize,
    start: &Extent,
    mirrored: u32,
    vectors: usize,
    from: &Extent,
    to: &Extent,
    #[comptime] by_row: bool,
    #[comptime] with_mask: bool,
    #[define(E, L, T)] _dtypes: [ElemType; 3],
) {
    let (row_low, row_high, x_low, x_high) = rows_and_voxels(to.depth * to.height, to.width, by_row);
    for row in row_low..row_high {
        let z = row / to.height;
        let y = row % to.height;
        let z = start.depth + select(mirrored & 1u32 != 0u32, to.depth - 1 - z, z);
        let y = start.height + select(mirrored & 2u32 != 0u32, to.height - 1 - y, y);
        let source_row = first + (z * from.height + y) * from.width + start.width;
        for at in x_low..x_high {
            let x = select(mirrored & 4u32 != 0u32, to.width - 1 - at, at);
            let voxel = source_row + x;
            let voxel_out = first_out + row * to.width + at;
            let code = u32::cast_from(labels[voxel]);
            // Code 0 is label -1, which becomes 0.
            labels_out[voxel_out] = T::cast_from(max(code, 1u32) - 1u32);
            for v in 0..vectors {
                let mut value = image[voxel * vectors + v];
                let hidden = if comptime!(with_mask) { code == 0u32 && masked[v] != 0u32 } else { false.runtime() };
                if hidden {
                    value = Vector::new(0.0f32);
                }
                image_out[voxel_out * vectors + v] = Vector::cast_from(value);
            }
        }
    }
}

/// How [`finish`] stores a sample.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Finish<'a> {
    /// Axes (depth, height, width) that are reversed.
    pub mirror: [bool; 3],
    /// Channels that become 0 where the label is -1. Empty: none.
    pub masked: &'a [bool],
}

/// Stores the middle of `source` (codes) as the sample `to` of a batch: image in f32, f16 or bf16, labels in u8 or u16.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if buffers do not fit, or the patch is larger than the sample,
/// [`KernelError::Limit`] beyond the device's index range.
pub fn finish(context: &Context, source: &Sample, to: &Sample, how: Finish) -> Result<(), KernelError> {
    source.check_f32(context)?;
    to.check(context)?;
    let centre =
        Region::centre(source.patch.dims, to.patch.dims).filter(|_| source.patch.channels == to.patch.channels);
    let Some(Region { start, .. }) = centre else {
        return Err(KernelError::shape(OPERATION, "patch", format_args!("inside of {:?}", source.patch), to.patch));
    };
    if !how.masked.is_empty() {
        to.patch.check_parameters("masked channels", how.masked)?;
    }
    let with_mask = how.masked.contains(&true);
    let masked: Vec<u32> =
        if with_mask { how.masked.iter().map(|&masked| u32::from(masked)).collect() } else { vec![0] };
    let masked = context.upload(&masked, Dtype::U32)?;
    let mirrored = (0..3).map(|axis| u32::from(how.mirror[axis]) << axis).sum::<u32>();
    let (work, by_row) = row_work(context, &to.patch);
    let lanes = if with_mask { 1 } else { lanes_of(context, to.patch.channels) };
    context.launch(OPERATION, work, |client, count, dim| {
        // SAFETY: source and destination hold their samples; the box of the one lies inside of the other; there is a word of
        // the mask for every channel where it is read.
        unsafe {
            finish_kernel::launch_unchecked(
                client,
                count,
                dim,
                lanes,
                source.image.arg(),
                source.labels.arg(),
                to.image.arg(),
                to.labels.arg(),
                masked.arg(),
                source.first_voxel(),
                to.first_voxel(),
                ExtentLaunch::new(start[0], start[1], start[2]),
                mirrored,
                to.patch.channels / lanes,
                source.patch.extent(),
                to.patch.extent(),
                by_row,
                with_mask,
                [to.image.dtype().elem(), source.labels.dtype().elem(), to.labels.dtype().elem()],
            )
        }
    })
}
