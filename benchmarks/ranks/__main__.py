"""Scaling over processes: ``python -m benchmarks.ranks``.

Trains an encoder on particle tracks that 1, 2 and 4 processes of one thread share, on gloo; counts
halo and balance of up to 512 parts; and predicts from these what many GPUs would reach. With GPUs,
``--device cuda`` starts a process on each, on nccl; over several machines, so does ``torchrun -m
benchmarks.ranks --device cuda``.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import machine, report
from benchmarks.goals import GOALS
from benchmarks.outcome import Figures, Outcome
from benchmarks.ranks.model import predict
from benchmarks.ranks.parts import measure_parts
from benchmarks.ranks.settings import SETTINGS, RanksSettings
from benchmarks.ranks.study import measure, measure_to
from examples.training.processes import process_group, spawn_processes

NO_GPU, TOO_FEW = 2, 3  # exit statuses
PLOTS = "benchmarks.ranks.plots"


def main() -> int:
    arguments = _parse()
    if arguments.show:
        stem = arguments.out / arguments.show.stem
        report.show(report.load(arguments.show), stem, GOALS["ranks"], PLOTS)
        return 0
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # also of the processes that this one starts
    elif not torch.cuda.is_available():
        print("The study needs a GPU, and PyTorch finds none.", file=sys.stderr)
        return NO_GPU
    settings = _settings(arguments)
    if max(settings.ranks) < 2:
        print("The study needs two processes or more; see --ranks.", file=sys.stderr)
        return TOO_FEW
    load = os.getloadavg() if hasattr(os, "getloadavg") else None
    about = report.describe(settings, arguments.size) | {"load": load}
    found = {} if "ranks" in arguments.without else run_ranks(settings)
    if int(os.environ.get("RANK", 0)):
        return 0
    if "parts" not in arguments.without:
        found |= measure_parts(settings)
    found |= predict(found)
    outcomes = {name: Outcome(figures) for name, figures in found.items()}
    on_gpu = torch.cuda.get_device_name() if arguments.device == "cuda" else None
    name = f"{machine.file_stem(about['commit'], on_gpu)}-ranks"
    stem = arguments.out / (name if arguments.size == "full" else f"{name}-{arguments.size}")
    report.save(about, outcomes, GOALS["ranks"], stem.with_name(f"{stem.name}.json"))
    report.show(outcomes, stem, GOALS["ranks"], PLOTS)
    return 0


def run_ranks(settings: RanksSettings) -> dict[str, Figures]:
    """What the ranks measure: those of torchrun, or processes that start here."""
    if "WORLD_SIZE" in os.environ:
        torch.set_num_threads(1)
        with process_group() as device:
            return measure(device, settings)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no warning of earlier tensors freed
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "figures.json")
        spawn_processes(max(settings.ranks), measure_to, settings, file)
        found: dict[str, Figures] = json.loads(file.read_text())
        return found


def _settings(arguments: argparse.Namespace) -> RanksSettings:
    settings = SETTINGS[arguments.size]._replace(device=arguments.device)
    largest = int(os.environ.get("WORLD_SIZE", 0))
    if arguments.device == "cuda":
        settings = settings._replace(dtype="bfloat16")
        largest = largest or torch.cuda.device_count()
    if largest:
        doubled = [2**i for i in range(largest.bit_length())]
        settings = settings._replace(ranks=tuple(doubled))
    if arguments.ranks:
        settings = settings._replace(ranks=tuple(arguments.ranks))
    for name in ("dtype", "tracks", "rounds", "layers"):
        if getattr(arguments, name) is not None:
            settings = settings._replace(**{name: getattr(arguments, name)})
    return settings


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ranks", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--size", choices=SETTINGS, default="full", help="quick: to check that it runs")
    add("--ranks", type=int, nargs="*", help="numbers of processes; default: 1 2 4, or all GPUs")
    add("--dtype", help="default: float32, on GPUs bfloat16")
    add("--tracks", type=int, help="of the scene that ranks share, 430 points each; default: 100")
    add("--rounds", type=int, help="of steps that alternate; default: 5")
    add("--layers", type=int, help="of the encoder; default: 2")
    add("--without", choices=("ranks", "parts"), nargs="*", default=[], help="leave out")
    add("--out", type=Path, default=report.RESULTS, help="folder of JSON and plots")
    add("--show", type=Path, metavar="JSON", help="tables and plots of a study done before")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
