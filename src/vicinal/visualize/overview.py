"""A whole image with its queries: boxes, labels, and the points that each attends to."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from .._utils.checks import check_range, check_tensor, refuse
from ..pyramid import FeaturePyramid
from ..windows import finest_level
from .flat import find_places, flatten
from .palette import DISTINCT, LIGHT
from .panels import as_array, draw_picture, draw_squares, frame, rectangle
from .record import AttentionRecord, check_record

LARGEST_DOT = 60.0  # the area of the heaviest point, in points squared
_CORNERS = (
    (0, 0, "left", "bottom"),
    (1, 1, "right", "top"),
    (0, 1, "right", "bottom"),
    (1, 0, "left", "top"),
)


def draw_overview(
    pyramid: FeaturePyramid,
    record: AttentionRecord,
    *,
    queries: Tensor | None = None,
    level: int | None = None,
    axis: int | None = None,
    image: Tensor | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws an image with its queries, each with the points it attends to as dots of its colour.

    The area of a dot follows the weight, mean over the heads, relative to the query's largest.
    Labels stand at a corner of their box where they cover no other label, and are left out where
    there is no such corner: give ``ax`` its place in the figure first. Three dimensions are looked
    at along one of them, as in `draw_attention`.

    Args:
        pyramid: the points; those of the finest level are drawn as cells.
        record: queries of one image, and their weights.
        queries: integer ``[m]``, those of the record's queries to draw; None: all.
        level: draws the points of this level only; None: of all levels.
        axis: the one to look along where there are three; None: the first.
        image: as for `draw_attention`.
        ax: where to draw; None: in a new figure, ``ax.figure``.

    Raises:
        ValueError: the record is not of this pyramid, or there are no such queries, level or
            axis.
    """
    check_record(record, pyramid)
    if level is not None and level not in range(pyramid.n_levels):
        refuse("level", f"a level in [0, {pyramid.n_levels}) or None", level)
    if queries is None:
        queries = torch.arange(len(record))
    check_tensor("queries", queries, ("m",), kind="integer")
    check_range("queries", queries, len(record))
    places = find_places(pyramid, record.batch_index, axis)
    flat = flatten(record, places)
    if ax is None:
        ax = Figure((7, 7), layout="constrained").subplots()
    finest = finest_level(pyramid.level_shapes)
    cells = places.squares((places.levels == finest).nonzero().squeeze(1))
    draw_squares(ax, cells, facecolor=LIGHT.cell, zorder=1)
    draw_picture(ax, as_array(image), places)
    frame(
        ax,
        torch.tensor([[0, 0], places.full_shape]),
        one_row=len(places.projection.axes) == 1,
    )
    for query in queries.tolist():
        color = DISTINCT[query % len(DISTINCT)]
        seen, weights = flat.of(query)
        if level is not None:
            here = places.levels[seen] == level
            seen, weights = seen[here], weights[here]
        mean = weights.mean(1)
        areas = LARGEST_DOT * mean / mean.max() if len(mean) and mean.max() > 0 else mean
        columns, rows = places.squares(seen).mean(1).flip(1).t().tolist()
        ax.scatter(
            columns, rows, areas.tolist(), color=color, edgecolor="white", linewidth=0.4,
            alpha=0.8, zorder=4,
        )  # fmt: skip
        if flat.boxes is not None:
            style = {"fill": False, "edgecolor": color, "linewidth": 1.6, "zorder": 5}
            ax.add_patch(rectangle(flat.boxes[query], **style))
        else:
            row, column = flat.positions[query].tolist()
            ax.plot(column, row, "+", color=color, markersize=9, markeredgewidth=2, zorder=5)
    if record.labels is not None or record.scores is not None:
        corners = flat.boxes
        if corners is None:
            corners = flat.positions[:, None].expand(-1, 2, -1)
        _label(ax, record, corners, queries.tolist())
    return ax


def _label(ax: Axes, record: AttentionRecord, corners: Tensor, queries: list[int]) -> None:
    """Names the queries, the surest first, where no other name stands."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # before that, nothing has its place
    if record.scores is not None:
        scores = record.scores.tolist()
        queries = sorted(queries, key=lambda query: -scores[query])
    placed: list[Text] = []
    for query in queries:
        color = DISTINCT[query % len(DISTINCT)]
        for row, column, horizontal, vertical in _CORNERS:
            y, x = float(corners[query, row, 0]), float(corners[query, column, 1])
            text = ax.text(
                x, y, record.describe(query), fontsize=9, color=LIGHT.ink, zorder=6, clip_on=True,
                ha=horizontal, va=vertical, parse_math=False,
                bbox={"facecolor": "white", "edgecolor": color, "linewidth": 0.8, "pad": 1.5},
            )  # fmt: skip
            if not _covers(text, placed):
                placed.append(text)
                break
            text.remove()


def _covers(text: Text, others: list[Text]) -> bool:
    box = text.get_window_extent()
    assert text.axes is not None
    inside = text.axes.get_window_extent()
    if box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1:
        return True
    return any(box.padded(4).overlaps(other.get_window_extent()) for other in others)
