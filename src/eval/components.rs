//! Connected components of a mask. Voxels are connected through faces, edges and corners (26 neighbours), as in nnU-Net's
//! postprocessing.

use ndarray::{Array3, ArrayView3};

/// The components of a mask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Components {
    /// For every voxel (z, y, x) the number of its component, from 1 in the order of their first voxels; 0 outside.
    pub numbers: Array3<u32>,
    /// Voxels of each component, number 1 first.
    pub sizes: Vec<u64>,
}

impl Components {
    /// Finds the components of a mask (z, y, x).
    pub fn of(mask: ArrayView3<bool>) -> Self {
        let (depth, height, width) = mask.dim();
        let mut numbers = Array3::<u32>::zeros(mask.dim());
        let mut sizes = Vec::new();
        let mut pending = Vec::new();
        let around = |at: usize, length: usize| at.saturating_sub(1)..(at + 2).min(length);
        for (seed, &inside) in mask.indexed_iter() {
            if !inside || numbers[seed] != 0 {
                continue;
            }
            let number = sizes.len() as u32 + 1;
            let mut size = 0;
            numbers[seed] = number;
            pending.push(seed);
            while let Some((z, y, x)) = pending.pop() {
                size += 1;
                for z in around(z, depth) {
                    for y in around(y, height) {
                        for x in around(x, width) {
                            let neighbour = (z, y, x);
                            if mask[neighbour] && numbers[neighbour] == 0 {
                                numbers[neighbour] = number;
                                pending.push(neighbour);
                            }
                        }
                    }
                }
            }
            sizes.push(size);
        }
        Components { numbers, sizes }
    }

    /// Voxels of the largest component; 0 if there is none.
    pub fn largest(&self) -> u64 {
        self.sizes.iter().copied().max().unwrap_or(0)
    }

    /// Whether each component, by its number, is smaller than the largest one; the outside is not.
    pub(super) fn smaller(&self) -> Vec<bool> {
        let largest = self.largest();
        std::iter::once(false).chain(self.sizes.iter().map(|&size| size < largest)).collect()
    }

    /// The voxel (z, y, x) of the largest component, of the first one if several are, that is nearest to its centre of
    /// mass; `None` without components.
    pub fn middle_of_largest(&self) -> Option<[usize; 3]> {
        let largest = self.largest();
        let number = self.sizes.iter().position(|&size| size == largest)? as u32 + 1;
        let voxels = || self.numbers.indexed_iter().filter(|(_, n)| **n == number).map(|((z, y, x), _)| [z, y, x]);
        let sums = voxels().fold([0.0; 3], |sums, voxel| std::array::from_fn(|axis| sums[axis] + voxel[axis] as f64));
        let centre = sums.map(|sum| sum / largest as f64);
        let square = |voxel: &[usize; 3]| (0..3).map(|axis| (voxel[axis] as f64 - centre[axis]).powi(2)).sum::<f64>();
        voxels().min_by(|a, b| square(a).total_cmp(&square(b)))
    }
}
