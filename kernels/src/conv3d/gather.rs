//! The six operations as one abstraction. Five of them *gather*:
//!
//! `y[j * out_step + out_offset, o] = bias[o] + sum over taps t, channels c of x[j * in_step + t - pad, c] * w[t, c, o]`
//!
//! | operation | gathers from | `in_step` | `out_step` |
//! |---|---|---|---|
//! | convolution, forward | input | stride | 1 |
//! | its data gradient, stride 1 | gradient | 1 | 1 |
//! | its data gradient, stride 2 | gradient, for every parity of the input position | 1 | 2 |
//! | transposed convolution, forward | input, for every position inside the stride | 1 | stride |
//! | its data gradient | gradient | stride | 1 |
//!
//! Positions outside of `x` count as zero. The sixth, the gradient of the weights, of both convolutions, sums over outputs
//! instead:
//!
//! `dw[t, r, c] = sum over outputs j of strided[j * step + t - pad, r] * dense[j, c]`
//!
//! For a convolution `strided` is the input and `dense` the gradient of the output; for a transposed convolution it is the
//! other way round.

use super::axes::{Axes, axes};
use super::pack::Weights;
use super::problem::Problem;
use crate::Buffer;
use crate::instance_norm::epilogue::{Epilogue, Take};
use cubecl::prelude::*;

pub(super) const GATHER: &str = "convolution";
pub(super) const WEIGHT_GRADIENT: &str = "weight gradient";

/// One launch of an operation that gathers. Axes are depth, height, width.
#[derive(Clone, Copy)]
pub(crate) struct Gather<'a> {
    pub batch: usize,
    /// `[batch, depth, height, width, channels]`; the channels of the second input continue the first's.
    pub input: &'a Buffer,
    pub channels_in: usize,
    pub second: Option<(&'a Buffer, usize)>,
    pub in_dims: [usize; 3],
    pub weights: Weights<'a>,
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
    /// Set where one launch computes the outputs at all positions inside `out_step`, on the direct route only; `count` are
    /// all outputs then. Along each axis, this many of the packed taps belong to even outputs, the rest to odd ones.
    pub spread: Option<[usize; 3]>,
    /// What is taken of the outputs on their way to memory.
    pub epilogue: Epilogue<'a>,
}

impl<'a> Gather<'a> {
    /// The output of a convolution.
    pub fn forward(
        problem: &Problem,
        input: &'a Buffer,
        second: Option<&'a Buffer>,
        weights: &'a Buffer,
        bias: Option<&'a Buffer>,
        output: &'a Buffer,
    ) -> Self {
        Self {
            batch: problem.batch(),
            input,
            channels_in: problem.channels_in(),
            second: second.map(|second| (second, problem.second_channels())),
            in_dims: problem.in_dims(),
            weights: Weights {
                stored: weights,
                kernel: problem.kernel(),
                rows: problem.all_channels_in(),
                columns: problem.channels_out(),
                taps: problem.kernel(),
                first: [0; 3],
                step: [1; 3],
                transposed: false,
                out_first: 0,
                out_count: problem.channels_out(),
                first_input: problem.channels_in(),
            },
            bias,
            output,
            out_dims: problem.out_dims(),
            channels_out: problem.channels_out(),
            taps: problem.kernel(),
            in_step: problem.stride(),
            pad: problem.pad(),
            count: problem.out_dims(),
            out_step: [1; 3],
            out_offset: [0; 3],
            spread: None,
            epilogue: Epilogue::Nothing,
        }
    }

    /// The gradient of `channels` channels of a convolution's inputs from `first_channel` on, at all positions: along an axis
    /// of stride 2 even inputs `i` meet output `i / 2` by the middle tap, odd ones outputs `i / 2` and `i / 2 + 1` by the last
    /// and the first.
    pub fn data_gradient(
        problem: &Problem,
        weights: &'a Buffer,
        output_gradient: &'a Buffer,
        (first_channel, channels): (usize, usize),
        gradient: &'a Buffer,
    ) -> Self {
        let (kernel, stride, middle) = (problem.kernel(), problem.stride(), problem.pad());
        let strided = |a: usize| stride[a] == 2;
        Self {
            batch: problem.batch(),
            input: output_gradient,
            channels_in: problem.channels_out(),
            second: None,
            in_dims: problem.out_dims(),
            weights: Weights {
                stored: weights,
                kernel,
                rows: problem.all_channels_in(),
                columns: problem.channels_out(),
                taps: kernel,
                // Without stride from the last tap to the first, which is from the first output to the last.
                first: std::array::from_fn(|a| if strided(a) { middle[a] } else { kernel[a] - 1 }),
                step: std::array::from_fn(|a| if strided(a) { 1 } else { -1 }),
                transposed: true,
                out_first: first_channel,
                out_count: channels,
                first_input: problem.channels_out(),
            },
            bias: None,
            output: gradient,
            out_dims: problem.in_dims(),
            channels_out: channels,
            taps: kernel,
            in_step: [1; 3],
            pad: std::array::from_fn(|a| if strided(a) { 0 } else { middle[a] }),
            count: problem.in_dims(),
            out_step: stride,
            out_offset: [0; 3],
            spread: (stride != [1; 3]).then(|| std::array::from_fn(|a| if strided(a) { 1 } else { kernel[a] })),
            epilogue: Epilogue::Nothing,
        }
    }

    /// Of a data gradient at all positions, those of one `parity` inside the stride, with the taps that they meet.
    pub fn of_parity(self, problem: &Problem, parity: [usize; 3]) -> Self {
        // Along an axis, input i meets output (i + pad - k) / stride for the taps k that make it whole. Taps are
        // visited from the last to the first, which is from the first output to the last.
        let axis = |a: usize| -> (Vec<usize>, usize) {
            let (k, s, pad) = (problem.kernel()[a], problem.stride()[a], problem.pad()[a]);
            let taps: Vec<usize> =
                (0..k).rev().filter(|tap| (parity[a] + pad + s * k - tap).is_multiple_of(s)).collect();
            // The first output that is met, counted from i / stride: negative by `pad` of the gather.
            let lead =
                taps.first().map_or(0, |&tap| if parity[a] + pad >= tap { 0 } else { (tap - parity[a] - pad) / s });
            (taps, lead)
        };
        let axes: [(Vec<usize>, usize); 3] = std::array::from_fn(axis);
        let taps: [usize; 3] = std::array::from_fn(|a| axes[a].0.len());
        let (in_dims, stride) = (problem.in_dims(), problem.stride());
        Self {
            weights: Weights {
                taps,
                first: std::array::from_fn(|a| axes[a].0.first().copied().unwrap_or(0)),
                step: std::array::from_fn(|a| match axes[a].0[..] {
                    [first, second, ..] => second as isize - first as isize,
                    _ => -1,
                }),
                ..self.weights
            },
            taps,
            pad: std::array::from_fn(|a| axes[a].1),
            count: std::array::from_fn(|a| (in_dims[a] + stride[a] - 1 - parity[a]) / stride[a]),
            out_offset: parity,
            spread: None,
            ..self
        }
    }

    /// The gathered channels of both inputs.
    pub fn gathered(&self) -> [usize; 2] {
        [self.channels_in, self.second.map_or(0, |(_, channels)| channels)]
    }

    /// Positions inside the step along the width that one launch computes.
    pub fn positions(&self) -> usize {
        if self.spread.is_some() { self.out_step[2] } else { 1 }
    }

    /// Outputs along the width that one launch computes at each of its positions inside the step, at least.
    pub fn row(&self) -> usize {
        (self.count[2] / self.positions()).max(1)
    }

    /// Outputs of a sample that this launch computes.
    pub fn outputs(&self) -> usize {
        self.count.iter().product()
    }

    /// Floating-point operations of the definition, counting a multiply-add as two and padding as work.
    pub fn flops(&self) -> u64 {
        // Taps that the outputs along an axis meet, all together.
        let met = |a: usize| match self.spread {
            Some(even) if self.out_step[a] == 2 => {
                self.count[a].div_ceil(2) * even[a] + self.count[a] / 2 * (self.taps[a] - even[a])
            }
            // Every position inside the step meets taps of its own.
            Some(_) => self.count[a] * self.taps[a] / self.out_step[a],
            None => self.count[a] * self.taps[a],
        };
        let channels: usize = self.gathered().iter().sum();
        2 * (self.batch * channels * self.channels_out) as u64 * (0..3).map(|a| met(a) as u64).product::<u64>()
    }

    /// The second input, or what fills its place in a kernel's arguments.
    pub fn second_or_input(&self) -> &'a Buffer {
        self.second.map_or(self.input, |(second, _)| second)
    }

    /// The kernel's numbers.
    pub(super) fn numbers(&self, walk: Walk) -> GatherNumbersLaunch {
        let [first, second] = self.gathered();
        GatherNumbersLaunch::new(
            self.batch,
            first,
            second,
            self.channels_out,
            axes(self.in_dims),
            axes(self.out_dims),
            axes(self.count),
            axes(self.out_step),
            axes(self.out_offset),
            axes(self.taps),
            axes(self.in_step),
            axes(self.pad),
            axes(self.spread.unwrap_or(self.taps)),
            walk.chunk,
            walk.tiles_in_segment,
            walk.parts,
            self.epilogue.slope(),
        )
    }
}

/// All positions inside one step of the stride.
pub(crate) fn positions_inside(stride: [usize; 3]) -> impl Iterator<Item = [usize; 3]> {
    (0..stride[0]).flat_map(move |d| (0..stride[1]).flat_map(move |h| (0..stride[2]).map(move |w| [d, h, w])))
}

/// How a kernel passes over the outputs.
#[derive(Clone, Copy)]
pub(super) struct Walk {
    /// Rows of outputs that are computed for all channels before the next: their inputs stay in a core's cache.
    pub chunk: usize,
    /// Tiles of one row that one unit computes in a piece.
    pub tiles_in_segment: usize,
    /// Parts of what is taken of each sample's outputs.
    pub parts: usize,
}

impl Walk {
    /// Of cubes that compute a block each, `blocks_of_sample` of a sample.
    pub fn by_block(blocks_of_sample: usize) -> Self {
        Self { chunk: 1, tiles_in_segment: 1, parts: blocks_of_sample }
    }
}

/// What is compiled into a GPU's kernel that gathers, besides its plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Form {
    /// Whether a second input continues the channels of the first.
    pub second_input: bool,
    pub bias: bool,
    /// What is taken of the outputs on their way to memory.
    pub take: Take,
}

impl Form {
    pub fn of(gather: &Gather) -> Self {
        Self { second_input: gather.second.is_some(), bias: gather.bias.is_some(), take: gather.epilogue.take() }
    }

    /// Whether no block may reach from one sample into the next, because what is taken belongs to one.
    pub fn by_sample(&self) -> bool {
        self.take != Take::Nothing
    }
}

/// One gradient of weights. Axes are depth, height, width.
#[derive(Clone, Copy)]
pub(crate) struct WeightGradient<'a> {
    pub batch: usize,
    /// `[batch, in_dims, rows]`.
    pub strided: &'a Buffer,
    pub rows: usize,
    /// More rows, on Winograd's route only, which computes those of both inputs at once.
    pub second: Option<(&'a Buffer, usize)>,
    pub in_dims: [usize; 3],
    /// `[batch, out_dims, columns]`.
    pub dense: &'a Buffer,
    pub columns: usize,
    pub out_dims: [usize; 3],
    pub taps: [usize; 3],
    pub step: [usize; 3],
    pub pad: [usize; 3],
    /// f32 `[taps, ...]` with this distance between taps, row channels and column channels, from `first` on.
    pub gradient: &'a Buffer,
    pub first: usize,
    pub tap_stride: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a> WeightGradient<'a> {
    /// Of a convolution, for both inputs.
    pub fn of(
        problem: &Problem,
        input: &'a Buffer,
        second: Option<&'a Buffer>,
        output_gradient: &'a Buffer,
        gradient: &'a Buffer,
    ) -> Self {
        Self {
            batch: problem.batch(),
            strided: input,
            rows: problem.channels_in(),
            second: second.map(|second| (second, problem.second_channels())),
            in_dims: problem.in_dims(),
            dense: output_gradient,
            columns: problem.channels_out(),
            out_dims: problem.out_dims(),
            taps: problem.kernel(),
            step: problem.stride(),
            pad: problem.pad(),
            gradient,
            first: 0,
            tap_stride: problem.all_channels_in() * problem.channels_out(),
            row_stride: problem.channels_out(),
            column_stride: 1,
        }
    }

    /// Floating-point operations of the definition, counting a multiply-add as two and padding as work.
    pub fn flops(&self) -> u64 {
        let taps = self.batch * self.out_dims.iter().chain(&self.taps).product::<usize>();
        let rows = self.rows + self.second.map_or(0, |(_, rows)| rows);
        2 * taps as u64 * (rows * self.columns) as u64
    }

    /// The gradients for each of the inputs.
    pub fn by_input(self) -> impl Iterator<Item = Self> {
        let second = self.second.map(|(strided, rows)| Self {
            strided,
            rows,
            second: None,
            first: self.first + self.rows * self.row_stride,
            ..self
        });
        std::iter::once(Self { second: None, ..self }).chain(second)
    }
}

/// [`Gather`] inside of kernels.
#[derive(CubeType, CubeLaunch)]
pub(super) struct GatherNumbers {
    pub batch: usize,
    pub channels: usize,
    pub second_channels: usize,
    pub channels_out: usize,
    pub input: Axes,
    pub output: Axes,
    pub count: Axes,
    pub out_step: Axes,
    pub out_offset: Axes,
    pub taps: Axes,
    pub in_step: Axes,
    pub pad: Axes,
    pub even: Axes,
    pub chunk: usize,
    pub tiles_in_segment: usize,
    pub parts: usize,
    /// Of the leaky ReLU behind the norm whose sums are taken.
    pub slope: f32,
}
