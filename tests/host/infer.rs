//! Window geometry by worked numbers, accumulation by its identity, export against nnU-Net's predictions.

use approx::assert_relative_eq;
use ndarray::{Array3, Array4, Ix4};
use voxgrad::augment::flip;
use voxgrad::dataset::plans::Plans;
use voxgrad::dataset::{CaseFiles, Dataset, cases_in};

use voxgrad::infer::window::{SMALLEST_WEIGHT, axis_starts, importance_map};
use voxgrad::infer::{Accumulator, SlidingWindow, export, mirror_subsets};
use voxgrad::io::read_labels;
use voxgrad::preprocess::{Preprocessor, Properties, RawCase, resample};
use voxgrad::{Compat, Error};

use crate::common::{data, npz};

#[test]
fn starts_are_evenly_spread() {
    assert_eq!(axis_starts(110, 64, 0.5), [0, 23, 46]);
    assert_eq!(axis_starts(64, 64, 0.5), [0]);
    assert_eq!(axis_starts(65, 64, 0.5), [0, 1]);
    let window = SlidingWindow::new([140, 171, 136], [128, 160, 112], 0.5).unwrap();
    assert_eq!(window.starts.len(), 8);
    assert_eq!(window.starts[0], [0, 0, 0]);
    assert_eq!(window.starts[1], [0, 0, 24]);
    assert_eq!(window.starts[7], [12, 11, 24]);
    for step in [0.0, -0.5, 1.1, f64::NAN] {
        assert!(matches!(SlidingWindow::new([4; 3], [2; 3], step), Err(Error::Setting { .. })));
    }
}

#[test]
fn small_volumes_are_padded_centrally() {
    let window = SlidingWindow::new([3, 8, 6], [8, 8, 8], 0.5).unwrap();
    assert_eq!((window.padded, window.before), ([8, 8, 8], [2, 0, 1]));
    assert_eq!(window.starts, [[0, 0, 0]]);
    let volume = Array4::from_elem((1, 3, 8, 6), 1.0);
    let mut patch = vec![f32::NAN; 512];
    window.extract(volume.view(), [0, 0, 0], &mut patch).unwrap();
    assert_eq!(patch.iter().sum::<f32>(), 144.0);
    assert_eq!(patch[2 * 64 + 1], 1.0);
    assert_eq!(patch[2 * 64], 0.0);
    assert!(window.extract(volume.view(), [0, 0, 0], &mut patch[1..]).is_err());
}

#[test]
fn importance_is_a_gaussian_with_a_floor() {
    let map = importance_map([128, 128, 128]);
    let at = |z: usize, y: usize, x: usize| map[(z * 128 + y) * 128 + x];
    assert_eq!(at(64, 64, 64), 10.0);
    // 10 exp(-8) at the end of an axis, one deviation is 16 voxels.
    assert_relative_eq!(at(0, 64, 64), 0.003_354_626, epsilon = 1e-8);
    assert_relative_eq!(at(64, 80, 64), 10.0 * (-0.5f32).exp(), epsilon = 1e-6);
    assert_eq!(at(0, 0, 0), SMALLEST_WEIGHT);
    assert_eq!(SMALLEST_WEIGHT, 2f32.powi(-24));
    // Odd patches have their centre in the middle.
    let odd = importance_map([1, 1, 5]);
    assert_eq!(odd[2], 10.0);
    assert_eq!(odd[0], odd[4]);
}

/// Patches cut from a volume and put together again are the volume.
#[test]
fn accumulating_the_image_gives_the_image() {
    for (shape, patch) in [([9, 11, 10], [4, 5, 6]), ([3, 11, 4], [4, 5, 6])] {
        let volume = Array4::from_shape_fn((3, shape[0], shape[1], shape[2]), |(c, z, y, x)| {
            (c * 1000 + z * 100 + y * 10 + x) as f32
        });
        let window = SlidingWindow::new(shape, patch, 0.5).unwrap();
        let mut sum = Accumulator::new(window.clone(), 3);
        let mut buffer = vec![0.0; window.patch_voxels() * 3];
        let mut result = Vec::new();
        let mut slices = 0;
        let mut consume = |slice: &[f32]| {
            assert_eq!(slice.len(), shape[1] * shape[2] * 3);
            slices += 1;
            result.extend_from_slice(slice);
            Ok(())
        };
        for &start in &window.starts {
            window.extract(volume.view(), start, &mut buffer).unwrap();
            sum.add(start, &buffer, &mut consume).unwrap();
        }
        let last = window.starts[window.starts.len() - 1];
        assert!(sum.add([9, 0, 0], &buffer, &mut consume).is_err());
        assert!(sum.add(last, &buffer[3..], &mut consume).is_err());
        if last[0] > 0 {
            assert!(sum.add([0, 0, 0], &buffer, &mut consume).is_err(), "slices that have been handed on");
        }
        sum.finish(consume).unwrap();
        assert_eq!(slices, shape[0]);
        let expected = volume.permuted_axes([1, 2, 3, 0]);
        assert_eq!(result.len(), expected.len());
        for (found, expected) in result.iter().zip(&expected) {
            assert_relative_eq!(*found, *expected, max_relative = 1e-6, epsilon = 1e-4);
        }
    }
}

fn all_slices(sum: Accumulator) -> Vec<f32> {
    let mut result = Vec::new();
    let collect = |slice: &[f32]| {
        result.extend_from_slice(slice);
        Ok(())
    };
    sum.finish(collect).unwrap();
    result
}

/// A slice is handed on as soon as no later patch reaches it, not before: a second pass at one depth adds to it.
#[test]
fn slices_come_when_they_are_complete() {
    let window = SlidingWindow::new([8, 2, 2], [4, 2, 2], 0.5).unwrap();
    assert_eq!(window.starts, [[0, 0, 0], [2, 0, 0], [4, 0, 0]]);
    let mut sum = Accumulator::new(window, 1);
    let came = std::cell::RefCell::new(Vec::new());
    let consume = |slice: &[f32]| {
        came.borrow_mut().push(slice[0]);
        Ok(())
    };
    let map = importance_map([4, 2, 2]);
    let mean = |at: usize| (map[4 * (at + 2)] + 5.0 * map[4 * at]) / (map[4 * (at + 2)] + map[4 * at]);
    sum.add([0, 0, 0], &[1.0; 16], consume).unwrap();
    assert_eq!(came.borrow().len(), 0);
    sum.add([2, 0, 0], &[5.0; 16], consume).unwrap();
    assert_eq!(came.borrow()[..], [1.0, 1.0]);
    // Nothing at depth 4: the slices that are left hold the second patch, and nothing.
    sum.finish(consume).unwrap();
    for (found, expected) in came.borrow().iter().zip([1.0, 1.0, mean(0), mean(1), 5.0, 5.0, 0.0, 0.0]) {
        assert_relative_eq!(*found, expected, max_relative = 1e-6);
    }
    assert_eq!(came.borrow().len(), 8);
}

/// Overlapping patches that disagree are averaged by their weights.
#[test]
fn overlaps_are_weighted_means() {
    let window = SlidingWindow::new([1, 1, 6], [1, 1, 4], 0.5).unwrap();
    assert_eq!(window.starts, [[0, 0, 0], [0, 0, 2]]);
    let mut sum = Accumulator::new(window, 1);
    let none_yet = |_: &[f32]| panic!("the only slice is not complete");
    sum.add([0, 0, 0], &[1.0; 4], none_yet).unwrap();
    sum.add([0, 0, 2], &[3.0; 4], none_yet).unwrap();
    let map = importance_map([1, 1, 4]);
    let result = all_slices(sum);
    for (found, expected) in [(0, 1.0), (1, 1.0), (4, 3.0), (5, 3.0)].map(|(i, e)| (result[i], e)) {
        assert_relative_eq!(found, expected, epsilon = 1e-6);
    }
    let expected = (map[2] + 3.0 * map[0]) / (map[2] + map[0]);
    assert_relative_eq!(result[2], expected, epsilon = 1e-6);
}

#[test]
fn mirror_passes() {
    assert_eq!(mirror_subsets([true; 3]).len(), 8);
    assert_eq!(mirror_subsets([true; 3])[0], [false; 3]);
    assert_eq!(mirror_subsets([false; 3]), [[false; 3]]);
    let two = mirror_subsets([true, false, true]);
    assert_eq!(two.len(), 4);
    assert!(two.iter().all(|subset| !subset[1]));
    // Flipping input and output cancels for a network that looks at single voxels.
    let patch: Vec<f32> = (0..24).map(|i| i as f32).collect();
    for axes in mirror_subsets([true; 3]) {
        let mut flipped = patch.clone();
        flip(&mut flipped, [2, 3, 2], 2, axes);
        flipped.iter_mut().for_each(|v| *v *= 2.0);
        flip(&mut flipped, [2, 3, 2], 2, axes);
        assert!(flipped.iter().zip(&patch).all(|(a, b)| *a == 2.0 * b));
    }
}

fn preprocessor(name: &str) -> (Dataset, Preprocessor) {
    let dataset = Dataset::open(&data(name).join("raw")).unwrap();
    let plans = Plans::read(&data(name).join("preprocessed/nnUNetPlans.json")).unwrap();
    let configuration = plans.configuration("3d_fullres").unwrap();
    let labels = dataset.labels.clone();
    let preprocessor = Preprocessor::from_plans(&plans, &configuration, labels, Compat::Corrected).unwrap();
    (dataset, preprocessor)
}

/// Probabilities that nnU-Net saved decode to the segmentation it wrote.
#[test]
fn decodes_like_nnunet() {
    for name in ["brats_regions", "brats_labels_anisotropic"] {
        let (_, preprocessor) = preprocessor(name);
        let archive = data(name).join("predictions/case_010.npz");
        let probabilities = npz::read(&archive, "probabilities");
        let planar = probabilities.into_dimensionality::<Ix4>().unwrap();
        let interleaved: Vec<f32> = planar.permuted_axes([1, 2, 3, 0]).iter().map(|&v| v as f32).collect();
        let found = preprocessor.labels.segmentation_from_probabilities(&interleaved).unwrap();
        let expected = read_labels(&data(name).join("predictions/case_010.nii.gz")).unwrap().data;
        assert!(expected.iter().any(|&l| l > 0));
        assert!(found.iter().zip(&expected).all(|(a, b)| i32::from(*a) == i32::from(*b)), "{name}");
    }
}

/// From raw files to what nnU-Net gave its network, and from its network's logits to the file it wrote.
#[test]
fn inference_begins_and_ends_like_nnunets() {
    let name = "brats_labels_anisotropic";
    let (dataset, preprocessor) = preprocessor(name);
    let images = data(name).join("raw/imagesTs");
    let files = &cases_in(&images, None, &dataset.json).unwrap()[0];
    assert_eq!(files.name, "case_011");
    let case = preprocessor.run(RawCase::read(files, &dataset.labels).unwrap()).unwrap();
    let archive = data(name).join("predictions/case_011_network.npz");
    let array = |key| npz::read(&archive, key).into_dimensionality::<Ix4>().unwrap();
    let input = array("input");
    assert_eq!(case.data.dim(), input.dim());
    for (found, expected) in case.data.iter().zip(&input) {
        assert_relative_eq!(f64::from(*found), *expected, epsilon = 1e-5);
    }
    let logits = array("logits").permuted_axes([1, 2, 3, 0]);
    let logits: Vec<f32> = logits.iter().map(|&v| v as f32).collect();
    let shape: [usize; 3] = case.seg.dim().into();
    let found = export::segmentation(&logits, shape, &case.properties, &preprocessor).unwrap();
    let written = read_labels(&data(name).join("predictions/case_011.nii.gz")).unwrap().data;
    assert!(written.iter().any(|&l| l > 0));
    assert_eq!(found.mapv(|label| label as i16), written);

    // nnU-Net's probabilities, which are those of logits in half precision.
    let both = export::prediction(&logits, shape, &case.properties, &preprocessor).unwrap();
    assert_eq!(both.labels, found);
    let written = npz::read(&data(name).join("predictions/case_011.npz"), "probabilities");
    let written = written.into_dimensionality::<Ix4>().unwrap();
    assert_eq!(both.probabilities.dim(), written.dim());
    let apart = both.probabilities.iter().zip(&written).map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
    assert!(apart < 2e-3, "{apart}");
}

/// Logits that encode the cropped labels come back as the labels, in place.
#[test]
fn export_reverts_the_crop() {
    let (dataset, preprocessor) = preprocessor("brats_labels_anisotropic");
    let files = CaseFiles { label: None, ..dataset.cases[0].clone() };
    let case = preprocessor.run(RawCase::read(&files, &dataset.labels).unwrap()).unwrap();
    let shape: [usize; 3] = case.seg.dim().into();
    // Class 2 inside the brain, background elsewhere.
    let logits: Vec<f32> =
        case.seg.iter().flat_map(|&l| if l == 0 { [0.0, 0.0, 1.0, 0.0] } else { [1.0, 0.0, 0.0, 0.0] }).collect();
    let written = export::segmentation(&logits, shape, &case.properties, &preprocessor).unwrap();
    let raw = voxgrad::io::read_image(&files.images[0]).unwrap().data;
    assert_eq!(written.dim(), raw.dim());
    for (label, value) in written.iter().zip(&raw) {
        assert!(*value == 0.0 || *label == 2);
    }
    assert!(export::segmentation(&logits[4..], shape, &case.properties, &preprocessor).is_err());
}

/// Transposed and resampled: axes return to their places, logits to the raw spacing.
#[test]
fn export_reverts_transposition_and_resampling() {
    let (_, mut preprocessor) = preprocessor("brats_labels_anisotropic");
    preprocessor.transpose_forward = [2, 0, 1];
    preprocessor.spacing = [2.0, 1.0, 1.0];
    let properties = Properties {
        spacing: [1.0, 1.0, 1.0],
        shape_before_cropping: [8, 5, 6],
        bbox: [[1, 7], [0, 5], [2, 6]],
        shape_after_cropping: [6, 5, 4],
    };
    // Three slices of 2 mm along the transposed first axis; the middle one is class 3.
    let logits: Vec<f32> = (0..3 * 5 * 4)
        .flat_map(|voxel| if voxel / 20 == 1 { [0.0, 0.0, 0.0, 1.0] } else { [1.0, 0.0, 0.0, 0.0] })
        .collect();
    let found = export::segmentation(&logits, [3, 5, 4], &properties, &preprocessor).unwrap();
    let expected =
        Array3::from_shape_fn(
            (5, 6, 8),
            |(b, c, a)| {
                if (3..5).contains(&a) && (2..6).contains(&c) && b < 5 { 3 } else { 0 }
            },
        );
    assert_eq!(found, expected);
}

/// Slice by slice, the labels are those of the whole volume resampled at once, to the last bit: larger and smaller, along
/// any axes, with a separate axis wherever it lies, for labels and for regions.
#[test]
fn exporting_in_slices_is_exporting_the_whole() {
    for (name, separate) in [("brats_regions", None), ("brats_labels_anisotropic", Some(0)), ("brats_regions", Some(2))]
    {
        let (_, mut preprocessor) = preprocessor(name);
        preprocessor.transpose_forward = [1, 2, 0];
        let heads = preprocessor.labels.num_segmentation_heads();
        for (from, to) in
            [([4, 9, 6], [9, 5, 13]), ([9, 5, 6], [4, 5, 9]), ([5, 6, 7], [5, 9, 7]), ([1, 3, 2], [7, 1, 5])]
        {
            let mut spacing = [1.0; 3];
            separate.into_iter().for_each(|axis: usize| spacing[axis] = 4.0);
            preprocessor.spacing = spacing;
            let backward = [2, 0, 1];
            let properties = Properties {
                spacing: backward.map(|axis| spacing[axis] * from[axis] as f64 / to[axis] as f64),
                shape_before_cropping: to.map(|n| n + 3),
                bbox: to.map(|n| [2, n + 2]),
                shape_after_cropping: to,
            };
            let logits = crate::common::uniform(from[0] as u64, from.iter().product::<usize>() * heads);
            let found = export::segmentation(&logits, from, &properties, &preprocessor).unwrap();

            let raw_spacing = preprocessor.transpose_forward.map(|axis| properties.spacing[axis]);
            let grid = resample::Grid::between(from, to, preprocessor.spacing, raw_spacing).unwrap();
            assert!(separate.is_none_or(|axis| grid.separate_axis == Some(axis)), "{from:?} to {to:?}");
            let planar = Array4::from_shape_vec((from[0], from[1], from[2], heads), logits.clone()).unwrap();
            let planar = resample::logits(planar.permuted_axes([3, 0, 1, 2]).as_standard_layout().into_owned(), &grid);
            let interleaved: Vec<f32> = planar.view().permuted_axes([1, 2, 3, 0]).iter().copied().collect();
            let labels = preprocessor.labels.segmentation_from_logits(&interleaved).unwrap();
            let cropped = Array3::from_shape_vec(to, labels).unwrap();
            let mut whole = Array3::zeros(properties.shape_before_cropping);
            whole.slice_mut(ndarray::s![2..to[0] + 2, 2..to[1] + 2, 2..to[2] + 2]).assign(&cropped);
            assert!(cropped.iter().any(|&label| label > 0));
            assert_eq!(found, whole.permuted_axes(backward), "{name}, {separate:?}, {from:?} to {to:?}");

            // And the probabilities are those of the resampled logits, where the image was not cropped.
            let both = export::prediction(&logits, from, &properties, &preprocessor).unwrap();
            assert_eq!(both.labels, found);
            let transposed = both.probabilities.permuted_axes([0, 2, 3, 1]);
            let is_region = preprocessor.labels.has_regions();
            for ((head, z, y, x), &found) in transposed.indexed_iter() {
                let inside = [z, y, x].iter().zip(to).all(|(&at, n)| (2..n + 2).contains(&at));
                let expected = match (inside, is_region) {
                    (false, _) => f64::from(u8::from(!is_region && head == 0)),
                    (true, true) => 1.0 / (1.0 + (-f64::from(planar[[head, z - 2, y - 2, x - 2]])).exp()),
                    (true, false) => {
                        let exponential = |head: usize| f64::from(planar[[head, z - 2, y - 2, x - 2]]).exp();
                        exponential(head) / (0..heads).map(exponential).sum::<f64>()
                    }
                };
                assert_relative_eq!(f64::from(found), expected, epsilon = 1e-6);
            }
        }
    }
}

#[test]
fn slices_that_are_missing_or_too_many_are_errors() {
    let (_, mut preprocessor) = preprocessor("brats_regions");
    preprocessor.spacing = [1.0; 3];
    let properties = Properties {
        spacing: [1.0; 3],
        shape_before_cropping: [3, 2, 2],
        bbox: [[0, 3], [0, 2], [0, 2]],
        shape_after_cropping: [3, 2, 2],
    };
    let mut exporter = export::Exporter::new([3, 2, 2], &properties, &preprocessor).unwrap();
    assert!(matches!(exporter.push(&[0.0; 11]), Err(Error::BufferLength { .. })));
    for _ in 0..3 {
        exporter.push(&[0.0; 12]).unwrap();
    }
    assert!(matches!(exporter.push(&[0.0; 12]), Err(Error::BufferLength { .. })));
    exporter.finish().unwrap();
    let exporter = export::Exporter::new([3, 2, 2], &properties, &preprocessor).unwrap();
    assert!(matches!(exporter.finish(), Err(Error::BufferLength { .. })));
}
