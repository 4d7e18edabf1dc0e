//! The end of a gradient of weights whose sums were split: the parts are added, in a fixed order.

use super::gather::{WEIGHT_GRADIENT, WeightGradient};
use crate::block::strip;
use crate::{Buffer, Context, KernelError, Work};
use cubecl::prelude::*;

/// Adds the parts `[split, tap, row, column]` in order and stores the sums where they belong.
#[cube(launch)]
fn add_parts_kernel(
    parts: &[f32],
    gradient: &mut [f32],
    taps: usize,
    rows: usize,
    columns: usize,
    splits: usize,
    first: usize,
    tap_stride: usize,
    row_stride: usize,
    column_stride: usize,
) {
    let part = taps * rows * columns;
    let (low, high) = strip(taps * rows);
    for i in low..high {
        let to = first + i / rows * tap_stride + i % rows * row_stride;
        for column in 0..columns {
            let mut sum = 0.0f32;
            for split in 0..splits {
                sum += parts[split * part + i * columns + column];
            }
            gradient[to + column * column_stride] = sum;
        }
    }
}

/// Adds `parts`, f32 `[splits, tap, row, column]`, into the gradient.
pub(super) fn add_parts(
    context: &Context,
    gradient: &WeightGradient,
    parts: &Buffer,
    splits: usize,
) -> Result<(), KernelError> {
    let taps: usize = gradient.taps.iter().product();
    let caps = context.caps();
    let work = Work::units(caps.strips(taps * gradient.rows, 1), caps.cube_units());
    context.launch(WEIGHT_GRADIENT, work, |client, count, dim| {
        add_parts_kernel::launch(
            client,
            count,
            dim,
            parts.arg(),
            gradient.gradient.arg(),
            taps,
            gradient.rows,
            gradient.columns,
            splits,
            gradient.first,
            gradient.tap_stride,
            gradient.row_stride,
            gradient.column_stride,
        );
    })
}
