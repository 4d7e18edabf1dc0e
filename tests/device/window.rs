//! Windows cut, added up and resolved on a device, against plain loops over the definition in f64.

use crate::common::convolution::{get, positions, put, types};
use crate::common::{assert_close, assert_no_device_panic, device, uniform};
use voxgrad::kernels::window::{self, NOT_FINITE, Output, Problem, Resampling};
use voxgrad::kernels::{Buffer, Context, Dtype, KernelError};

/// A case of extents that no register divides, and windows over it.
struct Case {
    image: [usize; 3],
    before: [usize; 3],
    padded: [usize; 3],
    window: [usize; 3],
    channels: usize,
    heads: usize,
    starts: Vec<[usize; 3]>,
}

impl Case {
    /// With more voxels than a window along the first axis, as many along the second, fewer along the third.
    fn ragged(channels: usize, heads: usize) -> Self {
        Self {
            image: [9, 7, 3],
            before: [0, 0, 1],
            padded: [9, 7, 5],
            window: [4, 5, 5],
            channels,
            heads,
            starts: [0, 3, 5].into_iter().flat_map(|z| [[z, 0, 0], [z, 2, 0]]).collect(),
        }
    }

    fn problem(&self, slices: usize) -> Problem {
        let volume = (self.image, self.before, self.padded);
        Problem::new(volume, self.window, self.channels, self.heads, slices).unwrap()
    }

    fn voxels(&self) -> usize {
        self.window.iter().product()
    }

    fn weights(&self) -> Vec<f32> {
        uniform(3, self.voxels()).iter().map(|weight| weight.abs() + 0.25).collect()
    }

    /// Logits of all windows, as they lie in the case.
    fn logits(&self) -> Vec<f32> {
        uniform(4, self.starts.len() * self.voxels() * self.heads)
    }

    /// Mean logits `[depth, height, width, heads]` of the case without padding, in f64.
    fn means(&self, logits: &[f32], weights: &[f32]) -> Vec<f64> {
        let padded: usize = self.padded.iter().product();
        let (mut sums, mut of_weights) = (vec![0.0; padded * self.heads], vec![0.0; padded]);
        for (start, logits) in self.starts.iter().zip(logits.chunks(self.voxels() * self.heads)) {
            for (at, p) in positions(self.window).enumerate() {
                let place: [usize; 3] = std::array::from_fn(|a| start[a] + p[a]);
                let to = flat(place, self.padded);
                of_weights[to] += f64::from(weights[at]);
                for head in 0..self.heads {
                    sums[to * self.heads + head] += f64::from(logits[at * self.heads + head]) * f64::from(weights[at]);
                }
            }
        }
        let image = positions(self.image).map(|p| flat(std::array::from_fn(|a| p[a] + self.before[a]), self.padded));
        let (sums, of_weights) = (&sums, &of_weights);
        image.flat_map(|at| (0..self.heads).map(move |h| sums[at * self.heads + h] / of_weights[at])).collect()
    }
}

fn flat(p: [usize; 3], dims: [usize; 3]) -> usize {
    (p[0] * dims[1] + p[1]) * dims[2] + p[2]
}

fn mirrored(p: [usize; 3], dims: [usize; 3], mirror: [bool; 3]) -> [usize; 3] {
    std::array::from_fn(|a| if mirror[a] { dims[a] - 1 - p[a] } else { p[a] })
}

fn subsets() -> impl Iterator<Item = [bool; 3]> {
    (0..8).map(|bits| [bits & 1 != 0, bits & 2 != 0, bits & 4 != 0])
}

#[test]
fn windows_are_cut_mirrored_and_padded() {
    let (context, _guard) = device();
    for channels in [1, 3] {
        let case = Case::ragged(channels, 1);
        let problem = case.problem(4);
        let values = uniform(1, problem.case_len());
        let volume = context.upload_f32(&values).unwrap();
        for (dtype, mirror) in types(context).into_iter().flat_map(|dtype| subsets().map(move |mirror| (dtype, mirror)))
        {
            let len = case.starts.len() * problem.window_len();
            let all = put(context, &vec![f32::NAN; len + 64], dtype);
            window::cut(context, &problem, &volume, &case.starts, mirror, &all.part(0, len).unwrap()).unwrap();
            let found = get(context, &all);
            assert!(found[len..].iter().all(|value| value.is_nan()), "wrote behind the windows");
            let mut expected = Vec::new();
            for start in &case.starts {
                for p in positions(case.window) {
                    let p = mirrored(p, case.window, mirror);
                    let at: [isize; 3] = std::array::from_fn(|a| (start[a] + p[a]) as isize - case.before[a] as isize);
                    let is_inside = (0..3).all(|a| (0..case.image[a] as isize).contains(&at[a]));
                    expected.extend((0..channels).map(|channel| match is_inside {
                        true => {
                            let voxel = flat(at.map(|place| place as usize), case.image);
                            values[channel * case.image.iter().product::<usize>() + voxel]
                        }
                        false => 0.0,
                    }));
                }
            }
            // Rounded as any other value of that type.
            assert_eq!(found[..len], get(context, &put(context, &expected, dtype)), "{dtype:?} {mirror:?}");
        }
    }
    assert_no_device_panic();
}

/// Logits of windows as a network that saw them mirrored would give them.
fn mirror_logits(case: &Case, logits: &[f32], mirror: [bool; 3]) -> Vec<f32> {
    let mut result = Vec::with_capacity(logits.len());
    for logits in logits.chunks(case.voxels() * case.heads) {
        for p in positions(case.window) {
            let at = flat(mirrored(p, case.window, mirror), case.window) * case.heads;
            result.extend_from_slice(&logits[at..at + case.heads]);
        }
    }
    result
}

/// Sums and weights of all windows, with all slices held.
fn summed(context: &Context, case: &Case, problem: &Problem, logits: &[f32], dtype: Dtype) -> [Buffer; 2] {
    let weights = context.upload_f32(&case.weights()).unwrap();
    let of_weights = problem.of_weights();
    let lens = [problem.sums_len(), of_weights.sums_len()];
    let [sums, sum_of_weights] = lens.map(|len| context.upload_f32(&vec![f32::NAN; len]).unwrap());
    window::clear(context, problem, 0..case.padded[0], &sums).unwrap();
    window::clear(context, &of_weights, 0..case.padded[0], &sum_of_weights).unwrap();
    let ones = context.upload_f32(&vec![1.0; case.voxels()]).unwrap();
    // Half as it is, half mirrored along an odd choice of axes.
    let mirror = [true, false, true];
    let passes = [(logits.to_vec(), [false; 3]), (mirror_logits(case, logits, mirror), mirror)];
    let passes = passes.map(|(logits, mirror)| (put(context, &logits, dtype), mirror));
    for (sample, &start) in case.starts.iter().enumerate() {
        window::add(context, &of_weights, &ones, 0, start, [false; 3], (&weights, 1.0), &sum_of_weights).unwrap();
        for (logits, mirror) in &passes {
            window::add(context, problem, logits, sample, start, *mirror, (&weights, 0.5), &sums).unwrap();
        }
    }
    [sums, sum_of_weights]
}

/// Every place as it is.
fn identity(extents: [usize; 3]) -> [Vec<[(usize, f32); 2]>; 3] {
    extents.map(|n| (0..n).map(|i| [(i, 1.0), (i, 0.0)]).collect())
}

fn resampling(context: &Context, problem: &Problem, along: &[Vec<[(usize, f32); 2]>; 3]) -> Resampling {
    Resampling::new(context, problem, along.each_ref().map(Vec::as_slice)).unwrap()
}

fn mean_logits(context: &Context, problem: &Problem, [sums, weights]: &[Buffer; 2], grid: &Resampling) -> Vec<f32> {
    let [depth, height, width] = grid.extents();
    let heads = problem.logits_len() / problem.weights_len();
    let mut result = Vec::new();
    // In two parts.
    for slices in [0..depth / 2, depth / 2..depth] {
        let logits = context.empty(slices.len() * height * width * heads, Dtype::F32).unwrap();
        window::resolve(context, problem, (sums, weights), grid, slices, Output::Logits(&logits)).unwrap();
        result.extend(get(context, &logits));
    }
    result
}

#[test]
fn logits_are_weighted_means() {
    let (context, _guard) = device();
    for heads in [1, 3, 4, 8] {
        let case = Case::ragged(1, heads);
        let problem = case.problem(case.padded[0]);
        for dtype in types(context) {
            let logits = get(context, &put(context, &case.logits(), dtype));
            let sums = summed(context, &case, &problem, &logits, dtype);
            let grid = resampling(context, &problem, &identity(case.image));
            let found = mean_logits(context, &problem, &sums, &grid);
            assert_close(&format!("{heads} heads in {dtype:?}"), &found, &case.means(&logits, &case.weights()), 1e-6);
            // Again, to the same bits.
            let again = summed(context, &case, &problem, &logits, dtype);
            assert_eq!(found, mean_logits(context, &problem, &again, &grid));
        }
    }
    assert_no_device_panic();
}

/// Linear along depth and width, and every second row.
fn finer(case: &Case) -> [Vec<[(usize, f32); 2]>; 3] {
    let linear = |n: usize, to: usize| -> Vec<[(usize, f32); 2]> {
        (0..to)
            .map(|i| {
                let position = i as f32 * (n - 1) as f32 / (to - 1) as f32;
                let low = (position as usize).min(n - 1);
                let share = position - low as f32;
                [(low, 1.0 - share), ((low + 1).min(n - 1), share)]
            })
            .collect()
    };
    let rows = (0..case.image[1].div_ceil(2)).map(|i| [(2 * i, 1.0), (2 * i, 0.0)]).collect();
    [linear(case.image[0], 14), rows, linear(case.image[2], 5)]
}

/// The same from means, in f64.
fn resampled(case: &Case, means: &[f64], along: &[Vec<[(usize, f32); 2]>; 3]) -> Vec<f64> {
    let extents = along.each_ref().map(Vec::len);
    let corners = |p: [usize; 3]| {
        positions([2; 3]).map(move |k| {
            let corner: [(usize, f32); 3] = std::array::from_fn(|a| along[a][p[a]][k[a]]);
            let share: f64 = corner.iter().map(|&(_, share)| f64::from(share)).product();
            (flat(corner.map(|(place, _)| place), case.image), share)
        })
    };
    let mean = |p, head| corners(p).map(|(at, share)| share * means[at * case.heads + head]).sum();
    let mean: &dyn Fn([usize; 3], usize) -> f64 = &mean;
    positions(extents).flat_map(|p| (0..case.heads).map(move |head| mean(p, head))).collect()
}

#[test]
fn other_grids_labels_and_regions() {
    let (context, _guard) = device();
    for heads in [1, 4] {
        let case = Case::ragged(2, heads);
        let problem = case.problem(case.padded[0]);
        let logits = case.logits();
        let sums = summed(context, &case, &problem, &logits, Dtype::F32);
        let values: Vec<u32> = (0..heads as u32).map(|head| 10 + 3 * head).collect();
        let on_device = context.upload(&values, Dtype::U32).unwrap();
        for along in [identity(case.image), finer(&case)] {
            let grid = resampling(context, &problem, &along);
            let expected = resampled(&case, &case.means(&logits, &case.weights()), &along);
            assert_close("resampled", &mean_logits(context, &problem, &sums, &grid), &expected, 1e-6);
            let [depth, height, width] = grid.extents();
            let labels = &context.empty(depth * height * width, Dtype::U32).unwrap();
            for is_region in [false, true] {
                let output = match is_region {
                    true => Output::LastPositive { values: &on_device, labels },
                    false => Output::Largest { values: &on_device, labels },
                };
                window::resolve(context, &problem, (&sums[0], &sums[1]), &grid, 0..depth, output).unwrap();
                let found: Vec<u32> = context.download(labels).unwrap();
                let expected = expected.chunks(heads).map(|voxel| match is_region {
                    true => voxel.iter().rposition(|&value| value > 0.0).map_or(0, |head| values[head]),
                    false => values[(0..heads).rev().max_by(|&a, &b| voxel[a].total_cmp(&voxel[b])).unwrap()],
                });
                assert_eq!(found, expected.collect::<Vec<_>>(), "{heads} heads, regions: {is_region}");
            }
        }
    }
    assert_no_device_panic();
}

/// With five of nine slices held, slices are taken out and used again as windows go on.
#[test]
fn slices_are_used_again() {
    let (context, _guard) = device();
    let case = Case::ragged(1, 3);
    let (whole, problem) = (case.problem(case.padded[0]), case.problem(5));
    let (logits, of_weights) = (case.logits(), problem.of_weights());
    let all = summed(context, &case, &whole, &logits, Dtype::F32);
    let expected = mean_logits(context, &whole, &all, &resampling(context, &whole, &identity(case.image)));
    let grid = resampling(context, &problem, &identity(case.image));
    let [sums, weights] =
        [problem.sums_len(), of_weights.sums_len()].map(|len| context.upload_f32(&vec![0.0; len]).unwrap());
    let ones = context.upload_f32(&vec![1.0; case.voxels()]).unwrap();
    let weight = context.upload_f32(&case.weights()).unwrap();
    let mirror = [true, false, true];
    let [plain, other] =
        [logits.clone(), mirror_logits(&case, &logits, mirror)].map(|l| context.upload_f32(&l).unwrap());
    let (mut found, mut first) = (Vec::new(), 0);
    for (sample, &start) in case.starts.iter().enumerate() {
        take_out(context, &problem, (&sums, &weights), &grid, first..start[0], &mut found);
        first = start[0];
        window::add(context, &of_weights, &ones, 0, start, [false; 3], (&weight, 1.0), &weights).unwrap();
        window::add(context, &problem, &plain, sample, start, [false; 3], (&weight, 0.5), &sums).unwrap();
        window::add(context, &problem, &other, sample, start, mirror, (&weight, 0.5), &sums).unwrap();
    }
    take_out(context, &problem, (&sums, &weights), &grid, first..case.padded[0], &mut found);
    assert_eq!(found, expected);
    assert_no_device_panic();
}

fn take_out(
    context: &Context,
    problem: &Problem,
    (sums, weights): (&Buffer, &Buffer),
    grid: &Resampling,
    slices: std::ops::Range<usize>,
    found: &mut Vec<f32>,
) {
    if slices.is_empty() {
        return;
    }
    let [_, height, width] = grid.extents();
    let logits = context.empty(slices.len() * height * width * 3, Dtype::F32).unwrap();
    window::resolve(context, problem, (sums, weights), grid, slices.clone(), Output::Logits(&logits)).unwrap();
    found.extend(get(context, &logits));
    window::clear(context, problem, slices.clone(), sums).unwrap();
    window::clear(context, &problem.of_weights(), slices, weights).unwrap();
}

/// Infinity and NaN are labels of their own, wherever among the heads they stand.
#[test]
fn what_is_no_number_gets_no_label() {
    let (context, _guard) = device();
    let case = Case { starts: vec![[0; 3]], image: [4, 5, 5], before: [0; 3], padded: [4, 5, 5], ..Case::ragged(1, 3) };
    let problem = case.problem(4);
    let grid = resampling(context, &problem, &identity(case.image));
    let values = context.upload(&[0u32, 1, 2], Dtype::U32).unwrap();
    for (value, head) in
        [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].into_iter().flat_map(|v| (0..3).map(move |h| (v, h)))
    {
        let mut logits = case.logits();
        logits[17 * 3 + head] = value;
        let sums = summed(context, &case, &problem, &logits, Dtype::F32);
        let labels = &context.empty(100, Dtype::U32).unwrap();
        for output in [Output::Largest { values: &values, labels }, Output::LastPositive { values: &values, labels }] {
            window::resolve(context, &problem, (&sums[0], &sums[1]), &grid, 0..4, output).unwrap();
            let found: Vec<u32> = context.download(labels).unwrap();
            let bad: Vec<usize> = (0..100).filter(|&voxel| found[voxel] == NOT_FINITE).collect();
            assert_eq!(bad, [17], "{value} as head {head}, {output:?}");
        }
    }
}

#[test]
fn misuse_is_a_typed_error() {
    let (context, _guard) = device();
    let volume = ([4; 3], [0; 3], [4; 3]);
    let shapes = [
        (([0, 4, 4], [0; 3], [4; 3]), [2; 3], 1, 1, 2),
        (volume, [0; 3], 1, 1, 2),
        (volume, [2; 3], 0, 1, 2),
        (volume, [2; 3], 1, 0, 2),
        (volume, [5, 2, 2], 1, 1, 5),
        (volume, [2; 3], 1, 1, 1),
        (([4; 3], [1; 3], [4; 3]), [2; 3], 1, 1, 2),
        (([usize::MAX, 4, 4], [0; 3], [usize::MAX, 4, 4]), [2; 3], 1, 1, 2),
    ];
    for (volume, window, channels, heads, slices) in shapes {
        let refused = Problem::new(volume, window, channels, heads, slices);
        assert!(matches!(refused, Err(KernelError::Shape { .. })), "{volume:?} {window:?} {channels} {heads} {slices}");
    }
    let problem = Problem::new(volume, [2; 3], 1, 2, 3).unwrap();
    let f32s = |len: usize| context.upload_f32(&vec![0.0; len]).unwrap();
    let (case, windows, logits) = (f32s(64), f32s(8), f32s(16));
    let (weights, sums, of_weights) = (f32s(8), f32s(96), f32s(48));
    let cut = |starts: &[[usize; 3]], to: &Buffer| window::cut(context, &problem, &case, starts, [false; 3], to);
    cut(&[[2; 3]], &windows).unwrap();
    for refused in [cut(&[[3, 2, 2]], &windows), cut(&[[usize::MAX, 0, 0]], &windows), cut(&[[0; 3]; 2], &windows)] {
        assert!(matches!(refused, Err(KernelError::Shape { .. })), "{refused:?}");
    }
    let integers = context.upload(&[0u32; 16], Dtype::U32).unwrap();
    assert!(matches!(cut(&[[0; 3]], &integers.part(0, 8).unwrap()), Err(KernelError::Dtype { .. })));
    let add = |logits: &Buffer, sample, start| {
        window::add(context, &problem, logits, sample, start, [false; 3], (&weights, 1.0), &sums)
    };
    add(&logits, 0, [2; 3]).unwrap();
    for refused in [add(&logits, 1, [0; 3]), add(&windows, 0, [0; 3]), add(&logits, 0, [0, 0, 3])] {
        assert!(matches!(refused, Err(KernelError::Shape { .. })), "{refused:?}");
    }
    assert!(matches!(add(&integers, 0, [0; 3]), Err(KernelError::Dtype { .. })));
    assert!(matches!(window::clear(context, &problem, 0..4, &sums), Err(KernelError::Shape { .. })));
    let outside = Resampling::new(context, &problem, [&[[(4, 1.0), (0, 0.0)]], &[[(0, 1.0); 2]], &[[(0, 1.0); 2]]]);
    assert!(matches!(outside, Err(KernelError::Shape { .. })));
    let grid = resampling(context, &problem, &identity([4; 3]));
    let resolve = |slices, to: &Buffer| {
        window::resolve(context, &problem, (&sums, &of_weights), &grid, slices, Output::Logits(to))
    };
    for refused in [resolve(0..5, &f32s(160)), resolve(2..2, &f32s(0)), resolve(0..2, &f32s(32))] {
        assert!(matches!(refused, Err(KernelError::Shape { .. })), "{refused:?}");
    }
}
