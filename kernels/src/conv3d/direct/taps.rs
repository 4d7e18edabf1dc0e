//! The products of a register tile: what the direct convolution spends its time on.

use super::tile::repeat;
use crate::conv3d::gather::GatherNumbers;
use cubecl::prelude::*;

/// What is compiled into one instance of the kernel. Taps, steps and paddings are run-time numbers: compiled in, they make
/// the loops no faster (LLVM unrolls short ones, which was measured at half the speed), and every mix would be compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct TapsPlan {
    /// Outputs along the width that one tile holds in registers.
    pub width: usize,
    /// Vectors of output channels that one tile holds in registers.
    pub vectors: usize,
    /// Partial sums of a channel in a vector.
    pub split: usize,
    /// Whether a second input continues the channels of the first.
    pub second_input: bool,
    pub bias: bool,
    /// Whether the moments of the outputs are taken.
    pub moments: bool,
    /// Whether a unit has one part of each sample's moments for all of its segments, on CPUs; else each segment is a part.
    pub chunked: bool,
    /// Groups of `split` values between what neighbouring outputs gather from each input: compiled in, since a register for
    /// each output's address is more than a CPU has.
    pub strides: [usize; 2],
    /// Whether outputs at all positions inside the step are computed.
    pub spread: bool,
    /// Whether a gathered value is loaded once for three neighbouring outputs: with three taps along the width, one apart.
    pub shared: bool,
}

/// Where a row of outputs lies along one axis, and what it gathers there.
#[derive(CubeType)]
pub(super) struct Axis {
    pub out: usize,
    /// The output's number among those at the same position inside the step.
    pub j: usize,
    pub first_tap: usize,
    pub taps: usize,
}

/// Where a row of outputs gathers from.
#[derive(CubeType)]
pub(super) struct From {
    pub n: usize,
    pub depth: Axis,
    pub height: Axis,
    pub first_tap: usize,
    pub taps_width: usize,
}

/// Adds the products of one input of `channels` channels, whose weights begin at `first_weight`, to the tile's sums.
///
/// Along the width, taps and channels are one run in memory, of the input as of the weights: output `i` reads from
/// `base + i * step * channels` on. Only the first and the last output of a tile can reach out of the row.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
pub(super) fn add_taps<E: Float, N: Size, K: Size>(
    sums: &mut Array<Vector<f32, N>>,
    x: &[Vector<E, K>],
    weights: &[Vector<f32, N>],
    shape: &GatherNumbers,
    channels: usize,
    first_weight: usize,
    from: &From,
    j0: usize,
    #[comptime] input: usize,
    #[comptime] plan: TapsPlan,
) {
    let width = comptime!(plan.width);
    let vectors = comptime!(plan.vectors);
    let stride = comptime!(plan.strides[input]);
    let taps = from.taps_width;
    let step = shape.in_step.width;
    let pad = shape.pad.width;
    // From here on everything is counted in groups of `split` values.
    let channels = channels / plan.split;
    let run = taps * channels;

    // The part of the run that is inside the row, for the first and the last output. Positions are counted from the
    // first padded one, so that they stay unsigned.
    let start = j0 * step;
    let end = start + (width - 1) * step;
    let first_low = select(start >= pad, 0usize, pad - start) * channels;
    let last_high = (shape.input.width + pad - end).min(taps) * channels;
    let inside = first_low == 0 && last_high == run;

    for td in 0..from.depth.taps {
        let id = from.depth.j * shape.in_step.depth + td;
        if id >= shape.pad.depth && id < shape.input.depth + shape.pad.depth {
            for th in 0..from.height.taps {
                let ih = from.height.j * shape.in_step.height + th;
                if ih >= shape.pad.height && ih < shape.input.height + shape.pad.height {
                    let plane = from.n * shape.input.depth + id - shape.pad.depth;
                    let row = (plane * shape.input.height + ih - shape.pad.height) * shape.input.width * channels;
                    let tap = (from.depth.first_tap + td) * shape.taps.height + from.height.first_tap + th;
                    let weight = first_weight + (tap * shape.taps.width + from.first_tap) * channels * vectors;
                    if comptime!(plan.shared) {
                        let row = row + j0 * channels;
                        let (left, right) = (first_low == 0, last_high == run);
                        add_shared::<E, N, K>(sums, x, weights, channels, row, weight, left, right, input, plan);
                    } else if inside {
                        let base = row + (start - pad) * channels;
                        for e in 0..run {
                            #[unroll]
                            for i in 0..width {
                                let value = repeat::<E, N, K>(x[base + e + comptime!(i * stride)], plan.split);
                                #[unroll]
                                for v in 0..vectors {
                                    sums[i * vectors + v] =
                                        fma(value, weights[weight + e * vectors + v], sums[i * vectors + v]);
                                }
                            }
                        }
                    } else {
                        let base = row + start * channels;
                        for e in 0..run {
                            #[unroll]
                            for i in 0..width {
                                let mut valid = true.runtime();
                                if comptime!(i == 0) {
                                    valid = e >= first_low;
                                }
                                if comptime!(i + 1 == plan.width) {
                                    valid = valid && e < last_high;
                                }
                                let mut value = Vector::<f32, N>::new(0.0f32);
                                if valid {
                                    let at = base + e + comptime!(i * stride) - pad * channels;
                                    value = repeat::<E, N, K>(x[at], plan.split);
                                }
                                #[unroll]
                                for v in 0..vectors {
                                    sums[i * vectors + v] =
                                        fma(value, weights[weight + e * vectors + v], sums[i * vectors + v]);
                                }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Three taps along the width, one apart, padded by one: a value is loaded once for the three outputs that it belongs to.
/// `base` is where the middle tap of the first output reads; `left` and `right` tell whether its neighbours before the first
/// and behind the last output are inside the row.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn add_shared<E: Float, N: Size, K: Size>(
    sums: &mut Array<Vector<f32, N>>,
    x: &[Vector<E, K>],
    weights: &[Vector<f32, N>],
    channels: usize,
    base: usize,
    weight: usize,
    left: bool,
    right: bool,
    #[comptime] input: usize,
    #[comptime] plan: TapsPlan,
) {
    let width = comptime!(plan.width);
    let vectors = comptime!(plan.vectors);
    let stride = comptime!(plan.strides[input]);
    // What lies outside is read from elsewhere and replaced.
    let first = select(left, base - stride, base);
    let last = select(right, base + width * stride, base);
    for c in 0..channels {
        let mut taps = Array::<Vector<f32, N>>::new(comptime!(3 * vectors));
        #[unroll]
        for t in 0..3usize {
            #[unroll]
            for v in 0..vectors {
                taps[t * vectors + v] = weights[weight + (t * channels + c) * vectors + v];
            }
        }
        #[unroll]
        for p in 0..comptime!(width + 2) {
            let mut value = Vector::<f32, N>::new(0.0f32);
            if comptime!(p == 0) {
                value = select(left, repeat::<E, N, K>(x[first + c], plan.split), value);
            } else if comptime!(p == width + 1) {
                value = select(right, repeat::<E, N, K>(x[last + c], plan.split), value);
            } else {
                value = repeat::<E, N, K>(x[base + c + comptime!((p - 1) * stride)], plan.split);
            }
            #[unroll]
            for t in 0..3usize {
                if comptime!(p >= t && p - t < width) {
                    #[unroll]
                    for v in 0..vectors {
                        let i = comptime!((p - t) * vectors + v);
                        sums[i] = fma(value, taps[t * vectors + v], sums[i]);
                    }
                }
            }
        }
    }
}
