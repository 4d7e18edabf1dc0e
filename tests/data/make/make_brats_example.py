"""Makes examples/data/brats from Task01_BrainTumour of the Medical Segmentation Decathlon.

    python3 tests/data/make/make_brats_example.py SOURCE [TARGET]

SOURCE has imagesTr and labelsTr with BRATS_009_crop.nii.gz and BRATS_119_crop.nii.gz: 4-D images as the Decathlon ships
them (FLAIR, T1w, T1gd, T2w), cropped. Needs numpy and nibabel. The result is the same byte for byte on every run.

Both tumours are cut into slabs along z, which become cases: five to train on, and from the middle of each tumour one to
validate. That shows that a network learns, not how well it would do on other patients.

Training labels are made sparse as in make_hippocampus_example.py: a tenth of the slices, counted over the three axes, keep
their labels; everything else becomes the ignore label.
"""

import argparse
import gzip
import json
import pathlib

import nibabel
import numpy as np
from make_hippocampus_example import plans, save_labels, sparse

IGNORE = 4
# In x, y, z of the source: the tumour with some of the tissue around it.
SLABS = {
    "BRATS_009_a": ("BRATS_009_crop", (28, 100), (56, 136), (0, 14)),
    "BRATS_009_b": ("BRATS_009_crop", (28, 100), (56, 136), (14, 28)),
    "BRATS_009_c": ("BRATS_009_crop", (28, 100), (56, 136), (28, 41)),
    "BRATS_009_d": ("BRATS_009_crop", (28, 100), (56, 136), (41, 55)),
    "BRATS_119_a": ("BRATS_119_crop", (52, 124), (40, 120), (0, 10)),
    "BRATS_119_b": ("BRATS_119_crop", (52, 124), (40, 120), (10, 20)),
    "BRATS_119_c": ("BRATS_119_crop", (52, 124), (40, 120), (20, 31)),
}
VALIDATION = ["BRATS_009_c", "BRATS_119_b"]
# The Decathlon numbers edema 1, non-enhancing tumour 2, enhancing tumour 3.
DATASET = {
    "channel_names": {"0": "FLAIR", "1": "T1w", "2": "T1gd", "3": "T2w"},
    "labels": {
        "background": 0,
        "whole tumour": [1, 2, 3],
        "tumour core": [2, 3],
        "enhancing tumour": 3,
        "ignore": IGNORE,
    },
    "regions_class_order": [1, 2, 3],
    "numTraining": len(SLABS),
    "file_ending": ".nii.gz",
}


def write(path, data, dtype, affine):
    image = nibabel.Nifti1Image(data.astype(dtype), affine)
    image.header.set_xyzt_units("mm")
    # Without a time stamp and a name in the gzip header, equal images are equal files.
    path.write_bytes(gzip.compress(image.to_bytes(), mtime=0))


def brats_plans(images):
    """The other example's plans for four channels, flat patches and a network of 16 to 128 features."""
    made = plans()
    made["dataset_name"] = "Dataset997_BratsSparse"
    made["original_median_shape_after_transp"] = [13, 80, 72]
    configuration = made["configurations"]["3d_fullres"]
    configuration["patch_size"] = [16, 64, 64]
    configuration["median_image_size_in_voxels"] = [13.0, 80.0, 72.0]
    configuration["normalization_schemes"] = ["ZScoreNormalization"] * 4
    configuration["use_mask_for_norm"] = [False] * 4
    network = configuration["architecture"]["arch_kwargs"]
    network["features_per_stage"] = [16, 32, 64, 128]
    network["strides"] = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    # Intensities of all voxels: MRI needs none, nnU-Net wants an entry for each channel.
    made["foreground_intensity_properties_per_channel"] = {
        str(channel): {
            "max": float(values.max()),
            "mean": float(values.mean()),
            "median": float(np.median(values)),
            "min": float(values.min()),
            "percentile_00_5": float(np.percentile(values, 0.5)),
            "percentile_99_5": float(np.percentile(values, 99.5)),
            "std": float(values.std()),
        }
        for channel, values in enumerate(np.concatenate([image.reshape(-1, 4) for image in images]).T)
    }
    return made


def main():
    parser = argparse.ArgumentParser(description="Makes the BraTS-style example from the Decathlon's task.")
    parser.add_argument("source", type=pathlib.Path)
    repository = pathlib.Path(__file__).resolve().parents[3]
    parser.add_argument("target", type=pathlib.Path, nargs="?", default=repository / "examples/data/brats")
    arguments = parser.parse_args()
    target = arguments.target
    for folder in ("imagesTr", "labelsTr", "labelsTr_dense"):
        (target / folder).mkdir(parents=True, exist_ok=True)

    random = np.random.RandomState(1234)
    images = []
    for name, (source, *box) in SLABS.items():
        cut = tuple(slice(*side) for side in box)
        image = nibabel.load(arguments.source / "imagesTr" / f"{source}.nii.gz")
        labels = nibabel.load(arguments.source / "labelsTr" / f"{source}.nii.gz")
        affine = image.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ [first for first, _ in box]
        data = np.rint(np.asarray(image.dataobj)[cut])
        images.append(data)
        for channel in range(4):
            write(target / "imagesTr" / f"{name}_{channel:04d}.nii.gz", data[..., channel], np.int16, affine)
        dense = np.asarray(labels.dataobj)[cut].astype(np.uint8)
        like = nibabel.Nifti1Image(dense, affine)
        # NIfTI's first axis is x, nnU-Net's is z, and the order of the axes decides which slices are drawn.
        few = sparse(dense.transpose(2, 1, 0), random, IGNORE).transpose(2, 1, 0)
        save_labels(target / "labelsTr" / f"{name}.nii.gz", few, like)
        save_labels(target / "labelsTr_dense" / f"{name}.nii.gz", dense, like)

    splits = [{"train": [name for name in SLABS if name not in VALIDATION], "val": VALIDATION}]
    (target / "splits_final.json").write_text(json.dumps(splits, indent=2) + "\n")
    (target / "nnUNetPlans.json").write_text(json.dumps(brats_plans(images), indent=2) + "\n")
    (target / "dataset.json").write_text(json.dumps(DATASET, indent=2) + "\n")


if __name__ == "__main__":
    main()
