//! How the channels of a group of voxels are read and stored: logits lie voxel by voxel, and are computed with channel by
//! channel, a vector of voxels at a time.

use super::plan::LossPlan;
use cubecl::prelude::*;

/// Channels that a group of many is read and stored by: a load for each voxel, instead of one for each value.
const BLOCK: usize = 4;

/// Reads all channels of `N` neighbouring voxels in f32, zeros where a voxel does not count (a select and not a
/// product: what an ignored voxel holds may be NaN), and returns the largest. `first` is the first logit.
#[cube]
pub(super) fn load_group<E: Float, N: Size>(
    logits: &Sequence<Box<[E]>>,
    level: usize,
    first: usize,
    counts: Vector<bool, N>,
    values: &mut Array<Vector<f32, N>>,
    #[comptime] plan: LossPlan,
) -> Vector<f32, N> {
    let lanes = N::value();
    let mut top = Vector::<f32, N>::new(f32::MIN);
    #[unroll]
    for candidate in 0..plan.levels {
        if comptime!(plan.levels == 1) || level == candidate {
            let buffer = &logits[candidate];
            if comptime!(lanes == 1) {
                #[unroll(plan.unroll)]
                for channel in 0..plan.classes {
                    let stored = Vector::<E, N>::new(buffer[first + channel]);
                    let z = select_many(counts, Vector::cast_from(stored), Vector::new(0.0f32));
                    values[channel] = z;
                    top = select_many(z.greater_than(&top), z, top);
                }
            } else if comptime!(plan.classes <= BLOCK) {
                load_span::<E, N>(buffer, first, values, plan.classes);
            } else {
                for block in 0..comptime!(plan.classes.div_ceil(BLOCK)) {
                    let channel = (block * BLOCK).min(comptime!(plan.classes - BLOCK));
                    load_block::<E, N>(buffer, first + channel, values, channel, plan.classes);
                }
            }
        }
    }
    if comptime!(lanes > 1) {
        #[unroll(plan.unroll)]
        for channel in 0..plan.classes {
            let z = select_many(counts, values[channel], Vector::new(0.0f32));
            values[channel] = z;
            top = select_many(z.greater_than(&top), z, top);
        }
    }
    top
}

/// Stores all channels of `N` neighbouring voxels.
#[cube]
pub(super) fn store_group<E: Float, N: Size>(
    gradients: &mut Sequence<Box<[E]>>,
    level: usize,
    first: usize,
    values: &mut Array<Vector<f32, N>>,
    #[comptime] plan: LossPlan,
) {
    let lanes = N::value();
    #[unroll]
    for candidate in 0..plan.levels {
        if comptime!(plan.levels == 1) || level == candidate {
            let buffer = &mut gradients[candidate];
            if comptime!(lanes == 1) {
                #[unroll(plan.unroll)]
                for channel in 0..plan.classes {
                    buffer[first + channel] = E::cast_from(values[channel].extract(0usize));
                }
            } else if comptime!(plan.classes <= BLOCK) {
                store_span::<E, N>(buffer, first, values, plan.classes);
            } else {
                for block in 0..comptime!(plan.classes.div_ceil(BLOCK)) {
                    let channel = (block * BLOCK).min(comptime!(plan.classes - BLOCK));
                    store_block::<E, N>(buffer, first + channel, values, channel, plan.classes);
                }
            }
        }
    }
}

/// Zeroes `len` values of a gradient.
#[cube]
pub(super) fn clear<E: Float>(
    gradients: &mut Sequence<Box<[E]>>,
    level: usize,
    first: usize,
    #[comptime] len: usize,
    #[comptime] plan: LossPlan,
) {
    #[unroll]
    for candidate in 0..plan.levels {
        if comptime!(plan.levels == 1) || level == candidate {
            let buffer = &mut gradients[candidate];
            for i in 0..len {
                buffer[first + i] = E::from_int(0);
            }
        }
    }
}

/// Reads the `N` voxels of a group whose few channels fill whole vectors: `channels` aligned loads, and shuffles.
#[cube]
fn load_span<E: Float, N: Size>(
    buffer: &[E],
    first: usize,
    values: &mut Array<Vector<f32, N>>,
    #[comptime] channels: usize,
) {
    let lanes = N::value();
    let vectors = buffer.as_vectorized().with_vector_size::<N>();
    let mut span = Array::<Vector<f32, N>>::new(channels);
    #[unroll]
    for part in 0..channels {
        span[part] = Vector::cast_from(vectors[first / lanes + part]);
    }
    #[unroll]
    for channel in 0..channels {
        let mut value = Vector::<f32, N>::empty();
        #[unroll]
        for lane in 0..lanes {
            let place = comptime!(lane * channels + channel);
            value.insert(lane, span[comptime!(place / lanes)].extract(comptime!(place % lanes)));
        }
        values[channel] = value;
    }
}

/// The reverse of `load_span`.
#[cube]
fn store_span<E: Float, N: Size>(
    buffer: &mut [E],
    first: usize,
    values: &mut Array<Vector<f32, N>>,
    #[comptime] channels: usize,
) {
    let lanes = N::value();
    let size!(Two) = comptime!(2 * lanes);
    let size!(Four) = comptime!(4 * lanes);
    let buffer = buffer.as_vectorized_mut();
    if comptime!(channels == 1) {
        buffer.with_vector_size_mut::<N>()[first / lanes] = Vector::cast_from(values[0]);
    } else if comptime!(channels == 2) {
        let both = join::<N, Two>(values[0], values[1]);
        buffer.with_vector_size_mut::<Two>()[first / comptime!(2 * lanes)] = Vector::cast_from(both);
    } else {
        // With a fourth channel that is left out again if there are three.
        let fourth = values[comptime!(channels - 1)];
        let quads = join_four::<N, Two, Four>(values[0], values[1], values[2], fourth);
        if comptime!(channels == 4) {
            buffer.with_vector_size_mut::<Four>()[first / comptime!(4 * lanes)] = Vector::cast_from(quads);
        } else {
            let vectors = buffer.with_vector_size_mut::<N>();
            #[unroll]
            for part in 0..channels {
                let mut span = Vector::<f32, N>::empty();
                #[unroll]
                for lane in 0..lanes {
                    let place = comptime!(part * lanes + lane);
                    span.insert(lane, quads.extract(comptime!(place / channels * 4 + place % channels)));
                }
                vectors[first / lanes + part] = Vector::cast_from(span);
            }
        }
    }
}

/// Reads `BLOCK` neighbouring channels of `N` voxels, of which `first` is the first value, into `values` from `channel`
/// on.
#[cube]
fn load_block<E: Float, N: Size>(
    buffer: &[E],
    first: usize,
    values: &mut Array<Vector<f32, N>>,
    channel: usize,
    #[comptime] channels: usize,
) {
    let lanes = N::value();
    let size!(All) = comptime!(BLOCK * lanes);
    let size!(Half) = comptime!(BLOCK / 2 * lanes);
    let mut stored = Vector::<E, All>::empty();
    #[unroll]
    for lane in 0..lanes {
        #[unroll]
        for i in 0..BLOCK {
            stored.insert(comptime!(lane * BLOCK + i), buffer[first + comptime!(lane * channels + i)]);
        }
    }
    let (even, odd) = split::<All, Half>(Vector::cast_from(stored));
    let (zero, two) = split::<Half, N>(even);
    let (one, three) = split::<Half, N>(odd);
    values[channel] = zero;
    values[channel + 1] = one;
    values[channel + 2] = two;
    values[channel + 3] = three;
}

/// The reverse of `load_block`.
#[cube]
fn store_block<E: Float, N: Size>(
    buffer: &mut [E],
    first: usize,
    values: &mut Array<Vector<f32, N>>,
    channel: usize,
    #[comptime] channels: usize,
) {
    let lanes = N::value();
    let size!(All) = comptime!(BLOCK * lanes);
    let size!(Half) = comptime!(BLOCK / 2 * lanes);
    let quads =
        join_four::<N, Half, All>(values[channel], values[channel + 1], values[channel + 2], values[channel + 3]);
    let stored = Vector::<E, All>::cast_from(quads);
    #[unroll]
    for lane in 0..lanes {
        #[unroll]
        for i in 0..BLOCK {
            buffer[first + comptime!(lane * channels + i)] = stored.extract(comptime!(lane * BLOCK + i));
        }
    }
}

/// The even and the odd lanes. Shifts and narrowing say so in few operations, which an extraction of every lane does
/// not.
#[cube]
pub(super) fn split<Both: Size, One: Size>(v: Vector<f32, Both>) -> (Vector<f32, One>, Vector<f32, One>) {
    let pairs = Vector::<u64, One>::reinterpret(v);
    let even = Vector::<u32, One>::cast_from(pairs);
    let odd = Vector::<u32, One>::cast_from(pairs >> Vector::new(32u64));
    (Vector::reinterpret(even), Vector::reinterpret(odd))
}

/// The reverse of `split`.
#[cube]
fn join<One: Size, Both: Size>(even: Vector<f32, One>, odd: Vector<f32, One>) -> Vector<f32, Both> {
    let even = Vector::<u64, One>::cast_from(Vector::<u32, One>::reinterpret(even));
    let odd = Vector::<u64, One>::cast_from(Vector::<u32, One>::reinterpret(odd));
    Vector::reinterpret(even | (odd << Vector::new(32u64)))
}

/// Four channels of each voxel side by side.
#[cube]
fn join_four<N: Size, Two: Size, Four: Size>(
    zero: Vector<f32, N>,
    one: Vector<f32, N>,
    two: Vector<f32, N>,
    three: Vector<f32, N>,
) -> Vector<f32, Four> {
    join::<Two, Four>(join::<N, Two>(zero, two), join::<N, Two>(one, three))
}
