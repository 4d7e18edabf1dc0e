//! What an instance norm has to know about a tensor, taken by the convolution that stores it: so nobody reads it again. Of an
//! output these are its moments; of the gradient of an activated tensor, the sums that its way back through the norm needs.
//!
//! A convolution's kernel walks its outputs in pieces (the tiles of one row, the block of one cube), which never cross
//! from one sample to the next. On the CPU a unit adds its pieces to a part of its own, one for each sample, that begins
//! empty and stays in its cache; on a GPU each piece is a part. Parts are merged in a fixed order.

use super::apply::{affine, leak};
use super::problem::Problem;
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

/// Rows of [`Coefficients`]: mean, scale = gamma * rstd, beta, rstd.
const MEAN: usize = 0;
const SCALE: usize = 1;
const BETA: usize = 2;
pub(crate) const RSTD: usize = 3;
const ROWS: usize = 4;

/// What activating a value takes of every sample and channel: f32 `[batch, 4, channels]`, made by
/// [`coefficients`](super::coefficients).
#[derive(Clone, Debug)]
pub struct Coefficients {
    pub(super) values: Buffer,
    batch: usize,
    channels: usize,
    slope: f32,
}

impl Coefficients {
    pub(super) fn new(context: &Context, problem: &Problem) -> Result<Self, KernelError> {
        let Problem { batch, channels, slope, .. } = *problem;
        let values = context.empty(batch * ROWS * channels, Dtype::F32)?;
        Ok(Self { values, batch, channels, slope })
    }

    /// Refuses coefficients of another shape.
    pub(crate) fn check(&self, operation: &'static str, batch: usize, channels: usize) -> Result<(), KernelError> {
        let (expected, actual) = ([batch, channels], [self.batch, self.channels]);
        if expected != actual {
            let what = "samples and channels of the norm's coefficients";
            return Err(KernelError::shape(operation, what, expected, actual));
        }
        Ok(())
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

    /// The slope of the leaky ReLU behind the norm.
    pub fn slope(&self) -> f32 {
        match self {
            Self::GradientSums { by, .. } => by.slope,
            Self::Nothing | Self::Moments(_) => 1.0,
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
}

/// Writes the coefficients of channel `c` of sample `n`.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
pub(super) fn write_coefficients(
    values: &mut [f32],
    n: usize,
    c: usize,
    channels: usize,
    mean: f32,
    rstd: f32,
    gamma: f32,
    beta: f32,
) {
    let to = n * ROWS * channels + c;
    values[to + MEAN * channels] = mean;
    values[to + SCALE * channels] = rstd * gamma;
    values[to + BETA * channels] = beta;
    values[to + RSTD * channels] = rstd;
}

/// The coefficients of one vector of channels of sample `n`, for [`gradient_terms`]; `vectors` are all of a sample's channels.
/// Empty where nothing is taken that needs them.
#[cube]
pub(crate) fn coefficients_at<N: Size>(
    values: &[Vector<f32, N>],
    n: usize,
    vectors: usize,
    vector: usize,
    #[comptime] take: Take,
) -> Array<Vector<f32, N>> {
    let mut all = Array::<Vector<f32, N>>::new(ROWS);
    if comptime!(take == Take::GradientSums) {
        #[unroll]
        for row in 0..ROWS {
            all[row] = values[(n * ROWS + row) * vectors + vector];
        }
    }
    all
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
