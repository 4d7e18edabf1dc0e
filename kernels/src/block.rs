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

/// The range of nothing but `item`; ends the unit if that is not in `0..length`. Written so that compilers see that a loop
/// over the range is none, and keep no registers for one: items are fewer than 2^31, the one after does not wrap around.
#[cube]
pub fn only(item: usize, length: usize) -> (usize, usize) {
    if item >= length {
        terminate!();
    }
    let item = item & 0x7fff_ffffusize;
    (item, item + 1)
}
