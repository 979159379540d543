"""The plots of a study."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.baselines import BASELINES
from benchmarks.cases.stages import FLOOR, STAGES
from benchmarks.goals import Goal
from benchmarks.outcome import Outcome
from benchmarks.report import Outcomes, text_of

WHOLE = "#b3243c"
FORWARD, STEP, MEMORY = "#0f7c8a", "#d9822b", "#5b5f97"
INK, FAINT = "#2b303b", "#9aa3ad"
STAGE_COLORS = (INK, "#c44e52", "#e0b252", "#c98a1b", FORWARD)
DPI = 160


def draw(outcomes: Outcomes, stem: Path, goals: Sequence[Goal]) -> Iterator[Path]:
    """Saves each plot that the outcomes suffice for, as ``stem`` and its subject."""
    plots: dict[str, Callable[[Outcomes], Figure | None]] = {
        "scaling": _scaling,
        "baselines": _baselines,
        "floor": partial(_floor, goals=goals),
    }
    for subject, plot in plots.items():
        figure = plot(outcomes)
        if figure is not None:
            path = stem.with_name(f"{stem.name}-{subject}.png")
            figure.savefig(path, dpi=DPI)
            yield path


def _found(outcomes: Outcomes, prefix: str) -> dict[str, Outcome]:
    """Those that have figures, by what follows ``prefix`` in their names."""
    return {
        name.removeprefix(prefix): outcome
        for name, outcome in outcomes.items()
        if name.startswith(prefix) and outcome.figures
    }


def _scaling(outcomes: Outcomes) -> Figure | None:
    """Time and memory over the number of points, with the baselines that compute a whole block."""
    outcome = outcomes.get("scaling/time", Outcome())
    memories = _found(outcomes, "scaling/memory/").values()
    if not outcome.figures or not memories:
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    times, memory = figure.subplots(1, 2)
    indices = range(sum(name.startswith("points_") for name in outcome.figures))
    points = [outcome.number(f"points_{index}") for index in indices]
    for kind, color, label in (("step", STEP, "training step"), ("forward", FORWARD, "forward")):
        seconds = [outcome.number(f"{kind}_seconds_{index}") for index in indices]
        times.plot(points, seconds, "o-", color=color, label=f"vicinal, {label}")
    sizes = [found.number("points") for found in memories]
    peaks = [found.number("peak_bytes") / 2**30 for found in memories]
    memory.plot(sizes, peaks, "o-", color=MEMORY, label="vicinal, memory of a training step")
    for name, marker in (("gathering", "s"), ("pairs-block", "D")):
        style = {"color": FAINT, "mec": INK, "label": f"{BASELINES[name][0]}, training step"}
        for found in _found(outcomes, f"baselines/{name}/").values():
            times.plot(found.number("points"), found.number("step_seconds"), marker, **style)
            peak = (found.find("peak_bytes") or float("nan")) / 2**30
            memory.plot(found.number("points"), peak, marker, **style)
    for axes, label in ((times, "time (s)"), (memory, "peak memory (GiB)")):
        axes.set(xscale="log", yscale="log", xlabel="points, each a query", ylabel=label)
        axes.set_xticks(points, [f"{n:,.0f}" for n in points])
        axes.xaxis.set_minor_formatter(NullFormatter())
    _finish(figure, times, memory, columns=3)
    figure.suptitle("One block, planning included: tracks in 2-D, growing at one density", size=11)
    return figure


def _baselines(outcomes: Outcomes) -> Figure | None:
    """Time of each baseline over the library's, a bar each, as they were run."""
    found = list(_found(outcomes, "baselines/").items())[::-1]
    if not found:
        return None
    figure = Figure(figsize=(9, 0.9 + 0.42 * len(found)), layout="constrained")
    axes, labels = figure.subplots(), []
    for row, (name, outcome) in enumerate(found):
        note = "" if "roundings_apart" in outcome.figures else " *"
        label = BASELINES[name.split("/")[0]][0]
        labels.append(f"{label}{note}\n{outcome.number('points'):,.0f} points")
        for kind, color, offset in (("forward", FORWARD, 0.2), ("step", STEP, -0.2)):
            ratio = outcome.find(f"{kind}_over_vicinal")
            text = "no training step"
            if ratio is not None:
                legend = {"forward": "forward", "step": "training step"}[kind]
                axes.barh(row + offset, ratio - 1, 0.36, left=1, color=color, label=legend)
                seconds = f"{kind}_seconds"
                text = f" {ratio:.3g} x, {text_of(seconds, outcome.number(seconds))}"
            axes.text(max(ratio or 1, 1), row + offset, text, va="center", size=7)
    axes.set(xscale="log", ylim=(-0.6, len(found) - 0.4))
    axes.set(xlim=(min(1, axes.get_xlim()[0]), 5 * axes.get_xlim()[1]))
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(range(len(found)), labels, fontsize=8)
    axes.set_xlabel("time over that of vicinal at the same work (* computes something else)")
    _finish(figure, axes, columns=2, grid="x")
    return figure


def _floor(outcomes: Outcomes, goals: Sequence[Goal]) -> Figure | None:
    """The block over its GEMM floor, stage by stage."""
    scenes = _found(outcomes, "stages/")
    if not scenes:
        return None
    figure = Figure(figsize=(9, 1.4 + 0.8 * len(scenes)), layout="constrained")
    axes, labels = figure.subplots(), []
    rows = [(scene, kind) for kind in ("step", "forward") for scene in reversed(scenes)]
    for row, (scene, kind) in enumerate(rows):
        seconds = {
            name: scenes[scene].number(f"{kind}_seconds {name}") for name in (*STAGES, FLOOR)
        }
        left = 0.0
        for stage, color in zip(STAGES, STAGE_COLORS, strict=True):
            width = seconds[stage] / seconds[FLOOR]
            axes.barh(row, width, 0.6, left=left, color=color, label=stage)
            left += width
        whole = outcomes.get(f"compute/{scene}", Outcome()).find(f"{kind}_over_floor")
        if whole is not None:
            axes.plot(whole, row, "|", color=WHOLE, ms=20, mew=2.5, label="whole block, measured")
        for goal in goals:
            if (goal.case, goal.figure) == (f"compute/{scene}", f"{kind}_over_floor"):
                axes.plot(goal.bar, row + 0.38, "v", color=INK, ms=6, label="bar")
                axes.plot(goal.aim, row + 0.38, "v", color="white", mec=INK, ms=6, label="aim")
        labels.append(f"{scene}, {'training step' if kind == 'step' else 'forward'}")
    axes.axvline(1, color=FAINT, linewidth=1.5, linestyle="--", label="GEMM floor")
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set(xlim=(0, None), ylim=(-0.6, len(rows) - 0.4))
    axes.set_xlabel("time over that of the block's dense projections alone (the GEMM floor)")
    _finish(figure, axes, columns=5, grid="x")
    return figure


def _finish(figure: Figure, *all_axes: Axes, columns: int, grid: Any = "both") -> None:
    """The same look for all axes, and one legend below them, with each label once."""
    unique: dict[str, Any] = {}
    for axes in all_axes:
        unique |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, color="#e6e9ed", linewidth=0.8)
        axes.set_axisbelow(True)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    look: dict[str, Any] = {"ncols": columns, "frameon": False, "markerscale": 0.7, "fontsize": 8}
    figure.legend(list(unique.values()), list(unique), loc="outside lower center", **look)
