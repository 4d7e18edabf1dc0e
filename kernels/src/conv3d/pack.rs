//! Rearranges weights into the order in which a tile of the gather kernel reads them:
//! `[block of output channels][input][tap][channel in][channel out inside the block]`, f32 or the type that the
//! products are computed in; where a tile splits its sums (`direct/gather.rs`), groups of `split` channels in come innermost:
//! `[..][channel in / split][channel out][split]`.
//!
//! On the way it picks taps (for one parity of a strided data gradient), flips them and exchanges input
//! and output channels. Weights are small: this costs one pass over them.

use super::axes::{Axes, axes};
use crate::block::strip;
use crate::{Buffer, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;

/// Which weights an operation multiplies by, and how they relate to the stored ones, f32 `[kd, kh, kw, rows, columns]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Weights<'a> {
    pub stored: &'a Buffer,
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
    /// How many of the gathered channels the first of two inputs has; all of them without a second.
    pub first_input: usize,
}

/// The order in which a kernel reads weights, and their type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packing {
    /// Result channels in a block.
    pub block: usize,
    /// Partial sums of a result in the tile.
    pub split: usize,
    pub dtype: Dtype,
}

#[derive(CubeType, CubeLaunch)]
struct PackNumbers {
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
    taps: Axes,
    kernel: Axes,
    first: Axes,
    step: Axes,
}

/// One unit packs a strip of pieces of (block, tap, run of channels in): some divisions a piece, a load and a store an
/// element.
#[cube(launch)]
fn pack_kernel<E: Float>(
    weights: &[f32],
    packed: &mut [E],
    s: PackNumbers,
    #[comptime] split: usize,
    #[comptime] transposed: bool,
    #[define(E)] _dtype: ElemType,
) {
    let taps = s.taps.depth * s.taps.height * s.taps.width;
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
        let tw = tap % s.taps.width;
        let th = tap / s.taps.width % s.taps.height;
        let td = tap / s.taps.width / s.taps.height;
        let kd = (s.first.depth + td * s.step.depth) % s.kernel.depth;
        let kh = (s.first.height + th * s.step.height) % s.kernel.height;
        let kw = (s.first.width + tw * s.step.width) % s.kernel.width;
        let k = (kd * s.kernel.height + kh) * s.kernel.width + kw;
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

impl Weights<'_> {
    /// Channels that are gathered.
    pub fn gathered(&self) -> usize {
        if self.transposed { self.columns } else { self.rows }
    }

    /// The weights in the order of `packing`, in a new buffer.
    pub fn pack(&self, context: &Context, packing: Packing) -> Result<Buffer, KernelError> {
        let Packing { block, split, dtype } = packing;
        let in_channels = self.gathered();
        let taps: usize = self.taps.iter().product();
        let length = taps * in_channels * self.out_count;
        let packed = context.empty(length, dtype)?;
        if length == 0 {
            return Ok(packed);
        }
        let caps = context.caps();
        let (run, piece) = if caps.cores.is_some() { (in_channels, block) } else { (1, 1) };
        // Counted around the kernel, backwards too.
        let step = std::array::from_fn(|a| self.step[a].rem_euclid(self.kernel[a] as isize) as usize);
        let work = Work::units(caps.strips(length / run / piece, 1), caps.cube_units());
        context.launch("weight packing", work, |client, count, dim| {
            let numbers = PackNumbersLaunch::new(
                self.out_count / block,
                in_channels,
                self.first_input,
                self.columns,
                self.rows,
                block,
                run,
                piece,
                self.out_first,
                axes(self.taps),
                axes(self.kernel),
                axes(self.first),
                axes(step),
            );
            let (stored, into) = (self.stored.arg(), packed.arg());
            pack_kernel::launch(client, count, dim, stored, into, numbers, split, self.transposed, dtype.elem());
        })?;
        Ok(packed)
    }
}
