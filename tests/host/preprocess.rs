//! Preprocessing against arrays that nnU-Net wrote, and the checks on raw cases.

use approx::assert_abs_diff_eq;
use ndarray::{Array3, Array4, Ix4, array, s};
use voxgrad::dataset::plans::{IntensityProperties, Plans};
use voxgrad::dataset::{CaseFiles, Dataset, DatasetJson, LabelManager};
use voxgrad::error::{DatasetError, FileError, PreprocessError};
use voxgrad::preprocess::{
    ChannelNormalization, ClassLocations, Normalization, PreprocessedCase, Preprocessor, RawCase, crop_to_nonzero,
    nonzero_mask,
};
use voxgrad::{Compat, Error};

use crate::common::{data, npz};

const DATASETS: [&str; 2] = ["brats_regions", "brats_labels_anisotropic"];

fn preprocessor(dataset: &Dataset, name: &str, compat: Compat) -> Preprocessor {
    let plans = Plans::read(&data(name).join("preprocessed/nnUNetPlans.json")).unwrap();
    let configuration = plans.configuration("3d_fullres").unwrap();
    Preprocessor::from_plans(&plans, &configuration, dataset.labels.clone(), compat).unwrap()
}

fn preprocess(name: &str, case: usize, compat: Compat) -> PreprocessedCase {
    let dataset = Dataset::open(&data(name).join("raw")).unwrap();
    let raw = RawCase::read(&dataset.cases[case], &dataset.labels).unwrap();
    assert_eq!(raw.warnings, [""; 0]);
    preprocessor(&dataset, name, compat).run(raw).unwrap()
}

#[test]
fn equals_nnunet_voxel_by_voxel() {
    for name in DATASETS {
        for case in 0..2 {
            let found = preprocess(name, case, Compat::Nnunet);
            let archive = data(name).join(format!("preprocessed/case_00{case}.npz"));
            let data = npz::read(&archive, "data").into_dimensionality::<Ix4>().unwrap();
            let seg = npz::read(&archive, "seg").into_dimensionality::<Ix4>().unwrap();
            assert_eq!(found.data.dim(), data.dim());
            let pairs = found.data.iter().zip(&data);
            let worst = pairs.map(|(a, b)| (f64::from(*a) - b).abs()).fold(0.0, f64::max);
            assert!(worst < 1e-5, "{name} {case}: largest difference {worst}");
            let seg = seg.slice(s![0, .., .., ..]).mapv(|v| v as i16);
            assert_eq!(found.seg, seg, "{name} {case}");
        }
    }
}

#[test]
fn class_locations_are_nnunets() {
    for name in DATASETS {
        let text = std::fs::read_to_string(data(name).join("preprocessed/class_locations.json"));
        let expected: serde_json::Value = serde_json::from_str(&text.unwrap()).unwrap();
        for case in 0..2 {
            let found = preprocess(name, case, Compat::Nnunet);
            let expected = &expected[&found.name];
            let bbox: [[usize; 2]; 3] = serde_json::from_value(expected["bbox"].clone()).unwrap();
            assert_eq!(found.properties.bbox, bbox);
            let locations = &found.class_locations;
            let mut lists: Vec<(String, &Vec<[u32; 3]>)> =
                locations.foreground.iter().map(|(group, list)| (group.to_string(), list)).collect();
            lists.push(("(-1, 0, 1, 2, 3)".into(), locations.annotated.as_ref().unwrap()));
            assert_eq!(lists.len(), 4);
            for (key, list) in lists {
                assert_eq!(expected[&key], list.len(), "{name} {case} {key}");
                let first: Vec<[u32; 4]> = serde_json::from_value(expected["first_locations"][&key].clone()).unwrap();
                let found: Vec<[u32; 4]> = list.iter().take(5).map(|&[z, y, x]| [0, z, y, x]).collect();
                assert_eq!(found, first, "{name} {case} {key}");
            }
        }
    }
}

#[test]
fn absent_classes_have_no_locations_and_draw_nothing() {
    let json = r#"{"channel_names": {"0": "a"}, "labels": {"background": 0, "a": 1, "b": 2, "c": 3},
                   "numTraining": 1, "file_ending": ".nii"}"#;
    let labels = LabelManager::new(&DatasetJson::parse("d".as_ref(), json).unwrap()).unwrap();
    let mut seg = Array3::zeros((3, 4, 5));
    seg.slice_mut(s![1.., .., 2]).fill(3);
    let all = ClassLocations::sample(seg.view(), &labels);
    assert_eq!(all.annotated, None);
    assert!(all.foreground[0].1.is_empty() && all.foreground[1].1.is_empty());
    let list = &all.foreground[2].1;
    assert_eq!(list.len(), 8);
    assert!(list.iter().all(|&[z, y, x]| seg[[z as usize, y as usize, x as usize]] == 3));
}

/// The corrected normalisation treats training as inference treats the same image; upstream's does not.
#[test]
fn ignored_air_is_air() {
    let name = "brats_regions";
    let dataset = Dataset::open(&data(name).join("raw")).unwrap();
    let unlabelled = CaseFiles { label: None, ..dataset.cases[0].clone() };
    let inference = preprocessor(&dataset, name, Compat::Corrected)
        .run(RawCase::read(&unlabelled, &dataset.labels).unwrap())
        .unwrap();
    assert_eq!(inference.class_locations, ClassLocations::default());
    let corrected = preprocess(name, 0, Compat::Corrected);
    let upstream = preprocess(name, 0, Compat::Nnunet);
    assert_eq!(corrected.data, inference.data);
    assert_eq!(corrected.seg, upstream.seg);
    let worst = |a: &Array4<f32>, b: &Array4<f32>| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst(&upstream.data, &inference.data) > 0.1);
}

/// What ignore-labelled air does to masked z-score, in numbers: a ball of "brain" of mean 100 and deviation 20 in air of
/// zeros, one slice annotated, all else ignored.
#[test]
fn the_effect_of_ignored_air_on_normalisation() {
    let json = r#"{"channel_names": {"0": "T1"}, "labels": {"background": 0, "tumor": 1, "ignore": 2},
                   "numTraining": 1, "file_ending": ".nii"}"#;
    let labels = LabelManager::new(&DatasetJson::parse("d".as_ref(), json).unwrap()).unwrap();
    let side = 31;
    let square = |p: usize| (p as f64 - 15.0).powi(2);
    let brain = |z: usize, y: usize, x: usize| square(z) + square(y) + square(x) <= 196.0;
    let shape = (side, side, side);
    let intensity = |z, y, x| if (z + y + x) % 2 == 0 { 80.0 } else { 120.0 };
    let volume = Array3::from_shape_fn(shape, |(z, y, x)| if brain(z, y, x) { intensity(z, y, x) } else { 0f32 });
    let annotation = Array3::from_shape_fn(shape, |(z, y, x)| match (z, y, x) {
        (15, 14..17, 10..20) => 1,
        (15, _, _) => 0,
        _ => 2i16,
    });
    let run = |compat: Compat, annotation: Option<Array3<i16>>| {
        let raw = RawCase {
            name: "ball".into(),
            data: volume.clone().insert_axis(ndarray::Axis(0)),
            labels: annotation,
            geometry: voxgrad::io::Geometry::new([1.0; 3]),
            warnings: Vec::new(),
        };
        let preprocessor = Preprocessor {
            spacing: [1.0; 3],
            transpose_forward: [0, 1, 2],
            channels: vec![ChannelNormalization { scheme: Normalization::ZScore, use_mask: true, intensity: None }],
            labels: labels.clone(),
            compat,
        };
        preprocessor.run(raw).unwrap()
    };
    // The crop is 1..30 along every axis. Mean over the brain of what the network sees, and the value of ignored air.
    let seen = |case: &PreprocessedCase| {
        assert_eq!(case.properties.bbox, [[1, 30]; 3]);
        let inside = case.data.indexed_iter().filter(|((_, z, y, x), _)| brain(z + 1, y + 1, x + 1));
        let values: Vec<f64> = inside.map(|(_, v)| f64::from(*v)).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64).sqrt();
        [mean, deviation, f64::from(case.data[[0, 0, 0, 0]])]
    };
    let [mean, deviation, air] = seen(&run(Compat::Corrected, Some(annotation.clone())));
    assert_abs_diff_eq!(mean, 0.0, epsilon = 1e-4);
    assert_abs_diff_eq!(deviation, 1.0, epsilon = 1e-4);
    assert_eq!(air, 0.0);
    assert_eq!(run(Compat::Corrected, Some(annotation.clone())).data, run(Compat::Corrected, None).data);

    // Upstream: statistics over brain and ignored air together (the box but the slice's own air), about 48 and 52.
    let numbers = (1..30).flat_map(|z| (1..30).flat_map(move |y| (1..30).map(move |x| (z, y, x))));
    let mask = numbers.filter(|&(z, y, x)| brain(z, y, x) || annotation[[z, y, x]] != 0);
    let values: Vec<f64> = mask.map(|p| f64::from(volume[p])).collect();
    let over = |f: &dyn Fn(f64) -> f64| values.iter().map(|&v| f(v)).sum::<f64>() / values.len() as f64;
    let mu = over(&|v| v);
    let sigma = over(&|v| (v - mu).powi(2)).sqrt();
    assert!((45.0..52.0).contains(&mu) && (50.0..54.0).contains(&sigma), "{mu} {sigma}");
    let [mean, deviation, air] = seen(&run(Compat::Nnunet, Some(annotation)));
    assert_abs_diff_eq!(air, -mu / sigma, epsilon = 1e-4);
    assert!((-1.0..-0.85).contains(&air), "{air}");
    assert_abs_diff_eq!(mean, (100.0 - mu) / sigma, epsilon = 0.01);
    assert_abs_diff_eq!(deviation, 20.0 / sigma, epsilon = 0.01);
    // At inference the same brain has mean 0 and deviation 1: the network would be shown another contrast.
    assert!(mean > 0.9 && deviation < 0.42, "{mean} {deviation}");
}

#[test]
fn holes_are_filled_unless_open() {
    let mut data = Array4::zeros((2, 5, 6, 7));
    data.slice_mut(s![0, 1..4, 1..5, 1..6]).fill(1.0);
    data.slice_mut(s![0, 2, 2..4, 2..5]).fill(0.0);
    let mask = nonzero_mask(data.view());
    assert!(mask[[2, 3, 3]], "an enclosed hole is inside");
    assert_eq!(crop_to_nonzero(&mask), [[1, 4], [1, 5], [1, 6]]);
    // A one-voxel channel through a face opens it; an opening across an edge would not.
    data[[0, 2, 2, 1]] = 0.0;
    let mask = nonzero_mask(data.view());
    assert!(!mask[[2, 3, 3]]);
    // The other channel closes it again.
    data[[1, 2, 2, 1]] = -3.0;
    assert!(nonzero_mask(data.view())[[2, 3, 3]]);
    assert_eq!(crop_to_nonzero(&Array3::from_elem((2, 3, 4), false)), [[0, 2], [0, 3], [0, 4]]);
}

fn normalized(channel: &ChannelNormalization, values: [f32; 4], mask: [bool; 4]) -> Vec<f32> {
    let mut data = Array3::from_shape_vec((1, 2, 2), values.to_vec()).unwrap();
    let mask = Array3::from_shape_vec((1, 2, 2), mask.to_vec()).unwrap();
    channel.apply(0, data.view_mut(), &mask).unwrap();
    data.into_iter().collect()
}

#[test]
fn every_scheme_by_hand() {
    let channel = |scheme, use_mask| ChannelNormalization {
        scheme,
        use_mask,
        intensity: Some(IntensityProperties {
            max: 9.0,
            mean: 2.0,
            median: 2.0,
            min: 0.0,
            percentile_00_5: 1.0,
            percentile_99_5: 5.0,
            std: 0.5,
        }),
    };
    let all = [true; 4];
    let values = [0.0, 2.0, 4.0, 6.0];
    // Mean 3, variance 5.
    let z = 5f32.sqrt();
    let found = normalized(&channel(Normalization::ZScore, false), values, [false; 4]);
    for (found, expected) in found.iter().zip([-3.0 / z, -1.0 / z, 1.0 / z, 3.0 / z]) {
        assert_abs_diff_eq!(*found, expected, epsilon = 1e-6);
    }
    // Inside the mask: mean 4, variance 4; outside untouched.
    let mask = [false, true, false, true];
    let masked = normalized(&channel(Normalization::ZScore, true), values, mask);
    assert_eq!(masked, [0.0, -1.0, 4.0, 1.0]);
    assert_eq!(normalized(&channel(Normalization::ZScore, true), [7.0; 4], all), [0.0; 4]);
    let ct = normalized(&channel(Normalization::Ct, false), values, all);
    assert_eq!(ct, [-2.0, 0.0, 4.0, 6.0]);
    let rescaled = normalized(&channel(Normalization::RescaleTo01, false), [-1.0, 0.0, 1.0, 3.0], all);
    assert_eq!(rescaled, [0.0, 0.25, 0.5, 1.0]);
    let rgb = normalized(&channel(Normalization::RgbTo01, false), [0.0, 51.0, 102.0, 255.0], all);
    assert_eq!(rgb, [0.0, 0.2, 0.4, 1.0]);
    assert_eq!(normalized(&channel(Normalization::None, false), values, all), values);

    let mask = array![[[true]]];
    let mut one = array![[[256.0]]];
    let error = channel(Normalization::RgbTo01, false).apply(2, one.view_mut(), &mask);
    assert!(matches!(error, Err(Error::Preprocess(PreprocessError::NotRgb { channel: 2, .. }))));
    let blind = ChannelNormalization { intensity: None, ..channel(Normalization::Ct, false) };
    assert!(matches!(
        blind.apply(1, one.view_mut(), &mask),
        Err(Error::Preprocess(PreprocessError::IntensityMissing { channel: 1 }))
    ));
}

#[test]
fn schemes_by_name() {
    for (name, scheme) in [
        ("CT", Normalization::Ct),
        ("noNorm", Normalization::None),
        ("rescale_to_0_1", Normalization::RescaleTo01),
        ("rgb_to_0_1", Normalization::RgbTo01),
        ("zscore", Normalization::ZScore),
        ("FLAIR", Normalization::ZScore),
    ] {
        assert_eq!(Normalization::of_channel_name(name), scheme);
        assert_eq!(Normalization::of_class_name(scheme.class_name()).unwrap(), scheme);
    }
    assert!(Normalization::of_class_name("MyNormalization").is_err());
}

/// The `pairs` of the hostile files as cases of one channel and labels 0 and 1.
fn read_pair(images: &[&str], label: &str) -> voxgrad::Result<RawCase> {
    let json = r#"{"channel_names": {"0": "a"}, "labels": {"background": 0, "a": 1, "b": 2},
                   "numTraining": 1, "file_ending": ".nii.gz"}"#;
    let labels = LabelManager::new(&DatasetJson::parse("d".as_ref(), json)?)?;
    let path = |file: &str| data("hostile_nifti").join(file);
    let files = CaseFiles {
        name: "some_case".into(),
        images: images.iter().map(|file| path(file)).collect(),
        label: Some(path(label)),
    };
    RawCase::read(&files, &labels)
}

#[test]
fn files_that_disagree() {
    let pair = |name: &str| read_pair(&[&format!("pairs/{name}/image.nii.gz")], &format!("pairs/{name}/label.nii.gz"));
    assert_eq!(pair("good").unwrap().warnings.len(), 0);
    assert_eq!(pair("affine_1e-4").unwrap().warnings.len(), 0);
    assert_eq!(pair("label_empty").unwrap().warnings.len(), 0);
    let warnings = pair("affine_flip").unwrap().warnings;
    assert!(warnings[0].contains("flipped") && warnings[0].contains("some_case"), "{warnings:?}");
    assert!(matches!(pair("shape_mismatch"), Err(Error::Dataset(DatasetError::LabelShape { .. }))));
    assert!(matches!(pair("transposed"), Err(Error::Dataset(DatasetError::LabelShape { .. }))));
    assert!(matches!(pair("label_unknown_class"), Err(Error::Dataset(DatasetError::UnexpectedLabel { value: 9, .. }))));
    let error = pair("channels_differ").unwrap_err();
    assert!(matches!(error, Error::File(FileError::NotThreeDimensional { .. })), "{error}");

    let good = "pairs/good/image.nii.gz";
    let label = "pairs/good/label.nii.gz";
    let short = read_pair(&[good, "dtype_0.nii"], label).unwrap_err();
    assert!(matches!(short, Error::File(FileError::NiftiDatatype { .. })));
    let other_shape = read_pair(&[good, "pairs/shape_mismatch/label.nii.gz"], label).unwrap_err();
    assert!(matches!(other_shape, Error::Dataset(DatasetError::ChannelShape { case, .. }) if case == "some_case"));
    let nan = read_pair(&["f32_nan.nii"], label).unwrap_err();
    assert!(nan.to_string().contains("f32_nan.nii") && nan.to_string().contains("some_case"));
    assert!(matches!(nan, Error::Dataset(DatasetError::NonFiniteVoxel { .. })));
    let infinite = read_pair(&["f32_neginf.nii"], label).unwrap_err();
    assert!(matches!(infinite, Error::Dataset(DatasetError::NonFiniteVoxel { value: f32::NEG_INFINITY, .. })));
}

#[test]
fn an_image_of_zeros_is_kept_whole() {
    let json = r#"{"channel_names": {"0": "a"}, "labels": {"background": 0, "a": 1},
                   "numTraining": 1, "file_ending": ".nii"}"#;
    let labels = LabelManager::new(&DatasetJson::parse("d".as_ref(), json).unwrap()).unwrap();
    let files = CaseFiles { name: "zeros".into(), images: vec![data("hostile_nifti/allzero.nii")], label: None };
    let raw = RawCase::read(&files, &labels).unwrap();
    let preprocessor = Preprocessor {
        spacing: raw.geometry.spacing,
        transpose_forward: [0, 1, 2],
        channels: vec![ChannelNormalization { scheme: Normalization::ZScore, use_mask: true, intensity: None }],
        labels,
        compat: Compat::Corrected,
    };
    let shape = raw.data.dim();
    let case = preprocessor.run(raw.clone()).unwrap();
    assert_eq!(case.data.dim(), shape);
    assert!(case.data.iter().all(|&v| v == 0.0));
    assert!(case.seg.iter().all(|&v| v == -1));
    let two_channels = RawCase { data: Array4::zeros((2, 3, 3, 3)), ..raw };
    assert!(matches!(
        preprocessor.run(two_channels),
        Err(Error::Preprocess(PreprocessError::ChannelCount { found: 2, expected: 1, .. }))
    ));
}
