"""Writes tests/data/augment/upstream.npz: one small sample as batchgeneratorsv2 transforms it with given parameters.

    sh benches/peers/run.sh tests/data/make/make_augmentation_fixtures.py

The transforms are made as nnU-Net makes them, but their parameters are not drawn. What the parameters are, the tests know
too.
"""

from pathlib import Path

import numpy as np
import torch
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform

FILE = Path(__file__).resolve().parent.parent / "augment/upstream.npz"
INITIAL, PATCH = (15, 18, 16), (9, 12, 10)
ANGLES, SCALE = (0.35, -0.2, 0.5), 0.8
# In the plane of height and width, and so far out that the border is seen.
PLANE_ANGLE, PLANE_SCALE = 2.0, 1.35


def sample(rng):
    """Two channels, and blobs of labels -1 to 3."""
    image = rng.standard_normal((2, *INITIAL)).astype(np.float32)
    image[1] = image[1] * 3 + 5
    z, y, x = np.indices(INITIAL)
    labels = ((z // 4 + y // 5 + x // 4) % 5 - 1).astype(np.int16)
    return torch.from_numpy(image), torch.from_numpy(labels[None])


def spatial(image, labels, patch, angles, scale, mode_seg="bilinear"):
    transform = SpatialTransform(
        patch, patch_center_dist_from_border=0, random_crop=False, p_elastic_deform=0,
        p_rotation=1, rotation=lambda image, dim: angles[dim], p_scaling=1, scaling=scale,
        p_synchronize_scaling_across_axes=1, bg_style_seg_sampling=False, mode_seg=mode_seg,
        border_mode_seg="constant", padding_value_seg=-1,
    )
    parameters = transform.get_parameters(image=image)
    return (
        transform._apply_to_image(image.clone(), **parameters).numpy(),
        transform._apply_to_segmentation(labels.clone(), **parameters).numpy(),
    )


def main():
    torch.set_num_threads(1)
    image, labels = sample(np.random.default_rng(1))
    arrays = {"image": image.numpy(), "labels": labels.numpy()}
    arrays["spatial_image"], arrays["spatial_labels"] = spatial(image, labels, PATCH, ANGLES, SCALE)
    _, arrays["nearest_labels"] = spatial(image, labels, PATCH, ANGLES, SCALE, mode_seg="nearest")

    # Depth becomes channels, as Convert3DTo2DTransform makes them.
    flat = [array.reshape(-1, *INITIAL[1:]) for array in (image, labels)]
    moved = spatial(*flat, PATCH[1:], (0, PLANE_ANGLE), PLANE_SCALE)
    arrays["plane_image"] = moved[0].reshape(2, INITIAL[0], *PATCH[1:])
    arrays["plane_labels"] = moved[1].reshape(1, INITIAL[0], *PATCH[1:])

    blur = GaussianBlurTransform(blur_sigma=(0.5, 1.0), p_per_channel=0.5)
    arrays["blur"] = blur._apply_to_image(
        image.clone(), apply_to_channel=torch.tensor([True, True]), sigmas=[[0.5, 0.75, 1.0], [0.93, 0.6, 0.8]]
    ).numpy()
    both = torch.tensor([0, 1])
    brightness = MultiplicativeBrightnessTransform(BGContrast((0.75, 1.25)), synchronize_channels=False)
    arrays["brightness"] = brightness._apply_to_image(
        image.clone(), apply_to_channel=both, multipliers=torch.tensor([0.8, 1.2])
    ).numpy()
    contrast = ContrastTransform(BGContrast((0.75, 1.25)), preserve_range=True, synchronize_channels=False)
    arrays["contrast"] = contrast._apply_to_image(
        image.clone(), apply_to_channel=both, multipliers=torch.tensor([1.2, 0.8])
    ).numpy()
    low = SimulateLowResolutionTransform(
        (0.5, 1), synchronize_channels=False, synchronize_axes=True, ignore_axes=None, p_per_channel=0.5
    )
    # Sizes 8, 10, 8 and 12, 15, 13.
    arrays["low_resolution"] = low._apply_to_image(
        image.clone(), apply_to_channel=both, scales=torch.tensor([[0.53] * 3, [0.81] * 3])
    ).numpy()
    for name, inverted in (("gamma", False), ("gamma_inverted", True)):
        gamma = GammaTransform(BGContrast((0.7, 1.5)), 1, False, 1, 1)
        arrays[name] = gamma._apply_to_image(
            image.clone(), apply_to_channel=both, retain_stats=torch.tensor([True, True]),
            invert_image=torch.tensor([inverted, inverted]), gamma=torch.tensor([0.75, 1.4]),
        ).numpy()
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
