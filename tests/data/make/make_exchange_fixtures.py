"""Makes tests/data/exchange with nnU-Net's own classes: a model folder of two folds that nnU-Net can predict with, an image
with nnU-Net's segmentation of it, and tensors in every way that torch.save stores them.

    python tests/data/make/make_exchange_fixtures.py     # nnunetv2 2.8.1, torch 2.15, safetensors, nibabel
"""

import json
import os
import shutil
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import torch
from safetensors.numpy import save_file

FOLDER = Path(__file__).resolve().parents[1] / "exchange"
NAME = "nnUNetTrainer__nnUNetPlans__3d_fullres"
ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 3,
        "features_per_stage": [2, 4, 6],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [2, 1, 1],
        "n_conv_per_stage_decoder": [1, 2],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}
RESAMPLING = {
    f"resampling_fn_{kind}{suffix}": value
    for kind, is_seg, order in [("data", False, 3), ("seg", True, 1), ("probabilities", False, 1)]
    for suffix, value in [
        ("", "resample_data_or_seg_to_shape"),
        ("_kwargs", {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}),
    ]
}
PLANS = {
    "dataset_name": "Dataset007_Exchange",
    "plans_name": "nnUNetPlans",
    "original_median_spacing_after_transp": [2.0, 1.0, 1.0],
    "original_median_shape_after_transp": [9, 20, 18],
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "configurations": {
        "3d_fullres": {
            "data_identifier": "nnUNetPlans_3d_fullres",
            "preprocessor_name": "DefaultPreprocessor",
            "batch_size": 2,
            "patch_size": [8, 16, 16],
            "median_image_size_in_voxels": [9.0, 20.0, 18.0],
            "spacing": [2.0, 1.0, 1.0],
            "normalization_schemes": ["ZScoreNormalization"],
            "use_mask_for_norm": [False],
            **RESAMPLING,
            "architecture": ARCHITECTURE,
            "batch_dice": False,
        }
    },
    "experiment_planner_used": "ExperimentPlanner",
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {
        "0": dict(max=200.0, mean=60.0, median=55.0, min=0.0, percentile_00_5=1.0, percentile_99_5=180.0, std=30.0)
    },
}
DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "one": 1, "two": 2, "ignore": 3},
    "numTraining": 10,
    "file_ending": ".nii.gz",
}


def main():
    os.environ.update(nnUNet_raw="/", nnUNet_preprocessed="/", nnUNet_results="/", nnUNet_compile="f")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shutil.rmtree(FOLDER, ignore_errors=True)
    model = FOLDER / NAME
    model.mkdir(parents=True)
    (model / "plans.json").write_text(json.dumps(PLANS, indent=4))
    (model / "dataset.json").write_text(json.dumps(DATASET, indent=4))
    for fold in (0, 1):
        train(model / f"fold_{fold}", fold)
    predict(model)
    odd()


def network():
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    return get_network_from_plans(
        ARCHITECTURE["network_class_name"], ARCHITECTURE["arch_kwargs"], ARCHITECTURE["_kw_requires_import"], 1, 3,
        deep_supervision=True,
    )


def train(folder, fold):
    """One step of nnU-Net's optimiser on noise, saved as nnU-Net's trainer saves."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), 0.01, weight_decay=3e-5, momentum=0.99, nesterov=True)
    outputs = net(torch.randn(1, 1, 8, 16, 16))
    sum(output.square().mean() for output in outputs[:-1]).backward()
    optimizer.step()
    with torch.no_grad():
        # Biases and norms away from their initial values.
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        # Far from ties, so that the rounding of sums decides nothing.
        net.decoder.seg_layers[-1].weight.mul_(8)
    folder.mkdir()
    number = np.float64
    torch.save(
        {
            "network_weights": net.state_dict(),
            "optimizer_state": optimizer.state_dict(),
            "grad_scaler_state": None,
            "logging": {
                "mean_fg_dice": [number(0.25), number(0.5)],
                "ema_fg_dice": [number(0.25), number(0.275)],
                "dice_per_class_or_region": [[number(0.5), number("nan")], [number(0.25), number(0.75)]],
                "train_losses": [np.float32(-0.5), -0.75],
                "val_losses": [number(-0.25), number(-0.5)],
                "lrs": [0.01, 0.009],
                "epoch_start_timestamps": [1.7e9, 1.7e9 + 10],
                "epoch_end_timestamps": [1.7e9 + 9, 1.7e9 + 20],
            },
            "_best_ema": number(0.275),
            "current_epoch": 2,
            "init_args": {
                "plans": PLANS, "configuration": "3d_fullres", "fold": fold, "dataset_json": DATASET,
                "device": torch.device("cuda", 0),
            },
            "trainer_name": "nnUNetTrainer_onlyMirror01",
            "inference_allowed_mirroring_axes": (0, 1),
        },
        folder / "checkpoint_final.pth",
    )
    weights, momenta, seen = {}, {}, set()
    for index, (name, parameter) in enumerate(net.named_parameters()):
        assert parameter.data_ptr() not in seen
        seen.add(parameter.data_ptr())
        weights[name] = parameter.detach().numpy()
        state = optimizer.state_dict()["state"].get(index)
        if state is not None:
            momenta[f"momentum.{name}"] = state["momentum_buffer"].numpy()
    save_file({**weights, **momenta}, folder / "expected.safetensors")


def predict(model):
    """nnU-Net's own prediction with both folds, mirrored along two axes."""
    from nnunetv2.inference import predict_from_raw_data
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    images = FOLDER / "images"
    images.mkdir()
    z, y, x = np.mgrid[:9, :20, :18]
    values = 60 + 40 * np.sin(z / 2.0) * np.cos(y / 3.0) + 30 * np.sin(x / 2.5) + np.random.default_rng(0).normal(0, 4, z.shape)
    image = nibabel.Nifti1Image(values.astype(np.float32).transpose(), np.diag([1.0, 1.0, 2.0, 1.0]))
    nibabel.save(image, images / "case_0000.nii.gz")
    # nnU-Net keeps weights and adds logits up in half precision, which decides where they nearly tie; here in single precision.
    torch.half = torch.float32
    gaussian = predict_from_raw_data.compute_gaussian

    def weights(*args, **kwargs):
        # No weight below the smallest number of half precision, as there.
        return gaussian(*args, **{**kwargs, "dtype": torch.float32}).clamp(min=2.0**-24)

    weights.cache_clear = gaussian.cache_clear
    predict_from_raw_data.compute_gaussian = weights
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0, 1), "checkpoint_final.pth")
    with tempfile.TemporaryDirectory() as output:
        predictor.predict_from_files_sequential(str(images), output, save_probabilities=True)
        labels = nibabel.load(Path(output) / "case.nii.gz")
        print("voxels of each label:", np.bincount(np.asarray(labels.dataobj).ravel()))
        shutil.copy(Path(output) / "case.nii.gz", FOLDER / "segmentation.nii.gz")
        shutil.copy(Path(output) / "case.npz", FOLDER / "probabilities.npz")


def odd():
    """Types, views and parameters that share or skip storage."""
    base = torch.arange(60, dtype=torch.float32) / 7
    tensors = {
        "float": base.reshape(3, 4, 5),
        "transposed": base.reshape(3, 4, 5).permute(2, 0, 1),
        "part": base[10:34].reshape(4, 6)[1:3, ::2],
        "half": base[:7].half(),
        "bfloat16": base[:7].bfloat16(),
        "double": (base[:7].double() / 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(base[:4].clone()),
    }
    torch.save({"tensors": tensors, "long": torch.arange(3), "size": base.reshape(3, 20).size(), "big": 2**40, "negative": -7}, FOLDER / "odd.pth")
    save_file({name: tensor.detach().float().numpy().copy(order="C") for name, tensor in tensors.items()}, FOLDER / "odd.safetensors")


if __name__ == "__main__":
    main()
