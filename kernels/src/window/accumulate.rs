//! The weighted sum of the logits of overlapping windows.

use super::cut::mirrored;
use super::problem::{OPERATION, Problem};
use crate::block::strip;
use crate::conv3d::axes::{Axes, axes};
use crate::reduce::check_count;
use crate::{Buffer, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;
use std::ops::Range;

#[cube(launch_unchecked)]
fn add_kernel<E: Float, N: Size>(
    logits: &[Vector<E, N>],
    weights: &[f32],
    sums: &mut [Vector<f32, N>],
    window: &Axes,
    start: &Axes,
    flips: &Axes,
    held: &Axes,
    sample: usize,
    vectors: usize,
    share: f32,
    items: usize,
    #[comptime] by_row: bool,
    #[define(E)] _dtype: ElemType,
) {
    let (low, high) = strip(items);
    for item in low..high {
        let mut row = item;
        let mut first_w = 0usize;
        let mut end_w = window.width;
        let mut first = 0usize;
        let mut end = vectors;
        if comptime!(!by_row) {
            let voxel = item / vectors;
            first = item % vectors;
            end = first + 1;
            row = voxel / window.width;
            first_w = voxel % window.width;
            end_w = first_w + 1;
        }
        let z = row / window.height;
        let y = row % window.height;
        let to = (((start.depth + z) % held.depth) * held.height + start.height + y) * held.width + start.width;
        let slice = sample * window.depth + mirrored(z, window.depth, flips.depth);
        let from = (slice * window.height + mirrored(y, window.height, flips.height)) * window.width;
        for w in first_w..end_w {
            let weight = Vector::<f32, N>::new(weights[row * window.width + w] * share);
            let voxel = from + mirrored(w, window.width, flips.width);
            for v in first..end {
                sums[(to + w) * vectors + v] += Vector::<f32, N>::cast_from(logits[voxel * vectors + v]) * weight;
            }
        }
    }
}

#[cube(launch_unchecked)]
fn clear_kernel(sums: &mut [f32], first: usize, items: usize) {
    let (low, high) = strip(items);
    for item in low..high {
        sums[first + item] = 0.0;
    }
}

/// `sums += logits * weights * share` of the window that begins at `start`, which is window `sample` of
/// `logits [windows, depth, height, width, heads]`. Logits that are mirrored along the axes of `mirror` are taken back; the
/// weights `[depth, height, width]` are those of the window as it lies in the case.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if a buffer does not fit, or the window does not lie inside the padded
/// volume; [`KernelError::Limit`] beyond the device's index range.
#[expect(clippy::too_many_arguments, reason = "which window, from where, to where, and how much it counts")]
pub fn add(
    context: &Context,
    problem: &Problem,
    logits: &Buffer,
    sample: usize,
    start: [usize; 3],
    mirror: [bool; 3],
    (weights, share): (&Buffer, f32),
    sums: &Buffer,
) -> Result<(), KernelError> {
    if !logits.dtype().is_float() {
        let actual = logits.dtype();
        return Err(KernelError::Dtype { operation: OPERATION, what: "logits", expected: "floats", actual });
    }
    let windows = logits.len() / problem.logits_len();
    logits.check(OPERATION, "logits", windows * problem.logits_len(), logits.dtype())?;
    check_count(context, OPERATION, logits.len())?;
    if sample >= windows {
        return Err(KernelError::shape(OPERATION, "window", format_args!("one of {windows}"), sample));
    }
    weights.check(OPERATION, "weights", problem.weights_len(), Dtype::F32)?;
    problem.check_sums(context, sums)?;
    problem.check_start(start)?;
    let [depth, height, width] = problem.window;
    let lanes = context.caps().widest_vector(problem.heads);
    let vectors = problem.heads / lanes;
    let by_row = context.caps().cores.is_some();
    let items = if by_row { depth * height } else { depth * height * width * vectors };
    context.launch(OPERATION, Work::Items(items), |client, count, dim| {
        // SAFETY: the items cover the window's voxels; it lies inside the padded volume, whose slices are taken modulo those
        // that are held, which are not fewer than the window's: no two items add to one sum.
        unsafe {
            add_kernel::launch_unchecked(
                client,
                count,
                dim,
                lanes,
                logits.arg(),
                weights.arg(),
                sums.arg(),
                axes(problem.window),
                axes(start),
                axes(mirror.map(usize::from)),
                axes([problem.slices, problem.padded[1], problem.padded[2]]),
                sample,
                vectors,
                share,
                items,
                by_row,
                logits.dtype().elem(),
            )
        }
    })
}

/// Sets the sums of these slices of the padded volume to 0.
///
/// # Errors
/// [`KernelError::Shape`] if `sums` does not fit, or more slices are named than are held; [`KernelError::Limit`] beyond the
/// device's index range.
pub fn clear(context: &Context, problem: &Problem, slices: Range<usize>, sums: &Buffer) -> Result<(), KernelError> {
    problem.check_sums(context, sums)?;
    if slices.len() > problem.slices {
        let expected = format_args!("at most {} slices", problem.slices);
        return Err(KernelError::shape(OPERATION, "slices to clear", expected, slices));
    }
    let slice = problem.slice_len() * problem.heads;
    let first = slices.start % problem.slices;
    let before_the_end = slices.len().min(problem.slices - first);
    for (first, count) in [(first, before_the_end), (0, slices.len() - before_the_end)] {
        if count == 0 {
            continue;
        }
        let items = count * slice;
        context.launch(OPERATION, Work::Items(items), |client, count, dim| {
            // SAFETY: the slices from `first` on lie inside the sums.
            unsafe { clear_kernel::launch_unchecked(client, count, dim, sums.arg(), first * slice, items) }
        })?;
    }
    Ok(())
}
