//! What a convolution takes of its outputs.

use super::grid::PointsNumbers;
use crate::instance_norm::epilogue::{RSTD, Take, add_moments, coefficients_at, gradient_terms};
use cubecl::prelude::*;

/// The norm whose output a gradient belongs to, where its sums are taken.
#[derive(CubeType, CubeLaunch)]
pub(super) struct NormOfOutput<V: CubePrimitive> {
    /// What the norm read, of the gradient's shape.
    pub raw: Box<[V]>,
    /// f32 `[batch, 4, channels]`.
    pub coefficients: Box<[V]>,
}

/// Outputs that are added up at the same time, to hide the latency of additions.
const ABREAST: usize = 4;

/// Takes what [`Take`] says of outputs that were just stored and are still in the first-level cache: `rows` rows of `columns`
/// positions from position `row` on, of sample `n`. A loop of its own, since the transforms need all registers.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
pub(super) fn take_parts<O: Size>(
    y: &[Vector<f32, O>],
    parts: &mut [Vector<f32, O>],
    norm_of_output: &NormOfOutput<Vector<f32, O>>,
    s: &PointsNumbers,
    n: usize,
    first_vector: usize,
    row: usize,
    rows: usize,
    columns: usize,
    width: usize,
    #[comptime] take: Take,
) {
    let all = s.vectors_out;
    for vector in first_vector..first_vector + all / s.groups {
        let to = (n * s.units + ABSOLUTE_POS) * comptime!(take.rows()) * all + vector;
        let norm = coefficients_at::<O>(&norm_of_output.coefficients, n, all, vector, take);
        let mut shift = Vector::<f32, O>::zeroed();
        let mut before = Vector::<f32, O>::zeroed();
        if comptime!(take == Take::Moments) {
            before = parts[to + 3 * all];
            if before.extract(0usize) == 0.0f32 {
                parts[to] = y[row * all + vector];
            }
            shift = parts[to] + parts[to + all];
        }
        let mut sum = Array::<Vector<f32, O>>::new(ABREAST);
        let mut product = Array::<Vector<f32, O>>::new(ABREAST);
        for r in 0..rows {
            let from = (row + r * width) * all + vector;
            for group in 0..columns / ABREAST {
                #[unroll]
                for i in 0..ABREAST {
                    let at = from + (group * ABREAST + i) * all;
                    let (one, other) = terms::<O>(y[at], &norm_of_output.raw, at, shift, &norm, s.slope, take);
                    sum[i] += one;
                    product[i] += other;
                }
            }
            for column in columns / ABREAST * ABREAST..columns {
                let at = from + column * all;
                let (one, other) = terms::<O>(y[at], &norm_of_output.raw, at, shift, &norm, s.slope, take);
                sum[0] += one;
                product[0] += other;
            }
        }
        let sum = (sum[0] + sum[1]) + (sum[2] + sum[3]);
        let product = (product[0] + product[1]) + (product[2] + product[3]);
        if comptime!(take == Take::Moments) {
            let here = f32::cast_from(rows * columns);
            add_moments(parts, to, all, shift, sum, product, before, here);
            parts[to + 3 * all] = before + Vector::new(here);
        } else {
            parts[to] += sum;
            parts[to + all] += product * norm[RSTD];
        }
    }
}

/// What one output adds to both sums.
#[cube]
fn terms<O: Size>(
    value: Vector<f32, O>,
    raw_output: &[Vector<f32, O>],
    at: usize,
    shift: Vector<f32, O>,
    norm: &Array<Vector<f32, O>>,
    slope: f32,
    #[comptime] take: Take,
) -> (Vector<f32, O>, Vector<f32, O>) {
    if comptime!(take == Take::Moments) {
        let difference = value - shift;
        (difference, difference * difference)
    } else {
        gradient_terms::<O>(value, raw_output[at], norm, Vector::new(slope))
    }
}
