//! The products of a row of outputs: what the direct gradient of the weights spends its time on.

use super::tile::repeat;
use cubecl::prelude::*;

/// What is compiled into one instance of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct RowsPlan {
    /// Groups of `split` channels of the strided tensor in a tile.
    pub rows: usize,
    /// Channels of the strided tensor in a vector.
    pub split: usize,
    /// Vectors of channels of the dense tensor in a tile.
    pub vectors: usize,
    /// Outputs along the width that are summed apart and added at the end: enough independent sums to keep the
    /// multiply-add units busy where a tile is small.
    pub apart: usize,
    /// Taps along the width in a tile: three, one apart, or one. With three, each value of the strided tensor is loaded once
    /// for all of them, and the dense tensor's values pass through a window of registers.
    pub window: usize,
    /// Whether the last tile has fewer channels of the strided tensor.
    pub ragged: bool,
    /// Whether a unit sums one tile over one chunk only, as on a GPU: no loops there, whose state would take registers.
    pub single: bool,
}

/// `[c, k]` to `[c]`: the lanes of row `k`.
#[cube]
pub(super) fn take_lanes<N: Size, G: Size>(
    sums: Vector<f32, N>,
    #[comptime] k: usize,
    #[comptime] split: usize,
) -> Vector<f32, G> {
    let mut taken = Vector::<f32, G>::empty();
    #[unroll]
    for c in 0..G::value() {
        taken.insert(c, sums.extract(c * split + k));
    }
    taken
}

/// `[c]` to `[c, k]`: each value `split` times.
#[cube]
fn stretch<E: Float, N: Size, G: Size>(values: Vector<E, G>, #[comptime] split: usize) -> Vector<f32, N> {
    let values = Vector::<f32, G>::cast_from(values);
    let mut stretched = Vector::<f32, N>::empty();
    #[unroll]
    for lane in 0..N::value() {
        stretched.insert(lane, values.extract(comptime!(lane / split)));
    }
    stretched
}

/// Adds the products of a row of `width` positions with the outputs one before, at, and one behind each of them, which belong
/// to the last, the middle and the first of three taps.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
pub(super) fn add_row<E: Float, N: Size, K: Size, G: Size>(
    sums: &mut Array<Vector<f32, N>>,
    strided: &[Vector<E, K>],
    dense: &[Vector<E, G>],
    position: usize,
    d: usize,
    r0: usize,
    rows: usize,
    columns: usize,
    width: usize,
    #[comptime] plan: RowsPlan,
) {
    let vectors = comptime!(plan.vectors);
    let apart = comptime!(plan.apart);
    // Three vectors each: behind, at and before the position.
    let mut outputs = Array::<Vector<f32, N>>::new(comptime!(3 * plan.vectors));
    #[unroll]
    for v in 0..vectors {
        outputs[vectors + v] = stretch::<E, N, G>(dense[d + v], plan.split);
        outputs[2 * vectors + v] = Vector::new(0.0f32);
    }
    let groups = (width - 1) / apart;
    for group in 0..groups {
        #[unroll]
        for a in 0..apart {
            let j = group * apart + a;
            let behind = d + (j + 1) * columns;
            #[unroll]
            for v in 0..vectors {
                outputs[v] = stretch::<E, N, G>(dense[behind + v], plan.split);
            }
            add_position::<E, N, K>(sums, &mut outputs, strided, position + j * rows, r0, rows, a, plan);
        }
    }
    if comptime!(plan.apart > 1) {
        for j in groups * apart..width - 1 {
            let behind = d + (j + 1) * columns;
            #[unroll]
            for v in 0..vectors {
                outputs[v] = stretch::<E, N, G>(dense[behind + v], plan.split);
            }
            add_position::<E, N, K>(sums, &mut outputs, strided, position + j * rows, r0, rows, 0usize, plan);
        }
    }
    #[unroll]
    for v in 0..vectors {
        outputs[v] = Vector::new(0.0f32);
    }
    add_position::<E, N, K>(sums, &mut outputs, strided, position + (width - 1) * rows, r0, rows, 0usize, plan);
}

/// Adds one position's products to the sums of number `a`, and moves the window on.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn add_position<E: Float, N: Size, K: Size>(
    sums: &mut Array<Vector<f32, N>>,
    outputs: &mut Array<Vector<f32, N>>,
    strided: &[Vector<E, K>],
    position: usize,
    r0: usize,
    rows: usize,
    #[comptime] a: usize,
    #[comptime] plan: RowsPlan,
) {
    let vectors = comptime!(plan.vectors);
    let tile_rows = comptime!(plan.rows);
    #[unroll]
    for r in 0..tile_rows {
        let mut channel = r0 + r;
        if comptime!(plan.ragged) {
            // The last tile repeats the last channel; its surplus sums are not stored.
            channel = channel.min(rows - 1);
        }
        let value = repeat::<E, N, K>(strided[position + channel], plan.split);
        #[unroll]
        for t in 0..3usize {
            #[unroll]
            for v in 0..vectors {
                let i = comptime!(((a * 3 + t) * tile_rows + r) * vectors + v);
                sums[i] = fma(value, outputs[t * vectors + v], sums[i]);
            }
        }
    }
    #[unroll]
    for v in 0..vectors {
        outputs[2 * vectors + v] = outputs[vectors + v];
        outputs[vectors + v] = outputs[v];
    }
}

/// Adds one output's products to the sums of number `a`.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
pub(super) fn add_output<E: Float, N: Size, K: Size, G: Size>(
    sums: &mut Array<Vector<f32, N>>,
    strided: &[Vector<E, K>],
    dense: &[Vector<E, G>],
    position: usize,
    d: usize,
    r0: usize,
    rows: usize,
    #[comptime] a: usize,
    #[comptime] plan: RowsPlan,
) {
    let vectors = comptime!(plan.vectors);
    let tile_rows = comptime!(plan.rows);
    let mut columns = Array::<Vector<f32, N>>::new(vectors);
    #[unroll]
    for v in 0..vectors {
        columns[v] = stretch::<E, N, G>(dense[d + v], plan.split);
    }
    #[unroll]
    for r in 0..tile_rows {
        let mut channel = r0 + r;
        if comptime!(plan.ragged) {
            // The last tile repeats the last channel; its surplus sums are not stored.
            channel = channel.min(rows - 1);
        }
        let value = repeat::<E, N, K>(strided[position + channel], plan.split);
        #[unroll]
        for v in 0..vectors {
            let i = comptime!((a * tile_rows + r) * vectors + v);
            sums[i] = fma(value, columns[v], sums[i]);
        }
    }
}
