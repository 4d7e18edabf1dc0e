//! What happens to one sample, drawn with nnU-Net's probabilities and ranges.
//!
//! | transform | probability | per channel | parameters |
//! |---|---|---|---|
//! | rotation | 0.2 | | three angles within 30 degrees (in the plane: one within 180) |
//! | scaling | 0.2 | | one factor in 0.7 to 1.4; larger is smaller objects |
//! | noise | 0.1 | | deviation in 0 to 0.1, of all channels |
//! | blur | 0.2 | 0.5 | sigma in 0.5 to 1 for every channel and axis |
//! | brightness | 0.15 | 1 | factor around 1 in 0.75 to 1.25 |
//! | contrast | 0.15 | 1 | factor around 1 in 0.75 to 1.25 |
//! | low resolution | 0.25 | 0.5 | factor in 0.5 to 1 of all axes (in the plane: not of depth) |
//! | gamma of the inverted image | 0.1 | 1 | exponent around 1 in 0.7 to 1.5 |
//! | gamma | 0.3 | 1 | exponent around 1 in 0.7 to 1.5 |
//! | mirroring | 1 | | each allowed axis with probability 0.5 |
//!
//! "Around 1" is below it half of the time, and uniform on either side. The transforms run in this order.

use super::recipe::{Geometry, Transforms};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// The parameters of one sample; `None` for what does not happen to it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Draw {
    /// Angles about depth, height and width in radians: those of the planes (height, width), (depth, width) and (depth,
    /// height).
    pub angles: Option<[f64; 3]>,
    /// Factor of scaling, of all axes that take part.
    pub scale: Option<f64>,
    /// Whether depth takes no part in rotation and scaling.
    pub in_plane: bool,
    /// Standard deviation of the noise, and the key of its generator.
    pub noise: Option<(f32, [u32; 2])>,
    /// Of every channel, sigma in voxels along (depth, height, width).
    pub blur: Option<Vec<Option<[f64; 3]>>>,
    /// Factor of every channel.
    pub brightness: Option<Vec<f32>>,
    /// Factor of every channel.
    pub contrast: Option<Vec<f32>>,
    /// Of every channel, voxels along (depth, height, width) of its coarser grid.
    pub low_resolution: Option<Vec<Option<[usize; 3]>>>,
    /// Exponent of every channel of the inverted image.
    pub gamma_inverted: Option<Vec<f32>>,
    /// Exponent of every channel.
    pub gamma: Option<Vec<f32>>,
    /// Axes that are mirrored.
    pub mirror: [bool; 3],
}

impl Draw {
    /// Draws for a sample of `channels` channels. `mirror` are the allowed axes.
    pub fn new(
        transforms: Transforms,
        geometry: &Geometry,
        mirror: [bool; 3],
        channels: usize,
        rng: &mut ChaCha8Rng,
    ) -> Self {
        let mut draw = Self::default();
        if transforms == Transforms::Nnunet {
            draw.spatial(geometry, rng);
            draw.noise_and_blur(channels, rng);
            draw.intensities(geometry, channels, rng);
        }
        if transforms != Transforms::None {
            // Drawn for all axes so that the stream does not depend on which are allowed.
            draw.mirror = mirror.map(|allowed| rng.random_bool(0.5) && allowed);
        }
        draw
    }

    /// Samples that together go through all that samples of so many channels may go through: all of it, all of it but for rotation
    /// and scaling, nothing.
    pub fn of_every_kind(transforms: Transforms, geometry: &Geometry, channels: usize) -> Vec<Self> {
        let nothing = Self::default();
        if transforms != Transforms::Nnunet {
            return vec![nothing];
        }
        let (factors, in_plane) = (Some(vec![0.9; channels]), geometry.in_plane);
        let in_place = Self {
            angles: None,
            scale: None,
            in_plane,
            noise: Some((0.1, [0, 0])),
            blur: Some(vec![Some([1.0; 3]); channels]),
            brightness: factors.clone(),
            contrast: factors.clone(),
            low_resolution: Some(vec![Some(geometry.patch.map(|extent| extent.div_ceil(2))); channels]),
            gamma_inverted: factors.clone(),
            gamma: factors,
            mirror: [true; 3],
        };
        vec![Self { angles: Some([0.1, 0.0, 0.0]), scale: Some(0.9), ..in_place.clone() }, in_place, nothing]
    }

    fn spatial(&mut self, geometry: &Geometry, rng: &mut ChaCha8Rng) {
        let (rotates, scales) = (rng.random_bool(0.2), rng.random_bool(0.2));
        self.in_plane = geometry.in_plane;
        if rotates {
            let limit = geometry.rotation;
            let mut angle = || rng.random_range(-limit..limit);
            self.angles = Some(if geometry.in_plane { [angle(), 0.0, 0.0] } else { [angle(), angle(), angle()] });
        }
        if scales {
            self.scale = Some(rng.random_range(0.7..1.4));
        }
    }

    fn noise_and_blur(&mut self, channels: usize, rng: &mut ChaCha8Rng) {
        if rng.random_bool(0.1) {
            self.noise = Some((rng.random_range(0.0..0.1), [rng.random(), rng.random()]));
        }
        if rng.random_bool(0.2) {
            let mut of_channel = || {
                let chosen = rng.random_bool(0.5);
                chosen.then(|| std::array::from_fn(|_| rng.random_range(0.5..1.0)))
            };
            self.blur = Some((0..channels).map(|_| of_channel()).collect());
        }
    }

    fn intensities(&mut self, geometry: &Geometry, channels: usize, rng: &mut ChaCha8Rng) {
        let around_one = |probability: f64, low: f64, high: f64, rng: &mut ChaCha8Rng| -> Option<Vec<f32>> {
            let happens = rng.random_bool(probability);
            let mut factor = || {
                let below = rng.random_bool(0.5);
                (if below { rng.random_range(low..1.0) } else { rng.random_range(1.0..high) }) as f32
            };
            happens.then(|| (0..channels).map(|_| factor()).collect())
        };
        self.brightness = around_one(0.15, 0.75, 1.25, rng);
        self.contrast = around_one(0.15, 0.75, 1.25, rng);
        if rng.random_bool(0.25) {
            let mut of_channel = || {
                let chosen = rng.random_bool(0.5);
                chosen.then(|| {
                    let factor: f64 = rng.random_range(0.5..1.0);
                    std::array::from_fn(|axis| {
                        let fine = geometry.patch[axis];
                        let keeps = axis == 0 && geometry.in_plane;
                        if keeps { fine } else { ((fine as f64 * factor).round_ties_even() as usize).max(1) }
                    })
                })
            };
            self.low_resolution = Some((0..channels).map(|_| of_channel()).collect());
        }
        self.gamma_inverted = around_one(0.1, 0.7, 1.5, rng);
        self.gamma = around_one(0.3, 0.7, 1.5, rng);
    }

    /// The matrix that takes a voxel's place from the centre to where it is read: `Rz Ry Rx S` on (depth, height, width).
    /// `None` where neither rotation nor scaling happens.
    pub fn matrix(&self) -> Option<[[f32; 3]; 3]> {
        if self.angles.is_none() && self.scale.is_none() {
            return None;
        }
        let [a, b, c] = self.angles.unwrap_or_default();
        let about_first = [[1.0, 0.0, 0.0], [0.0, a.cos(), -a.sin()], [0.0, a.sin(), a.cos()]];
        let about_second = [[b.cos(), 0.0, b.sin()], [0.0, 1.0, 0.0], [-b.sin(), 0.0, b.cos()]];
        let about_third = [[c.cos(), -c.sin(), 0.0], [c.sin(), c.cos(), 0.0], [0.0, 0.0, 1.0]];
        let scale = self.scale.unwrap_or(1.0);
        let scales = [if self.in_plane { 1.0 } else { scale }, scale, scale];
        let rotation = product(product(about_third, about_second), about_first);
        Some(rotation.map(|row| std::array::from_fn(|column| (row[column] * scales[column]) as f32)))
    }
}

fn product(a: [[f64; 3]; 3], b: [[f64; 3]; 3]) -> [[f64; 3]; 3] {
    a.map(|row| std::array::from_fn(|column| (0..3).map(|k| row[k] * b[k][column]).sum()))
}
