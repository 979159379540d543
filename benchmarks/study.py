"""The study: ``python -m benchmarks.study``, or ``make bench``.

Measures the library against what it cannot do without and against its peers, every case in a
process of its own; prints tables, draws plots and writes all figures as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.cases import all_cases, contest_names, memory_names, study_names
from benchmarks.goals import GOALS, outcome_of
from benchmarks.layer import EMBED_DIM, HEADS
from benchmarks.outcome import DisagreementError, Outcome
from benchmarks.report import Outcomes, report
from benchmarks.runner import run_case
from benchmarks.sizes import SIZES

RESULTS = Path(__file__).parent / "results"
SUFFIXES = {"full": "", "quick": "-quick"}


def main() -> int:
    arguments = _parse()
    if arguments.list:
        print("\n".join(all_cases(SIZES[arguments.size])))
        return 0
    started = datetime.now(timezone.utc)
    commit = machine.describe_commit()  # now: who knows what is checked out when it ends
    stem = arguments.out / (machine.file_stem(commit) + SUFFIXES[arguments.size])
    outcomes: dict[str, Outcome] = {}
    try:
        for more in run(arguments.size, tuple(arguments.only), million=arguments.million):
            outcomes |= more
            save(as_json(outcomes, arguments.size, started, commit), stem)
    except DisagreementError as difference:
        print(f"\nThe study stops, as a peer disagrees: {difference}", file=sys.stderr)
        return 1
    print(report(outcomes))
    show(outcomes, stem)
    return 0


def run(
    size_name: str, only: tuple[str, ...] = (), *, million: bool = False
) -> Iterator[dict[str, Outcome]]:
    """The outcomes of all cases, or of those whose names begin with one of ``only``, as they come.

    Peers come first: they show whether results agree.

    Raises:
        DisagreementError: a peer computes something else than the library.
    """
    size = SIZES[size_name]
    ladders = contest_names(size) + [[name] for name in study_names(size)]
    for ladder in ladders + [["million"]] * million:
        names = [name for name in ladder if name.startswith(only or "")]
        yield _until_one_fits(names, size_name)


def _until_one_fits(names: list[str], size_name: str) -> dict[str, Outcome]:
    """Goes on to the next of ``names`` where one takes more memory than there is."""
    outcomes = {}
    for name in names:
        outcomes[name] = outcome = _run_and_say(name, size_name)
        if outcome.figures and name.startswith("peers/"):
            outcomes |= {memory: _run_and_say(memory, size_name) for memory in memory_names(name)}
        if not outcome.lacked_memory:
            break
    return outcomes


def _run_and_say(name: str, size_name: str) -> Outcome:
    start = time.perf_counter()
    print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
    outcome = run_case(name, size_name)
    print(outcome.problem or f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return outcome


def save(record: dict[str, Any], stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def show(outcomes: Outcomes, stem: Path) -> None:
    """Draws plots beside the JSON, and says where all of it is."""
    print(f"\nFigures: {stem.with_suffix('.json')}")
    try:
        from benchmarks.plots import draw
    except ImportError as missing:
        print(f"No plots: {missing}")
        return
    for plot in draw(outcomes, stem):
        print(f"Plot: {plot}")


def as_json(
    outcomes: Outcomes, size_name: str, started: datetime, commit: machine.Commit
) -> dict[str, Any]:
    return {
        "machine": machine.describe_machine(),
        "versions": machine.versions(),
        "commit": commit,
        "started": started.isoformat(timespec="seconds"),
        "size": size_name,
        "settings": {
            "embed_dim": EMBED_DIM,
            "n_heads": HEADS,
            "dtype": "float32",
            **SIZES[size_name]._asdict(),
        },
        "goals": [
            {**goal._asdict(), "value": outcome_of(goal, outcomes)[1].find(goal.figure)}
            for goal in GOALS
        ],
        "cases": {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()},
    }


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
