"""The masked losses of voxgrad's benches in PyTorch: nnU-Net's own, eager and compiled, MONAI's and exacta's.

    sh scripts/peers.sh benches/peers/loss.py [--repeats N] [--only TEXT] [--peers NAME,NAME]

The same logits, labels and annotations as in `cargo bench --bench loss`, forward and backward, on the CPU (one thread a core) or
on the GPU if there is one. Each line is: id, median seconds, peak extra bytes, peer, a remark after `#`. Extra bytes are
the most that was held beside logits, target and gradient of the logits.

* nnunet: `DC_and_CE_loss` and `DC_and_BCE_loss` with `MemoryEfficientSoftDiceLoss`, as nnU-Net's trainer builds them.
* compiled: the same under `torch.compile`, which nnU-Net's trainer applies to its loss on GPUs.
* monai: `DiceCELoss` in `MaskedLoss`, which multiplies logits and one-hot target by the mask. That is not the same loss:
  a masked voxel still has a softmax, and still counts in the mean of the cross-entropy; and the cross-entropy of
  overlapping regions is that of a softmax too.
* exacta: `DiceCELoss` with `ignore_index`, or with a mask for regions: the same loss, where the package is installed.

f16 runs on a GPU only, and there as logits of a network under autocast. The annotated patterns are those of the bench.
"""

import argparse
import ctypes
import importlib.util
import os
import statistics
import sys
import time
import warnings

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

BATCH = 2
CLASSES = [2, 4, 14, 62, 118]
NESTED = [(1, 2, 3), (2, 3), (3,)]
PATTERNS = ["dense", "slices", "scribbles", "blocks"]
PEERS = ["nnunet", "compiled", "monai", "exacta"]


def logits(channels, side, dtype, device):
    """[batch, channels, depth, height, width]: the bench's formula, which counts with channels last."""
    count = BATCH * side**3 * channels
    # One array at a time: with 118 classes on a GPU this is half a billion values.
    index = np.arange(count, dtype=np.uint32)
    np.multiply(index, np.uint32(2_654_435_761), out=index)
    np.right_shift(index, np.uint32(8), out=index)
    values = torch.from_numpy(index.astype(np.float32) / np.float32(1 << 21) - np.float32(4))
    values = values.reshape(BATCH, side, side, side, channels).permute(0, 4, 1, 2, 3)
    return values.to(device=device, dtype=dtype).contiguous()


def label_map(declared, side, pattern):
    """[batch, depth, height, width], `declared` where nothing is annotated."""
    z, y, x = np.ogrid[:side, :side, :side]
    labels = (x // 8 + 3 * (y // 8) + 5 * (z // 8)) % declared
    annotated = {
        "dense": np.ones((side, side, side), bool),
        "slices": np.broadcast_to(z % 20 == 7, (side, side, side)),
        "scribbles": (y + 2 * side - (x // 2 + 7 * z) % side) % side < -(-side // 20),
        "blocks": (3 * (x // 8) + 7 * (y // 8) + 11 * (z // 8)) % 20 == 7,
    }[pattern]
    one = torch.from_numpy(np.where(annotated, labels, declared).astype(np.int16))
    return one.expand(BATCH, side, side, side).contiguous()


def nnunet(channels, regions, masked):
    """nnU-Net's loss and the form of target that it takes."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": regions, "ddp": False}
    if regions:
        return DC_and_BCE_loss({}, dice, use_ignore_label=masked, dice_class=MemoryEfficientSoftDiceLoss)
    ignore = channels if masked else None
    return DC_and_CE_loss(dice, {}, ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)


def build(peer, channels, regions, masked, labels):
    """A function from logits to a loss, or None if the peer has none. Targets are made beforehand, as loaders do."""
    ignored = (labels == (4 if regions else channels)).unsqueeze(1)
    channel = torch.stack([torch.isin(labels, torch.tensor(r, dtype=labels.dtype, device=labels.device)) for r in NESTED], 1)
    if peer in ("nnunet", "compiled"):
        loss = nnunet(channels, regions, masked)
        target = torch.cat([channel, ignored], 1) if regions and masked else channel if regions else labels.unsqueeze(1)
        if peer == "compiled":
            loss = torch.compile(loss, dynamic=False)
        return lambda z: loss(z, target)
    if peer == "monai":
        from monai.losses import DiceCELoss, MaskedLoss
        from monai.networks import one_hot

        activation = {"sigmoid": True} if regions else {"softmax": True, "include_background": False}
        if not masked:
            loss = DiceCELoss(to_onehot_y=not regions, **activation)
            target = channel.float() if regions else labels.unsqueeze(1)
            return lambda z: loss(z, target)
        loss = MaskedLoss(DiceCELoss, **activation)
        mask = (~ignored).float()
        if regions:
            target = channel.float()
            return lambda z: loss(z, target, mask)
        clean = torch.where(ignored, 0, labels.unsqueeze(1))
        # The mask needs a one-hot target; MONAI's own conversion is part of the loss where there is none.
        return lambda z: loss(z, one_hot(clean, channels), mask)
    if importlib.util.find_spec("exacta") is None:
        return None
    from exacta.losses import DiceCELoss

    if regions:
        loss, target = DiceCELoss(activation="sigmoid", target_format="one-hot"), channel.float()
        mask = (~ignored) if masked else None
        return lambda z: loss(z, target, mask=mask)
    loss = DiceCELoss(include_background=False, ignore_index=channels if masked else None)
    target = labels.long()
    return lambda z: loss(z, target)


def resident(field):
    """Bytes of a field of /proc/self/status."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def extra_bytes(run, device, gradient):
    """The most memory that a run held beside what was there before and its gradient; None where it cannot be known."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return max(0, torch.cuda.max_memory_allocated() - before - gradient)
    try:
        # What earlier runs have freed goes back to the system, so that using it again counts.
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        before = resident("VmRSS")
        run()
        return max(0, resident("VmHWM") - before - gradient)
    except (OSError, AttributeError):
        return None


def measure(loss, z, device, repeats):
    """Median seconds and extra bytes of forward and backward."""

    def run():
        z.grad = None
        loss(z).backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    # The first runs compile and allocate.
    for _ in range(3):
        run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    z.grad = None
    return statistics.median(seconds), extra_bytes(run, device, z.numel() * z.element_size())


def main():
    parser = argparse.ArgumentParser(description="Times PyTorch's masked losses on voxgrad's bench items.")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs an item, after three for warming up")
    parser.add_argument("--only", default="", metavar="TEXT", help="only ids that contain this text")
    parser.add_argument("--peers", default=",".join(PEERS), help="which of nnunet, compiled, monai, exacta")
    parser.add_argument("--values", action="store_true", help="print each loss's value instead of timing it")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(cores)
    torch._dynamo.config.cache_size_limit = 64
    place = torch.cuda.get_device_name() if device.type == "cuda" else f"{cores} threads"
    print(f"# torch {torch.__version__}, {place}, median of {arguments.repeats}", file=sys.stderr)
    if importlib.util.find_spec("exacta") is None:
        print("# exacta is not installed", file=sys.stderr)

    targets = [(f"dice_ce-b{BATCH}-c{classes}", classes, False) for classes in CLASSES]
    targets.append((f"dice_bce-b{BATCH}-r{len(NESTED)}", len(NESTED), True))
    for kind, dtype in [("f32", torch.float32), ("f16", torch.float16)]:
        if kind == "f16" and device.type != "cuda":
            continue
        for name, channels, regions in targets:
            side = 128 if device.type == "cuda" else 64 if channels < 62 else 32
            names = [f"loss/{name}-{side}x{side}x{side}-{kind}-{p}/forward_backward" for p in PATTERNS]
            if not any(arguments.only in i for i in names):
                continue
            z = logits(channels, side, dtype, device).requires_grad_()
            for item, pattern in zip(names, PATTERNS):
                if arguments.only not in item:
                    continue
                labels = label_map(4 if regions else channels, side, pattern).to(device)
                for peer in arguments.peers.split(","):
                    loss = build(peer, channels, regions, pattern != "dense", labels)
                    if loss is None:
                        continue
                    try:
                        if arguments.values:
                            print(f"{item} {loss(z).item():.7f} {peer}", flush=True)
                            continue
                        seconds, extra = measure(loss, z, device, arguments.repeats)
                    except Exception as error:  # A peer that cannot do an item must not end the run.
                        print(f"# {item} {peer}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
                        continue
                    print(f"{item} {seconds:.6f} {'-' if extra is None else extra} {peer}", flush=True)


if __name__ == "__main__":
    main()
