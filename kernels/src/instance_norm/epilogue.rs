//! What an instance norm has to know about a tensor, taken by the convolution that stores it: so nobody reads it again. Of an
//! output these are its moments; of the gradient of an activated tensor, the sums that its way back through the norm needs.
//!
//! A convolution's kernel walks its outputs in pieces (the tiles of one row, the block of one cube), which never cross
//! from one sample to the next. On the CPU a unit adds its pieces to a part of its own, one for each sample, that begins
//! empty and stays in its cache; on a GPU each piece is a part. Parts are merged in a fixed order.

use super::apply::{affine, leak};
use super::prologue::{BETA, Coefficients, Load, MEAN, Operand, SCALE};
use crate::{Buffer, Context, Dtype, KernelError};
use cubecl::prelude::*;

/// The moments of parts of every sample: f32 `[batch, parts, 4, width]`, where `width` is the number of channels or a
/// multiple of it (element `e` then belongs to channel `e % channels`). The four are a pivot close to the mean, mean -
/// pivot, the sum of squared deviations from the mean, and the number of values; a part without values has zeros.
#[derive(Debug)]
pub struct Moments {
    pub(crate) partial: Buffer,
    pub(crate) batch: usize,
    pub(crate) parts: usize,
    pub(crate) width: usize,
}

impl Moments {
    pub(crate) fn new(context: &Context, batch: usize, parts: usize, width: usize) -> Result<Self, KernelError> {
        let partial = context.empty(batch * parts * 4 * width, Dtype::F32)?;
        Ok(Self { partial, batch, parts, width })
    }
}

/// The sums that the gradients of a norm need, of parts of every sample: f32 `[batch, parts, 2, width]`, with `width` as in
/// [`Moments`]: sum dz and sum dz * xhat in the words of the [module](super).
#[derive(Debug)]
pub struct GradientParts {
    pub(crate) partial: Buffer,
    pub(crate) batch: usize,
    pub(crate) parts: usize,
    pub(crate) width: usize,
}

impl GradientParts {
    pub(crate) fn new(context: &Context, batch: usize, parts: usize, width: usize) -> Result<Self, KernelError> {
        let partial = context.empty(batch * parts * 2 * width, Dtype::F32)?;
        Ok(Self { partial, batch, parts, width })
    }
}

/// What a convolution takes of its outputs on their way to memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Epilogue<'a> {
    Nothing,
    Moments(&'a Moments),
    /// The outputs are the gradient of what a norm and its activation put out.
    GradientSums {
        parts: &'a GradientParts,
        /// What the norm read.
        raw: &'a Buffer,
        by: &'a Coefficients,
    },
}

impl<'a> Epilogue<'a> {
    pub fn take(&self) -> Take {
        match self {
            Self::Nothing => Take::Nothing,
            Self::Moments(_) => Take::Moments,
            Self::GradientSums { .. } => Take::GradientSums,
        }
    }

    /// Parts of every sample.
    pub fn parts(&self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Moments(moments) => moments.parts,
            Self::GradientSums { parts, .. } => parts.parts,
        }
    }

    /// Where parts go, what the norm read, and its coefficients; `nothing` fills the argument of a kernel that does not use it.
    pub fn buffers(&self, nothing: &'a Buffer) -> [&'a Buffer; 3] {
        match self {
            Self::Nothing => [nothing; 3],
            Self::Moments(moments) => [&moments.partial, nothing, nothing],
            Self::GradientSums { parts, raw, by } => [&parts.partial, raw, &by.values],
        }
    }
}

/// What is compiled into a kernel for an [`Epilogue`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Take {
    Nothing,
    Moments,
    GradientSums,
}

impl Take {
    /// Numbers of a channel's part.
    pub fn rows(self) -> usize {
        match self {
            Self::Nothing => 0,
            Self::Moments => 4,
            Self::GradientSums => 2,
        }
    }

    /// The coefficients that the epilogue needs.
    pub fn load(self) -> Load {
        if self == Self::GradientSums { Load::Normalised } else { Load::Stored }
    }
}

/// The slope of the leaky ReLU in everything that one kernel loads and takes.
pub(crate) fn slope_of(
    operation: &'static str,
    operands: [Option<&Operand>; 3],
    epilogue: &Epilogue,
) -> Result<f32, KernelError> {
    let of_operands = operands.into_iter().flatten().filter_map(Operand::coefficients);
    let of_output = match epilogue {
        Epilogue::GradientSums { by, .. } => Some(*by),
        _ => None,
    };
    let mut slopes = of_operands.chain(of_output).map(|by| by.slope);
    let slope = slopes.next().unwrap_or(1.0);
    match slopes.find(|other| *other != slope) {
        Some(other) => Err(KernelError::shape(operation, "slopes of one launch", slope, other)),
        None => Ok(slope),
    }
}

/// What of one value of the gradient of an activated tensor: dz and dz * (x - mean), where `raw` is x.
#[cube]
pub(crate) fn gradient_terms<N: Size>(
    gradient: Vector<f32, N>,
    raw: Vector<f32, N>,
    coefficients: &Array<Vector<f32, N>>,
    slope: Vector<f32, N>,
) -> (Vector<f32, N>, Vector<f32, N>) {
    let centred = raw - coefficients[MEAN];
    let z = affine(centred, coefficients[SCALE], coefficients[BETA]);
    let dz = leak(z, gradient, slope);
    (dz, dz * centred)
}

/// Adds `here` rows to a part that has `before`: `sum` and `square` are the sums of their differences from `shift`, the
/// part's mean so far, and of the squares. `width` counts vectors.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernels")]
pub(crate) fn add_moments<N: Size>(
    partial: &mut [Vector<f32, N>],
    at: usize,
    width: usize,
    shift: Vector<f32, N>,
    sum: Vector<f32, N>,
    square: Vector<f32, N>,
    before: Vector<f32, N>,
    here: f32,
) {
    // Exact: what rounding took from the shift. It makes the mean a sum of two floats, so that thousands of updates do not
    // wear it down.
    let offset = (partial[at] - shift) + partial[at + width];
    let mean = sum * Vector::new(1.0f32 / here);
    let delta = mean - offset;
    let share_of_here = Vector::new(here) / (before + Vector::new(here));
    partial[at] = shift;
    partial[at + width] = offset + delta * share_of_here;
    partial[at + 2 * width] += square - sum * mean + delta * delta * (before * share_of_here);
}

/// Empties a unit's part of every sample, parts `first, first + parts, ..`, each of `length` vectors.
#[cube]
pub(crate) fn clear_parts<N: Size>(
    partial: &mut [Vector<f32, N>],
    first: usize,
    parts: usize,
    batch: usize,
    length: usize,
) {
    for n in 0..batch {
        for i in 0..length {
            partial[(n * parts + first) * length + i] = Vector::zeroed();
        }
    }
}

/// Moments of one channel.
#[derive(CubeType)]
pub(crate) struct Merged {
    pub mean: f32,
    /// Sum of squared deviations from the mean.
    pub square: f32,
    pub count: f32,
}

/// Adds `more` values with their own mean and squared deviations.
#[cube]
pub(crate) fn merge(to: &mut Merged, mean: f32, square: f32, more: f32) {
    if more > 0.0f32 {
        let delta = mean - to.mean;
        let share_of_more = more / (to.count + more);
        to.mean += delta * share_of_more;
        to.square += square + delta * delta * to.count * share_of_more;
        to.count += more;
    }
}
