//! The pass that normalises and activates, and what backward shares with it.

use super::problem::{Norm, OPERATION, Problem};
use crate::reduce::{Path, rows_of, share};
use crate::{Buffer, Context, KernelError};
use cubecl::prelude::*;

/// The passes that do not sum can work on longer blocks, and prepare their coefficients less often.
pub(super) const APPLY_BLOCKS: usize = 4;

/// `values[base + channel]` for the elements `element ..` of a row. Rows of several voxels repeat the channels.
#[cube]
pub(crate) fn of_channels<N: Size>(
    values: &[f32],
    base: usize,
    element: usize,
    channels: usize,
    #[comptime] cyclic: bool,
) -> Vector<f32, N> {
    let mut out = Vector::<f32, N>::empty();
    #[unroll]
    for l in 0..N::value() {
        let channel = if comptime!(cyclic) { (element + l) % channels } else { element + l };
        out.insert(l, values[base + channel]);
    }
    out
}

/// [`Norm`] inside of kernels: f32 `[batch, 2, channels]` and `[channels]`.
#[derive(CubeType, CubeLaunch)]
pub(super) struct NormOf {
    pub statistics: Box<[f32]>,
    pub gamma: Box<[f32]>,
    pub beta: Box<[f32]>,
    pub channels: usize,
    /// Of the leaky ReLU behind the norm.
    pub slope: f32,
    pub inverse_voxels: f32,
}

impl NormOfLaunch {
    pub fn of(problem: &Problem, norm: &Norm) -> Self {
        let [statistics, gamma, beta] = [norm.statistics, norm.gamma, norm.beta].map(Buffer::arg);
        Self::new(statistics, gamma, beta, problem.channels, problem.slope, 1.0 / problem.voxels as f32)
    }
}

/// Every pass computes z with this function, so that all agree on its sign.
#[cube]
pub(super) fn affine<N: Size>(centred: Vector<f32, N>, scale: Vector<f32, N>, beta: Vector<f32, N>) -> Vector<f32, N> {
    fma(centred, scale, beta)
}

/// `a` where `z > 0`, `slope * a` elsewhere: the leaky ReLU of z, or its derivative times dy.
#[cube]
pub(super) fn leak<N: Size>(z: Vector<f32, N>, a: Vector<f32, N>, slope: Vector<f32, N>) -> Vector<f32, N> {
    select_many(z.greater_than(&Vector::new(0.0f32)), a, a * slope)
}

#[cube(launch_unchecked)]
fn apply_kernel<E: Float, N: Size>(
    x: &[Vector<E, N>],
    y: &mut [Vector<E, N>],
    norm: NormOf,
    path: &Path,
    #[comptime] tile: usize,
    #[comptime] chunked: bool,
    #[comptime] cyclic: bool,
    #[define(E)] _dtype: ElemType,
) {
    let channels = norm.channels;
    let slope = Vector::<f32, N>::new(norm.slope);
    let (task_low, task_high, tile_low, tile_high) = share(path, tile, chunked);
    for task in task_low..task_high {
        let (first, step, count) = rows_of(task, path, chunked);
        let means = task / path.parts * 2 * channels;
        for low in range_stepped(0, count, path.block) {
            let high = (low + path.block).min(count);
            for at in tile_low..tile_high {
                let mut mean = Array::<Vector<f32, N>>::new(tile);
                let mut scale = Array::<Vector<f32, N>>::new(tile);
                let mut shift = Array::<Vector<f32, N>>::new(tile);
                #[unroll]
                for t in 0..tile {
                    let e = (at * tile + t) * N::value();
                    mean[t] = of_channels(&norm.statistics, means, e, channels, cyclic);
                    let rstd = of_channels::<N>(&norm.statistics, means + channels, e, channels, cyclic);
                    scale[t] = rstd * of_channels::<N>(&norm.gamma, 0usize, e, channels, cyclic);
                    shift[t] = of_channels(&norm.beta, 0usize, e, channels, cyclic);
                }
                for i in low..high {
                    let here = (first + i * step) * path.groups + at * tile;
                    #[unroll]
                    for t in 0..tile {
                        let centred = Vector::<f32, N>::cast_from(x[here + t]) - mean[t];
                        let z = affine(centred, scale[t], shift[t]);
                        y[here + t] = Vector::cast_from(leak(z, z, slope));
                    }
                }
            }
        }
    }
}

// ----------------------------------------------------------------------------------------------- launches

/// Writes `y = leaky_relu(gamma * (x - mean) * rstd + beta)`.
#[allow(clippy::missing_errors_doc, reason = "see forward")]
pub fn apply(context: &Context, problem: &Problem, x: &Buffer, norm: &Norm, y: &Buffer) -> Result<(), KernelError> {
    x.check(OPERATION, "x", problem.elements(), problem.dtype)?;
    y.check(OPERATION, "y", problem.elements(), problem.dtype)?;
    problem.expect_norm(norm)?;
    let walk = problem.walk(context, 2)?.with_longer_blocks(APPLY_BLOCKS);
    context.launch(OPERATION, walk.work(), |client, count, dim| {
        // SAFETY: the walk covers the elements of `x` and `y`; the parameters have `channels`, and the statistics
        // `batch * 2 * channels` elements.
        unsafe {
            apply_kernel::launch_unchecked(
                client,
                count,
                dim,
                walk.lanes,
                x.arg(),
                y.arg(),
                NormOfLaunch::of(problem, norm),
                walk.arg(),
                walk.tile,
                walk.chunked,
                walk.cyclic(problem.channels),
                problem.dtype.elem(),
            )
        }
    })
}
