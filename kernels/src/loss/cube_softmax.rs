//! Exclusive labels on a GPU, see [`super::cube`].

use super::cube::*;
use super::plan::LossPlan;
use super::softmax::entropy_weight;
use super::walk::*;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

// What a unit knows of a voxel's channels, first its own, then those of the team.

/// The largest logit.
const TOP: usize = 0;
/// Sum of `exp(z - top)`.
const SUM: usize = 1;
/// Of the channels that stand for the background: the largest logit, and sum of `exp(z - that)`. Only where classes
/// are missing.
const BACK_TOP: usize = 2;
const BACK_SUM: usize = 3;
/// Sum of `exp(z - top)` times a class's Dice coefficients. Only for the gradient.
const DOT: usize = 4;
/// The label's logit, if it is this unit's.
const LABELLED: usize = 5;
/// `exp` of the largest logit of this unit minus that of the team.
const FACTOR: usize = 6;
const KNOWN: usize = 7;

/// The label that each of this unit's channels stands for in the sample: its own, or where it is missing the
/// background's. Channels that do not exist stand for no label.
#[cube]
fn my_labels(grid: &LevelGrid, place: &Place, member: usize, #[comptime] plan: LossPlan) -> Array<u32> {
    let mut stands_for = Array::<u32>::new(comptime!(plan.mine() * plan.vector));
    #[unroll]
    for k in 0..plan.mine() {
        let vector = my_vector(member, k, plan);
        #[unroll]
        for lane in 0..plan.vector {
            let class = vector * plan.vector + lane;
            let mut label = class as u32;
            if !exists(vector, k, plan) {
                label = u32::MAX;
            } else if comptime!(plan.missing) {
                label = grid.acting[place.sample * comptime!(plan.classes + 1) + class];
            }
            stands_for[comptime!(k * plan.vector + lane)] = label;
        }
    }
    stands_for
}

/// Whether the label's channel is this unit's.
#[cube]
fn owns(label: u32, member: usize, #[comptime] plan: LossPlan) -> bool {
    if comptime!(plan.team == 1) { true.runtime() } else { label as usize / plan.vector % plan.team == member }
}

/// From the logits of this unit's channels to `exp(z - top)`, and what else is known of them. Where classes are
/// missing, `z - top` is left in `shifted`.
#[cube]
fn exponentiate<V: Size>(
    values: &mut Array<Vector<f32, V>>,
    shifted: &mut Array<Vector<f32, V>>,
    known: &mut Array<f32>,
    stands_for: &Array<u32>,
    label: u32,
    member: usize,
    #[comptime] plan: LossPlan,
) {
    let mut top = f32::MIN.runtime();
    let mut labelled = 0.0f32;
    #[unroll]
    for k in 0..plan.mine() {
        #[unroll]
        for lane in 0..plan.vector {
            let z = values[k].extract(lane);
            let class = my_vector(member, k, plan) * plan.vector + lane;
            top = top.max(z);
            labelled = select(class as u32 == label, z, labelled);
        }
    }
    if comptime!(plan.missing) {
        let mut back_top = f32::MIN.runtime();
        let mut back_sum = 0.0f32;
        if label == 0 {
            #[unroll]
            for k in 0..plan.mine() {
                #[unroll]
                for lane in 0..plan.vector {
                    let stands = stands_for[comptime!(k * plan.vector + lane)] == 0;
                    back_top = select(stands, back_top.max(values[k].extract(lane)), back_top);
                }
            }
            #[unroll]
            for k in 0..plan.mine() {
                #[unroll]
                for lane in 0..plan.vector {
                    let stands = stands_for[comptime!(k * plan.vector + lane)] == 0;
                    back_sum += select(stands, (values[k].extract(lane) - back_top).exp(), 0.0f32);
                }
            }
        }
        known[BACK_TOP] = back_top;
        known[BACK_SUM] = back_sum;
    }
    let mut sum = Vector::<f32, V>::new(0.0f32);
    #[unroll]
    for k in 0..plan.mine() {
        let below = values[k] - Vector::new(top);
        if comptime!(plan.missing) {
            shifted[k] = below;
        }
        let e = below.exp();
        values[k] = e;
        sum += e;
    }
    known[TOP] = top;
    known[SUM] = lane_sum::<V>(sum);
    known[LABELLED] = labelled;
    known[FACTOR] = 1.0f32;
}

/// Exchanges what the units of a team know: afterwards it is of all channels. Two exchanges in a row use two halves of
/// `shares`: so one barrier is enough.
#[cube]
fn exchange(
    known: &mut Array<f32>,
    shares: &mut [f32],
    half: usize,
    counts: bool,
    #[comptime] fields: usize,
    #[comptime] plan: LossPlan,
) {
    if comptime!(plan.team > 1) {
        let units = comptime!(plan.walkers);
        let unit = UNIT_POS as usize;
        let base = half * comptime!(fields * plan.walkers);
        if counts {
            #[unroll]
            for field in 0..fields {
                shares[base + field * units + unit] = known[comptime!(field_of(field, plan))];
            }
        }
        sync_cube();
        if counts {
            let first = base + unit / plan.team * plan.team;
            let mine = known[TOP];
            let mut top = shares[first];
            for other in 1..plan.team {
                top = top.max(shares[first + other]);
            }
            known[TOP] = top;
            known[FACTOR] = (mine - top).exp();
            if comptime!(plan.missing) {
                let mut back_top = shares[first + 2 * units];
                for other in 1..plan.team {
                    back_top = back_top.max(shares[first + 2 * units + other]);
                }
                known[BACK_TOP] = back_top;
            }
            #[unroll]
            for field in 1..fields {
                let known_as = comptime!(field_of(field, plan));
                if comptime!(known_as != BACK_TOP) {
                    let tops = comptime!(if known_as == BACK_SUM { 2 * plan.walkers } else { 0 });
                    let top = known[comptime!(if known_as == BACK_SUM { BACK_TOP } else { TOP })];
                    let mut sum = 0.0f32;
                    for other in 0..plan.team {
                        let factor = (shares[first + tops + other] - top).exp();
                        sum += shares[first + field * units + other] * factor;
                    }
                    known[known_as] = sum;
                }
            }
        }
    }
}

/// The `field`-th thing that is exchanged: `DOT` is the last, and only exchanged for the gradient.
fn field_of(field: usize, plan: LossPlan) -> usize {
    match (field, plan.missing) {
        (TOP | SUM, _) => field,
        (_, false) => DOT,
        (_, true) => field,
    }
}

/// Number of things that are exchanged.
fn fields(plan: LossPlan, gradient: bool) -> usize {
    2 + usize::from(gradient) + if plan.missing { 2 } else { 0 }
}

/// The label's logit, or `log sum exp` of those that stand for the background; for its owner.
#[cube]
fn score(known: &Array<f32>, label: u32, #[comptime] plan: LossPlan) -> f32 {
    let mut score = known[LABELLED];
    if comptime!(plan.missing) {
        if label == 0 {
            score = known[BACK_TOP] + known[BACK_SUM].ln();
        }
    }
    score
}

/// Pass 1: a row of partial sums of every chunk, see [`LossPlan::slots`]. `entropies` takes the cross-entropy of every voxel
/// if only the largest count.
#[cube(launch)]
pub(super) fn cube_softmax_sums_kernel<E: Float, L: Int, W: Numeric, V: Size>(
    logits: &Sequence<Box<[Vector<E, V>]>>,
    labels: &[L],
    weights: &[W],
    grid: &LevelGrid,
    sums: &mut [f32],
    entropies: &mut [f32],
    #[comptime] plan: LossPlan,
    #[define(E)] _logit_type: ElemType,
    #[define(L)] _label_type: ElemType,
    #[define(W)] _weight_type: ElemType,
) {
    // A team's row is one of the loss's without the P, which lie in registers.
    let len = comptime!(plan.shared_row());
    let first_slot = comptime!(plan.slots() - len);
    let mut rows = Shared::<[f32]>::new_slice(comptime!(plan.teams() * len));
    let exchanged = comptime!(fields(plan, false));
    let mut shares = Shared::<[f32]>::new_slice(comptime!(plan.shares(exchanged)));
    let (team, member) = my_team(plan);
    for i in range_stepped(UNIT_POS as usize, comptime!(plan.teams() * len), plan.walkers) {
        rows[i] = 0.0f32;
    }
    sync_cube();

    let place = my_chunk(grid, plan);
    let stands_for = my_labels(grid, &place, member, plan);
    let row = team * len;
    let mut values = Array::<Vector<f32, V>>::new(plan.mine());
    let mut shifted = Array::<Vector<f32, V>>::new(plan.mine());
    let mut p_sums = Array::<Vector<f32, V>>::new(plan.mine());
    let mut known = Array::<f32>::new(KNOWN);
    let mut weight_sum = 0.0f32;
    for step in 0..steps(&place, plan) {
        let voxel = place.start + step * plan.teams() + team;
        let (label, weight) = read_voxel::<L, W>(labels, weights, grid, &place, voxel, plan);
        let counts = label < comptime!(plan.labels as u32);
        if counts {
            let first = (place.before + voxel) * plan.vectors();
            load_mine::<E, V>(logits, place.level, first, member, &mut values, plan);
            exponentiate::<V>(&mut values, &mut shifted, &mut known, &stands_for, label, member, plan);
        }
        exchange(&mut known, &mut shares, step % 2, counts, exchanged, plan);
        let mut entropy = 0.0f32;
        if counts {
            weight_sum += weight;
            let class = label as usize;
            let scale = weight / known[SUM];
            if comptime!(plan.dice) {
                let mine = Vector::<f32, V>::new(known[FACTOR] * scale);
                #[unroll]
                for k in 0..plan.mine() {
                    let p = values[k] * mine;
                    p_sums[k] += p;
                    if comptime!(plan.missing) {
                        #[unroll]
                        for lane in 0..plan.vector {
                            if stands_for[comptime!(k * plan.vector + lane)] == label {
                                let at = row + my_vector(member, k, plan) * plan.vector + lane;
                                rows[at] += p.extract(lane);
                            }
                        }
                    }
                }
            }
            if owns(label, member, plan) {
                if comptime!(plan.dice) {
                    if comptime!(!plan.missing) {
                        rows[row + class] += (known[LABELLED] - known[TOP]).exp() * scale;
                    }
                    rows[row + comptime!(plan.classes) + class] += weight;
                }
                if comptime!(plan.entropy || plan.top_k) {
                    entropy = weight * (known[SUM].ln() + (known[TOP] - score(&known, label, plan)));
                }
                if comptime!(plan.entropy) {
                    rows[row + comptime!(plan.entropies() - (plan.slots() - plan.shared_row())) + class] += entropy;
                }
            }
        }
        if comptime!(plan.top_k) {
            // The label's owner has it; of a voxel that does not count the first unit writes the 0.
            if voxel < place.end && ((counts && owns(label, member, plan)) || (!counts && member == 0)) {
                // Rounding below 0 would rank as the largest of all; NaN stays and does.
                entropies[place.first_voxel + place.before + voxel] = select(entropy < 0.0f32, 0.0f32, entropy);
            }
        }
    }
    if member == 0 {
        rows[row + comptime!(plan.shared_row() - 1)] = weight_sum;
    }
    add_rows(&mut rows, len, plan);
    write_cube_row(&rows, sums, grid, first_slot, len, plan);
    if comptime!(plan.dice) {
        write_sums::<V>(&p_sums, &mut rows, sums, grid, 0usize, plan);
    }
}

/// Of this unit's channels what Dice adds to their gradient, before the factor p: the coefficients B.
#[cube]
fn additions_of_mine<V: Size>(
    coefficients: &[f32],
    dice: usize,
    member: usize,
    #[comptime] plan: LossPlan,
) -> Array<Vector<f32, V>> {
    let mut b = Array::<Vector<f32, V>>::new(plan.mine());
    if comptime!(plan.dice) {
        #[unroll]
        for k in 0..plan.mine() {
            let vector = my_vector(member, k, plan);
            let mut of_classes = Vector::<f32, V>::new(0.0f32);
            if exists(vector, k, plan) {
                #[unroll]
                for lane in 0..plan.vector {
                    of_classes.insert(lane, coefficients[dice + (vector * plan.vector + lane) * 2 + 1]);
                }
            }
            b[k] = of_classes;
        }
    }
    b
}

/// `dot`, and the coefficients A of the channels that stand for the label, times `exp(z - top)`.
#[cube]
#[allow(clippy::too_many_arguments, reason = "inlined into the kernel")]
fn dot_of_missing<V: Size>(
    values: &Array<Vector<f32, V>>,
    dot: f32,
    stands_for: &Array<u32>,
    label: u32,
    coefficients: &[f32],
    dice: usize,
    member: usize,
    #[comptime] plan: LossPlan,
) -> f32 {
    let mut dot = dot;
    #[unroll]
    for k in 0..plan.mine() {
        #[unroll]
        for lane in 0..plan.vector {
            if stands_for[comptime!(k * plan.vector + lane)] == label {
                let class = my_vector(member, k, plan) * plan.vector + lane;
                dot += values[k].extract(lane) * coefficients[dice + 2 * class];
            }
        }
    }
    dot
}

/// What the gradient of a channel that stands for the label has more than others. `exp(shifted)` is its share in the sum of
/// the p that stand for it.
#[cube]
fn beyond_base(
    shifted: f32,
    entropy: f32,
    p: f32,
    coefficients: &[f32],
    coefficient: usize,
    #[comptime] plan: LossPlan,
) -> f32 {
    let mut more = 0.0f32 - entropy * shifted.exp();
    if comptime!(plan.dice) {
        more += p * coefficients[coefficient];
    }
    more
}

/// Pass 3: the gradient, see [`TAIL`](super::plan::TAIL) and what the threads' kernel computes. A gradient may be the
/// memory of its logits: a unit reads its channels before it writes them.
#[cube(launch)]
pub(super) fn cube_softmax_gradient_kernel<E: Float, L: Int, W: Numeric, V: Size>(
    logits: &Sequence<Box<[Vector<E, V>]>>,
    labels: &[L],
    weights: &[W],
    grid: &LevelGrid,
    coefficients: &[f32],
    entropies: &[f32],
    gradients: &mut Sequence<Box<[Vector<E, V>]>>,
    #[comptime] plan: LossPlan,
    #[define(E)] _logit_type: ElemType,
    #[define(L)] _label_type: ElemType,
    #[define(W)] _weight_type: ElemType,
) {
    let exchanged = comptime!(fields(plan, true));
    let mut shares = Shared::<[f32]>::new_slice(comptime!(plan.shares(exchanged)));
    let (team, member) = my_team(plan);
    let place = my_chunk(grid, plan);
    let stands_for = my_labels(grid, &place, member, plan);
    let of_level = coefficients_at(grid.batch, place.level, plan);
    let dice = of_level + place.sample * comptime!(2 * plan.classes);
    let b = additions_of_mine::<V>(coefficients, dice, member, plan);

    let mut values = Array::<Vector<f32, V>>::new(plan.mine());
    let mut shifted = Array::<Vector<f32, V>>::new(plan.mine());
    let mut known = Array::<f32>::new(KNOWN);
    for step in 0..steps(&place, plan) {
        let voxel = place.start + step * plan.teams() + team;
        let (label, weight) = read_voxel::<L, W>(labels, weights, grid, &place, voxel, plan);
        let counts = label < comptime!(plan.labels as u32);
        let first = (place.before + voxel) * plan.vectors();
        let mine = counts && owns(label, member, plan);
        // The label's p, and its coefficient.
        let mut e = 0.0f32;
        let mut a = 0.0f32;
        let mut own_top = 0.0f32;
        if counts {
            load_mine::<E, V>(logits, place.level, first, member, &mut values, plan);
            exponentiate::<V>(&mut values, &mut shifted, &mut known, &stands_for, label, member, plan);
            own_top = known[TOP];
            if comptime!(plan.dice) {
                let mut dot = Vector::<f32, V>::new(0.0f32);
                #[unroll]
                for k in 0..plan.mine() {
                    dot += values[k] * b[k];
                }
                known[DOT] = lane_sum::<V>(dot);
                if comptime!(plan.missing) {
                    known[DOT] =
                        dot_of_missing::<V>(&values, known[DOT], &stands_for, label, coefficients, dice, member, plan);
                } else if mine {
                    a = coefficients[dice + 2 * label as usize];
                    e = (known[LABELLED] - own_top).exp();
                    known[DOT] += e * a;
                }
            }
        }
        exchange(&mut known, &mut shares, step % 2, counts, exchanged, plan);
        if voxel < place.end {
            if counts {
                let scale = known[FACTOR] / known[SUM];
                let entropy = entropy_weight::<Const<1>>(coefficients, entropies, grid, &place, voxel, of_level, plan);
                let entropy = entropy.extract(0usize);
                let mut base = entropy;
                if comptime!(plan.dice) {
                    base -= known[DOT] / known[SUM];
                }
                let of_label = e * scale * a - entropy;
                let score = score(&known, label, plan);
                #[unroll]
                for k in 0..plan.mine() {
                    let p = values[k] * Vector::new(scale);
                    let mut g = p * (b[k] + Vector::new(base));
                    #[unroll]
                    for lane in 0..plan.vector {
                        let hit = stands_for[comptime!(k * plan.vector + lane)] == label;
                        if comptime!(plan.missing) {
                            if hit {
                                let class = my_vector(member, k, plan) * plan.vector + lane;
                                let shifted = shifted[k].extract(lane) + (own_top - score);
                                let p = p.extract(lane);
                                let more = beyond_base(shifted, entropy, p, coefficients, dice + 2 * class, plan);
                                g.insert(lane, g.extract(lane) + more);
                            }
                        } else {
                            g.insert(lane, g.extract(lane) + select(hit, of_label, 0.0f32));
                        }
                    }
                    values[k] = g * Vector::new(weight);
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
