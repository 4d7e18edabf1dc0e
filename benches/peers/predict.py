"""Times prediction by nnU-Net and by voxgrad with the same model, images and cores, in turns.

    cargo build --release
    sh benches/peers/run.sh benches/peers/predict.py MODEL IMAGES --cases 5 --threads 2 --results benches/RESULTS.md

MODEL is a model folder that nnU-Net has trained (plans.json, dataset.json, fold_N), IMAGES a folder of images for it. The first
--cases of them are predicted; where there are fewer, the same ones again under other names. Both programs mirror unless
--disable-tta is given, and both get --threads cores. Each repetition is a process of its own that begins with nothing; the
segmentations of the last ones are compared.

Reported are the best wall time, with the processor time and the peak memory of all processes of that run (Linux only). nnU-Net's
wall time is that of the whole process, and beside it that of its call to predict alone, without what Python takes to start and to
load the model; voxgrad's is always that of the whole process, the compilation of its kernels included. The ratio in wall time is
against the smaller one. --results puts the table into a file, in place of the one before.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from nnunet_round_trip import agreement
from preprocess import measure

HEADING = "## Prediction, beside nnU-Net"


def main():
    arguments = parse()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        cases = copy_cases(arguments, place / "images")
        rows, folders = compare(arguments, place)
        equal, voxels, foreground = agreement(*folders)
    text = table(arguments, cases, rows)
    text += f"\n* Segmentations: {equal} of {voxels} voxels agree, {foreground} of them foreground."
    print(text)
    if arguments.results:
        write_section(arguments.results, text)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder of nnU-Net's")
    parser.add_argument("images", type=Path, help="images, CASE_0000.nii.gz and so on")
    parser.add_argument("--voxgrad", default="target/release/voxgrad", help="the program")
    parser.add_argument("--cases", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--disable-tta", action="store_true", help="no mirrored copies")
    parser.add_argument("--results", type=Path, help="file whose table is replaced")
    arguments = parser.parse_args()
    arguments.model, arguments.voxgrad = arguments.model.resolve(), str(Path(arguments.voxgrad).resolve())
    return arguments


def copy_cases(arguments, target):
    """Copies the images of the first cases, again under other names where there are too few, and returns their number."""
    ending = json.loads((arguments.model / "dataset.json").read_text())["file_ending"]
    images = {}
    for image in sorted(arguments.images.glob(f"*{ending}")):
        case, _, channel = image.name[: -len(ending)].rpartition("_")
        images.setdefault(case, []).append((channel, image))
    if not images:
        sys.exit(f"{arguments.images} holds no *{ending}")
    target.mkdir()
    for index in range(arguments.cases):
        case = list(images)[index % len(images)]
        for channel, image in images[case]:
            shutil.copy(image, target / f"case_{index:03}_{channel}{ending}")
    return arguments.cases


def compare(arguments, place):
    """The best run of each program, and the folders that the last ones filled."""
    seconds = place / "seconds"
    mirror = not arguments.disable_tta
    environment = dict(
        os.environ, nnUNet_compile="f", OMP_NUM_THREADS=str(arguments.threads), RAYON_NUM_THREADS=str(arguments.threads),
        **{name: str(place) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
    )  # fmt: skip
    # Neither may use a core more than the other.
    cores = sorted(os.sched_getaffinity(0))[: arguments.threads]
    if len(cores) < arguments.threads:
        sys.exit(f"--threads is {arguments.threads}, there are {len(cores)} cores")
    os.sched_setaffinity(0, cores)
    runs = {"nnU-Net": [], "voxgrad": []}
    for _ in range(arguments.repeat):
        folders = [place / "theirs", place / "ours"]
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        theirs = python(arguments.model, place / "images", folders[0], mirror, arguments.threads, seconds)
        wall, cpu, peak = measure(theirs, environment)
        runs["nnU-Net"].append((float(seconds.read_text()), wall, cpu, peak))
        command = [arguments.voxgrad, "predict", "-m", arguments.model, "-i", place / "images", "-o", folders[1], "-device", "cpu"]
        wall, cpu, peak = measure([str(part) for part in command] + ["--disable-tta"] * (not mirror), environment)
        runs["voxgrad"].append((wall, wall, cpu, peak))
    return {name: min(found) for name, found in runs.items()}, folders


def python(model, images, output, mirror, threads, seconds):
    """nnU-Net's predictor as its command line calls it, in a process of its own; the guard is for its worker processes."""
    code = f"""
import time
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
if __name__ == '__main__':
    torch.set_num_threads({threads})
    predictor = nnUNetPredictor(
        use_mirroring={mirror}, perform_everything_on_device=False, device=torch.device('cpu'), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder({str(model)!r}, None, 'checkpoint_final.pth')
    start = time.perf_counter()
    predictor.predict_from_files({str(images)!r}, {str(output)!r}, overwrite=True)
    open({str(seconds)!r}, 'w').write(str(time.perf_counter() - start))
"""
    return [sys.executable, "-c", code]


def table(arguments, cases, rows):
    lines = [
        f"{cases} cases of {arguments.model.parent.name}, {'not mirrored' if arguments.disable_tta else 'mirrored'}, "
        f"{arguments.threads} cores, best of {arguments.repeat}, {time.strftime('%Y-%m-%d')}. Ratios are nnU-Net's figure over voxgrad's.",
        "",
        "| program | prediction s | whole process s | processor s | peak MB |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, (inside, wall, cpu, peak) in rows.items():
        lines.append(f"| {name} | {inside:.2f} | {wall:.2f} | {cpu:.2f} | {peak / 1e6:.0f} |")
    theirs, ours = rows.values()
    inside, wall, cpu, peak = (a / b for a, b in zip(theirs, ours))
    lines += [
        "",
        f"* {inside:.2f} times in prediction alone, {wall:.2f} in wall time, {cpu:.2f} in processor time, {peak:.2f} in memory.",
    ]
    return "\n".join(lines)


def write_section(path, text):
    """Replaces everything from the heading to the next one, or appends both."""
    before, _, rest = path.read_text().partition(HEADING)
    _, mark, after = rest.partition("\n## ")
    path.write_text(f"{before.rstrip()}\n\n{HEADING}\n\n{text}\n" + (f"\n## {after}" if mark else ""))


if __name__ == "__main__":
    main()
