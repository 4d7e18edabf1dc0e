"""nnU-Net's own augmentation (batchgeneratorsv2) of the batches of voxgrad's bench, on the CPU.

    sh benches/peers/run.sh benches/peers/augment.py [--repeats N] [--only TEXT] [--cores N]

Each line is an id and the median seconds of N runs: what `cargo bench --bench medians -- augment` prints. A run transforms
batches of two samples from the larger patch that nnU-Net cuts out; the transforms are those of
`nnUNetTrainer.get_training_transforms`, seeded. Every item is timed in both ways of using the cores: in as many processes of
one thread each, which share the samples, as nnU-Net does it, and one sample after the other in one process with as many threads.
Passing finished batches to the process that trains is not part of it.
"""

import argparse
import multiprocessing
import os
import statistics
import time

import numpy as np
import torch
from nnunetv2.training.data_augmentation.compute_initial_patch_size import get_patch_size
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

BATCH = 2
# Channels, patch and batches of a run; the last one is the patch that nnU-Net plans where memory alone limits it.
ITEMS = [(1, (40, 56, 40), 32), (4, (64, 64, 64), 32), (1, (128, 128, 128), 4)]
ANGLES = (-30 / 180 * np.pi, 30 / 180 * np.pi)


def transforms(patch, channels):
    return nnUNetTrainer.get_training_transforms(
        patch, ANGLES, None, (0, 1, 2), False, use_mask_for_norm=[False] * channels, is_cascaded=False,
        foreground_labels=[1, 2, 3], regions=None, ignore_label=4,
    )


class Work:
    """So many samples of an item, transformed one after the other."""

    def __init__(self, channels, patch, samples, seed):
        initial = [int(n) for n in get_patch_size(patch, ANGLES, ANGLES, ANGLES, (0.85, 1.25))]
        generator = np.random.default_rng(1)
        self.image = torch.from_numpy(generator.uniform(-1, 1, (channels, *initial)).astype(np.float32))
        z, y, x = np.indices(initial)
        self.labels = torch.from_numpy(((z // 8 + y // 8 + x // 8) % 5).astype(np.int16)[None])
        self.pipeline = transforms(patch, channels)
        self.samples, self.seed = samples, seed

    def __call__(self):
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        for _ in range(self.samples):
            self.pipeline(image=self.image.clone(), segmentation=self.labels.clone())


def in_threads(item, cores, repeats):
    channels, patch, batches = item
    torch.set_num_threads(cores)
    work = Work(channels, patch, batches * BATCH, 1)
    # Chooses between two ways of blurring for every size when it first meets one.
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def in_processes(item, cores, repeats):
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(cores + 1)
    workers = [fork.Process(target=worker, args=(item, n, cores, repeats, barrier)) for n in range(cores)]
    for process in workers:
        process.start()
    seconds = []
    for _ in range(repeats):
        barrier.wait()
        start = time.perf_counter()
        barrier.wait()
        seconds.append(time.perf_counter() - start)
    for process in workers:
        process.join()
    return seconds


def worker(item, number, cores, repeats, barrier):
    channels, patch, batches = item
    torch.set_num_threads(1)
    work = Work(channels, patch, len(range(number, batches * BATCH, cores)), 1 + number)
    work()
    for _ in range(repeats):
        barrier.wait()
        work()
        barrier.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="items whose id contains this text")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    for item in ITEMS:
        channels, patch, batches = item
        name = f"augment/{batches}-batches-in{channels}-b{BATCH}-{'x'.join(map(str, patch))}"
        if arguments.only not in name:
            continue
        # The processes first: forked from one that has not used its threads yet.
        for way, measure in (("processes", in_processes), ("threads", in_threads)):
            seconds = statistics.median(measure(item, arguments.cores, arguments.repeats))
            print(f"{name} {seconds:.5f} {way} # {arguments.cores} {way}", flush=True)


if __name__ == "__main__":
    main()
