//! Dense blocks at random places, as active learning asks for them.

use ndarray::{Array3, ArrayView3, Axis, Slice};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::drawn::{Drawn, strokes_of_planes};
use crate::error::{AnnotationError, Error, Result};

/// Places tried for every block; the one that repeats least of what is annotated is taken.
const TRIES: usize = 32;

/// Which blocks stay annotated.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Blocks {
    /// Extent of a block along (z, y, x); cut where the volume is smaller.
    pub size: [usize; 3],
    /// How many.
    pub budget: Budget,
    /// Probability that a block is centred on a foreground voxel (moved inside the volume where it would stand out).
    pub foreground: f64,
}

/// How many blocks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Budget {
    /// So many in every case.
    Count(usize),
    /// As many in every case as come nearest to this share of its voxels.
    Fraction(f64),
    /// As many as come nearest to this share of all voxels of the dataset, in cases drawn at random: some get several, some
    /// none.
    Pooled(f64),
}

impl Blocks {
    /// Extent of a block in a volume.
    fn fitted(&self, shape: [usize; 3]) -> [usize; 3] {
        std::array::from_fn(|axis| self.size[axis].min(shape[axis]))
    }

    /// Whether the share of voxels can be met at all.
    pub(super) fn check(&self, case: &str, shape: [usize; 3]) -> Result<()> {
        let Budget::Fraction(fraction) = self.budget else { return Ok(()) };
        let [block, all] = [self.fitted(shape), shape].map(|extent| extent.iter().product::<usize>() as f64);
        if block > 2.0 * fraction * all {
            return Err(Error::Annotation(AnnotationError::BudgetUnmet {
                case: case.into(),
                fraction,
                reached: block / all,
                remedy: "that is a single block: use smaller blocks, a larger fraction, a number of blocks in each case, or \
                         pool the budget over all cases",
            }));
        }
        Ok(())
    }

    /// Keeps blocks and marks the rest with `ignore`; `pooled` is the case's part of a pooled budget.
    pub(super) fn draw(&self, dense: ArrayView3<i16>, ignore: i16, pooled: usize, random: &mut ChaCha8Rng) -> Drawn {
        let shape: [usize; 3] = dense.dim().into();
        let size = self.fitted(shape);
        let volume: usize = size.iter().product();
        let foreground: Vec<[usize; 3]> = dense
            .indexed_iter()
            .filter(|(_, label)| **label != 0 && **label != ignore)
            .map(|((z, y, x), _)| [z, y, x])
            .collect();
        let (most, target) = match self.budget {
            Budget::Count(count) => (count, None),
            Budget::Pooled(_) => (pooled, None),
            Budget::Fraction(fraction) => (usize::MAX, Some(fraction * dense.len() as f64)),
        };
        let mut taken = Array3::from_elem(dense.dim(), false);
        let mut covered = 0;
        let mut annotation = Drawn::none(dense.dim(), ignore);
        let mut blocks = 0;
        while blocks < most && covered < dense.len() {
            let mut best: Option<([usize; 3], usize)> = None;
            for _ in 0..TRIES {
                let start = self.place(shape, size, &foreground, random);
                let repeated = block(taken.view(), start, size).iter().filter(|&&voxel| voxel).count();
                if best.is_none_or(|(_, least)| repeated < least) {
                    best = Some((start, repeated));
                }
                if repeated == 0 {
                    break;
                }
            }
            let Some((start, repeated)) = best else { break };
            let gained = volume - repeated;
            let near = target.is_some_and(|target| (target - covered as f64) < 0.5 * gained as f64);
            // Blocks centred on foreground may have none left to go to.
            annotation.exhausted = gained == 0;
            if near || gained == 0 {
                break;
            }
            covered += gained;
            blocks += 1;
            slice_mut(&mut taken, start, size, |voxels| voxels.fill(true));
            let content = block(dense, start, size);
            slice_mut(&mut annotation.labels, start, size, |voxels| voxels.assign(&content));
            strokes_of_planes(content.axis_iter(Axis(0)), ignore, &mut annotation.strokes);
        }
        annotation
    }

    fn place(
        &self,
        shape: [usize; 3],
        size: [usize; 3],
        foreground: &[[usize; 3]],
        random: &mut ChaCha8Rng,
    ) -> [usize; 3] {
        if !foreground.is_empty() && random.random_bool(self.foreground) {
            let centre = foreground[random.random_range(0..foreground.len())];
            return std::array::from_fn(|a| centre[a].saturating_sub(size[a] / 2).min(shape[a] - size[a]));
        }
        std::array::from_fn(|axis| random.random_range(0..=shape[axis] - size[axis]))
    }
}

/// How many blocks of a pooled budget each case gets.
pub(super) fn pool(blocks: &Blocks, fraction: f64, shapes: &[[usize; 3]], random: &mut ChaCha8Rng) -> Vec<usize> {
    let voxels = |extent: &[usize; 3]| extent.iter().product::<usize>() as f64;
    let mut rest = fraction * shapes.iter().map(voxels).sum::<f64>();
    let mut counts = vec![0; shapes.len()];
    while !shapes.is_empty() {
        let case = random.random_range(0..shapes.len());
        let block = voxels(&blocks.fitted(shapes[case]));
        if rest < 0.5 * block {
            break;
        }
        rest -= block;
        counts[case] += 1;
    }
    counts
}

fn block<T>(volume: ArrayView3<T>, start: [usize; 3], size: [usize; 3]) -> ArrayView3<T> {
    let mut volume = volume;
    for axis in 0..3 {
        volume.slice_axis_inplace(Axis(axis), Slice::from(start[axis]..start[axis] + size[axis]));
    }
    volume
}

fn slice_mut<T>(
    volume: &mut Array3<T>,
    start: [usize; 3],
    size: [usize; 3],
    change: impl FnOnce(&mut ndarray::ArrayViewMut3<T>),
) {
    let mut view = volume.view_mut();
    for axis in 0..3 {
        view.slice_axis_inplace(Axis(axis), Slice::from(start[axis]..start[axis] + size[axis]));
    }
    change(&mut view);
}
