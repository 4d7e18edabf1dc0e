//! Gaussian noise from a counter-based generator: a value depends on the key and its own index only, so that it is the
//! same on every device and for every division of the work.
//!
//! Threefry-2x32-20 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of the counter (index, 0) gives
//! two words: 24 bits of the one are the radius, the other the angle of Box and Muller's transform. Reads and writes
//! the image once.

use super::patch::{OPERATION, Patch};
use crate::block::strip;
use crate::elementwise::lanes_of;
use crate::reduce::check_count;
use crate::vector_math::ln;
use crate::{Buffer, Context, KernelError, Work};
use cubecl::prelude::*;

/// Rotations of the rounds, which repeat after eight.
const ROTATIONS: [u32; 8] = [13, 15, 26, 6, 17, 29, 16, 24];
/// The key schedule's parity word.
const PARITY: u32 = 0x1bd1_1bda;
/// Taylor coefficients of `sin(2 pi v)`: for |v| <= 1/4 the next term is below 6e-8.
const SINE: [f32; 6] = [std::f32::consts::TAU, -41.341_7, 81.605_25, -76.705_86, 42.058_693, -15.094_643];

/// Twenty rounds on a counter of (`counter`, 0).
#[cube]
fn threefry<N: Size>(counter: Vector<u32, N>, key: &[u32]) -> (Vector<u32, N>, Vector<u32, N>) {
    let mut schedule = Array::<u32>::new(3usize);
    schedule[0] = key[0];
    schedule[1] = key[1];
    schedule[2] = key[0] ^ key[1] ^ PARITY;
    let mut a = counter + Vector::new(schedule[0]);
    let mut b = Vector::<u32, N>::new(schedule[1]);
    #[unroll]
    for group in 0..5usize {
        #[unroll]
        for round in 0..4usize {
            let left = comptime!(ROTATIONS[(group % 2) * 4 + round]);
            a += b;
            b = (b << Vector::new(left)) | (b >> Vector::new(comptime!(32 - left)));
            b ^= a;
        }
        a += Vector::new(schedule[comptime!((group + 1) % 3)]);
        b += Vector::new(schedule[comptime!((group + 2) % 3)] + comptime!(group as u32 + 1));
    }
    (a, b)
}

/// A standard normal number of two words.
#[cube]
fn normal<N: Size>(a: Vector<u32, N>, b: Vector<u32, N>) -> Vector<f32, N> {
    // In (0, 1]: the logarithm is finite.
    let uniform = Vector::<f32, N>::cast_from((a >> Vector::new(8u32)) + Vector::new(1u32));
    let uniform = uniform * Vector::new(comptime!(1.0f32 / 16_777_216.0f32));
    let radius = (ln::<N>(uniform) * Vector::new(-2.0f32)).sqrt();
    // cos(2 pi t) = sin(2 pi (|t - 1/2| - 1/4)) for t in [0, 1).
    let turn = Vector::<f32, N>::cast_from(b >> Vector::new(8u32)) * Vector::new(comptime!(1.0f32 / 16_777_216.0f32));
    let v = (turn - Vector::new(0.5f32)).abs() - Vector::new(0.25f32);
    let square = v * v;
    let mut sine = Vector::<f32, N>::new(SINE[5]);
    #[unroll]
    for k in 0..5usize {
        sine = fma(sine, square, Vector::new(comptime!(SINE[4 - k])));
    }
    radius * (sine * v)
}

#[cube(launch_unchecked)]
fn noise_kernel<N: Size>(image: &mut [Vector<f32, N>], key: &[u32], deviation: f32, vectors: usize) {
    let mut lane = Vector::<u32, N>::new(0u32);
    #[unroll]
    for l in 0..N::value() {
        lane.insert(l, l as u32);
    }
    let (low, high) = strip(vectors);
    for i in low..high {
        let (a, b) = threefry::<N>(Vector::new(u32::cast_from(i * N::value())) + lane, key);
        image[i] = fma(normal::<N>(a, b), Vector::new(deviation), image[i]);
    }
}

/// `image[i] += deviation * normal(key, i)`.
///
/// # Errors
/// [`KernelError::Shape`] or [`KernelError::Dtype`] if the image is not one of the patch, [`KernelError::Limit`] beyond the
/// device's index range.
pub fn noise(
    context: &Context,
    patch: &Patch,
    image: &Buffer,
    deviation: f32,
    key: [u32; 2],
) -> Result<(), KernelError> {
    patch.check_image("image", image)?;
    check_count(context, OPERATION, image.len())?;
    let lanes = lanes_of(context, image.len());
    let key = context.upload(&key, crate::Dtype::U32)?;
    context.launch(OPERATION, Work::Items(image.len() / lanes), |client, count, dim| {
        // SAFETY: the strips cover the `len / lanes` vectors of the image; the key has two words.
        unsafe {
            noise_kernel::launch_unchecked(
                client,
                count,
                dim,
                lanes,
                image.arg(),
                key.arg(),
                deviation,
                image.len() / lanes,
            )
        }
    })
}
