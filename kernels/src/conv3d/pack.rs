//! Rearranges weights into the order in which a tile of the gather kernel reads them:
//! `[block of output channels][input][tap][channel in][channel out inside the block]`, f32 or the type that the
//! products are computed in; where a tile splits its sums (`gather.rs`), groups of `split` channels in come innermost:
//! `[..][channel in / split][channel out][split]`.
//!
//! On the way it picks taps (for one parity of a strided data gradient), flips them and exchanges input
//! and output channels. Weights are small: this costs one pass over them.

use crate::block::strip;
use crate::{Buffer, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// How the packed weights relate to the stored ones `[kd, kh, kw, rows, columns]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packing {
    /// Extent of the stored kernel.
    pub kernel: [usize; 3],
    /// Channels of the stored weights: `rows` before `columns`.
    pub rows: usize,
    pub columns: usize,
    /// Taps that are picked along each axis: `first + index * step`, counted around the kernel.
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
    /// Gathered channels, and channels of a block, that are packed in one go: all on a CPU, one on a GPU, whose
    /// neighbouring units then write neighbouring memory.
    run: usize,
    piece: usize,
    out_first: usize,
    taps_depth: usize,
    taps_height: usize,
    taps_width: usize,
    kernel_depth: usize,
    kernel_height: usize,
    kernel_width: usize,
    first_depth: usize,
    first_height: usize,
    first_width: usize,
    step_depth: usize,
    step_height: usize,
    step_width: usize,
}

/// One unit packs a strip of pieces of (block, tap, run of channels in): some divisions a piece, a load and a store an
/// element.
#[cube(launch)]
fn pack_kernel<E: Float>(
    weights: &[f32],
    packed: &mut [E],
    s: Shape,
    #[comptime] split: usize,
    #[comptime] transposed: bool,
    #[define(E)] _dtype: ElemType,
) {
    let taps = s.taps_depth * s.taps_height * s.taps_width;
    let pieces = s.block / s.piece;
    let runs = s.in_channels / s.run;
    let (low, high) = strip(s.blocks * taps * runs * pieces);
    for i in low..high {
        let first_lane = i % pieces * s.piece;
        let rest = i / pieces;
        let first_channel = rest % runs * s.run;
        let rest = rest / runs;
        let tap = rest % taps;
        let block = rest / taps;
        let tw = tap % s.taps_width;
        let th = tap / s.taps_width % s.taps_height;
        let td = tap / s.taps_width / s.taps_height;
        let kd = (s.first_depth + td * s.step_depth) % s.kernel_depth;
        let kh = (s.first_height + th * s.step_height) % s.kernel_height;
        let kw = (s.first_width + tw * s.step_width) % s.kernel_width;
        let k = (kd * s.kernel_height + kh) * s.kernel_width + kw;
        let o = block * s.block + s.out_first;
        for c in first_channel..first_channel + s.run {
            let second = c >= s.first_input;
            let before = select(second, taps * s.first_input, 0usize);
            let channels = select(second, s.in_channels - s.first_input, s.first_input);
            let channel = select(second, c - s.first_input, c);
            let position = block * taps * s.in_channels + before + tap * channels + channel;
            let to = position / split * (s.block * split) + position % split;
            if comptime!(transposed) {
                let from = (k * s.rows + o) * s.columns + c;
                for lane in first_lane..first_lane + s.piece {
                    packed[to + lane * split] = E::cast_from(weights[from + lane * s.columns]);
                }
            } else {
                let from = (k * s.rows + c) * s.columns + o;
                for lane in first_lane..first_lane + s.piece {
                    packed[to + lane * split] = E::cast_from(weights[from + lane]);
                }
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
        let caps = context.caps();
        let units = caps.cube_units();
        let (run, piece) = if caps.cores.is_some() { (in_channels, self.block) } else { (1, 1) };
        // Counted around the kernel, backwards too.
        let step = |a: usize| self.step[a].rem_euclid(self.kernel[a] as isize) as usize;
        let shape = ShapeLaunch::new(
            self.out_count / self.block,
            in_channels,
            self.first_input,
            self.columns,
            self.rows,
            self.block,
            run,
            piece,
            self.out_first,
            self.taps[0],
            self.taps[1],
            self.taps[2],
            self.kernel[0],
            self.kernel[1],
            self.kernel[2],
            self.first[0],
            self.first[1],
            self.first[2],
            step(0),
            step(1),
            step(2),
        );
        context.launch(
            "weight packing",
            Work::units(caps.strips(length / run / piece, 1), units),
            |client, count, dim| {
                pack_kernel::launch(
                    client,
                    count,
                    dim,
                    weights.arg(),
                    packed.arg(),
                    shape,
                    self.split,
                    self.transposed,
                    self.dtype.elem(),
                )
            },
        )?;
        Ok(packed)
    }
}
