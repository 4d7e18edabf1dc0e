"""Times voxgrad beside its peers on the same machine, in turns, and prints one Markdown table.

    sh scripts/compare.sh GROUP [ROUNDS]          ROUNDS: 3 unless given
    python3 benches/compare.py gpu FOLDER         tables of the logs that `scripts/gpu_checks.sh run` has left in FOLDER

| GROUP                       | what, beside whom                                                                       |
|-----------------------------|-----------------------------------------------------------------------------------------|
| conv, norm, step, size, all | layers, training steps, steps of growing patches and widths (benches/peers/cost_picture.py draws them), beside PyTorch |
| loss                        | losses for several kinds of annotation and variants, with memory, beside nnU-Net eager and compiled, MONAI, exacta |
| augment                     | augmentation of training batches, beside batchgeneratorsv2 in processes and in threads  |
| memory                      | peak resident memory of the steps, a process each, beside PyTorch                       |
| scaling                     | one core beside all                                                                     |
| fusion                      | voxgrad's steps with more and more fused, with launches and memory                      |
| burn                        | convolutions, norm and loss beside Burn 0.22.1, on Vulkan and on the CPU                |

A round runs all items of both sides, one after the other; each figure is the median of the rounds' medians. Run it on a
machine that does nothing else. ratio = the peer's seconds / voxgrad's: above 1, voxgrad is faster. The tables of `loss`
and `burn` also replace those between their marks in benches/RESULTS.md.

VOXGRAD_DEVICE chooses voxgrad's device (cpu unless set); PyTorch runs on the CPU, in GROUP loss on an NVIDIA GPU if there
is one and voxgrad does not run on the CPU. Vulkan is a software driver where there is no GPU, Debian sid's where root and
debootstrap are at hand, and then both use the same cores. ONLY=TEXT restricts `loss` to ids that contain TEXT.
BURN_PEER_LIMIT_S (150): what Burn has not done by then is given up, since it chooses among its kernels in each process anew.
Needs nothing but Python; the peers are installed by benches/peers/run.sh.
"""

import datetime
import glob
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "RESULTS.md"
DEVICE = os.environ.get("VOXGRAD_DEVICE", "cpu")
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
STEPS = [
    "step/8-16-32-64-in1-b2-40x56x40",
    "step/32-64-128-256-in1-b2-40x56x40",
    "step/32-64-128-in4-b2-64x64x64",
]
FUSIONS = ["nothing", "moments,bias", "recompute,moments,bias", "recompute,moments,bias,sums"]
BURN_ITEMS = [
    "conv/32-32-k333-s1-32x32x32/forward",
    "conv/32-32-k333-s1-32x32x32/forward_backward",
    "conv/t64-32-k222-s2-16x16x16/forward",
    "conv/t64-32-k222-s2-16x16x16/forward_backward",
    "norm/32-32x32x32/forward_backward",
    "loss/dice_ce-b2-c4-32x32x32-f32-scattered/forward_backward",
]


class Figures:
    """Figures of several rounds, and the median of each key's: the one place where medians are taken."""

    def __init__(self):
        self.rounds = {}

    def add(self, key, seconds, rest=()):
        self.rounds.setdefault(key, []).append((seconds, *rest))

    def median(self, key):
        """The whole line of the median round; None without any."""
        lines = sorted(self.rounds.get(key, []), key=lambda line: line[0])
        return lines[(len(lines) - 1) // 2] if lines else None

    def seconds(self, key):
        line = self.median(key)
        return None if line is None else line[0]

    def keys(self):
        return list(self.rounds)


def say(text):
    print(text, file=sys.stderr, flush=True)


def build(bench):
    """The executable of a bench."""
    command = ["cargo", "build", "--release", "--bench", bench, "--message-format=json-render-diagnostics"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    messages = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return [m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == bench][-1]


def has_gpu():
    return any(glob.glob(pattern) for pattern in ["/dev/dri/render*", "/dev/nvidia0", "/dev/dxg"])


def on_device(device, command):
    """The command and environment that run a program of voxgrad's or Burn's on a device."""
    environment = os.environ | {"VOXGRAD_DEVICE": device}
    if device.startswith("vulkan") and not has_gpu():
        if os.geteuid() == 0 and shutil.which("debootstrap"):
            return ["sh", str(ROOT / "scripts" / "vulkan_sid.sh"), *command], environment
        # The loader would else try every GPU driver that is installed beside the software one.
        drivers = glob.glob("/usr/share/vulkan/icd.d/lvp_icd*.json")
        if drivers and "VK_ICD_FILENAMES" not in environment:
            environment["VK_ICD_FILENAMES"] = drivers[0]
    return command, environment


def run(command, environment=None, log=None, limit=None):
    """The output lines of a command; its messages go to `log`. None if it fails or takes longer than `limit` seconds."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return None
    if log is not None:
        log.append(done.stderr)
    if done.returncode != 0:
        say(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stderr[-2000:]}")
        return None
    return done.stdout.splitlines()


def ours(program, *arguments, device=DEVICE, environment=None, log=None, limit=None):
    command, base = on_device(device, [program, *map(str, arguments)])
    return run(command, base | (environment or {}), log, limit) or []


def peers(script, *arguments, environment=None, log=None):
    command = ["sh", "benches/peers/run.sh", f"benches/peers/{script}", *map(str, arguments)]
    return run(command, os.environ | (environment or {}), log) or []


def items(lines):
    """`id seconds ...` of the lines that are no remarks."""
    for line in lines:
        words = line.split()
        if len(words) >= 2 and "/" in words[0] and line[0] != "#":
            yield words[0], float(words[1]), words[2:]


def found(pattern, text, otherwise=""):
    match = re.search(pattern, text, re.MULTILINE)
    return match.group(1) if match else otherwise


def table(head, rows):
    """Markdown: the first column is text, and so is a column whose name ends in a blank."""
    columns = head.split("|")
    marks = ["---" if i == 0 or name.endswith(" ") else "---:" for i, name in enumerate(columns)]
    lines = ["| " + " | ".join(name.strip() for name in columns) + " |", "|" + "|".join(marks) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def put(name, heading, text):
    """Puts a table into RESULTS.md between its marks, which are appended under `heading` where they are missing."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    page = RESULTS.read_text(encoding="utf-8")
    if begin not in page:
        page += f"\n## {heading}\n\n{begin}{end}"
    before, rest = page.split(begin, 1)
    after = rest.split(end, 1)[1]
    RESULTS.write_text(before + begin + text + "\n" + end + after, encoding="utf-8")


def processor():
    cpuinfo = Path("/proc/cpuinfo")
    return found(r"^model name[^:]*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", "an unknown processor")


def beside_pytorch(group, rounds):
    program, log = build("medians"), []
    own, theirs = Figures(), Figures()
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for name, seconds, _ in items(peers("torch_peers.py", group, log=log)):
            theirs.add(name, seconds)
            # What has no peer need not run: 16-bit items, say.
            for found_name, own_seconds, _ in items(ours(program, name, log=log)):
                own.add(found_name, own_seconds)
    peer = found(r"^# (torch [^,+]*)", "\n".join(log))
    rows = []
    for name in sorted(set(own.keys()) & set(theirs.keys())):
        mine, other = own.seconds(name), theirs.seconds(name)
        rows.append([name, DEVICE, f"{mine:.5f}", peer, f"{other:.5f}", f"{other / mine:.2f}"])
    print(table("work|device |voxgrad s|peer |peer s|ratio", rows))


def augment(rounds):
    program, own, theirs = build("medians"), Figures(), Figures()
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for name, seconds, (way, *_) in items(peers("augment.py", "--repeats", 3)):
            theirs.add((name, way), seconds)
        for name, seconds, _ in items(ours(program, "augment", 3)):
            own.add(name, seconds)
    rows = []
    for name in own.keys():
        mine, others = own.seconds(name), [theirs.seconds((name, way)) for way in ("processes", "threads")]
        if None not in others:
            row = [name.removeprefix("augment/"), DEVICE, f"{mine:.4f}"]
            rows.append([*row, *(cell for other in others for cell in (f"{other:.4f}", f"{other / mine:.1f}"))])
    print(table(f"batches|device |voxgrad s|{CORES} processes s|ratio|{CORES} threads s|ratio", rows))


def memory(_rounds):
    program, rows = build("medians"), []
    for name in STEPS:
        mine = float(found(r"^# peak resident memory ([\d.]+)", "\n".join(ours(program, name, 3)), "nan"))
        peaks = []
        # PyTorch in the format that needs less.
        for layout in ["contiguous", "channels_last_3d"]:
            lines = peers("torch_peers.py", "step", "--repeats", 3, "--only", name, "--format", layout)
            peaks.append(float(found(r"^# peak memory ([\d.]+)", "\n".join(lines), "nan")))
        rows.append([name, DEVICE, f"{mine:.0f}", f"{min(peaks):.0f}", f"{mine / min(peaks):.2f}"])
    print(table("step|device |voxgrad MiB|torch MiB|share", rows))


def scaling(rounds):
    program = build("medians")
    one, every = Figures(), Figures()
    for _ in range(rounds):
        for group in ["step", "conv"]:
            command, environment = on_device(DEVICE, [program, group, "5"])
            for name, seconds, _ in items(run(["taskset", "-c", "0", *command], environment) or []):
                one.add(name, seconds)
            for name, seconds, _ in items(ours(program, group, 5)):
                every.add(name, seconds)
    rows = []
    for name in sorted(set(one.keys()) & set(every.keys())):
        alone, together = one.seconds(name), every.seconds(name)
        rows.append([name, f"{alone:.5f}", f"{together:.5f}", f"{100 * alone / (together * CORES):.0f} %"])
    print(table(f"work|1 core s|{CORES} cores s|efficiency", rows))


def fusion(rounds):
    program, figures = build("medians"), Figures()
    for _ in range(rounds):
        for name in STEPS:
            for fused in FUSIONS:
                log = []
                lines = ours(program, name, 5, environment={"VOXGRAD_FUSION": fused}, log=log)
                launches = found(r"(\d+) launches a step", log[0] if log else "", "?")
                mebibytes = float(found(r"^# peak resident memory ([\d.]+)", "\n".join(lines), "nan"))
                for _, seconds, _ in items(lines):
                    figures.add((name, fused), seconds, (launches, mebibytes))
    rows = []
    for name, fused in figures.keys():
        seconds, launches, mebibytes = figures.median((name, fused))
        rows.append([name, fused.replace(",", ", "), f"{seconds:.4f}", launches, f"{mebibytes:.0f}"])
    print(table("step|fused |s|launches|peak MiB", rows))


LOSS_HEAD = (
    "work|voxgrad s|GB/s|% of copy|extra MB|nnU-Net s|ratio|extra MB|compiled s|ratio|extra MB|MONAI s|ratio|exacta s|ratio"
)


def loss_row(name, own, theirs):
    """One row of all figures of an id: `own` is seconds, GB/s, percent of a copy, extra bytes."""

    def megabytes(text):
        return f"{int(text) / 1e6:.2f}" if text.isdigit() else "–"

    seconds, rate, share, extra = own
    row = [re.sub(r"/forward_backward$", "", name.removeprefix("loss/"))]
    row += [f"{seconds:.5f}", rate, share, megabytes(extra)]
    for peer, with_memory in [("nnunet", True), ("compiled", True), ("monai", False), ("exacta", False)]:
        line = theirs.median((name, peer))
        row += ["–", "–"] if line is None else [f"{line[0]:.5f}", f"{line[0] / seconds:.1f}"]
        if with_memory:
            row.append("–" if line is None else megabytes(line[1]))
    return row


def loss(rounds):
    program, log = build("loss"), []
    on_gpu = DEVICE != "cpu" and os.path.exists("/dev/nvidia0")
    environment = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    own, theirs = Figures(), Figures()
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "ids"
        for number in range(rounds):
            say(f"round {number + 1} of {rounds}")
            lines = [line for line in ours(program, os.environ.get("ONLY", ""), log=log) if line.startswith("loss/")]
            ids.write_text("".join(f"{line}\n" for line in lines))
            for name, seconds, rest in items(lines):
                own.add(name, seconds, rest)
            answers = peers("loss.py", "--ids", ids, environment=environment, log=log)
            for name, seconds, (extra, peer, *_) in items(answers):
                theirs.add((name, peer), seconds, (extra,))
            for line in answers:
                if line.startswith("# loss/"):
                    say(line)
    said = "\n".join(log)
    same = "" if DEVICE == "cpu" or on_gpu else " of the CPU, since PyTorch has no Vulkan"
    title = (
        f"{datetime.date.today()}, rounds: {rounds}, {CORES} cores of {processor()}. voxgrad on "
        f"{found(r'^# device (.*)$', said)}, peers on {found(r'^# torch [^,]*, (.*), median', said)}{same}.\n\n"
    )
    text = title + table(LOSS_HEAD, [loss_row(name, own.median(name), theirs) for name in sorted(own.keys())])
    print(text)
    kind = DEVICE.split(":")[0]
    if kind == "cpu":
        put("losses", "Losses on sparse annotations", text)
    else:
        put(f"losses-{kind}", f"Losses on sparse annotations: {kind}", text)


def burn(rounds):
    limit = int(os.environ.get("BURN_PEER_LIMIT_S", "150"))
    program = build("medians")
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "burn"
    manifest = ROOT / "benches" / "peers" / "burn" / "Cargo.toml"
    environment = os.environ | {"CARGO_TARGET_DIR": str(target)}
    subprocess.run(["cargo", "build", "--release", "--manifest-path", str(manifest)], env=environment, check=True)
    peer = str(target / "release" / "burn-peer")
    log, figures, given_up = [], Figures(), set()
    # Once for nothing: the driver's root may have to be made.
    ours(program, "conv/none", device="vulkan", log=log)

    def measure(who, device, name, command, runs):
        if (who, device, name) in given_up:
            return
        command, environment = on_device(device, [*command, name, runs])
        lines = run(command, environment, log, limit)
        if lines is None:
            given_up.add((who, device, name))
        for _, seconds, rest in items(lines or []):
            figures.add((who, device, name), seconds, (found(r"([\d.]+ GFLOP/s)", " ".join(rest)),))

    for number in range(rounds):
        for name in BURN_ITEMS:
            say(f"round {number + 1} of {rounds}: {name}")
            measure("voxgrad", "vulkan", name, [program], "3")
            measure("burn", "vulkan", name, [peer, "vulkan"], "3")
            measure("voxgrad", "cpu", name, [program], "11")
            measure("burn", "cpu", name, [peer, "flex"], "3")

    def shown(line):
        return f"not done after {limit} s" if line is None else f"{line[0]:.6f}" + (f" ({line[1]})" if line[1] else "")

    rows = []
    for device, backend in [("vulkan", "Burn 0.22.1"), ("cpu", "Burn 0.22.1 flex")]:
        for name in BURN_ITEMS:
            mine, other = (figures.median((who, device, name)) for who in ["voxgrad", "burn"])
            ratio = f"{other[0] / mine[0]:.2f}" if mine and other else "–"
            rows.append([name, device, shown(mine), backend, shown(other), ratio])
    said = "\n".join(log)
    driver = f"{found(r'^# device [^ ]* (.*)$', said)} {found(r'^vulkan_sid: (Mesa [^ ]*)', said)}".strip()
    title = f"{datetime.date.today()}, rounds: {rounds}, {CORES} cores of {processor()}; Vulkan on {driver}.\n\n"
    text = title + table("work|device |voxgrad s|peer |peer s|ratio", rows)
    print(text)
    put("burn", "Beside Burn", text)


def gpu(folder):
    """Tables of what is there of: summary, medians.log, medians-again.log, losses.log, peers.log, peers-compiled.log (one JSON
    object a line, see benches/peers/torch_peers.py), peer-losses.log, and memory-NAME.mib (the device's memory in use, sampled)."""

    def lines(name):
        path = folder / name
        return path.read_text().splitlines() if path.exists() else []

    print("".join(f"* {line}\n" for line in lines("summary")))
    own, theirs = Figures(), {}
    for name in ["medians.log", "medians-again.log"]:
        for item, seconds, _ in items(lines(name)):
            own.add(item, seconds)
    for name in ["peers.log", "peers-compiled.log"]:
        for line in lines(name):
            answer = json.loads(line) if line.startswith("{") else {"medians": {}}
            for setting, seconds in answer["medians"].items():
                precision = next((p for p in ["fp16", "bf16"] if p in setting.split()), "")
                theirs.setdefault((answer["id"], precision), []).append((seconds, setting))
    rows = []
    for name in sorted(own.keys()):
        # The type is a suffix of the id, or of what precedes the pass.
        suffix = next((s for s in ["-bf16", "-f16"] if name.endswith(s) or s + "/" in name), "")
        precision = {"": "", "-f16": "fp16", "-bf16": "bf16"}[suffix]
        peer = min(theirs.get((name.replace(suffix, "") if suffix else name, precision), []), default=None)
        seconds = own.seconds(name)
        beside = [f"{peer[0]:.5f}", f"{peer[0] / seconds:.2f}", peer[1]] if peer else ["–", "–", "–"]
        rows.append([name, f"{seconds:.5f}", *beside])
    if rows:
        print(table("work|voxgrad s|PyTorch s|ratio|its setting ", rows), end="\n\n")
    losses, answers = Figures(), Figures()
    for name, seconds, rest in items(lines("losses.log")):
        losses.add(name, seconds, rest)
    for name, seconds, (extra, peer, *_) in items(lines("peer-losses.log")):
        answers.add((name, peer), seconds, (extra,))
    if losses.keys():
        print(table(LOSS_HEAD, [loss_row(name, losses.median(name), answers) for name in losses.keys()]), end="\n\n")
    rows = []
    for path in sorted(folder.glob("memory-*.mib")):
        samples = [int(word) for word in path.read_text().split() if word.isdigit()]
        if samples:
            # The first is from before the program began.
            rows.append([path.stem.removeprefix("memory-"), max(samples) - samples[0]])
    if rows:
        print(table("program|device MiB at most", rows))


def main():
    group = sys.argv[1] if len(sys.argv) > 1 else "all"
    if group == "gpu" and len(sys.argv) == 3:
        return gpu(Path(sys.argv[2]))
    beside = {"augment": augment, "memory": memory, "scaling": scaling, "fusion": fusion, "loss": loss, "burn": burn}
    if group not in [*beside, "conv", "norm", "step", "size", "all"] or len(sys.argv) > 3:
        sys.exit(__doc__)
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    if group not in ["scaling", "fusion", "burn"]:
        # Installs PyTorch where it is missing, outside of the timings.
        subprocess.run(["sh", "benches/peers/run.sh", "-c", "import torch, nnunetv2"], cwd=ROOT, check=True)
    if group in beside:
        beside[group](rounds)
    else:
        beside_pytorch(group, rounds)


if __name__ == "__main__":
    main()
