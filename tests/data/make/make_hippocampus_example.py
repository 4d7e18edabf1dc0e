"""Makes examples/data/hippocampus from Task04_Hippocampus of the Medical Segmentation Decathlon.

    python3 tests/data/make/make_hippocampus_example.py SOURCE [TARGET]

SOURCE is the task in nnU-Net v2's layout (imagesTr/hippocampus_XXX_0000.nii.gz, labelsTr/hippocampus_XXX.nii.gz).
Needs numpy and nibabel. The result is the same byte for byte on every run.

Cases: of the sorted case names, every 10th from the first on (at most 20) for training, and every 30th from the sixth on
(at most 6) for validation. With the 200 cases that the committed example was made from, the two do not overlap.

Training labels are made sparse the way nnU-Net's integration test dataset 996 makes them: NumPy's legacy generator is
seeded once with 1234; then, for each file in sorted order (the training cases, then the validation cases) and each array
axis (z, y, x), a thirtieth of the slices, but at least one, keeps its labels. Everything else becomes the ignore label.

The plans are nnU-Net's for this data with a narrower network, which two CPU cores train in minutes, and with patches of
32 x 40 x 32 instead of 40 x 56 x 40: the images are about 36 x 50 x 35, and padding counts as annotated background.
"""

import argparse
import gzip
import json
import pathlib
import shutil
import sys

import nibabel
import numpy as np

TRAINING = slice(0, 200, 10)
VALIDATION = slice(5, 180, 30)
IGNORE = 3
ANNOTATED = 0.1
FEATURES = [8, 16, 32, 64]

DATASET = {
    "channel_names": {"0": "MRI"},
    "labels": {"background": 0, "hippocampus": [1, 2], "anterior": 1, "ignore": IGNORE},
    "regions_class_order": [2, 1],
    "numTraining": 26,
    "file_ending": ".nii.gz",
}


def plans(intensities):
    """nnU-Net's plans, as far as training needs them. There is no resampling: the spacing of the data is 1 mm."""
    stages = 4
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": FEATURES,
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * stages,
            "strides": [[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
            "n_conv_per_stage": [2] * stages,
            "n_conv_per_stage_decoder": [2] * (stages - 1),
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
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [32, 40, 32],
        "median_image_size_in_voxels": [36.0, 50.0, 35.0],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": {**resampling, "order": 1},
        "architecture": architecture,
        "batch_dice": False,
    }
    return {
        "dataset_name": "Dataset996_HippocampusSparse",
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [36, 50, 35],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {"3d_fullres": configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        # z-score does not use it, but nnU-Net does not preprocess without it.
        "foreground_intensity_properties_per_channel": {"0": intensities},
    }


def intensity_properties(cases):
    """What a fingerprint says about the intensities of annotated foreground, given (image, labels) of every case: as
    nnU-Net, a hundred million draws with replacement over all cases, from the same random numbers. Equal draws are
    counted, not kept."""
    draws = int(10e7 // len(cases))
    values, counts = [], []
    for image, labels in cases:
        foreground = image[(labels > 0) & (labels < IGNORE)]
        values.append(foreground)
        drawn = np.random.RandomState(1234).choice(len(foreground), draws, replace=True)
        counts.append(np.bincount(drawn, minlength=len(foreground)))
    values, counts = np.concatenate(values).astype(np.float64), np.concatenate(counts)
    values, counts = values[counts > 0], counts[counts > 0]
    order = np.argsort(values, kind="stable")
    values, counts = values[order], counts[order]
    total = counts.sum()
    mean = float((values * counts).sum() / total)
    ranks = np.cumsum(counts)

    def percentile(q):
        position = q / 100 * (total - 1)
        low, high = (values[np.searchsorted(ranks, rank, side="right")] for rank in (int(position), int(position) + 1))
        return float(low + (high - low) * (position - int(position)))

    return {
        "max": float(values[-1]),
        "mean": mean,
        "median": percentile(50.0),
        "min": float(values[0]),
        "percentile_00_5": percentile(0.5),
        "percentile_99_5": percentile(99.5),
        "std": float(np.sqrt(((values - mean) ** 2 * counts).sum() / total)),
    }


def sparse(dense, random, ignore=IGNORE):
    """Keeps a few whole slices along each axis of a (z, y, x) label map and ignores the rest."""
    result = np.full_like(dense, ignore)
    for axis, size in enumerate(dense.shape):
        count = max(1, round(size * ANNOTATED / dense.ndim))
        kept = [slice(None)] * dense.ndim
        kept[axis] = random.choice(size, count, replace=False)
        result[tuple(kept)] = dense[tuple(kept)]
    return result


def save_labels(path, labels, like):
    """Writes an (x, y, z) label map as uint8. Some of the originals are float32, which readers need not accept."""
    image = nibabel.Nifti1Image(labels.astype(np.uint8), like.affine, like.header)
    image.set_data_dtype(np.uint8)
    # Without a time stamp and a name in the gzip header, equal labels are equal files.
    path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))


def main():
    parser = argparse.ArgumentParser(description="Makes the hippocampus example from the Decathlon's task.")
    parser.add_argument("source", type=pathlib.Path)
    repository = pathlib.Path(__file__).resolve().parents[3]
    parser.add_argument("target", type=pathlib.Path, nargs="?", default=repository / "examples/data/hippocampus")
    arguments = parser.parse_args()
    source, target = arguments.source, arguments.target

    names = sorted(path.name.removesuffix(".nii.gz") for path in (source / "labelsTr").glob("*.nii.gz"))
    training, validation = names[TRAINING], names[VALIDATION]
    if len(training) != 20 or len(validation) != 6 or set(training) & set(validation):
        sys.exit(f"{source}: {len(names)} cases do not give 20 for training and 6 others for validation")

    for folder in ("imagesTr", "labelsTr", "labelsTr_dense"):
        (target / folder).mkdir(parents=True, exist_ok=True)

    random = np.random.RandomState(1234)
    cases = {}
    for name in training + validation:
        image = f"{name}_0000.nii.gz"
        shutil.copyfile(source / "imagesTr" / image, target / "imagesTr" / image)
        original = nibabel.load(source / "labelsTr" / f"{name}.nii.gz")
        # NIfTI's first axis is x, nnU-Net's is z, and the order of the axes decides which slices are drawn.
        dense = np.asarray(original.dataobj).astype(np.uint8).transpose(2, 1, 0)
        labels = sparse(dense, random)
        pixels = np.asarray(nibabel.load(source / "imagesTr" / image).dataobj, dtype=np.float32)
        cases[name] = pixels.transpose(2, 1, 0), labels
        save_labels(target / "labelsTr" / f"{name}.nii.gz", labels.transpose(2, 1, 0), original)
        save_labels(target / "labelsTr_dense" / f"{name}.nii.gz", dense.transpose(2, 1, 0), original)

    splits = [{"train": training, "val": validation}]
    (target / "splits_final.json").write_text(json.dumps(splits, indent=2) + "\n")
    intensities = intensity_properties([cases[name] for name in sorted(cases)])
    (target / "nnUNetPlans.json").write_text(json.dumps(plans(intensities), indent=2) + "\n")
    (target / "dataset.json").write_text(json.dumps(DATASET, indent=2) + "\n")


if __name__ == "__main__":
    main()
