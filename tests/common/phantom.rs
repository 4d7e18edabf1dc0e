//! A small raw dataset of spheres, sparsely annotated, in nnU-Net's layout.

use ndarray::Array3;
use std::path::{Path, PathBuf};
use voxgrad::io::{self, Geometry};

/// Extent of every image.
pub const SIDE: usize = 16;
/// The ignore label.
pub const IGNORE: u8 = 2;

/// Writes `cases` cases of one channel, labels background 0, sphere 1, ignore 2, and plans for a tiny network.
pub fn write(folder: &Path, cases: usize) {
    for name in ["imagesTr", "labelsTr"] {
        std::fs::create_dir_all(folder.join(name)).unwrap();
    }
    let geometry = Geometry::new([1.0; 3]);
    for case in 0..cases {
        let centre = 6.0 + case as f64;
        let inside = |(z, y, x): (usize, usize, usize)| {
            [z, y, x].iter().map(|&p| (p as f64 - centre).powi(2)).sum::<f64>() < 16.0
        };
        let shape = (SIDE, SIDE, SIDE);
        let image = Array3::from_shape_fn(shape, |p| {
            40u8 + 60 * u8::from(inside(p)) + ((p.0 * 7 + p.1 * 5 + p.2 * 3) % 11) as u8
        });
        let labels = Array3::from_shape_fn(shape, |p| if p.0 % 4 == 1 { u8::from(inside(p)) } else { IGNORE });
        io::write_labels(&image_path(folder, case), image.view(), &geometry).unwrap();
        io::write_labels(&label_path(folder, case), labels.view(), &geometry).unwrap();
    }
    let dataset = serde_json::json!({
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "sphere": 1, "ignore": IGNORE},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    });
    std::fs::write(folder.join("dataset.json"), dataset.to_string()).unwrap();
    std::fs::write(folder.join("nnUNetPlans.json"), plans().to_string()).unwrap();
}

/// File of a case's only channel.
pub fn image_path(folder: &Path, case: usize) -> PathBuf {
    folder.join(format!("imagesTr/case_{case:03}_0000.nii.gz"))
}

/// File of a case's labels.
pub fn label_path(folder: &Path, case: usize) -> PathBuf {
    folder.join(format!("labelsTr/case_{case:03}.nii.gz"))
}

fn plans() -> serde_json::Value {
    serde_json::json!({
        "dataset_name": "Dataset001_Spheres",
        "plans_name": "nnUNetPlans",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": {
            "data_identifier": "nnUNetPlans_3d_fullres",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": [8, 8, 8],
            "spacing": [1.0, 1.0, 1.0],
            "normalization_schemes": ["ZScoreNormalization"],
            "use_mask_for_norm": [false],
            "batch_dice": false,
            "architecture": {
                "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
                "arch_kwargs": {
                    "n_stages": 2, "features_per_stage": [4, 8], "conv_op": "torch.nn.modules.conv.Conv3d",
                    "kernel_sizes": [[3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [2, 2, 2]],
                    "n_conv_per_stage": [1, 1], "n_conv_per_stage_decoder": [1], "conv_bias": true,
                    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
                    "norm_op_kwargs": {"eps": 1e-5, "affine": true},
                    "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": true},
                },
            },
        }},
    })
}
