//! Rearranges weights into the order in which a tile of the gather kernel reads them:
//! `[block of output channels][input][tap][channel in][channel out inside the block]`, f32 or the type that the
//! products are computed in; where a tile splits its sums (`gather.rs`), groups of `split` channels in come innermost:
//! `[..][channel in / split][channel out][split]`.
//!
//! On the way it picks taps (for one parity of a strided data gradient), flips them and exchanges input
//! and output channels. Weights are small: this costs one pass over them.

use crate::block::strip;
use crate::{Buffer, Context, Dtype, KernelError};
use cubecl::prelude::*;

/// How the packed weights relate to the stored ones `[kd, kh, kw, rows, columns]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packing {
    /// Extent of the stored kernel.
    pub kernel: [usize; 3],
    /// Channels of the stored weights: `rows` before `columns`.
    pub rows: usize,
    pub columns: usize,
    /// Taps that are picked along each axis: `first + index * step`.
    pub taps: [usize; 3],
    pub first: [usize; 3],
    pub step: [isize; 3],
    /// The gathered channels are the stored columns, and the results' channels the stored rows.
    pub transposed: bool,
    /// First result channel that is packed, and how many are.
    pub out_first: usize,
    pub out_count: usize,
    /// Result channels in a block.
    pub block: usize,
    /// Partial sums of a result in the tile.
    pub split: usize,
    /// How many of the gathered channels the first of two inputs has; all of them without a second.
    pub first_input: usize,
    /// Type of the packed weights.
    pub dtype: Dtype,
}

#[derive(CubeType, CubeLaunch)]
struct Shape {
    blocks: usize,
    in_channels: usize,
    first_input: usize,
    columns: usize,
    rows: usize,
    block: usize,
    /// Channels of a block that are packed in one go: all on a CPU, one on a GPU, whose neighbouring units then write
    /// neighbouring memory.
    piece: usize,
    split: usize,
    out_first: usize,
    taps: usize,
    taps_height: usize,
    taps_width: usize,
    kernel_height: usize,
    kernel_width: usize,
    first_depth: usize,
    first_height: usize,
    first_width: usize,
    step_depth: usize,
    step_height: usize,
    step_width: usize,
}

/// One unit packs a strip of pieces of (block, tap, channel in) triples: some divisions a piece, a load and a store an
/// element.
#[cube(launch)]
fn pack_kernel<E: Float>(
    weights: &[f32],
    packed: &mut [E],
    s: Shape,
    #[comptime] flipped: bool,
    #[comptime] transposed: bool,
    #[define(E)] _dtype: ElemType,
) {
    let pieces = s.block / s.piece;
    let (low, high) = strip(s.blocks * s.taps * s.in_channels * pieces);
    for i in low..high {
        let first_lane = i % pieces * s.piece;
        let rest = i / pieces;
        let c = rest % s.in_channels;
        let rest = rest / s.in_channels;
        let tap = rest % s.taps;
        let block = rest / s.taps;
        let tw = tap % s.taps_width;
        let th = tap / s.taps_width % s.taps_height;
        let td = tap / s.taps_width / s.taps_height;
        let mut kd = s.first_depth;
        let mut kh = s.first_height;
        let mut kw = s.first_width;
        if comptime!(flipped) {
            kd -= td * s.step_depth;
            kh -= th * s.step_height;
            kw -= tw * s.step_width;
        } else {
            kd += td * s.step_depth;
            kh += th * s.step_height;
            kw += tw * s.step_width;
        }
        let k = (kd * s.kernel_height + kh) * s.kernel_width + kw;
        let second = c >= s.first_input;
        let before = select(second, s.taps * s.first_input, 0usize);
        let channels = select(second, s.in_channels - s.first_input, s.first_input);
        let channel = select(second, c - s.first_input, c);
        let position = block * s.taps * s.in_channels + before + tap * channels + channel;
        let group = position / s.split;
        let to = group * s.split * s.block + position % s.split;
        let o = block * s.block + s.out_first;
        if comptime!(transposed) {
            let from = (k * s.rows + o) * s.columns + c;
            for lane in first_lane..first_lane + s.piece {
                packed[to + lane * s.split] = E::cast_from(weights[from + lane * s.columns]);
            }
        } else {
            let from = (k * s.rows + c) * s.columns + o;
            for lane in first_lane..first_lane + s.piece {
                packed[to + lane * s.split] = E::cast_from(weights[from + lane]);
            }
        }
    }
}

impl Packing {
    /// Packs `weights` into a new buffer.
    pub fn run(&self, context: &Context, weights: &Buffer) -> Result<Buffer, KernelError> {
        let in_channels = if self.transposed { self.columns } else { self.rows };
        let taps: usize = self.taps.iter().product();
        let length = taps * in_channels * self.out_count;
        let packed = context.empty(length, self.dtype)?;
        if length == 0 {
            return Ok(packed);
        }
        let flipped = self.step.iter().any(|&step| step < 0);
        let caps = context.caps();
        let units = caps.cube_units();
        let piece = if caps.cores.is_some() { self.block } else { 1 };
        let shape = ShapeLaunch::new(
            self.out_count / self.block,
            in_channels,
            self.first_input,
            self.columns,
            self.rows,
            self.block,
            piece,
            self.split,
            self.out_first,
            taps,
            self.taps[1],
            self.taps[2],
            self.kernel[1],
            self.kernel[2],
            self.first[0],
            self.first[1],
            self.first[2],
            self.step[0].unsigned_abs(),
            self.step[1].unsigned_abs(),
            self.step[2].unsigned_abs(),
        );
        pack_kernel::launch(
            context.client(),
            context.grid("weight packing", caps.strips(length / piece, 1), units)?,
            CubeDim::new_1d(units),
            weights.arg(),
            packed.arg(),
            shape,
            flipped,
            self.transposed,
            self.dtype.elem(),
        );
        context.launched();
        Ok(packed)
    }
}
