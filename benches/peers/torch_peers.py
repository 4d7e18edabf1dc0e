"""The work of voxgrad's benches, done by PyTorch and nnU-Net: on the CPU in f32 with one thread per core, or on a GPU.

    sh benches/peers/run.sh benches/peers/torch_peers.py GROUP [--repeats N] [--json] [--only TEXT] [--threads N]
                                                           [--device cuda] [--amp TYPES] [--compile] [--large] [--format F]

GROUP is conv, norm, loss, step, size or all (all but size). Each line is an id, the median seconds of N runs, and a remark after `#`: the form
of `cargo bench --bench medians`, which prints the same ids, so that two outputs can be joined on the first column.

Shapes are depth x height x width of the input, without the batch.

| id                                                 | work                                                       |
|----------------------------------------------------|------------------------------------------------------------|
| conv/32-32-k333-s1-32x32x36/forward                | 3-D convolution with bias, batch 1, 32 to 32 channels,     |
| conv/32-32-k333-s1-32x32x36/forward_backward       | kernel 3x3x3, stride 1, padding k // 2; forward_backward   |
|                                                    | adds the gradients of input, weight and bias               |
| conv/32-32-k333-s1-32x32x32/...                    |                                                            |
| conv/8-8-k333-s1-40x56x40/...                      |                                                            |
| conv/4-32-k333-s1-48x48x48/...                     |                                                            |
| conv/64-64-k333-s1-16x16x16/...                    |                                                            |
| conv/128-128-k333-s1-8x8x8/...                     |                                                            |
| conv/32-32-k133-s1-20x64x64/...                    |                                                            |
| conv/32-64-k333-s2-32x32x32/...                    |                                                            |
| conv/t64-32-k222-s2-16x16x16/...                   | transposed convolution, kernel = stride = 2                |
| norm/32-32x32x36/forward_backward                  | instance norm with scale and shift, then leaky ReLU 0.01,  |
| norm/32-32x32x32/forward_backward                  | batch 1, 32 channels; gradients of input, scale and shift  |
| loss/dice_ce-b2-c4-64x64x64/forward_backward       | nnU-Net's Dice + cross-entropy with an ignore label, batch |
| loss/dice_ce-b2-c14-64x64x64/forward_backward      | 2, c classes; value and gradient of the logits             |
| loss/dice_ce-b2-c62-32x32x32/forward_backward      |                                                            |
| loss/dice_bce-b2-r3-64x64x64/forward_backward      | the same with r regions and nnU-Net's Dice + BCE           |
| step/8-16-32-64-in1-b2-40x56x40                    | one training step of PlainConvUNet with these features per |
| step/32-64-128-256-in1-b2-40x56x40                 | stage, 1 input channel, batch 2, 2 regions, ignore label   |
| step/32-64-128-in4-b2-64x64x64                     | 4 input channels, batch 2, 4 classes, ignore label         |
| step/32-64-128-256-320-320-in4-b2-128x128x128      | on a GPU or with --large: nnU-Net's plan for BraTS         |
| size/...                                           | steps of the first network with patches of 32 to 96, and   |
|                                                    | with 2 and 4 times the features                            |

A step is: forward, nnU-Net's deep-supervision loss, backward, clipping of the gradient norm to 12, SGD (learning rate
0.01, Nesterov momentum 0.99, weight decay 3e-5). Loading and augmentation are not part of it.
In all losses 10 % of the voxels are annotated, in whole slices, and batch_dice is off as in nnU-Net's 3d_fullres.
Every item is timed in PyTorch's two memory formats, interleaved, and the fastest is reported; --compile adds each under
torch.compile. --amp f16,bf16 (what a GPU has unless told otherwise) times everything under autocast too, f16 steps with a
gradient scaler: such an id has -f16 or -bf16 behind its shape, as voxgrad's. On a GPU the BraTS plan's step is always
timed. On Linux and on a GPU the last line is the peak memory of the process or the device.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import time

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import nn

# (input channels, output channels, kernel, stride, input shape)
CONVOLUTIONS = [
    (32, 32, (3, 3, 3), 1, (32, 32, 36)),
    (32, 32, (3, 3, 3), 1, (32, 32, 32)),
    (8, 8, (3, 3, 3), 1, (40, 56, 40)),
    (4, 32, (3, 3, 3), 1, (48, 48, 48)),
    (64, 64, (3, 3, 3), 1, (16, 16, 16)),
    (128, 128, (3, 3, 3), 1, (8, 8, 8)),
    (32, 32, (1, 3, 3), 1, (20, 64, 64)),
    (32, 64, (3, 3, 3), 2, (32, 32, 32)),
]
TRANSPOSED = [(64, 32, 2, (16, 16, 16))]
NORMS = [(32, (32, 32, 36)), (32, (32, 32, 32))]
LABEL_LOSSES = [(4, (64, 64, 64)), (14, (64, 64, 64)), (62, (32, 32, 32))]
REGION_LOSSES = [(3, (64, 64, 64))]
# (features per stage, input channels, heads, whether the heads are regions, patch)
STEPS = [
    ((8, 16, 32, 64), 1, 2, True, (40, 56, 40)),
    ((32, 64, 128, 256), 1, 2, True, (40, 56, 40)),
    ((32, 64, 128), 4, 4, False, (64, 64, 64)),
]
LARGE_STEP = ((32, 64, 128, 256, 320, 320), 4, 4, False, (128, 128, 128))
SMALL = (8, 16, 32, 64)
SIZES = [(SMALL, 1, 2, True, (side,) * 3) for side in (32, 48, 64, 80, 96)]
SIZES += [(tuple(factor * f for f in SMALL), 1, 2, True, (48,) * 3) for factor in (2, 4)]
BATCH = 2
TYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}


def sides(shape):
    """A shape as ids spell it: 32x32x36."""
    return "x".join(map(str, shape))


class Setting:
    """How PyTorch runs an item: where, in which memory format and precision, compiled or not."""

    def __init__(self, device, memory_format, precision=None, compiled=False):
        self.device, self.memory_format, self.precision, self.compiled = device, memory_format, precision, compiled

    def place(self, module):
        """A layer or a network as this setting wants it."""
        module = module.to(device=self.device, memory_format=self.memory_format)
        return torch.compile(module) if self.compiled else module

    def autocast(self):
        if self.precision is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device, dtype=self.precision)


def settings(device, precision, compiled, only_format):
    """All settings that an item of one precision is timed in, by name."""
    return {
        f"{label}{' compiled' if c else ''}": Setting(device, memory_format, precision, c)
        for label, memory_format in FORMATS.items()
        if only_format in (None, label)
        for c in ([False, True] if compiled else [False])
    }


class Timer:
    """Times items and prints them; `only` restricts it to ids that contain a text."""

    def __init__(self, repeats, as_json, only, device, amp, compiled, only_format):
        self.repeats, self.as_json, self.only, self.device = repeats, as_json, only, device
        precisions = {"": None} | {f"-{name}": TYPES[name] for name in amp}
        self.settings = {end: settings(device, dtype, compiled, only_format) for end, dtype in precisions.items()}

    def __call__(self, name, make):
        """`make(setting)` builds the item and returns a function that runs it once."""
        for suffix, settings in self.settings.items():
            # Behind the shape: conv/...-32x32x32-f16/forward, step/...-64x64x64-f16.
            group, item, *direction = name.split("/")
            self.item("/".join([group, item + suffix, *direction]), make, settings)

    def item(self, name, make, settings):
        if self.only not in name:
            return
        runs = {label: self.waiting(make(setting)) for label, setting in settings.items()}
        seconds = {label: [] for label in runs}
        # The first runs pick an algorithm and allocate. Interleaved, so that a disturbance of the machine hits both.
        for repeat in range(-2, self.repeats):
            for label, run in runs.items():
                start = time.perf_counter()
                run()
                if repeat >= 0:
                    seconds[label].append(time.perf_counter() - start)
        medians = {label: statistics.median(values) for label, values in seconds.items()}
        best = min(medians, key=medians.get)
        if self.as_json:
            print(json.dumps({"id": name, "seconds": medians[best], "format": best, "medians": medians}), flush=True)
        else:
            print(f"{name} {medians[best]:.6f} # {best}", flush=True)

    def waiting(self, run):
        """A GPU only queues the work: a run ends when the queue is empty."""
        if self.device != "cuda":
            return run

        def wait():
            run()
            torch.cuda.synchronize()

        return wait


def randn(shape, setting, seed, grad=False):
    """Normal values that do not depend on the setting."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(device=setting.device, memory_format=setting.memory_format).requires_grad_(grad)


def forward_backward(layer, shape, setting):
    """A function that runs a layer forward and backward, from the same output gradient each time."""
    layer = setting.place(layer)
    x = randn(shape, setting, 1, grad=True)
    with setting.autocast():
        y = layer(x)
    dy = randn(y.shape, setting, 2).to(y.dtype)

    def run():
        # Fresh gradients: otherwise the accumulation into the old ones would be timed as well.
        x.grad = None
        layer.zero_grad(set_to_none=True)
        with setting.autocast():
            y = layer(x)
        y.backward(dy)

    return run


def forward(layer, shape, setting):
    """A function that runs a layer forward only."""
    layer = setting.place(layer)
    x = randn(shape, setting, 1)

    @torch.no_grad()
    def run():
        with setting.autocast():
            layer(x)

    return run


def bench_conv(timer):
    items = []
    for c_in, c_out, kernel, stride, shape in CONVOLUTIONS:
        padding = [k // 2 for k in kernel]
        name = f"conv/{c_in}-{c_out}-k{''.join(map(str, kernel))}-s{stride}-{sides(shape)}"
        items.append((name, c_in, shape, lambda a=(c_in, c_out, kernel, stride, padding): nn.Conv3d(*a)))
    for c_in, c_out, k, shape in TRANSPOSED:
        name = f"conv/t{c_in}-{c_out}-k{k}{k}{k}-s{k}-{sides(shape)}"
        items.append((name, c_in, shape, lambda a=(c_in, c_out, k, k): nn.ConvTranspose3d(*a)))
    for name, c_in, shape, layer in items:
        x = (1, c_in, *shape)
        timer(f"{name}/forward", lambda f, layer=layer, x=x: forward(layer(), x, f))
        timer(f"{name}/forward_backward", lambda f, layer=layer, x=x: forward_backward(layer(), x, f))


def bench_norm(timer):
    for channels, shape in NORMS:

        def make(setting, channels=channels, shape=shape):
            layer = nn.Sequential(nn.InstanceNorm3d(channels, eps=1e-5, affine=True), nn.LeakyReLU(0.01, inplace=True))
            return forward_backward(layer, (1, channels, *shape), setting)

        timer(f"norm/{channels}-{sides(shape)}/forward_backward", make)


def loss_function(heads, regions):
    """nnU-Net's default loss with an ignore label, as its trainer builds it for 3d_fullres."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": regions, "ddp": False}
    if regions:
        return DC_and_BCE_loss({}, dice, use_ignore_label=True, dice_class=MemoryEfficientSoftDiceLoss)
    return DC_and_CE_loss(dice, {}, ignore_label=heads, dice_class=MemoryEfficientSoftDiceLoss)


def target(heads, regions, shape):
    """A target as nnU-Net's loader makes it, with a tenth of the slices annotated.

    Labels: one channel of integers, `heads` meaning ignore. Regions: nested ones, and the ignore mask as last channel.
    """
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, heads + regions, (BATCH, 1, *shape), generator=generator)
    ignored = torch.ones((BATCH, 1, *shape), dtype=torch.bool)
    ignored[:, :, ::10] = False
    if not regions:
        return torch.where(ignored, heads, labels).to(torch.int16)
    nested = [(labels > region) & ~ignored for region in range(heads)]
    return torch.cat([*nested, ignored], dim=1)


def bench_loss(timer):
    items = [(f"dice_ce-b{BATCH}-c{heads}", heads, False, shape) for heads, shape in LABEL_LOSSES]
    items += [(f"dice_bce-b{BATCH}-r{heads}", heads, True, shape) for heads, shape in REGION_LOSSES]
    for name, heads, regions, shape in items:

        def make(setting, heads=heads, regions=regions, shape=shape):
            loss, goal = loss_function(heads, regions), target(heads, regions, shape).to(setting.device)
            loss = torch.compile(loss) if setting.compiled else loss
            logits = randn((BATCH, heads, *shape), setting, 4).to(setting.precision or torch.float32).requires_grad_()

            def run():
                logits.grad = None
                loss(logits, goal).backward()

            return run

        timer(f"loss/{name}-{sides(shape)}/forward_backward", make)


def network(features, channels, heads):
    """nnU-Net's plain U-Net: two convolutions a stage, kernels 3, strides 2, deep supervision."""
    stages = len(features)
    net = PlainConvUNet(
        input_channels=channels,
        n_stages=stages,
        features_per_stage=features,
        conv_op=nn.Conv3d,
        kernel_sizes=[[3, 3, 3]] * stages,
        strides=[[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        n_conv_per_stage=[2] * stages,
        num_classes=heads,
        n_conv_per_stage_decoder=[2] * (stages - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )
    net.apply(InitWeights_He(1e-2))
    return net


def deep_supervision(loss, outputs):
    """Weights 1, 1/2, 1/4, ... with the lowest resolution left out, normalised to a sum of 1."""
    weights = [0.5**level for level in range(outputs - 1)] + [0.0]
    return DeepSupervisionWrapper(loss, [weight / sum(weights) for weight in weights])


def downsampled(goal, outputs):
    """The target at each resolution, by nnU-Net's rule: nearest-exact."""
    return [goal] + [
        nn.functional.interpolate(goal.float(), scale_factor=0.5**level, mode="nearest-exact").to(goal.dtype)
        for level in range(1, outputs)
    ]


def bench_step(timer, group="step", steps=STEPS):
    for features, channels, heads, regions, shape in steps:

        def make(setting, features=features, channels=channels, heads=heads, regions=regions, shape=shape):
            torch.manual_seed(5)
            net = setting.place(network(features, channels, heads))
            outputs = len(features) - 1
            loss = deep_supervision(loss_function(heads, regions), outputs)
            goals = [goal.to(setting.device) for goal in downsampled(target(heads, regions, shape), outputs)]
            x = randn((BATCH, channels, *shape), setting, 6)
            sgd = torch.optim.SGD(net.parameters(), 0.01, momentum=0.99, nesterov=True, weight_decay=3e-5)
            # Disabled, it passes everything through, as without mixed precision.
            scaler = torch.amp.GradScaler(setting.device, enabled=setting.precision == torch.float16)

            def run():
                sgd.zero_grad(set_to_none=True)
                with setting.autocast():
                    value = loss(net(x), goals)
                scaler.scale(value).backward()
                scaler.unscale_(sgd)
                nn.utils.clip_grad_norm_(net.parameters(), 12)
                scaler.step(sgd)
                scaler.update()

            return run

        name = f"{group}/{'-'.join(map(str, features))}-in{channels}-b{BATCH}-{sides(shape)}"
        timer(name, make)


def bench_large_step(timer):
    bench_step(timer, steps=[*STEPS, LARGE_STEP])


def bench_size(timer):
    bench_step(timer, "size", SIZES)


def peak_memory(device):
    """MiB: of the device's tensors on a GPU, else of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024


GROUPS = {"conv": bench_conv, "norm": bench_norm, "loss": bench_loss, "step": bench_step, "size": bench_size}


def main():
    parser = argparse.ArgumentParser(description="Times voxgrad's bench items in PyTorch and nnU-Net.")
    parser.add_argument("group", choices=[*GROUPS, "all"])
    parser.add_argument("--repeats", type=int, default=7, help="timed runs an item, after two for warming up")
    parser.add_argument("--json", action="store_true", help="one JSON object a line, with every setting's median")
    parser.add_argument("--only", default="", metavar="TEXT", help="only ids that contain this text")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--format", choices=FORMATS, help="this memory format alone")
    parser.add_argument("--amp", metavar="TYPES", help="autocast types to time too: f16,bf16; on a GPU both unless given")
    parser.add_argument("--compile", action="store_true", help="time everything under torch.compile too")
    parser.add_argument("--large", action="store_true", help="with the BraTS plan's step on a CPU too")
    parser.add_argument("--threads", type=int, help="CPU threads; all cores unless given")
    arguments = parser.parse_args()

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = arguments.threads or cores
    torch.set_num_threads(cores)
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{cores} threads"
    print(f"# torch {torch.__version__}, {where}, median of {arguments.repeats}", file=sys.stderr)
    amp = "f16,bf16" if arguments.amp is None and arguments.device == "cuda" else arguments.amp or ""
    amp = [name for name in amp.split(",") if name]
    if not set(amp) <= set(TYPES):
        parser.error(f"--amp {arguments.amp}: types are f16 and bf16")
    only = (arguments.only, arguments.device, amp, arguments.compile, arguments.format)
    timer = Timer(max(1, arguments.repeats), arguments.json, *only)
    groups = GROUPS | ({"step": bench_large_step} if arguments.large or arguments.device == "cuda" else {})
    for name, bench in groups.items():
        if arguments.group == name or (arguments.group == "all" and name != "size"):
            bench(timer)
    if arguments.device == "cuda" or os.path.exists("/proc/self/status"):
        print(f"# peak memory {peak_memory(arguments.device):.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
