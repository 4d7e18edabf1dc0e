"""Trains on examples/data/hippocampus with PyTorch and nnU-Net's own network and loss, as voxgrad's demo does.

    sh benches/peers/run.sh benches/peers/demo_baseline.py [--iterations N] [--batch N] [--features 8,16,32,64] ...

Same network, loss, optimiser, patches and budget as the demo: PlainConvUNet with kernels 3 and strides 1, 2, 2, 2; Dice +
BCE with the ignore label and deep supervision; SGD with Nesterov momentum, gradient norm clipped to 12, polynomial
learning rate; z-score normalisation; nnU-Net's patch sampling; mirroring as the only augmentation. Then predicts the six
validation cases and prints the seconds per iteration and the mean Dice of both regions against the dense labels.

The defaults are for a budget of minutes, where nnU-Net's are for 250,000 iterations:
- momentum 0.9 and learning rate 0.05: momentum 0.99 spends hundreds of iterations in the valley where all is background;
- patches smaller than the image: one that reaches over its borders is mostly padding, which counts as annotated;
- mirroring along x only: which end of a hippocampus is the anterior one is hard to tell from a mirrored patch.
"""

import argparse
import itertools
import json
import os
import pathlib
import statistics
import time

import nibabel
import numpy as np
import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from torch import nn
from torch_peers import deep_supervision, downsampled, loss_function, network

REGIONS = {"hippocampus": (1, 2), "anterior": (1,)}
# Later entries are painted over earlier ones, where the region of the same position is predicted.
REGIONS_CLASS_ORDER = (2, 1)
IGNORE = 3
OVERSAMPLED = 0.33


def load(path):
    """A NIfTI file as a (z, y, x) array."""
    return np.asarray(nibabel.load(path).dataobj).transpose(2, 1, 0)


def normalised(image):
    """z-score over the whole image: nnU-Net's scheme for MRI. (Its cropping to non-zero would change nothing here.)"""
    image = image.astype(np.float32)
    return (image - image.mean()) / max(image.std(), 1e-8)


def cut(array, start, size, fill):
    """The box of `size` at `start`, which may reach over the borders; `fill` is used out there."""
    result = np.full(size, fill, array.dtype)
    low = [max(0, s) for s in start]
    high = [min(n, s + e) for n, s, e in zip(array.shape, start, size)]
    inside = tuple(slice(a, b) for a, b in zip(low, high))
    there = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start))
    result[there] = array[inside]
    return result


def loader_patch(patch):
    """The size that nnU-Net's loader reads for a patch: room for rotations by 30 degrees and zooming out to 0.85.

    Nothing is rotated here, but the size decides how far from its voxel a patch may be moved.
    """
    (a, b, c), cos, sin = patch, np.cos(np.pi / 6), np.sin(np.pi / 6)
    size = (
        max(a, abs(a * cos - c * sin), abs(a * cos + b * sin)),
        max(b, abs(b * cos + c * sin), abs(-a * sin + b * cos)),
        max(c, abs(-b * sin + c * cos), abs(a * sin + c * cos)),
    )
    return [int(value / 0.85) for value in size]


class Sampler:
    """Batches of patches by nnU-Net's rule for sparse labels: around an annotated voxel, or one of a region."""

    def __init__(self, cases, patch, batch, mirrored, seed):
        self.cases, self.patch, self.batch, self.mirrored = cases, patch, batch, mirrored
        self.random = np.random.default_rng(seed)
        self.loader = loader_patch(patch)
        self.annotated = [np.argwhere(labels != IGNORE) for _, labels in cases]
        self.regions = [
            [found for region in REGIONS.values() if len(found := np.argwhere(np.isin(labels, region)))]
            for _, labels in cases
        ]

    def start(self, case, forced):
        """Where the patch begins, in voxels of the case."""
        pools = self.regions[case] if forced and self.regions[case] else [self.annotated[case]]
        pool = pools[self.random.integers(len(pools))]
        voxel = pool[self.random.integers(len(pool))]
        result = []
        for v, size, loaded, final in zip(voxel, self.cases[case][1].shape, self.loader, self.patch):
            room = max(loaded - final, loaded - size)
            lowest = -((room + 1) // 2)
            # The loader's box, then its central crop.
            result.append(max(lowest, v - loaded // 2) + loaded // 2 - final // 2)
        return result

    def __call__(self):
        images, targets = [], []
        for index in range(self.batch):
            forced = index >= round(self.batch * (1 - OVERSAMPLED))
            case = self.random.integers(len(self.cases))
            start = self.start(case, forced)
            image = cut(self.cases[case][0], start, self.patch, 0)
            # Outside the image there is nothing to be found: background, and annotated.
            labels = cut(self.cases[case][1], start, self.patch, 0)
            axes = [axis for axis in self.mirrored if self.random.random() < 0.5]
            image, labels = np.flip(image, axes), np.flip(labels, axes)
            channels = [np.isin(labels, region) for region in REGIONS.values()] + [labels == IGNORE]
            images.append(image[None].copy())
            targets.append(np.stack(channels))
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(targets))


@torch.no_grad()
def predict(net, image, patch, mirrored):
    """The label map of a normalised image: padded centrally to the patch, tiles at half steps, Gaussian weights.

    The logits are averaged over all mirrorings along the axes in `mirrored`.
    """
    padding = [max(0, p - n) for p, n in zip(patch, image.shape)]
    before = [pad // 2 for pad in padding]
    padded = np.pad(image, [(b, pad - b) for b, pad in zip(before, padding)])
    x = torch.from_numpy(padded)[None, None]
    weights = compute_gaussian(tuple(patch), sigma_scale=1 / 8, value_scaling_factor=10, dtype=torch.float32, device="cpu")
    axes = [axis + 2 for axis in mirrored]
    flips = [flip for n in range(len(axes) + 1) for flip in itertools.combinations(axes, n)]
    logits, total = torch.zeros((len(REGIONS), *padded.shape)), torch.zeros(padded.shape)
    for start in itertools.product(*compute_steps_for_sliding_window(padded.shape, tuple(patch), 0.5)):
        box = tuple(slice(s, s + p) for s, p in zip(start, patch))
        tile = x[(slice(None), slice(None), *box)]
        output = sum(net(tile.flip(flip)).flip(flip) for flip in flips)[0] / len(flips)
        logits[(slice(None), *box)] += output * weights
        total[box] += weights
    inside = tuple(slice(b, b + n) for b, n in zip(before, image.shape))
    found = (logits / total > 0)[(slice(None), *inside)].numpy()
    labels = np.zeros(image.shape, np.uint8)
    for region, label in zip(found, REGIONS_CLASS_ORDER):
        labels[region] = label
    return labels


def dice(predicted, reference):
    """Dice of each region."""
    result = {}
    for name, labels in REGIONS.items():
        p, r = np.isin(predicted, labels), np.isin(reference, labels)
        result[name] = float(2 * (p & r).sum() / max(1, p.sum() + r.sum()))
    return result


def evaluate(net, cases, patch, mirrored):
    """Mean Dice over cases: of each region, and of both."""
    net.eval()
    net.decoder.deep_supervision = False
    scores = [dice(predict(net, image, patch, mirrored), labels) for image, labels in cases]
    net.decoder.deep_supervision = True
    net.train()
    means = {name: statistics.mean(score[name] for score in scores) for name in REGIONS}
    means["mean"] = statistics.mean(means.values())
    return means


def shown(scores):
    return "Dice " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def numbers(text):
    return [int(number) for number in text.split(",") if number]


def main():
    repository = pathlib.Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description="Trains on the hippocampus example with PyTorch and nnU-Net's parts.")
    parser.add_argument("--data", type=pathlib.Path, default=repository / "examples/data/hippocampus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iterations", type=int, default=800)
    parser.add_argument("--epoch", type=int, default=40, help="iterations with one learning rate")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--features", type=numbers, default=[8, 16, 32, 64], help="features per stage")
    parser.add_argument("--patch", type=numbers, default=[32, 40, 32], help="patch size, z,y,x")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--dense", action="store_true", help="train on labelsTr_dense, for comparison")
    parser.add_argument("--mirror", type=numbers, default=[2], help="axes to mirror in training, of z,y,x = 0,1,2")
    parser.add_argument("--tta", action="store_true", help="average the predictions over mirrorings along those axes")
    parser.add_argument("--validate-every", type=int, default=0, metavar="N", help="also print the Dice every N iterations")
    parser.add_argument("--json", action="store_true", help="the result as one JSON object")
    arguments = parser.parse_args()

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores)
    torch.manual_seed(arguments.seed)

    def cases(names, labels):
        return [
            (
                normalised(load(arguments.data / "imagesTr" / f"{name}_0000.nii.gz")),
                load(arguments.data / labels / f"{name}.nii.gz"),
            )
            for name in names
        ]

    split = json.loads((arguments.data / "splits_final.json").read_text())[0]
    training = cases(split["train"], "labelsTr_dense" if arguments.dense else "labelsTr")
    validation = cases(split["val"], "labelsTr_dense")
    sampler = Sampler(training, arguments.patch, arguments.batch, arguments.mirror, arguments.seed)

    # On the CPU, PyTorch's channels-last kernels are the faster ones for this network.
    net = network(arguments.features, 1, len(REGIONS)).to(memory_format=torch.channels_last_3d)
    outputs = len(arguments.features) - 1
    loss = deep_supervision(loss_function(len(REGIONS), True), outputs)
    sgd = torch.optim.SGD(net.parameters(), arguments.lr, momentum=arguments.momentum, nesterov=True, weight_decay=3e-5)
    epochs = -(-arguments.iterations // arguments.epoch)

    seconds, values = [], []
    for iteration in range(arguments.iterations):
        start = time.perf_counter()
        sgd.param_groups[0]["lr"] = arguments.lr * (1 - iteration // arguments.epoch / epochs) ** 0.9
        x, target = sampler()
        sgd.zero_grad(set_to_none=True)
        value = loss(net(x.to(memory_format=torch.channels_last_3d)), downsampled(target, outputs))
        value.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 12)
        sgd.step()
        values.append(value.item())
        seconds.append(time.perf_counter() - start)
        done = iteration + 1
        if not arguments.json and done % arguments.epoch == 0:
            recent = statistics.mean(values[-arguments.epoch :])
            print(f"iteration {done}: loss {recent:.4f}, {statistics.median(seconds):.3f} s each", flush=True)
        if arguments.validate_every and done % arguments.validate_every == 0 and done < arguments.iterations:
            print(shown(evaluate(net, validation, arguments.patch, [])), flush=True)

    mirrored = arguments.mirror if arguments.tta else []
    scores = evaluate(net, validation, arguments.patch, mirrored)
    total, each = sum(seconds), statistics.median(seconds)
    if arguments.json:
        print(json.dumps({"seconds": total, "seconds_per_iteration": each, "dice": scores}))
    else:
        print(f"{arguments.iterations} iterations in {total:.1f} s, median {each:.3f} s each, {cores} threads")
        print(shown(scores))


if __name__ == "__main__":
    main()
