//! The weights' points `G g`, in the order in which the products read them.

use super::{PLANE, POINTS};
use crate::block::strip;
use crate::{Buffer, Context, Dtype, KernelError};
use cubecl::prelude::*;

/// From packed weights `[block, tap, channel in, vectors]` to `[block, point, channel in, vectors]`. One unit transforms a
/// strip of (block, channel in, vector) triples.
#[cube(launch)]
fn weight_points_kernel<N: Size>(
    packed: &[Vector<f32, N>],
    points: &mut [Vector<f32, N>],
    blocks: usize,
    channels_in: usize,
    #[comptime] vectors: usize,
    #[comptime] deep: bool,
) {
    let depth_points = comptime!(if deep { POINTS } else { 1usize });
    let taps = comptime!(if deep { 27usize } else { 9usize });
    // Distance of taps, and of points.
    let stride = channels_in * vectors;
    let (low, high) = strip(blocks * stride);
    for i in low..high {
        let block = i / stride;
        let inside = i % stride;
        let from = block * taps * stride + inside;
        for depth_point in 0..depth_points {
            let mut plane = Array::<Vector<f32, N>>::new(9usize);
            if comptime!(deep) {
                let inner = depth_point == 1 || depth_point == 2;
                let first = select(inner, 0.5f32, select(depth_point == 0, 1.0f32, 0.0f32));
                let middle = select(inner, select(depth_point == 1, 0.5f32, -0.5f32), 0.0f32);
                let last = select(inner, 0.5f32, select(depth_point == 3, 1.0f32, 0.0f32));
                #[unroll]
                for k in 0..9usize {
                    let outer = fma(
                        Vector::new(last),
                        packed[from + (k + 18) * stride],
                        Vector::new(first) * packed[from + k * stride],
                    );
                    plane[k] = fma(Vector::new(middle), packed[from + (k + 9) * stride], outer);
                }
            } else {
                #[unroll]
                for k in 0..9usize {
                    plane[k] = packed[from + k * stride];
                }
            }
            // Along the height, for each tap along the width; then along the width.
            let mut rows = Array::<Vector<f32, N>>::new(12usize);
            #[unroll]
            for k in 0..3usize {
                let half = (plane[k] + plane[k + 6]) * Vector::new(0.5f32);
                let middle = plane[k + 3] * Vector::new(0.5f32);
                rows[k] = plane[k];
                rows[k + 3] = half + middle;
                rows[k + 6] = half - middle;
                rows[k + 9] = plane[k + 6];
            }
            let to = (block * depth_points + depth_point) * PLANE * stride + inside;
            #[unroll]
            for r in 0..POINTS {
                let half = (rows[r * 3] + rows[r * 3 + 2]) * Vector::new(0.5f32);
                let middle = rows[r * 3 + 1] * Vector::new(0.5f32);
                points[to + (r * POINTS) * stride] = rows[r * 3];
                points[to + (r * POINTS + 1) * stride] = half + middle;
                points[to + (r * POINTS + 2) * stride] = half - middle;
                points[to + (r * POINTS + 3) * stride] = rows[r * 3 + 2];
            }
        }
    }
}

/// Transforms weights that `pack.rs` has packed in `blocks` of `vectors` times `lanes` output channels.
pub(super) fn points_of(
    context: &Context,
    packed: &Buffer,
    blocks: usize,
    channels_in: usize,
    vectors: usize,
    lanes: usize,
    deep: bool,
) -> Result<Buffer, KernelError> {
    let points = if deep { POINTS * PLANE } else { PLANE };
    let transformed = context.empty(points * blocks * channels_in * vectors * lanes, Dtype::F32)?;
    let units = context.caps().cube_units();
    weight_points_kernel::launch(
        context.client(),
        context.grid("weight points", context.caps().strips(blocks * channels_in * vectors, 1), units)?,
        CubeDim::new_1d(units),
        lanes,
        packed.arg(),
        transformed.arg(),
        blocks,
        channels_in,
        vectors,
        deep,
    );
    context.launched();
    Ok(transformed)
}
