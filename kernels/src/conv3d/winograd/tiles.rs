//! From tensors to points: `Bᵀ d` of an input, `A dy` of an output's gradient.

use super::{Grid, POINTS};
use cubecl::prelude::*;

/// What is transformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Window {
    /// The input, by `Bᵀ`: four positions, the first one before the tile.
    Input,
    /// The gradient of the output, by `A`: the tile's two positions.
    Gradient,
}

/// One point along one axis: two positions and their factors. A position outside has the factor 0 and is read inside.
#[derive(CubeType)]
struct Pair {
    first: usize,
    first_factor: f32,
    second: usize,
    second_factor: f32,
}

#[cube]
fn pair(point: usize, tile: usize, extent: usize, #[comptime] window: Window) -> Pair {
    let pad = comptime!(if window == Window::Input { 1usize } else { 0usize });
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

/// Up to four rows along the width that add up, each with a factor, to one row of points along depth and height.
#[derive(CubeType)]
struct Rows {
    start: Array<usize>,
    factor: Array<f32>,
}

/// Which channels of a tensor of `vectors` channel vectors are transformed, and where their points go: to
/// `base + point * point_stride + tile * tile_stride + vector`.
#[derive(CubeType)]
pub(super) struct Route {
    pub vectors: usize,
    pub first: usize,
    pub count: usize,
    pub base: usize,
    pub point_stride: usize,
    pub tile_stride: usize,
}

/// Transforms the tiles `low..high` of `x`, `[batch, depth, height, width, vectors]`, at one point along the depth.
///
/// Rows are added along depth and height first; then a walk along the row needs two new positions a tile.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernels; a struct of slices is no kernel argument")]
pub(super) fn transform<N: Size>(
    x: &[Vector<f32, N>],
    points: &mut [Vector<f32, N>],
    grid: &Grid,
    depth_point: usize,
    low: usize,
    high: usize,
    route: &Route,
    #[comptime] window: Window,
    #[comptime] deep: bool,
) {
    let pad = comptime!(if window == Window::Input { 1usize } else { 0usize });
    let count = comptime!(if deep { 4usize } else { 2usize });
    let vectors = route.vectors;
    let mut tile = low;
    while tile < high {
        // A run of tiles along one row.
        let first = tile % grid.tiles_width;
        let row = tile / grid.tiles_width;
        let tile_height = row % grid.tiles_height;
        let row = row / grid.tiles_height;
        let tile_depth = row % grid.tiles_depth;
        let n = row / grid.tiles_depth;
        let run = (grid.tiles_width - first).min(high - tile);

        for height_point in 0..POINTS {
            let h = pair(height_point, tile_height, grid.height, window);
            let mut rows = Rows { start: Array::new(count), factor: Array::new(count) };
            if comptime!(deep) {
                let d = pair(depth_point, tile_depth, grid.depth, window);
                let near = (n * grid.depth + d.first) * grid.height;
                let far = (n * grid.depth + d.second) * grid.height;
                rows.start[0] = (near + h.first) * grid.width * vectors;
                rows.start[1] = (near + h.second) * grid.width * vectors;
                rows.start[2] = (far + h.first) * grid.width * vectors;
                rows.start[3] = (far + h.second) * grid.width * vectors;
                rows.factor[0] = d.first_factor * h.first_factor;
                rows.factor[1] = d.first_factor * h.second_factor;
                rows.factor[2] = d.second_factor * h.first_factor;
                rows.factor[3] = d.second_factor * h.second_factor;
            } else {
                let plane = (n * grid.depth + tile_depth) * grid.height;
                rows.start[0] = (plane + h.first) * grid.width * vectors;
                rows.start[1] = (plane + h.second) * grid.width * vectors;
                rows.factor[0] = h.first_factor;
                rows.factor[1] = h.second_factor;
            }

            let start = route.base + height_point * POINTS * route.point_stride + (tile - low) * route.tile_stride;
            for i_vector in 0..route.count {
                let vector = route.first + i_vector;
                if comptime!(window == Window::Input) {
                    let mut a = sum_of_rows::<N>(x, &rows, first * 2, pad, grid.width, vectors, vector, count);
                    let mut b = sum_of_rows::<N>(x, &rows, first * 2 + 1, pad, grid.width, vectors, vector, count);
                    for i in 0..run {
                        let position = (first + i) * 2 + 2;
                        let c = sum_of_rows::<N>(x, &rows, position, pad, grid.width, vectors, vector, count);
                        let d = sum_of_rows::<N>(x, &rows, position + 1, pad, grid.width, vectors, vector, count);
                        let at = start + i * route.tile_stride + i_vector;
                        points[at] = a - c;
                        points[at + route.point_stride] = b + c;
                        points[at + 2 * route.point_stride] = c - b;
                        points[at + 3 * route.point_stride] = b - d;
                        a = c;
                        b = d;
                    }
                } else {
                    for i in 0..run {
                        let position = (first + i) * 2;
                        let a = sum_of_rows::<N>(x, &rows, position, pad, grid.width, vectors, vector, count);
                        let b = sum_of_rows::<N>(x, &rows, position + 1, pad, grid.width, vectors, vector, count);
                        let at = start + i * route.tile_stride + i_vector;
                        points[at] = a;
                        points[at + route.point_stride] = a + b;
                        points[at + 2 * route.point_stride] = a - b;
                        points[at + 3 * route.point_stride] = -b;
                    }
                }
            }
        }
        tile += run;
    }
}

/// The rows added up at one position along the width, counted from the first padded one; 0 outside.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernels")]
fn sum_of_rows<N: Size>(
    x: &[Vector<f32, N>],
    rows: &Rows,
    position: usize,
    #[comptime] pad: usize,
    width: usize,
    vectors: usize,
    vector: usize,
    #[comptime] count: usize,
) -> Vector<f32, N> {
    let mut sum = Vector::<f32, N>::zeroed();
    if position >= pad && position < width + pad {
        let at = (position - pad) * vectors + vector;
        sum = Vector::new(rows.factor[0]) * load(x, rows.start[0] + at);
        #[unroll]
        for r in 1..count {
            sum = fma(Vector::new(rows.factor[r]), load(x, rows.start[r] + at), sum);
        }
    }
    sum
}

/// One vector of the tensor that is transformed: what a fused prologue would change.
#[cube]
fn load<N: Size>(x: &[Vector<f32, N>], at: usize) -> Vector<f32, N> {
    x[at]
}
