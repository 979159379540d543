"""What a study leaves behind: JSON, tables and plots."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.goals import Goal, outcome_of
from benchmarks.outcome import RETAINED, Outcome
from benchmarks.report import Outcomes, report
from benchmarks.settings import Settings

RESULTS = Path(__file__).parent / "results"
FORMER = {"keeping/": RETAINED, "peers/": "baselines/"}
"""Parts of the names of cases in files of earlier commits."""


def describe(settings: Settings, size: str) -> dict[str, Any]:
    """What is measured, and where, as of now."""
    return {
        "machine": machine.describe_machine(),
        "gpu": machine.describe_gpu() if settings.device == "cuda" else None,
        "versions": machine.versions(),
        "commit": machine.describe_commit(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "size": size,
        "settings": settings._asdict(),
    }


def save(about: Mapping[str, Any], outcomes: Outcomes, goals: Sequence[Goal], file: Path) -> None:
    reached = [
        {**goal._asdict(), "value": outcome_of(goal, outcomes)[1].find(goal.figure)}
        for goal in goals
    ]
    cases = {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**about, "goals": reached, "cases": cases}, indent=1) + "\n")


def load(file: Path) -> dict[str, Outcome]:
    """The outcomes that have figures, of those that `save` wrote, now or before names changed."""
    outcomes: dict[str, Outcome] = {}
    for name, case in json.loads(file.read_text())["cases"].items():
        for former, current in FORMER.items():
            name = name.replace(former, current)
        if name.startswith("memory-of-"):  # was a case of its own
            name, side = name.removeprefix("memory-of-").rsplit("/", 1)
            figure = {"theirs": "peak_bytes", "ours": "peak_bytes_vicinal"}[side]
            outcomes[name].figures[figure] = case["figures"]["peak_bytes"]
        elif case["figures"]:
            outcomes[name] = Outcome(**case)
    return outcomes


def show(outcomes: Outcomes, stem: Path, goals: Sequence[Goal]) -> None:
    """Prints tables, and draws plots as ``stem`` and their subjects."""
    print(report(outcomes, goals))
    try:
        from benchmarks.plots import draw
    except ImportError as missing:
        print(f"No plots: {missing}")
        return
    for plot in draw(outcomes, stem, goals):
        print(f"Plot: {plot}")
