"""The study: ``python -m benchmarks --device cpu``, or ``make bench``, ``make gpu-bench``.

Measures the library against its floors and baselines, every case in a process of its own; prints
tables, draws plots and writes all figures as JSON.
"""

import argparse
import contextlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import machine, outcome, record
from benchmarks.cases import MILLION, SPEED, all_cases, ladders
from benchmarks.goals import GOALS
from benchmarks.outcome import RETAINED, CaseSkipped, DisagreementError, Outcome
from benchmarks.report import figures_table
from benchmarks.settings import SETTINGS, Settings

NO_GPU = 2  # exit status
SPARE = 2**30  # bytes of the available memory that cases leave to other processes


def main() -> int:
    arguments = _parse()
    settings = SETTINGS[arguments.device][arguments.size]
    if arguments.dry_run:
        settings = settings._replace(device="cpu")
    if arguments.show:
        stem = arguments.out / arguments.show.stem
        record.show(record.load(arguments.show), stem, GOALS[arguments.device])
    elif arguments.list:
        print("\n".join(all_cases(settings)))
    elif settings.device == "cuda" and not torch.cuda.is_available():
        print("The study needs a GPU, and PyTorch finds none; see --dry-run.", file=sys.stderr)
        return NO_GPU
    elif arguments.case:
        return run_here(arguments.case, settings, arguments.json)
    else:
        return run_study(arguments, settings)
    return 0


def run_here(name: str, settings: Settings, as_json: bool) -> int:
    """Prints a case's figures, or why there are none, and returns the exit status."""
    try:
        if name.startswith(RETAINED):
            outcome.retain_freed_memory()
        if settings.device == "cpu":  # an allocation is to fail before the system kills a process
            with contextlib.suppress(ImportError, OSError, ValueError):
                import resource

                limit = max(machine.available_memory() - SPARE, SPARE)
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        found = Outcome(all_cases(settings)[name.removeprefix(RETAINED)]())
    except CaseSkipped as reason:
        found = Outcome(problem=str(reason))
    except DisagreementError as difference:
        print(difference, file=sys.stderr)
        return outcome.DISAGREES
    print(json.dumps(asdict(found)) if as_json else figures_table({name: found}))
    return 0


def run_study(arguments: argparse.Namespace, settings: Settings) -> int:
    """Runs, saves and shows the cases whose names begin as ``arguments.only`` says."""
    about = record.describe(settings, arguments.size)
    on_gpu = torch.cuda.get_device_name() if settings.device == "cuda" else None
    stem = machine.file_stem(about["commit"], on_gpu)
    stem = arguments.out / (stem + ("" if arguments.size == "full" else f"-{arguments.size}"))
    goals, json_file = GOALS[arguments.device], stem.with_name(stem.name + ".json")
    outcomes = record.load(json_file) if arguments.resume and json_file.exists() else {}
    only, on_cpu = tuple(arguments.only), arguments.device == "cpu" and not arguments.million
    unless_asked = {SPEED, *([MILLION] if on_cpu else [])}
    try:
        for ladder in ladders(settings):
            names = [name for name in ladder if name.startswith(only or "")]
            names = [name for name in names if only or name not in unless_asked]
            if any(name in outcomes for name in names):
                continue
            for name in names:
                outcomes[name] = run_case(name, arguments.device, arguments.size, arguments.dry_run)
                record.save(about, outcomes, goals, json_file)
                if not outcomes[name].lacked_memory:
                    break
    except DisagreementError as difference:
        print(f"\nThe study stops, as a baseline disagrees: {difference}", file=sys.stderr)
        return 1
    record.show(outcomes, stem, goals)
    return 0


def run_case(
    name: str, device: str, size: str, dry_run: bool = False, path: str | None = None
) -> Outcome:
    """The outcome of a case in a process of its own, with ``path`` as its PYTHONPATH."""
    options = ["--device", device, "--size", size, *(["--dry-run"] if dry_run else [])]
    command = [sys.executable, "-m", "benchmarks", "--case", name, "--json", *options]
    environment = {"TRITON_INTERPRET": "1"} if dry_run else {}
    if path:
        environment["PYTHONPATH"] = path
    start = time.perf_counter()
    print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
    found = outcome.run_command(command, environment=environment)
    print(found.problem or f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--device", choices=SETTINGS, default="cpu", help="default: cpu")
    add("--size", choices=("full", "quick"), default="full", help="quick: to check that it runs")
    add("--only", nargs="*", default=[], metavar="NAME", help="cases, by the beginning of names")
    add("--million", action="store_true", help="on the CPU, also a step of a million queries")
    add("--resume", action="store_true", help="keep the figures of this commit")
    add("--dry-run", action="store_true", help="cuda, quick: on the CPU, by Triton's interpreter")
    add("--out", type=Path, default=record.RESULTS, help="folder of JSON and plots")
    add("--list", action="store_true", help="list the cases and stop")
    add("--show", type=Path, metavar="JSON", help="tables and plots of a study done before")
    add("--case", metavar="NAME", help="run one case in this process")
    add("--json", action="store_true", help="its figures as a line of JSON")
    arguments = parser.parse_args()
    if arguments.dry_run:
        arguments.device, arguments.size = "cuda", "quick"
    cases = all_cases(SETTINGS[arguments.device][arguments.size])
    if arguments.case and arguments.case.removeprefix(RETAINED) not in cases:
        parser.error(f"argument --case: no {arguments.case!r}; see --list")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
