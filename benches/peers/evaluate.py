"""Times the evaluation of nnU-Net and of voxgrad on the same cases, with the same number of processes (voxgrad: threads).

    sh benches/peers/run.sh benches/peers/evaluate.py --cases 200 --workers 1 --results benches/RESULTS.md

The cases are made here: label maps of the size of BraTS with three nested regions and of CT with many organs, references with
an ignore label and predictions beside them. Twelve different ones are linked under as many names as there are cases. Both
programs score them in turns, each as its command line does, the start of the program and of nnU-Net's processes included; their
summaries must agree in every field. Reported are the best wall time with its processor time, and the peak memory of all
processes together (Linux only). --results puts the table into a file, in place of the one before.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from preprocess import measure

HEADING = "## Evaluation, beside nnU-Net"
DIFFERENT = 12
# Shape (z, y, x), labels, what is declared.
SETS = {
    "3 regions, 155x240x240": ((155, 240, 240), 3, True),
    "20 classes, 100x256x256": ((100, 256, 256), 20, False),
    "118 classes, 60x160x160": ((60, 160, 160), 118, False),
}


def main():
    arguments = parse()
    rows = []
    for title in arguments.sets:
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary)
            phantom(place, *SETS[title], arguments.cases)
            rows += compare(title, place, arguments)
            print(*rows[-2:], sep="\n", flush=True)
    text = table(rows, arguments)
    print(text)
    if arguments.results:
        write_section(arguments.results, text)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--voxgrad", default="target/release/voxgrad", help="the program")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--results", type=Path, help="file whose table is replaced")
    arguments = parser.parse_args()
    arguments.voxgrad = str(Path(arguments.voxgrad).resolve())
    return arguments


def phantom(place, shape, classes, nested, cases):
    """Blobs of labels; every fourth slice of the references is not annotated."""
    import numpy as np
    import SimpleITK

    for folder in ("references", "predictions"):
        (place / folder).mkdir()
    random = np.random.default_rng(0)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij")

    def distance(centre):
        return (z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2

    for case in range(min(cases, DIFFERENT)):
        reference, prediction = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
        centre = random.uniform(-0.3, 0.3, 3)
        for label in range(1, classes + 1):
            if not nested:
                centre = random.uniform(-0.8, 0.8, 3)
            radius = 0.5 / label if nested else 0.6 / classes ** (1 / 3)
            reference[distance(centre) < radius**2] = label
            prediction[distance(centre + random.normal(0, 0.02, 3)) < radius**2] = label
        reference[::4] = classes + 1
        for folder, volume in (("references", reference), ("predictions", prediction)):
            file = str(place / folder / f"case_{case:04}.nii.gz")
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(volume), file, useCompression=True)
    for case in range(DIFFERENT, cases):
        for folder in ("references", "predictions"):
            source = place / folder / f"case_{case % DIFFERENT:04}.nii.gz"
            os.link(source, place / folder / f"case_{case:04}.nii.gz")
    labels = {f"class {label}": list(range(label, classes + 1)) if nested else label for label in range(1, classes + 1)}
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, **labels, "ignore": classes + 1},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    if nested:
        description["regions_class_order"] = list(range(1, classes + 1))
    (place / "dataset.json").write_text(json.dumps(description))
    plans = {
        "dataset_name": "Dataset900_Peers",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "configurations": {},
    }
    (place / "plans.json").write_text(json.dumps(plans))


def compare(title, place, arguments):
    """Rows of both programs: title, name, wall seconds, processor seconds, peak bytes."""
    code = "import sys\nfrom nnunetv2.evaluation.evaluate_predictions import evaluate_folder_entry_point as run\n"
    code += "if __name__ == '__main__':\n    run()"
    typed = [str(place / "references"), str(place / "predictions"), "-np", str(arguments.workers)]
    typed += ["-djfile", str(place / "dataset.json"), "-pfile", str(place / "plans.json"), "-o"]
    peers = {
        "nnU-Net": [sys.executable, "-c", code, *typed],
        "voxgrad": [arguments.voxgrad, "evaluate-folder", *typed],
    }
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    for name in ("raw", "preprocessed", "results"):
        environment[f"nnUNet_{name}"] = str(place)
    runs = {name: [] for name in peers}
    for _ in range(arguments.repeat):
        for name, command in peers.items():
            runs[name].append(measure([*command, str(place / f"{name}.json")], environment))
    theirs, ours = (json.loads((place / f"{name}.json").read_text()) for name in peers)
    if not same(theirs, ours):
        sys.exit(f"{title}: the summaries differ")
    return [(title, name, *min(found)) for name, found in runs.items()]


def same(a, b):
    """Equal in every field. Floats may differ in the last digits: numpy adds up in another order."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or a != a and b != b or abs(a - b) <= 1e-12 * abs(a)
    return a == b


def table(rows, arguments):
    lines = [
        f"{arguments.cases} cases, {arguments.workers} workers on {os.cpu_count()} cores, best of {arguments.repeat}, "
        f"{time.strftime('%Y-%m-%d')}. Ratios are nnU-Net's figure over voxgrad's; all fields of both summaries agree.",
        "",
        "| cases | program | wall s | processor s | wall ms a case | peak MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for title, name, wall, cpu, peak in rows:
        each = 1000 * wall / arguments.cases
        lines.append(f"| {title} | {name} | {wall:.2f} | {cpu:.2f} | {each:.1f} | {peak / 1e6:.0f} |")
    lines.append("")
    for theirs, ours in zip(rows[::2], rows[1::2]):
        wall, cpu, peak = (a / b for a, b in zip(theirs[2:], ours[2:]))
        lines.append(f"* {ours[0]}: {wall:.1f} times in wall time, {cpu:.1f} in processor time, {peak:.1f} in memory.")
    return "\n".join(lines)


def write_section(path, text):
    """Replaces everything from the heading to the next one, or appends both."""
    before, _, rest = path.read_text().partition(HEADING)
    _, mark, after = rest.partition("\n## ")
    path.write_text(f"{before.rstrip()}\n\n{HEADING}\n\n{text}\n" + (f"\n## {after}" if mark else ""))


if __name__ == "__main__":
    main()
