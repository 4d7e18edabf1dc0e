#!/usr/bin/env python3
"""Adds up the counters that tests/cuda_driver wrote for each launch, by kernel, with the time of a plain roofline.

    python3 scripts/cuda_counters.py COUNTERS.json [RESOURCES...]

COUNTERS.json: what CUDA_SOFTWARE_COUNTERS named, one line of JSON a launch. RESOURCES: what `ptxas -v` said of each kernel
(scripts/ptx_check.sh), NAME.resources, for the share of a multiprocessor that is resident.

These are counts and a model, not measured times. A roofline takes the largest of: different sectors over the memory's
bandwidth (every sector once, as if all else came from caches), instructions of warps over four schedulers, wavefronts of
shared memory over one a cycle, multiply-adds of tensor cores over their peak.
"""

import collections
import json
import math
import pathlib
import re
import sys

# Multiprocessors, cycles a second, bytes a second, multiply-adds of tensor cores a second (16 bits), shared memory and
# registers of a multiprocessor: NVIDIA's data sheets of the A100 SXM 80 GB and the H100 SXM.
CHIPS = {
    "A100": dict(multiprocessors=108, clock=1.41e9, bandwidth=2.039e12, tensor=156e12, shared=164 << 10),
    "H100": dict(multiprocessors=132, clock=1.98e9, bandwidth=3.352e12, tensor=494.7e12, shared=228 << 10),
}
SECTOR = 32


def read(path):
    """Sums by kernel, and the last launch's shape."""
    kernels = collections.defaultdict(collections.Counter)
    shapes = {}
    with open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                launch = json.loads(line)
            except ValueError as error:
                sys.exit(f"{path}, line {number}: {error}")
            name = launch.pop("kernel")
            shapes[name] = launch.pop("cubes"), launch.pop("units"), launch.pop("shared_bytes")
            kernels[name].update(launch)
            kernels[name]["launches"] += 1
    return kernels, shapes


def registers(paths):
    """Registers of a thread by kernel."""
    found = {}
    for path in map(pathlib.Path, paths):
        used = re.search(r"Used (\d+) registers", path.read_text())
        if used:
            found[path.stem] = int(used[1])
    return found


def roofline(counts, chip):
    """Seconds, and which of the bounds it is."""
    cycles = chip["multiprocessors"] * chip["clock"]
    bytes_moved = SECTOR * (counts["load_sectors_unique"] + counts["store_sectors_unique"])
    bounds = {
        "memory": bytes_moved / chip["bandwidth"],
        "instructions": counts["warp_instructions"] / (4 * cycles),
        "shared": counts["shared_wavefronts"] / cycles,
        "tensor": counts["tensor_multiply_adds"] / chip["tensor"],
    }
    bound = max(bounds, key=bounds.get)
    return bounds[bound], bound


def resident(units, registers_of_thread, shared, chip):
    """Share of a multiprocessor's 64 warps, as scripts/ptx_check.sh has it."""
    warps = math.ceil(math.prod(units) / 32)
    of_warp = 256 * math.ceil(registers_of_thread * 32 / 256)
    cubes = min(32, 64 // warps, 65536 // (warps * of_warp), chip["shared"] // (shared + 1024))
    return cubes * warps / 64


def ratio(a, b):
    return f"{a / b:.2f}" if b else "-"


def main():
    if len(sys.argv) < 2:
        sys.exit(__doc__.strip())
    kernels, shapes = read(sys.argv[1])
    used = registers(sys.argv[2:])
    head = ["kernel", "launches", "loads/once", "loads/least", "stores/least", "wavefronts/least", "tensor share",
            "divergent", "lanes", "resident A100", "A100 us", "bound", "H100 us", "bound"]
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for name, counts in sorted(kernels.items(), key=lambda item: -item[1]["warp_instructions"]):
        _, units, shared = shapes[name]
        products = counts["tensor_multiply_adds"] + counts["fused_multiply_adds"]
        row = [
            name,
            counts["launches"],
            ratio(counts["load_sectors"], counts["load_sectors_unique"]),
            ratio(counts["load_sectors"], counts["load_sectors_least"]),
            ratio(counts["store_sectors"], counts["store_sectors_least"]),
            ratio(counts["shared_wavefronts"], counts["shared_wavefronts_least"]),
            ratio(counts["tensor_multiply_adds"], products),
            ratio(counts["divergent_branches"], counts["branches"]),
            f"{counts['active_lanes'] / max(counts['warp_instructions'], 1):.1f}",
            f"{100 * resident(units, used[name], shared, CHIPS['A100']):.0f} %" if name in used else "-",
        ]
        for chip in CHIPS.values():
            seconds, bound = roofline(counts, chip)
            row += [f"{1e6 * seconds / counts['launches']:.2f}", bound]
        print("| " + " | ".join(map(str, row)) + " |")
    print("\nCounts of a software driver and a model's times, not measurements. loads/once: sectors asked for over different "
          "sectors; loads/least: over the fewest that each access could do with.")


if __name__ == "__main__":
    main()
