//! Plans files made by nnU-Net, and broken ones.

use serde_json::json;
use voxgrad::Error;
use voxgrad::dataset::plans::{Counts, Plans};

use crate::common::data;

fn reference() -> Plans {
    Plans::read(&data("brats_labels_anisotropic/preprocessed/nnUNetPlans_as_planned.json")).unwrap()
}

#[test]
fn reads_what_nnunet_planned() {
    let plans = reference();
    assert_eq!(plans.transpose_forward, [0, 1, 2]);
    assert_eq!(plans.foreground_intensity_properties_per_channel["1"].max, 822.0);
    let configuration = plans.configuration("3d_fullres").unwrap();
    let (patch, spacing) = configuration.three_dimensional().unwrap();
    assert_eq!((patch, spacing), ([14, 40, 40], [3.5, 1.0, 1.0]));
    assert_eq!(configuration.batch_size, 2);
    assert!(!configuration.batch_dice);
    assert_eq!(configuration.use_mask_for_norm, [true; 4]);
    let net = &configuration.architecture.arch_kwargs;
    assert_eq!(net.n_stages, 4);
    assert_eq!(net.features_per_stage, [32, 64, 128, 256]);
    assert_eq!(net.kernel_sizes[0], [1, 3, 3]);
    assert_eq!(net.strides[3], [1, 2, 2]);
    assert_eq!(net.n_conv_per_stage_decoder, Counts::Each(vec![2, 2, 2]));
    assert!(net.conv_bias);
    let flat = plans.configuration("2d").unwrap();
    assert!(flat.batch_dice);
    assert!(matches!(flat.three_dimensional(), Err(Error::Setting { .. })));
}

#[test]
fn writes_back_what_it_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plans.json");
    reference().write(&path).unwrap();
    let text = |path| std::fs::read_to_string(path).unwrap();
    let original: serde_json::Value =
        serde_json::from_str(&text(data("brats_labels_anisotropic/preprocessed/nnUNetPlans_as_planned.json"))).unwrap();
    let written: serde_json::Value = serde_json::from_str(&text(path)).unwrap();
    assert_eq!(written, original);
}

#[test]
fn children_override_what_they_inherit() {
    let mut plans = reference();
    let configurations = &mut plans.configurations;
    configurations.insert("child".into(), json!({"inherits_from": "3d_fullres", "batch_size": 7}));
    configurations.insert("grandchild".into(), json!({"inherits_from": "child", "batch_dice": true}));
    let configuration = plans.configuration("grandchild").unwrap();
    assert_eq!(configuration.batch_size, 7);
    assert!(configuration.batch_dice);
    assert_eq!(configuration.patch_size, [14, 40, 40]);
}

#[test]
fn broken_configurations_are_rejected() {
    let mut plans = reference();
    let error = plans.configuration("3d_lowres").unwrap_err().to_string();
    assert!(error.contains("3d_lowres") && error.contains("3d_fullres"), "{error}");
    let mut child = |name: &str, fields: serde_json::Value| {
        plans.configurations.insert(name.into(), fields);
        plans.configuration(name)
    };
    assert!(matches!(child("self", json!({"inherits_from": "self"})), Err(Error::ConfigurationCycle { .. })));
    let named = |result: voxgrad::Result<_>, expected: &str| match result {
        Err(Error::Field { field, .. }) => assert!(field.ends_with(expected), "{field}"),
        other => panic!("{expected}: {other:?}"),
    };
    let with = |key: &str, value: serde_json::Value| json!({"inherits_from": "3d_fullres", key: value});
    named(child("c", with("patch_size", json!([0, 40, 40]))), "patch_size");
    named(child("c", with("batch_size", json!(0))), "batch_size");
    named(child("c", with("batch_size", json!("2"))), "configurations.c");
    named(child("c", with("spacing", json!([1.0, -1.0, 1.0]))), "spacing");
    named(child("c", with("use_mask_for_norm", json!([true]))), "use_mask_for_norm");
    let mut short = plans.configurations["3d_fullres"]["architecture"].clone();
    short["arch_kwargs"]["strides"].as_array_mut().unwrap().pop();
    plans.configurations.insert("c".into(), with("architecture", short));
    named(plans.configuration("c"), "strides");
}
