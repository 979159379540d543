"""What a study leaves behind: JSON, tables for the terminal, and plots."""

import dataclasses
import importlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from benchmarks import machine
from benchmarks.goals import Goal, outcome_of
from benchmarks.outcome import Figures, Outcome

Outcomes = Mapping[str, Outcome]
RESULTS = Path(__file__).parent / "results"


class Sizes(Protocol):
    """The settings of a study, a named tuple."""

    @property
    def device(self) -> str: ...
    def _asdict(self) -> dict[str, Any]: ...


def describe(settings: Sizes, size: str) -> dict[str, Any]:
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
        {**goal._asdict(), "value": outcome_of(goal, outcomes).find(goal.figure)} for goal in goals
    ]
    cases = {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**about, "goals": reached, "cases": cases}, indent=1) + "\n")


def load(file: Path) -> dict[str, Outcome]:
    """The outcomes that `save` wrote."""
    cases = json.loads(file.read_text())["cases"]
    return {name: Outcome(**case) for name, case in cases.items()}


def earlier(about: Mapping[str, Any], file: Path) -> dict[str, Outcome]:
    """What ``file`` holds, if the same code gave it on the same machine; else nothing."""
    if not file.exists():
        return {}
    then, now = json.loads(file.read_text()), json.loads(json.dumps(about))
    same = all(then.get(name) == value for name, value in now.items() if name != "started")
    return load(file) if same else {}


def show(
    outcomes: Outcomes, stem: Path, goals: Sequence[Goal], plots: str = "benchmarks.plots"
) -> None:
    """Prints all tables, and the module ``plots`` draws plots as ``stem`` and their subjects."""
    parts = {"Goals": goals_table(outcomes, goals)}
    groups: dict[str, dict[str, Outcome]] = {}
    for name, outcome in outcomes.items():
        group, _, case = name.rpartition("/")
        groups.setdefault(group or case, {})[case] = outcome
    parts |= {name: figures_table(group) for name, group in groups.items()}
    print("\n\n".join(f"{title}\n{body}" for title, body in parts.items()))
    try:
        draw = importlib.import_module(plots).draw
    except ImportError as missing:
        print(f"No plots: {missing}")
        return
    stem.parent.mkdir(parents=True, exist_ok=True)
    for plot in draw(outcomes, stem, goals):
        print(f"Plot: {plot}")


def goals_table(outcomes: Outcomes, goals: Sequence[Goal]) -> str:
    rows = []
    for goal in goals:
        outcome = outcome_of(goal, outcomes)
        value, points = outcome.find(goal.figure), outcome.find("points")
        verdict = "" if value is None else "missed"
        for mark in ("bar", "aim"):
            if value is not None and goal.reaches(value, getattr(goal, mark)):
                verdict = mark
        note = outcome.problem or (f"{points:,.0f} points" if points else "")
        numbers = (text_of("", number) for number in (value, goal.bar, goal.aim))
        rows.append((goal.label, *numbers, verdict, note))
    return table(("", "", "bar", "aim", "", ""), rows)


def figures_table(group: Outcomes) -> str:
    """A row per figure, a column per case."""
    cases: list[Figures] = [
        {"problem": case.problem} if case.problem else case.figures for case in group.values()
    ]
    names = dict.fromkeys(name for figures in cases for name in figures)
    rows = [(name, *(text_of(name, case.get(name)) for case in cases)) for name in names]
    return table(("", *group), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in the first column, numbers in the others; notes may follow in the last."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    forms = [f"{{:<{widths[0]}}}", *(f"{{:>{width}}}" for width in widths[1:])]
    if len(widths) > 2:
        forms[-1] = "{}"
    return "\n".join("  " + "  ".join(forms).format(*line).rstrip() for line in lines)


def text_of(name: str, value: float | str | None) -> str:
    """A figure in the unit that its name implies."""
    if value is None or isinstance(value, str):
        return value or "-"
    if "seconds" in name:
        return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"
    if "peak_bytes" in name:
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:,.0f}" if name.startswith("points") else f"{value:.3g}"
