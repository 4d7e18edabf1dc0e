"""Times the preprocessing of nnU-Net and of voxgrad on the same cases, plans and number of workers.

    sh benches/peers/run.sh benches/peers/preprocess.py FOLDER --phantom 3 --workers 2 --results benches/RESULTS.md

FOLDER is a raw dataset in nnU-Net's layout (dataset.json, imagesTr, labelsTr). --phantom adds a dataset of that many cases
of 4 x 155 x 240 x 240 voxels made here; every third has voxels of 1.2 mm where the others have 1 mm, and is resampled.
nnU-Net makes fingerprint and plans, which are not timed; both then preprocess 3d_fullres from those plans in turns, and start
from nothing in every repetition. Reported are the best wall time with its processor time, and the peak memory of all
processes together (Linux only). --results puts the table into a file, in place of the one before.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAME = "Dataset900_Peers"
CONFIGURATION = "3d_fullres"
HEADING = "## Preprocessing, beside nnU-Net"
PHANTOM = (155, 240, 240)


def main():
    arguments = parse()
    rows = []
    for title, source, limit in datasets(arguments):
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary)
            environment = folders(place)
            target = place / "raw" / NAME
            cases = copy_dataset(source, target, limit) if source else phantom(target, limit)
            plan(environment)
            rows += compare(title, cases, place, environment, arguments)
            print(*rows[-2:], sep="\n", flush=True)
    text = table(rows, arguments)
    print(text)
    if arguments.results:
        write_section(arguments.results, text)


def datasets(arguments):
    """Title, folder and number of cases; a dataset without a folder is made."""
    if arguments.dataset:
        yield arguments.dataset.resolve().name, arguments.dataset, arguments.cases
    if arguments.phantom:
        yield "phantom 4x155x240x240", None, arguments.phantom


def compare(title, cases, place, environment, arguments):
    ours = place / "voxgrad" / NAME
    ours.mkdir(parents=True)
    for file in ("dataset.json", "dataset_fingerprint.json", "nnUNetPlans.json"):
        shutil.copy(place / "preprocessed" / NAME / file, ours / file)
    workers = str(arguments.workers)
    peers = {
        "nnU-Net": python("preprocess([900], configurations=['%s'], num_processes=[%s])" % (CONFIGURATION, workers)),
        "voxgrad": [
            arguments.voxgrad, "preprocess", "-d", str(place / "raw" / NAME), "-c", CONFIGURATION,
            "-np", workers, "--compat", "nnunet", "--clean", "--preprocessed", str(ours.parent),
        ],
    }  # fmt: skip
    runs = {name: [] for name in peers}
    for _ in range(arguments.repeat):
        for name, command in peers.items():
            runs[name].append(measure(command, environment))
    return [(title, cases, name, *min(found)) for name, found in runs.items()]


def table(rows, arguments):
    lines = [
        f"{arguments.workers} workers on {os.cpu_count()} cores, best of {arguments.repeat}, {time.strftime('%Y-%m-%d')}. "
        "Ratios are nnU-Net's figure over voxgrad's.",
        "",
        "| cases | program | wall s | processor s | processor s a case | peak MB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for title, cases, name, wall, cpu, peak in rows:
        lines.append(f"| {cases} of {title} | {name} | {wall:.2f} | {cpu:.2f} | {cpu / cases:.3f} | {peak / 1e6:.0f} |")
    lines.append("")
    for theirs, ours in zip(rows[::2], rows[1::2]):
        wall, cpu, peak = (a / b for a, b in zip(theirs[3:], ours[3:]))
        lines.append(f"* {ours[0]}: {wall:.1f} times in wall time, {cpu:.1f} in processor time, {peak:.1f} in memory.")
    return "\n".join(lines)


def write_section(path, text):
    """Replaces everything from the heading to the next one, or appends both."""
    before, _, rest = path.read_text().partition(HEADING)
    _, mark, after = rest.partition("\n## ")
    path.write_text(f"{before.rstrip()}\n\n{HEADING}\n\n{text}\n" + (f"\n## {after}" if mark else ""))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?", help="raw dataset folder")
    parser.add_argument("--voxgrad", default="target/release/voxgrad", help="the program")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cases", type=int, help="only the first cases of the dataset")
    parser.add_argument("--phantom", type=int, default=0, help="cases of a phantom of the size of BraTS")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--results", type=Path, help="file whose table is replaced")
    arguments = parser.parse_args()
    arguments.voxgrad = str(Path(arguments.voxgrad).resolve())
    return arguments


def folders(place):
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    for name in ("raw", "preprocessed", "results"):
        (place / name).mkdir()
        environment[f"nnUNet_{name}"] = str(place / name)
    return environment


def copy_dataset(source, target, limit):
    """Copies a dataset, cut to its first cases, and returns their number."""
    description = json.loads((source / "dataset.json").read_text())
    ending = description["file_ending"]
    labels = sorted((source / "labelsTr").glob("*" + ending))[:limit]
    for folder in ("imagesTr", "labelsTr"):
        (target / folder).mkdir(parents=True)
    for label in labels:
        shutil.copy(label, target / "labelsTr" / label.name)
        case = label.name[: -len(ending)]
        for channel in range(len(description.get("channel_names", description.get("modality")))):
            image = f"{case}_{channel:04}{ending}"
            shutil.copy(source / "imagesTr" / image, target / "imagesTr" / image)
    description["numTraining"] = len(labels)
    (target / "dataset.json").write_text(json.dumps(description))
    return len(labels)


def phantom(target, cases):
    """Skull-stripped heads: an ellipsoid of smooth tissue and noise in zeros, with three nested lesions."""
    import numpy as np
    import SimpleITK

    for folder in ("imagesTr", "labelsTr"):
        (target / folder).mkdir(parents=True)
    random = np.random.default_rng(0)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in PHANTOM), indexing="ij")
    head = (z / 0.9) ** 2 + (y / 0.75) ** 2 + (x / 0.6) ** 2 < 1
    for case in range(cases):
        spacing = 1.2 if case % 3 == 2 else 1.0
        centre = random.uniform(-0.3, 0.3, 3)
        distance = np.sqrt((z - centre[0]) ** 2 + (y - centre[1]) ** 2 + (x - centre[2]) ** 2)
        labels = np.where(head, np.select([distance < 0.08, distance < 0.14, distance < 0.22], [3, 2, 1], 0), 0)
        volumes = [("labelsTr", f"case_{case:03}", labels.astype(np.uint8))]
        for channel in range(4):
            tissue = 300 + 100 * np.sin(5 * z + channel) * np.cos(4 * y) + 60 * labels * (channel + 1)
            image = np.where(head, tissue + random.normal(0, 15, PHANTOM), 0).clip(0).astype(np.int16)
            volumes.append(("imagesTr", f"case_{case:03}_{channel:04}", image))
        for folder, name, volume in volumes:
            image = SimpleITK.GetImageFromArray(volume)
            image.SetSpacing([spacing] * 3)
            SimpleITK.WriteImage(image, str(target / folder / f"{name}.nii.gz"))
    description = {
        "channel_names": {"0": "FLAIR", "1": "T1w", "2": "T1gd", "3": "T2w"},
        "labels": {"background": 0, "edema": 1, "core": 2, "enhancing": 3},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (target / "dataset.json").write_text(json.dumps(description))
    return cases


def python(call):
    """nnU-Net in a process of its own, as its command line runs it; the guard is for its worker processes."""
    code = f"from nnunetv2.experiment_planning.plan_and_preprocess_api import *\nif __name__ == '__main__':\n    {call}"
    return [sys.executable, "-c", code]


def plan(environment):
    call = "extract_fingerprints([900], num_processes=1); plan_experiments([900])"
    subprocess.run(python(call), env=environment, check=True, stdout=subprocess.DEVNULL)


def measure(command, environment):
    """Wall seconds, processor seconds, and peak bytes of a command and everything it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    peak = 0
    while process.poll() is None:
        peak = max(peak, memory(process.pid))
        time.sleep(0.05)
    wall = time.perf_counter() - start
    if process.returncode != 0:
        sys.exit(f"failed with {process.returncode}: {' '.join(command)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return wall, cpu, peak


def memory(session):
    """Bytes of all processes of a session. A page that several share is counted once where the kernel tells (Pss)."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # After the name in parentheses: state, parent, group, session, ...; resident pages are the 22nd.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) != session:
                continue
            try:
                rollup = (entry / "smaps_rollup").read_text()
                total += int(rollup.partition("\nPss:")[2].split()[0]) * 1024
            except (OSError, IndexError):
                total += int(fields[21]) * resource.getpagesize()
        except OSError:
            continue  # ended meanwhile
    return total


if __name__ == "__main__":
    main()
