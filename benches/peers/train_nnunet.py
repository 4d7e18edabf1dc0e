"""nnU-Net's own trainer class on a dataset that is preprocessed here by nnU-Net itself, on the CPU.

    sh benches/peers/run.sh benches/peers/train_nnunet.py train DATASET --seed N --epochs N ... [--references FOLDER]
    sh benches/peers/run.sh benches/peers/train_nnunet.py score PREDICTIONS --references FOLDER --dataset-json FILE

`train` takes fold 0 of 3d_fullres in nnU-Net's three folders (nnUNet_raw, nnUNet_preprocessed, nnUNet_results in the
environment): dataset.json, plans, fingerprint and splits of the dataset must be there, and cases are preprocessed unless they
are. The network, loss, sampling, augmentation and schedule are those of `nnUNetTrainer`; epochs, iterations, learning rate and
momentum are set on it. It goes on from the last checkpoint in the results. With --references the validation cases are then
predicted by the trainer and scored with nnU-Net's evaluation; without, nothing is saved: that is for timing.

Both print one line of JSON: `dice` (mean over cases and classes), `classes`, and of a training `epoch_seconds` in nnU-Net's own
measure, which leaves out the writing of checkpoints.

Augmentation runs in as many processes as there are cores (at most nnU-Net's own number, 12), or --processes; nnU-Net seeds
only a part of what they draw, so that a run does not repeat.
"""

import argparse
import fcntl
import json
import os
import random
import sys
from pathlib import Path

CONFIGURATION = "3d_fullres"
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def main():
    arguments = parse()
    # What nnU-Net prints goes to the other stream: the result is alone on this one.
    sys.stdout.flush()
    result_stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # nnU-Net reads these when it is imported. Each exporting process imports PyTorch anew.
    os.environ["nnUNet_n_proc_DA"] = str(arguments.processes)
    os.environ["nnUNet_def_n_proc"] = str(min(2, CORES))
    os.environ["nnUNet_compile"] = "f"
    result = train(arguments) if arguments.action == "train" else score(arguments)
    print(json.dumps(result), file=result_stream, flush=True)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    training = actions.add_parser("train")
    training.add_argument("dataset", help="name in nnU-Net's folders")
    training.add_argument("--seed", type=int, required=True)
    training.add_argument("--epochs", type=int, required=True)
    training.add_argument("--iterations", type=int, required=True)
    training.add_argument("--validation-iterations", type=int, required=True)
    training.add_argument("--learning-rate", type=float, required=True)
    training.add_argument("--momentum", type=float, required=True)
    training.add_argument("--references", type=Path, help="complete labels to score the validation cases with")
    scoring = actions.add_parser("score")
    scoring.add_argument("predictions", type=Path)
    scoring.add_argument("--references", type=Path, required=True)
    scoring.add_argument("--dataset-json", type=Path, required=True)
    for action in (training, scoring):
        action.add_argument("--processes", type=int, default=min(12, CORES), help="that augment training patches")
    return parser.parse_args()


def train(arguments):
    import numpy as np
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    # As nnU-Net's command does on a CPU.
    torch.set_num_threads(CORES)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(arguments.seed)
    folder = Path(os.environ["nnUNet_preprocessed"]) / arguments.dataset
    preprocessed(folder, arguments.dataset)
    plans = dict(json.loads((folder / "nnUNetPlans.json").read_text()), continue_training=False)
    dataset = json.loads((folder / "dataset.json").read_text())
    trainer = nnUNetTrainer(plans, CONFIGURATION, 0, dataset, device=torch.device("cpu"))
    trainer.num_epochs = arguments.epochs
    trainer.num_iterations_per_epoch = arguments.iterations
    trainer.num_val_iterations_per_epoch = arguments.validation_iterations
    trainer.initial_lr = arguments.learning_rate
    trainer.disable_checkpointing = arguments.references is None
    trainer.save_every = 1
    trainer.initialize()
    for group in trainer.optimizer.param_groups:
        group["momentum"] = arguments.momentum
    output = Path(trainer.output_folder)
    saved = [file for name in ("final", "latest") if (file := output / f"checkpoint_{name}.pth").exists()]
    if saved and arguments.references is not None:
        trainer.load_checkpoint(str(saved[0]))
        # The patches that follow must not be those of the beginning.
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(1000 * (arguments.seed + 1) + trainer.current_epoch)
    if not (output / "checkpoint_final.pth").exists():
        trainer.run_training()
    starts, ends = (trainer.logger.get_value(f"epoch_{name}_timestamps", step=None) for name in ("start", "end"))
    result = {"epoch_seconds": [round(end - start, 3) for start, end in zip(starts, ends)], "processes": arguments.processes}
    if arguments.references is not None:
        trainer.perform_actual_validation()
        result |= scores(output / "validation", arguments.references, trainer.label_manager, dataset)
    return result


def preprocessed(folder, dataset):
    """Preprocesses the cases, unless that is done."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset

    done = folder / "preprocessed_by_nnunet"
    # Another training may be at it.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            number = int(dataset[len("Dataset") :].split("_")[0])
            workers = [min(2, CORES)]
            preprocess_dataset(number, configurations=[CONFIGURATION], num_processes=workers, show_progress_bar=False)
            done.touch()


def score(arguments):
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    dataset = json.loads(arguments.dataset_json.read_text())
    labels = LabelManager(dataset["labels"], dataset.get("regions_class_order"))
    return scores(arguments.predictions, arguments.references, labels, dataset)


def scores(predictions, references, labels, dataset):
    """nnU-Net's evaluation. The references are complete: nothing in them is ignored."""
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics_on_folder
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    found = labels.foreground_regions if labels.has_regions else labels.foreground_labels
    metrics = compute_metrics_on_folder(
        str(references), str(predictions), None, SimpleITKIO(), dataset["file_ending"], found, None, 1, True
    )
    classes = {str(name): value["Dice"] for name, value in metrics["mean"].items()}
    return {"dice": metrics["foreground_mean"]["Dice"], "classes": classes, "cases": len(metrics["metric_per_case"])}


if __name__ == "__main__":
    main()
