"""The study: ``python -m benchmarks --device cpu``, or ``make bench``, ``make gpu-bench``.

Measures the library against its floors and baselines, every case in a process of its own; prints
tables, draws plots and writes all figures as JSON.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import machine, outcome, report
from benchmarks.cases import MILLION, SETTINGS, SPEED, Settings, all_cases, ladders
from benchmarks.goals import GOALS
from benchmarks.outcome import RETAINED, CaseSkipped, DisagreementError, Outcome

NO_GPU = 2  # exit status
SPARE = 2**30  # bytes of the available memory that cases leave to other processes


def main() -> int:
    arguments = _parse()
    settings = SETTINGS[arguments.device][arguments.size]
    if arguments.dry_run:
        settings = settings._replace(device="cpu")
    if arguments.show:
        stem = arguments.out / arguments.show.stem
        report.show(report.load(arguments.show), stem, GOALS[arguments.device])
        return 0
    if settings.device == "cuda" and not torch.cuda.is_available():
        print("The study needs a GPU, and PyTorch finds none; see --dry-run.", file=sys.stderr)
        return NO_GPU
    if arguments.case:
        return run_here(arguments.case, settings)
    return run_study(arguments, settings)


def run_here(name: str, settings: Settings) -> int:
    """Prints a case's figures, last as a line of JSON; returns the exit status."""
    try:
        if name.startswith(RETAINED):
            outcome.retain_freed_memory()
        if settings.device == "cpu" and sys.platform == "linux":
            import resource

            # An allocation is to fail before the system kills a process.
            limit = max(machine.proc_bytes("meminfo", "MemAvailable") - SPARE, SPARE)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        found = Outcome(all_cases(settings)[name.removeprefix(RETAINED)]())
    except CaseSkipped as reason:
        found = Outcome(problem=str(reason))
    except DisagreementError as difference:
        print(difference, file=sys.stderr)
        return outcome.DISAGREES
    print(report.figures_table({name: found}))
    print(json.dumps(asdict(found)))
    return 0


def run_study(arguments: argparse.Namespace, settings: Settings) -> int:
    """Runs, saves and shows the cases whose names begin as ``arguments.only`` says."""
    about = report.describe(settings, arguments.size)
    on_gpu = torch.cuda.get_device_name() if settings.device == "cuda" else None
    stem = machine.file_stem(about["commit"], on_gpu)
    stem = arguments.out / (stem + ("" if arguments.size == "full" else f"-{arguments.size}"))
    goals, file = GOALS[arguments.device], stem.with_name(stem.name + ".json")
    part = Part(arguments, report.earlier(about, file) if arguments.resume else {})
    left = 0
    try:
        for ladder in ladders(settings):
            for name in selected(ladder, arguments):
                if name not in part.outcomes:
                    if not part.run(name):
                        left += 1
                        break
                    report.save(about, part.outcomes, goals, file)
                if not part.outcomes[name].lacked_memory:
                    break
    except DisagreementError as difference:
        print(f"\nThe study stops, as a baseline disagrees: {difference}", file=sys.stderr)
        return 1
    report.show(part.outcomes, stem, goals)
    if left:
        print(f"\nOut of time: {left} cases are left, which --resume runs.", file=sys.stderr)
    return 0


def selected(ladder: Iterable[str], arguments: argparse.Namespace) -> list[str]:
    """The names that ``--only`` asks for."""
    only = tuple(arguments.only)
    unless_asked = {SPEED} if arguments.device == "cuda" else {SPEED, MILLION}
    names = [name for name in ladder if name.startswith(only or "")]
    return names if only else [name for name in names if name not in unless_asked]


class Part:
    """A study, or a part of it that ends after ``--seconds``."""

    def __init__(self, arguments: argparse.Namespace, earlier: dict[str, Outcome]) -> None:
        self.outcomes = earlier
        self._options = arguments.device, arguments.size, arguments.dry_run
        self._ends = time.monotonic() + arguments.seconds
        self._began = False

    def run(self, name: str) -> bool:
        """Whether the case had the time that it needs, or all the time of a part."""
        left = self._ends - time.monotonic()
        if left <= 0:
            return False
        found = run_case(name, *self._options, timeout=min(left, outcome.TIMEOUT))
        cut = found.timed_out and self._began and left < outcome.TIMEOUT
        self._began = True
        if not cut:
            self.outcomes[name] = found
        return not cut


def run_case(
    name: str,
    device: str,
    size: str,
    dry_run: bool = False,
    path: str | None = None,
    timeout: float = outcome.TIMEOUT,
) -> Outcome:
    """The outcome of a case in a process of its own, with ``path`` as its PYTHONPATH."""
    options = ["--device", device, "--size", size, *(["--dry-run"] if dry_run else [])]
    command = [sys.executable, "-m", "benchmarks", "--case", name, *options]
    environment = {"TRITON_INTERPRET": "1"} if dry_run else {}
    if path:
        environment["PYTHONPATH"] = path
    start = time.perf_counter()
    print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
    found = outcome.run_command(command, environment=environment, timeout=timeout)
    print(found.problem or f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--device", choices=SETTINGS, default="cpu", help="default: cpu")
    add("--size", choices=("full", "quick"), default="full", help="quick: to check that it runs")
    add("--only", nargs="*", default=[], metavar="NAME", help="cases, by the beginning of names")
    add("--seconds", type=float, default=math.inf, help="end after this time, in mid-case too")
    add("--resume", action="store_true", help="keep the figures that the same code has given here")
    add("--dry-run", action="store_true", help="cuda, quick: on the CPU, by Triton's interpreter")
    add("--out", type=Path, default=report.RESULTS, help="folder of JSON and plots")
    add("--show", type=Path, metavar="JSON", help="tables and plots of a study done before")
    add("--case", metavar="NAME", help="run one case in this process")
    arguments = parser.parse_args()
    if arguments.dry_run:
        arguments.device, arguments.size = "cuda", "quick"
    cases = all_cases(SETTINGS[arguments.device][arguments.size])
    if arguments.case and arguments.case.removeprefix(RETAINED) not in cases:
        parser.error(f"argument --case: no {arguments.case!r}; there are {', '.join(cases)}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
