"""Puts the logs of `scripts/gpu-checks.sh run` into Markdown tables, as benches/RESULTS.md has them.

    python3 scripts/gpu_table.py FOLDER

Reads what is there of: summary, medians.log, medians-again.log (`id seconds # remark`), losses.log (`id seconds GB/s
percent extra_bytes`), peers.log and peers-compiled.log (one JSON object a line, see benches/peers/torch_peers.py), peer-losses.log
(`id seconds extra_bytes peer`), and memory-NAME.mib (the device's memory in use, sampled). Needs nothing but Python.
"""

import json
import statistics
import sys
from pathlib import Path

PRECISIONS = {"": "", "-f16": "fp16", "-bf16": "bf16"}


def lines(folder, name):
    path = folder / name
    return [line for line in path.read_text().splitlines() if "/" in line] if path.exists() else []


def own_seconds(folder):
    """Median of the rounds by id."""
    rounds = {}
    for name in ["medians.log", "medians-again.log"]:
        for line in lines(folder, name):
            words = line.split()
            if line[0] != "#" and len(words) >= 2:
                rounds.setdefault(words[0], []).append(float(words[1]))
    return {name: statistics.median(seconds) for name, seconds in rounds.items()}


def peer_seconds(folder):
    """The fastest of the peer's settings, by id and precision; f32 is the empty one."""
    fastest = {}
    for name in ["peers.log", "peers-compiled.log"]:
        for line in lines(folder, name):
            if not line.startswith("{"):
                continue
            item = json.loads(line)
            for setting, seconds in item["medians"].items():
                precision = next((p for p in ["fp16", "bf16"] if p in setting.split()), "")
                key = item["id"], precision
                if key not in fastest or seconds < fastest[key][0]:
                    fastest[key] = seconds, setting
    return fastest


def table(head, rows):
    print(head)
    print("|".join(["", *("---" if i == 0 else "---:" for i in range(head.count("|") - 1)), ""]))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def work(folder):
    ours, theirs = own_seconds(folder), peer_seconds(folder)
    rows = []
    for name, seconds in sorted(ours.items()):
        # The type is a suffix of the id, or of what precedes the pass.
        precision = next((s for s in ["-bf16", "-f16"] if name.endswith(s) or s + "/" in name), "")
        peer = theirs.get((name.replace(precision, "") if precision else name, PRECISIONS[precision]))
        beside = [f"{peer[0]:.5f}", f"{peer[0] / seconds:.2f}", peer[1]] if peer else ["–", "–", "–"]
        rows.append([name, f"{seconds:.5f}", *beside])
    if rows:
        table("| work | voxgrad s | PyTorch s | ratio | its setting |", rows)


def losses(folder):
    peers = {}
    for line in lines(folder, "peer-losses.log"):
        words = line.split()
        if line[0] != "#" and len(words) >= 4:
            peers[words[0], words[3]] = float(words[1])
    rows = []
    for line in lines(folder, "losses.log"):
        words = line.split()
        if line[0] == "#" or len(words) < 5:
            continue
        name, seconds = words[0], float(words[1])
        beside = []
        for peer in ["nnunet", "compiled", "monai"]:
            of_peer = peers.get((name, peer))
            beside += [f"{of_peer:.5f}", f"{of_peer / seconds:.1f}"] if of_peer else ["–", "–"]
        rows.append([name, words[1], words[2], words[3], f"{float(words[4]) / 1e6:.2f}", *beside])
    if rows:
        head = "| loss | voxgrad s | GB/s | % of copy | extra MB | nnU-Net s | ratio | compiled s | ratio | MONAI s | ratio |"
        table(head, rows)


def memory(folder):
    rows = []
    for path in sorted(folder.glob("memory-*.mib")):
        samples = [int(word) for word in path.read_text().split() if word.isdigit()]
        if samples:
            # The first is from before the program began.
            rows.append([path.stem.removeprefix("memory-"), str(max(samples) - samples[0])])
    if rows:
        table("| program | device MiB at most |", rows)


def main():
    folder = Path(sys.argv[1])
    if (folder / "summary").exists():
        print("".join(f"* {line}\n" for line in (folder / "summary").read_text().splitlines()))
    work(folder)
    losses(folder)
    memory(folder)


if __name__ == "__main__":
    main()
