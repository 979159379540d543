"""The figures of a study as tables for the terminal."""

from collections.abc import Mapping, Sequence

from benchmarks.baselines import BASELINES
from benchmarks.goals import Goal, outcome_of
from benchmarks.outcome import RETAINED, Figures, Outcome

Outcomes = Mapping[str, Outcome]
NONE = "-"
COLUMNS = (
    "points", "forward_seconds", "step_seconds", "peak_bytes",
    "forward_over_vicinal", "step_over_vicinal", "memory_over_vicinal",
)  # fmt: skip


def report(outcomes: Outcomes, goals: Sequence[Goal]) -> str:
    """All tables: goals, baselines, then the figures of all other cases."""
    parts = {"Goals": goals_table(outcomes, goals)}
    for prefix in ("", RETAINED):
        parts[f"{prefix}baselines"] = baselines_table(outcomes, f"{prefix}baselines/")
    groups: dict[str, dict[str, Outcome]] = {}
    for name, outcome in outcomes.items():
        group, _, case = name.rpartition("/")
        if not group.startswith(("baselines", f"{RETAINED}baselines")):
            groups.setdefault(group or case, {})[case] = outcome
    parts |= {name: figures_table(group) for name, group in groups.items()}
    return "\n\n".join(f"{title}\n{body}" for title, body in parts.items() if body)


def goals_table(outcomes: Outcomes, goals: Sequence[Goal]) -> str:
    rows = []
    for goal in goals:
        _, outcome = outcome_of(goal, outcomes)
        value, points = outcome.find(goal.figure), outcome.find("points")
        verdict = "" if value is None else "missed"
        for mark in ("bar", "aim"):
            if value is not None and goal.reaches(value, getattr(goal, mark)):
                verdict = mark
        note = outcome.problem or (f"{points:,.0f} points" if points else "")
        marks = (text_of("", goal.bar), text_of("", goal.aim))
        rows.append((goal.label, text_of("", value), *marks, verdict, note))
    return table(("", "", "bar", "aim", "", ""), rows)


def baselines_table(outcomes: Outcomes, prefix: str) -> str:
    rows = []
    for name, outcome in outcomes.items():
        if name.startswith(prefix):
            *_, baseline, tracks = name.split("/")
            figures, notes = outcome.figures, [f"{tracks} tracks", outcome.problem or ""]
            notes += [f"{n} {text_of(n, x)}" for n, x in figures.items() if n not in COLUMNS]
            cells = (text_of(column, figures.get(column)) for column in COLUMNS)
            rows.append((BASELINES[baseline][0], *cells, ", ".join(filter(None, notes))))
    return table(("", *COLUMNS, ""), rows) if rows else ""


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
        return value or NONE
    if "seconds" in name:
        return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"
    if "peak_bytes" in name:
        return f"{value / 2**20:,.0f} MiB"
    return f"{value:,.0f}" if name.startswith("points") else f"{value:.3g}"
