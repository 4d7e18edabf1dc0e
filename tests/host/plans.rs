//! Plans files made by nnU-Net, and broken ones.

use serde_json::json;
use voxgrad::Error;
use voxgrad::dataset::plans::{Counts, Plans};
use voxgrad::error::{FileError, PlanError};

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
    assert!(matches!(
        child("self", json!({"inherits_from": "self"})),
        Err(Error::Plan(PlanError::ConfigurationCycle { .. }))
    ));
    let named = |result: voxgrad::Result<_>, expected: &str| match result {
        Err(Error::File(FileError::Field { field, .. })) => assert!(field.ends_with(expected), "{field}"),
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
    let mut residual = plans.configurations["3d_fullres"]["architecture"].clone();
    let arguments = residual["arch_kwargs"].as_object_mut().unwrap();
    arguments.remove("n_conv_per_stage");
    arguments.insert("n_blocks_per_stage".into(), json!([1, 3, 4]));
    plans.configurations.insert("c".into(), with("architecture", residual));
    named(plans.configuration("c"), "n_blocks_per_stage");
}

/// Everything that influences a network or its data, and that is done in one way only, is refused in any other.
#[test]
fn what_is_not_done_is_refused_by_field_and_value() {
    let refused = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut plans = serde_json::to_value(reference()).unwrap();
        change(&mut plans["configurations"]["3d_fullres"]);
        let plans: Plans = serde_json::from_value(plans).unwrap();
        let configuration = plans.configuration("3d_fullres").unwrap();
        let preprocessing = plans.check_preprocessing(&configuration);
        let network = plans.check_network(&configuration);
        match plans.check_training(&configuration) {
            Ok(()) => {
                assert!(preprocessing.is_ok() && network.is_ok());
                String::new()
            }
            Err(error) => {
                assert!(
                    matches!(error, Error::Plan(PlanError::PlansUnsupported { .. }))
                        && (preprocessing.is_err() || network.is_err())
                );
                error.to_string()
            }
        }
    };
    assert_eq!(refused(&|_| ()), "");
    let class = |name: &str| json!(format!("torch.nn.modules.{name}"));
    let network: [(&str, serde_json::Value, &str); 15] = [
        ("norm_op", class("batchnorm.BatchNorm3d"), "BatchNorm3d"),
        ("norm_op", json!(null), "`architecture.arch_kwargs.norm_op` is null"),
        ("norm_op_kwargs", json!({"eps": 1e-3, "affine": true}), "norm_op_kwargs.eps` is 0.001"),
        ("norm_op_kwargs", json!({"eps": 1e-5, "affine": false}), "norm_op_kwargs.affine` is false"),
        ("norm_op_kwargs", json!({"eps": 1e-5}), "norm_op_kwargs.affine` is false"),
        ("dropout_op", class("dropout.Dropout3d"), "Dropout3d"),
        ("nonlin", json!("torch.nn.ReLU"), "torch.nn.ReLU"),
        ("nonlin_kwargs", json!({"negative_slope": 0.2}), "negative_slope` is 0.2"),
        ("nonlin_first", json!(true), "nonlin_first` is true"),
        ("conv_op", class("conv.Conv2d"), "Conv2d"),
        ("kernel_sizes", json!([[5, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]]), "kernel_sizes` is [[5"),
        ("strides", json!([[2, 2, 2], [1, 2, 2], [1, 2, 2], [1, 2, 2]]), "strides` is [[2"),
        ("strides", json!([[1, 1, 1], [1, 2, 2], [1, 2, 2], [1, 3, 2]]), "strides` is "),
        ("strides", json!([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]), "`patch_size` is [14,40,40]"),
        ("more", json!(1), "arch_kwargs.more` is 1"),
    ];
    for (field, value, words) in &network {
        let said = refused(&|plans| plans["architecture"]["arch_kwargs"][*field] = value.clone());
        assert!(said.contains(words), "{field}: no `{words}` in: {said}");
    }
    let class = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet";
    let said = refused(&|plans| plans["architecture"]["network_class_name"] = class.into());
    for words in ["n_conv_per_stage` is [2,2,2,2]", "n_blocks_per_stage` is null"] {
        assert!(said.contains(words), "no `{words}` in: {said}");
    }
    let class = "dynamic_network_architectures.architectures.primus.Primus";
    let said = refused(&|plans| plans["architecture"]["network_class_name"] = class.into());
    assert!(said.contains("network_class_name` is") && said.contains(class), "{said}");
    // A residual encoder, and what of it is not done.
    let residual = |field: &'static str, value: serde_json::Value| {
        refused(&move |plans: &mut serde_json::Value| {
            plans["architecture"]["network_class_name"] = "architectures.unet.ResidualEncoderUNet".into();
            let arguments = plans["architecture"]["arch_kwargs"].as_object_mut().unwrap();
            arguments.remove("n_conv_per_stage");
            arguments.insert("n_blocks_per_stage".into(), json!([1, 3, 4, 6]));
            arguments.insert(field.into(), value.clone());
        })
    };
    let kinds = "dynamic_network_architectures.building_blocks.residual";
    for (field, value, words) in [
        ("block", json!(null), ""),
        ("block", json!(format!("{kinds}.BasicBlockD")), ""),
        ("block", json!(format!("{kinds}.BottleneckD")), "BottleneckD"),
        ("bottleneck_channels", json!([8, 16, 32, 64]), "bottleneck_channels` is [8,16,32,64]"),
        ("bottleneck_channels", json!([null, null, null, null]), ""),
        ("stem_channels", json!(32), ""),
        ("stem_channels", json!(16), "stem_channels` is 16"),
        ("squeeze_excitation", json!(true), "squeeze_excitation` is true"),
        ("stochastic_depth_p", json!(0.1), "stochastic_depth_p` is 0.1"),
        ("n_conv_per_stage", json!([2, 2, 2, 2]), "n_conv_per_stage` is [2,2,2,2]"),
        ("nonlin", json!("torch.nn.ReLU"), "torch.nn.ReLU"),
        ("deep_supervision", json!(true), ""),
    ] {
        let said = residual(field, value);
        assert!(said.contains(words) && said.is_empty() == words.is_empty(), "{field}: no `{words}` in: {said}");
    }
    let resampling = |order: u8, separate: serde_json::Value| json!({"is_seg": false, "order": order, "order_z": 0, "force_separate_z": separate});
    let others: [(&str, serde_json::Value, &str); 7] = [
        ("previous_stage", json!("3d_lowres"), "`previous_stage` is \"3d_lowres\""),
        ("preprocessor_name", json!("MyPreprocessor"), "MyPreprocessor"),
        ("resampling_fn_data", json!("resample_torch_fornnunet"), "resampling_fn_data` is \"resample_torch"),
        ("resampling_fn_data_kwargs", resampling(1, json!(null)), "resampling_fn_data_kwargs.order` is 1"),
        ("resampling_fn_data_kwargs", resampling(3, json!(true)), "force_separate_z` is true"),
        ("resampling_fn_probabilities_kwargs", resampling(3, json!(null)), "probabilities_kwargs.order` is 3"),
        ("resampling_fn_seg_kwargs", json!({"is_seg": true}), "resampling_fn_seg_kwargs.order` is 3"),
    ];
    for (field, value, words) in &others {
        let said = refused(&|plans| plans[*field] = value.clone());
        assert!(said.contains(words), "{field}: no `{words}` in: {said}");
    }
    // All of it at once.
    let said = refused(&|plans| {
        plans["preprocessor_name"] = "Mine".into();
        plans["architecture"]["arch_kwargs"]["nonlin"] = "torch.nn.ReLU".into();
    });
    assert!(said.contains("Mine") && said.contains("ReLU"), "{said}");
}

#[test]
fn fields_of_the_plans_as_a_whole_are_read_too() {
    let refused = |field: &str, value: serde_json::Value| {
        let mut plans = serde_json::to_value(reference()).unwrap();
        plans[field] = value;
        let plans: Plans = serde_json::from_value(plans).unwrap();
        plans.check_training(&plans.configuration("3d_fullres").unwrap()).unwrap_err().to_string()
    };
    assert!(refused("image_reader_writer", json!("NibabelIOWithReorient")).contains("NibabelIOWithReorient"));
    assert!(refused("label_manager", json!("MyLabels")).contains("`label_manager` is \"MyLabels\""));
    assert!(refused("transpose_backward", json!([1, 0, 2])).contains("transpose_backward` is [1,0,2]"));
}

/// Such names would lead out of the folder that a file or folder of this name belongs to.
#[test]
fn names_that_are_no_file_names_are_refused_where_they_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("plans.json");
    for name in ["", ".", "..", "../x", "a/b", "/absolute", "C:x", "a\\b"] {
        let mut plans = serde_json::to_value(reference()).unwrap();
        plans["configurations"]["3d_fullres"]["data_identifier"] = name.into();
        plans["plans_name"] = name.into();
        std::fs::write(&path, plans.to_string()).unwrap();
        let error = Plans::read(&path).unwrap_err();
        assert!(matches!(error, Error::File(FileError::NotAFileName { .. })), "{name}: {error}");
        let said = error.to_string();
        for word in ["plans.json", "`plans_name`", "3d_fullres.data_identifier", &format!("{name:?}")] {
            assert!(said.contains(word), "no {word} in {said}");
        }
        let plans: Plans = serde_json::from_value(plans).unwrap();
        assert!(matches!(plans.configuration("3d_fullres"), Err(Error::File(FileError::Field { .. }))), "{name}");
    }
    let mut plans = reference();
    plans.configurations.insert("../3d".into(), json!({"inherits_from": "3d_fullres"}));
    plans.write(&path).unwrap();
    assert!(Plans::read(&path).unwrap_err().to_string().contains("../3d"));
}
