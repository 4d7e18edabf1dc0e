//! What a device can do, read once when it is opened. Plans are chosen from this and nothing else.

use cubecl::features::{Plane, TypeUsage};
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::Client;

/// One shape of matrix product that the device's tensor cores take: `[m, k] x [k, n]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorCoreTile {
    /// Element type of both factors.
    pub input: ElemType,
    /// Element type of the sum.
    pub accumulator: ElemType,
    /// Rows of the product.
    pub m: u32,
    /// Columns of the product.
    pub n: u32,
    /// Length of the sums.
    pub k: u32,
    /// Units of the plane that computes a product together, if all planes have the same width.
    pub units: Option<u32>,
}

/// The properties of a device that plans depend on.
#[derive(Clone, Debug, PartialEq)]
pub struct Caps {
    /// Number of cores on CubeCL's CPU runtime, `None` on a GPU.
    pub cores: Option<u32>,
    /// f32 lanes that one vector load or register holds (8 with AVX2, 4 on a GPU).
    pub lanes: usize,
    /// Vector registers of a CPU core; a GPU's registers are counted as 64.
    pub registers: usize,
    /// Width of a plane (warp, subgroup) if plane operations are offered.
    pub plane: Option<u32>,
    /// Bytes of shared memory a cube may use: 0 where CubeCL's compiler cannot be relied on for it.
    pub shared_memory: usize,
    /// Largest number of units in a cube.
    pub max_units: u32,
    /// Largest number of cubes along x and y.
    pub max_cubes: [u32; 2],
    /// Bytes of the largest single buffer.
    pub max_buffer: u64,
    /// Bytes of the device's memory, where the runtime tells.
    pub memory: Option<u64>,
    /// f16 can be stored and computed with.
    pub f16: bool,
    /// bf16 can be stored and computed with.
    pub bf16: bool,
    /// The matrix products of the device's tensor cores.
    pub tensor_cores: Vec<TensorCoreTile>,
}

impl Caps {
    /// Asks the device behind `client`.
    pub fn of(client: &Client) -> Self {
        let (properties, features) = (client.properties(), client.features());
        let hardware = &properties.hardware;
        let has = |kind| {
            let usage = features.type_usage(ElemType::Float(kind));
            usage.contains(TypeUsage::Arithmetic) && usage.contains(TypeUsage::Buffer)
        };
        let tensor_cores = features
            .matmul
            .cmma
            .iter()
            .filter(|tile| tile.a_type == tile.b_type)
            .map(|tile| TensorCoreTile {
                input: tile.a_type,
                accumulator: tile.cd_type,
                m: tile.m,
                n: tile.n,
                k: tile.k,
                units: (hardware.plane_size_min == hardware.plane_size_max).then_some(hardware.plane_size_max),
            })
            .collect();
        let plane = features.plane.contains(Plane::Ops).then_some(hardware.plane_size_max);
        // CubeCL 0.11.3's SPIR-V for shared memory is wrong where the driver lacks explicit layouts of it. Of those in
        // use that are software drivers (which have no plane operations here), up to the version that brought them
        // cooperative matrices too.
        let shared_memory = plane.is_some() || !features.matmul.cmma.is_empty() || hardware.num_cpu_cores.is_some();
        Self {
            cores: hardware.num_cpu_cores,
            lanes: (hardware.load_width as usize / 32).max(1),
            registers: hardware.vector_register_count.unwrap_or(64) as usize,
            plane,
            shared_memory: if shared_memory { hardware.max_shared_memory_size } else { 0 },
            max_units: hardware.max_units_per_cube,
            max_cubes: [hardware.max_cube_count.0, hardware.max_cube_count.1],
            max_buffer: properties.memory.max_page_size,
            memory: properties.memory.max_memory(),
            f16: has(FloatKind::F16),
            // The CPU runtime says so on every machine.
            bf16: has(FloatKind::BF16) && (hardware.num_cpu_cores.is_none() || crate::bf16::on_cpu()),
            tensor_cores,
        }
    }

    /// Units of one cube of a kernel whose units do not talk to each other: one a core on the CPU
    /// runtime, where units are threads.
    pub fn cube_units(&self) -> u32 {
        self.cores.unwrap_or(64.min(self.max_units))
    }

    /// Number of units to spread `items` equal pieces of memory-bound work over: the cores on the CPU,
    /// and on a GPU enough that each unit has about `items_per_unit`.
    pub fn strips(&self, items: usize, items_per_unit: usize) -> usize {
        match self.cores {
            Some(cores) => cores as usize,
            None => items.div_ceil(items_per_unit.max(1)).clamp(1, 1 << 20),
        }
    }

    /// The widest vector of f32 that divides a number of channels and that the device loads at once.
    pub fn widest_vector(&self, channels: usize) -> usize {
        let mut lanes = self.lanes.next_power_of_two();
        while !channels.is_multiple_of(lanes) {
            lanes /= 2;
        }
        lanes
    }
}
