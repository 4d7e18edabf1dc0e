//! `#[cube]` parts that several kernels share.

use cubecl::prelude::*;

/// This unit's contiguous part `low..high` of `0..length` when the whole launch shares it.
#[cube]
pub fn strip(length: usize) -> (usize, usize) {
    let units = CUBE_DIM as usize * CUBE_COUNT;
    let each = (length + units - 1) / units;
    // Clamped before subtracting: the last units of a short range get nothing.
    let low = (ABSOLUTE_POS * each).min(length);
    let high = (low + each).min(length);
    (low, high)
}
