"""The measures that the library is held to: what each must reach (bar), and should reach (aim).

``goals.csv`` lists them; those of ``cuda`` are meant for an H200, those of ``ranks`` for two cores.
Where it names two variants of a baseline, one of them favors the baseline: pairs with the
projections that both sides share, points along a curve for FlexAttention.
"""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from benchmarks.outcome import Outcome


class Goal(NamedTuple):
    """A line of ``goals.csv``."""

    label: str
    case: str
    """The case, or the beginning of its name where several are tried in turn."""
    figure: str
    reached: str
    bar: float
    aim: float

    def reaches(self, value: float, mark: float) -> bool:
        return value >= mark if self.reached == "at least" else value <= mark


def _goals(device: str) -> list[Goal]:
    text = Path(__file__).with_name("goals.csv").read_text()
    lines = [line[1:] for line in csv.reader(text.splitlines()) if line[0] == device]
    return [
        Goal(label, case, figure, reached, float(bar), float(aim))
        for label, case, figure, reached, bar, aim in lines
    ]


GOALS = {device: _goals(device) for device in ("cpu", "cuda", "ranks")}


def outcome_of(goal: Goal, outcomes: Mapping[str, Outcome]) -> Outcome:
    """The outcome of the goal's case: of those tried, the one of most points that has figures."""
    tried = [outcome for name, outcome in outcomes.items() if name.startswith(goal.case)]
    able = [outcome for outcome in tried if outcome.find(goal.figure) is not None]
    if able:
        return max(able, key=lambda outcome: outcome.find("points") or 0)
    return tried[0] if tried else Outcome(problem="not run")
