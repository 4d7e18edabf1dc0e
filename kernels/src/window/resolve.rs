//! From weighted sums to labels, or to mean logits, on the case's grid or another one.

use super::problem::{OPERATION, Problem};
use crate::block::strip;
use crate::conv3d::axes::{Axes, axes};
use crate::reduce::check_count;
use crate::{Buffer, Context, Dtype, KernelError, Work};
use cubecl::prelude::*;
use std::ops::Range;

/// The label of a voxel of which a logit is infinite or no number.
pub const NOT_FINITE: u32 = u32::MAX;

/// Corners between which a voxel lies: two along each axis.
const CORNERS: usize = 8;

/// Where the voxels of another grid lie between those of the case, on the device.
#[derive(Clone, Debug)]
pub struct Resampling {
    extents: [usize; 3],
    /// Neighbours along each axis: 1 or 2.
    neighbours: [usize; 3],
    /// `[depth + height + width, 2]`: both neighbours of each place, in the padded volume, and their shares.
    places: Buffer,
    shares: Buffer,
}

impl Resampling {
    /// For every place along depth, height and width its two neighbours in the case and the share of each. Where no place
    /// along an axis has a second one with a share, the first is taken as it is.
    ///
    /// # Errors
    /// [`KernelError::Shape`] for an empty grid or a neighbour outside the case.
    pub fn new(context: &Context, problem: &Problem, along: [&[[(usize, f32); 2]]; 3]) -> Result<Self, KernelError> {
        let (mut places, mut shares) = (Vec::new(), Vec::new());
        let mut neighbours = [1; 3];
        for (axis, along) in along.into_iter().enumerate() {
            if along.is_empty() {
                return Err(KernelError::shape(OPERATION, "resampled grid", "at least one voxel", along));
            }
            for &(place, share) in along.iter().flatten() {
                if place >= problem.image[axis] {
                    let expected = format_args!("below {}", problem.image[axis]);
                    return Err(KernelError::shape(OPERATION, "neighbour in the case", expected, place));
                }
                places.push((place + problem.before[axis]) as u32);
                shares.push(share);
            }
            if along.iter().any(|[first, second]| (first.1, second.1) != (1.0, 0.0)) {
                neighbours[axis] = 2;
            }
        }
        Ok(Self {
            extents: along.map(<[_]>::len),
            neighbours,
            places: context.upload(&places, Dtype::U32)?,
            shares: context.upload_f32(&shares)?,
        })
    }

    /// Extent of the grid: depth, height, width.
    pub fn extents(&self) -> [usize; 3] {
        self.extents
    }
}

/// What is made of the mean logits of a voxel.
#[derive(Clone, Copy, Debug)]
pub enum Output<'a> {
    /// Themselves: `[slices, height, width, heads]` of f32.
    Logits(&'a Buffer),
    /// `[slices, height, width]` of u32: the value, of `values`, of the head with the largest logit, the first of several.
    Largest {
        /// A label for each head.
        values: &'a Buffer,
        /// The labels.
        labels: &'a Buffer,
    },
    /// `[slices, height, width]` of u32: the value, of `values`, of the last head whose logit is above 0, or 0.
    LastPositive {
        /// A label for each head.
        values: &'a Buffer,
        /// The labels.
        labels: &'a Buffer,
    },
}

// ------------------------------------------------------------------------------------------------ kernels

/// A row of voxels of the output, or the one voxel of it that an item is.
#[derive(CubeType)]
struct Row {
    slice: usize,
    height: usize,
    low: usize,
    high: usize,
}

#[cube]
fn row_of(item: usize, extents: &Axes, #[comptime] by_row: bool) -> Row {
    let mut row = item;
    let mut low = 0usize;
    let mut high = extents.width;
    if comptime!(!by_row) {
        row = item / extents.width;
        low = item % extents.width;
        high = low + 1;
    }
    Row { slice: row / extents.height, height: row % extents.height, low, high }
}

/// Of the corners around a voxel, where their sums begin, and their shares of the mean.
#[cube]
fn corners(
    weights: &[f32],
    places: &[u32],
    shares: &[f32],
    extents: &Axes,
    held: &Axes,
    at: &Axes,
    from: &mut Array<usize>,
    share: &mut Array<f32>,
    #[comptime] neighbours: [usize; 3],
) {
    let z = 2 * at.depth;
    let y = 2 * (extents.depth + at.height);
    let x = 2 * (extents.depth + extents.height + at.width);
    #[unroll]
    for kz in 0..comptime!(neighbours[0]) {
        #[unroll]
        for ky in 0..comptime!(neighbours[1]) {
            #[unroll]
            for kx in 0..comptime!(neighbours[2]) {
                let slice = usize::cast_from(places[z + kz]) % held.depth;
                let row = slice * held.height + usize::cast_from(places[y + ky]);
                let voxel = row * held.width + usize::cast_from(places[x + kx]);
                let corner = (kz * comptime!(neighbours[1]) + ky) * comptime!(neighbours[2]) + kx;
                from[corner] = voxel;
                share[corner] = shares[z + kz] * shares[y + ky] * shares[x + kx] / weights[voxel];
            }
        }
    }
}

#[cube]
fn mean(
    sums: &[f32],
    from: &Array<usize>,
    share: &Array<f32>,
    heads: usize,
    head: usize,
    #[comptime] neighbours: [usize; 3],
) -> f32 {
    let mut value = 0.0f32;
    #[unroll]
    for corner in 0..comptime!(neighbours[0] * neighbours[1] * neighbours[2]) {
        value += share[corner] * sums[from[corner] * heads + head];
    }
    value
}

#[cube(launch_unchecked)]
fn logits_kernel(
    sums: &[f32],
    weights: &[f32],
    places: &[u32],
    shares: &[f32],
    logits: &mut [f32],
    extents: &Axes,
    held: &Axes,
    first: usize,
    heads: usize,
    items: usize,
    #[comptime] neighbours: [usize; 3],
    #[comptime] by_row: bool,
) {
    let mut from = Array::<usize>::new(CORNERS);
    let mut share = Array::<f32>::new(CORNERS);
    let (low, high) = strip(items);
    for item in low..high {
        let row = row_of(item, extents, by_row);
        for w in row.low..row.high {
            let at = Axes { depth: first + row.slice, height: row.height, width: w };
            corners(weights, places, shares, extents, held, &at, &mut from, &mut share, neighbours);
            let to = ((row.slice * extents.height + row.height) * extents.width + w) * heads;
            for head in 0..heads {
                logits[to + head] = mean(sums, &from, &share, heads, head, neighbours);
            }
        }
    }
}

#[cube(launch_unchecked)]
fn labels_kernel(
    sums: &[f32],
    weights: &[f32],
    places: &[u32],
    shares: &[f32],
    values: &[u32],
    labels: &mut [u32],
    extents: &Axes,
    held: &Axes,
    first: usize,
    heads: usize,
    items: usize,
    #[comptime] neighbours: [usize; 3],
    #[comptime] largest: bool,
    #[comptime] by_row: bool,
) {
    let mut from = Array::<usize>::new(CORNERS);
    let mut share = Array::<f32>::new(CORNERS);
    let (low, high) = strip(items);
    for item in low..high {
        let row = row_of(item, extents, by_row);
        for w in row.low..row.high {
            let at = Axes { depth: first + row.slice, height: row.height, width: w };
            corners(weights, places, shares, extents, held, &at, &mut from, &mut share, neighbours);
            // Regions: background unless one is above 0.
            let mut best = 0.0f32;
            let mut label = 0u32;
            let mut is_bad = 0u32;
            for head in 0..heads {
                let value = mean(sums, &from, &share, heads, head, neighbours);
                if value.is_nan() || value.is_inf() {
                    is_bad = 1u32;
                }
                if comptime!(largest) {
                    if head == 0 || value > best {
                        best = value;
                        label = values[head];
                    }
                } else if value > 0.0 {
                    label = values[head];
                }
            }
            if is_bad == 1u32 {
                label = NOT_FINITE;
            }
            labels[(row.slice * extents.height + row.height) * extents.width + w] = label;
        }
    }
}

// ----------------------------------------------------------------------------------------------- launches

/// Writes the output for the slices `slices` of the resampled grid. `sums` and `weights` hold the slices of the case around
/// them; weights are sums of one head, see [`Problem::of_weights`].
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if a buffer does not fit, or slices lie outside the grid;
/// [`KernelError::Limit`] beyond the device's index range.
pub fn resolve(
    context: &Context,
    problem: &Problem,
    (sums, weights): (&Buffer, &Buffer),
    resampling: &Resampling,
    slices: Range<usize>,
    output: Output<'_>,
) -> Result<(), KernelError> {
    problem.check_sums(context, sums)?;
    problem.of_weights().check_sums(context, weights)?;
    let [depth, height, width] = resampling.extents;
    if slices.is_empty() || slices.end > depth {
        return Err(KernelError::shape(OPERATION, "slices", format_args!("some of {depth}"), slices));
    }
    let voxels = slices.len() * height * width;
    let by_row = context.caps().cores.is_some();
    let items = if by_row { slices.len() * height } else { voxels };
    let held = || axes([problem.slices, problem.padded[1], problem.padded[2]]);
    let (places, shares) = (&resampling.places, &resampling.shares);
    let (values, labels, largest) = match output {
        Output::Logits(logits) => {
            logits.check(OPERATION, "mean logits", voxels * problem.heads, Dtype::F32)?;
            check_count(context, OPERATION, logits.len())?;
            return context.launch(OPERATION, Work::Items(items), |client, count, dim| {
                // SAFETY: the items cover the voxels of `logits`; places were checked to lie inside the case.
                unsafe {
                    logits_kernel::launch_unchecked(
                        client,
                        count,
                        dim,
                        sums.arg(),
                        weights.arg(),
                        places.arg(),
                        shares.arg(),
                        logits.arg(),
                        axes(resampling.extents),
                        held(),
                        slices.start,
                        problem.heads,
                        items,
                        resampling.neighbours,
                        by_row,
                    )
                }
            });
        }
        Output::Largest { values, labels } => (values, labels, true),
        Output::LastPositive { values, labels } => (values, labels, false),
    };
    values.check(OPERATION, "label of each head", problem.heads, Dtype::U32)?;
    labels.check(OPERATION, "labels", voxels, Dtype::U32)?;
    check_count(context, OPERATION, voxels)?;
    context.launch(OPERATION, Work::Items(items), |client, count, dim| {
        // SAFETY: the items cover the voxels of `labels`; places were checked to lie inside the case.
        unsafe {
            labels_kernel::launch_unchecked(
                client,
                count,
                dim,
                sums.arg(),
                weights.arg(),
                places.arg(),
                shares.arg(),
                values.arg(),
                labels.arg(),
                axes(resampling.extents),
                held(),
                slices.start,
                problem.heads,
                items,
                resampling.neighbours,
                largest,
                by_row,
            )
        }
    })
}
