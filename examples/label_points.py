"""Trains and tests a network that labels points: a U-Net with neighborhood attention.

``--data digits``: canvases of 512 x 512 cells with handwritten digits and fragments of strokes.
Every pixel of a stroke gets its digit, or "fragment".

``--data hits``: simulated events of a particle detector with up to 60,000 hits. Every hit gets
"noise", or the band of its particle's momentum, which follows from how much the track bends.

Of these, new scenes are generated at every step. The others are read from a folder of files:
``--data kitti FOLDER``, or ``nuscenes``, ``las``, ``hdf5``, ``events`` and ``muscima``; the modules
of `examples.formats` describe them.

The script prints the mean intersection over union on scenes that were not trained on, draws some of
them, and saves checkpoints from which an interrupted run can be resumed.

Run it from the root of the repository: ``python -m examples.label_points --data hits``, or on two
processes ``torchrun --nproc-per-node 2 -m examples.label_points``, each of which takes half of the
scenes of a batch.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from examples.arguments import above_0, at_least_1, require, require_folder
from examples.formats.raw import FormatError
from examples.labels.evaluation import Quality, confusion, quality
from examples.labels.model import ATTENTIONS, PointLabeler, count_parameters
from examples.labels.scenes import Batches, LabeledPoints
from examples.labels.tasks import TASKS, Options, Task
from examples.training.checkpoints import WEIGHTS, load_weights, read_metadata
from examples.training.command import (
    add_options,
    check_resumable,
    print_once,
    print_times,
    report_run,
    run_command,
)
from examples.training.folder import write_file
from examples.training.loop import PRECISIONS, Config, train
from examples.training.processes import rank_and_world_size

MODULE = "examples.label_points"
PICTURE = "labels.png"
NEEDED = {"las": ("laspy",), "hdf5": ("h5py",)}


def main() -> int:
    return run_command(MODULE, parse_arguments(), run)


def parse_arguments() -> argparse.Namespace:
    kind = argparse.ArgumentParser(prog=f"python -m {MODULE}", add_help=False)
    kind.add_argument("--data", choices=TASKS, default="digits", help="what is labeled")
    data = kind.parse_known_args()[0].data  # other defaults depend on it
    parser = argparse.ArgumentParser(
        prog=kind.prog,
        description="Trains and tests a network that labels points.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[kind],
    )
    parser.add_argument(
        "--attention",
        choices=ATTENTIONS,
        default=ATTENTIONS[0],
        help="what connects points; of the others, 'pooling' is a U-Net without attention, and "
        "'stem' has no levels either",
    )
    task = TASKS[data]
    parser.set_defaults(hits=None, folder=None, cell_size=None)
    if data == "hits":
        parser.add_argument(
            "--hits", type=at_least_1, default=60_000, help="hits of the largest event"
        )
    if task.cell_size is not None:
        parser.add_argument("folder", type=Path, metavar="FOLDER", help="with the files")
        parser.add_argument(
            "--cell-size", type=above_0, default=task.cell_size, help=f"of the grid, in {task.unit}"
        )
    add_options(parser, task.scenes, steps=task.steps, batch=task.batch, out=f"out/labels-{data}")
    arguments = parser.parse_args()
    extras = "demo,interop" if data in NEEDED else "demo"
    needed = NEEDED.get(data, ())
    require(parser, "matplotlib", "mlxtend", "safetensors", "tqdm", *needed, extras=extras)
    if arguments.resume:
        check_resumable(parser, arguments.out, **_metadata(arguments))
    require_folder(parser, arguments.out)
    return arguments


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The network and the data, by the names of arguments."""
    given = {"data": arguments.data, "attention": arguments.attention}
    if arguments.hits is not None:
        given["hits"] = arguments.hits
    if arguments.folder is not None:
        given |= {"cell_size": arguments.cell_size, "FOLDER": str(arguments.folder.absolute())}
    return given


def _metadata(arguments: argparse.Namespace, task: Task | None = None) -> dict[str, str]:
    """What a checkpoint says of its network and data; with ``task``, of the split of files too."""
    metadata = {name: str(value) for name, value in _given(arguments).items()}
    files = task and task.files
    return metadata | (files.describe(arguments.folder) if files else {})


def run(arguments: argparse.Namespace, device: torch.device) -> None:
    template = TASKS[arguments.data]
    data = {"n_hits": arguments.hits, "folder": arguments.folder, "cell_size": arguments.cell_size}
    given = {name: value for name, value in data.items() if value is not None}
    task, for_training, for_test = template.open(template, Options(arguments.seed, **given))
    if task.files is not None:
        n_training, n_test = map(len, task.files)
        print_once(f"Files: {n_training:,} for training, {n_test:,} for the test.")
    torch.manual_seed(arguments.seed)
    model = PointLabeler(task, arguments.attention).to(device)
    print_once(
        f"Training a network of {count_parameters(model):,} parameters "
        f"({arguments.attention}) on {rank_and_world_size()[1]} x {device.type}, "
        f"{torch.get_num_threads()} threads each."
    )
    start = time.perf_counter()
    options = {name: getattr(arguments, name) for name in ("steps", "batch", "seed", "precision")}
    history = train(
        model.train(),
        for_training,
        Config(**options, learning_rate=task.learning_rate),
        arguments.out,
        resume=arguments.resume,
        metadata=_metadata(arguments, task),
    )
    if rank_and_world_size()[0] != 0:
        return
    print_times(history)
    result = _test(model, for_test, arguments)
    last = [step["labels"] for step in history.losses[-20:]]
    figures = {
        **{name.lower(): value for name, value in _given(arguments).items()},
        **options,
        **result._asdict(),
        "loss": sum(last) / len(last),
    }
    report_run(arguments.out, device, start, history, **figures)
    _draw(model, for_test(range(task.n_drawn)), arguments.out)
    _check_checkpoint(task, arguments.out, for_test(range(1)))


def _test(model: PointLabeler, for_test: Batches, arguments: argparse.Namespace) -> Quality:
    task, precision = model.task, PRECISIONS[arguments.precision]
    device = next(model.parameters()).device
    n_classes = len(task.classes)
    counts = torch.zeros(n_classes, n_classes, dtype=torch.int64)
    for first in range(0, task.n_tests, arguments.batch):
        batch = for_test(range(first, min(first + arguments.batch, task.n_tests))).to(device)
        try:
            with torch.autocast(device.type, precision, enabled=precision is not None):
                predicted = model.predict(batch)
        except ValueError as problem:
            where = f"test {task.scenes} {first + 1} to {first + batch.batch_size}"
            raise FormatError(f"{where}: {problem}") from problem
        counts += confusion(batch.labels, predicted, n_classes).cpu()
    result = quality(counts)
    if not counts.any():
        print(f"None of the points of {task.n_tests} test {task.scenes} has a label.")
        return result
    print(
        f"On {task.n_tests} test {task.scenes}: mIoU {result.miou:.3f}, "
        f"accuracy {result.accuracy:.3f}"
    )
    ious = zip(task.classes, result.ious, strict=True)
    present = (f"{name} {iou:.3f}" for name, iou in ious if not math.isnan(iou))
    print("IoU: " + ", ".join(present))
    return result


def _draw(model: PointLabeler, batch: LabeledPoints, folder: Path) -> None:
    from examples.labels.picture import draw_labels  # needs matplotlib, which require() checks

    task = model.task
    predicted = model.predict(batch.to(next(model.parameters()).device)).cpu()
    panels = [task.draw(batch, predicted, scene) for scene in range(batch.batch_size)]
    picture = io.BytesIO()
    draw_labels(panels, task.classes, task.other).savefig(picture, format="png")
    write_file(folder / PICTURE, picture.getvalue())
    print(f"Picture of {batch.batch_size} {task.scenes}: {folder / PICTURE}")


def _check_checkpoint(task: Task, folder: Path, batch: LabeledPoints) -> None:
    """Loads the saved weights into a new model and prints how well it labels a scene."""
    model = PointLabeler(task, read_metadata(folder)["attention"])
    load_weights(folder, model)
    n_classes = len(task.classes)
    counts = confusion(batch.labels, model.predict(batch), n_classes)
    right = f"{int(counts.diagonal().sum()):,} of {int(counts.sum()):,}"
    print(f"Loaded {folder / WEIGHTS}: {right} labeled points of one scene have the right label")


if __name__ == "__main__":
    sys.exit(main())
