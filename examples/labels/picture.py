"""A picture of scenes: true labels beside predicted ones, wrong ones marked."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from examples.labels.scenes import Panel

WRONG = "#f2a3b0"  # behind points with a wrong label
# They differ in hue or lightness; none of them is gray or near the color of wrong labels.
COLORS = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#6a3d9a"),
    *("#8c564b", "#b5bd00", "#d55e00", "#17becf", "#1b2a6b", "#7f7f00"),
    *("#a6cee3", "#00441b", "#c51b7d", "#b2df8a", "#fdbf6f", "#4d0000", "#cab2d6"),
)
OTHER = "#9aa2ad"  # the color of noise and of fragments
WIDTH, HEIGHT = 8.0, 8.4  # of a panel, in inches
DOT = 2.5  # area of a point, in square points


def draw_labels(panels: Sequence[Panel], classes: Sequence[str], other: int) -> Figure:
    """Draws a row per scene: true labels on the left, predicted ones on the right.

    Args:
        panels: at least one.
        classes: names of the classes.
        other: the class that is drawn in gray.
    """
    colors = [_color(number, other) for number in range(len(classes))]
    figure = Figure(figsize=(2 * WIDTH, HEIGHT * len(panels) + 0.6), layout="constrained")
    rows = figure.subplots(len(panels), 2, squeeze=False)
    for (left, right), panel in zip(rows, panels, strict=True):
        wrong = panel.predicted != panel.labels
        _scatter(left, panel, panel.labels, colors)
        left.set_title(f"{panel.title}: true labels", fontsize=14)
        right.scatter(panel.x[wrong], panel.y[wrong], s=12 * DOT, c=WRONG, linewidths=0)
        _scatter(right, panel, panel.predicted, colors)
        share = 1 - float(wrong.double().mean()) if len(wrong) else 1.0
        right.set_title(f"predicted: {share:.1%} right", fontsize=14)
    handles = [
        Line2D([], [], marker="o", color=color, linestyle="none", label=name)
        for name, color in zip(classes, colors, strict=True)
    ]
    handles.append(
        Line2D([], [], marker="o", color=WRONG, linestyle="none", markersize=12, label="wrong")
    )
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), _columns_of_legend(classes)),
        frameon=False,
        fontsize=13,
    )
    return figure


def _columns_of_legend(classes: Sequence[str]) -> int:
    """How many names fit side by side, by the longest one."""
    return max(int(2 * WIDTH / (0.1 * max(map(len, classes)) + 0.5)), 1)


def _color(number: int, other: int) -> str:
    """The color of a class."""
    if number == other:
        return OTHER
    return COLORS[number % len(COLORS)]


def _scatter(ax: Axes, panel: Panel, labels: Tensor, colors: Sequence[str]) -> None:
    ax.scatter(panel.x, panel.y, s=DOT, c=[colors[label] for label in labels.tolist()])
    ax.set_aspect("equal", adjustable="datalim")
    ax.set_xticks([])
    ax.set_yticks([])
