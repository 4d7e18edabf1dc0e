"""Trains the same networks with voxgrad and with nnU-Net's own trainer, and compares their Dice and the time of an epoch.

    sh scripts/accuracy.sh run FOLDER --data RAW --plans FILE    every run that is not complete yet, seed by seed
    sh scripts/accuracy.sh run FOLDER                            goes on with the settings that FOLDER holds
    sh scripts/accuracy.sh time FOLDER                           a few epochs of each, in turns, nothing scored
    sh scripts/accuracy.sh table FOLDER                          what is there, in Markdown

RAW is a dataset in nnU-Net's layout. Without an ignore label, its labels are the `dense` annotation, and `sparse` is what
nnU-Net's integration test makes of them for its dataset 996: a tenth of the slices, in all three directions
(`voxgrad sparsify --scheme slices --select nnunet --seed 1234`). With an ignore label, its labels are `sparse` and those of
--dense-labels `dense`. Both programs get the same plans, splits, epochs, iterations, learning rate, momentum and augmentation,
preprocess the cases themselves, train fold 0 on the same cores and predict its validation cases, mirrored as nnU-Net does. All
predictions are scored by nnU-Net's evaluation against the complete labels.

FOLDER keeps everything: study.json the settings (options that differ from them are refused), results.jsonl a line for every
complete run, which is not repeated, times.jsonl a line for every round of `time`. A run that was interrupted goes on after its
last epoch; the same command may run several times at once, as on some cores each (`taskset -c 0`), and each takes the next run
that no other has. Only `time` gives times of an epoch for the table: run it on a machine that does nothing else.

VOXGRAD names another program than that of target/release, PYTHON one that has PyTorch and nnU-Net: without it
benches/peers/run.sh installs them.
"""

import argparse
import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VOXGRAD = os.environ.get("VOXGRAD", str(ROOT / "target/release/voxgrad"))
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CONFIGURATION = "3d_fullres"
TITLES = {"voxgrad": "voxgrad", "nnunet": "nnU-Net"}
PROGRAMS = list(TITLES)
NAMES = {"sparse": "Dataset101_Sparse", "dense": "Dataset102_Dense"}
DEFAULTS = {
    "epochs": 20, "iterations": 100, "validation_iterations": 10, "learning_rate": 0.01, "momentum": 0.99,
    "annotations": "sparse,dense",
}


def main():
    arguments = parse()
    folder = arguments.folder.resolve()
    if arguments.action == "run":
        study = settle(folder, arguments)
        prepare(folder, study)
        for seed in numbers(arguments.seeds):
            for annotation in study["annotations"].split(","):
                for program in arguments.programs.split(","):
                    place = folder / "runs" / f"{annotation}-{program}-{seed}"
                    place.mkdir(parents=True, exist_ok=True)
                    with locked(place, wait=False) as free:
                        if free:
                            run(folder, study, annotation, program, seed, place)
    elif arguments.action == "time":
        study = json.loads((folder / "study.json").read_text())
        prepare(folder, study)
        take_times(folder, study, arguments)
    print(table(folder))


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    running, timing, showing = (actions.add_parser(name) for name in ("run", "time", "table"))
    for action in (running, timing, showing):
        action.add_argument("folder", type=Path)
    running.add_argument("--data", type=Path, help="raw dataset")
    running.add_argument("--dense-labels", type=Path, help="complete labels, where those of the dataset are sparse")
    running.add_argument("--plans", type=Path, help="plans for both programs")
    running.add_argument("--annotations", help="of sparse,dense")
    running.add_argument("--epochs", type=int)
    running.add_argument("--iterations", type=int)
    running.add_argument("--validation-iterations", type=int)
    running.add_argument("--learning-rate", type=float)
    running.add_argument("--momentum", type=float)
    running.add_argument("--seeds", default="0,1,2")
    timing.add_argument("--rounds", type=int, default=3)
    timing.add_argument("--timed-epochs", type=int, default=3, help="in a round, after one that is not counted")
    for action in (running, timing):
        action.add_argument("--programs", default=",".join(PROGRAMS))
    return parser.parse_args()


def numbers(text):
    return [int(number) for number in text.split(",")]


def say(text):
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def locked(folder, wait=True):
    """Whether no other process works on the folder, which until the end is this one's."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def settle(folder, arguments):
    """The settings of the study: those that FOLDER holds, or those that were given."""
    given = {}
    for name in ("data", "dense_labels", "plans"):
        value = getattr(arguments, name)
        given[name] = None if value is None else str(value.resolve())
    given |= {name: getattr(arguments, name) for name in DEFAULTS}
    file = folder / "study.json"
    if not file.exists():
        if given["data"] is None or given["plans"] is None:
            sys.exit(f"{file} does not exist yet: --data and --plans are needed")
        labels = json.loads((Path(given["data"]) / "dataset.json").read_text())["labels"]
        if "ignore" in labels and given["dense_labels"] is None:
            sys.exit("the labels of --data are sparse: --dense-labels names the folder of the complete ones")
        study = {name: DEFAULTS.get(name) if value is None else value for name, value in given.items()}
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(study, indent=2))
        return study
    study = json.loads(file.read_text())
    changed = {name: value for name, value in given.items() if value not in (None, study[name])}
    differing = [f"{name} is {study[name]!r}, not {value!r}" for name, value in changed.items()]
    if differing:
        sys.exit(f"{file}: {'; '.join(differing)}. Give another folder, or leave the options out")
    return study


def environment(folder, results):
    return os.environ | {
        "nnUNet_raw": str(folder / "raw"),
        "nnUNet_preprocessed": str(folder / "preprocessed"),
        "nnUNet_results": str(results),
    }


def prepare(folder, study):
    """Raw and preprocessed datasets, with the same plans and splits; what is there is left as it is."""
    with locked(folder):
        for annotation in study["annotations"].split(","):
            if not (folder / "preprocessed" / NAMES[annotation] / "prepared").exists():
                make(folder, study, annotation)


def make(folder, study, annotation):
    data, name = Path(study["data"]), NAMES[annotation]
    dataset = json.loads((data / "dataset.json").read_text())
    raw, preprocessed = folder / "raw" / name, folder / "preprocessed" / name
    raw.parent.mkdir(exist_ok=True)
    if ("ignore" in dataset["labels"]) == (annotation == "sparse"):
        raw.is_symlink() or raw.symlink_to(data)
    elif annotation == "dense":
        all_annotated(raw, study, dataset)
    elif not raw.exists():
        scheme = ["--scheme", "slices", "--select", "nnunet", "--seed", "1234"]
        voxgrad(["sparsify", data, "-o", raw, *scheme], os.environ)
    number = name[len("Dataset") :].split("_")[0]
    at = environment(folder, folder)
    voxgrad(["plan-and-preprocess", "-d", number, "-c", CONFIGURATION, "--no-preprocessing"], at)
    plans = json.loads(Path(study["plans"]).read_text()) | {"dataset_name": name}
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps(plans, indent=4))
    voxgrad(["preprocess", "-d", number, "-c", CONFIGURATION], at)
    (preprocessed / "prepared").touch()


def all_annotated(raw, study, dataset):
    """The dataset with its complete labels and no ignore label."""
    raw.mkdir(exist_ok=True)
    data = Path(study["data"])
    links = {"imagesTr": data / "imagesTr", "labelsTr": study["dense_labels"]}
    splits = data / "splits_final.json"
    for name, target in (links | ({splits.name: splits} if splits.exists() else {})).items():
        (raw / name).is_symlink() or (raw / name).symlink_to(target)
    labels = {name: value for name, value in dataset["labels"].items() if name != "ignore"}
    (raw / "dataset.json").write_text(json.dumps(dataset | {"labels": labels}, indent=4))


def references(study):
    return Path(study["dense_labels"] or Path(study["data"]) / "labelsTr")


def voxgrad(words, at, log=None):
    """Runs the program; what it prints is added to `log`."""
    stream = sys.stderr if log is None else log.open("a")
    check(subprocess.run([VOXGRAD, *map(str, words)], env=at, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream), log)


def nnunet(words, at, log):
    """The JSON that benches/peers/train_nnunet.py prints; all else is added to `log`."""
    python = os.environ.get("PYTHON")
    start = [python] if python else ["sh", str(ROOT / "benches/peers/run.sh")]
    words = [*start, str(ROOT / "benches/peers/train_nnunet.py"), *map(str, words)]
    done = subprocess.run(words, env=at, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log.open("a"), text=True)
    check(done, log)
    return json.loads(done.stdout)


def check(done, log):
    if done.returncode != 0:
        sys.exit(f"status {done.returncode}: {' '.join(done.args)}" + (f"; see {log}" if log else ""))


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def add(file, line):
    with file.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def circumstances():
    """What a figure belongs to."""
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "revision": git.stdout.strip(),
        "binary": hashlib.sha256(Path(VOXGRAD).read_bytes()).hexdigest()[:12],
        "cores": CORES,
        "load": round(os.getloadavg()[0], 2),
    }


def run(folder, study, annotation, program, seed, place):
    """One training, unless its result is there."""
    key = {"annotation": annotation, "program": program, "seed": seed}
    if any(key.items() <= line.items() and line["settings"] == study for line in lines(folder / "results.jsonl")):
        return
    say(f"{annotation}, {program}, seed {seed}")
    log, at = place / "log.txt", environment(folder, place / "results")
    if program == "voxgrad":
        again = ["--save-every", 1, "--continue"]
        voxgrad([*ours(study, annotation, seed, place), *again, "--reference", references(study)], at, log)
        summary = json.loads((place / "summary.json").read_text())
        description = folder / "preprocessed" / NAMES[annotation] / "dataset.json"
        result = nnunet(
            ["score", place / "validation", "--references", references(study), "--dataset-json", description], at, log
        )
        result |= {"epoch_seconds": epoch_seconds(place), "own_dice": summary["foreground_mean"]["Dice"]}
    else:
        result = nnunet([*theirs(study, annotation, seed), "--references", references(study)], at, log)
    add(folder / "results.jsonl", key | result | {"settings": study} | circumstances())
    say(f"{annotation}, {program}, seed {seed}: Dice {result['dice']:.4f}")


def ours(study, annotation, seed, output):
    number = NAMES[annotation][len("Dataset") :].split("_")[0]
    return ["train", number, CONFIGURATION, "0", "-o", output, "--device", "cpu", *schedule(study, seed)]


def theirs(study, annotation, seed):
    return ["train", NAMES[annotation], *schedule(study, seed)]


def schedule(study, seed):
    names = ("epochs", "iterations", "validation_iterations", "learning_rate", "momentum")
    typed = [word for name in names for word in (f"--{name.replace('_', '-')}", study[name])]
    return [*typed, "--seed", seed]


def epoch_seconds(output):
    epochs = lines(output / "epochs.jsonl")
    return [round(epoch["epoch_end_timestamp"] - epoch["epoch_start_timestamp"], 3) for epoch in epochs]


def take_times(folder, study, arguments):
    """A few epochs of each program, in turns. The first one, which starts processes and compiles, is left out."""
    short = study | {"epochs": 1 + arguments.timed_epochs}
    for number in range(arguments.rounds):
        for annotation in study["annotations"].split(","):
            for program in arguments.programs.split(","):
                place = folder / "times" / f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{annotation}-{program}"
                place.mkdir(parents=True)
                log, at = place / "log.txt", environment(folder, place / "results")
                before = circumstances()
                if program == "voxgrad":
                    voxgrad([*ours(short, annotation, number, place), "--disable-checkpointing", "--disable-tta"], at, log)
                    seconds = epoch_seconds(place)
                else:
                    seconds = nnunet(theirs(short, annotation, number), at, log)["epoch_seconds"]
                key = {"annotation": annotation, "program": program}
                add(folder / "times.jsonl", key | {"seconds": seconds[1:]} | before)
                say(f"{annotation}, {program}: {seconds[1:]} s")


def table(folder):
    """Markdown: Dice by seed, and the time of an epoch where it was taken."""
    results, times = lines(folder / "results.jsonl"), lines(folder / "times.jsonl")
    seeds = sorted({line["seed"] for line in results})
    head = ["annotation", "program", *(f"seed {seed}" for seed in seeds), "mean Dice", "difference", "epoch s", "ratio"]
    rows = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for annotation in NAMES:
        dice, epoch = ({program: gather(annotation, program) for program in PROGRAMS} for gather in (
            lambda *key: {line["seed"]: line["dice"] for line in results if (line["annotation"], line["program"]) == key},
            lambda *key: [s for line in times if (line["annotation"], line["program"]) == key for s in line["seconds"]],
        ))
        # Only seeds that both have trained are compared.
        both = sorted(dice["voxgrad"].keys() & dice["nnunet"].keys())
        difference = f"{statistics.mean(dice['voxgrad'][s] - dice['nnunet'][s] for s in both):+.4f}" if both else ""
        medians = {program: statistics.median(seconds) for program, seconds in epoch.items() if seconds}
        ratio = f"{medians['nnunet'] / medians['voxgrad']:.2f}" if len(medians) == 2 else ""
        for program, shown in (("voxgrad", [difference, ratio]), ("nnunet", ["", ""])):
            found = dice[program]
            mean = f"{statistics.mean(found.values()):.4f}" if found else "–"
            each = [f"{found[seed]:.4f}" if seed in found else "–" for seed in seeds]
            seconds = f"{medians[program]:.2f}" if program in medians else "–"
            if found or program in medians:
                rows.append([annotation, TITLES[program], *each, mean, shown[0], seconds, shown[1]])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    main()
