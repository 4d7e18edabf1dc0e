//! From tensors to points: `Bᵀ d` of an input, `A dy` of an output's gradient.

use super::grid::{A, A2, B, B2, POINTS, TileGrid, WIDE_OUTPUTS, WIDE_POINTS, place_of};
use cubecl::prelude::*;

/// What is transformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Window {
    /// The input, by `Bᵀ`: positions of the tile, one before it and one behind it.
    Input,
    /// The gradient of the output, by `A`: the tile's positions.
    Gradient,
}

impl Window {
    /// Positions of a tile along the depth and the height.
    fn positions(self) -> usize {
        match self {
            Self::Input => 4,
            Self::Gradient => 2,
        }
    }

    /// How many of them come before the tile.
    fn pad(self) -> usize {
        match self {
            Self::Input => 1,
            Self::Gradient => 0,
        }
    }
}

/// One point along the depth: two positions and their factors. A position outside has the factor 0 and is read inside.
#[derive(CubeType)]
struct Pair {
    first: usize,
    first_factor: f32,
    second: usize,
    second_factor: f32,
}

#[cube]
fn pair(point: usize, tile: usize, extent: usize, #[comptime] window: Window) -> Pair {
    let pad = comptime!(window.pad());
    // Positions are counted from the first padded one, so that they stay unsigned.
    let mut first = tile * 2;
    let mut second = tile * 2 + 1;
    let mut first_factor = select(point == 3, 0.0f32, 1.0f32);
    let mut second_factor = select(point == 0, 0.0f32, select(point == 1, 1.0f32, -1.0f32));
    if comptime!(window == Window::Input) {
        first += select(point == 0, 0usize, 1usize);
        second += select(point == 3, 2usize, 1usize);
        first_factor = select(point == 2, -1.0f32, 1.0f32);
        second_factor = select(point == 0 || point == 3, -1.0f32, 1.0f32);
    }
    let last = extent + pad - 1;
    Pair {
        first_factor: select(first >= pad && first <= last, first_factor, 0.0f32),
        second_factor: select(second <= last, second_factor, 0.0f32),
        first: first.max(pad).min(last) - pad,
        second: second.min(last) - pad,
    }
}

/// Rows along the width of which the heights of a tile's window are made: each height is one row, or two that add up along
/// the depth, each with a factor.
#[derive(CubeType)]
struct WindowRows {
    start: Array<usize>,
    factor: Array<f32>,
}

/// Which channels of a tensor of `vectors` channel vectors are transformed, and where their points go: to
/// `base + point * point_stride + tile * tile_stride + vector`.
#[derive(CubeType)]
pub(super) struct Transfer {
    pub vectors: usize,
    pub first: usize,
    pub count: usize,
    pub base: usize,
    pub point_stride: usize,
    pub tile_stride: usize,
}

/// Transforms the tiles `low..high` of `x`, `[batch, depth, height, width, vectors]`, at one point along the depth.
///
/// A walk along a row of tiles needs four new positions a tile; at each, the rows of the window are added along the depth,
/// and then make all points along the height.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernels")]
pub(super) fn transform<N: Size>(
    x: &[Vector<f32, N>],
    points: &mut [Vector<f32, N>],
    grid: &TileGrid,
    depth_point: usize,
    low: usize,
    high: usize,
    transfer: &Transfer,
    #[comptime] window: Window,
    #[comptime] deep: bool,
) {
    let vectors = transfer.vectors;
    let mut tile = low;
    while tile < high {
        // A run of tiles along one row.
        let first = tile % grid.tiles_width;
        let row = tile / grid.tiles_width;
        let (n, tile_depth, tile_height) = place_of(row, grid);
        let run = (grid.tiles_width - first).min(high - tile);

        let rows = rows_of_window(grid, n, tile_depth, tile_height, depth_point, vectors, window, deep);
        let start = transfer.base + (tile - low) * transfer.tile_stride;
        for i_vector in 0..transfer.count {
            let vector = transfer.first + i_vector;
            let mut at = start + i_vector;
            if comptime!(window == Window::Input) {
                let position = first * WIDE_OUTPUTS;
                let mut a = column::<N>(x, &rows, position, grid.width, vectors, vector, window, deep);
                let mut b = column::<N>(x, &rows, position + 1, grid.width, vectors, vector, window, deep);
                for i in 0..run {
                    let position = (first + i) * WIDE_OUTPUTS + 2;
                    let c = column::<N>(x, &rows, position, grid.width, vectors, vector, window, deep);
                    let d = column::<N>(x, &rows, position + 1, grid.width, vectors, vector, window, deep);
                    let e = column::<N>(x, &rows, position + 2, grid.width, vectors, vector, window, deep);
                    let f = column::<N>(x, &rows, position + 3, grid.width, vectors, vector, window, deep);
                    #[unroll]
                    for h in 0..POINTS {
                        let to = at + h * WIDE_POINTS * transfer.point_stride;
                        let product = Vector::<f32, N>::new(A2 * B2);
                        let sum = Vector::<f32, N>::new(-(A2 + B2));
                        points[to] = fma(sum, c[h], fma(product, a[h], e[h]));
                        let even = fma(Vector::new(-B2), c[h], e[h]);
                        let odd = fma(Vector::new(-B2), b[h], d[h]);
                        points[to + transfer.point_stride] = fma(Vector::new(A), odd, even);
                        points[to + 2 * transfer.point_stride] = fma(Vector::new(-A), odd, even);
                        let even = fma(Vector::new(-A2), c[h], e[h]);
                        let odd = fma(Vector::new(-A2), b[h], d[h]);
                        points[to + 3 * transfer.point_stride] = fma(Vector::new(B), odd, even);
                        points[to + 4 * transfer.point_stride] = fma(Vector::new(-B), odd, even);
                        points[to + 5 * transfer.point_stride] = fma(sum, d[h], fma(product, b[h], f[h]));
                        a[h] = e[h];
                        b[h] = f[h];
                    }
                    at += transfer.tile_stride;
                }
            } else {
                for i in 0..run {
                    let position = (first + i) * WIDE_OUTPUTS;
                    let a = column::<N>(x, &rows, position, grid.width, vectors, vector, window, deep);
                    let b = column::<N>(x, &rows, position + 1, grid.width, vectors, vector, window, deep);
                    let c = column::<N>(x, &rows, position + 2, grid.width, vectors, vector, window, deep);
                    let d = column::<N>(x, &rows, position + 3, grid.width, vectors, vector, window, deep);
                    #[unroll]
                    for h in 0..POINTS {
                        let to = at + h * WIDE_POINTS * transfer.point_stride;
                        points[to] = a[h];
                        let even = fma(Vector::new(A2), c[h], a[h]);
                        let odd = fma(Vector::new(A2), d[h], b[h]);
                        points[to + transfer.point_stride] = fma(Vector::new(A), odd, even);
                        points[to + 2 * transfer.point_stride] = fma(Vector::new(-A), odd, even);
                        let even = fma(Vector::new(B2), c[h], a[h]);
                        let odd = fma(Vector::new(B2), d[h], b[h]);
                        points[to + 3 * transfer.point_stride] = fma(Vector::new(B), odd, even);
                        points[to + 4 * transfer.point_stride] = fma(Vector::new(-B), odd, even);
                        points[to + 5 * transfer.point_stride] = d[h];
                    }
                    at += transfer.tile_stride;
                }
            }
        }
        tile += run;
    }
}

/// The rows of one tile's window at one point along the depth: for each height the near one and, if there are points along
/// the depth, the far one. Rows outside have the factor 0 and are read inside.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernels")]
fn rows_of_window(
    grid: &TileGrid,
    n: usize,
    tile_depth: usize,
    tile_height: usize,
    depth_point: usize,
    vectors: usize,
    #[comptime] window: Window,
    #[comptime] deep: bool,
) -> WindowRows {
    let pad = comptime!(window.pad());
    let heights = comptime!(window.positions());
    let planes = comptime!(if deep { 2usize } else { 1usize });
    let mut rows =
        WindowRows { start: Array::new(comptime!(heights * planes)), factor: Array::new(comptime!(heights * planes)) };
    #[unroll]
    for i in 0..heights {
        let h = tile_height * 2 + i;
        let inside = h >= pad && h < grid.height + pad;
        let h = h.max(pad).min(grid.height + pad - 1) - pad;
        if comptime!(deep) {
            let d = pair(depth_point, tile_depth, grid.depth, window);
            rows.start[i * 2] = ((n * grid.depth + d.first) * grid.height + h) * grid.width * vectors;
            rows.start[i * 2 + 1] = ((n * grid.depth + d.second) * grid.height + h) * grid.width * vectors;
            rows.factor[i * 2] = select(inside, d.first_factor, 0.0f32);
            rows.factor[i * 2 + 1] = select(inside, d.second_factor, 0.0f32);
        } else {
            rows.start[i] = ((n * grid.depth + tile_depth) * grid.height + h) * grid.width * vectors;
            rows.factor[i] = select(inside, 1.0f32, 0.0f32);
        }
    }
    rows
}

/// All points along the height at one position along the width, counted from the first padded one; 0 outside.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernels")]
fn column<N: Size>(
    x: &[Vector<f32, N>],
    rows: &WindowRows,
    position: usize,
    width: usize,
    vectors: usize,
    vector: usize,
    #[comptime] window: Window,
    #[comptime] deep: bool,
) -> Array<Vector<f32, N>> {
    let pad = comptime!(window.pad());
    let heights = comptime!(window.positions());
    let mut points = Array::<Vector<f32, N>>::new(POINTS);
    if position >= pad && position < width + pad {
        let at = (position - pad) * vectors + vector;
        let mut sums = Array::<Vector<f32, N>>::new(heights);
        #[unroll]
        for h in 0..heights {
            if comptime!(deep) {
                let near = Vector::new(rows.factor[h * 2]) * x[rows.start[h * 2] + at];
                sums[h] = fma(Vector::new(rows.factor[h * 2 + 1]), x[rows.start[h * 2 + 1] + at], near);
            } else {
                sums[h] = Vector::new(rows.factor[h]) * x[rows.start[h] + at];
            }
        }
        if comptime!(window == Window::Input) {
            points[0] = sums[0] - sums[2];
            points[1] = sums[1] + sums[2];
            points[2] = sums[2] - sums[1];
            points[3] = sums[1] - sums[3];
        } else {
            points[0] = sums[0];
            points[1] = sums[0] + sums[1];
            points[2] = sums[0] - sums[1];
            points[3] = -sums[1];
        }
    }
    points
}
