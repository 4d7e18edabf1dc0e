//! How a matrix product is divided into blocks, planes and products of the tensor cores.

use crate::conv3d::gather::Gather;
use crate::{Caps, Dtype, KernelError};
use cubecl::prelude::*;

/// Elements between the end of a row in shared memory and the next: rows then begin in different banks. Loads into tensor
/// cores need rows at multiples of 8 elements.
pub(super) const SKEW: usize = 8;
/// Products along the sums between two barriers.
pub(super) const STEPS: usize = 2;

/// How a cube's planes, and a plane's products, lie in a block; at most, where rows or columns are few.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    planes: [usize; 2],
    /// Products of a plane along the columns. Along the rows there are as many as make `products` of them, up to
    /// [`MOST_ROWS`]: a factor in registers then serves several products also where columns are few.
    columns: usize,
    products: usize,
}

/// Rows are voxels, of which there are always enough. The f32 sums of 8 products of 16 x 16 take 64 registers of each unit
/// of a warp.
pub(super) const VOXELS_BY_CHANNELS: Layout = Layout { planes: [4, 1], columns: 4, products: 8 };
/// Rows are channels as columns are.
pub(super) const CHANNELS_BY_CHANNELS: Layout = Layout { planes: [2, 2], columns: 2, products: 4 };

/// Products of a plane along the rows, at most.
pub(super) const MOST_ROWS: usize = 4;

/// What is compiled into one instance of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BlockPlan {
    /// The product `[m, k] x [k, n]` of the tensor cores.
    pub m: usize,
    pub n: usize,
    pub k: usize,
    /// Units of a plane, and planes of a cube along rows and columns of a block.
    pub plane: usize,
    pub planes: [usize; 2],
    /// Products of one plane along rows and columns of a block.
    pub fragments: [usize; 2],
    /// Length of the sums between two barriers, a multiple of `k`.
    pub depth: usize,
}

impl BlockPlan {
    /// The plan for a matrix product of `rows x depth x columns` in storage type `dtype`, `None` where tensor cores cannot
    /// or should not be used:
    /// * the type is f32, or the device lists no product of this type with f32 sums, or no single width of a plane;
    /// * a block would not fit into shared memory or into a cube;
    /// * fewer than half of a tile's columns, or of a step of its sums, would be filled (one-channel images, a head of two
    ///   classes): most of the work would be on zeros.
    ///
    /// A length that may be anything (voxels) is given as `usize::MAX`.
    pub(super) fn choose(
        caps: &Caps,
        dtype: Dtype,
        layout: Layout,
        rows: usize,
        depth: usize,
        columns: usize,
    ) -> Option<Self> {
        if !matches!(dtype, Dtype::F16 | Dtype::Bf16) {
            return None;
        }
        let filled = |length: usize, tile: u32| length >= (tile as usize).div_ceil(2);
        let tile = (caps.tensor_cores.iter())
            .filter(|tile| tile.input == dtype.elem() && tile.accumulator == Dtype::F32.elem())
            .filter(|tile| filled(rows, tile.m) && filled(depth, tile.k) && filled(columns, tile.n))
            // The largest, and of equal ones the square: it needs the fewest loads.
            .max_by_key(|tile| (tile.m * tile.n * tile.k, tile.m.min(tile.n), tile.m))?;
        let [m, n, k] = [tile.m, tile.n, tile.k].map(|length| length as usize);
        let along_columns = columns.div_ceil(layout.planes[1] * n).min(layout.columns);
        let along_rows = rows.div_ceil(layout.planes[0] * m).min(layout.products / along_columns).min(MOST_ROWS);
        let plan = Self {
            m,
            n,
            k,
            plane: tile.units? as usize,
            planes: layout.planes,
            fragments: [along_rows, along_columns],
            depth: STEPS * k,
        };
        let fits = plan.shared_bytes(dtype.size()) <= caps.shared_memory && plan.units() <= caps.max_units as usize;
        fits.then_some(plan)
    }

    /// The plan for sums over the gathered channels of up to two inputs, for `results` channels.
    pub fn gather(caps: &Caps, dtype: Dtype, gathered: [usize; 2], results: usize) -> Option<Self> {
        Self::choose(caps, dtype, VOXELS_BY_CHANNELS, usize::MAX, gathered[0].max(gathered[1]), results)
    }

    /// The plan for sums over voxels, for pairs of `rows` and `columns` channels.
    pub fn weights(caps: &Caps, dtype: Dtype, rows: usize, columns: usize) -> Option<Self> {
        Self::choose(caps, dtype, CHANNELS_BY_CHANNELS, rows, usize::MAX, columns)
    }

    /// The plan of an operation that gathers.
    pub fn of(gather: &Gather, caps: &Caps) -> Option<Self> {
        Self::gather(caps, gather.input.dtype(), gather.gathered(), gather.channels_out)
    }

    /// Rows of a block.
    pub fn rows(&self) -> usize {
        self.planes[0] * self.fragments[0] * self.m
    }

    /// Blocks that cover `rows` rows.
    pub fn row_blocks(&self, rows: usize) -> usize {
        rows.div_ceil(self.rows())
    }

    /// Columns of a block.
    pub fn columns(&self) -> usize {
        self.planes[1] * self.fragments[1] * self.n
    }

    /// Units of a cube.
    pub fn units(&self) -> usize {
        self.plane * self.planes[0] * self.planes[1]
    }

    /// The cube: a plane a row.
    pub fn cube(&self) -> CubeDim {
        CubeDim::new_2d(self.plane as u32, (self.planes[0] * self.planes[1]) as u32)
    }

    /// Elements from row to row of the left factor in shared memory: its rows, or those of its transpose.
    pub(super) fn left_stride(&self, transposed: bool) -> usize {
        SKEW + if transposed { self.rows() } else { self.depth }
    }

    /// Elements of the left factor in shared memory.
    pub(super) fn left_len(&self, transposed: bool) -> usize {
        self.left_stride(transposed) * if transposed { self.depth } else { self.rows() }
    }

    pub(super) fn right_stride(&self) -> usize {
        self.columns() + SKEW
    }

    pub(super) fn right_len(&self) -> usize {
        self.depth * self.right_stride()
    }

    /// Sums on their way out: one product for each plane.
    pub(super) fn staging_len(&self) -> usize {
        self.planes[0] * self.planes[1] * self.m * self.n
    }

    /// Whether the units of a block can merge what each knows of its column: a unit stores values of one column of a product
    /// only, and what three numbers of every unit need fits into the place of the sums on their way out.
    pub fn merges_columns(&self) -> bool {
        self.plane.is_multiple_of(self.n) && 3 * self.units() <= self.staging_len()
    }

    pub(super) fn shared_bytes(&self, size: usize) -> usize {
        let left = self.left_len(false).max(self.left_len(true));
        let positions = self.rows().max(self.depth);
        (left + self.right_len()) * size + (self.staging_len() + positions) * 4
    }
}

/// 16-bit elements of a vector that loads from global memory and stores into shared memory move at once: as many as the
/// device loads, up to the 8 that all strides in shared memory are multiples of.
pub(crate) fn load_lanes(caps: &Caps, channels: &[usize]) -> usize {
    let mut lanes = (2 * caps.lanes.next_power_of_two()).min(SKEW);
    while channels.iter().any(|channels| !channels.is_multiple_of(lanes)) {
        lanes /= 2;
    }
    lanes
}

/// Of an operation on a route that its device cannot go.
pub(super) const NO_TENSOR_CORES: KernelError =
    KernelError::Unsupported { operation: "convolution", feature: "tensor cores for this operation" };

#[cfg(test)]
mod tests {
    use super::*;
    use crate::TensorCoreTile;

    fn caps(tiles: &[(Dtype, Dtype, [u32; 3])], units: Option<u32>) -> Caps {
        let tensor_cores = tiles
            .iter()
            .map(|&(input, sum, [m, n, k])| TensorCoreTile {
                input: input.elem(),
                accumulator: sum.elem(),
                m,
                n,
                k,
                units,
            })
            .collect();
        Caps {
            cores: None,
            lanes: 4,
            registers: 64,
            plane: Some(32),
            shared_memory: 48 << 10,
            max_units: 1024,
            max_cubes: [65535; 2],
            max_buffer: 1 << 30,
            memory: None,
            f16: true,
            bf16: true,
            tensor_cores,
        }
    }

    #[test]
    fn the_square_tile_of_the_type_is_taken() {
        let (f16, bf16, f32) = (Dtype::F16, Dtype::Bf16, Dtype::F32);
        let tiles = [
            (f16, f16, [16, 16, 16]),
            (f16, f32, [32, 8, 16]),
            (f16, f32, [16, 16, 16]),
            (f16, f32, [8, 32, 16]),
            (bf16, f32, [8, 32, 16]),
        ];
        let caps = caps(&tiles, Some(32));
        let plan = BlockPlan::choose(&caps, f16, VOXELS_BY_CHANNELS, usize::MAX, 32, 32).unwrap();
        assert_eq!([plan.m, plan.n, plan.k], [16; 3]);
        assert_eq!((plan.rows(), plan.columns(), plan.units(), plan.depth), (256, 32, 128, 32));
        let wide = BlockPlan::choose(&caps, f16, VOXELS_BY_CHANNELS, usize::MAX, 320, 320).unwrap();
        assert_eq!((wide.rows(), wide.columns(), wide.units(), wide.depth), (128, 64, 128, 32));
        assert_eq!(BlockPlan::choose(&caps, bf16, VOXELS_BY_CHANNELS, usize::MAX, 32, 32).unwrap().m, 8);
        assert_eq!(BlockPlan::choose(&caps, f32, VOXELS_BY_CHANNELS, usize::MAX, 32, 32), None);
    }

    #[test]
    fn what_would_be_mostly_zeros_is_left_to_the_direct_kernel() {
        let caps = caps(&[(Dtype::F16, Dtype::F32, [16, 16, 16])], Some(32));
        let choose =
            |depth, columns| BlockPlan::choose(&caps, Dtype::F16, VOXELS_BY_CHANNELS, usize::MAX, depth, columns);
        assert!(choose(8, 8).is_some() && choose(9, 24).is_some());
        assert_eq!((choose(1, 32), choose(7, 32), choose(32, 2), choose(32, 7)), (None, None, None, None));
        let weights =
            |rows, columns| BlockPlan::choose(&caps, Dtype::F16, CHANNELS_BY_CHANNELS, rows, usize::MAX, columns);
        assert_eq!(weights(4, 32), None);
        let block = |plan: BlockPlan| (plan.rows(), plan.columns());
        assert_eq!((weights(32, 64).map(block), weights(320, 320).map(block)), (Some((32, 64)), Some((64, 64))));
        assert_eq!((weights(128, 32).map(block), weights(64, 32).map(block)), (Some((128, 32)), Some((64, 32))));
    }

    #[test]
    fn devices_without_one_plane_width_or_memory_have_no_plan() {
        let tile = [(Dtype::F16, Dtype::F32, [16, 16, 16])];
        assert_eq!(BlockPlan::choose(&caps(&tile, None), Dtype::F16, VOXELS_BY_CHANNELS, usize::MAX, 32, 32), None);
        let small = Caps { shared_memory: 4 << 10, ..caps(&tile, Some(32)) };
        assert_eq!(BlockPlan::choose(&small, Dtype::F16, VOXELS_BY_CHANNELS, usize::MAX, 32, 32), None);
        assert_eq!(BlockPlan::choose(&caps(&[], Some(32)), Dtype::F16, VOXELS_BY_CHANNELS, usize::MAX, 32, 32), None);
    }
}
