//! The weights' points `G g`, in the order in which the products read them.

use super::grid::{A, A2, B, B2, OF_A, OF_B, OF_ZERO, PLANE, POINTS, WIDE_POINTS};
use crate::block::strip;
use crate::conv3d::pack::{Packing, Weights};
use crate::{Buffer, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// From weights, tap `t` of channel in `c` and vector `v` of block `b` at `b * block_stride + t * tap_stride + c *
/// channel_stride + v`, to `[block, point, channel in, vector]`. One unit transforms a strip of such triples.
#[cube(launch)]
#[allow(clippy::too_many_arguments, reason = "a kernel's arguments")]
fn weight_points_kernel<N: Size>(
    weights: &[Vector<f32, N>],
    points: &mut [Vector<f32, N>],
    blocks: usize,
    channels_in: usize,
    block_stride: usize,
    tap_stride: usize,
    channel_stride: usize,
    stride: usize,
    #[comptime] vectors: usize,
    #[comptime] deep: bool,
) {
    let depth_points = comptime!(if deep { POINTS } else { 1usize });
    let (low, high) = strip(blocks * channels_in * vectors);
    for i in low..high {
        let v = i % vectors;
        let c = i / vectors % channels_in;
        let block = i / vectors / channels_in;
        let from = block * block_stride + c * channel_stride + v;
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
                        weights[from + (k + 18) * tap_stride],
                        Vector::new(first) * weights[from + k * tap_stride],
                    );
                    plane[k] = fma(Vector::new(middle), weights[from + (k + 9) * tap_stride], outer);
                }
            } else {
                #[unroll]
                for k in 0..9usize {
                    plane[k] = weights[from + k * tap_stride];
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
            let to = (block * depth_points + depth_point) * PLANE * stride + c * vectors + v;
            #[unroll]
            for r in 0..POINTS {
                let to = to + r * WIDE_POINTS * stride;
                points[to] = rows[r * 3] * Vector::new(OF_ZERO);
                let even = fma(Vector::new(A2), rows[r * 3 + 2], rows[r * 3]) * Vector::new(OF_A);
                let odd = rows[r * 3 + 1] * Vector::new(A * OF_A);
                points[to + stride] = even + odd;
                points[to + 2 * stride] = even - odd;
                let even = fma(Vector::new(B2), rows[r * 3 + 2], rows[r * 3]) * Vector::new(OF_B);
                let odd = rows[r * 3 + 1] * Vector::new(B * OF_B);
                points[to + 3 * stride] = even + odd;
                points[to + 4 * stride] = even - odd;
                points[to + 5 * stride] = rows[r * 3 + 2];
            }
        }
    }
}

/// The weights' points of one convolution, for products of `vectors` vectors of `lanes` output channels.
pub(super) struct WeightPoints<'a> {
    pub weights: Weights<'a>,
    pub lanes: usize,
    pub vectors: usize,
    pub deep: bool,
}

impl WeightPoints<'_> {
    /// The points, and their distance in vectors.
    pub fn run(&self, context: &Context) -> Result<(Buffer, usize), KernelError> {
        let Self { weights, lanes, vectors, .. } = *self;
        let channels_in = weights.gathered();
        let block = vectors * lanes;
        let blocks = weights.out_count / block;
        // Weights of the forward pass are read where they are. The channels of both inputs follow each other.
        let packed = match weights.transposed {
            true => {
                let packing = Packing { block, split: 1, dtype: Dtype::F32 };
                Some(Weights { first_input: channels_in, ..weights }.pack(context, packing)?)
            }
            false => None,
        };
        let taps: usize = weights.taps.iter().product();
        let (block_stride, tap_stride, channel_stride) = match packed {
            Some(_) => (taps * channels_in * vectors, channels_in * vectors, vectors),
            None => (vectors, channels_in * blocks * vectors, blocks * vectors),
        };
        let points = if self.deep { POINTS * PLANE } else { PLANE };
        // One vector more than is needed: at a distance of a large power of two, points would share few lines of a cache.
        let stride = channels_in * vectors + 1;
        let transformed = context.empty(blocks * points * stride * lanes, Dtype::F32)?;
        let units = context.caps().cube_units();
        context.launch(
            "weight points",
            Work::units(context.caps().strips(blocks * channels_in * vectors, 1), units),
            |client, count, dim| {
                weight_points_kernel::launch(
                    client,
                    count,
                    dim,
                    lanes,
                    packed.as_ref().unwrap_or(weights.stored).arg(),
                    transformed.arg(),
                    blocks,
                    channels_in,
                    block_stride,
                    tap_stride,
                    channel_stride,
                    stride,
                    vectors,
                    self.deep,
                )
            },
        )?;
        Ok((transformed, stride))
    }
}
