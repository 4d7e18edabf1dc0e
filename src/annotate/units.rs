//! What can be annotated next: slices or blocks, each with the uncertainty that annotating it would remove, and an order in
//! which neighbours do not come one after the other.

use ndarray::{Array3, ArrayView3, Axis, s};
use serde::Serialize;

use crate::infer::window::axis_starts;

/// What is annotated in one go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Slices across an axis of (z, y, x).
    Slices {
        /// The axis.
        axis: usize,
    },
    /// Blocks of this extent (z, y, x), cut to the image where it is smaller. They lie half a block apart, or a little less.
    Blocks {
        /// The extent.
        size: [usize; 3],
    },
}

/// A slice or a block that is not annotated throughout.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Candidate {
    /// First voxel (z, y, x).
    pub start: [usize; 3],
    /// Extent (z, y, x).
    pub extent: [usize; 3],
    /// Mean uncertainty of its voxels, annotated ones counting as 0.
    pub score: f64,
    /// Voxels that are not annotated.
    pub open: u64,
}

impl Candidate {
    /// Voxels, annotated or not.
    pub fn voxels(&self) -> u64 {
        self.extent.iter().product::<usize>() as u64
    }

    /// Whether fewer than `spacing` voxels lie between two candidates of one case, along every axis.
    fn is_neighbour(&self, other: &Candidate, spacing: usize) -> bool {
        (0..3).all(|axis| {
            let (a, b) = (self.start[axis], other.start[axis]);
            a < b + other.extent[axis] + spacing && b < a + self.extent[axis] + spacing
        })
    }
}

impl Unit {
    /// Extents of the units along each axis, and where they start.
    fn grid(self, shape: [usize; 3]) -> ([usize; 3], [Vec<usize>; 3]) {
        match self {
            Unit::Slices { axis } => {
                let extent = std::array::from_fn(|other| if other == axis { 1 } else { shape[other] });
                (extent, std::array::from_fn(|other| (0..if other == axis { shape[other] } else { 1 }).collect()))
            }
            Unit::Blocks { size } => {
                let extent: [usize; 3] = std::array::from_fn(|axis| size[axis].min(shape[axis]));
                (extent, std::array::from_fn(|axis| axis_starts(shape[axis], extent[axis], 0.5)))
            }
        }
    }
}

/// All units of a case that are not annotated throughout, in the order of their first voxels.
///
/// # Panics
/// If the volumes differ in shape, or a block has no voxels.
pub fn candidates(unit: Unit, uncertainty: ArrayView3<f32>, annotated: ArrayView3<bool>) -> Vec<Candidate> {
    assert_eq!(uncertainty.dim(), annotated.dim(), "uncertainty and annotation differ in shape");
    let (extent, [zs, ys, xs]) = unit.grid(uncertainty.dim().into());
    let of = |value: &dyn Fn(f32) -> f64| -> BoxSums {
        let mut volume = uncertainty.mapv(value);
        volume.zip_mut_with(&annotated, |value, &annotated| {
            if annotated {
                *value = 0.0;
            }
        });
        BoxSums::new(volume)
    };
    let (scores, open) = (of(&|value| f64::from(value)), of(&|_| 1.0));
    let voxels = extent.iter().product::<usize>() as f64;
    let mut found = Vec::new();
    for &z in &zs {
        for &y in &ys {
            for &x in &xs {
                let start = [z, y, x];
                let open = open.sum(start, extent).round() as u64;
                if open > 0 {
                    // Differences of sums may leave a little less than nothing.
                    let score = (scores.sum(start, extent) / voxels).max(0.0);
                    found.push(Candidate { start, extent, score, open });
                }
            }
        }
    }
    found
}

/// Sums over boxes, from a table of the sums of everything before each voxel.
struct BoxSums(Array3<f64>);

impl BoxSums {
    fn new(volume: Array3<f64>) -> Self {
        let (depth, height, width) = volume.dim();
        let mut table = Array3::zeros((depth + 1, height + 1, width + 1));
        table.slice_mut(s![1.., 1.., 1..]).assign(&volume);
        for axis in 0..3 {
            table.accumulate_axis_inplace(Axis(axis), |&before, value| *value += before);
        }
        BoxSums(table)
    }

    fn sum(&self, start: [usize; 3], extent: [usize; 3]) -> f64 {
        let mut sum = 0.0;
        for corner in 0..8usize {
            let is_end: [bool; 3] = std::array::from_fn(|axis| corner >> axis & 1 == 1);
            let at: [usize; 3] = std::array::from_fn(|axis| start[axis] + if is_end[axis] { extent[axis] } else { 0 });
            let sign = if is_end.iter().filter(|&&end| !end).count() % 2 == 0 { 1.0 } else { -1.0 };
            sum += sign * self.0[at];
        }
        sum
    }
}

/// The best candidates of one case, at most `count`, with the round in which each is taken: the highest score first, among
/// equal ones the first; never one that has a neighbour among those of its round. When only neighbours are left, the next
/// round begins.
pub fn spread(mut candidates: Vec<Candidate>, count: usize, spacing: usize) -> Vec<(Candidate, usize)> {
    // Stable: equal ones stay in the order of their places.
    candidates.sort_by(|a, b| b.score.total_cmp(&a.score));
    let mut taken: Vec<(Candidate, usize)> = Vec::new();
    let mut round = 1;
    while taken.len() < count && !candidates.is_empty() {
        let first = taken.len();
        let mut left = Vec::new();
        for candidate in candidates {
            let alone = taken[first..].iter().all(|(other, _)| !candidate.is_neighbour(other, spacing));
            match alone && taken.len() < count {
                true => taken.push((candidate, round)),
                false => left.push(candidate),
            }
        }
        candidates = left;
        round += 1;
    }
    taken
}
