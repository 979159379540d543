"""The figures of a study as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.allocator import KEEPING
from benchmarks.cases.precision import DTYPES
from benchmarks.cases.stages import FLOOR, STAGES
from benchmarks.goals import GOALS, Goal, outcome_of
from benchmarks.outcome import Outcome
from benchmarks.peers import PEERS

Outcomes = Mapping[str, Outcome]
NONE = "-"


def report(outcomes: Outcomes) -> str:
    """All tables, one after another."""
    parts = {
        "What the library is held to": goals(outcomes),
        "Peers at the same work, times in the middle of several": peers(outcomes, "peers/"),
        "Scenes": scenes(outcomes),
        "A block as scenes of one density grow": scaling(outcomes, "scaling/time"),
        "The same where freed memory is kept": scaling(outcomes, KEEPING + "scaling/time"),
        "Peers where freed memory is kept": peers(outcomes, KEEPING + "peers/"),
        "The first scene where freed memory is kept": plain(outcomes, KEEPING + "compute/tracks"),
        "Stages of a block, each timed alone, in ms": stages(outcomes),
        "Two threads, times faster than one": plain(outcomes, "threads"),
        "Error of the block, and over that of plain PyTorch": precision(outcomes),
        "The largest training step, which just has to run": plain(outcomes, "million"),
    }
    return "\n\n".join(f"{title}\n{body}" for title, body in parts.items() if body)


def goals(outcomes: Outcomes, goals: Sequence[Goal] = GOALS) -> str:
    rows = [_goal_row(goal, *outcome_of(goal, outcomes)) for goal in goals]
    return table(("", "", "bar", "aim", "", ""), rows)


def _goal_row(goal: Goal, case: str, outcome: Outcome) -> tuple[str, ...]:
    value = outcome.find(goal.figure)
    points = outcome.find("points")
    where = f"{points:,.0f} points" if points else ""
    marks = (f"{goal.bar:g}", f"{goal.aim:g}")
    if value is None:
        return (goal.label, NONE, *marks, "", outcome.problem or "")
    verdict = "missed"
    if goal.reaches(value, goal.bar):
        verdict = "bar"
    if goal.reaches(value, goal.aim):
        verdict = "aim" if goal.aim != goal.bar else "bar"
    return (goal.label, f"{value:.3g}", *marks, verdict, where)


def peers(outcomes: Outcomes, names: str) -> str:
    header = ("", "points", "forward", "step", "memory", "forward", "step", "")
    rows = [_peer_row(name, outcomes) for name in outcomes if name.startswith(names)]
    units = ("", "", "", "", "of step", "/ vicinal", "/ vicinal", "")
    return table(header, [units, *rows]) if rows else ""


def _peer_row(name: str, outcomes: Outcomes) -> tuple[str, ...]:
    outcome = outcomes[name]
    *_, peer, tracks = name.split("/")
    label = PEERS[peer].label
    if outcome.problem is not None:
        return (label, *[NONE] * 6, f"tracks: {tracks}; {outcome.problem}")
    numbers = outcome.number
    return (
        label,
        _count(numbers("points")),
        duration(numbers("forward_seconds")),
        duration(outcome.find("step_seconds")),
        size(_memory(outcomes, name, "theirs")),
        _times(numbers("forward_over_vicinal")),
        _times(outcome.find("step_over_vicinal")),
        ", ".join((*_notes(outcome), *_our_memory(outcomes, name))),
    )


def _notes(outcome: Outcome) -> Iterator[str]:
    figures = outcome.figures
    if "roundings_apart" not in figures:
        yield "another computation"
    if "keys_per_query" in figures:
        keys, neighbors = outcome.number("keys_per_query"), outcome.number("neighbors")
        yield f"{keys:.0f} keys per query beside {neighbors:.1f} neighbors"
    if "mask_seconds" in figures:
        yield f"mask {duration(outcome.number('mask_seconds'))} apart"
        yield f"{outcome.number('blocks_skipped_percent'):.0f} % of blocks skipped"
    if "no_step" in figures:
        yield f"no training: {figures['no_step']}"


def _our_memory(outcomes: Outcomes, name: str) -> Iterator[str]:
    ours = _memory(outcomes, name, "ours")
    if ours is not None:
        yield f"vicinal takes {size(ours)}"


def _memory(outcomes: Outcomes, name: str, side: str) -> float | None:
    """Bytes of one side of a contest: its own figure, or that of a case of its own."""
    apart = outcomes.get(f"memory-of-{name}/{side}", Outcome())
    return outcomes[name].find(f"peak_bytes {side}") or apart.find("peak_bytes")


def scenes(outcomes: Outcomes) -> str:
    header = ("", "points", "neighbors", "forward", "step", "forward", "step", "memory / query")
    units = ("", "", "", "", "", "/ floor", "/ floor", "")
    rows = []
    for name, outcome in outcomes.items():
        if not name.startswith("compute/"):
            continue
        scene = name.removeprefix("compute/")
        if outcome.problem is not None:
            rows.append((scene, *[NONE] * 6, outcome.problem))
            continue
        numbers = outcome.number
        memory = outcomes.get(f"memory/{scene}", Outcome())
        rows.append(
            (
                scene,
                _count(numbers("points")),
                f"{numbers('neighbors'):.1f}",
                duration(numbers("forward_seconds")),
                duration(outcome.find("step_seconds")),
                f"{numbers('forward_over_floor'):.2f}",
                f"{numbers('step_over_floor'):.2f}",
                _times(memory.find("peak_over_query")),
            )
        )
    return table(header, [units, *rows]) if rows else ""


def scaling(outcomes: Outcomes, case: str) -> str:
    outcome = outcomes.get(case, Outcome())
    if not outcome.figures:
        return plain(outcomes, case)
    rows: list[tuple[str, ...]] = []
    memories = [outcomes[name] for name in outcomes if name.startswith("scaling/memory/")]
    peaks = {memory.find("points"): memory.find("peak_bytes") for memory in memories}
    index = 0
    while (points := outcome.find(f"points_{index}")) is not None:
        forward = outcome.number(f"forward_seconds_{index}")
        step = outcome.number(f"step_seconds_{index}")
        rows.append(
            (
                _count(points),
                f"{outcome.number(f'neighbors_{index}'):.1f}",
                f"{1e6 * forward / points:.2f}",
                f"{1e6 * step / points:.2f}",
                size(peaks.get(points)),
            )
        )
        index += 1
    for label, kind in (("growth", ""), ("of the GEMM floor", "floor_")):
        ratios = (outcome.find(f"{kind}{figure}_growth") for figure in ("forward", "step"))
        rows.append((label, "", *(NONE if x is None else f"{x:.2f}" for x in ratios), ""))
    header = ("points", "neighbors", "forward, us", "step, us", "memory")
    units = ("", "", "per query", "per query", "of step")
    return table(header, [units, *rows]) if rows else ""


def stages(outcomes: Outcomes) -> str:
    found = {
        name.removeprefix("stages/"): outcome
        for name, outcome in outcomes.items()
        if name.startswith("stages/") and outcome.figures
    }
    columns = [(scene, kind) for scene in found for kind in ("forward", "step")]
    rows = []
    for stage in (*STAGES, "whole block", FLOOR):
        cells = (found[scene].find(f"{kind}_seconds {stage}") for scene, kind in columns)
        rows.append((stage, *(NONE if cell is None else f"{1e3 * cell:.1f}" for cell in cells)))
    header = ("", *(scene if kind == "forward" else "" for scene, kind in columns))
    return table(header, [("", *(kind for _, kind in columns)), *rows]) if found else ""


def precision(outcomes: Outcomes) -> str:
    outcome = outcomes.get("precision", Outcome())
    if not outcome.figures:
        return plain(outcomes, "precision")
    rows = [
        (
            dtype,
            f"{outcome.number(f'{dtype}_error'):.2g}",
            f"{outcome.number(f'{dtype}_error_over_reference'):.3f}",
        )
        for dtype in DTYPES
    ]
    return table(("", "error", "ratio"), rows)


def plain(outcomes: Outcomes, case: str) -> str:
    """A case's figures as they are, or why there are none."""
    outcome = outcomes.get(case)
    if outcome is None:
        return ""
    if outcome.problem is not None:
        return f"  {outcome.problem}"
    rows = [(name.replace("_", " "), f"{value:,.4g}") for name, value in outcome.figures.items()]
    return table(("", ""), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need; the first and the last to the left, numbers to the right."""
    lines = [header, *rows] if any(header) else list(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    last = len(widths) - 1
    return "\n".join(
        "  "
        + "  ".join(
            cell.ljust(width) if index in (0, last) and last > 1 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def size(count: float | None) -> str:
    """Of bytes."""
    return NONE if count is None else f"{count / 2**20:,.0f} MiB"


def _times(ratio: float | None) -> str:
    return NONE if ratio is None else f"{ratio:.3g}"


def _count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"
