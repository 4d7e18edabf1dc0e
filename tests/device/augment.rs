//! Augmentation kernels against their definitions in f64, over ragged and anisotropic patches, several channels and
//! samples that do not begin at aligned addresses.

use crate::common::{assert_close, assert_no_device_panic, device, is_slow, read, uniform};
use half::f16;
use voxgrad::kernels::augment::{self, Finish, LabelRule, Movement, Patch, Region, Sample};
use voxgrad::kernels::{Buffer, Context, Dtype, KernelError};

/// Extents and channels: odd, anisotropic, degenerate, and one whose rows are whole vectors.
const SHAPES: [([usize; 3], usize); 6] =
    [([5, 6, 7], 1), ([3, 11, 8], 3), ([1, 9, 10], 2), ([9, 2, 3], 5), ([8, 8, 16], 4), ([4, 1, 1], 1)];

/// `[depth, height, width, channels]`.
#[derive(Clone)]
struct Volume {
    dims: [usize; 3],
    channels: usize,
    values: Vec<f64>,
}

impl Volume {
    fn new(dims: [usize; 3], channels: usize, seed: u64) -> Self {
        let values = uniform(seed, dims.iter().product::<usize>() * channels);
        // Channels of different offset and spread.
        let spread = |(i, v): (usize, &f32)| v * (1.0 + (i % channels) as f32) + 0.5 * (i % channels) as f32;
        Self { dims, channels, values: values.iter().enumerate().map(spread).map(f64::from).collect() }
    }

    fn patch(&self) -> Patch {
        Patch::new(self.dims, self.channels).unwrap()
    }

    fn f32(&self) -> Vec<f32> {
        self.values.iter().map(|&v| v as f32).collect()
    }

    fn upload(&self, context: &Context) -> Buffer {
        context.upload_f32(&self.f32()).unwrap()
    }

    fn voxel(&self, [z, y, x]: [usize; 3]) -> usize {
        (z * self.dims[1] + y) * self.dims[2] + x
    }

    fn at(&self, place: [usize; 3], channel: usize) -> f64 {
        self.values[self.voxel(place) * self.channels + channel]
    }

    /// The same extents with values by place and channel.
    fn map(&self, mut value: impl FnMut([usize; 3], usize) -> f64) -> Self {
        let mut values = Vec::with_capacity(self.values.len());
        for z in 0..self.dims[0] {
            for y in 0..self.dims[1] {
                for x in 0..self.dims[2] {
                    values.extend((0..self.channels).map(|c| value([z, y, x], c)));
                }
            }
        }
        Self { dims: self.dims, channels: self.channels, values }
    }

    fn channel(&self, channel: usize) -> Vec<f64> {
        self.values.iter().skip(channel).step_by(self.channels).copied().collect()
    }
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// With n - 1 in the denominator.
fn deviation(values: &[f64]) -> f64 {
    let mean = mean(values);
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (values.len() - 1) as f64).sqrt()
}

fn bounds(values: &[f64]) -> (f64, f64) {
    values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &v| (low.min(v), high.max(v)))
}

/// Blobs of labels -1 to 3 as codes 0 to 4.
fn codes(dims: [usize; 3], seed: u64) -> Vec<u8> {
    let [d, h, w] = dims;
    let noise = uniform(seed, d * h * w);
    let code = |i: usize| {
        let (z, y, x) = (i / (h * w), i / w % h, i % w);
        ((z / 2 * 7 + y / 3 * 3 + x / 3) as f32 + noise[i].abs()) as u8 % 5
    };
    (0..d * h * w).map(code).collect()
}

/// A batch of three samples, the last of which is used; its address is seldom aligned.
struct Batch {
    volume: Volume,
    codes: Vec<u8>,
    image: Buffer,
    labels: Buffer,
}

const INDEX: usize = 2;

impl Batch {
    fn new(context: &Context, dims: [usize; 3], channels: usize, seed: u64) -> Self {
        let volume = Volume::new(dims, channels, seed);
        let codes = codes(dims, seed);
        let mut image = vec![f32::NAN; 2 * volume.values.len()];
        image.extend(volume.f32());
        let mut labels = vec![99u8; 2 * codes.len()];
        labels.extend(&codes);
        let image = context.upload_f32(&image).unwrap();
        let labels = context.upload(&labels, Dtype::U8).unwrap();
        Self { volume, codes, image, labels }
    }

    fn sample(&self) -> Sample<'_> {
        Sample { patch: self.volume.patch(), image: &self.image, labels: &self.labels, index: INDEX }
    }

    fn code(&self, place: [i64; 3]) -> u8 {
        let inside = (0..3).all(|a| (0..self.volume.dims[a] as i64).contains(&place[a]));
        if inside { self.codes[self.volume.voxel(place.map(|p| p as usize))] } else { 0 }
    }

    fn value(&self, place: [i64; 3], channel: usize) -> f64 {
        let inside = (0..3).all(|a| (0..self.volume.dims[a] as i64).contains(&place[a]));
        if inside { self.volume.at(place.map(|p| p as usize), channel) } else { 0.0 }
    }
}

/// A buffer of NaN with room behind it: what a kernel must write, and must not.
fn nan(context: &Context, len: usize) -> (Buffer, Buffer) {
    let all = context.upload_f32(&vec![f32::NAN; len + 64]).unwrap();
    let part = all.part(0, len).unwrap();
    (all, part)
}

fn written(context: &Context, all: &Buffer, len: usize) -> Vec<f32> {
    let mut values = read(context, all);
    assert!(values[len..].iter().all(|v| v.is_nan()), "wrote behind the end");
    values.truncate(len);
    values
}

// ------------------------------------------------------------------------------------------------ spatial

fn rotation([a, b, c]: [f64; 3], scale: [f64; 3]) -> [[f64; 3]; 3] {
    let x = [[1.0, 0.0, 0.0], [0.0, a.cos(), -a.sin()], [0.0, a.sin(), a.cos()]];
    let y = [[b.cos(), 0.0, b.sin()], [0.0, 1.0, 0.0], [-b.sin(), 0.0, b.cos()]];
    let z = [[c.cos(), -c.sin(), 0.0], [c.sin(), c.cos(), 0.0], [0.0, 0.0, 1.0]];
    let product = |p: [[f64; 3]; 3], q: [[f64; 3]; 3]| {
        p.map(|row| -> [f64; 3] { std::array::from_fn(|j| (0..3).map(|k| row[k] * q[k][j]).sum()) })
    };
    product(product(z, y), x).map(|row| std::array::from_fn(|j| row[j] * scale[j]))
}

/// Rounded to 11 significant bits.
fn half_of(score: f64) -> f64 {
    f64::from(f16::from_f64(score))
}

/// What is read for one voxel: the image's channels, the winning code, and whether the vote is close or near a border of
/// rounding.
fn sampled(
    batch: &Batch,
    matrix: [[f64; 3]; 3],
    dims: [usize; 3],
    place: [usize; 3],
    exact: bool,
) -> (Vec<f64>, u8, bool) {
    let centred: [f64; 3] = std::array::from_fn(|a| place[a] as f64 - (dims[a] as f64 - 1.0) / 2.0);
    let position: [f64; 3] = std::array::from_fn(|a| {
        (0..3).map(|k| matrix[a][k] * centred[k]).sum::<f64>() + (batch.volume.dims[a] as f64 - 1.0) / 2.0
    });
    let low = position.map(|p| p.floor() as i64);
    let corner = |k: usize| -> ([i64; 3], f64) {
        let bits = [k >> 2 & 1, k >> 1 & 1, k & 1];
        let weight = (0..3).map(|a| {
            let share = position[a] - low[a] as f64;
            if bits[a] == 1 { share } else { 1.0 - share }
        });
        (std::array::from_fn(|a| low[a] + bits[a] as i64), weight.product())
    };
    let corners: Vec<_> = (0..8).map(corner).collect();
    let image = (0..batch.volume.channels)
        .map(|c| corners.iter().map(|&(at, weight)| weight * batch.value(at, c)).sum())
        .collect();
    let score = |code: u8| -> f64 {
        corners.iter().filter(|(at, _)| batch.code(*at) == code).map(|(_, weight)| weight).sum::<f64>() * 1000.0
    };
    let mut scores: Vec<(f64, u8)> = (0..5).map(|code| (half_of(score(code)), code)).collect();
    scores.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let near = batch.code(position.map(|p| p.round_ties_even() as i64));
    let winner = if scores.iter().any(|&(s, code)| code == near && s == scores[0].0) { near } else { scores[0].1 };
    let halves = position.iter().any(|p| ((p - p.floor()) - 0.5).abs() < 1e-4);
    let close = !exact && (scores[0].0 - scores[1].0 < 1.5 || halves && scores[1].0 > 0.0);
    (image, winner, close)
}

fn check_spatial(
    context: &Context,
    from: [usize; 3],
    to: [usize; 3],
    channels: usize,
    matrix: [[f64; 3]; 3],
    exact: bool,
) {
    let batch = Batch::new(context, from, channels, 7 + channels as u64);
    let patch = Patch::new(to, channels).unwrap();
    let (all, image) = nan(context, patch.elements());
    let labels = context.upload(&vec![77u8; patch.voxels()], Dtype::U8).unwrap();
    let rounded = matrix.map(|row| row.map(|v| v as f32));
    let movement = Movement { matrix: rounded, region: Region::whole(from), rule: LabelRule::Vote };
    augment::spatial(context, &batch.sample(), &movement, &patch, &image, &labels).unwrap();
    let (got, got_codes) = (written(context, &all, patch.elements()), context.download::<u8>(&labels).unwrap());
    let (mut expected, mut close_ones, mut seen) = (Vec::new(), 0, [false; 5]);
    for (voxel, &code) in got_codes.iter().enumerate() {
        let place = [voxel / (to[1] * to[2]), voxel / to[2] % to[1], voxel % to[2]];
        let (values, winner, close) = sampled(&batch, matrix, to, place, exact);
        expected.extend(values);
        close_ones += usize::from(close);
        seen[usize::from(winner)] = true;
        assert!(close || code == winner, "{from:?} -> {to:?}, voxel {place:?}: code {code}, expected {winner}");
    }
    assert_close(&format!("{from:?} -> {to:?}"), &got, &expected, 1e-5);
    assert!(close_ones * 20 <= got_codes.len().max(40), "{close_ones} of {} votes are close", got_codes.len());
    assert!(to.iter().product::<usize>() < 200 || seen.iter().filter(|s| **s).count() >= 3, "{seen:?}");
}

#[test]
fn rotated_and_scaled_patches_are_read_where_the_matrix_says() {
    let (context, _guard) = device();
    let turned = rotation([0.4, -0.3, 0.2], [1.1; 3]);
    check_spatial(context, [11, 14, 13], [7, 8, 9], 1, turned, false);
    check_spatial(context, [9, 12, 16], [6, 11, 8], 3, rotation([-0.5, 0.1, 0.45], [0.72; 3]), false);
    // Far outside: most of the patch is label -1 and 0.
    check_spatial(context, [5, 6, 7], [9, 8, 7], 2, rotation([0.1, 0.5, -0.2], [1.4; 3]), false);
    // In the plane of height and width.
    check_spatial(context, [4, 21, 19], [4, 13, 12], 2, rotation([2.4, 0.0, 0.0], [1.0, 0.8, 0.8]), false);
    assert_no_device_panic();
}

#[test]
fn ties_go_to_the_nearest_voxel_or_else_to_the_smallest_label() {
    let (context, _guard) = device();
    // Even to odd sizes: every position lies half-way between voxels, so that weights are exact, and votes are tied.
    let identity = rotation([0.0; 3], [1.0; 3]);
    check_spatial(context, [8, 10, 12], [5, 7, 9], 1, identity, true);
    // Halves along two axes and one; quarters.
    check_spatial(context, [9, 10, 12], [5, 7, 9], 1, identity, true);
    check_spatial(context, [9, 11, 12], [5, 7, 9], 2, identity, true);
    check_spatial(context, [9, 11, 13], [5, 7, 9], 1, rotation([0.0; 3], [0.75, 1.25, 0.5]), true);
    // Over the border.
    check_spatial(context, [4, 4, 6], [7, 7, 9], 1, identity, true);
}

#[test]
fn nearest_labels_are_those_of_the_nearest_voxel() {
    let (context, _guard) = device();
    let batch = Batch::new(context, [9, 11, 13], 1, 3);
    let patch = Patch::new([6, 7, 8], 1).unwrap();
    let (_all, image) = nan(context, patch.elements());
    let labels = context.empty(patch.voxels(), Dtype::U8).unwrap();
    let matrix = rotation([0.5, 0.2, -0.4], [1.2; 3]);
    let rounded = matrix.map(|row| row.map(|v| v as f32));
    let movement = Movement { matrix: rounded, region: Region::whole([9, 11, 13]), rule: LabelRule::Nearest };
    augment::spatial(context, &batch.sample(), &movement, &patch, &image, &labels).unwrap();
    for (voxel, code) in context.download::<u8>(&labels).unwrap().into_iter().enumerate() {
        let place = [voxel / 56, voxel / 8 % 7, voxel % 8];
        let centred: [f64; 3] = std::array::from_fn(|a| place[a] as f64 - (patch.dims()[a] as f64 - 1.0) / 2.0);
        let position: [f64; 3] = std::array::from_fn(|a| {
            (0..3).map(|k| matrix[a][k] * centred[k]).sum::<f64>() + (batch.volume.dims[a] as f64 - 1.0) / 2.0
        });
        if position.iter().all(|p| ((p - p.floor()) - 0.5).abs() > 1e-4) {
            assert_eq!(code, batch.code(position.map(|p| p.round_ties_even() as i64)), "{place:?}");
        }
    }
}

/// Nothing but the box that is touched is on the device: the same values to the bit, wherever it lies.
#[test]
fn the_touched_box_is_enough() {
    let (context, _guard) = device();
    let moves = [
        ([11, 14, 13], [7, 8, 9], 1, rotation([0.4, -0.3, 0.2], [1.1; 3])),
        ([15, 17, 19], [6, 5, 4], 3, rotation([0.0, 0.0, 0.3], [0.6; 3])),
        ([5, 6, 7], [9, 8, 7], 2, rotation([0.1, 0.5, -0.2], [1.4; 3])),
        ([8, 10, 12], [5, 7, 9], 1, rotation([0.0; 3], [1.0; 3])),
    ];
    let mut smaller = 0;
    for (from, to, channels, matrix) in moves {
        let batch = Batch::new(context, from, channels, 11);
        let matrix = matrix.map(|row| row.map(|v| v as f32));
        let patch = Patch::new(to, channels).unwrap();
        let moved = |sample: &Sample, region: Region| {
            let (all, image) = nan(context, patch.elements());
            let labels = context.empty(patch.voxels(), Dtype::U8).unwrap();
            let movement = Movement { matrix, region, rule: LabelRule::Vote };
            augment::spatial(context, sample, &movement, &patch, &image, &labels).map(|()| {
                let bits = written(context, &all, patch.elements()).iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                (bits, context.download::<u8>(&labels).unwrap())
            })
        };
        let part = |region: Region| {
            let ([depth, height, width], [z0, y0, x0]) = (region.dims, region.start);
            let voxels = (0..depth * height * width).map(|v| {
                let (z, y, x) = (z0 + v / (height * width), y0 + v / width % height, x0 + v % width);
                (z * from[1] + y) * from[2] + x
            });
            let codes: Vec<u8> = voxels.clone().map(|v| batch.codes[v]).collect();
            let values = voxels.flat_map(|v| (0..channels).map(move |c| v * channels + c));
            let values: Vec<f32> = values.map(|i| batch.volume.values[i] as f32).collect();
            (context.upload_f32(&values).unwrap(), context.upload(&codes, Dtype::U8).unwrap())
        };
        let of_box = |region: Region| {
            let (image, labels) = part(region);
            let patch = Patch::new(region.dims, channels).unwrap();
            moved(&Sample { patch, image: &image, labels: &labels, index: 0 }, region)
        };
        let touched = Region::touched(from, matrix, to);
        let whole = moved(&batch.sample(), Region::whole(from)).unwrap();
        assert_eq!(of_box(touched).unwrap(), whole, "{touched:?}");
        smaller += usize::from(touched.dims != from);
        // A box that lacks a layer of what is read.
        let ([z, y, x], [depth, height, width]) = (touched.start, touched.dims);
        let short = Region { start: [z + 1, y, x], dims: [depth - 1, height, width], ..touched };
        assert!(matches!(of_box(short), Err(KernelError::Shape { .. })));
    }
    assert!(smaller >= 2, "{smaller}");
}

// ------------------------------------------------------------------------------------------------ finish

#[test]
fn finished_patches_are_the_middle_mirrored_masked_and_labelled() {
    let (context, _guard) = device();
    for (from, to, channels) in [([7, 6, 9], [4, 5, 6], 2), ([5, 5, 5], [5, 5, 5], 1), ([6, 3, 8], [1, 2, 7], 3)] {
        let batch = Batch::new(context, from, channels, 5);
        let patch = Patch::new(to, channels).unwrap();
        let start: [usize; 3] = std::array::from_fn(|a| from[a] / 2 - to[a] / 2);
        let source = |place: [usize; 3]| batch.volume.voxel(std::array::from_fn(|a| start[a] + place[a]));
        let voxels: Vec<[usize; 3]> =
            (0..patch.voxels()).map(|v| [v / (to[1] * to[2]), v / to[2] % to[1], v % to[2]]).collect();

        let masked: Vec<bool> = (0..channels).map(|c| c % 2 == 0).collect();
        for bits in 0..8 {
            let mirror = [bits & 1 > 0, bits & 2 > 0, bits & 4 > 0];
            let how = Finish { mirror, masked: if bits % 2 == 0 { &masked } else { &[] } };
            // The second of two samples, the first of which has to stay as it is.
            let (all, images) = nan(context, 2 * patch.elements());
            let labels = context.upload(&vec![200u8; 2 * patch.voxels()], Dtype::U8).unwrap();
            let target = Sample { patch, image: &images, labels: &labels, index: 1 };
            augment::finish(context, &batch.sample(), &target, how).unwrap();
            let got = written(context, &all, 2 * patch.elements());
            let got_labels = context.download::<u8>(&labels).unwrap();
            assert!(got[..patch.elements()].iter().all(|v| v.is_nan()), "wrote to another sample");
            assert!(got_labels[..patch.voxels()].iter().all(|&l| l == 200), "wrote to another sample");
            for (v, place) in voxels.iter().enumerate() {
                let from: [usize; 3] = std::array::from_fn(|a| if mirror[a] { to[a] - 1 - place[a] } else { place[a] });
                let code = batch.codes[source(from)];
                assert_eq!(got_labels[patch.voxels() + v], code.max(1) - 1);
                for c in 0..channels {
                    let hidden = code == 0 && how.masked.get(c) == Some(&true);
                    let value = batch.volume.values[source(from) * channels + c] as f32;
                    let expected = if hidden { 0.0 } else { value };
                    assert_eq!(got[patch.elements() + v * channels + c], expected, "{mirror:?} {place:?}");
                }
            }
        }
    }
    assert_no_device_panic();
}

#[test]
fn finished_patches_have_the_types_that_are_asked_for() {
    let (context, _guard) = device();
    let dims = [3, 4, 5];
    let patch = Patch::new(dims, 2).unwrap();
    let image = uniform(9, patch.elements());
    // Code 256 is label 255, code 40001 a label that needs two bytes.
    let codes: Vec<u16> = (0..patch.voxels()).map(|i| [0, 1, 256, 40_001][i % 4]).collect();
    let (image_buffer, code_buffer) =
        (context.upload_f32(&image).unwrap(), context.upload(&codes, Dtype::U16).unwrap());
    let source = Sample { patch, image: &image_buffer, labels: &code_buffer, index: 0 };
    let labels = context.empty(patch.voxels(), Dtype::U16).unwrap();
    let dtype = if context.caps().f16 { Dtype::F16 } else { Dtype::F32 };
    let stored = context.empty(patch.elements(), dtype).unwrap();
    let target = Sample { patch, image: &stored, labels: &labels, index: 0 };
    augment::finish(context, &source, &target, Finish::default()).unwrap();
    let expected: Vec<u16> = codes.iter().map(|code| code.max(&1) - 1).collect();
    assert_eq!(context.download::<u16>(&labels).unwrap(), expected);
    if dtype == Dtype::F16 {
        let rounded: Vec<f16> = image.iter().map(|&v| f16::from_f32(v)).collect();
        assert_eq!(context.download::<f16>(&stored).unwrap(), rounded);
    }
    // Codes in two bytes, labels in one.
    let codes: Vec<u16> = codes.iter().map(|&code| code.min(256)).collect();
    let code_buffer = context.upload(&codes, Dtype::U16).unwrap();
    let source = Sample { labels: &code_buffer, ..source };
    let labels = context.empty(patch.voxels(), Dtype::U8).unwrap();
    let target = Sample { labels: &labels, ..target };
    augment::finish(context, &source, &target, Finish::default()).unwrap();
    let expected: Vec<u8> = codes.iter().map(|code| (code.max(&1) - 1) as u8).collect();
    assert_eq!(context.download::<u8>(&labels).unwrap(), expected);
}

// -------------------------------------------------------------------------------------------------- noise

/// Threefry-2x32-20 by its definition.
fn threefry(counter: [u32; 2], key: [u32; 2]) -> [u32; 2] {
    const ROTATIONS: [u32; 8] = [13, 15, 26, 6, 17, 29, 16, 24];
    let schedule = [key[0], key[1], key[0] ^ key[1] ^ 0x1bd1_1bda];
    let mut x = [counter[0].wrapping_add(schedule[0]), counter[1].wrapping_add(schedule[1])];
    for round in 0..20 {
        x[0] = x[0].wrapping_add(x[1]);
        x[1] = x[1].rotate_left(ROTATIONS[round % 8]) ^ x[0];
        if round % 4 == 3 {
            let group = round / 4 + 1;
            x[0] = x[0].wrapping_add(schedule[group % 3]);
            x[1] = x[1].wrapping_add(schedule[(group + 1) % 3]).wrapping_add(group as u32);
        }
    }
    x
}

/// The numbers of Random123's file of known answers.
#[test]
fn the_reference_of_the_generator_gives_the_published_numbers() {
    assert_eq!(threefry([0; 2], [0; 2]), [0x6b20_0159, 0x99ba_4efe]);
    assert_eq!(threefry([!0; 2], [!0; 2]), [0x1cb9_96fc, 0xbb00_2be7]);
    assert_eq!(threefry([0x243f_6a88, 0x85a3_08d3], [0x1319_8a2e, 0x0370_7344]), [0xc492_3a9c, 0x483d_f7a0]);
}

fn normal(index: u32, key: [u32; 2]) -> f64 {
    let [a, b] = threefry([index, 0], key);
    let uniform = (f64::from(a >> 8) + 1.0) / 16_777_216.0;
    let turn = f64::from(b >> 8) / 16_777_216.0;
    (-2.0 * uniform.ln()).sqrt() * (2.0 * std::f64::consts::PI * turn).cos()
}

#[test]
fn noise_is_that_of_the_generator_whatever_the_vectors() {
    let (context, _guard) = device();
    // Vectors of one element up to the widest.
    for (dims, channels) in SHAPES {
        let volume = Volume::new(dims, channels, 1);
        let (deviation, key) = (0.0731, [0x9e37_79b9, 12]);
        let mut values = volume.f32();
        values.resize(values.len() + 64, f32::NAN);
        let all = context.upload_f32(&values).unwrap();
        let image = all.part(0, volume.values.len()).unwrap();
        augment::noise(context, &volume.patch(), &image, deviation, key).unwrap();
        let got = written(context, &all, volume.values.len());
        let expected: Vec<f64> = (0u32..)
            .zip(&volume.values)
            .map(|(i, v)| f64::from(*v as f32) + f64::from(deviation) * normal(i, key))
            .collect();
        assert_close("noise", &got, &expected, 3e-6);
    }
}

#[test]
fn noise_is_normal_independent_of_its_neighbour_and_of_other_keys() {
    let (context, _guard) = device();
    let patch = Patch::new([16, 32, 64], 2).unwrap();
    let draw = |key| {
        let image = context.upload_f32(&vec![0.0; patch.elements()]).unwrap();
        augment::noise(context, &patch, &image, 1.0, key).unwrap();
        read(context, &image)
    };
    let (one, other) = (draw([1, 2]), draw([1, 3]));
    assert_eq!(one, draw([1, 2]));
    let n = one.len() as f64;
    let moment = |power: i32| one.iter().map(|&v| f64::from(v).powi(power)).sum::<f64>() / n;
    let products = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>() / n;
    // Four standard errors each.
    let bound = 4.0 / n.sqrt();
    assert!(moment(1).abs() < bound, "mean {}", moment(1));
    assert!((moment(2) - 1.0).abs() < bound * 2f64.sqrt(), "variance {}", moment(2));
    assert!((moment(4) - 3.0).abs() < bound * 96f64.sqrt(), "fourth moment {}", moment(4));
    assert!(products(&one, &other).abs() < bound, "keys are correlated");
    for lag in [1, 2, 8, 64, 128] {
        assert!(products(&one, &one[lag..]).abs() < bound, "neighbours at {lag} are correlated");
    }
}

// ------------------------------------------------------------------------------------------- convolution

fn reflected(i: i64, size: usize) -> usize {
    let (mut i, last) = (i, size as i64 - 1);
    if last == 0 {
        return 0;
    }
    while !(0..=last).contains(&i) {
        i = if i < 0 { -i } else { 2 * last - i };
    }
    i as usize
}

#[test]
fn blurred_patches_are_convolved_and_reflected() {
    let (context, _guard) = device();
    for (dims, channels) in SHAPES {
        let volume = Volume::new(dims, channels, 2);
        let sigmas = [0.5, 0.62, 0.81, 0.97, 1.0];
        // The last of several channels is left alone.
        let taps: Vec<Vec<f32>> = (0..channels)
            .map(|c| if c > 0 && c + 1 == channels { vec![1.0] } else { augment::gaussian_taps(sigmas[c]) })
            .collect();
        for axis in 0..3 {
            let expected = volume.map(|place, c| {
                let radius = taps[c].len() as i64 / 2;
                let value = |(t, weight): (usize, &f32)| {
                    let mut from = place;
                    from[axis] = reflected(place[axis] as i64 + t as i64 - radius, dims[axis]);
                    f64::from(*weight) * f64::from(volume.at(from, c) as f32)
                };
                taps[c].iter().enumerate().map(value).sum()
            });
            let (all, blurred) = nan(context, volume.values.len());
            augment::blur(context, &volume.patch(), &volume.upload(context), &blurred, axis, &taps).unwrap();
            let got = written(context, &all, volume.values.len());
            assert_close(&format!("blur of {dims:?} along {axis}"), &got, &expected.values, 2e-7);
        }
    }
}

#[test]
fn taps_are_as_many_as_upstream_has() {
    for (sigma, count) in [(0.5, 3), (0.6, 5), (0.75, 5), (0.9, 5), (0.95, 7), (1.0, 7)] {
        let taps = augment::gaussian_taps(sigma);
        assert_eq!(taps.len(), count, "sigma {sigma}");
        assert!((taps.iter().sum::<f32>() - 1.0).abs() < 1e-6);
        let (centre, beside) = (f64::from(taps[count / 2]), f64::from(taps[count / 2 + 1]));
        assert!((beside / centre - (-0.5 / (sigma * sigma)).exp()).abs() < 1e-6);
    }
}

/// The coarse image by its definition, and its linear interpolation.
#[test]
fn low_resolutions_are_the_nearest_down_and_linear_up() {
    let (context, _guard) = device();
    for (dims, channels) in SHAPES {
        let volume = Volume::new(dims, channels, 3);
        let factor = |c: usize| 0.5 + 0.13 * c as f64;
        let size = |c: usize| dims.map(|n| ((n as f64 * factor(c)).round_ties_even() as usize).max(1));
        let coarse: Vec<Option<[usize; 3]>> =
            (0..channels).map(|c| (c == 0 || c + 1 < channels).then(|| size(c))).collect();
        let fine_of = |k: usize, fine: usize, coarse: usize| ((2 * k + 1) * fine / (2 * coarse)).min(fine - 1);
        let expected = volume.map(|place, c| {
            let Some(coarse) = coarse[c] else { return f64::from(volume.at(place, c) as f32) };
            let ends: Vec<[(usize, f64); 2]> = (0..3)
                .map(|a| {
                    let scale = coarse[a] as f64 / dims[a] as f64;
                    let position = (scale * (place[a] as f64 + 0.5) - 0.5).max(0.0);
                    let (low, share) = (position as usize, position.fract());
                    let high = (low + 1).min(coarse[a] - 1);
                    [(fine_of(low, dims[a], coarse[a]), 1.0 - share), (fine_of(high, dims[a], coarse[a]), share)]
                })
                .collect();
            let corner = |k: usize| {
                let ends = [ends[0][k >> 2 & 1], ends[1][k >> 1 & 1], ends[2][k & 1]];
                ends.iter().map(|e| e.1).product::<f64>() * f64::from(volume.at(ends.map(|e| e.0), c) as f32)
            };
            (0..8).map(corner).sum()
        });
        let (all, out) = nan(context, volume.values.len());
        augment::low_resolution(context, &volume.patch(), &volume.upload(context), &out, &coarse).unwrap();
        let got = written(context, &all, volume.values.len());
        assert_close(&format!("low resolution of {dims:?}"), &got, &expected.values, 1e-6);
    }
}

// --------------------------------------------------------------------------------------------- intensities

/// Images of every shape, and one that is much larger than a block, unless the device is slow.
fn images() -> Vec<Volume> {
    let mut images: Vec<Volume> = SHAPES.iter().map(|&(dims, channels)| Volume::new(dims, channels, 4)).collect();
    if !is_slow() {
        images.push(Volume::new([20, 33, 41], 3, 5));
        images.push(Volume::new([24, 56, 40], 1, 6));
    }
    images
}

fn in_place(context: &Context, volume: &Volume, change: impl Fn(&Patch, &Buffer)) -> Vec<f32> {
    let mut values = volume.f32();
    values.resize(values.len() + 64, f32::NAN);
    let all = context.upload_f32(&values).unwrap();
    change(&volume.patch(), &all.part(0, volume.values.len()).unwrap());
    written(context, &all, volume.values.len())
}

#[test]
fn brightness_multiplies() {
    let (context, _guard) = device();
    for volume in images() {
        let factors: Vec<f32> = (0..volume.channels).map(|c| 0.8 + 0.13 * c as f32).collect();
        let got = in_place(context, &volume, |patch, image| {
            augment::brightness(context, patch, image, &factors).unwrap();
        });
        let expected: Vec<f32> =
            volume.f32().iter().enumerate().map(|(i, v)| v * factors[i % volume.channels]).collect();
        assert_eq!(got, expected);
    }
}

#[test]
fn contrast_scales_about_the_mean_and_keeps_the_range() {
    let (context, _guard) = device();
    for volume in images() {
        // The first channel shrinks, the second grows beyond its range.
        let factors: Vec<f32> = (0..volume.channels).map(|c| if c % 2 == 0 { 0.77 } else { 1.24 }).collect();
        let got =
            in_place(context, &volume, |patch, image| augment::contrast(context, patch, image, &factors).unwrap());
        let expected = volume.map(|place, c| {
            let channel = volume.channel(c);
            let (mean, (low, high)) = (mean(&channel), bounds(&channel));
            ((volume.at(place, c) - mean) * f64::from(factors[c]) + mean).clamp(low, high)
        });
        assert_close(&format!("contrast of {:?}", volume.dims), &got, &expected.values, 1e-6);
        for c in 0..volume.channels {
            let (low, high) = bounds(&volume.channel(c));
            let values = got.iter().skip(c).step_by(volume.channels);
            assert!(values.into_iter().all(|&v| (low as f32..=high as f32).contains(&v)));
        }
    }
}

#[test]
fn gamma_bends_and_retains_mean_and_deviation() {
    let (context, _guard) = device();
    for volume in images() {
        let exponents: Vec<f32> = (0..volume.channels).map(|c| if c % 2 == 0 { 1.43 } else { 0.71 }).collect();
        for (inverted, sign) in [(false, 1.0), (true, -1.0)] {
            let got = in_place(context, &volume, |patch, image| {
                augment::gamma(context, patch, image, &exponents, inverted).unwrap();
            });
            let bent: Vec<Vec<f64>> = (0..volume.channels)
                .map(|c| {
                    let x: Vec<f64> = volume.channel(c).iter().map(|v| v * sign).collect();
                    let ((low, high), exponent) = (bounds(&x), f64::from(exponents[c]));
                    let range = high - low;
                    let y: Vec<f64> =
                        x.iter().map(|v| ((v - low) / range.max(1e-7)).powf(exponent) * range + low).collect();
                    let ratio = deviation(&x) / deviation(&y).max(1e-7);
                    let (before, after) = (mean(&x), mean(&y));
                    y.iter().map(|v| ((v - after) * ratio + before) * sign).collect()
                })
                .collect();
            let expected = volume.map(|place, c| bent[c][volume.voxel(place)]);
            assert_close(&format!("gamma of {:?}, {sign}", volume.dims), &got, &expected.values, 2e-6);
        }
    }
}

#[test]
fn constant_channels_survive_every_change() {
    let (context, _guard) = device();
    let patch = Patch::new([4, 5, 6], 2).unwrap();
    // The second channel is constant.
    let values: Vec<f32> =
        uniform(8, patch.elements()).iter().enumerate().map(|(i, &v)| if i % 2 == 1 { -0.75 } else { v }).collect();
    for change in 0..3 {
        let image = context.upload_f32(&values).unwrap();
        match change {
            0 => augment::contrast(context, &patch, &image, &[1.2, 1.2]).unwrap(),
            1 => augment::gamma(context, &patch, &image, &[1.4, 1.4], true).unwrap(),
            _ => augment::gamma(context, &patch, &image, &[0.8, 0.8], false).unwrap(),
        }
        for (i, v) in read(context, &image).into_iter().enumerate() {
            assert!(v.is_finite() && (i % 2 == 0 || (v + 0.75).abs() < 1e-6), "change {change}: [{i}] is {v}");
        }
    }
}

#[test]
fn misuse_is_a_typed_error() {
    let (context, _guard) = device();
    let patch = Patch::new([2, 3, 4], 2).unwrap();
    let image = context.upload_f32(&vec![0.0; patch.elements()]).unwrap();
    let short = context.upload_f32(&[0.0; 3]).unwrap();
    let labels = context.upload(&vec![0u8; patch.voxels()], Dtype::U8).unwrap();
    let shape =
        |result: Result<(), KernelError>| assert!(matches!(result, Err(KernelError::Shape { .. })), "{result:?}");
    shape(Patch::new([0, 3, 4], 2).map(drop));
    assert!(matches!(Patch::new([1 << 20, 1 << 20, 4], 2), Err(KernelError::Limit { .. })));
    shape(augment::noise(context, &patch, &short, 0.1, [0; 2]));
    shape(augment::brightness(context, &patch, &image, &[1.0]));
    shape(augment::contrast(context, &patch, &image, &[1.0; 3]));
    shape(augment::gamma(context, &patch, &short, &[1.0; 2], false));
    shape(augment::blur(context, &patch, &image, &short, 0, &[vec![1.0], vec![1.0]]));
    shape(augment::blur(context, &patch, &image, &image, 3, &[vec![1.0], vec![1.0]]));
    shape(augment::blur(context, &patch, &image, &image, 0, &[vec![0.5; 2], vec![1.0]]));
    shape(augment::low_resolution(context, &patch, &image, &image, &[Some([1, 4, 4]), None]));
    shape(augment::low_resolution(context, &patch, &image, &image, &[Some([0, 3, 4]), None]));
    let sample = Sample { patch, image: &image, labels: &labels, index: 0 };
    shape(augment::finish(context, &Sample { index: 1, ..sample }, &sample, Finish::default()));
    let larger = Patch::new([2, 3, 5], 2).unwrap();
    let (larger_image, larger_labels) = (
        context.upload_f32(&vec![0.0; larger.elements()]).unwrap(),
        context.empty(larger.voxels(), Dtype::U8).unwrap(),
    );
    let larger = Sample { patch: larger, image: &larger_image, labels: &larger_labels, index: 0 };
    shape(augment::finish(context, &sample, &larger, Finish::default()));
    shape(augment::finish(context, &sample, &sample, Finish { masked: &[true], ..Finish::default() }));
    let floats = Sample { labels: &image, ..sample };
    assert!(augment::finish(context, &floats, &sample, Finish::default()).is_err());
    let i32s = context.upload(&vec![0i32; patch.voxels()], Dtype::I32).unwrap();
    let wrong = augment::finish(context, &Sample { labels: &i32s, ..sample }, &sample, Finish::default());
    assert!(matches!(wrong, Err(KernelError::Dtype { .. })), "{wrong:?}");
}
