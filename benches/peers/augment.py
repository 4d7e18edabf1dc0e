"""nnU-Net's own augmentation (batchgeneratorsv2) of the batches of voxgrad's bench, on the CPU.

    sh benches/peers/run.sh benches/peers/augment.py [--repeats N] [--threads N]

Each line is an id and the median seconds of N runs: what `cargo bench --bench medians -- augment` prints. A run transforms
32 batches of two samples from the larger patch that nnU-Net cuts out, one sample after the other in this process, with as
many threads as there are cores; the transforms are those of `nnUNetTrainer.get_training_transforms`, seeded. nnU-Net itself
runs them in up to twelve processes of one thread, so --threads 1 times the number of cores is its way of using them.
"""

import argparse
import os
import statistics
import time

import numpy as np
import torch
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

BATCHES, BATCH = 32, 2
ITEMS = [(1, (40, 56, 40)), (4, (64, 64, 64))]
ANGLES = (-30 / 180 * np.pi, 30 / 180 * np.pi)


def transforms(patch, channels):
    return nnUNetTrainer.get_training_transforms(
        patch, ANGLES, None, (0, 1, 2), False, use_mask_for_norm=[False] * channels, is_cascaded=False,
        foreground_labels=[1, 2, 3], regions=None, ignore_label=4,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for channels, patch in ITEMS:
        initial = [int(n) for n in get_patch_size(patch, ANGLES, ANGLES, ANGLES, (0.85, 1.25))]
        generator = np.random.default_rng(1)
        image = torch.from_numpy(generator.uniform(-1, 1, (channels, *initial)).astype(np.float32))
        z, y, x = np.indices(initial)
        labels = torch.from_numpy(((z // 8 + y // 8 + x // 8) % 5).astype(np.int16)[None])
        pipeline = transforms(patch, channels)

        def run():
            np.random.seed(1)
            torch.manual_seed(1)
            start = time.perf_counter()
            for _ in range(BATCHES * BATCH):
                pipeline(image=image.clone(), segmentation=labels.clone())
            return time.perf_counter() - start

        # Chooses between two ways of blurring for every size when it first meets one.
        run()
        seconds = statistics.median(run() for _ in range(arguments.repeats))
        size = "x".join(map(str, patch))
        print(f"augment/{BATCHES}-batches-in{channels}-b{BATCH}-{size} {seconds:.5f} # {arguments.threads} threads", flush=True)


if __name__ == "__main__":
    main()
