"""A picture of what one query attends to."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from examples.canvas import Canvas
from examples.encoder import BLOCKS, STRIDES, WINDOWS, Encoder
from vicinal import FeaturePyramid, NeighborhoodPlan

INK, WRONG, CELL, EDGE = "#2b303b", "#d9822b", "#dfe3e8", "#c3c9d1"
FRAME, QUERY = "#0f7c8a", "#b3243c"
WEIGHTS = LinearSegmentedColormap.from_list("weights", ["#d5edf0", "#5fb0ba", "#14697a", "#05242e"])
MARGINS = (4, 3, 3, 2)  # cells of each level drawn around its window
CENTRAL = 64  # the query lies within so many cells of the canvas's middle, along each axis


def save_figure(
    path: Path,
    canvas: Canvas,
    encoder: Encoder,
    pyramid: FeaturePyramid,
    plan: NeighborhoodPlan,
    logits: Tensor,
) -> None:
    """Draws what the encoder read, and the windows and weights of a query in its last block."""
    query = _query(pyramid, plan)
    with torch.no_grad():
        attended = encoder.last_weights(pyramid, plan, torch.tensor([query]))
    weights = torch.full((len(pyramid),), torch.nan)
    weights[attended.points] = attended.weights.mean(1)

    figure = Figure(figsize=(12, 7), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.12, 1))[0]
    n_digits, (height, width) = int(canvas.numbers.max()) + 1, canvas.ink.shape
    left.suptitle(f"{n_digits} handwritten digits on {height} × {width} cells")
    right.suptitle(
        f"What one query (red dot) attends to: the {len(attended.points)} points near it"
    )
    _draw_canvas(left.subplots(), canvas, logits, pyramid.cells[query])
    # The square root of the weight, or the many small ones would all look the same.
    norm = PowerNorm(0.5, 0, float(attended.weights.mean(1).max()))
    axes = right.subplots(2, 2)
    for level, ax in enumerate(axes.flat):
        _draw_level(ax, level, canvas, pyramid, weights, query, norm)
    bar = right.colorbar(
        ScalarMappable(norm, WEIGHTS), ax=axes, location="bottom", aspect=40, ticks=MaxNLocator(5)
    )
    bar.set_label("attention weight (last block, mean over heads); grey: outside the window")
    bar.outline.set_visible(False)
    figure.savefig(path, dpi=150)


def _query(pyramid: FeaturePyramid, plan: NeighborhoodPlan) -> int:
    """Of the stroke pixels in the middle of the canvas, the one that sees the most points."""
    middle = torch.tensor(pyramid.level_shapes[0]) / 2
    central = ((pyramid.cells - middle).abs() < CENTRAL).all(1) & (pyramid.levels == 0)
    return int(plan.counts().masked_fill(~central, -1).argmax())


def _draw_canvas(ax: Axes, canvas: Canvas, logits: Tensor, at: Tensor) -> None:
    right = logits.argmax(1) == canvas.at_ink(canvas.labels)
    colors = torch.where(right[:, None], torch.tensor(to_rgb(INK)), torch.tensor(to_rgb(WRONG)))
    image = torch.ones(*canvas.ink.shape, 3)
    ink = canvas.at_ink(canvas.ink)[:, None].sqrt()
    image[canvas.ink > 0] = ink * colors + (1 - ink)
    ax.imshow(image, extent=_extent(canvas), interpolation="antialiased")
    for level in range(len(STRIDES)):
        _frame(ax, level, at)
    _plain(ax)
    ax.set_title(f"none seen in training, as an encoder of {BLOCKS} blocks reads them", fontsize=11)
    ax.legend(
        handles=[
            Patch(color=INK, label=f"stroke pixels read right ({right.float().mean():.0%})"),
            Patch(color=WRONG, label="read wrong"),
            Patch(fill=False, edgecolor=FRAME, linewidth=1.8, label="windows of one query"),
        ],
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        ncols=3,
        frameon=False,
        handlelength=1,
        handleheight=1,
        columnspacing=1.5,
    )


def _draw_level(
    ax: Axes,
    level: int,
    canvas: Canvas,
    pyramid: FeaturePyramid,
    weights: Tensor,
    query: int,
    norm: PowerNorm,
) -> None:
    stride, width = STRIDES[level], WINDOWS[level]
    at, reach = pyramid.cells[query], width // 2 + MARGINS[level]
    steps_away = (pyramid.cells - at // stride).abs().amax(1)
    shown = ((pyramid.levels == level) & (steps_away <= reach)).nonzero().squeeze(1)
    squares = [
        Rectangle((x, y), stride, stride) for y, x in (stride * pyramid.cells[shown]).tolist()
    ]
    colors = [CELL if math.isnan(w) else WEIGHTS(norm(w)) for w in weights[shown].tolist()]
    ax.add_collection(PatchCollection(squares, facecolor=colors, edgecolor="white", linewidth=0.8))
    if level:  # on level 0 the cells are the strokes
        ink = torch.tensor(to_rgb(INK)).expand(*canvas.ink.shape, 3)
        ink = torch.cat((ink, 0.35 * canvas.ink[..., None]), 2)
        ax.imshow(ink, extent=_extent(canvas), zorder=3)
    _frame(ax, level, at)
    ax.plot(*(at.flip(0) + 0.5), "o", color=QUERY, markersize=7, markeredgecolor="white", zorder=5)

    (top, left), side = (stride * (at // stride - reach)).tolist(), stride * (2 * reach + 1)
    ax.set_xlim(left, left + side)
    ax.set_ylim(top + side, top)
    seen = weights[shown][~weights[shown].isnan()]
    ax.set_title(
        f"stride {stride}, window {width} × {width}\n"
        f"{len(seen)} points, {float(seen.sum()):.0%} of the weight",
        fontsize=11,
    )
    _plain(ax)


def _frame(ax: Axes, level: int, at: Tensor) -> None:
    """The window on ``level`` of a query in the cell ``at``."""
    stride, width = STRIDES[level], WINDOWS[level]
    row, column = (stride * (at // stride - width // 2)).tolist()
    side = stride * width
    ax.add_patch(
        Rectangle((column, row), side, side, fill=False, edgecolor=FRAME, linewidth=1.8, zorder=4)
    )


def _extent(canvas: Canvas) -> tuple[float, float, float, float]:
    """Where imshow puts the canvas: a cell is a unit square, rows run down."""
    height, width = canvas.ink.shape
    return (0, width, height, 0)


def _plain(ax: Axes) -> None:
    ax.set_aspect("equal")
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_color(EDGE)
