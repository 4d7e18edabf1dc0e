//! Both passes forward.

use super::apply::apply;
use super::problem::{Norm, Problem};
use super::statistics::statistics;
use crate::{Buffer, Context, KernelError};

/// Writes `statistics` and `y`. `norm.statistics` is an output.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if a buffer does not fit the problem, [`KernelError::Limit`]
/// beyond the device's index range. The same holds for all functions of this module.
pub fn forward(context: &Context, problem: &Problem, x: &Buffer, norm: &Norm, y: &Buffer) -> Result<(), KernelError> {
    statistics(context, problem, x, norm.statistics)?;
    apply(context, problem, x, norm, y)
}
