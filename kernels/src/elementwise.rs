//! Operations on flat buffers, element by element: filling, copying, converting, scaling, adding.
//!
//! Memory-bound: each unit walks one contiguous strip with vector loads (one vector a unit on a GPU). Arithmetic
//! is f32 whatever the storage, and is rounded to it once.

use crate::block::strip;
use crate::reduce::check_count;
use crate::{Buffer, Context, KernelError, Work};
use cubecl::prelude::*;

/// Elements of a vector: as many as the device's registers hold, if they divide `len`.
pub(crate) fn lanes_of(context: &Context, len: usize) -> usize {
    let mut lanes = 1 << context.caps().lanes.ilog2();
    while !len.is_multiple_of(lanes) {
        lanes /= 2;
    }
    lanes
}

#[cube(launch_unchecked)]
fn fill_kernel<E: Numeric, N: Size>(y: &mut [Vector<E, N>], value: f32, vectors: usize, #[define(E)] _dtype: ElemType) {
    let (low, high) = strip(vectors);
    for i in low..high {
        y[i] = Vector::new(E::cast_from(value));
    }
}

#[cube(launch_unchecked)]
fn cast_kernel<E: Numeric, F: Numeric, N: Size>(
    x: &[Vector<E, N>],
    y: &mut [Vector<F, N>],
    vectors: usize,
    #[define(E, F)] _dtypes: [ElemType; 2],
) {
    let (low, high) = strip(vectors);
    for i in low..high {
        y[i] = Vector::cast_from(x[i]);
    }
}

#[cube(launch_unchecked)]
fn scale_kernel<E: Float, N: Size>(y: &mut [Vector<E, N>], factor: f32, vectors: usize, #[define(E)] _dtype: ElemType) {
    let (low, high) = strip(vectors);
    for i in low..high {
        let value = Vector::<f32, N>::cast_from(y[i]);
        y[i] = Vector::cast_from(value * Vector::new(factor));
    }
}

#[cube(launch_unchecked)]
fn add_assign_kernel<E: Float, F: Float, N: Size>(
    x: &[Vector<E, N>],
    y: &mut [Vector<F, N>],
    vectors: usize,
    #[define(E, F)] _dtypes: [ElemType; 2],
) {
    let (low, high) = strip(vectors);
    for i in low..high {
        let sum = Vector::<f32, N>::cast_from(y[i]) + Vector::<f32, N>::cast_from(x[i]);
        y[i] = Vector::cast_from(sum);
    }
}

// ----------------------------------------------------------------------------------------------- launches

fn expect_float(operation: &'static str, what: &'static str, buffer: &Buffer) -> Result<(), KernelError> {
    if buffer.dtype().is_float() {
        return Ok(());
    }
    Err(KernelError::Dtype { operation, what, expected: "floats", actual: buffer.dtype() })
}

/// `y[i] = value`, converted to the type of `y`.
///
/// # Errors
/// [`KernelError::Limit`] beyond the device's index range.
pub fn fill(context: &Context, y: &Buffer, value: f32) -> Result<(), KernelError> {
    const OPERATION: &str = "fill";
    check_count(context, OPERATION, y.len())?;
    let lanes = lanes_of(context, y.len());
    context.launch(OPERATION, Work::Items(y.len() / lanes), |client, count, dim| {
        // SAFETY: the strips cover the `len / lanes` vectors of `y`.
        unsafe {
            fill_kernel::launch_unchecked(client, count, dim, lanes, y.arg(), value, y.len() / lanes, y.dtype().elem())
        }
    })
}

/// `y[i] = x[i]` for buffers of the same type.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if `y` is not like `x`, [`KernelError::Limit`] beyond the
/// device's index range.
pub fn copy(context: &Context, x: &Buffer, y: &Buffer) -> Result<(), KernelError> {
    y.check("copy", "y", x.len(), x.dtype())?;
    convert(context, "copy", x, y)
}

/// `y[i] = x[i]`, rounded to the type of `y`. Both hold floats.
///
/// # Errors
/// [`KernelError::Shape`] if the lengths differ, [`KernelError::Dtype`] for integers, [`KernelError::Limit`]
/// beyond the device's index range.
pub fn cast(context: &Context, x: &Buffer, y: &Buffer) -> Result<(), KernelError> {
    expect_float("cast", "x", x)?;
    expect_float("cast", "y", y)?;
    y.check("cast", "y", x.len(), y.dtype())?;
    convert(context, "cast", x, y)
}

fn convert(context: &Context, operation: &'static str, x: &Buffer, y: &Buffer) -> Result<(), KernelError> {
    check_count(context, operation, x.len())?;
    let lanes = lanes_of(context, x.len());
    context.launch(operation, Work::Items(x.len() / lanes), |client, count, dim| {
        // SAFETY: both buffers have `len` elements; the strips cover their `len / lanes` vectors.
        unsafe {
            cast_kernel::launch_unchecked(
                client,
                count,
                dim,
                lanes,
                x.arg(),
                y.arg(),
                x.len() / lanes,
                [x.dtype().elem(), y.dtype().elem()],
            )
        }
    })
}

/// `y[i] *= factor`.
///
/// # Errors
/// [`KernelError::Dtype`] for integers, [`KernelError::Limit`] beyond the device's index range.
pub fn scale(context: &Context, y: &Buffer, factor: f32) -> Result<(), KernelError> {
    const OPERATION: &str = "scale";
    expect_float(OPERATION, "y", y)?;
    check_count(context, OPERATION, y.len())?;
    let lanes = lanes_of(context, y.len());
    context.launch(OPERATION, Work::Items(y.len() / lanes), |client, count, dim| {
        // SAFETY: the strips cover the `len / lanes` vectors of `y`.
        unsafe {
            scale_kernel::launch_unchecked(
                client,
                count,
                dim,
                lanes,
                y.arg(),
                factor,
                y.len() / lanes,
                y.dtype().elem(),
            )
        }
    })
}

/// `y[i] += x[i]`: where the gradients of several users of a tensor meet. The storage types may differ; `x` and `y`
/// must not overlap.
///
/// # Errors
/// [`KernelError::Shape`] if the lengths differ, [`KernelError::Dtype`] for integers, [`KernelError::Limit`]
/// beyond the device's index range.
pub fn add_assign(context: &Context, y: &Buffer, x: &Buffer) -> Result<(), KernelError> {
    const OPERATION: &str = "add";
    expect_float(OPERATION, "x", x)?;
    expect_float(OPERATION, "y", y)?;
    y.check(OPERATION, "y", x.len(), y.dtype())?;
    check_count(context, OPERATION, x.len())?;
    let lanes = lanes_of(context, x.len());
    context.launch(OPERATION, Work::Items(x.len() / lanes), |client, count, dim| {
        // SAFETY: both buffers have `len` elements; the strips cover their `len / lanes` vectors.
        unsafe {
            add_assign_kernel::launch_unchecked(
                client,
                count,
                dim,
                lanes,
                x.arg(),
                y.arg(),
                x.len() / lanes,
                [x.dtype().elem(), y.dtype().elem()],
            )
        }
    })
}
