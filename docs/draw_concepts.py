"""Draws docs/concepts.svg and docs/concepts-narrow.svg: cells, strides, levels, windows, a query.

``python docs/draw_concepts.py`` writes both. The library itself says which cells the windows hold
and which points lie in them.
"""

import math
from pathlib import Path
from typing import NamedTuple

import torch

from vicinal import FeaturePyramid, get_multilevel_neighborhoods, plan_neighborhoods

SIZE = 16  # cells of the grid along each axis
STRIDES, WINDOWS = (1, 2, 4), (5, 3, 3)
QUERY = (6.3, 9.6)  # row, column, in cells of the full shape
SIDE, GAP, TOP, LEGEND = 272, 28, 62, 40  # of a panel, in units of the drawing
INK, MUTED, LINE = "#1f2430", "#5b6270", "#d5d9e0"
POINT, NEIGHBOR, WINDOW, QUERY_COLOR = "#aab3c2", "#e8871e", "#1f5fbf", "#c2185b"
NEIGHBOR_INK = "#a85a06"  # the neighbors' color, dark enough for text


class Panel(NamedTuple):
    """What one level shows, in its own cells."""

    stride: int
    size: int
    window: int
    points: list[tuple[int, int]]
    neighbors: list[tuple[int, int]]
    corner: tuple[int, int]  # the first cell of the window


def scene() -> FeaturePyramid:
    """Two tracks on an otherwise empty image, pooled into three levels."""
    cells = {(15 - step, round(1.5 + 0.9 * step - 0.01 * step * step)) for step in range(16)}
    cells |= {(round(3 + 4 * math.sin(column / 4)), column) for column in range(3, 16)}
    coordinates = torch.tensor([(0, *cell) for cell in sorted(cells) if max(cell) < SIZE])
    return FeaturePyramid.from_points(
        coordinates, torch.ones(len(coordinates), 1), (SIZE, SIZE), 1, strides=STRIDES
    )


def panels() -> list[Panel]:
    """The levels of the scene, with the query's windows and neighbors."""
    pyramid, position = scene(), torch.tensor([QUERY])
    plan = plan_neighborhoods(position, torch.tensor([0, 1]), pyramid, WINDOWS)
    neighbors = set(plan.pairs()[:, 1].tolist())
    cells, _, slot_levels = get_multilevel_neighborhoods(position, pyramid.level_shapes, WINDOWS)
    found = []
    for level, (stride, window) in enumerate(zip(STRIDES, WINDOWS, strict=True)):
        rows = [int(row) for row in (pyramid.levels == level).nonzero()]
        place = {row: (int(pyramid.cells[row, 0]), int(pyramid.cells[row, 1])) for row in rows}
        corner = cells[0, slot_levels == level].amin(0).tolist()
        found.append(
            Panel(
                stride,
                pyramid.level_shapes[level][0],
                window,
                [place[row] for row in rows if row not in neighbors],
                [place[row] for row in rows if row in neighbors],
                (corner[0], corner[1]),
            )
        )
    return found


def rectangle(x: float, y: float, width: float, height: float, style: str) -> str:
    """A rectangle of SVG."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" {style}/>'


def text(x: float, y: float, words: str, style: str = "") -> str:
    """A line of text of SVG."""
    return f'<text x="{x:g}" y="{y:g}" {style}>{words}</text>'


def draw_panel(level: int, panel: Panel, x: float, y: float) -> list[str]:
    """A level with its title; ``x, y`` is the upper left corner of the title."""
    cell, top = SIDE / panel.size, y + TOP
    shapes = [
        text(x, y + 20, f"level {level}", f'font-weight="700" fill="{INK}"'),
        text(x + 66, y + 20, f"stride {panel.stride}, {panel.size} × {panel.size} cells"),
        text(x, y + 44, f"window {panel.window} × {panel.window}:", f'fill="{WINDOW}"'),
        text(x + 112, y + 44, f"{len(panel.neighbors)} points", f'fill="{NEIGHBOR_INK}"'),
        rectangle(x, top, SIDE, SIDE, f'fill="white" stroke="{LINE}"'),
    ]
    for cells, color in ((panel.points, POINT), (panel.neighbors, NEIGHBOR)):
        for row, column in cells:
            shapes.append(
                rectangle(x + column * cell, top + row * cell, cell, cell, f'fill="{color}"')
            )
    edges = "".join(
        f"M{x + step * cell:g} {top:g}v{SIDE}M{x:g} {top + step * cell:g}h{SIDE}"
        for step in range(panel.size + 1)
    )
    shapes.append(f'<path d="{edges}" stroke="{LINE}" fill="none"/>')
    side, (row, column) = panel.window * cell, panel.corner
    style = f'fill="none" stroke="{WINDOW}" stroke-width="3"'
    shapes.append(rectangle(x + column * cell, top + row * cell, side, side, style))
    shapes.append(draw_query(x + QUERY[1] / SIZE * SIDE, top + QUERY[0] / SIZE * SIDE))
    return shapes


def draw_query(x: float, y: float, radius: float = 5.5) -> str:
    """The dot at the query's position."""
    style = f'r="{radius:g}" fill="{QUERY_COLOR}" stroke="white" stroke-width="1.5"'
    return f'<circle cx="{x:g}" cy="{y:g}" {style}/>'


def draw_legend(x: float, y: float, columns: int) -> list[str]:
    """What the signs mean, in so many columns."""
    square = [f'fill="{color}"' for color in (POINT, NEIGHBOR)]
    frame = f'fill="none" stroke="{WINDOW}" stroke-width="3"'
    signs = [
        ("query", draw_query),
        ("its window", lambda x, y: rectangle(x - 7, y - 7, 14, 14, frame)),
        ("neighbor", lambda x, y: rectangle(x - 7, y - 7, 14, 14, square[1])),
        ("other point", lambda x, y: rectangle(x - 7, y - 7, 14, 14, square[0])),
    ]
    widths = [120] * 4 if columns == 4 else [SIDE / 2] * 2
    shapes = []
    for index, (words, draw) in enumerate(signs):
        left = x + sum(widths[: index % columns])
        middle = y + 26 * (index // columns)
        shapes += [draw(left + 8, middle), text(left + 24, middle + 5, words)]
    return shapes


def draw(*, stacked: bool) -> str:
    """The drawing, its levels side by side or one below the other."""
    levels = panels()
    shapes: list[str] = []
    for level, panel in enumerate(levels):
        x, y = (0, level * (TOP + SIDE + GAP)) if stacked else (level * (SIDE + GAP), 0)
        shapes += draw_panel(level, panel, x + 8, y)
    width = 16 + (SIDE if stacked else 3 * SIDE + 2 * GAP)
    height = (3 * (TOP + SIDE + GAP) - GAP if stacked else TOP + SIDE) + LEGEND
    shapes += draw_legend(8, height - 12, 2 if stacked else 4)
    height += 26 if stacked else 8
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="15" fill="{MUTED}">'
    )
    return "\n".join((head, rectangle(0, 0, width, height, 'fill="white"'), *shapes, "</svg>\n"))


DRAWINGS = {"concepts.svg": False, "concepts-narrow.svg": True}

if __name__ == "__main__":
    for name, stacked in DRAWINGS.items():
        Path(__file__).with_name(name).write_text(draw(stacked=stacked), encoding="utf-8")
