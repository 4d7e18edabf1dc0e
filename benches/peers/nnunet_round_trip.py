"""Checks against nnU-Net itself that each program reads and makes the other's files.

    cargo build --release
    sh benches/peers/run.sh benches/peers/nnunet_round_trip.py [FOLDER] [--workers 2] [--no-training] [--shipped-only]
    sh benches/peers/run.sh benches/peers/nnunet_round_trip.py --models MODEL... --images FOLDER [--mirror]
    sh benches/peers/run.sh benches/peers/nnunet_round_trip.py --postprocessing

First nnU-Net opens every dataset and every plans file of the repository: it checks the datasets, builds the networks and
preprocesses a case of each with the plans beside it. --shipped-only ends there, and needs no voxgrad.

FOLDER is a raw dataset in nnU-Net's layout; the hippocampi of examples/data unless given. Both programs fingerprint, plan
and preprocess it, and every file is compared: fingerprint, plans and splits field by field, and each case voxel by voxel.
Then nnU-Net trains one iteration from voxgrad's dataset.json, plans and splits, on voxgrad's preprocessed arrays, which
nnU-Net's own writer turns into its format. Ends with status 1 if anything differs by more than 1e-4 (labels: at all).

With --models nothing is trained: each MODEL, a folder that nnU-Net has trained or a folder or checkpoint that voxgrad has, is
written by `voxgrad export` in the other's format, and both programs predict the images of --images with their own file. Their
segmentations must agree in at least 99.99 % of the voxels; so must nnU-Net's with the model as it was and as voxgrad wrote it,
voxel by voxel.

With --postprocessing voxgrad decides on the postprocessing of the predictions in tests/data/evaluation, of labels and of
regions, nnU-Net's own function loads the postprocessing.pkl that voxgrad has written and applies it, and so does voxgrad: the
files must hold the same voxels on the same grids.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import imagecodecs
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
NAME = "Dataset901_RoundTrip"
CONFIGURATION = "3d_fullres"
TOLERANCE = 1e-4
AGREEMENT = 0.9999


def main():
    arguments = parse()
    if arguments.models:
        sys.exit(1 if models(arguments) else 0)
    if arguments.postprocessing:
        sys.exit(1 if postprocessing(arguments) else 0)
    failures = shipped(arguments.workers)
    if arguments.shipped_only:
        sys.exit(1 if failures else 0)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "raw").mkdir()
        (place / "raw" / NAME).symlink_to(arguments.dataset.resolve())
        environment = dict(
            os.environ, nnUNet_raw=str(place / "raw"), nnUNet_results=str(place / "results"), nnUNet_compile="f",
            OMP_NUM_THREADS=str(arguments.workers),
        )
        theirs, ours = place / "theirs" / NAME, place / "ours" / NAME
        workers = str(arguments.workers)
        run(
            [arguments.voxgrad, "plan-and-preprocess", "-d", "901", "-c", CONFIGURATION, "-np", workers, "--compat", "nnunet"],
            dict(environment, nnUNet_preprocessed=str(ours.parent)),
        )
        their_environment = dict(environment, nnUNet_preprocessed=str(theirs.parent))
        run(
            python(
                "from nnunetv2.experiment_planning.plan_and_preprocess_api import *",
                f"extract_fingerprints([901], num_processes={workers}, show_progress_bar=False); plan_experiments([901]); "
                f"preprocess([901], configurations=['{CONFIGURATION}'], num_processes=[{workers}], show_progress_bar=False)",
            ),
            their_environment,
        )
        # Splits are nnU-Net's only when it trains; asking its trainer for them writes the file.
        run(trainer("t.do_split()"), their_environment)
        failures += compare(ours, theirs)
        if not arguments.no_training:
            hand_over(ours)
            settings = "t.num_epochs = t.num_iterations_per_epoch = t.num_val_iterations_per_epoch = 1"
            run(trainer(f"{settings}; t.run_training()"), dict(environment, nnUNet_preprocessed=str(ours.parent)))
            checkpoint = next((place / "results").rglob("checkpoint_final.pth"), None)
            report("nnU-Net trains one iteration from voxgrad's files", checkpoint is not None, failures)
    sys.exit(1 if failures else 0)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, nargs="?", default=ROOT / "examples/data/hippocampus")
    parser.add_argument("--voxgrad", default=str(ROOT / "target/release/voxgrad"), help="the program")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--no-training", action="store_true")
    parser.add_argument("--shipped-only", action="store_true")
    parser.add_argument("--models", type=Path, nargs="+", default=[], help="trained models, of either program")
    parser.add_argument("--images", type=Path, help="images to predict with them")
    parser.add_argument("--mirror", action="store_true", help="average over mirrored copies")
    parser.add_argument("--postprocessing", action="store_true", help="exchange a postprocessing.pkl, nothing else")
    return parser.parse_args()


def models(arguments):
    """Whether both programs predict the same with each model."""
    failures = []
    if arguments.images is None:
        sys.exit("--models needs --images FOLDER")
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary)
            theirs, ours = place / "nnunet", place / "voxgrad"
            for target, format in ((theirs, "nnunet"), (ours, "safetensors")):
                run([arguments.voxgrad, "export", model, "--to", format, "-o", target], os.environ)
            made = {
                "nnU-Net": theirs_predict(arguments, theirs, place / "by_nnunet"),
                "voxgrad": ours_predict(arguments, ours, place / "by_voxgrad"),
            }
            if is_theirs(model):
                made["nnU-Net, the model as it was"] = theirs_predict(arguments, model, place / "as_it_was")
                made["voxgrad, the model as it was"] = ours_predict(arguments, model, place / "ours_as_it_was")
            first = made.pop("nnU-Net")
            for name, folder in made.items():
                equal, voxels, foreground = agreement(first, folder)
                # Of one program the file makes no difference at all.
                needed = 1 if name.startswith("nnU-Net") else AGREEMENT
                what = f"{model}: nnU-Net with voxgrad's export and {name}"
                figure = f": {equal} of {voxels} voxels ({100 * equal / voxels:.4f} %), {foreground} of them foreground"
                report(what, equal >= needed * voxels, failures, figure)
    return failures


def postprocessing(arguments):
    """Whether nnU-Net loads the postprocessing.pkl that voxgrad writes, and makes the same files with it."""
    import nibabel

    failures = []
    for kind in ("labels", "regions"):
        source = ROOT / "tests/data/evaluation" / kind
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary)
            predictions, ours, theirs = place / "predictions", place / "ours", place / "theirs"
            shutil.copytree(source / "predictions", predictions)
            description, plans, pickle = source / "dataset.json", source / "plans.json", predictions / "postprocessing.pkl"
            run(
                [
                    arguments.voxgrad, "determine-postprocessing", "-i", predictions, "-ref", source / "references",
                    "-dataset_json", description, "--remove_postprocessed",
                ],
                os.environ,
            )
            run(
                [
                    arguments.voxgrad, "apply-postprocessing", "-i", predictions, "-o", ours, "-pp_pkl_file", pickle,
                    "-dataset_json", description,
                ],
                os.environ,
            )
            imports = (
                "from batchgenerators.utilities.file_and_folder_operations import load_pickle\n"
                "from nnunetv2.postprocessing.remove_connected_components import apply_postprocessing_to_folder"
            )
            code = (
                f"functions, arguments = load_pickle({str(pickle)!r}); "
                f"apply_postprocessing_to_folder({str(predictions)!r}, {str(theirs)!r}, functions, arguments, "
                f"{str(plans)!r}, {str(description)!r}, {arguments.workers}); print(len(functions), 'operations')"
            )
            said = run(python(imports, code), without_folders(place))
            names = sorted(file.name for file in theirs.glob("*.nii.gz"))
            same = bool(names) and names == sorted(file.name for file in ours.glob("*.nii.gz"))
            changed = voxels = 0
            for name in names if same else []:
                before, a, b = (nibabel.load(folder / name) for folder in (predictions, ours, theirs))
                values = [np.asarray(image.dataobj) for image in (before, a, b)]
                same &= bool(np.array_equal(values[1], values[2]) and np.allclose(a.affine, b.affine))
                changed += int((values[0] != values[2]).sum())
                voxels += values[0].size
            figure = f": {len(names)} files, {changed} of {voxels} voxels changed by {said.strip().splitlines()[-1]}"
            report(f"{kind}: nnU-Net with voxgrad's postprocessing.pkl", same and changed > 0, failures, figure)
    return failures


def is_theirs(model):
    return model.is_dir() and any(model.glob("fold_*/checkpoint_final.pth"))


def theirs_predict(arguments, model, output):
    output.mkdir()
    code = (
        f"p = nnUNetPredictor(use_mirroring={arguments.mirror}, perform_everything_on_device=False, "
        "device=torch.device('cpu'), allow_tqdm=False); "
        f"p.initialize_from_trained_model_folder({str(model)!r}, None, 'checkpoint_final.pth'); "
        f"p.predict_from_files_sequential({str(arguments.images)!r}, {str(output)!r})"
    )
    imports = "import torch\nfrom nnunetv2.inference.predict_from_raw_data import nnUNetPredictor"
    threads = str(arguments.workers)
    run(python(imports, code), dict(without_folders(output.parent), nnUNet_compile="f", OMP_NUM_THREADS=threads))
    return output


def without_folders(place):
    """The environment with some place for each of nnU-Net's folders, which it asks for even where it has no use for them."""
    unused = {name: str(place) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    return dict(os.environ, **unused)


def ours_predict(arguments, model, output):
    mirror = [] if arguments.mirror else ["--disable_tta"]
    run([arguments.voxgrad, "predict", "-m", model, "-i", arguments.images, "-o", output, "-device", "cpu", *mirror], os.environ)
    return output


def agreement(first, second):
    """Equal voxels, all voxels, and those that either folder has in the foreground."""
    import nibabel

    equal = voxels = foreground = 0
    files = sorted(first.glob("*.nii.gz"))
    if not files or [file.name for file in files] != [file.name for file in sorted(second.glob("*.nii.gz"))]:
        sys.exit(f"{first} and {second} hold different cases")
    for file in files:
        a, b = (np.asarray(nibabel.load(folder / file.name).dataobj) for folder in (first, second))
        equal += int((a == b).sum())
        voxels += a.size
        foreground += int(((a > 0) | (b > 0)).sum())
    return equal, voxels, foreground


def shipped(workers):
    """Whether nnU-Net can use every dataset and every plans file in the repository."""
    failures = []
    listed = subprocess.run(["git", "ls-files", "*.json"], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [ROOT / name for name in listed.stdout.split()]
    plans = [file for file in files if "plans" in file.name.lower()]
    datasets = [file.parent for file in files if file.name == "dataset.json" and (file.parent / "imagesTr").is_dir()]
    attempt("finds shipped datasets and plans", lambda: bool(plans and datasets) or sys.exit("none found"), failures)
    for folder in datasets:
        name = folder.relative_to(ROOT)
        attempt(f"{name}: nnU-Net's check of the dataset", lambda: integrity(folder, workers), failures)
    for file in plans:
        beside = next(parent for parent in file.parents if (parent / "dataset.json").is_file())
        # Plans of preprocessed data have the raw dataset beside their folder.
        raw = next((folder for folder in (beside, beside / "raw", beside.parent / "raw") if folder in datasets), None)
        for configuration in json.loads(file.read_text())["configurations"]:
            what = f"{file.relative_to(ROOT)}, {configuration}: nnU-Net builds the network and preprocesses"
            attempt(what, lambda: use_plans(file, configuration, beside, raw), failures)
    return failures


def attempt(what, work, failures):
    try:
        work()
    except BaseException as error:  # nnU-Net's checks end with assertions and exits of many kinds
        if isinstance(error, KeyboardInterrupt):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        failures.append(what)
        print(f"{'FAILED':10}{what}")
    else:
        print(f"{'works':10}{what}")


def integrity(folder, workers):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    with open(os.devnull, "w") as silence, contextlib.redirect_stdout(silence):
        verify_dataset_integrity(str(folder), workers)


def use_plans(file, name, beside, raw):
    """Builds the network of a configuration, and preprocesses the first case of the raw dataset, if there is one."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    description = json.loads((beside / "dataset.json").read_text())
    manager = PlansManager(str(file))
    configuration = manager.get_configuration(name)
    channels = determine_num_input_channels(manager, configuration, description)
    heads = manager.get_label_manager(description).num_segmentation_heads
    get_network_from_plans(
        configuration.network_arch_class_name, configuration.network_arch_init_kwargs,
        configuration.network_arch_init_kwargs_req_import, channels, heads, deep_supervision=True,
    )
    if raw is None:
        return
    cases = get_filenames_of_train_images_and_targets(str(raw), description)
    if len(cases) != description["numTraining"]:
        raise ValueError(f"{len(cases)} cases, dataset.json says {description['numTraining']}")
    case = cases[sorted(cases)[0]]
    preprocessor = configuration.preprocessor_class(verbose=False)
    data, seg, _ = preprocessor.run_case(case["images"], case["label"], manager, configuration, description)
    if not np.isfinite(data).all() or data.shape[1:] != seg.shape[1:]:
        raise ValueError(f"preprocessed to {data.shape} and {seg.shape}")


def python(imports, code):
    """A process of its own, as nnU-Net's folders are read when it is imported; the guard is for its worker processes."""
    return [sys.executable, "-c", f"{imports}\nif __name__ == '__main__':\n    {code}"]


def trainer(code):
    """nnU-Net's trainer `t` on fold 0 of the plans in nnUNet_preprocessed."""
    imports = (
        "import json, os\nos.environ['nnUNet_n_proc_DA'] = '0'\nimport torch\n"
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        f"folder = os.path.join(os.environ['nnUNet_preprocessed'], '{NAME}')\n"
        "read = lambda name: json.load(open(os.path.join(folder, name)))\n"
        f"plans = dict(read('nnUNetPlans.json'), continue_training=False)\n"
        f"make = lambda: nnUNetTrainer(plans, '{CONFIGURATION}', 0, read('dataset.json'), "
        "device=torch.device('cpu'))"
    )
    return python(imports, f"t = make(); {code}")


def run(command, environment):
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"failed with {done.returncode}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def report(what, good, failures, figure=""):
    print(f"{'same' if good else 'DIFFERENT':10}{what}{figure}")
    if not good:
        failures.append(what)


def compare(ours, theirs):
    failures = []
    for file in ("dataset_fingerprint.json", "nnUNetPlans.json", "splits_final.json", "dataset.json"):
        found, expected = (json.loads((folder / file).read_text()) for folder in (ours, theirs))
        where, worst = difference(found, expected)
        report(file, worst <= TOLERANCE, failures, f": largest relative difference {worst:.2e} {where}")

    cases = sorted((ours / "voxgrad" / f"nnUNetPlans_{CONFIGURATION}").glob("*.vxg"))
    worst, labels, voxels, places = 0.0, 0, 0, 0
    for file in cases:
        data, seg, properties = read_case(file)
        expected = read_blosc2(theirs / f"nnUNetPlans_{CONFIGURATION}", file.stem)
        if data.shape != expected[0].shape:
            report(f"{file.stem}: shape {data.shape} against {expected[0].shape}", False, failures)
            continue
        worst = max(worst, float(np.abs(data - expected[0]).max()))
        labels += int((seg != expected[1]).sum())
        voxels += seg.size
        here, there = properties["class_locations"], expected[2]["class_locations"]
        places += sum(not np.array_equal(here[key], np.asarray(there[key]).reshape(-1, 4)) for key in here)
    report("images", worst <= TOLERANCE, failures, f": {len(cases)} cases, largest difference {worst:.2e}")
    report("labels", labels == 0, failures, f": {labels} of {voxels} voxels differ")
    report("class locations", places == 0, failures, f": {places} lists differ")
    return failures


def difference(a, b, where=""):
    """Where two JSON values differ most, and by how much relative to the second."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return f"{where}: keys {sorted(a.keys() ^ b.keys())}", float("inf")
        pairs = [(f"{where}.{key}", a[key], b[key]) for key in a]
    elif isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return f"{where}: {len(a)} and {len(b)} entries", float("inf")
        pairs = [(f"{where}[{i}]", x, y) for i, (x, y) in enumerate(zip(a, b))]
    elif isinstance(a, (int, float)) and isinstance(b, (int, float)) and bool not in (type(a), type(b)):
        return where, abs(a - b) / max(abs(b), 1e-8)
    else:
        return (where, 0.0) if a == b else (f"{where}: {a!r} and {b!r}", float("inf"))
    return max((difference(x, y, place) for place, x, y in pairs), key=lambda found: found[1], default=("", 0.0))


def read_blosc2(folder, case):
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    data, seg, _, properties = nnUNetDatasetBlosc2(str(folder), [case]).load_case(case)
    return np.asarray(data[:]), np.asarray(seg[:])[0], properties


def read_case(path):
    """A preprocessed case of voxgrad's: image, labels, and the properties that nnU-Net's loader looks at."""
    raw = path.read_bytes()
    length, count = (int.from_bytes(raw[at : at + 4], "little") for at in (12, 16))
    header = json.loads(raw[24 : 24 + length])
    table = np.frombuffer(raw, "<u4", 2 * count, 24 + length).reshape(-1, 2)
    starts = 24 + length + 8 * count + np.concatenate([[0], np.cumsum(table[:, 0], dtype=np.int64)])

    def block(index, values, dtype):
        stored = raw[starts[index] : starts[index + 1]]
        size = np.dtype(dtype).itemsize
        grouped = imagecodecs.lz4_decode(stored, out=values * size) if values else b""
        return np.ascontiguousarray(np.frombuffer(grouped, np.uint8).reshape(size, -1).T).view(dtype).ravel()

    channels, *shape = header["shape"]
    chunk = header["chunk"]
    places = [
        tuple(slice(at * n, min((at + 1) * n, end)) for at, n, end in zip(index, chunk, shape))
        for index in np.ndindex(*(-(-end // n) for end, n in zip(shape, chunk)))
    ]
    data, seg = np.empty((channels, *shape), np.float32), np.empty(shape, np.int16)
    for channel in range(channels + 1):
        target, dtype = (seg, "<i2") if channel == channels else (data[channel], "<f4")
        for index, place in enumerate(places):
            view = target[place]
            view[...] = block(1 + channel * len(places) + index, view.size, dtype).reshape(view.shape)

    lists = [(tuple(group) if isinstance(group, list) else group, n) for group, n in header["classes"]]
    if header["annotated"] is not None:
        labels = json.loads((path.parent.parent / "dataset.json").read_text())["labels"]
        values = {v for name, value in labels.items() if name != "ignore" for v in np.atleast_1d(value).tolist()}
        lists.append((tuple([-1, *sorted(values)]), header["annotated"]))
    voxels = block(0, 3 * sum(n for _, n in lists), "<u4").reshape(-1, 3).astype(np.int64)
    voxels = np.hstack([np.zeros((len(voxels), 1), np.int64), voxels])
    ends = np.cumsum([n for _, n in lists])
    properties = {
        "spacing": header["spacing"],
        "shape_before_cropping": tuple(header["shape_before_cropping"]),
        "bbox_used_for_cropping": header["bbox"],
        "shape_after_cropping_and_before_resampling": tuple(header["shape_after_cropping"]),
        "class_locations": {key: voxels[end - n : end] for (key, n), end in zip(lists, ends)},
    }
    return data, seg, properties


def hand_over(ours):
    """Writes voxgrad's preprocessed cases once more, in nnU-Net's format."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    theirs = ours / f"nnUNetPlans_{CONFIGURATION}"
    theirs.mkdir(exist_ok=True)
    for file in (ours / "voxgrad" / f"nnUNetPlans_{CONFIGURATION}").glob("*.vxg"):
        data, seg, properties = read_case(file)
        whole = dict(chunks=data.shape, blocks=data.shape, chunks_seg=(1, *seg.shape), blocks_seg=(1, *seg.shape))
        nnUNetDatasetBlosc2.save_case(data, seg[None], properties, str(theirs / file.stem), **whole)


if __name__ == "__main__":
    main()
