"""The command line of an example that trains: options, exit statuses, and how to resume."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from examples.arguments import at_least_1, output_folder, seed
from examples.formats.raw import FormatError
from examples.training.checkpoints import STATE, CheckpointError, load_state
from examples.training.folder import LockError, WriteError, lock_for_run, write_file
from examples.training.loop import (
    PRECISIONS,
    ConfigError,
    DivergenceError,
    History,
    InterruptionError,
)
from examples.training.processes import (
    PeerError,
    peak_memory,
    process_group,
    rank_and_world_size,
)

FIGURES = "figures.json"


def add_options(
    parser: argparse.ArgumentParser, scenes: str, *, steps: int, batch: int, out: str
) -> None:
    """Adds the options of training, with these defaults; ``scenes`` says what they are."""
    parser.add_argument("--seed", type=seed, default=0, help=f"seed of {scenes} and training")
    parser.add_argument("--steps", type=at_least_1, default=steps, help="optimization steps")
    parser.add_argument(
        "--batch", type=at_least_1, default=batch, help=f"{scenes} per step, over all processes"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="full", help="precision of matrix products"
    )
    parser.add_argument("--resume", action="store_true", help="resume from the checkpoint in --out")
    parser.add_argument("--out", type=output_folder, default=Path(out), help="output folder")


def check_resumable(parser: argparse.ArgumentParser, folder: Path, **options: str) -> None:
    """Exits unless there is a checkpoint of a run with these options in ``folder``.

    Args:
        parser: reports what is wrong.
        folder: with the checkpoint.
        options: what the run's metadata is to say, by the name of an option, or of an argument
            without dashes, such as ``FOLDER``, in capitals.
    """
    try:
        state = load_state(folder, torch.device("cpu"))
    except FileNotFoundError:
        parser.error(f"argument --resume: missing file {folder / STATE}")
    except CheckpointError as problem:
        parser.error(f"argument --resume: {problem}")
    for name, given in options.items():
        trained = state["metadata"].get(name)
        if trained != given:
            argument = name if name.isupper() else "--" + name.replace("_", "-")
            expected = f"expected {trained}, as the run in {folder}, got {given}"
            parser.error(f"argument {argument}: {expected}")


def run_command(
    module: str,
    arguments: argparse.Namespace,
    run: Callable[[argparse.Namespace, torch.device], object],
) -> int:
    """Calls ``run`` while the folder ``arguments.out`` is locked; returns the exit status.

    Args:
        module: what ``python -m`` runs.
        arguments: of the command line, with the options of `add_options`.
        run: what the command does, on each process.
    """
    before = _checkpoint_time(arguments.out)
    with process_group() as device:
        try:
            with lock_for_run(arguments.out, device):
                run(arguments, device)
        except InterruptionError as interruption:
            print_once(f"\nStopped: {interruption}. To resume: {resume_command(module)}")
            return 130
        except KeyboardInterrupt:
            if arguments.resume or _checkpoint_time(arguments.out) not in (None, before):
                command = resume_command(module)
                print_once(f"\nStopped. To resume from the last checkpoint: {command}")
            else:
                print_once("\nStopped before the first checkpoint.")
            return 130
        except DivergenceError as problem:
            print_once(f"\nStopped at {problem}.", every_process=problem.on_one_process)
            return 1
        except (CheckpointError, ConfigError, LockError, PeerError, WriteError) as problem:
            print_once(f"\nStopped: {problem}.")
            return 1
        except FormatError as problem:  # of a scene, which is of one process
            print_once(f"\nStopped: {problem}.", every_process=True)
            return 1
    return 0


def resume_command(module: str) -> str:
    """The shell command that resumes this run, with the interpreter that it runs in."""
    python, n_processes = Path(sys.executable), rank_and_world_size()[1]
    if python.is_relative_to(Path.cwd()):
        python = python.relative_to(Path.cwd())
    command = [str(python), "-m"]
    if n_processes > 1:
        command += ["torch.distributed.run", "--nproc-per-node", str(n_processes), "-m"]
    options = [option for option in sys.argv[1:] if option != "--resume"]
    return shlex.join([*command, module, *options, "--resume"])


def print_times(history: History) -> None:
    """Prints the time of each part of a step, and the throughput."""
    total = sum(history.seconds.values())
    if not total:  # no steps were left
        return
    parts = [
        f"{name} {1000 * seconds:.0f} ms ({seconds / total:.0%})"
        for name, seconds in history.seconds.items()
    ]
    print(f"Time per step: {1000 * total:.0f} ms: {', '.join(parts)}")
    print(f"  {history.points_per_second:,.0f} points/s")


def report_run(
    folder: Path, device: torch.device, start: float, history: History, /, **figures: Any
) -> None:
    """Prints time and memory of the run that began at ``start``, and writes them to a file, with
    what else is known of it. JSON has no number that is not finite: the file has null there.
    """
    seconds, memory = time.perf_counter() - start, peak_memory(device)
    peak = "" if memory is None else f", peak memory {memory / 2**30:.2f} GiB"
    print(f"Training and evaluation: {seconds:.0f} s{peak}")
    figures |= {
        "seconds": seconds,
        "seconds_of_a_step": history.seconds,
        "peak_memory": memory,
    }
    text = json.dumps(_finite(figures), indent=2, allow_nan=False)
    write_file(folder / FIGURES, f"{text}\n".encode())


def _finite(value: Any) -> Any:
    """``value`` with None for each number in it, however nested, that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_once(text: str, every_process: bool = False) -> None:
    """Prints on the first process only, or on every process that calls it."""
    if every_process or rank_and_world_size()[0] == 0:
        print(text, flush=True)


def _checkpoint_time(folder: Path) -> int | None:
    state = folder / STATE
    return state.stat().st_mtime_ns if state.is_file() else None
