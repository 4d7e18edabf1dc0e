//! Overlapping regions on a GPU, see [`super::cube`]. Regions of a voxel have nothing to exchange.

use super::cube::*;
use super::plan::LossPlan;
use super::sigmoid::sigmoid;
use super::walk::*;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

/// Which regions of a vector a label belongs to.
#[cube]
fn inside<V: Size>(grid: &LevelGrid, label: u32, vector: usize, #[comptime] plan: LossPlan) -> Vector<bool, V> {
    // The last vector of a unit may lie behind the last region.
    let first = vector.min(comptime!(plan.vectors() - 1)) * plan.vector;
    let word = grid.regions[label as usize * comptime!(plan.classes.div_ceil(32)) + first / 32];
    let mut bits = Vector::<u32, V>::empty();
    #[unroll]
    for lane in 0..plan.vector {
        bits.insert(lane, (word >> ((first % 32 + lane) as u32)) & 1u32);
    }
    bits.equal(&Vector::new(1u32))
}

/// Which regions of a vector were annotated in the sample.
#[cube]
fn takes_part<V: Size>(grid: &LevelGrid, place: &Place, vector: usize, #[comptime] plan: LossPlan) -> Vector<bool, V> {
    let mut part = Vector::<u32, V>::new(1u32);
    if comptime!(plan.missing) {
        let first = vector.min(comptime!(plan.vectors() - 1)) * plan.vector;
        let acting = place.sample * comptime!(plan.classes + 1) + first;
        #[unroll]
        for lane in 0..plan.vector {
            part.insert(lane, u32::cast_from(grid.acting[acting + lane] == (first + lane) as u32));
        }
    }
    part.equal(&Vector::new(1u32))
}

/// Pass 1: a row of partial sums of every chunk, see [`LossPlan::slots`].
#[cube(launch)]
pub(super) fn cube_sigmoid_sums_kernel<E: Float, L: Int, W: Numeric, V: Size>(
    logits: &Sequence<Box<[Vector<E, V>]>>,
    labels: &[L],
    weights: &[W],
    grid: &LevelGrid,
    sums: &mut [f32],
    #[comptime] plan: LossPlan,
    #[define(E)] _logit_type: ElemType,
    #[define(L)] _label_type: ElemType,
    #[define(W)] _weight_type: ElemType,
) {
    let mut rows = Shared::<[f32]>::new_slice(comptime!(plan.teams() * plan.shared_row()));
    let (team, member) = my_team(plan);
    let place = my_chunk(grid, plan);
    let zero = Vector::<f32, V>::new(0.0f32);
    let mut values = Array::<Vector<f32, V>>::new(plan.mine());
    let mut p_sums = Array::<Vector<f32, V>>::new(plan.mine());
    let mut hits = Array::<Vector<f32, V>>::new(plan.mine());
    let mut truth = Array::<Vector<f32, V>>::new(plan.mine());
    let mut entropies = Array::<Vector<f32, V>>::new(plan.mine());
    let mut weight_sum = 0.0f32;
    for step in 0..steps(&place, plan) {
        let voxel = place.start + step * plan.teams() + team;
        let (label, weight) = read_voxel::<L, W>(labels, weights, grid, &place, voxel, plan);
        if label < comptime!(plan.labels as u32) {
            weight_sum += weight;
            let weight = Vector::<f32, V>::new(weight);
            let first = (place.before + voxel) * plan.vectors();
            load_mine::<E, V>(logits, place.level, first, member, &mut values, plan);
            #[unroll]
            for k in 0..plan.mine() {
                let z = values[k];
                let inside = inside::<V>(grid, label, my_vector(member, k, plan), plan);
                let (p, _slope, one_plus) = sigmoid::<V>(z);
                if comptime!(plan.entropy) {
                    let positive = select_many(z.greater_than(&zero), z, zero);
                    entropies[k] += (positive - select_many(inside, z, zero) + one_plus.ln()) * weight;
                }
                if comptime!(plan.dice) {
                    let p = p * weight;
                    p_sums[k] += p;
                    hits[k] += select_many(inside, p, zero);
                    truth[k] += select_many(inside, weight, zero);
                }
            }
        }
    }
    // Here and not for every voxel: the sums of other regions do not depend on what a missing one holds.
    #[unroll]
    for k in 0..plan.mine() {
        let part = takes_part::<V>(grid, &place, my_vector(member, k, plan), plan);
        p_sums[k] = select_many(part, p_sums[k], zero);
        hits[k] = select_many(part, hits[k], zero);
        truth[k] = select_many(part, truth[k], zero);
        entropies[k] = select_many(part, entropies[k], zero);
    }
    if comptime!(plan.dice) {
        write_sums::<V>(&p_sums, &mut rows, sums, grid, 0usize, plan);
        write_sums::<V>(&hits, &mut rows, sums, grid, plan.hits(), plan);
        write_sums::<V>(&truth, &mut rows, sums, grid, plan.truth(), plan);
    }
    if comptime!(plan.entropy) {
        write_sums::<V>(&entropies, &mut rows, sums, grid, plan.entropies(), plan);
    }
    sync_cube();
    if member == 0 {
        rows[team] = weight_sum;
    }
    add_rows(&mut rows, 1usize, plan);
    write_cube_row(&rows, sums, grid, plan.weight(), 1usize, plan);
}

/// Pass 3: the gradient, see [`TAIL`](super::plan::TAIL) and what the threads' kernel computes. A gradient may be the
/// memory of its logits: a unit reads its channels before it writes them.
#[cube(launch)]
pub(super) fn cube_sigmoid_gradient_kernel<E: Float, L: Int, W: Numeric, V: Size>(
    logits: &Sequence<Box<[Vector<E, V>]>>,
    labels: &[L],
    weights: &[W],
    grid: &LevelGrid,
    coefficients: &[f32],
    gradients: &mut Sequence<Box<[Vector<E, V>]>>,
    #[comptime] plan: LossPlan,
    #[define(E)] _logit_type: ElemType,
    #[define(L)] _label_type: ElemType,
    #[define(W)] _weight_type: ElemType,
) {
    let (team, member) = my_team(plan);
    let place = my_chunk(grid, plan);
    let zero = Vector::<f32, V>::new(0.0f32);
    let one = Vector::<f32, V>::new(1.0f32);
    let of_level = coefficients_at(grid.batch, place.level, plan);
    let dice = of_level + place.sample * comptime!(2 * plan.classes);
    let mut a = Array::<Vector<f32, V>>::new(plan.mine());
    let mut b = Array::<Vector<f32, V>>::new(plan.mine());
    if comptime!(plan.dice) {
        #[unroll]
        for k in 0..plan.mine() {
            let vector = my_vector(member, k, plan);
            let mut a_of = Vector::<f32, V>::new(0.0f32);
            let mut b_of = Vector::<f32, V>::new(0.0f32);
            if exists(vector, k, plan) {
                #[unroll]
                for lane in 0..plan.vector {
                    let at = dice + (vector * plan.vector + lane) * 2;
                    a_of.insert(lane, coefficients[at]);
                    b_of.insert(lane, coefficients[at + 1]);
                }
            }
            a[k] = a_of;
            b[k] = b_of;
        }
    }
    let mut entropy = 0.0f32;
    if comptime!(plan.entropy) {
        entropy = coefficients[of_level + 2 * grid.batch * plan.classes];
    }

    let mut values = Array::<Vector<f32, V>>::new(plan.mine());
    for step in 0..steps(&place, plan) {
        let voxel = place.start + step * plan.teams() + team;
        if voxel < place.end {
            let (label, weight) = read_voxel::<L, W>(labels, weights, grid, &place, voxel, plan);
            let first = (place.before + voxel) * plan.vectors();
            if label < comptime!(plan.labels as u32) {
                load_mine::<E, V>(logits, place.level, first, member, &mut values, plan);
                #[unroll]
                for k in 0..plan.mine() {
                    let vector = my_vector(member, k, plan);
                    let inside = inside::<V>(grid, label, vector, plan);
                    let (p, slope, _one_plus) = sigmoid::<V>(values[k]);
                    let mut g = Vector::<f32, V>::new(0.0f32);
                    if comptime!(plan.dice) {
                        g = slope * (b[k] + select_many(inside, a[k], zero));
                    }
                    if comptime!(plan.entropy) {
                        g += Vector::new(entropy) * (p - select_many(inside, one, zero));
                    }
                    g *= Vector::new(weight);
                    if comptime!(plan.missing) {
                        g = select_many(takes_part::<V>(grid, &place, vector, plan), g, zero);
                    }
                    values[k] = g;
                }
            } else {
                #[unroll]
                for k in 0..plan.mine() {
                    values[k] = Vector::new(0.0f32);
                }
            }
            store_mine::<E, V>(gradients, place.level, first, member, &values, plan);
        }
    }
}
