//! Fingerprints and plans, field by field against nnU-Net's files, and worked examples of larger datasets.

use approx::assert_relative_eq;
use serde_json::Value;
use voxgrad::dataset::plans::Configuration;
use voxgrad::dataset::{Dataset, DatasetJson};
use voxgrad::error::{DatasetError, PlanError};
use voxgrad::plan::fingerprint::Fingerprint;
use voxgrad::plan::planner::{Planner, PlannerKind};
use voxgrad::plan::topology::{Encoder, Topology};
use voxgrad::{Compat, Error};

use crate::common::data;
use crate::common::place::assert_same;
use crate::common::plans::{fullres, plan};

const DATASETS: [&str; 2] = ["brats_regions", "brats_labels_anisotropic"];

fn dataset(name: &str) -> Dataset {
    Dataset::open(&data(name).join("raw")).unwrap()
}

fn fingerprint(name: &str) -> Fingerprint {
    Fingerprint::read(&data(name).join("preprocessed/dataset_fingerprint.json")).unwrap()
}

#[test]
fn fingerprints_are_nnunets() {
    for name in DATASETS {
        let found = Fingerprint::extract(&dataset(name), Compat::Nnunet, 2, |_| {}).unwrap();
        let expected = serde_json::to_value(fingerprint(name)).unwrap();
        // Means and deviations were summed in single precision there.
        assert_same(&serde_json::to_value(found).unwrap(), &expected, 1e-5, name);
    }
}

/// Ignored voxels are mostly air here; without them the statistics are those of the tumour.
#[test]
fn corrected_statistics_leave_out_ignored_voxels() {
    let mut seen = std::sync::Mutex::new(0);
    let found = Fingerprint::extract(&dataset("brats_labels_anisotropic"), Compat::Corrected, 2, |_| {
        *seen.lock().unwrap() += 1;
    })
    .unwrap();
    assert_eq!(*seen.get_mut().unwrap(), 10);
    let upstream = fingerprint("brats_labels_anisotropic");
    let flair = |f: &Fingerprint| f.foreground_intensity_properties_per_channel["3"];
    assert_eq!(flair(&upstream).percentile_00_5, 0.0);
    assert!(flair(&found).percentile_00_5 > 100.0, "{:?}", flair(&found));
    assert_eq!(found.shapes_after_crop, upstream.shapes_after_crop);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("dataset_fingerprint.json");
    found.write(&path).unwrap();
    assert_eq!(Fingerprint::read(&path).unwrap(), found);
}

#[test]
fn plans_are_nnunets_field_by_field() {
    for name in DATASETS {
        let plans = Planner::default().plan("Dataset137_Phantom", &dataset(name), &fingerprint(name)).unwrap();
        let path = data(name).join("preprocessed/nnUNetPlans_as_planned.json");
        let expected: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_same(&serde_json::to_value(&plans).unwrap(), &expected, 0.0, name);
    }
}

#[test]
fn worked_examples() {
    let iso = [1.0; 3];
    let hippocampus = fullres(&plan(PlannerKind::Default, [36, 50, 35], iso, 260, 3));
    assert_eq!(hippocampus.patch_size, [40, 56, 40]);
    assert_eq!(hippocampus.batch_size, 9);
    assert_eq!(hippocampus.architecture.arch_kwargs.strides[1..], [[2, 2, 2]; 3]);
    assert_eq!(hippocampus.normalization_schemes, ["CTNormalization"]);

    let brats = fullres(&plan(PlannerKind::Default, [140, 171, 136], iso, 1251, 4));
    assert_eq!(brats.patch_size, [128, 160, 112]);
    assert_eq!(brats.batch_size, 2);
    let strides = &brats.architecture.arch_kwargs.strides;
    assert_eq!(strides[1..5], [[2, 2, 2]; 4]);
    assert_eq!(strides[5], [2, 2, 1]);

    let medium = fullres(&plan(PlannerKind::ResEncM, [140, 171, 136], iso, 1251, 4));
    assert_eq!((medium.patch_size, medium.batch_size), (vec![128, 160, 112], 2));
    let large = fullres(&plan(PlannerKind::ResEncL, [140, 171, 136], iso, 1251, 4));
    assert_eq!((large.patch_size, large.batch_size), (vec![160, 192, 160], 3));
    let larger = plan(PlannerKind::ResEncXl, [140, 171, 136], iso, 1251, 4);
    assert_eq!(fullres(&larger).batch_size, 5);
    assert_eq!(larger.plans_name, "nnUNetResEncUNetXLPlans");
    assert_eq!(fullres(&larger).data_identifier, "nnUNetPlans_3d_fullres");

    let decathlon = fullres(&plan(PlannerKind::Default, [138, 169, 138], iso, 484, 4));
    assert_eq!((decathlon.patch_size, decathlon.batch_size), (vec![128; 3], 2));

    let prostate = plan(PlannerKind::Default, [20, 320, 319], [3.6, 0.625, 0.625], 32, 3);
    let prostate = fullres(&prostate);
    assert_eq!((prostate.patch_size, prostate.batch_size), (vec![20, 320, 256], 2));
    let net = prostate.architecture.arch_kwargs;
    let halved = [[1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2], [1, 2, 2]];
    assert_eq!(net.strides[1..], halved);
    assert_eq!(net.kernel_sizes[..2], [[1, 3, 3], [1, 3, 3]]);
    assert_eq!(net.kernel_sizes[2..], [[3, 3, 3]; 5]);
}

#[test]
fn memory_estimates() {
    let elements = |patch: &[usize], features: &[usize], encoder: &Encoder, outputs: usize| {
        let patch: Vec<f64> = patch.iter().map(|&n| n as f64).collect();
        let topology = Topology::new(&[1.0, 1.0, 1.0], &patch);
        assert_eq!(topology.stages(), features.len());
        topology.feature_map_elements(features, encoder, outputs)
    };
    let six = [32, 64, 128, 256, 320, 320];
    let plain = Encoder::Plain;
    let residual = Encoder::Residual { blocks: vec![1, 3, 4, 6] };
    assert_eq!(elements(&[40, 56, 40], &six[..4], &plain, 3), 19_174_400.0);
    assert_eq!(elements(&[128, 160, 112], &six, &plain, 4), 497_584_640.0);
    assert_eq!(elements(&[128, 160, 112], &six, &plain, 5), 499_878_400.0);
    assert_eq!(elements(&[128, 160, 112], &six, &residual, 4), 612_263_680.0);
    assert_eq!(elements(&[160, 192, 160], &six, &residual, 4), 1_311_369_600.0);
    assert_eq!(elements(&[128, 128, 128], &six, &plain, 4), 454_893_568.0);
}

#[test]
fn large_images_get_a_low_resolution_and_a_cascade() {
    let plans = plan(PlannerKind::Default, [300, 512, 512], [1.5, 0.8, 0.8], 100, 3);
    let full = fullres(&plans);
    assert!(full.batch_dice);
    let low = plans.configuration("3d_lowres").unwrap();
    assert!(!low.batch_dice);
    assert_eq!(low.next_stage.as_deref(), Some("3d_cascade_fullres"));
    assert!(low.spacing[1] > full.spacing[1]);
    // The patch covers a quarter of the median image at last.
    let share = |c: &Configuration| {
        c.patch_size.iter().map(|&n| n as f64).product::<f64>() / c.median_image_size_in_voxels.iter().product::<f64>()
    };
    assert!(share(&low) >= 0.245 && share(&full) < 0.25);
    let cascade = plans.configuration("3d_cascade_fullres").unwrap();
    assert_eq!(cascade.previous_stage.as_deref(), Some("3d_lowres"));
    assert_eq!(cascade.patch_size, full.patch_size);
}

#[test]
fn the_coarsest_axis_comes_first() {
    let plans = plan(PlannerKind::Default, [200, 200, 30], [0.7, 0.8, 5.0], 20, 2);
    assert_eq!(plans.transpose_forward, [2, 0, 1]);
    assert_eq!(plans.transpose_backward, [1, 2, 0]);
    assert_eq!(fullres(&plans).spacing, [5.0, 0.7, 0.8]);
    assert_eq!(plans.original_median_shape_after_transp, [30, 200, 200]);
}

/// Half of the cases have thick slices: the target follows the finer tenth, but stays coarser than in-plane.
#[test]
fn thick_slices_are_refined() {
    let json = r#"{"channel_names": {"0": "T2"}, "labels": {"background": 0, "a": 1}, "numTraining": 4,
                   "file_ending": ".nii"}"#;
    let json = DatasetJson::parse("d".as_ref(), json).unwrap();
    let with_slices = |slices: [f64; 4]| {
        let fingerprint = Fingerprint {
            foreground_intensity_properties_per_channel: Default::default(),
            median_relative_size_after_cropping: 0.5,
            shapes_after_crop: vec![[20, 200, 200]; 4],
            spacings: slices.map(|z| [z, 1.0, 1.0]).to_vec(),
        };
        let plans = Planner::default().plan_from_json("D", &json, &fingerprint).unwrap();
        assert_eq!(fullres(&plans).use_mask_for_norm, [true]);
        fullres(&plans).spacing[0]
    };
    // Tenth percentile of 2, 5, 5, 5: 2 + 0.3 * 3.
    assert_relative_eq!(with_slices([5.0, 2.0, 5.0, 5.0]), 2.9, epsilon = 1e-12);
    assert_relative_eq!(with_slices([0.5, 0.5, 7.0, 7.0]), 1.00001, epsilon = 1e-12);
}

#[test]
fn options_and_errors() {
    let json = DatasetJson::read(&data("brats_regions/raw/dataset.json")).unwrap();
    let mut fingerprint = fingerprint("brats_regions");
    let planner =
        Planner { target_spacing: Some([2.0, 2.0, 2.0]), plans_name: Some("mine".into()), ..Planner::default() };
    let plans = planner.plan_from_json("D", &json, &fingerprint).unwrap();
    assert_eq!(plans.plans_name, "mine");
    assert_eq!(fullres(&plans).data_identifier, "mine_3d_fullres");
    assert_eq!(fullres(&plans).spacing, [2.0; 3]);
    let bad = Planner { target_spacing: Some([0.0, 1.0, 1.0]), ..Planner::default() };
    assert!(matches!(bad.plan_from_json("D", &json, &fingerprint), Err(Error::Setting { .. })));
    fingerprint.spacings.clear();
    assert!(matches!(
        Planner::default().plan_from_json("D", &json, &fingerprint),
        Err(Error::Dataset(DatasetError::NoCases))
    ));
}

/// A network needs a resolution to decode from; and a slice is a slice along whichever axis it lies.
#[test]
fn images_that_no_network_fits_are_refused() {
    let json = DatasetJson::read(&data("brats_regions/dataset.json")).unwrap();
    let plan = |shape: [usize; 3]| {
        let fingerprint = Fingerprint {
            foreground_intensity_properties_per_channel: Default::default(),
            median_relative_size_after_cropping: 1.0,
            shapes_after_crop: vec![shape; 6],
            spacings: vec![[1.0; 3]; 6],
        };
        Planner::default().plan_from_json("Dataset001_Small", &json, &fingerprint)
    };
    let error = plan([8, 7, 7]).unwrap_err();
    assert!(matches!(error, voxgrad::Error::Plan(PlanError::ImagesTooSmall { stages: 1, .. })), "{error}");
    let said = error.to_string();
    assert!(said.contains("[8.0, 7.0, 7.0]") && said.contains("finer target spacing"), "{said}");
    for shape in [[8, 8, 7], [12, 7, 7]] {
        let plans = plan(shape).unwrap();
        plans.check_training(&plans.configuration("3d_fullres").unwrap()).unwrap();
    }
    for flat in [[1, 512, 512], [512, 512, 1], [512, 1, 512]] {
        assert!(!plan(flat).unwrap().configurations.contains_key("3d_fullres"), "{flat:?}");
    }
}
