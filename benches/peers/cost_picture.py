"""Draws the cost of a training step against its size, from the table that `sh scripts/compare.sh size` prints.

    sh benches/peers/run.sh benches/peers/cost_picture.py TABLE.md PICTURE.png

TABLE.md holds Markdown rows `| size/8-16-32-64-in1-b2-32x32x32 | device | seconds | peer | seconds | ratio |`; other lines
are left out, so that benches/RESULTS.md itself will do.
"""

import sys
from math import prod

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend has to be chosen first)

SMALLEST = 8  # features of the first stage of the network whose patch is varied


def rows(path):
    """(features of the first stage, side of the patch, voxels of the patch, our seconds, the peer's name and seconds)"""
    with open(path, encoding="utf-8") as table:
        for line in table:
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if len(cells) != 6 or not cells[0].startswith("size/"):
                continue
            features, _, rest = cells[0].removeprefix("size/").partition("-in")
            sides = [int(side) for side in rest.rsplit("-", 1)[1].split("x")]
            yield int(features.split("-")[0]), sides[0], prod(sides), float(cells[2]), cells[3], float(cells[4])


def draw(axes, points, label, peer):
    """Both engines' seconds over `points` of (x, ours, theirs)."""
    points = sorted(points)
    x = [point[0] for point in points]
    axes.loglog(x, [point[1] for point in points], "o-", label="voxgrad")
    axes.loglog(x, [point[2] for point in points], "s--", label=peer)
    axes.set_xticks(x, [str(value) for value in x])
    axes.minorticks_off()
    axes.set_xlabel(label)
    axes.set_ylabel("seconds a step")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    table = list(rows(sys.argv[1]))
    if not table:
        sys.exit(f"{sys.argv[1]} holds no row that starts with size/")
    peer = table[0][4]
    figure, (patches, widths) = plt.subplots(1, 2, figsize=(10, 4))
    draw(patches, [(side, ours, theirs) for first, side, _, ours, _, theirs in table if first == SMALLEST],
         "side of the patch in voxels, 8-16-32-64 features", peer)
    draw(widths, [(first, ours, theirs) for first, side, _, ours, _, theirs in table if side == 48],
         "features of the first stage, patch 48x48x48", peer)
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=120)


if __name__ == "__main__":
    main()
