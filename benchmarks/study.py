"""The study: ``python -m benchmarks.study``, or ``make bench``.

Measures the library against what it cannot do without and against its peers, every case in a
process of its own; prints tables, draws plots and writes all figures as JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.cases import all_cases, contest_names, memory_names, study_names
from benchmarks.goals import GOALS
from benchmarks.layer import EMBED_DIM, HEADS
from benchmarks.outcome import Outcome
from benchmarks.record import (
    RESULTS,
    Draw,
    as_record,
    collect,
    run_and_say,
    save,
    show,
    until_one_fits,
)
from benchmarks.report import Outcomes, report
from benchmarks.runner import run_case
from benchmarks.sizes import SIZES

SUFFIXES = {"full": "", "quick": "-quick"}


def main() -> int:
    arguments = _parse()
    if arguments.list:
        print("\n".join(all_cases(SIZES[arguments.size])))
        return 0
    started = datetime.now(timezone.utc)
    commit = machine.describe_commit()  # now: who knows what is checked out when it ends
    stem = arguments.out / (machine.file_stem(commit) + SUFFIXES[arguments.size])

    def keep(outcomes: Outcomes) -> None:
        save(as_json(outcomes, arguments.size, started, commit), stem)

    batches = run(arguments.size, tuple(arguments.only), million=arguments.million)
    outcomes = collect(batches, keep, {})
    if outcomes is None:
        return 1
    print(report(outcomes))
    show(outcomes, stem, _plots)
    return 0


def run(
    size_name: str, only: tuple[str, ...] = (), *, million: bool = False
) -> Iterator[dict[str, Outcome]]:
    """The outcomes of all cases, or of those whose names begin with one of ``only``, as they come.

    Peers come first: they show whether results agree.

    Raises:
        DisagreementError: a peer computes something else than the library.
    """

    def run_one(name: str) -> Outcome:
        return run_and_say(lambda: run_case(name, size_name), name)

    size = SIZES[size_name]
    ladders = contest_names(size) + [[name] for name in study_names(size)]
    for ladder in ladders + [["million"]] * million:
        outcomes = until_one_fits((name for name in ladder if name.startswith(only or "")), run_one)
        contests = [name for name in outcomes if name.startswith("peers/")]
        measured = [name for name in contests if outcomes[name].figures]
        yield outcomes | {
            memory: run_one(memory) for name in measured for memory in memory_names(name)
        }


def _plots() -> Draw:
    from benchmarks.plots import draw

    return draw


def as_json(
    outcomes: Outcomes, size_name: str, started: datetime, commit: machine.Commit
) -> dict[str, Any]:
    settings = {
        "embed_dim": EMBED_DIM,
        "n_heads": HEADS,
        "dtype": "float32",
        **SIZES[size_name]._asdict(),
    }
    return as_record(outcomes, GOALS, started, commit, size=size_name, settings=settings)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description="Measures vicinal against its floors and peers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--size", choices=SIZES, default="full", help="quick: to see that it runs")
    parser.add_argument("--only", nargs="*", default=[], help="cases, by the beginning of names")
    parser.add_argument("--list", action="store_true", help="list the cases and stop")
    parser.add_argument("--million", action="store_true", help="also a step of a million queries")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of JSON and plots")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
