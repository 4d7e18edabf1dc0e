//! The direct convolution: a register tile of a few outputs along the width times a few vectors of output
//! channels. One kernel serves six operations, since all of them *gather*:
//!
//! `y[j * out_step + out_offset, o] = bias[o] + sum over taps t, channels c of x[j * in_step + t - pad, c] * w[t, c, o]`
//!
//! | operation | gathers from | `in_step` | `out_step` |
//! |---|---|---|---|
//! | convolution, forward | input | stride | 1 |
//! | its data gradient, stride 1 | gradient | 1 | 1 |
//! | its data gradient, stride 2 | gradient, once per parity of the input position | 1 | 2 |
//! | transposed convolution, forward | input, once per position inside the stride | 1 | stride |
//! | its data gradient | gradient | stride | 1 |
//!
//! The weights are packed beforehand (`pack.rs`) into the order in which a tile reads them, which also
//! flips and transposes them. Positions outside of `x` count as zero; whole rows outside are skipped.
//!
//! Where a result has fewer channels than a register has lanes, a register holds several partial sums of each: `split`
//! neighbouring gathered values are loaded at once and repeated over the channels, lane `g * split + k` sums the products
//! of channel `g` with every `split`-th value from the `k`-th on, and the lanes of a channel are added at the end.
//!
//! Bytes: `x` is read once per block of output channels from cache, `y` is written once. Arithmetic bound:
//! with `width * vectors` independent sums a core's multiply-add units stay busy.

use crate::block::strip;
use crate::conv3d::{igemm, tiled};
use crate::instance_norm::Operand;
use crate::instance_norm::epilogue::{Epilogue, Take, add_moments, clear_parts};
use crate::{Buffer, Caps, Context, Dtype, KernelError};
use cubecl::prelude::*;

pub(super) const OPERATION: &str = "convolution";

/// Units that keep a GPU busy.
const GPU_UNITS: usize = 1 << 16;

/// What is compiled into one instance of the kernel. Taps, steps and paddings are run-time numbers: compiled in, they make
/// the loops no faster (LLVM unrolls short ones, which was measured at half the speed), and every mix would be compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Plan {
    /// Outputs along the width that one tile holds in registers.
    width: usize,
    /// Vectors of output channels that one tile holds in registers.
    vectors: usize,
    /// Partial sums of a channel in a vector.
    split: usize,
    /// Whether a second input continues the channels of the first.
    second_input: bool,
    bias: bool,
    /// Whether the moments of the outputs are taken.
    moments: bool,
    /// Whether a unit has one part of each sample's moments for all of its segments, on CPUs; else each segment is a part.
    chunked: bool,
}

/// Vector width and tile for `channels_out`, and for rows of `count` outputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tile {
    /// Channels in a vector.
    pub lanes: usize,
    /// Vectors of channels in a tile.
    pub vectors: usize,
    /// Outputs along the width in a tile.
    pub width: usize,
    /// Partial sums of each channel in a register of `lanes * split` lanes.
    pub split: usize,
}

impl Tile {
    /// Chooses the tile. Measured on CPUs: with 16 registers (AVX2) 6 x 2 vectors is the fastest, more sums than about 12
    /// spill; with 32 (AVX-512) it is 12 x 2, or what divides the row best below that, while single vectors gain nothing
    /// beyond 12. Fewer than 8 sums leave the multiply-add units waiting for each other. A GPU has registers for 8 x 4 vectors of 4,
    /// which need half the loads of 6 x 2: 2.7 times as fast on Mesa's software driver.
    ///
    /// `gathered` are the channels of each input: a split has to divide all of them.
    pub fn choose(caps: &Caps, channels_out: usize, count: usize, gathered: [usize; 2]) -> Self {
        let lanes = widest_vector(caps, channels_out);
        let sums = if caps.cores.is_some() { (caps.registers * 3 / 4).min(24) } else { 32 };
        let blocks = channels_out / lanes;
        let vectors = match blocks {
            b if b % 4 == 0 && caps.cores.is_none() => 4,
            b if b % 2 == 0 => 2,
            b if b % 3 == 0 => 3,
            _ => 1,
        };
        // Estimated cycles of one row: the outputs that its last two tiles share are computed twice.
        let cost = |width: usize| count.div_ceil(width) * (width * vectors).max(8);
        let widest = (sums / vectors).min(12).clamp(1, count.max(1));
        let width = (1..=widest).rev().min_by_key(|&w| cost(w)).unwrap_or(1);
        Self { lanes, vectors, width, split: split_for(caps, lanes, gathered) }
    }

    /// Channels in a tile.
    pub fn channels(&self) -> usize {
        self.lanes * self.vectors
    }
}

/// How outputs are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// On register tiles, in f32.
    Direct(Tile),
    /// On tensor cores, from 16-bit factors.
    TensorCores(igemm::Plan),
    /// On register tiles of a cube that shares its input, in f32.
    Tiled(tiled::Plan),
}

impl Method {
    /// Tensor cores where [`igemm::Plan::choose`] allows them for sums over the gathered channels. Arguments as in
    /// [`Tile::choose`].
    pub fn choose(caps: &Caps, dtype: Dtype, gathered: [usize; 2], channels_out: usize, count: usize) -> Self {
        let channels_in = gathered[0].max(gathered[1]);
        let (layout, voxels) = (igemm::VOXELS_BY_CHANNELS, usize::MAX);
        if let Some(plan) = igemm::Plan::choose(caps, dtype, layout, voxels, channels_in, channels_out) {
            return Self::TensorCores(plan);
        }
        match tiled::Plan::choose(caps, gathered, channels_out) {
            Some(plan) => Self::Tiled(plan),
            None => Self::Direct(Tile::choose(caps, channels_out, count, gathered)),
        }
    }

    /// Result channels of a block of packed weights, of `channels_out` in all, their partial sums, and the weights' type.
    pub fn packing(&self, dtype: Dtype, channels_out: usize) -> (usize, usize, Dtype) {
        match self {
            Self::Direct(tile) => (tile.channels(), tile.split, Dtype::F32),
            Self::TensorCores(_) => (channels_out, 1, dtype),
            Self::Tiled(_) => (channels_out, 1, Dtype::F32),
        }
    }
}

/// The widest vector that divides a number of channels and that the device loads at once.
pub(crate) fn widest_vector(caps: &Caps, channels: usize) -> usize {
    let mut lanes = caps.lanes.next_power_of_two();
    while !channels.is_multiple_of(lanes) {
        lanes /= 2;
    }
    lanes
}

/// How many channels of the other tensor a vector of `lanes` channels is filled up with, so that it is a whole register:
/// as many as divide all of `channels`. Only on CPUs; a GPU has no lanes to fill.
pub(crate) fn split_for(caps: &Caps, lanes: usize, channels: [usize; 2]) -> usize {
    let mut split = if caps.cores.is_some() { caps.lanes.next_power_of_two() / lanes } else { 1 };
    while channels.iter().any(|count| !count.is_multiple_of(split)) {
        split /= 2;
    }
    split
}

/// One launch of the kernel. Axes are depth, height, width.
pub(crate) struct Gather<'a> {
    pub batch: usize,
    /// `[batch, depth, height, width, channels]`; the channels of the second input continue the first's.
    pub input: Operand<'a>,
    pub channels_in: usize,
    pub second: Option<(Operand<'a>, usize)>,
    pub in_dims: [usize; 3],
    pub weights: &'a Buffer,
    pub bias: Option<&'a Buffer>,
    pub output: &'a Buffer,
    pub out_dims: [usize; 3],
    pub channels_out: usize,
    pub taps: [usize; 3],
    pub in_step: [usize; 3],
    pub pad: [usize; 3],
    /// Number of outputs that this launch computes along each axis.
    pub count: [usize; 3],
    pub out_step: [usize; 3],
    pub out_offset: [usize; 3],
    pub method: Method,
    /// Taken in [`Gather::parts`] parts.
    pub epilogue: Epilogue<'a>,
}

#[derive(CubeType, CubeLaunch)]
pub(super) struct Shape {
    pub(super) batch: usize,
    pub(super) channels: usize,
    pub(super) second_channels: usize,
    pub(super) channels_out: usize,
    pub(super) in_depth: usize,
    pub(super) in_height: usize,
    pub(super) in_width: usize,
    pub(super) out_depth: usize,
    pub(super) out_height: usize,
    pub(super) out_width: usize,
    pub(super) count_depth: usize,
    pub(super) count_height: usize,
    pub(super) count_width: usize,
    pub(super) out_step_depth: usize,
    pub(super) out_step_height: usize,
    pub(super) out_step_width: usize,
    pub(super) out_offset_depth: usize,
    pub(super) out_offset_height: usize,
    pub(super) out_offset_width: usize,
    pub(super) taps_depth: usize,
    pub(super) taps_height: usize,
    pub(super) taps_width: usize,
    pub(super) in_step_depth: usize,
    pub(super) in_step_height: usize,
    pub(super) in_step_width: usize,
    pub(super) pad_depth: usize,
    pub(super) pad_height: usize,
    pub(super) pad_width: usize,
    /// Tiles of one row that one unit computes in a piece.
    pub(super) tiles_in_segment: usize,
    /// Parts of the moments of each sample.
    pub(super) parts: usize,
}

/// One unit computes a strip of segments; a segment is a run of tiles along one row of outputs.
#[cube(launch)]
#[allow(clippy::collapsible_if, reason = "the outer condition is decided when the kernel is compiled")]
fn gather_kernel<E: Float, N: Size, K: Size, G: Size>(
    x: &[Vector<E, K>],
    second: &[Vector<E, K>],
    weights: &[Vector<f32, N>],
    bias: &[Vector<f32, G>],
    y: &mut [Vector<E, G>],
    moments: &mut [Vector<f32, G>],
    shape: Shape,
    #[comptime] plan: Plan,
    #[define(E)] _dtype: ElemType,
) {
    let width = comptime!(plan.width);
    let vectors = comptime!(plan.vectors);
    let lanes = G::value();
    let in_channels = shape.channels + shape.second_channels;
    let taps = shape.taps_depth * shape.taps_height * shape.taps_width;
    let blocks = shape.channels_out / (lanes * vectors);
    let tiles = shape.count_width.div_ceil(width);
    let segments = tiles.div_ceil(shape.tiles_in_segment);
    let items = shape.batch * blocks * shape.count_depth * shape.count_height * segments;

    let vectors_out = shape.channels_out / lanes;
    if comptime!(plan.moments && plan.chunked) {
        clear_parts(moments, ABSOLUTE_POS, shape.parts, shape.batch, 4 * vectors_out);
    }
    let (low, high) = strip(items);
    for item in low..high {
        let segment = item % segments;
        let row = item / segments;
        let jh = row % shape.count_height;
        let row = row / shape.count_height;
        let jd = row % shape.count_depth;
        let row = row / shape.count_depth;
        let n = row % shape.batch;
        let block = row / shape.batch;

        let od = jd * shape.out_step_depth + shape.out_offset_depth;
        let oh = jh * shape.out_step_height + shape.out_offset_height;
        let out_row = ((n * shape.out_depth + od) * shape.out_height + oh) * shape.out_width;
        let first_weight = block * taps * (in_channels / plan.split) * vectors;

        let first_tile = segment * shape.tiles_in_segment;
        let last_tile = (first_tile + shape.tiles_in_segment).min(tiles);

        // Sums over the segment: of differences from the part's mean before it, and of their squares.
        let mut shift = Array::<Vector<f32, G>>::new(vectors);
        let mut sum = Array::<Vector<f32, G>>::new(vectors);
        let mut square = Array::<Vector<f32, G>>::new(vectors);
        let mut part = block * vectors;
        let mut fresh = true.runtime();
        if comptime!(plan.moments) {
            if comptime!(plan.chunked) {
                part += (n * shape.parts + ABSOLUTE_POS) * 4 * vectors_out;
                fresh = moments[part + 3 * vectors_out].extract(0usize) == 0.0f32;
                #[unroll]
                for v in 0..vectors {
                    shift[v] = moments[part + v] + moments[part + vectors_out + v];
                }
            } else {
                part += (n * shape.parts + (jd * shape.count_height + jh) * segments + segment) * 4 * vectors_out;
            }
        }
        for tile in first_tile..last_tile {
            // The last tile of a row is moved back inside it, and computes some outputs a second time: no output of a
            // tile ever lies outside.
            let j0 = (tile * width).min(shape.count_width - width);
            let mut sums = Array::<Vector<f32, N>>::new(comptime!(width * vectors));
            // Not what the array begins with: CubeCL's constant propagation stumbles over the cast of such zeros to f16.
            #[unroll]
            for i in 0..comptime!(width * vectors) {
                sums[i] = Vector::new(0.0f32);
            }

            add_taps::<E, N, K>(&mut sums, x, weights, &shape, shape.channels, first_weight, n, jd, jh, j0, plan);
            if comptime!(plan.second_input) {
                let second_weight = first_weight + taps * (shape.channels / plan.split) * vectors;
                let channels = shape.second_channels;
                add_taps::<E, N, K>(&mut sums, second, weights, &shape, channels, second_weight, n, jd, jh, j0, plan);
            }

            // Outputs that the tile before has in common with the last one.
            let repeated = tile * width - j0;
            #[unroll]
            for i in 0..width {
                let ow = (j0 + i) * shape.out_step_width + shape.out_offset_width;
                let first = (out_row + ow) * (shape.channels_out / lanes) + block * vectors;
                #[unroll]
                for v in 0..vectors {
                    let mut value = add_split::<N, G>(sums[i * vectors + v], plan.split);
                    if comptime!(plan.bias) {
                        value += bias[block * vectors + v];
                    }
                    let stored = Vector::<E, G>::cast_from(value);
                    y[first + v] = stored;
                    if comptime!(plan.moments) {
                        let stored = Vector::<f32, G>::cast_from(stored);
                        if comptime!(i == 0) {
                            if fresh && tile == first_tile {
                                shift[v] = stored;
                            }
                        }
                        if i >= repeated {
                            let difference = stored - shift[v];
                            sum[v] += difference;
                            square[v] += difference * difference;
                        }
                    }
                }
            }
        }
        if comptime!(plan.moments) {
            let here = f32::cast_from((last_tile * width).min(shape.count_width) - first_tile * width);
            #[unroll]
            for v in 0..vectors {
                let to = part + v;
                if fresh {
                    moments[to] = shift[v];
                    moments[to + vectors_out] = Vector::zeroed();
                    moments[to + 2 * vectors_out] = Vector::zeroed();
                    moments[to + 3 * vectors_out] = Vector::zeroed();
                }
                let before = moments[to + 3 * vectors_out];
                add_moments(moments, to, vectors_out, shift[v], sum[v], square[v], before, here);
                moments[to + 3 * vectors_out] = before + Vector::new(here);
            }
        }
    }
}

/// `[g, k]` to `[g]`: the sum of each channel's `split` lanes.
#[cube]
fn add_split<N: Size, G: Size>(partial: Vector<f32, N>, #[comptime] split: usize) -> Vector<f32, G> {
    let mut sum = Vector::<f32, G>::new(0.0f32);
    #[unroll]
    for k in 0..split {
        let mut part = Vector::<f32, G>::empty();
        #[unroll]
        for g in 0..G::value() {
            part.insert(g, partial.extract(g * split + k));
        }
        sum += part;
    }
    sum
}

/// `[k]` to `[g, k]`: the values once for each channel.
#[cube]
pub(crate) fn repeat<E: Float, N: Size, K: Size>(values: Vector<E, K>, #[comptime] split: usize) -> Vector<f32, N> {
    if comptime!(split == 1) {
        Vector::new(f32::cast_from(values.extract(0usize)))
    } else {
        let values = Vector::<f32, K>::cast_from(values);
        let mut repeated = Vector::<f32, N>::empty();
        #[unroll]
        for lane in 0..N::value() {
            repeated.insert(lane, values.extract(comptime!(lane % split)));
        }
        repeated
    }
}

/// Adds the products of one input of `channels` channels, whose weights begin at `first_weight`, to the tile's sums.
///
/// Along the width, taps and channels are one run in memory, of the input as of the weights: output `i` reads from
/// `base + i * step * channels` on. Only the first and the last output of a tile can reach out of the row.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel; a struct of slices is no kernel argument")]
fn add_taps<E: Float, N: Size, K: Size>(
    sums: &mut Array<Vector<f32, N>>,
    x: &[Vector<E, K>],
    weights: &[Vector<f32, N>],
    shape: &Shape,
    channels: usize,
    first_weight: usize,
    n: usize,
    jd: usize,
    jh: usize,
    j0: usize,
    #[comptime] plan: Plan,
) {
    let width = comptime!(plan.width);
    let vectors = comptime!(plan.vectors);
    let taps = shape.taps_width;
    let step = shape.in_step_width;
    let pad = shape.pad_width;
    // From here on everything is counted in groups of `split` values.
    let channels = channels / plan.split;
    let run = taps * channels;

    // The part of the run that is inside the row, for the first and the last output. Positions are counted from the
    // first padded one, so that they stay unsigned.
    let start = j0 * step;
    let end = start + (width - 1) * step;
    let first_low = select(start >= pad, 0usize, pad - start) * channels;
    let last_high = (shape.in_width + pad - end).min(taps) * channels;
    let inside = first_low == 0 && last_high == run;

    for td in 0..shape.taps_depth {
        let id = jd * shape.in_step_depth + td;
        if id >= shape.pad_depth && id < shape.in_depth + shape.pad_depth {
            for th in 0..shape.taps_height {
                let ih = jh * shape.in_step_height + th;
                if ih >= shape.pad_height && ih < shape.in_height + shape.pad_height {
                    let plane = n * shape.in_depth + id - shape.pad_depth;
                    let row = (plane * shape.in_height + ih - shape.pad_height) * shape.in_width * channels;
                    let weight = first_weight + (td * shape.taps_height + th) * run * vectors;
                    if inside {
                        let base = row + (start - pad) * channels;
                        for e in 0..run {
                            #[unroll]
                            for i in 0..width {
                                let value = repeat::<E, N, K>(x[base + i * step * channels + e], plan.split);
                                #[unroll]
                                for v in 0..vectors {
                                    sums[i * vectors + v] =
                                        fma(value, weights[weight + e * vectors + v], sums[i * vectors + v]);
                                }
                            }
                        }
                    } else {
                        for e in 0..run {
                            #[unroll]
                            for i in 0..width {
                                let at = (start + i * step) * channels + e;
                                let mut valid = true.runtime();
                                if comptime!(i == 0) {
                                    valid = e >= first_low;
                                }
                                if comptime!(i + 1 == plan.width) {
                                    valid = valid && e < last_high;
                                }
                                // What lies outside is read from the row's begin and replaced.
                                let at = row + select(valid, at - pad * channels, 0usize);
                                let mut value = Vector::<f32, N>::new(0.0f32);
                                if valid {
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

impl Gather<'_> {
    /// Launches the kernel.
    pub fn launch(&self, context: &Context) -> Result<(), KernelError> {
        let tile = match self.method {
            Method::Direct(tile) => tile,
            Method::TensorCores(plan) => return igemm::gather::launch(self, plan, context),
            Method::Tiled(plan) => return tiled::launch(self, plan, context),
        };
        let rows = self.batch * (self.channels_out / tile.channels()) * self.count[0] * self.count[1];
        let tiles = self.count[2].div_ceil(tile.width);
        if rows * tiles == 0 {
            return Ok(());
        }
        let units = context.caps().cube_units();
        let tiles_in_segment = self.tiles_in_segment(context, tile, self.epilogue.take() == Take::Moments);
        let items = match context.caps().cores {
            Some(cores) => cores as usize,
            None => rows * tiles.div_ceil(tiles_in_segment),
        };
        let count = context.grid(OPERATION, items, units)?;
        let plan = Plan {
            width: tile.width,
            vectors: tile.vectors,
            split: tile.split,
            second_input: self.second.is_some(),
            bias: self.bias.is_some(),
            moments: self.epilogue.take() == Take::Moments,
            chunked: context.caps().cores.is_some(),
        };
        let nothing = context.empty(tile.lanes, Dtype::F32)?;
        let (second, _) = self.second.unwrap_or((self.input, 0));
        let [moments, ..] = self.epilogue.buffers(&nothing);
        gather_kernel::launch(
            context.client(),
            count,
            CubeDim::new_1d(units),
            tile.lanes * tile.split,
            tile.split,
            tile.lanes,
            self.input.buffer().arg(),
            second.buffer().arg(),
            self.weights.arg(),
            self.bias.unwrap_or(self.weights).arg(),
            self.output.arg(),
            moments.arg(),
            self.shape(tiles_in_segment),
            plan,
            self.output.dtype().elem(),
        );
        context.launched();
        Ok(())
    }

    /// Parts of the moments of each sample: one of every unit on a CPU, of every segment or cube on a GPU.
    pub fn parts(&self, context: &Context) -> usize {
        match (self.method, context.caps().cores) {
            (Method::TensorCores(plan), _) => plan.row_blocks(self.count.iter().product()),
            (Method::Tiled(plan), _) => plan.row_blocks(self.count.iter().product()),
            (Method::Direct(_), Some(cores)) => cores as usize,
            (Method::Direct(tile), None) => {
                let tiles = self.count[2].div_ceil(tile.width);
                self.count[0] * self.count[1] * tiles.div_ceil(self.tiles_in_segment(context, tile, true))
            }
        }
    }

    /// A CPU core walks whole rows. On a GPU each tile is a unit's; where moments are taken, a unit walks as many as leave
    /// enough units, so that there are fewer moments.
    fn tiles_in_segment(&self, context: &Context, tile: Tile, moments: bool) -> usize {
        let tiles = self.count[2].div_ceil(tile.width);
        let all = self.batch * (self.channels_out / tile.channels()) * self.count[0] * self.count[1] * tiles;
        match (context.caps().cores, moments) {
            (Some(_), _) => tiles,
            (None, false) => 1,
            (None, true) => (all / GPU_UNITS).clamp(1, tiles.max(1)),
        }
    }

    /// The kernel's numbers.
    pub(super) fn shape(&self, tiles_in_segment: usize) -> ShapeLaunch {
        ShapeLaunch::new(
            self.batch,
            self.channels_in,
            self.second.map_or(0, |(_, channels)| channels),
            self.channels_out,
            self.in_dims[0],
            self.in_dims[1],
            self.in_dims[2],
            self.out_dims[0],
            self.out_dims[1],
            self.out_dims[2],
            self.count[0],
            self.count[1],
            self.count[2],
            self.out_step[0],
            self.out_step[1],
            self.out_step[2],
            self.out_offset[0],
            self.out_offset[1],
            self.out_offset[2],
            self.taps[0],
            self.taps[1],
            self.taps[2],
            self.in_step[0],
            self.in_step[1],
            self.in_step[2],
            self.pad[0],
            self.pad[1],
            self.pad[2],
            tiles_in_segment,
            self.epilogue.parts(),
        )
    }
}
