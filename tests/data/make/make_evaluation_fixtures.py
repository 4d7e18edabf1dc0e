"""Makes tests/data/evaluation: small label maps, and what other programs make of them.

    python tests/data/make/make_evaluation_fixtures.py tests/data/evaluation

Needs nnunetv2 2.8.1, monai 1.6.1, surface-distance 0.1 and scipy. Two datasets of six cases, `labels` (three classes with an ignore
label) and `regions` (two regions): references, predictions with scattered components, nnU-Net's summary.json, and the
postprocessing that it determines (postprocessing.json, postprocessing.pkl) with the scores after it. surfaces.json has the surface
distances of MONAI and of surface-distance for every case and class of a third set without an ignore label; ensemble/ the mean
of two models' probabilities by nnU-Net.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from scipy import ndimage, stats

SHAPE = (12, 15, 17)
SPACING = (2.5, 0.8, 1.0)  # z, y, x
CASES = ["case_0", "case 1 with blanks", "fall_für_größe", "case_3", "case_4", "病例_5"]
LABELS = {
    "labels": {"labels": {"background": 0, "liver": 1, "kidney": 2, "lesion": 3, "ignore": 4}},
    "regions": {"labels": {"background": 0, "whole": [1, 2], "core": [2]}, "regions_class_order": [1, 2]},
}


def write(path, labels):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(labels.astype(np.uint8))
    image.SetSpacing(tuple(float(s) for s in SPACING[::-1]))
    sitk.WriteImage(image, str(path), useCompression=True)


def ball(centre, radius):
    grid = np.indices(SHAPE).astype(float)
    return sum(((grid[a] - centre[a]) * SPACING[a] / 1.4) ** 2 for a in range(3)) < radius**2


def case(random, number):
    """A reference of three balls, and a prediction of shifted ones with scattered voxels of some classes."""
    reference = np.zeros(SHAPE, int)
    prediction = np.zeros(SHAPE, int)
    for label, (centre, radius) in enumerate([((6, 5, 5), 3.4), ((5, 9, 11), 3.1), ((6, 6, 6), 1.5)], 1):
        shift = random.uniform(-1, 1, 3) * (0.6, 1, 1)
        reference[ball(np.array(centre) + shift, radius)] = label
        prediction[ball(np.array(centre) + shift + random.uniform(-0.8, 0.8, 3) * (0.5, 1, 1), radius)] = label
    for label, share in [(1, 0.012), (2, 0.004)]:
        scattered = (random.uniform(size=SHAPE) < share) & (prediction == 0)
        prediction[scattered] = label
    # Two true lesions: keeping one of them is worse.
    for volume in (reference, prediction):
        volume[1:3, 12:14, 2:4] = 3
    if number == 4:
        reference[reference == 2] = prediction[prediction == 2] = 0
    return reference, prediction


def dataset(folder, name):
    description = {
        "channel_names": {"0": "CT"},
        **LABELS[name],
        "numTraining": len(CASES),
        "file_ending": ".nii.gz",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(description, indent=4))
    plans = {
        "dataset_name": "Dataset901_Evaluation",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {},
    }
    (folder / "plans.json").write_text(json.dumps(plans, indent=4))
    random = np.random.default_rng(3)
    for number, case_name in enumerate(CASES):
        reference, prediction = case(random, number)
        if name == "labels":
            reference[random.integers(2, 10)] = 4
            reference[:, random.integers(0, 15)] = 4
        else:
            reference, prediction = np.minimum(reference, 2), np.minimum(prediction, 2)
        write(folder / "references" / f"{case_name}.nii.gz", reference)
        write(folder / "predictions" / f"{case_name}.nii.gz", prediction)


def determine(folder):
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder2
    from nnunetv2.postprocessing.remove_connected_components import determine_postprocessing

    predictions = folder / "predictions"
    files = [str(folder / name) for name in ("dataset.json", "plans.json")]
    compute_metrics_on_folder2(str(folder / "references"), str(predictions), *files, num_processes=1)
    determine_postprocessing(str(predictions), str(folder / "references"), files[1], files[0], 1)
    for name in ("summary.json", "postprocessing.json", "postprocessing.pkl"):
        shutil.move(predictions / name, folder / name)
    shutil.move(predictions / "postprocessed", folder / "postprocessed")
    for summary in folder.glob("**/summary.json"):
        summary.write_text(summary.read_text().replace(f"{folder}/", ""))


def surfaces(folder):
    """Surface distances of masks without an ignore label, some at the border of the image."""
    np.Inf = np.inf  # surface-distance 0.1 is older than numpy 2
    for module in ("filters", "morphology"):
        setattr(ndimage, module, ndimage)
    import monai.metrics as monai
    import surface_distance

    random = np.random.default_rng(5)
    rows = []
    for number in range(4):
        reference, prediction = case(random, number)
        for volume in (reference, prediction):
            volume[:3, :4, :5] = 1  # touches three faces of the image
        write(folder / "surfaces" / f"reference_{number}.nii.gz", reference)
        write(folder / "surfaces" / f"prediction_{number}.nii.gz", prediction)
        for label in (1, 2, 3):
            masks = [torch.tensor(volume == label)[None, None].float() for volume in (prediction, reference)]
            bare = {"include_background": True, "spacing": SPACING}
            row = {"case": number, "label": label, "monai": {}, "surface_distance": {}}
            row["monai"]["hd95"] = float(monai.compute_hausdorff_distance(*masks, percentile=95, **bare))
            row["monai"]["assd"] = float(monai.compute_average_surface_distance(*masks, symmetric=True, **bare))
            distances = surface_distance.compute_surface_distances(reference == label, prediction == label, SPACING)
            there, back = surface_distance.compute_average_surface_distance(distances)
            row["surface_distance"]["hd95"] = float(surface_distance.compute_robust_hausdorff(distances, 95))
            row["surface_distance"]["average_to_prediction"] = float(there)
            row["surface_distance"]["average_to_reference"] = float(back)
            row["surface_distance"]["area_of_reference"] = float(distances["surfel_areas_gt"].sum())
            row["surface_distance"]["area_of_prediction"] = float(distances["surfel_areas_pred"].sum())
            for tolerance in (0.5, 1.0, 2.5):
                dice = monai.compute_surface_dice(*masks, class_thresholds=[tolerance], use_subvoxels=False, **bare)
                row["monai"][f"nsd_{tolerance}"] = float(dice)
                dice = surface_distance.compute_surface_dice_at_tolerance(distances, tolerance)
                row["surface_distance"][f"nsd_{tolerance}"] = float(dice)
            rows.append(row)
    sample = [0.91, 0.85, 0.4, 0.77, 0.93, 0.88, 0.62, 0.95, 0.71, 0.83]
    interval = stats.bootstrap((sample,), np.mean, n_resamples=200000, method="percentile", rng=1).confidence_interval
    bootstrap = {"sample": sample, "low": float(interval.low), "high": float(interval.high)}
    (folder / "surfaces.json").write_text(json.dumps({"cases": rows, "bootstrap": bootstrap}, indent=1))


def ensemble(folder):
    """Two models' probabilities, and what nnU-Net makes of both."""
    from nnunetv2.ensembling.ensemble import ensemble_folders
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
    from batchgenerators.utilities.file_and_folder_operations import save_pickle

    random = np.random.default_rng(8)
    for name, heads in [("labels", 4), ("regions", 2)]:
        members = []
        for member in ("a", "b"):
            target = folder / "ensemble" / name / member
            target.mkdir(parents=True, exist_ok=True)
            members.append(str(target))
            for file in ("dataset.json", "plans.json"):
                shutil.copy(folder / name / file, target / file)
            for case_name in CASES[:2]:
                source = folder / name / "predictions" / f"{case_name}.nii.gz"
                labels, properties = SimpleITKIO().read_seg(str(source))
                values = random.uniform(size=(heads, *labels.shape[1:]))
                values = np.round(values * 8) / 8  # ties, and regions at one half
                shutil.copy(source, target / source.name)
                kind = np.float16 if member == "b" else np.float32
                np.savez_compressed(target / f"{case_name}.npz", probabilities=values.astype(kind))
                save_pickle(properties, str(target / f"{case_name}.pkl"))
        result = folder / "ensemble" / name / "mean"
        ensemble_folders(members, str(result), num_processes=1)
        for pickle in (folder / "ensemble" / name).glob("*/*.pkl"):
            pickle.unlink()


def main():
    folder = Path(sys.argv[1]).resolve()
    shutil.rmtree(folder, ignore_errors=True)
    for name in LABELS:
        dataset(folder / name, name)
        determine(folder / name)
    surfaces(folder)
    ensemble(folder)


if __name__ == "__main__":
    main()
