"""A figure of what one query attends to, a panel per level."""

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
from ..pyramid import FeaturePyramid
from .flat import Flat, Places, find_places, flatten
from .palette import LIGHT
from .panels import WEIGHTS, as_array, draw_picture, draw_squares, frame, rectangle
from .record import AttentionRecord, check_record

_TEXT: dict[str, Any] = {"color": LIGHT.ink, "fontsize": 10}
_LEGEND = {
    "query": Line2D([], [], marker="o", color=LIGHT.query, linestyle="none"),
    "its window": Patch(fill=False, edgecolor=LIGHT.frame, linewidth=1.8),
    "its box": Patch(fill=False, edgecolor=LIGHT.query, linewidth=1.2),
    "points it does not attend to": Patch(color=LIGHT.cell),
}


def draw_attention(
    pyramid: FeaturePyramid,
    record: AttentionRecord,
    query: int = 0,
    *,
    heads: str | Sequence[int] = "mean",
    axis: int | None = None,
    image: Tensor | None = None,
    margin: int = 3,
) -> Figure:
    """Draws a query's windows, the points it attends to and their weights, a column per level.

    Of three dimensions one is looked along: points one behind the other are drawn as one, with
    the sum of their weights. One dimension is a row of cells. Colours follow the square root of
    the weight, or the many small ones would all look the same.

    Args:
        pyramid: the points.
        record: queries of one image, and their weights.
        query: which of the record's n queries.
        heads: ``"mean"`` over the heads, ``"each"`` for a row per head, or the heads to draw.
        axis: the one to look along where there are three; None: the first.
        image: ``[H, W]`` intensities, drawn as ink, or ``[H, W, 3]`` colours; floating in [0, 1]
            or uint8; of any resolution, over the whole of the map; None: none.
        margin: cells of each level drawn around its window.

    Returns:
        a figure, to be saved or shown. The axes are in cells of the full shape.

    Raises:
        ValueError: the record is not of this pyramid, there is no such query, head or axis, or
            there are more than three dimensions.
    """
    check_record(record, pyramid)
    check_range("query", torch.tensor([query]), len(record))
    if not isinstance(margin, int) or margin < 0:
        refuse("margin", "a number of cells", margin)
    rows = _rows(heads, record.n_heads)
    places = find_places(pyramid, record.batch_index, axis)
    flat = flatten(record, places)
    seen, weights = flat.of(query)
    shown = torch.stack([weights[:, row].mean(1) for row in rows.values()], 1)
    norm = PowerNorm(0.5, 0, float(shown.max()) if shown.numel() and shown.max() > 0 else 1)
    picture = as_array(image)

    n_levels = len(places.level_shapes)
    height = 1.2 if len(places.projection.axes) == 1 else 2.9
    figure = Figure((2.9 * n_levels + 1, height * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots(len(rows), n_levels, squeeze=False)
    for level in range(n_levels):
        here = places.levels[seen] == level
        panel = _make_panel(places, flat, query, level, seen[here], margin)
        for ax, colored in zip(axes[:, level], shown[here].t(), strict=True):
            panel.draw(ax)
            colors = WEIGHTS(norm(colored.tolist()))
            draw_squares(ax, panel.seen, facecolor=colors, edgecolor="white", zorder=2)
            draw_picture(ax, picture, places)
            frame(ax, panel.view, one_row=panel.one_row)
            ax.set_xlabel(f"{float(colored.sum()):.0%} of the weight", **_TEXT)
        axes[0, level].set_title(_title(record, query, level, places), fontsize=10)
    if flat.background is not None:
        _tell_of_empty_cells(axes, flat.background[query], rows)
    for ax, name in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(name, **_TEXT)
    looked_along = places.projection.along
    along = "" if looked_along is None else f", along axis {looked_along}"
    title = f"What {record.describe(query)} attends to: {record.name}{along}"
    figure.suptitle(title, fontsize=12, parse_math=False)
    _explain(figure, norm, record, n_levels)
    return figure


def _rows(heads: str | Sequence[int], n_heads: int) -> dict[str, list[int]]:
    """A name for each row of panels, and the heads it is the mean of."""
    every = list(range(n_heads))
    if isinstance(heads, str):
        if heads not in ("mean", "each"):
            refuse("heads", "'mean', 'each' or heads", heads)
        if heads == "mean":
            return {f"mean of {n_heads} heads": every}
        heads = every
    chosen = [as_integer(head) for head in heads]
    if not chosen or any(head not in every for head in chosen):
        refuse("heads", f"heads in [0, {n_heads})", str(list(heads)))
    return {f"head {head}": [head] for head in chosen if head is not None}


class _Panel(NamedTuple):
    """What all panels of a level show, in cells of the full shape."""

    view: Tensor  # [2, 2]
    edges: tuple[list[float], list[float]]  # of the cells in view: rows, columns
    map: Tensor  # [2, 2]
    near: Tensor  # [m, 2, 2], the points in view
    seen: Tensor  # [n, 2, 2], those that the query attends to
    window: Tensor | None  # [2, 2]
    box: Tensor | None  # [2, 2]
    position: Tensor  # [2]
    one_row: bool

    def draw(self, ax: Axes) -> None:
        """Draws all but the attended points, which have other colours in each panel."""
        ax.set_facecolor(LIGHT.beyond)
        ax.add_patch(rectangle(self.map, facecolor=LIGHT.paper, zorder=-1))
        for axis, edges in zip((ax.yaxis, ax.xaxis), self.edges, strict=True):
            axis.set_minor_locator(FixedLocator(edges))
            axis.set_major_locator(MaxNLocator(3, integer=True))
            axis.remove_overlapping_locs = False  # a grid line also where there is a number
        ax.grid(which="minor", color=LIGHT.cell, linewidth=0.5, zorder=0)
        ax.tick_params(which="minor", length=0)
        ax.set_axisbelow(True)
        draw_squares(ax, self.near, facecolor=LIGHT.cell, edgecolor="white", zorder=1)
        for area, color, width in (
            (self.window, LIGHT.frame, 1.8),
            (self.box, LIGHT.query, 1.2),
        ):
            if area is not None:
                ax.add_patch(
                    rectangle(area, fill=False, edgecolor=color, linewidth=width, zorder=4)
                )
        row, column = self.position.tolist()
        ax.plot(
            column, row, "o", color=LIGHT.query, markersize=7, markeredgecolor="white", zorder=5
        )


def _make_panel(
    places: Places, flat: Flat, query: int, level: int, seen: Tensor, margin: int
) -> _Panel:
    scale, position = places.scales[level], flat.positions[query]
    attended = places.squares(seen)
    window = None if flat.windows is None else flat.windows[query, level]
    view = window
    if view is None:  # all that the query sees
        edges = torch.cat((attended.flatten(0, 1), position[None]))
        view = torch.stack((edges.amin(0), edges.amax(0)))
    around = margin / scale * torch.tensor([[-1], [1]])
    one_row = len(places.projection.axes) == 1
    if one_row:
        around[:, 0] = 0
    view = view + around
    first, last = (view * scale).round().long()
    rows, columns = (
        (torch.arange(int(low), int(high) + 1) / step).tolist()
        for low, high, step in zip(first, last, scale, strict=True)
    )
    squares = places.squares((places.levels == level).nonzero().squeeze(1))
    near = (squares[:, 1] > view[0]).all(1) & (squares[:, 0] < view[1]).all(1)
    return _Panel(
        view,
        (rows, columns),
        torch.tensor([[0, 0], places.full_shape]),
        squares[near],
        attended,
        window,
        None if flat.boxes is None else flat.boxes[query],
        position,
        one_row,
    )


def _title(record: AttentionRecord, query: int, level: int, places: Places) -> str:
    offsets, points = (part.cpu() for part in record.weights[:2])
    seen = places.pyramid.levels[points[int(offsets[query]) : int(offsets[query + 1])]]
    count = int((seen == level).sum())
    text = f"{count} point{'s' if count != 1 else ''}"
    if record.neighborhood_sizes is None:
        return f"level {level}\n{text}"
    sides = " × ".join([str(record.neighborhood_sizes[level])] * record.positions.shape[1])
    return f"level {level}: window {sides}\n{text}"


def _tell_of_empty_cells(axes: Any, background: Tensor, rows: dict[str, list[int]]) -> None:
    """Adds their share of the weight, of ``background`` [L, H], to the panels."""
    for row, heads in zip(axes, rows.values(), strict=True):
        for ax, share in zip(row, background[:, heads].mean(1).tolist(), strict=True):
            ax.set_xlabel(f"{ax.get_xlabel()}\n{share:.0%} on empty cells")


def _explain(figure: Figure, norm: PowerNorm, record: AttentionRecord, n_levels: int) -> None:
    """The scale of the weights, and what the other signs mean."""
    bar = figure.colorbar(
        ScalarMappable(norm, WEIGHTS), ax=figure.axes, aspect=25, ticks=MaxNLocator(5)
    )
    bar.set_label("attention weight", color=LIGHT.ink)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.outline.set_visible(False)
    absent = {"its window": record.neighborhood_sizes, "its box": record.boxes}
    signs = {
        name: sign
        for name, sign in _LEGEND.items()
        if name not in absent or absent[name] is not None
    }
    columns = 2 if n_levels == 1 else 4
    figure.legend(
        signs.values(), signs.keys(), loc="outside lower center", ncols=columns, frameon=False,
        fontsize=9,
    )  # fmt: skip
