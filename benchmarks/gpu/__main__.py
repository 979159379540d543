"""The study on a GPU: ``python -m benchmarks.gpu``, or ``make gpu-bench``.

Measures the library against what it cannot do without and against its peers, every case in a
process of its own; prints tables, draws plots and writes all figures as JSON. With --dry-run every
case runs on the CPU at a tiny size, to see that it runs; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.gpu.case import device_of, run_case, size_of
from benchmarks.gpu.cases import study_names
from benchmarks.gpu.goals import GOALS
from benchmarks.gpu.report import report
from benchmarks.gpu.sizes import SIZES
from benchmarks.outcome import Outcome
from benchmarks.record import (
    RESULTS,
    Draw,
    as_record,
    collect,
    run_and_say,
    save,
    saved,
    show,
    until_one_fits,
)
from benchmarks.report import Outcomes

NO_GPU = 2  # the exit status where there is none


def main() -> int:
    arguments = _parse()
    dry_run: bool = arguments.dry_run
    if arguments.list:
        print("\n".join(name for ladder in _ladders(dry_run) for name in ladder))
        return 0
    if not dry_run and not torch.cuda.is_available():
        print("The study needs a GPU, and PyTorch finds none; see --dry-run.", file=sys.stderr)
        return NO_GPU
    started = datetime.now(timezone.utc)
    commit = machine.describe_commit()  # now: who knows what is checked out when it ends
    device = None if dry_run else torch.cuda.get_device_name()
    stem = machine.file_stem(commit, device) + ("-quick" if dry_run else "")
    stem = arguments.out / stem

    def keep(outcomes: Outcomes) -> None:
        save(as_json(outcomes, dry_run, started, commit), stem)

    found = saved(stem) if arguments.resume else {}
    outcomes = collect(run(dry_run, tuple(arguments.only), found), keep, found)
    if outcomes is None:
        return 1
    print(report(outcomes))
    show(outcomes, stem, _plots)
    return 0


def run(dry_run: bool, only: tuple[str, ...], found: Outcomes) -> Iterator[dict[str, Outcome]]:
    """The outcomes of all cases, or of those whose names begin with one of ``only``, as they come.

    What is ``found`` already is not measured again.

    Raises:
        DisagreementError: a peer computes something else than the library.
    """

    def run_one(name: str) -> Outcome:
        return run_and_say(lambda: run_case(name, dry_run), name)

    for ladder in _ladders(dry_run):
        names = [name for name in ladder if name.startswith(only or "")]
        if names and not any(name in found for name in names):
            yield until_one_fits(names, run_one)


def _ladders(dry_run: bool) -> list[list[str]]:
    return study_names(SIZES[size_of(dry_run)], device_of(dry_run))


def _plots() -> Draw:
    from benchmarks.gpu.plots import draw

    return draw


def as_json(
    outcomes: Outcomes, dry_run: bool, started: datetime, commit: machine.Commit
) -> dict[str, Any]:
    return as_record(
        outcomes,
        GOALS,
        started,
        commit,
        gpu=None if dry_run else machine.describe_gpu(),
        settings=SIZES[size_of(dry_run)]._asdict(),
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Measures vicinal on a GPU against its floors and peers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--only", nargs="*", default=[], help="cases, by the beginning of names")
    parser.add_argument("--resume", action="store_true", help="keep the figures of this commit")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, at a tiny size")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of JSON and plots")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
