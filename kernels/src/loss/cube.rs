//! On a GPU a cube takes a chunk, a team of its units a voxel, and a unit some of the voxel's channels, which it keeps in
//! registers: so each logit is read once, neighbouring units read neighbouring vectors of channels, and nothing is
//! stored for a voxel. What the channels of a voxel share is exchanged through shared memory, and so are the sums of the
//! teams added up: a chunk leaves one row.
//!
//! Barriers are the same for all units of a cube: voxels that do not exist or do not count take part in them.

use super::plan::LossPlan;
use super::walk::*;
use cubecl::prelude::*;

/// This unit's team, and its place in it.
#[cube]
pub(super) fn my_team(#[comptime] plan: LossPlan) -> (usize, usize) {
    let unit = UNIT_POS as usize;
    (unit / plan.team, unit % plan.team)
}

/// This cube's chunk. Cubes behind the last chunk get an empty one.
#[cube]
pub(super) fn my_chunk(grid: &LevelGrid, #[comptime] plan: LossPlan) -> Place {
    let mut place = chunk_place(grid, CUBE_POS.min(grid.chunks - 1), plan);
    place.end = select(CUBE_POS < grid.chunks, place.end, place.start);
    place
}

/// Voxels that each team of this cube walks over.
#[cube]
pub(super) fn steps(place: &Place, #[comptime] plan: LossPlan) -> usize {
    (place.end - place.start).div_ceil(comptime!(plan.teams()))
}

/// Label and weight of a voxel, which may lie behind the end of the chunk and then does not count.
#[cube]
pub(super) fn read_voxel<L: Int, W: Numeric>(
    labels: &[L],
    weights: &[W],
    grid: &LevelGrid,
    place: &Place,
    voxel: usize,
    #[comptime] plan: LossPlan,
) -> (u32, f32) {
    let mut label = comptime!(plan.labels as u32).runtime();
    let mut weight = 0.0f32;
    if voxel < place.end {
        let (labels, weights) = read_group::<L, W, Const<1>>(labels, weights, grid, place, voxel, plan);
        label = labels.extract(0usize);
        weight = weights.extract(0usize);
    }
    (label, weight)
}

/// The `k`-th vector of this unit, counted in the voxel. Units of a team take turns.
#[cube]
pub(super) fn my_vector(member: usize, #[comptime] k: usize, #[comptime] plan: LossPlan) -> usize {
    comptime!(k * plan.team) + member
}

/// Whether a vector of this unit has channels: of the last ones some lie behind the last channel.
#[cube]
pub(super) fn exists(vector: usize, #[comptime] k: usize, #[comptime] plan: LossPlan) -> bool {
    if comptime!((k + 1) * plan.team <= plan.vectors()) { true.runtime() } else { vector < comptime!(plan.vectors()) }
}

/// Reads this unit's channels of a voxel in f32; where there are none, the least number. `first` is the voxel's first
/// vector.
#[cube]
pub(super) fn load_mine<E: Float, V: Size>(
    logits: &Sequence<Box<[Vector<E, V>]>>,
    level: usize,
    first: usize,
    member: usize,
    values: &mut Array<Vector<f32, V>>,
    #[comptime] plan: LossPlan,
) {
    #[unroll]
    for candidate in 0..plan.levels {
        if comptime!(plan.levels == 1) || level == candidate {
            let buffer = &logits[candidate];
            #[unroll]
            for k in 0..plan.mine() {
                let vector = my_vector(member, k, plan);
                let mut z = Vector::<f32, V>::new(f32::MIN);
                if exists(vector, k, plan) {
                    z = Vector::cast_from(buffer[first + vector]);
                }
                values[k] = z;
            }
        }
    }
}

/// Writes this unit's channels of a voxel.
#[cube]
pub(super) fn store_mine<E: Float, V: Size>(
    gradients: &mut Sequence<Box<[Vector<E, V>]>>,
    level: usize,
    first: usize,
    member: usize,
    values: &Array<Vector<f32, V>>,
    #[comptime] plan: LossPlan,
) {
    #[unroll]
    for candidate in 0..plan.levels {
        if comptime!(plan.levels == 1) || level == candidate {
            let buffer = &mut gradients[candidate];
            #[unroll]
            for k in 0..plan.mine() {
                let vector = my_vector(member, k, plan);
                if exists(vector, k, plan) {
                    buffer[first + vector] = Vector::cast_from(values[k]);
                }
            }
        }
    }
}

/// Adds up the rows of `len` values of all teams. Their sums are then in the first one.
#[cube]
pub(super) fn add_rows(rows: &mut [f32], #[comptime] len: usize, #[comptime] plan: LossPlan) {
    sync_cube();
    #[unroll]
    for halving in 0..comptime!(plan.teams().ilog2() as usize) {
        let half = comptime!((plan.teams() >> (halving + 1)) * len);
        for i in range_stepped(UNIT_POS as usize, half, plan.walkers) {
            let other = rows[i + half];
            rows[i] += other;
        }
        sync_cube();
    }
}

/// Adds the values that all units have for their channels up, and writes the sums to this chunk's row from `slot` on.
#[cube]
pub(super) fn write_sums<V: Size>(
    values: &Array<Vector<f32, V>>,
    rows: &mut [f32],
    sums: &mut [f32],
    grid: &LevelGrid,
    #[comptime] slot: usize,
    #[comptime] plan: LossPlan,
) {
    let channels = comptime!(plan.classes);
    let (team, member) = my_team(plan);
    // What was in the rows before has been read.
    sync_cube();
    #[unroll]
    for k in 0..plan.mine() {
        let vector = my_vector(member, k, plan);
        if exists(vector, k, plan) {
            #[unroll]
            for lane in 0..V::value() {
                rows[team * channels + vector * V::value() + lane] = values[k].extract(lane);
            }
        }
    }
    add_rows(rows, channels, plan);
    write_cube_row(&*rows, sums, grid, slot, channels, plan);
}

/// Writes `len` values to this chunk's row from `slot` on.
#[cube]
pub(super) fn write_cube_row(
    values: &[f32],
    sums: &mut [f32],
    grid: &LevelGrid,
    #[comptime] slot: usize,
    #[comptime] len: usize,
    #[comptime] plan: LossPlan,
) {
    if CUBE_POS < grid.chunks {
        let row = CUBE_POS * plan.slots() + slot;
        for i in range_stepped(UNIT_POS as usize, len, plan.walkers) {
            sums[row + i] = values[i];
        }
    }
}
