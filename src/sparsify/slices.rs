//! Whole slices: at random, evenly spaced, where the labels change, from a list, or as nnU-Net's integration test draws
//! them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use ndarray::{ArrayView3, Axis, Zip};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::drawn::{Drawn, strokes_of_planes};
use super::scribbles::shuffle;
use crate::error::{AnnotationError, Error, FileError, Result};
use crate::numpy_random::NumpyRandom;

/// Indices of slices along (z, y, x).
pub type Planes = [Vec<usize>; 3];

/// Which slices stay annotated.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Slices {
    /// Axes across which slices are taken: (z, y, x).
    pub axes: [bool; 3],
    /// Share of the slices, shared among the axes: of 36 x 50 x 35 voxels, at a tenth and along all axes, 1 + 2 + 1
    /// slices. At least one along each axis. Not used with a list; where slices are pooled, a share of all voxels.
    pub fraction: f64,
    /// How slices are chosen.
    pub selection: Selection,
}

/// How slices are chosen.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Selection {
    /// At random.
    Random,
    /// Evenly spaced.
    Even,
    /// Where the labels change most: the axis is cut into stretches with the same amount of change, and in each the slice
    /// with most voxels that differ from those of its neighbours is taken.
    Change,
    /// As nnU-Net's integration test makes its dataset 996: numpy's draws, from one stream over all cases in the order of
    /// their names. Its seed is 1234, its share a tenth, along all axes.
    Nnunet,
    /// At random over the whole dataset, as many as come nearest to the share of all its voxels: some cases get several,
    /// some none.
    Pooled,
    /// From a list; `*` stands for cases that are not named.
    List(BTreeMap<String, PlaneList>),
}

/// The listed slices of a case.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlaneList {
    /// Slices across z.
    #[serde(default)]
    pub z: Vec<usize>,
    /// Slices across y.
    #[serde(default)]
    pub y: Vec<usize>,
    /// Slices across x.
    #[serde(default)]
    pub x: Vec<usize>,
}

impl Slices {
    /// Reads a list of slices: `{"*": {"z": [10, 20]}, "case_7": {"y": [3]}}`.
    ///
    /// # Errors
    /// [`FileError::Io`], [`FileError::Json`].
    pub fn read_list(path: &Path) -> Result<Selection> {
        let text = std::fs::read_to_string(path).map_err(Error::io(path, "read"))?;
        let list =
            serde_json::from_str(&text).map_err(|source| Error::File(FileError::Json { path: path.into(), source }))?;
        Ok(Selection::List(list))
    }

    /// How many of `length` slices along one axis are taken.
    fn count(&self, length: usize) -> usize {
        let axes = self.axes.iter().filter(|&&taken| taken).count();
        let count = (length as f64 * self.fraction / axes.max(1) as f64).round_ties_even();
        (count as usize).clamp(1, length)
    }

    /// The listed slices of a case.
    ///
    /// # Errors
    /// [`AnnotationError::Slices`] for a case without an entry, or with slices outside its volume.
    pub(super) fn listed(list: &BTreeMap<String, PlaneList>, case: &str, shape: [usize; 3]) -> Result<Planes> {
        let failed = |problem: String| Error::Annotation(AnnotationError::Slices { case: case.into(), problem });
        let found = list.get(case).or_else(|| list.get("*"));
        let PlaneList { z, y, x } =
            found.ok_or_else(|| failed("the list neither names it nor has an entry `*`".into()))?;
        for ((name, planes), length) in ["z", "y", "x"].into_iter().zip([z, y, x]).zip(shape) {
            let outside: Vec<usize> = planes.iter().copied().filter(|&plane| plane >= length).collect();
            if !outside.is_empty() {
                return Err(failed(format!(
                    "{name} has {length} slices, 0 to {}; the list has {outside:?}",
                    length - 1
                )));
            }
        }
        if [z, y, x].iter().all(|planes| planes.is_empty()) {
            return Err(failed("the list has no slice of it".into()));
        }
        Ok([z.clone(), y.clone(), x.clone()])
    }

    /// The slices that nnU-Net's integration test would take next from its stream of random numbers.
    pub fn nnunets(&self, shape: [usize; 3], random: &mut NumpyRandom) -> Planes {
        std::array::from_fn(|axis| match self.axes[axis] {
            true => {
                random.choice(shape[axis] as u32, self.count(shape[axis])).into_iter().map(|i| i as usize).collect()
            }
            false => Vec::new(),
        })
    }

    /// The slices of every case, drawn from those of all cases until their voxels come nearest to the share of all.
    pub(super) fn pool(&self, shapes: &[[usize; 3]], random: &mut ChaCha8Rng) -> Vec<Planes> {
        let mut all: Vec<(usize, usize, usize)> = Vec::new();
        for (case, shape) in shapes.iter().enumerate() {
            for axis in (0..3).filter(|&axis| self.axes[axis]) {
                all.extend((0..shape[axis]).map(|index| (case, axis, index)));
            }
        }
        shuffle(&mut all, random);
        let voxels = shapes.iter().map(|shape| shape.iter().product::<usize>()).sum::<usize>();
        let mut rest = self.fraction * voxels as f64;
        let mut chosen: Vec<Planes> = vec![Planes::default(); shapes.len()];
        for (case, axis, index) in all {
            // Slices across other axes have lines of this one already.
            let sides = (0..3).filter(|&other| other != axis);
            let gained: usize = sides.map(|other| shapes[case][other] - chosen[case][other].len()).product();
            if rest < 0.5 * gained as f64 {
                break;
            }
            rest -= gained as f64;
            chosen[case][axis].push(index);
        }
        chosen
    }

    /// The slices of a case, where they depend on nothing but the case.
    pub(super) fn choose(&self, dense: ArrayView3<i16>, random: &mut ChaCha8Rng) -> Planes {
        std::array::from_fn(|axis| {
            let length = dense.len_of(Axis(axis));
            match (self.axes[axis], &self.selection) {
                (true, Selection::Random) => {
                    let mut planes: Vec<usize> = (0..length).collect();
                    shuffle(&mut planes, random);
                    planes.truncate(self.count(length));
                    planes
                }
                (true, Selection::Even) => {
                    let count = self.count(length);
                    (0..count).map(|i| (2 * i + 1) * length / (2 * count)).collect()
                }
                (true, Selection::Change) => most_changed(&changes(dense, axis), self.count(length)),
                _ => Vec::new(),
            }
        })
    }
}

/// Keeps whole slices and marks the rest with `ignore`.
pub fn keep(dense: ArrayView3<i16>, ignore: i16, planes: &Planes) -> Drawn {
    let mut kept = Drawn::none(dense.dim(), ignore);
    for (axis, planes) in planes.iter().enumerate() {
        for &index in planes.iter().collect::<BTreeSet<_>>() {
            let plane = dense.index_axis(Axis(axis), index);
            kept.labels.index_axis_mut(Axis(axis), index).assign(&plane);
            strokes_of_planes([plane], ignore, &mut kept.strokes);
        }
    }
    kept
}

/// For every slice along an axis the number of voxels that differ from those of the slice before it and after it.
fn changes(dense: ArrayView3<i16>, axis: usize) -> Vec<u64> {
    let length = dense.len_of(Axis(axis));
    let mut changes = vec![0; length];
    for index in 1..length {
        let [before, after] = [index - 1, index].map(|i| dense.index_axis(Axis(axis), i));
        let mut differing = 0;
        Zip::from(&before).and(&after).for_each(|a, b| differing += u64::from(a != b));
        changes[index - 1] += differing;
        changes[index] += differing;
    }
    changes
}

/// `count` slices, from each stretch of equal change the one that changes most.
fn most_changed(changes: &[u64], count: usize) -> Vec<usize> {
    let total: u64 = changes.iter().sum();
    if total == 0 {
        return (0..count).map(|i| (2 * i + 1) * changes.len() / (2 * count)).collect();
    }
    let mut best: Vec<Option<usize>> = vec![None; count];
    let mut sum = 0;
    for (index, &change) in changes.iter().enumerate() {
        // The stretch in which the middle of this slice's share lies.
        let stretch = ((2 * sum + change) * count as u64 / (2 * total)).min(count as u64 - 1) as usize;
        sum += change;
        if best[stretch].is_none_or(|other| change > changes[other]) {
            best[stretch] = Some(index);
        }
    }
    let mut chosen: BTreeSet<usize> = best.into_iter().flatten().collect();
    // A slice that changes more than a whole stretch leaves the next one empty: the most changed of the others fill up.
    let mut others: Vec<usize> = (0..changes.len()).filter(|index| !chosen.contains(index)).collect();
    others.sort_by_key(|&index| std::cmp::Reverse(changes[index]));
    let missing = count - chosen.len();
    chosen.extend(others.into_iter().take(missing));
    chosen.into_iter().collect()
}
