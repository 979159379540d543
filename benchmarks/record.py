"""What a study leaves behind: JSON, plots, and progress while it runs."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.goals import Goal, outcome_of
from benchmarks.outcome import DisagreementError, Outcome
from benchmarks.report import Outcomes

RESULTS = Path(__file__).parent / "results"

Draw = Callable[[Outcomes, Path], Iterator[Path]]


def run_and_say(run: Callable[[], Outcome], name: str) -> Outcome:
    start = time.perf_counter()
    print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
    outcome = run()
    print(outcome.problem or f"{time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return outcome


def until_one_fits(names: Iterable[str], run: Callable[[str], Outcome]) -> dict[str, Outcome]:
    """Goes on to the next of ``names`` where one takes more memory than there is."""
    outcomes = {}
    for name in names:
        outcomes[name] = outcome = run(name)
        if not outcome.lacked_memory:
            break
    return outcomes


def collect(
    batches: Iterable[Outcomes], keep: Callable[[Outcomes], None], found: Outcomes
) -> Outcomes | None:
    """All outcomes, those ``found`` before included; ``keep`` gets them as they come.

    None where a peer disagrees, which ends the study.
    """
    outcomes = dict(found)
    try:
        for batch in batches:
            outcomes |= batch
            keep(outcomes)
    except DisagreementError as difference:
        print(f"\nThe study stops, as a peer disagrees: {difference}", file=sys.stderr)
        return None
    return outcomes


def as_record(
    outcomes: Outcomes,
    goals: Sequence[Goal],
    started: datetime,
    commit: machine.Commit,
    **settings: object,
) -> dict[str, Any]:
    """All there is to know, for JSON; ``settings`` are the study's own."""
    return {
        "machine": machine.describe_machine(),
        "versions": machine.versions(),
        "commit": commit,
        "started": started.isoformat(timespec="seconds"),
        **settings,
        "goals": [
            {**goal._asdict(), "value": outcome_of(goal, outcomes)[1].find(goal.figure)}
            for goal in goals
        ],
        "cases": {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()},
    }


def save(record: Mapping[str, Any], stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")


def saved(stem: Path) -> dict[str, Outcome]:
    """The outcomes that have figures, of those that `save` wrote; none where it wrote nothing."""
    path = stem.with_suffix(".json")
    if not path.exists():
        return {}
    outcomes = {
        name: Outcome(**kept) for name, kept in json.loads(path.read_text())["cases"].items()
    }
    return {name: outcome for name, outcome in outcomes.items() if outcome.figures}


def show(outcomes: Outcomes, stem: Path, load: Callable[[], Draw]) -> None:
    """Draws plots beside the JSON by what ``load`` imports, and says where all of it is."""
    print(f"\nFigures: {stem.with_suffix('.json')}")
    try:
        draw = load()
    except ImportError as missing:
        print(f"No plots: {missing}")
        return
    for plot in draw(outcomes, stem):
        print(f"Plot: {plot}")
