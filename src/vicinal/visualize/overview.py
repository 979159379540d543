"""A figure of an image with its queries: boxes, labels and attended points."""

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from .._utils.checks import check_range, check_tensor, refuse
from .._utils.types import CropLike
from ..pyramid import FeaturePyramid
from ..windows import finest_level
from .artists import draw_cells, draw_image, draw_window, make_rectangle, set_view
from .palette import CATEGORICAL, LIGHT
from .projection import (
    ProjectedCells,
    ProjectedRecord,
    check_crop,
    crop_corners,
    project_cells,
    project_record,
)
from .record import AttentionRecord, check_record

MAX_DOT_AREA = 60.0  # of the point with the largest weight, in points squared
_FRAME = 1.9  # width of the frame of a label, in points
# Where a label may be: row and column of the box corner, horizontal and vertical alignment.
_LABEL_ANCHORS = (
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
    axis_names: Sequence[str] | None = None,
    crop: CropLike = "occupied",
    windows: bool = False,
    image: Tensor | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws an image with its queries, and the points that each attends to as dots of its color.

    The area of a dot is proportional to the weight, averaged over the heads and relative to the
    query's largest. A label is drawn at a corner of its box where it overlaps no other label, in
    order of decreasing score, and left out if there is no such corner. Label positions depend on
    the layout, so place ``ax`` in its figure first. Three dimensions are projected along one axis,
    as in `draw_attention`.

    Args:
        pyramid: points of all levels. Those of the finest level are drawn as cells.
        record: queries of one image and their weights.
        queries: integer ``[m]``, indices of the record's queries to draw. None: all.
        level: draw attended points, and windows, of this level only. None: of all levels.
        axis: axis to look along, for three dimensions only. None: the one that hides the fewest
            cells.
        axis_names: a name per axis of the pyramid. None: ``row`` and ``column`` in two dimensions,
            ``cell`` in one, ``axis 0`` to ``axis 2`` in three.
        crop: ``"occupied"`` for the part with points and queries, ``"map"`` for the whole
            map, or ``[2, P]``, its low and high corner in cells of the full shape.
        windows: whether to outline the windows of each query in its color, with a thick line along
            causal edges, as in `draw_attention`. Default: False.
        image: ``[H, W]`` intensities or ``[H, W, 3]`` colors, as in `draw_attention`.
        ax: axes to draw in. None: the axes of a new figure.

    Returns:
        The axes, in cells of the full shape. Their figure is ``ax.figure``.

    Raises:
        ValueError: the record does not belong to the pyramid, ``queries``, ``level`` or ``axis``
            is out of range, ``crop`` has no low corner below a high one, the pyramid has more than
            three dimensions, or ``windows`` is True and the record has none.

    Example:
        ```python
        import tempfile
        from pathlib import Path

        import torch
        from vicinal import FeaturePyramid, neighborhood_attention_weights, plan_neighborhoods
        from vicinal.visualize import AttentionRecord, draw_overview

        cells = torch.rand(16, 16).lt(0.3).nonzero()
        pyramid = FeaturePyramid(
            torch.randn(len(cells), 8),  # values; coordinates: image 0, cell, level 0
            torch.nn.functional.pad(cells, (1, 1)),
            level_shapes=[[16, 16]],
            batch_size=1,
        )
        boxes = torch.tensor([[4.5, 4.5, 5.0, 5.0], [10.0, 8.0, 5.0, 7.0]])
        plan = plan_neighborhoods(boxes[:, :2], torch.tensor([0, 2]), pyramid, [5])
        q, k = torch.randn(2, 1, 8), pyramid.values[:, None]
        weights = neighborhood_attention_weights(q, k, plan)
        record = AttentionRecord(boxes[:, :2], weights, boxes=boxes, labels=["track", "shower"])
        ax = draw_overview(pyramid, record, image=torch.rand(16, 16))
        with tempfile.TemporaryDirectory() as folder:
            ax.figure.savefig(Path(folder) / "overview.png", dpi=40)
        ```
    """
    check_record(record, pyramid)
    if level is not None and level not in range(pyramid.n_levels):
        refuse("level", f"a level in [0, {pyramid.n_levels}) or None", level)
    if not isinstance(windows, bool):
        refuse("windows", "a bool", windows)
    if windows and record.neighborhood_sizes is None:
        refuse("windows", "False for a record without neighborhood_sizes", windows)
    if queries is None:
        queries = torch.arange(len(record))
    queries = check_tensor("queries", queries, ("m",), kind="integer").cpu().long()
    check_range("queries", queries, len(record))
    crop = check_crop(crop, pyramid.position_dim)
    cells = project_cells(pyramid, record.batch_index, axis, axis_names)
    projected = project_record(record, cells)
    view = crop_corners(crop, cells, [projected.extent(queries)])
    if ax is None:
        ax = Figure((7, 7), layout="constrained").subplots()
    finest = finest_level(pyramid.level_shapes)
    draw_cells(
        ax, cells.level_corners(finest), facecolor=LIGHT.point, dot_color=LIGHT.dot, zorder=1
    )
    draw_image(ax, image, cells)
    set_view(ax, view, is_row=cells.projection.is_row)
    for label, name in (
        (ax.set_ylabel, cells.drawn_names[0]),
        (ax.set_xlabel, cells.drawn_names[1]),
    ):
        label(name or "", color=LIGHT.text, parse_math=False)
    for query in queries.tolist():
        _draw_query(ax, cells, projected, query, level)
        if windows:
            _draw_windows(ax, projected, query, level)
    if record.labels is not None or record.scores is not None:
        _draw_labels(ax, record, projected, queries.tolist())
    return ax


def _color(query: int) -> str:
    return CATEGORICAL[query % len(CATEGORICAL)]


def _draw_query(
    ax: Axes, cells: ProjectedCells, projected: ProjectedRecord, query: int, level: int | None
) -> None:
    """Draws a query's points, of one level or of all, and its box, or a cross without boxes."""
    color = _color(query)
    ids, weights = projected.attended(query)
    if level is not None:
        in_level = cells.levels[ids] == level
        ids, weights = ids[in_level], weights[in_level]
    mean = weights.mean(1)
    areas = MAX_DOT_AREA * mean / mean.max() if len(mean) and mean.max() > 0 else mean
    columns, rows = cells.corners(ids).mean(1).flip(1).t().tolist()
    ax.scatter(
        columns, rows, areas.tolist(), color=color, edgecolor="white", linewidth=0.4,
        alpha=0.8, zorder=4,
    )  # fmt: skip
    if projected.boxes is not None:
        style = {"fill": False, "edgecolor": color, "linewidth": 1.6, "zorder": 5}
        ax.add_patch(make_rectangle(projected.boxes[query], **style))
    else:
        row, column = projected.positions[query].tolist()
        ax.plot(column, row, "+", color=color, markersize=9, markeredgewidth=2, zorder=5)


def _draw_windows(ax: Axes, projected: ProjectedRecord, query: int, level: int | None) -> None:
    """Draws a query's windows, of one level or of all."""
    assert projected.windows is not None
    levels = range(len(projected.windows.outlines)) if level is None else (level,)
    style: dict[str, Any] = {"color": _color(query), "linewidth": 1.2, "zorder": 3}
    for each in levels:
        draw_window(ax, projected.windows, query, each, **style)


def _draw_labels(
    ax: Axes, record: AttentionRecord, projected: ProjectedRecord, queries: list[int]
) -> None:
    """Labels queries by decreasing score, wherever a label overlaps no earlier one."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()  # sizes of texts are known only after layout
    if record.scores is not None:
        scores = record.scores.tolist()
        queries = sorted(queries, key=lambda query: -scores[query])
    corners = projected.boxes
    if corners is None:
        corners = projected.positions[:, None].expand(-1, 2, -1)
    placed: list[Text] = []
    for query in queries:
        for row, column, horizontal, vertical in _LABEL_ANCHORS:
            y, x = float(corners[query, row, 0]), float(corners[query, column, 1])
            text = ax.text(
                x, y, record.describe(query), fontsize=9, color=LIGHT.text, zorder=6, clip_on=True,
                ha=horizontal, va=vertical, parse_math=False,
                bbox={
                    "facecolor": "white", "edgecolor": _color(query), "linewidth": 0.8,
                    "pad": _FRAME - 0.4,
                },
            )  # fmt: skip
            if _has_room(text, placed):
                placed.append(text)
                break
            text.remove()


def _has_room(text: Text, others: list[Text]) -> bool:
    """Whether a text lies within its axes, with its frame, and overlaps none of the others."""
    box = text.get_window_extent()
    figure = text.get_figure(root=True)
    assert text.axes is not None
    assert figure is not None
    axes = text.axes.get_window_extent().padded(-_FRAME * figure.dpi / 72)
    if box.x0 < axes.x0 or box.x1 > axes.x1 or box.y0 < axes.y0 or box.y1 > axes.y1:
        return False
    return not any(box.padded(4).overlaps(other.get_window_extent()) for other in others)
