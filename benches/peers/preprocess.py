"""Times the preprocessing of nnU-Net and of voxgrad on the same cases, plans and number of workers.

    sh scripts/peers.sh benches/peers/preprocess.py FOLDER --voxgrad target/release/voxgrad --workers 2 --cases 20

FOLDER is a raw dataset in nnU-Net's layout (dataset.json, imagesTr, labelsTr). nnU-Net makes fingerprint and plans, which
are not timed; both then preprocess 3d_fullres from those plans, nnU-Net first, and start from nothing in every repetition.
Printed are wall time, processor time, and the peak resident memory of all processes together (Linux only).
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


def main():
    arguments = parse()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        environment = folders(place)
        cases = copy_dataset(arguments.dataset, place / "raw" / NAME, arguments.cases)
        plan(environment)
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
        }
        print(f"{cases} cases, {workers} workers, {os.cpu_count()} cores, best of {arguments.repeat}")
        print(f"{'':10}{'wall s':>10}{'cpu s':>10}{'peak MB':>10}{'cpu s/case':>12}")
        for name, command in peers.items():
            runs = [measure(command, environment) for _ in range(arguments.repeat)]
            wall, cpu, peak = min(runs)
            print(f"{name:10}{wall:10.2f}{cpu:10.2f}{peak / 1e6:10.0f}{cpu / cases:12.3f}")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="raw dataset folder")
    parser.add_argument("--voxgrad", default="target/release/voxgrad", help="the program")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--cases", type=int, help="only the first cases")
    parser.add_argument("--repeat", type=int, default=3)
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
        peak = max(peak, resident(process.pid))
        time.sleep(0.02)
    wall = time.perf_counter() - start
    if process.returncode != 0:
        sys.exit(f"failed with {process.returncode}: {' '.join(command)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return wall, cpu, peak


def resident(session):
    """Resident bytes of all processes of a session. Pages that they share are counted once for each."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # After the name in parentheses: state, parent, group, session, ...; resident pages are the 22nd.
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        if int(fields[3]) == session:
            total += int(fields[21]) * resource.getpagesize()
    return total


if __name__ == "__main__":
    main()
