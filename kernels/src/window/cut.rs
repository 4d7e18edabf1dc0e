//! Windows of a case, mirrored if asked, zeros where the case is padded.

use super::problem::{OPERATION, Problem};
use crate::block::strip;
use crate::conv3d::axes::{Axes, axes};
use crate::reduce::check_count;
use crate::{Buffer, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// Where along an axis of `length` a voxel comes from: from the other end if `flip` is 1.
#[cube]
pub(super) fn mirrored(at: usize, length: usize, flip: usize) -> usize {
    let mut place = at;
    if flip == 1 {
        place = length - 1 - at;
    }
    place
}

#[cube(launch_unchecked)]
fn cut_kernel<E: Float>(
    case: &[f32],
    starts: &[u32],
    windows: &mut [E],
    image: &Axes,
    before: &Axes,
    window: &Axes,
    flips: &Axes,
    channels: usize,
    items: usize,
    #[comptime] by_row: bool,
    #[define(E)] _dtype: ElemType,
) {
    let (low, high) = strip(items);
    for item in low..high {
        let mut row = item;
        let mut first = 0usize;
        let mut end = window.width;
        if comptime!(!by_row) {
            row = item / window.width;
            first = item % window.width;
            end = first + 1;
        }
        let slice = row / window.height;
        let start = slice / window.depth * 3;
        let z = usize::cast_from(starts[start]) + mirrored(slice % window.depth, window.depth, flips.depth);
        let y = usize::cast_from(starts[start + 1]) + mirrored(row % window.height, window.height, flips.height);
        let x = usize::cast_from(starts[start + 2]);
        let row_is_inside = z >= before.depth
            && z < before.depth + image.depth
            && y >= before.height
            && y < before.height + image.height;
        for w in first..end {
            let at = x + mirrored(w, window.width, flips.width);
            let is_inside = row_is_inside && at >= before.width && at < before.width + image.width;
            for channel in 0..channels {
                let mut value = 0.0f32;
                if is_inside {
                    let slice_from = (channel * image.depth + z - before.depth) * image.height;
                    value = case[(slice_from + y - before.height) * image.width + at - before.width];
                }
                windows[(row * window.width + w) * channels + channel] = E::cast_from(value);
            }
        }
    }
}

/// Writes the windows that begin at `starts`, `[windows, depth, height, width, channels]` of floats, mirrored along the axes of
/// `mirror`.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if a buffer does not fit, or a window does not lie inside the padded
/// volume; [`KernelError::Limit`] beyond the device's index range.
pub fn cut(
    context: &Context,
    problem: &Problem,
    case: &Buffer,
    starts: &[[usize; 3]],
    mirror: [bool; 3],
    windows: &Buffer,
) -> Result<(), KernelError> {
    case.check(OPERATION, "case", problem.case_len(), Dtype::F32)?;
    if !windows.dtype().is_float() {
        let actual = windows.dtype();
        return Err(KernelError::Dtype { operation: OPERATION, what: "windows", expected: "floats", actual });
    }
    let len = starts.len().saturating_mul(problem.window_len());
    windows.check(OPERATION, "windows", len, windows.dtype())?;
    check_count(context, OPERATION, problem.case_len().max(len))?;
    let mut places = Vec::with_capacity(3 * starts.len());
    for &start in starts {
        problem.check_start(start)?;
        places.extend(start.map(|place| place as u32));
    }
    let places = context.upload(&places, Dtype::U32)?;
    let by_row = context.caps().cores.is_some();
    let rows = starts.len() * problem.window[0] * problem.window[1];
    let items = if by_row { rows } else { rows * problem.window[2] };
    context.launch(OPERATION, Work::Items(items), |client, count, dim| {
        // SAFETY: the items cover the voxels of `windows`; of `case` only voxels inside its extents are read.
        unsafe {
            cut_kernel::launch_unchecked(
                client,
                count,
                dim,
                case.arg(),
                places.arg(),
                windows.arg(),
                axes(problem.image),
                axes(problem.before),
                axes(problem.window),
                axes(mirror.map(usize::from)),
                problem.channels,
                items,
                by_row,
                windows.dtype().elem(),
            )
        }
    })
}
