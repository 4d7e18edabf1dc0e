//! The passes of a convolution together with what a network does around it: inputs that are normalised and activated, or taken
//! back through norm and activation, while they are loaded, and what the next norm has to know, taken from the outputs on their
//! way to memory. Every one of them equals the operations one by one, but for rounding.

use super::choices::chosen;
use super::gather::{Gather, Method};
use super::pack::Packing;
use super::weight_gradient::WeightGradient;
use super::winograd::convolution::Convolution;
use super::winograd::weight_gradient::WeightGradient as WinogradWeightGradient;
use super::{Algorithm, OPERATION, Pass, Problem, igemm};
use crate::instance_norm::epilogue::{Epilogue, Take};
use crate::instance_norm::prologue::Load;
use crate::instance_norm::{Coefficients, GradientParts, Moments, Operand};
use crate::{Buffer, Context, Dtype, KernelError};

/// Whether the kernels of a pass over tensors of type `dtype` can normalise what they load. Those of Winograd's algorithm can,
/// which load each value a few times for many products, and those that put blocks of their input into shared memory, which
/// load it once for every tap and block of channels. On tensor cores each unit has to keep to its channels, as it does
/// unless a block has 96 of them. The direct kernels cannot: they load each value for every tap and each few channels, and
/// would normalise it as often.
pub fn loads(context: &Context, problem: &Problem, pass: Pass, dtype: Dtype) -> bool {
    let (context, algorithm) = &chosen(context, problem, pass, dtype);
    if *algorithm == Algorithm::Winograd {
        return true;
    }
    let (caps, inputs, output) = (context.caps(), [problem.channels_in, problem.second_channels], problem.channels_out);
    let gathers = |gathered: [usize; 2], channels| match Method::choose(caps, dtype, gathered, channels, 1) {
        Method::TensorCores(plan) => plan.keeps_channels(plan.depth, igemm::load_lanes(caps, &gathered)),
        Method::Tiled(_) => true,
        Method::Direct(_) => false,
    };
    let mut each_input = inputs.into_iter().filter(|&channels| channels > 0);
    match pass {
        Pass::Forward => gathers(inputs, output),
        Pass::DataGradient => each_input.all(|channels| gathers([output, 0], channels)),
        Pass::WeightGradient => each_input.all(|channels| igemm::weight_gradient::loads(caps, dtype, channels, output)),
    }
}

/// What is compiled into a GPU's kernel that gathers, besides its plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Form {
    /// Whether a second input continues the channels of the first.
    pub second_input: bool,
    pub bias: bool,
    /// How both inputs are loaded.
    pub load: Load,
    pub second_load: Load,
    /// What is taken of the outputs on their way to memory.
    pub take: Take,
}

impl Form {
    pub fn of(gather: &Gather) -> Self {
        Self {
            second_input: gather.second.is_some(),
            bias: gather.bias.is_some(),
            load: gather.input.load(),
            second_load: gather.second.map_or(Load::Stored, |(second, _)| second.load()),
            take: gather.epilogue.take(),
        }
    }

    /// Whether no block may reach from one sample into the next, because each sample is normalised in its own way.
    pub fn by_sample(&self) -> bool {
        self.load != Load::Stored || self.second_load != Load::Stored || self.take != Take::Nothing
    }
}

/// The parts of each sample in which the data gradient's kernels can take [`GradientParts`] of the first input's gradient:
/// where one launch computes all of it, and units can merge what they know of a channel. `None` where they cannot.
fn gradient_parts(context: &Context, problem: &Problem, dtype: Dtype) -> Option<usize> {
    let (context, algorithm) = &chosen(context, problem, Pass::DataGradient, dtype);
    if *algorithm == Algorithm::Winograd {
        return Some(context.caps().cube_units() as usize);
    }
    let voxels = problem.in_dims.iter().product();
    match Method::choose(context.caps(), dtype, [problem.channels_out, 0], problem.channels_in, problem.in_dims[2]) {
        _ if problem.stride != [1; 3] => None,
        Method::TensorCores(plan) if plan.merges_columns() => Some(plan.row_blocks(voxels)),
        Method::Tiled(plan) => Some(plan.row_blocks(voxels)),
        _ => None,
    }
}

impl Problem {
    fn check_operands(&self, x: &Operand, second: Option<&Operand>) -> Result<(), KernelError> {
        self.check_inputs(x.buffer(), second.map(Operand::buffer))?;
        x.check(OPERATION, self.batch, self.channels_in)?;
        second.map_or(Ok(()), |second| second.check(OPERATION, self.batch, self.second_channels))
    }
}

/// Refuses what `loads` denies.
fn check_loads(
    context: &Context,
    problem: &Problem,
    pass: Pass,
    dtype: Dtype,
    operands: [Option<&Operand>; 3],
) -> Result<(), KernelError> {
    let stored = operands.into_iter().flatten().all(|operand| matches!(operand, Operand::Stored(_)));
    if stored || loads(context, problem, pass, dtype) {
        return Ok(());
    }
    let feature = "kernel that normalises the operands of this convolution while it loads them";
    Err(KernelError::Unsupported { operation: OPERATION, feature })
}

/// As [`forward`](super::forward), of operands. With `take_moments`, also the moments of every sample and channel of `y`, as an
/// instance norm needs them, without a pass over `y`; `None` where the kernel cannot take them: on tensor cores whose tile does
/// not share out its columns evenly.
///
/// # Errors
/// As [`forward`](super::forward); [`KernelError::Unsupported`] if an operand has to be normalised and [`loads`] says no.
#[allow(clippy::too_many_arguments, reason = "the operands of a convolution")]
pub fn forward(
    context: &Context,
    problem: &Problem,
    x: Operand,
    second: Option<Operand>,
    w: &Buffer,
    bias: Option<&Buffer>,
    y: &Buffer,
    take_moments: bool,
) -> Result<Option<Moments>, KernelError> {
    let dtype = x.buffer().dtype();
    problem.check_operands(&x, second.as_ref())?;
    w.check(OPERATION, "weights", problem.weight_len(), Dtype::F32)?;
    if let Some(bias) = bias {
        bias.check(OPERATION, "bias", problem.channels_out, Dtype::F32)?;
    }
    y.check(OPERATION, "output", problem.output_len(), dtype)?;
    check_loads(context, problem, Pass::Forward, dtype, [Some(&x), second.as_ref(), None])?;
    context.note(|| problem.clone());
    let (context, algorithm) = &chosen(context, problem, Pass::Forward, dtype);
    let out_dims = problem.out_dims();
    let method = problem.method(dtype, context.caps());
    let (block, split, packed_type) = method.packing(dtype, problem.channels_out);
    let packing = Packing {
        kernel: problem.kernel,
        rows: problem.channels_in + problem.second_channels,
        columns: problem.channels_out,
        taps: problem.kernel,
        first: [0; 3],
        step: [1; 3],
        transposed: false,
        out_first: 0,
        out_count: problem.channels_out,
        block,
        split,
        first_input: problem.channels_in,
        dtype: packed_type,
    };
    let second = second.map(|second| (second, problem.second_channels));
    let moments = |parts: usize| match take_moments {
        true => Moments::new(context, problem.batch, parts, problem.channels_out).map(Some),
        false => Ok(None),
    };
    if *algorithm == Algorithm::Winograd {
        let moments = moments(context.caps().cube_units() as usize)?;
        Convolution {
            batch: problem.batch,
            dims: problem.in_dims,
            input: x,
            channels_in: problem.channels_in,
            second,
            deep: problem.kernel[0] == 3,
            bias,
            output: y,
            channels_out: problem.channels_out,
            epilogue: moments.as_ref().map_or(Epilogue::Nothing, Epilogue::Moments),
        }
        .launch(context, w, packing)?;
        return Ok(moments);
    }
    let packed = packing.run(context, w)?;
    let mut gather = Gather {
        batch: problem.batch,
        input: x,
        channels_in: problem.channels_in,
        second,
        in_dims: problem.in_dims,
        weights: &packed,
        bias,
        output: y,
        out_dims,
        channels_out: problem.channels_out,
        taps: problem.kernel,
        in_step: problem.stride,
        pad: problem.pad(),
        count: out_dims,
        out_step: [1; 3],
        out_offset: [0; 3],
        spread: None,
        method,
        epilogue: Epilogue::Nothing,
    };
    let moments = match method {
        Method::TensorCores(plan) if !plan.merges_columns() => None,
        _ => moments(gather.parts(context))?,
    };
    gather.epilogue = moments.as_ref().map_or(Epilogue::Nothing, Epilogue::Moments);
    gather.launch(context)?;
    Ok(moments)
}

/// The instance norm with activation that has put out what a convolution reads.
#[derive(Clone, Copy, Debug)]
pub struct NormBefore<'a> {
    /// What the norm reads, of the shape of the convolution's input.
    pub raw: &'a Buffer,
    /// Made by [`coefficients`](crate::instance_norm::coefficients).
    pub by: &'a Coefficients,
}

/// As [`backward_data`](super::backward_data), of an operand. With the norm `before` the first input, also the sums that the
/// way back through it begins with, without a pass over `dx`; `None` where the kernel cannot take them.
///
/// # Errors
/// As [`forward`].
pub fn backward_data(
    context: &Context,
    problem: &Problem,
    w: &Buffer,
    dy: Operand,
    dx: &Buffer,
    second_dx: Option<&Buffer>,
    before: Option<NormBefore>,
) -> Result<Option<GradientParts>, KernelError> {
    problem.check_inputs(dx, second_dx)?;
    w.check(OPERATION, "weights", problem.weight_len(), Dtype::F32)?;
    let dtype = dx.dtype();
    dy.buffer().check(OPERATION, "gradient of the output", problem.output_len(), dtype)?;
    dy.check(OPERATION, problem.batch, problem.channels_out)?;
    check_loads(context, problem, Pass::DataGradient, dtype, [Some(&dy), None, None])?;
    let before = before.and_then(|before| Some((before, gradient_parts(context, problem, dtype)?)));
    let parts = match before {
        Some((NormBefore { raw, by }, parts)) => {
            Operand::Normalised { raw, by }.check(OPERATION, problem.batch, problem.channels_in)?;
            raw.check(OPERATION, "input of the norm before", problem.input_len(), dtype)?;
            Some(GradientParts::new(context, problem.batch, parts, problem.channels_in)?)
        }
        None => None,
    };
    let outputs =
        [Some((dx, 0, problem.channels_in)), second_dx.map(|d| (d, problem.channels_in, problem.second_channels))];
    let (context, algorithm) = &chosen(context, problem, Pass::DataGradient, dtype);
    for (dx, first_channel, channels) in outputs.into_iter().flatten() {
        let epilogue = match (&parts, before) {
            (Some(parts), Some((NormBefore { raw, by }, _))) if first_channel == 0 => {
                Epilogue::GradientSums { parts, raw, by }
            }
            _ => Epilogue::Nothing,
        };
        if *algorithm == Algorithm::Winograd {
            let packing = Packing {
                kernel: problem.kernel,
                rows: problem.channels_in + problem.second_channels,
                columns: problem.channels_out,
                taps: problem.kernel,
                first: problem.kernel.map(|k| k - 1),
                step: [-1; 3],
                transposed: true,
                out_first: first_channel,
                out_count: channels,
                block: channels,
                split: 1,
                first_input: problem.channels_out,
                dtype: Dtype::F32,
            };
            Convolution {
                batch: problem.batch,
                dims: problem.in_dims,
                input: dy,
                channels_in: problem.channels_out,
                second: None,
                deep: problem.kernel[0] == 3,
                bias: None,
                output: dx,
                channels_out: channels,
                epilogue,
            }
            .launch(context, w, packing)?;
            continue;
        }
        let fewest = (problem.in_dims[2] / problem.stride[2]).max(1);
        let method = Method::choose(context.caps(), dtype, [problem.channels_out, 0], channels, fewest);
        if let Method::Direct(_) = method {
            direct_data_gradient(context, problem, w, dy, dx, first_channel, channels, method)?;
            continue;
        }
        for parity in parities(problem.stride) {
            data_gradient_of_parity(context, problem, w, dy, dx, first_channel, channels, parity, epilogue)?;
        }
    }
    Ok(parts)
}

/// The data gradient on register tiles, of all parities in one launch: along an axis of stride 2 even inputs `i` meet
/// output `i / 2` by the middle tap, odd ones outputs `i / 2` and `i / 2 + 1` by the last and the first.
#[allow(clippy::too_many_arguments, reason = "the private body of one loop")]
fn direct_data_gradient(
    context: &Context,
    problem: &Problem,
    w: &Buffer,
    dy: Operand,
    dx: &Buffer,
    first_channel: usize,
    channels: usize,
    method: Method,
) -> Result<(), KernelError> {
    let strided = |a: usize| problem.stride[a] == 2;
    let middle = problem.pad();
    let (block, split, dtype) = method.packing(dx.dtype(), channels);
    let packed = Packing {
        kernel: problem.kernel,
        rows: problem.channels_in + problem.second_channels,
        columns: problem.channels_out,
        taps: problem.kernel,
        // Without stride from the last tap to the first, which is from the first output to the last.
        first: std::array::from_fn(|a| if strided(a) { middle[a] } else { problem.kernel[a] - 1 }),
        step: std::array::from_fn(|a| if strided(a) { 1 } else { -1 }),
        transposed: true,
        out_first: first_channel,
        out_count: channels,
        block,
        split,
        first_input: problem.channels_out,
        dtype,
    }
    .run(context, w)?;
    Gather {
        batch: problem.batch,
        input: dy,
        channels_in: problem.channels_out,
        second: None,
        in_dims: problem.out_dims(),
        weights: &packed,
        bias: None,
        output: dx,
        out_dims: problem.in_dims,
        channels_out: channels,
        taps: problem.kernel,
        in_step: [1; 3],
        pad: std::array::from_fn(|a| if strided(a) { 0 } else { middle[a] }),
        count: problem.in_dims,
        out_step: problem.stride,
        out_offset: [0; 3],
        spread: (problem.stride != [1; 3])
            .then(|| std::array::from_fn(|a| if strided(a) { 1 } else { problem.kernel[a] })),
        method,
        epilogue: Epilogue::Nothing,
    }
    .launch(context)
}

/// All positions inside one step of the stride.
pub(crate) fn parities(stride: [usize; 3]) -> impl Iterator<Item = [usize; 3]> {
    (0..stride[0]).flat_map(move |d| (0..stride[1]).flat_map(move |h| (0..stride[2]).map(move |w| [d, h, w])))
}

#[allow(clippy::too_many_arguments, reason = "the private body of one loop")]
fn data_gradient_of_parity(
    context: &Context,
    problem: &Problem,
    w: &Buffer,
    dy: Operand,
    dx: &Buffer,
    first_channel: usize,
    channels: usize,
    parity: [usize; 3],
    epilogue: Epilogue,
) -> Result<(), KernelError> {
    // Along an axis, input i meets output (i + pad - k) / stride for the taps k that make it whole. Taps are
    // visited from the last to the first, which is from the first output to the last.
    let axis = |a: usize| -> (Vec<usize>, usize) {
        let (k, s, pad) = (problem.kernel[a], problem.stride[a], problem.pad()[a]);
        let taps: Vec<usize> = (0..k).rev().filter(|tap| (parity[a] + pad + s * k - tap).is_multiple_of(s)).collect();
        // The first output that is met, counted from i / stride: negative by `pad` of the gather.
        let lead = taps.first().map_or(0, |&tap| if parity[a] + pad >= tap { 0 } else { (tap - parity[a] - pad) / s });
        (taps, lead)
    };
    let axes: [(Vec<usize>, usize); 3] = std::array::from_fn(axis);
    let count: [usize; 3] =
        std::array::from_fn(|a| (problem.in_dims[a] + problem.stride[a] - 1 - parity[a]) / problem.stride[a]);
    let taps: [usize; 3] = std::array::from_fn(|a| axes[a].0.len());
    let method = Method::choose(context.caps(), dx.dtype(), [problem.channels_out, 0], channels, count[2]);
    let (block, split, dtype) = method.packing(dx.dtype(), channels);
    let packed = Packing {
        kernel: problem.kernel,
        rows: problem.channels_in + problem.second_channels,
        columns: problem.channels_out,
        taps,
        first: std::array::from_fn(|a| axes[a].0.first().copied().unwrap_or(0)),
        step: std::array::from_fn(
            |a| if axes[a].0.len() > 1 { axes[a].0[1] as isize - axes[a].0[0] as isize } else { -1 },
        ),
        transposed: true,
        out_first: first_channel,
        out_count: channels,
        block,
        split,
        first_input: problem.channels_out,
        dtype,
    }
    .run(context, w)?;
    Gather {
        batch: problem.batch,
        input: dy,
        channels_in: problem.channels_out,
        second: None,
        in_dims: problem.out_dims(),
        weights: &packed,
        bias: None,
        output: dx,
        out_dims: problem.in_dims,
        channels_out: channels,
        taps,
        in_step: [1; 3],
        pad: std::array::from_fn(|a| axes[a].1),
        count,
        out_step: problem.stride,
        out_offset: parity,
        spread: None,
        method,
        epilogue,
    }
    .launch(context)
}

/// As [`backward_weight`](super::backward_weight), of operands.
///
/// # Errors
/// As [`forward`].
pub fn backward_weight(
    context: &Context,
    problem: &Problem,
    x: Operand,
    second: Option<Operand>,
    dy: Operand,
    dw: &Buffer,
) -> Result<(), KernelError> {
    problem.check_operands(&x, second.as_ref())?;
    let dtype = x.buffer().dtype();
    dy.buffer().check(OPERATION, "gradient of the output", problem.output_len(), dtype)?;
    dy.check(OPERATION, problem.batch, problem.channels_out)?;
    dw.check(OPERATION, "gradient of the weights", problem.weight_len(), Dtype::F32)?;
    check_loads(context, problem, Pass::WeightGradient, dtype, [Some(&x), second.as_ref(), Some(&dy)])?;
    let (context, algorithm) = &chosen(context, problem, Pass::WeightGradient, dtype);
    if *algorithm == Algorithm::Winograd {
        return WinogradWeightGradient {
            batch: problem.batch,
            dims: problem.in_dims,
            input: x,
            channels_in: problem.channels_in,
            second: second.map(|second| (second, problem.second_channels)),
            deep: problem.kernel[0] == 3,
            output_gradient: dy,
            channels_out: problem.channels_out,
            gradient: dw,
        }
        .launch(context);
    }
    let all = problem.channels_in + problem.second_channels;
    let inputs = [Some((x, 0, problem.channels_in)), second.map(|s| (s, problem.channels_in, problem.second_channels))];
    for (x, first_channel, channels) in inputs.into_iter().flatten() {
        WeightGradient {
            batch: problem.batch,
            strided: x,
            rows: channels,
            in_dims: problem.in_dims,
            dense: dy,
            columns: problem.channels_out,
            out_dims: problem.out_dims(),
            taps: problem.kernel,
            step: problem.stride,
            pad: problem.pad(),
            gradient: dw,
            first: first_channel * problem.channels_out,
            tap_stride: all * problem.channels_out,
            row_stride: problem.channels_out,
            column_stride: 1,
        }
        .launch(context)?;
    }
    Ok(())
}
