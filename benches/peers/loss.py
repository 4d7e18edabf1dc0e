"""The masked losses of voxgrad's benches in PyTorch: nnU-Net's own, eager and compiled, MONAI's and exacta's.

    sh benches/peers/run.sh benches/peers/loss.py [--repeats N] [--ids FILE] [--only TEXT] [--peers NAME,NAME]

FILE is what the bench printed: its items are run, and without it those of its full run. The same logits, labels and annotations as in `cargo bench --bench loss`, forward and backward, on the CPU (one thread a core) or
on the GPU if there is one. Each line is: id, median seconds, peak extra bytes, peer, a remark after `#`. Extra bytes are
the most that was held beside logits, target and gradient of the logits.

* nnunet: `DC_and_CE_loss` and `DC_and_BCE_loss` with `MemoryEfficientSoftDiceLoss`, as nnU-Net's trainer builds them, and
  `DC_and_topk_loss`. It has no weights of voxels: its Dice, whose mask may be real, and PyTorch's cross-entropy are
  combined; and one ignore value: a second one is replaced by the first, as part of the loss.
* compiled: the same under `torch.compile`, which nnU-Net's trainer applies to its loss on GPUs.
* monai: `DiceCELoss` in `MaskedLoss`, which multiplies logits and one-hot target by the mask. That is not the same loss:
  a masked voxel still has a softmax, and still counts in the mean of the cross-entropy; and the cross-entropy of
  overlapping regions is that of a softmax too. It has no cross-entropy alone and no largest ones.
* exacta: `DiceCELoss` with `ignore_index`, or with a mask for regions: the same loss, where the package is installed;
  `DiceTopKCELoss`, whose share is of the annotated voxels.

None has classes that are missing in a sample. f16 and bf16 run on a GPU only, and there as logits of a network under
autocast. The annotated patterns are those of the bench.
"""

import argparse
import ctypes
import dataclasses
import importlib.util
import os
import re
import statistics
import sys
import time
import warnings

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss, DC_and_topk_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.helpers import softmax_helper_dim1

BATCH = 2
CLASSES = [2, 4, 14, 62, 118]
NESTED = [(1, 2, 3), (2, 3), (3,)]
PATTERNS = ["dense", "slices", "scribbles", "blocks"]
VARIANTS = ["dense-top_k", "dense-weights", "dense-missing", "dense-ce_only", "dense-dice_only", "scattered-two_ignores"]
PEERS = ["nnunet", "compiled", "monai", "exacta"]
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclasses.dataclass
class Case:
    """What an id says."""

    name: str
    regions: bool
    channels: int
    side: int
    dtype: str
    pattern: str
    variant: str

    @property
    def masked(self):
        return self.pattern != "dense"

    @classmethod
    def parse(cls, name):
        """The case of an id, or None if it is one of the ids that are voxgrad's alone."""
        form = rf"loss/dice_b?ce-b{BATCH}-([cr])(\d+)-(\d+)x\d+x\d+-(f32|f16|bf16)-([a-z]+)-?([a-z_]*)/forward_backward"
        found = re.fullmatch(form, name)
        if found is None:
            return None
        kind, channels, side, dtype, pattern, variant = found.groups()
        return cls(name, kind == "r", int(channels), int(side), dtype, pattern, variant)


def defaults(gpu):
    """The items of the bench's full run, on the CPU or on a GPU."""
    targets = [(f"dice_ce-b{BATCH}-c{classes}", classes) for classes in CLASSES]
    targets.append((f"dice_bce-b{BATCH}-r{len(NESTED)}", len(NESTED)))
    for dtype in TYPES:
        for name, channels in targets:
            side = 128 if gpu else 64 if channels < 62 else 32
            for kind in PATTERNS + (VARIANTS if name.endswith(("-c4", "-c14")) else []):
                yield Case.parse(f"loss/{name}-{side}x{side}x{side}-{dtype}-{kind}/forward_backward")


def listed(path):
    """The ids of the bench's output."""
    with open(path) as lines:
        return [line.split()[0] for line in lines if line.startswith("loss/")]


def hashed(count):
    """The bench's 24 bits that look random, of the first integers."""
    # One array at a time: with 118 classes on a GPU this is half a billion values.
    index = np.arange(count, dtype=np.uint32)
    np.multiply(index, np.uint32(2_654_435_761), out=index)
    np.right_shift(index, np.uint32(8), out=index)
    return index


def logits(channels, side, dtype, device):
    """[batch, channels, depth, height, width]: the bench's formula, which counts with channels last."""
    values = hashed(BATCH * side**3 * channels).astype(np.float32)
    values = torch.from_numpy(values / np.float32(1 << 21) - np.float32(4))
    values = values.reshape(BATCH, side, side, side, channels).permute(0, 4, 1, 2, 3)
    return values.to(device=device, dtype=dtype).contiguous()


def voxel_weights(side):
    """[batch, 1, depth, height, width] between 64 / 255 and 1."""
    values = 64 + hashed(BATCH * side**3) % 192
    return torch.from_numpy(values.astype(np.float32) / 255).reshape(BATCH, 1, side, side, side)


def label_map(case):
    """[batch, depth, height, width], the first undeclared label where nothing is annotated; of two ignore values every other
    one is 255."""
    side, declared = case.side, 4 if case.regions else case.channels
    z, y, x = np.ogrid[:side, :side, :side]
    labels = (x // 8 + 3 * (y // 8) + 5 * (z // 8)) % declared
    annotated = {
        "dense": np.ones((side, side, side), bool),
        "slices": np.broadcast_to(z % 20 == 7, (side, side, side)),
        "scribbles": (y + 2 * side - (x // 2 + 7 * z) % side) % side < -(-side // 20),
        "blocks": (3 * (x // 8) + 7 * (y // 8) + 11 * (z // 8)) % 20 == 7,
        "scattered": hashed(side**3).reshape(side, side, side) % 5 != 4,
    }[case.pattern]
    ignore = np.full((side, side, side), declared)
    if case.variant == "two_ignores":
        ignore[..., ::2] = 255
    one = torch.from_numpy(np.where(annotated, labels, ignore).astype(np.int16))
    return one.expand(BATCH, side, side, side).contiguous()


def nnunet(case):
    """nnU-Net's loss of labels or regions, as far as it has this one."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": case.regions, "ddp": False}
    if case.regions:
        return DC_and_BCE_loss({}, dice, use_ignore_label=case.masked, dice_class=MemoryEfficientSoftDiceLoss)
    ignore = case.channels if case.masked else None
    if case.variant == "top_k":
        return DC_and_topk_loss(dice, {"k": 10}, ignore_label=ignore)
    parts = {"weight_ce": case.variant != "dice_only", "weight_dice": case.variant != "ce_only"}
    return DC_and_CE_loss(dice, {}, ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss, **parts)


def weighted(weights, target):
    """nnU-Net's Dice, whose mask may be of real numbers, and the cross-entropy's weighted mean."""
    dice = MemoryEfficientSoftDiceLoss(softmax_helper_dim1, batch_dice=False, smooth=1e-5, do_bg=False, ddp=False)

    def loss(z):
        entropy = torch.nn.functional.cross_entropy(z, target[:, 0].long(), reduction="none")
        return dice(z, target, loss_mask=weights) + (entropy * weights[:, 0]).sum() / weights.sum()

    return loss


def build(peer, case, labels):
    """A function from logits to a loss, or None if the peer has none. Targets are made beforehand, as loaders do."""
    regions, channels, masked = case.regions, case.channels, case.masked
    ignored = (labels == (4 if regions else channels)).unsqueeze(1)
    channel = torch.stack([torch.isin(labels, torch.tensor(r, dtype=labels.dtype, device=labels.device)) for r in NESTED], 1)
    if case.variant == "missing":
        return None
    if peer in ("nnunet", "compiled"):
        target = torch.cat([channel, ignored], 1) if regions and masked else channel if regions else labels.unsqueeze(1)
        if case.variant == "weights":
            loss = weighted(voxel_weights(case.side).to(labels.device), target)
            return torch.compile(loss, dynamic=False) if peer == "compiled" else loss
        loss = nnunet(case)
        if case.variant == "two_ignores":
            plain = loss
            loss = lambda z, target: plain(z, torch.where(target == 255, channels, target))  # noqa: E731
        if peer == "compiled":
            loss = torch.compile(loss, dynamic=False)
        return lambda z: loss(z, target)
    if case.variant == "weights":
        return None
    if peer == "monai":
        return monai(case, labels, ignored, channel)
    return exacta(case, labels, ignored, channel)


def monai(case, labels, ignored, channel):
    from monai.losses import DiceCELoss, DiceLoss, MaskedLoss
    from monai.networks import one_hot

    activation = {"sigmoid": True} if case.regions else {"softmax": True, "include_background": False}
    if case.variant == "dice_only":
        loss, target = DiceLoss(to_onehot_y=True, **activation), labels.unsqueeze(1)
        return lambda z: loss(z, target)
    if case.variant != "":
        return None
    if not case.masked:
        loss = DiceCELoss(to_onehot_y=not case.regions, **activation)
        target = channel.float() if case.regions else labels.unsqueeze(1)
        return lambda z: loss(z, target)
    loss = MaskedLoss(DiceCELoss, **activation)
    mask = (~ignored).float()
    if case.regions:
        target = channel.float()
        return lambda z: loss(z, target, mask)
    clean = torch.where(ignored, 0, labels.unsqueeze(1))
    # The mask needs a one-hot target; MONAI's own conversion is part of the loss where there is none.
    return lambda z: loss(z, one_hot(clean, case.channels), mask)


def exacta(case, labels, ignored, channel):
    if importlib.util.find_spec("exacta") is None:
        return None
    from exacta.losses import DiceCELoss, DiceTopKCELoss

    if case.regions:
        loss, target = DiceCELoss(activation="sigmoid", target_format="one-hot"), channel.float()
        mask = (~ignored) if case.masked else None
        return lambda z: loss(z, target, mask=mask)
    target = labels.long()
    if case.variant == "two_ignores":
        loss = DiceCELoss(include_background=False)

        def remapped(z):
            mask = target < case.channels
            return loss(z, torch.where(mask, target, 0), mask=mask.unsqueeze(1))

        return remapped
    settings = {"include_background": False, "ignore_index": case.channels if case.masked else None}
    if case.variant == "top_k":
        loss = DiceTopKCELoss(**settings)
    else:
        parts = {"lambda_ce": float(case.variant != "dice_only"), "lambda_dice": float(case.variant != "ce_only")}
        loss = DiceCELoss(**settings, **parts)
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
    parser.add_argument("--ids", metavar="FILE", help="only ids that the bench printed into this file")
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

    names = listed(arguments.ids) if arguments.ids else [case.name for case in defaults(device.type == "cuda")]
    numbers = {}
    for name in names:
        case = Case.parse(name)
        if case is None or arguments.only not in name:
            continue
        if case.dtype != "f32" and device.type != "cuda":
            continue
        # Cases of the same logits follow each other.
        key = (case.channels, case.side, case.dtype)
        if key not in numbers:
            numbers = {key: logits(case.channels, case.side, TYPES[case.dtype], device).requires_grad_()}
        z = numbers[key]
        labels = label_map(case).to(device)
        for peer in arguments.peers.split(","):
            try:
                loss = build(peer, case, labels)
                if loss is None:
                    continue
                if arguments.values:
                    print(f"{name} {loss(z).item():.7f} {peer}", flush=True)
                    continue
                seconds, extra = measure(loss, z, device, arguments.repeats)
            except Exception as error:  # A peer that cannot do an item must not end the run.
                print(f"# {name} {peer}: {type(error).__name__}: {error}".splitlines()[0], flush=True)
                continue
            print(f"{name} {seconds:.6f} {'-' if extra is None else extra} {peer}", flush=True)


if __name__ == "__main__":
    main()
