"""A figure of the attention weights of one query, with a panel per level."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from torch import Tensor

from .._utils.checks import as_integer, check_range, refuse
from .._utils.types import HeadsLike
from ..pyramid import FeaturePyramid
from .artists import (
    WEIGHT_COLORMAP,
    causal_edge,
    draw_cells,
    draw_image,
    draw_window,
    make_rectangle,
    set_view,
)
from .image import to_uint8
from .outlines import ProjectedWindows
from .palette import LIGHT
from .projection import ProjectedCells, ProjectedRecord, project_cells, project_record
from .record import AttentionRecord, check_record

_TEXT: dict[str, Any] = {"color": LIGHT.text, "fontsize": 10}
_WINDOW: dict[str, Any] = {"color": LIGHT.window, "linewidth": 1.8}
_BOX: dict[str, Any] = {"fill": False, "edgecolor": LIGHT.query, "linewidth": 1.2}


def draw_attention(
    pyramid: FeaturePyramid,
    record: AttentionRecord,
    query: int = 0,
    *,
    heads: HeadsLike = "mean",
    axis: int | None = None,
    axis_names: Sequence[str] | None = None,
    image: Tensor | None = None,
    margin: int = 3,
) -> Figure:
    """Draws the windows of a query and the weights of the points in them, one column per level.

    The color scale is the square root of the weight, which keeps small weights distinguishable.
    Three dimensions are projected along one axis: points that differ in that axis alone are drawn
    as one cell, with the sum of their weights. One dimension is drawn as a row of cells.

    The outline of a window follows its cells, so that one sees the gaps of a dilated window and the
    steps of a ball. In a projection it follows the projected cells. A thick line marks the causal
    edge, the end of the last cell that the query may attend to along a causal axis. The title of a
    column names the window, or says that the level is not attended to.

    Args:
        pyramid: points of all levels.
        record: queries of one image and their weights.
        query: index of the query to draw, in [0, n).
        heads: ``"mean"`` for the mean over the heads, ``"each"`` for one row per head, or indices
            of the heads to draw, one row each.
        axis: axis to look along, for three dimensions only. None: the one that hides the fewest
            cells.
        axis_names: a name per axis of the pyramid. None: ``row`` and ``column`` in two dimensions,
            ``cell`` in one, ``axis 0`` to ``axis 2`` in three.
        image: ``[H, W]`` intensities, drawn translucent above the points, or ``[H, W, 3]`` colors,
            drawn below them. Floating in [0, 1] or uint8, of any resolution; it is stretched over
            the whole map. None: no image.
        margin: width of the border around the windows, in cells of the level.

    Returns:
        A figure, to be shown or saved. Its axes are in cells of the full shape.

    Raises:
        ValueError: the record does not belong to the pyramid, ``query``, ``heads`` or ``axis`` is
            out of range, or the pyramid has more than three dimensions.

    Example:
        ```python
        import tempfile
        from pathlib import Path

        import torch
        from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
        from vicinal.visualize import AttentionRecord, draw_attention

        coordinates = torch.cat([torch.zeros(60, 1), torch.randint(0, 16, (60, 2))], 1).long()
        pyramid = FeaturePyramid.from_points(
            coordinates, torch.randn(60, 8), spatial_shape=(16, 16), batch_size=1, strides=(1, 2)
        )
        block = SparseNeighborhoodAttentionBlock(8, 2, n_levels=2, neighborhood_sizes=(3, 5))
        positions = torch.tensor([[4.5, 4.5], [10.0, 8.0]])
        weights = block.attention_weights(
            torch.randn(2, 8), positions, torch.tensor([0, 2]), pyramid
        )
        record = AttentionRecord(positions, weights, block.neighborhood_sizes)
        figure = draw_attention(pyramid, record, query=1, heads="each")
        with tempfile.TemporaryDirectory() as folder:
            figure.savefig(Path(folder) / "attention.png", dpi=40)
        ```
    """
    check_record(record, pyramid)
    check_range("query", torch.tensor([query]), len(record))
    if as_integer(margin) is None or margin < 0:
        refuse("margin", "a number of cells, at least 0", margin)
    rows = _head_rows(heads, record.n_heads)
    image = None if image is None else to_uint8(image)
    cells = project_cells(pyramid, record.batch_index, axis, axis_names)
    projected = project_record(record, cells)
    ids, weights = projected.attended(query)
    row_weights = torch.stack([weights[:, row].mean(1) for row in rows.values()], 1)
    largest = float(row_weights.max()) if row_weights.numel() else 0.0
    norm = PowerNorm(0.5, 0, largest if largest > 0 else 1)

    n_levels = len(cells.level_shapes)
    height = 1.2 if cells.projection.is_row else 2.9
    titles = [
        _panel_title(record, projected.windows, query, level, cells) for level in range(n_levels)
    ]
    more_lines = max(title.count("\n") for title in titles) - 1
    size = 2.9 * n_levels + 1, height * len(rows) + 1.5 + 0.17 * more_lines
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(len(rows), n_levels, squeeze=False)
    for level in range(n_levels):
        in_level = cells.levels[ids] == level
        panel = _make_panel(cells, projected, query, level, ids[in_level], margin)
        for ax, level_weights in zip(axes[:, level], row_weights[in_level].t(), strict=True):
            if projected.windows is not None:
                draw_window(ax, projected.windows, query, level, zorder=4, **_WINDOW)
            panel.draw(ax)
            colors = WEIGHT_COLORMAP(norm(level_weights.tolist()))
            draw_cells(ax, panel.attended, facecolor=colors, zorder=2)
            draw_image(ax, image, cells)
            set_view(ax, panel.view, is_row=cells.projection.is_row)
            ax.set_xlabel(f"{float(level_weights.sum()):.0%} of the weight", **_TEXT)
        axes[0, level].set_title(titles[level], fontsize=10, parse_math=False)
    if projected.background is not None:
        _add_background_shares(axes, projected.background[query], rows)
    row_name, column_name = cells.drawn_names
    for ax, name in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(name if row_name is None else f"{name}\n{row_name}", **_TEXT)
        ax.yaxis.label.set_parse_math(False)
    for ax in axes[-1]:
        ax.set_xlabel(f"{column_name}\n{ax.get_xlabel()}", parse_math=False)
    title = f"Attention of {record.describe(query)}: {record.name}"
    if cells.projection.dropped_axis is not None:
        title += f", along {cells.axis_names[cells.projection.dropped_axis]}"
    figure.suptitle(title, fontsize=12, parse_math=False)
    _add_colorbar(figure, norm)
    _add_legend(figure, record, projected.windows, n_columns=2 if n_levels == 1 else 4)
    return figure


def _head_rows(heads: HeadsLike, n_heads: int) -> dict[str, list[int]]:
    """The rows of panels: a name, and the heads to take the mean of."""
    all_heads = list(range(n_heads))
    if isinstance(heads, str):
        if heads not in ("mean", "each"):
            refuse("heads", "'mean', 'each' or indices of heads", heads)
        if heads == "mean":
            return {f"mean of {n_heads} heads": all_heads}
        heads = all_heads
    chosen = [as_integer(head) for head in heads]
    if not chosen or any(head not in all_heads for head in chosen):
        refuse("heads", f"indices in [0, {n_heads})", str(list(heads)))
    return {f"head {head}": [head] for head in chosen if head is not None}


class _Panel(NamedTuple):
    """The part of a level's panels that is the same for all heads, in cells of the full shape."""

    view: Tensor  # [2, 2]
    edges: tuple[list[float], list[float]]  # of the cells in view: rows, columns
    map: Tensor  # [2, 2]
    visible: Tensor  # [m, 2, 2], all points in view
    attended: Tensor  # [n, 2, 2], points that the query attends to
    box: Tensor | None  # [2, 2]
    position: Tensor  # [2]

    def draw(self, ax: Axes) -> None:
        """Draws everything but the attended points, whose colors depend on the heads."""
        ax.set_facecolor(LIGHT.outside)
        ax.add_patch(make_rectangle(self.map, facecolor=LIGHT.surface, zorder=-1))
        for axis, edges in zip((ax.yaxis, ax.xaxis), self.edges, strict=True):
            # More lines than pixels, of which each takes milliseconds, would look the same.
            axis.set_minor_locator(FixedLocator(edges, nbins=1000))
            axis.set_major_locator(MaxNLocator(3, integer=True))
            axis.remove_overlapping_locs = False  # keep the grid line below a tick label
        ax.grid(which="minor", color=LIGHT.point, linewidth=0.5, zorder=0)
        ax.tick_params(which="minor", length=0)
        ax.set_axisbelow(True)
        draw_cells(ax, self.visible, facecolor=LIGHT.point, dot_color=LIGHT.dot, zorder=1)
        if self.box is not None:
            ax.add_patch(make_rectangle(self.box, zorder=4, **_BOX))
        row, column = self.position.tolist()
        ax.plot(
            column, row, "o", color=LIGHT.query, markersize=7, markeredgecolor="white", zorder=5
        )


def _make_panel(
    cells: ProjectedCells,
    projected: ProjectedRecord,
    query: int,
    level: int,
    ids: Tensor,
    margin: int,
) -> _Panel:
    """The panel of a level, for the cells ``ids`` that the query attends to there."""
    scale, position = cells.scales[level], projected.positions[query]
    attended = cells.corners(ids)
    windows = projected.windows
    view = None if windows is None else windows.view(query, level, position)
    if view is None:  # the bounding box of the query and its points, or else of its cell
        cell = (position * scale).floor()
        points = attended.flatten(0, 1) if len(attended) else torch.stack((cell, cell + 1)) / scale
        points = torch.cat((points, position[None]))
        view = torch.stack((points.amin(0), points.amax(0)))
    border = margin / scale * torch.tensor([[-1], [1]])
    if cells.projection.is_row:
        border[:, 0] = 0
    view = view + border
    first, last = (view * scale).round().long()
    rows, columns = (
        (torch.arange(int(low), int(high) + 1) / per_cell).tolist()
        for low, high, per_cell in zip(first, last, scale, strict=True)
    )
    corners = cells.level_corners(level)
    visible = (corners[:, 1] > view[0]).all(1) & (corners[:, 0] < view[1]).all(1)
    return _Panel(
        view,
        (rows, columns),
        cells.map_corners,
        corners[visible],
        attended,
        None if projected.boxes is None else projected.boxes[query],
        position,
    )


def _panel_title(
    record: AttentionRecord,
    windows: ProjectedWindows | None,
    query: int,
    level: int,
    cells: ProjectedCells,
) -> str:
    """The window of a level, and the number of points in it before they merge into cells."""
    offsets, points = (part.cpu() for part in record.weights[:2])
    levels = cells.pyramid.levels[points[int(offsets[query]) : int(offsets[query + 1])]]
    count = int((levels == level).sum())
    text = f"{count} point{'s' if count != 1 else ''}"
    if windows is None:
        return f"level {level}\n{text}"
    name = "\n".join(windows.names[level])
    return f"level {level}: {name}\n{text}"


def _add_background_shares(axes: Any, background: Tensor, rows: dict[str, list[int]]) -> None:
    """Adds the weight of the empty cells, ``[L, H]``, to the labels of the panels."""
    for row, heads in zip(axes, rows.values(), strict=True):
        for ax, share in zip(row, background[:, heads].mean(1).tolist(), strict=True):
            ax.set_xlabel(f"{ax.get_xlabel()}\n{share:.0%} on empty cells")


def _add_colorbar(figure: Figure, norm: PowerNorm) -> None:
    bar = figure.colorbar(
        ScalarMappable(norm, WEIGHT_COLORMAP), ax=figure.axes, aspect=25, ticks=MaxNLocator(5)
    )
    bar.set_label("attention weight", color=LIGHT.text)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.outline.set_visible(False)


def _add_legend(
    figure: Figure, record: AttentionRecord, windows: ProjectedWindows | None, n_columns: int
) -> None:
    handles: list[Any] = [
        Line2D([], [], marker="o", color=LIGHT.query, linestyle="none", label="query")
    ]
    if windows is not None:
        window = {"edgecolor": _WINDOW["color"], "linewidth": _WINDOW["linewidth"]}
        handles.append(Patch(label="window", fill=False, **window))
        if any(any(outline.causal) for outline in windows.outlines):
            handles.append(causal_edge([], [], label="causal edge", **_WINDOW))
    if record.boxes is not None:
        handles.append(Patch(label="box", **_BOX))
    handles.append(Patch(color=LIGHT.point, label="point without weight"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=n_columns, frameon=False, fontsize=9
    )
