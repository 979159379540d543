"""The pictures of the study on a GPU: those of `benchmarks.plots`, and the tuning of kernels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import plots
from benchmarks.gpu.goals import GOALS
from benchmarks.gpu.report import PASSES, SETTING
from benchmarks.outcome import Outcome
from benchmarks.report import Outcomes

MARKERS = ("o", "s", "D", "^")
COLORS = (plots.INK, plots.FORWARD, plots.STEP, plots.MEMORY)


def draw(outcomes: Outcomes, stem: Path) -> Iterator[Path]:
    """Saves a picture for each that the outcomes suffice for, as ``stem`` and its subject."""
    yield from plots.draw(outcomes, stem, GOALS)
    yield from plots.save_each({"sweep": _sweep}, outcomes, stem)


def _sweep(outcomes: Outcomes) -> Figure | None:
    """Time of the attention's passes over columns of a block, a line for each tile and warps."""
    found = {
        name.removeprefix("sweep/"): outcome
        for name, outcome in outcomes.items()
        if name.startswith("sweep/") and outcome.figures
    }
    if not found:
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    both = figure.subplots(1, 2)
    for axes, kind in zip(both, PASSES, strict=True):
        for (tile, outcome), color in zip(found.items(), COLORS, strict=False):
            _lines(axes, kind, tile, outcome, color)
        axes.set_title(kind, size=10)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("columns of a block")
        axes.set_ylabel("time (ms)")
        axes.set_ylim(bottom=0)
        plots.tidy(axes)
    plots.legend_below(figure, *both, columns=4)
    return figure


def _lines(axes: Axes, kind: str, tile: str, outcome: Outcome, color: str) -> None:
    settings = [match.groups() for match in map(SETTING.fullmatch, outcome.figures) if match]
    warps = sorted({int(warps) for _, warps in settings})
    for n_warps, marker in zip(warps, MARKERS, strict=False):
        blocks = sorted(int(block) for block, of_block in settings if int(of_block) == n_warps)
        times = [(block, outcome.find(f"{kind}_seconds {block}x{n_warps}")) for block in blocks]
        fits = [(block, 1e3 * seconds) for block, seconds in times if seconds is not None]
        if fits:
            label = f"{tile} rows, {n_warps} warps"
            axes.plot(*zip(*fits, strict=True), marker=marker, color=color, lw=0.8, label=label)
