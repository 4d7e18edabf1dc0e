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
    /// Finds the components of a mask (z, y, x), in 4 bytes a voxel and, for the scattered masks that need the most, 2 more.
    pub fn of(mask: ArrayView3<bool>) -> Self {
        let (mut numbers, mut parents) = provisional(mask);
        let mut sizes = Vec::new();
        // A part's parent comes before it, and has its final number by then.
        for part in 1..parents.len() {
            let parent = parents[part] as usize;
            parents[part] = if parent == part {
                sizes.push(0);
                sizes.len() as u32
            } else {
                parents[parent]
            };
        }
        for number in numbers.iter_mut().filter(|number| **number != 0) {
            *number = parents[*number as usize];
            sizes[*number as usize - 1] += 1;
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

/// The number of a part for every voxel of a mask, 0 outside, and for every part one before it of the same component; the
/// first of a component is its own. Voxels come in their order, and a part begins where none before has a neighbour.
fn provisional(mask: ArrayView3<bool>) -> (Array3<u32>, Vec<u32>) {
    let (_, height, width) = mask.dim();
    let mut numbers = Array3::<u32>::zeros(mask.dim());
    let mut parents = vec![0];
    let around = |at: usize, length: usize| at.saturating_sub(1)..(at + 2).min(length);
    for (voxel, _) in mask.indexed_iter().filter(|(_, inside)| **inside) {
        let (z, y, x) = voxel;
        let mut number = 0;
        for z in z.saturating_sub(1)..=z {
            for y in around(y, height) {
                for x in around(x, width) {
                    if (z, y, x) < voxel && numbers[(z, y, x)] != 0 {
                        let other = first_part(&mut parents, numbers[(z, y, x)]);
                        number = match number {
                            0 => other,
                            number => {
                                parents[number.max(other) as usize] = number.min(other);
                                number.min(other)
                            }
                        };
                    }
                }
            }
        }
        if number == 0 {
            number = parents.len() as u32;
            parents.push(number);
        }
        numbers[voxel] = number;
    }
    (numbers, parents)
}

/// The first part of a part's component. The way there is shortened for those who come after.
fn first_part(parents: &mut [u32], mut part: u32) -> u32 {
    while parents[part as usize] != part {
        let next = parents[parents[part as usize] as usize];
        parents[part as usize] = next;
        part = next;
    }
    part
}
