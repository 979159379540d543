"""Drawing functions shared by the figures.

Data coordinates are cells of the full shape: a cell is a unit square, and rows increase downwards.
"""

from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from torch import Tensor

from .image import to_uint8
from .outlines import ProjectedWindows
from .palette import LIGHT
from .projection import ProjectedCells

LEAST_SIZE = 1.5  # of a cell, in points
LARGE = 1e6  # coordinates from which on their digits need much room
GAP_FROM = 5.0  # least size of cells with a gap between them, in points
CAUSAL_EDGE = 2.5  # width of the line, in those of the outline
WEIGHT_COLORMAP = LinearSegmentedColormap.from_list("weights", LIGHT.weights)
_INTENSITY_OPACITY = 0.35  # of the largest intensity, so that the points stay visible below it


def make_rectangle(corners: Tensor, **style: Any) -> Rectangle:
    """From the low and high corner ``[2, 2]``, row then column."""
    (top, left), (bottom, right) = corners.tolist()
    return Rectangle((left, top), right - left, bottom - top, **style)


def draw_window(
    ax: Axes,
    windows: ProjectedWindows,
    query: int,
    level: int,
    *,
    color: str,
    linewidth: float,
    zorder: int,
) -> None:
    """Outlines the cells of a window, and draws a thick line along each causal edge."""
    style: dict[str, Any] = {
        "fill": False, "edgecolor": color, "linewidth": linewidth, "zorder": zorder
    }  # fmt: skip
    polygons = windows.polygons(query, level)
    if windows.outlines[level].is_rectangle:
        ax.add_patch(make_rectangle(windows.corners[query, level], **style))
    elif polygons:
        paths = [
            Path(torch.cat((polygon, polygon[:1])).flip(1).numpy(), closed=True)
            for polygon in polygons
        ]
        ax.add_patch(PathPatch(Path.make_compound_path(*paths), **style))
    for edge in windows.causal_edges(query, level):
        rows, columns = edge.t().tolist()
        ax.add_line(causal_edge(columns, rows, color, linewidth, zorder=zorder))


def causal_edge(
    columns: list[float], rows: list[float], color: str, linewidth: float, **style: Any
) -> Line2D:
    """The line along a causal edge of a window whose outline has ``linewidth``."""
    width = CAUSAL_EDGE * linewidth
    return Line2D(columns, rows, color=color, linewidth=width, solid_capstyle="butt", **style)


class CellCollection(PolyCollection):
    """Cells with a gap between large ones; small ones are drawn with a least visible size.

    The size of a cell on paper depends on view and layout, so it is measured when it is drawn.
    """

    cell_size: tuple[float, float]  # height and width, in cells of the full shape
    dot_color: Any = None  # of cells smaller than the least size; None: that of large ones

    def draw(self, renderer: Any) -> None:
        assert self.axes is not None
        (x0, y0), (x1, y1) = self.axes.transData.transform([(0, 0), self.cell_size[::-1]])
        side = min(abs(x1 - x0), abs(y1 - y0)) / renderer.points_to_pixels(1)
        if side >= GAP_FROM:
            self.set_edgecolor("white")
            self.set_linewidth(0.8)
        else:
            if side < LEAST_SIZE and self.dot_color is not None:
                self.set_facecolor(self.dot_color)
            self.set_edgecolor(self.get_facecolor())
            self.set_linewidth(max(0.0, LEAST_SIZE - side))
        super().draw(renderer)


def draw_cells(ax: Axes, corners: Tensor, **style: Any) -> None:
    """Adds cells of one level, given their corners ``[n, 2, 2]``, as one collection.

    ``dot_color`` replaces their color where they are smaller than the least visible size.
    """
    dot_color = style.pop("dot_color", None)
    top, left, bottom, right = corners.flatten(1).t()
    vertices = torch.stack((left, top, right, top, right, bottom, left, bottom), 1)
    array: Any = vertices.view(-1, 4, 2).numpy()  # fast, although the stubs want sequences
    cells = CellCollection(array, **style)
    height, width = (corners[0, 1] - corners[0, 0]).tolist() if len(corners) else (1.0, 1.0)
    cells.cell_size, cells.dot_color = (height, width), dot_color
    ax.add_collection(cells)


def draw_image(ax: Axes, image: Tensor | None, cells: ProjectedCells) -> None:
    """Stretches an image over the map: colors below the points, intensities above them."""
    if image is None:
        return
    height, width = cells.full_shape
    pixels = to_uint8(image)
    is_intensity = pixels.dim() == 2
    if is_intensity:
        color = torch.tensor(to_rgb(LIGHT.text)).expand(*pixels.shape, 3)
        pixels = torch.cat((color, pixels[..., None] / 255 * _INTENSITY_OPACITY), 2)
    ax.imshow(pixels.numpy(), extent=(0, width, height, 0), zorder=3 if is_intensity else 0)


def set_view(ax: Axes, corners: Tensor, *, is_row: bool) -> None:
    """Limits the axes to ``corners`` ``[2, 2]`` and styles them; a row fills the height.

    Large coordinates are written in full, at few ticks.
    """
    (top, left), (bottom, right) = corners.tolist()
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ax.set_aspect("auto" if is_row else "equal")
    ax.tick_params(labelsize=8, color=LIGHT.border, labelcolor=LIGHT.muted, length=2)
    if corners.abs().max() >= LARGE:
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(2, integer=True))
            axis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    if is_row:
        ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_color(LIGHT.border)
