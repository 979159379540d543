"""The plots of a study."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.baselines import BASELINES
from benchmarks.cases.block import FLOOR, STAGES
from benchmarks.goals import Goal
from benchmarks.outcome import Outcome
from benchmarks.report import Outcomes, text_of

WHOLE = "#b3243c"
FORWARD, STEP, MEMORY = "#0f7c8a", "#d9822b", "#5b5f97"
INK, FAINT = "#2b303b", "#9aa3ad"
STAGE_COLORS = (INK, "#c44e52", "#e0b252", "#c98a1b", FORWARD)
KINDS = {"forward": ("forward", FORWARD), "step": ("training step", STEP)}


def draw(outcomes: Outcomes, stem: Path, goals: Sequence[Goal]) -> Iterator[Path]:
    """Saves each plot that the outcomes suffice for, as ``stem`` and its subject."""
    scaling, baselines, floor = _scaling(outcomes), _baselines(outcomes), _floor(outcomes, goals)
    for subject, figure in (("scaling", scaling), ("baselines", baselines), ("floor", floor)):
        if figure is not None:
            path = stem.with_name(f"{stem.name}-{subject}.png")
            figure.savefig(path, dpi=160)
            yield path


def found_in(outcomes: Outcomes, prefix: str) -> dict[str, Outcome]:
    """Those that have figures, by what follows ``prefix`` in their names."""
    names = [name for name in outcomes if name.startswith(prefix) and outcomes[name].figures]
    return {name.removeprefix(prefix): outcomes[name] for name in names}


def _scaling(outcomes: Outcomes) -> Figure | None:
    """Time and memory over the number of points, with the baselines that compute a whole block."""
    outcome = outcomes.get("scaling/time", Outcome())
    memories = found_in(outcomes, "scaling/memory/").values()
    if not outcome.figures or not memories:
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    times, memory = figure.subplots(1, 2)
    indices = range(sum(name.startswith("points_") for name in outcome.figures))
    points = [outcome.number(f"points_{index}") for index in indices]
    for kind, (label, color) in KINDS.items():
        seconds = [outcome.number(f"{kind}_seconds_{index}") for index in indices]
        times.plot(points, seconds, "o-", color=color, label=f"vicinal, {label}")
    peaks = [found.number("peak_bytes") / 2**30 for found in memories]
    sizes = [found.number("points") for found in memories]
    memory.plot(sizes, peaks, "o-", color=MEMORY, label="vicinal, memory of a training step")
    for axes, name, unit, label in (
        (times, "step_seconds", 1, "time (s)"),
        (memory, "peak_bytes", 2**30, "peak memory (GiB)"),
    ):
        for baseline, marker in (("gathering", "s"), ("pairs-block", "D")):
            label = f"{BASELINES[baseline][0]}, training step"
            style: dict[str, Any] = {"color": FAINT, "mec": INK, "label": label}
            for found in found_in(outcomes, f"baselines/{baseline}/").values():
                axes.plot(found.number("points"), found.number(name) / unit, marker, **style)
        axes.set(xscale="log", yscale="log", xlabel="points, each a query", ylabel=label)
        axes.set_xticks(points, [f"{n:,.0f}" for n in points])
        axes.xaxis.set_minor_formatter(NullFormatter())
    finish(figure, columns=3)
    figure.suptitle("One block, planning included: tracks in 2-D, growing at one density", size=11)
    return figure


def _baselines(outcomes: Outcomes) -> Figure | None:
    """Time of each baseline over the library's, a bar each, as they were run."""
    found = list(found_in(outcomes, "baselines/").items())[::-1]
    if not found:
        return None
    labels = []
    for name, outcome in found:
        note = "" if "roundings_apart" in outcome.figures else " *"
        label = BASELINES[name.split("/")[0]][0]
        labels.append(f"{label}{note}\n{outcome.number('points'):,.0f} points")
    xlabel = "time over that of vicinal at the same work (* computes something else)"
    figure, axes = _rows(labels, 0.9 + 0.42 * len(found), xlabel)
    for row, (_, outcome) in enumerate(found):
        for (kind, (label, color)), y in zip(KINDS.items(), (row + 0.2, row - 0.2), strict=True):
            ratio = outcome.find(f"{kind}_over_vicinal")
            text = "no training step"
            if ratio is not None:
                axes.barh(y, ratio - 1, 0.36, left=1, color=color, label=label)
                seconds = f"{kind}_seconds"
                text = f" {ratio:.3g} x, {text_of(seconds, outcome.number(seconds))}"
            axes.text(max(ratio or 1, 1), y, text, va="center", size=7)
    axes.set(xscale="log")
    axes.set(xlim=(min(1, axes.get_xlim()[0]), 5 * axes.get_xlim()[1]))
    axes.axvline(1, color=INK, linewidth=1)
    finish(figure, columns=2, grid="x")
    return figure


def _floor(outcomes: Outcomes, goals: Sequence[Goal]) -> Figure | None:
    """The block over its GEMM floor, stage by stage."""
    scenes = found_in(outcomes, "stages/")
    if not scenes:
        return None
    rows = [(scene, kind) for kind in ("step", "forward") for scene in reversed(scenes)]
    labels = [f"{scene}, {KINDS[kind][0]}" for scene, kind in rows]
    xlabel = "time over that of the block's dense projections alone (the GEMM floor)"
    figure, axes = _rows(labels, 1.4 + 0.8 * len(scenes), xlabel)
    for row, (scene, kind) in enumerate(rows):
        floor, left = scenes[scene].number(f"{kind}_seconds {FLOOR}"), 0.0
        for stage, color in zip(STAGES, STAGE_COLORS, strict=True):
            width = scenes[scene].number(f"{kind}_seconds {stage}") / floor
            axes.barh(row, width, 0.6, left=left, color=color, label=stage)
            left += width
        whole = outcomes.get(f"compute/{scene}", Outcome()).find(f"{kind}_over_floor")
        if whole is not None:
            axes.plot(whole, row, "|", color=WHOLE, ms=20, mew=2.5, label="whole block, measured")
        for goal in goals:
            if (goal.case, goal.figure) == (f"compute/{scene}", f"{kind}_over_floor"):
                axes.plot(goal.bar, row + 0.38, "v", color=INK, ms=6, label="bar")
                axes.plot(goal.aim, row + 0.38, "v", color="white", mec=INK, ms=6, label="aim")
    axes.axvline(1, color=FAINT, linewidth=1.5, linestyle="--", label="GEMM floor")
    axes.set(xlim=(0, None))
    finish(figure, columns=5, grid="x")
    return figure


def _rows(labels: Sequence[str], height: float, xlabel: str) -> tuple[Figure, Axes]:
    """A figure for a row of horizontal bars per label, from the bottom."""
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    axes.set(ylim=(-0.6, len(labels) - 0.4), xlabel=xlabel)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    return figure, axes


def finish(figure: Figure, columns: int, grid: Any = "both") -> None:
    """The same look for all axes, and one legend below them, with each label once."""
    unique: dict[str, Any] = {}
    for axes in figure.axes:
        unique |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, color="#e6e9ed", linewidth=0.8)
        axes.set_axisbelow(True)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    look: dict[str, Any] = {"ncols": columns, "frameon": False, "markerscale": 0.7, "fontsize": 8}
    figure.legend(list(unique.values()), list(unique), loc="outside lower center", **look)
