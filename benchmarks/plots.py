"""The pictures of a study."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.cases.stages import FLOOR, STAGES
from benchmarks.goals import GOALS, Goal
from benchmarks.outcome import Outcome
from benchmarks.peers import PEERS
from benchmarks.report import Outcomes, duration

WHOLE = "#b3243c"
FORWARD, STEP, MEMORY = "#0f7c8a", "#d9822b", "#5b5f97"
INK, FAINT = "#2b303b", "#9aa3ad"
STAGE_COLORS = ("#2b303b", "#c44e52", "#e0b252", "#c98a1b", "#0f7c8a")
DPI = 160

Paint = Callable[[Outcomes], Figure | None]


def draw(outcomes: Outcomes, stem: Path, goals: Sequence[Goal] = GOALS) -> Iterator[Path]:
    """Saves a picture for each that the outcomes suffice for, as ``stem`` and its subject."""
    paints: dict[str, Paint] = {
        "scaling": _scaling,
        "peers": _peers,
        "floor": partial(_floor, goals=goals),
    }
    return save_each(paints, outcomes, stem)


def save_each(paints: Mapping[str, Paint], outcomes: Outcomes, stem: Path) -> Iterator[Path]:
    """Saves what each of ``paints``, by subject, makes of the outcomes, if anything."""
    for subject, paint in paints.items():
        figure = paint(outcomes)
        if figure is not None:
            path = stem.with_name(f"{stem.name}-{subject}.png")
            figure.savefig(path, dpi=DPI)
            yield path


def _scaling(outcomes: Outcomes) -> Figure | None:
    """Time and memory over the number of points, with the peers that were measured."""
    outcome = outcomes.get("scaling/time")
    memories = [outcomes[name] for name in outcomes if name.startswith("scaling/memory/")]
    memories = [memory for memory in memories if memory.figures]
    if outcome is None or not outcome.figures or not memories:
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
    _block_peers(outcomes, times, memory)
    for axes, label in ((times, "time (s)"), (memory, "peak memory (GiB)")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("points, each a query")
        axes.set_ylabel(label)
        axes.set_xticks(points, [f"{n:,.0f}" for n in points])
        axes.xaxis.set_minor_formatter(NullFormatter())
        tidy(axes)
    legend_below(figure, times, memory, columns=3)
    figure.suptitle("One block, planning included: tracks in 2-D, growing at one density", size=11)
    return figure


def _block_peers(outcomes: Outcomes, times: Axes, memory: Axes) -> None:
    """The training steps of peers that compute the whole block, wherever they could."""
    for peer, marker in (("gathering", "s"), ("pairs-block", "D")):
        names = [n for n in outcomes if n.startswith(f"peers/{peer}/") and outcomes[n].figures]
        steps = [(outcomes[n].number("points"), outcomes[n].number("step_seconds")) for n in names]
        peaks = [outcomes.get(f"memory-of-{n}/theirs", Outcome()).find("peak_bytes") for n in names]
        label = f"{PEERS[peer].label}, training step"
        for (points, seconds), peak in zip(steps, peaks, strict=True):
            times.plot(points, seconds, marker, color=FAINT, mec=INK, label=label)
            if peak is not None:
                memory.plot(points, peak / 2**30, marker, color=FAINT, mec=INK, label=label)


def _peers(outcomes: Outcomes) -> Figure | None:
    """Times of the peers over the library's, a bar each, as they were run."""
    found = [
        (name, outcome)
        for name, outcome in outcomes.items()
        if name.startswith("peers/") and outcome.figures
    ]
    if not found:
        return None
    figure = Figure(figsize=(9, 0.9 + 0.42 * len(found)), layout="constrained")
    axes = figure.subplots()
    labels = []
    for row, (name, outcome) in enumerate(reversed(found)):
        note = "" if "roundings_apart" in outcome.figures else " *"
        label = PEERS[name.split("/")[1]].label
        labels.append(f"{label}{note}\n{outcome.number('points'):,.0f} points")
        for kind, color, offset in (("forward", FORWARD, 0.2), ("step", STEP, -0.2)):
            ratio = outcome.find(f"{kind}_over_vicinal")
            if ratio is None:
                axes.text(1.05, row + offset, "no training step", va="center", size=7, color=FAINT)
                continue
            axes.barh(row + offset, ratio - 1, 0.36, left=1, color=color)
            text = f" {ratio:.3g} x, {duration(outcome.number(f'{kind}_seconds'))}"
            axes.text(max(ratio, 1), row + offset, text, va="center", size=7)
    axes.set_xscale("log")
    axes.set_xlim(left=min(1, *axes.get_xlim()), right=5 * axes.get_xlim()[1])
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks(range(len(found)), labels, fontsize=8)
    axes.set_xlabel("time over that of vicinal at the same work (* another computation)")
    axes.set_ylim(-0.6, len(found) - 0.4)
    handles = [Patch(color=FORWARD, label="forward"), Patch(color=STEP, label="training step")]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    tidy(axes)
    axes.grid(axis="y", visible=False)
    return figure


def _floor(outcomes: Outcomes, goals: Sequence[Goal]) -> Figure | None:
    """The block over its GEMM floor, stage by stage."""
    scenes = [
        name.removeprefix("stages/")
        for name, outcome in outcomes.items()
        if name.startswith("stages/") and outcome.figures
    ]
    if not scenes:
        return None
    figure = Figure(figsize=(9, 1.4 + 0.8 * len(scenes)), layout="constrained")
    axes = figure.subplots()
    labels = []
    rows = [(scene, kind) for kind in ("step", "forward") for scene in reversed(scenes)]
    for row, (scene, kind) in enumerate(rows):
        _stack(axes, row, outcomes, scene, kind)
        _marks(axes, row, goals, scene, kind)
        labels.append(f"{scene}, {'training step' if kind == 'step' else 'forward'}")
    axes.axvline(1, color=FAINT, linewidth=1.5, linestyle="--", label="GEMM floor")
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlim(left=0)
    axes.set_xlabel("time over that of the block's dense projections alone (the GEMM floor)")
    legend_below(figure, axes, columns=5)
    tidy(axes)
    axes.grid(axis="y", visible=False)
    return figure


def _stack(axes: Axes, row: int, outcomes: Outcomes, scene: str, kind: str) -> None:
    stages = outcomes[f"stages/{scene}"]
    floor = stages.number(f"{kind}_seconds {FLOOR}")
    left = 0.0
    for stage, color in zip(STAGES, STAGE_COLORS, strict=True):
        width = stages.number(f"{kind}_seconds {stage}") / floor
        axes.barh(row, width, 0.6, left=left, color=color, label=stage)
        left += width
    compute = outcomes.get(f"compute/{scene}", Outcome())
    whole = compute.find(f"{kind}_over_floor")
    if whole is not None:
        axes.plot(whole, row, "|", color=WHOLE, ms=20, mew=2.5, label="whole block, measured")


def _marks(axes: Axes, row: int, goals: Sequence[Goal], scene: str, kind: str) -> None:
    for goal in goals:
        if (goal.case, goal.figure) == (f"compute/{scene}", f"{kind}_over_floor"):
            axes.plot(goal.bar, row + 0.38, "v", color=INK, ms=6, label="bar")
            axes.plot(goal.aim, row + 0.38, "v", color="white", mec=INK, ms=6, label="aim")


def legend_below(figure: Figure, *all_axes: Axes, columns: int) -> None:
    """One legend for all, each label once."""
    found = [axes.get_legend_handles_labels() for axes in all_axes]
    unique = {
        name: handle
        for handles, names in found
        for handle, name in zip(handles, names, strict=True)
    }
    figure.legend(
        list(unique.values()),
        list(unique),
        loc="outside lower center",
        ncols=columns,
        markerscale=0.7,
        frameon=False,
        fontsize=8,
    )


def tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e9ed", linewidth=0.8)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
