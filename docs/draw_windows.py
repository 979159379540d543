"""Draws the pictures of the page on windows, docs/windows-*.svg: which points windows hold.

``python -m docs.draw_windows`` writes them and prints the numbers of the page's tables. The library
itself says which cells the windows hold and which points lie in them.
"""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.scenes import (
    STRIDES,
    WINDOWS_2D,
    WINDOWS_LIDAR,
    Scene,
    lidar_scan,
    moving_edges,
    particle_tracks,
)
from docs.draw_concepts import (
    INK,
    LINE,
    MUTED,
    NEIGHBOR,
    NEIGHBOR_INK,
    POINT,
    QUERY_COLOR,
    WINDOW,
    draw_query,
    rectangle,
    text,
)
from vicinal import (
    FeaturePyramid,
    QueryPlacement,
    Window,
    get_multilevel_neighborhoods,
    plan_neighborhoods,
    suggest_windows,
)

SIDE, GAP, TITLE = 300, 24, 48  # of a panel, in units of the drawing
DEFAULT = WINDOWS_2D  # of the attention block


class View(NamedTuple):
    """What a panel shows of a scene: two axes, in a part of the map."""

    pyramid: FeaturePyramid
    query: Tensor  # [P], in cells of the full shape
    windows: Sequence[Any]
    level: int
    axes: tuple[int, int]  # downwards, to the right
    low: tuple[int, int]  # the part of the map, in cells of the full shape
    high: tuple[int, int]
    words: str  # the first line of the title
    is_slab: bool = False  # only the points that are within the window along the other axes
    upwards: bool = False  # the first axis points upwards

    @property
    def height(self) -> float:
        """Of the map in the panel."""
        return SIDE * (self.high[0] - self.low[0]) / (self.high[1] - self.low[1])


def lines() -> FeaturePyramid:
    """Eighteen tracks on 96 x 96 cells, each a few cells wide."""
    numbers, cells = random.Random(3), set()
    for _ in range(18):
        row, column = 96 * numbers.random(), 96 * numbers.random()
        heading = 2 * math.pi * numbers.random()
        for _ in range(60):
            heading += numbers.gauss(0, 0.1)
            row, column = row + math.sin(heading), column + math.cos(heading)
            cells.add((math.floor(row), math.floor(column)))
            cells.add((round(row + numbers.gauss(0, 0.8)), round(column + numbers.gauss(0, 0.8))))
    inside = [(0, *cell) for cell in sorted(cells) if min(cell) >= 0 and max(cell) < 96]
    return FeaturePyramid.from_points(
        torch.tensor(inside), torch.ones(len(inside), 1), (96, 96), 1, strides=STRIDES
    )


def pyramid_of(scene: Scene) -> FeaturePyramid:
    """The points of a scene of the benchmarks."""
    values = torch.zeros(len(scene.coordinates), 1)
    return FeaturePyramid(values, scene.coordinates, scene.level_shapes, 1)


def views_of_lines() -> list[View]:
    """All levels, with the default windows."""
    pyramid = lines()
    cells = pyramid.cells[pyramid.levels == 0]
    query = cells[(cells - 48).abs().amax(1).argmin()] + 0.5  # the point nearest to the middle
    return [
        View(pyramid, query, DEFAULT, level, (0, 1), (0, 0), (96, 96), f"stride {stride}")
        for level, stride in enumerate(STRIDES)
    ]


def views_of_lidar() -> list[View]:
    """A level of the street from above and from the side, with two windows."""
    pyramid, query, level = pyramid_of(lidar_scan()), torch.tensor([638.5, 546.5, 14.5]), 2
    x, y = 560, 464
    return [
        View(pyramid, query, windows, level, axes, low, high, words, is_slab, upwards)
        for axes, low, high, words, is_slab, upwards in (
            ((1, 0), (y, x), (y + 160, x + 160), "x and y, from above", False, True),
            ((2, 0), (0, x), (64, x + 160), "x and z, from the side", True, True),
        )
        for windows in (DEFAULT, WINDOWS_LIDAR)
    ]


def views_of_events() -> list[View]:
    """Column and time of all levels, with causal windows."""
    scene = moving_edges()
    query = torch.tensor([60.5, 84.5, 44.5])
    return [
        View(
            pyramid_of(scene), query, scene.windows, level, (1, 2), (48, 0), (112, 64),
            f"stride {stride}", is_slab=True,
        )
        for level, stride in enumerate(STRIDES)
    ]  # fmt: skip


def name_of(window: Any, dim: int) -> str:
    """A window as the title of a panel names it."""
    size = window.size if isinstance(window, Window) else window
    sizes = size if isinstance(size, tuple) else (size,) * dim
    return " × ".join(map(str, sizes))


def squares(cells: Tensor) -> str:
    """A path of unit squares at ``cells`` [n, 2], each once."""
    places = cells.unique(dim=0).tolist()
    return "".join(f"M{right} {down}h1v1h-1z" for down, right in places)


class Shown(NamedTuple):
    """What of a view its panel shows, in cells of the level from the panel's upper left corner."""

    points: Tensor  # [m, 2], those that are not neighbors
    neighbors: Tensor  # [n, 2]
    box: Tensor  # [2, 2], the window's first cell and the one after its last
    query: Tensor  # [2]
    shape: Tensor  # [2], of the panel
    n_neighbors: int  # on the level, shown or not
    n_cells: int  # of the window


def show(view: View) -> Shown:
    """Finds the points and the window of a view."""
    pyramid, level, stride = view.pyramid, view.level, STRIDES[view.level]
    positions, shapes = view.query[None], pyramid.level_shapes
    plan = plan_neighborhoods(positions, torch.tensor([0, 1]), pyramid, view.windows)
    window_cells, _, slot_levels = get_multilevel_neighborhoods(positions, shapes, view.windows)
    window = window_cells[0, slot_levels == level]  # [k, P]
    box = torch.stack((window.amin(0), window.amax(0) + 1))
    is_neighbor = torch.zeros(len(pyramid), dtype=torch.bool)
    is_neighbor[plan.pairs()[:, 1]] = True

    axes, low, high = (torch.tensor(part) for part in (view.axes, view.low, view.high))
    low, shape = low // stride, (high - low) // stride
    cells, on_level = pyramid.cells[:, axes] - low, pyramid.levels == level
    shown = on_level & ((cells >= 0) & (cells < shape)).all(1)
    if view.is_slab:
        for axis in set(range(pyramid.position_dim)) - set(view.axes):
            along = pyramid.cells[:, axis]
            shown &= (along >= box[0, axis]) & (along < box[1, axis])
    box, query = box[:, axes] - low, view.query[axes] / stride - low
    if view.upwards:
        cells[:, 0] = shape[0] - 1 - cells[:, 0]
        box[:, 0], query[0] = (shape[0] - box[:, 0]).flip(0), shape[0] - query[0]
    points, neighbors = cells[shown & ~is_neighbor], cells[shown & is_neighbor]
    box = box.clamp(min=torch.zeros_like(shape), max=shape)
    n_neighbors = int((is_neighbor & on_level).sum())
    return Shown(points, neighbors, box, query, shape, n_neighbors, len(window))


def draw_panel(view: View, x: float, y: float) -> list[str]:
    """A view with its title; ``x, y`` is the upper left corner of the title."""
    shown, top = show(view), y + TITLE
    size = SIDE / int(shown.shape[1])  # of a cell
    (row, column), (row_stop, column_stop) = (shown.box * size).tolist()
    down, right = (shown.query * size).tolist()
    is_small = size < 4
    frame = f'fill="none" stroke="{WINDOW}" stroke-width="{1.5 if is_small else 2.5}"'
    named = f"window {name_of(view.windows[view.level], len(view.query))}:"
    counts = f"{shown.n_neighbors} points in {shown.n_cells} cells"
    return [
        text(x, y + 16, view.words, f'font-weight="700" fill="{INK}"'),
        text(x, y + 38, named, f'fill="{WINDOW}"'),
        text(x + SIDE, y + 38, counts, f'fill="{NEIGHBOR_INK}" text-anchor="end"'),
        rectangle(x, top, SIDE, view.height, f'fill="white" stroke="{LINE}"'),
        f'<g transform="translate({x:g} {top:g}) scale({size:g})">',
        f'<path fill="{POINT}" d="{squares(shown.points)}"/>',
        f'<path fill="{NEIGHBOR}" d="{squares(shown.neighbors)}"/></g>',
        rectangle(x + column, top + row, column_stop - column, row_stop - row, frame),
        *draw_now(view, x, top),
        draw_query(x + right, top + down, 2.5 if is_small else 5.5),
    ]


def draw_now(view: View, x: float, y: float) -> list[str]:
    """A line where the query's own cell ends, if windows are causal."""
    if not any(isinstance(window, Window) and window.causal for window in view.windows):
        return []
    end = math.floor(view.query[view.axes[1]]) + 1 - view.low[1]
    right = x + end * SIDE / (view.high[1] - view.low[1])
    style = f'stroke="{QUERY_COLOR}" stroke-width="1.5" stroke-dasharray="5 4"'
    return [f'<path d="M{right:g} {y:g}v{view.height:g}" {style}/>']


def draw(name: str) -> str:
    """A drawing: panels in two columns."""
    views, shapes, y = DRAWINGS[name](), [], 8.0
    for left, right in zip(views[::2], views[1::2], strict=True):
        shapes += draw_panel(left, 8, y) + draw_panel(right, 8 + SIDE + GAP, y)
        y += TITLE + left.height + GAP
    width, height = 16 + 2 * SIDE + GAP, y - GAP + 8
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="15" fill="{MUTED}">'
    )
    return "\n".join((head, rectangle(0, 0, width, height, 'fill="white"'), *shapes, "</svg>\n"))


DRAWINGS = {
    "windows-lines.svg": views_of_lines,
    "windows-lidar.svg": views_of_lidar,
    "windows-events.svg": views_of_events,
}


def print_table(name: str, scene: Scene, causal_axes: Sequence[int] = ()) -> None:
    """The neighbors that default and suggested windows give in a scene, every point a query."""
    pyramid = pyramid_of(scene)
    positions, offsets, levels = QueryPlacement.of_points(pyramid)
    print(f"{name}: {len(pyramid)} points")
    for windows in (DEFAULT, suggest_windows(pyramid, causal_axes=causal_axes)):
        plan = plan_neighborhoods(positions, offsets, pyramid, windows, levels)
        total = float(plan.neighbors_per_level().mean.sum())
        print(f"  {windows}: {total:.1f}; {plan.neighbors_per_level().describe()}")


if __name__ == "__main__":
    for name in DRAWINGS:
        Path(__file__).with_name(name).write_text(draw(name), encoding="utf-8")
    print_table("lines", particle_tracks(100))
    print_table("LiDAR", lidar_scan())
    print_table("events", moving_edges(), (2,))
