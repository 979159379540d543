"""Windows in the two drawn axes: their outlines, causal edges and names.

A window that is projected along an axis is the union of its projected cells. That is the window
that its other axes make, since no cell is nearer than the one at step 0 of the axis. So a window
is outlined in the drawn axes alone, and cells apart, as those of a dilated window, each have an
outline of their own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..window_shapes import AxisWindows, window_offsets

Vertex = tuple[int, int]
Polygon = tuple[Vertex, ...]


class WindowOutline(NamedTuple):
    """A level's window in the two drawn axes, the same for every query.

    Vertices are row and column, counted in cells of the level from the low corner of the window's
    bounding box.
    """

    polygons: tuple[Polygon, ...]  # around the cells; none: the level is not attended to
    causal: tuple[bool, bool]  # whether the high side of the bounding box is a causal edge

    @property
    def is_rectangle(self) -> bool:
        return len(self.polygons) == 1 and len(self.polygons[0]) == 4


class ProjectedWindows(NamedTuple):
    """The windows of n queries in the two drawn axes, on the CPU, in cells of the full shape."""

    corners: Tensor  # float64 [n, L, 2, 2]: low and high corner of the bounding boxes
    outlines: tuple[WindowOutline, ...]  # [L]
    names: tuple[tuple[str, ...], ...]  # [L], the parts of each name
    scales: Tensor  # float64 [L, 2]: cells of the level per cell of the full shape

    def polygons(self, query: int, level: int) -> list[Tensor]:
        """The outline of a window, float64 ``[vertices, 2]`` each; none: no window."""
        low = self.corners[query, level, 0]
        return [
            low + torch.tensor(polygon) / self.scales[level]
            for polygon in self.outlines[level].polygons
        ]

    def causal_edges(self, query: int, level: int) -> list[Tensor]:
        """The ends ``[2, 2]`` of the line at the end of the last complete cell, by causal axis."""
        low, high = self.corners[query, level]
        edges = []
        for axis, is_causal in enumerate(self.outlines[level].causal):
            if is_causal:
                start = low.clone()
                start[axis] = high[axis]
                edges.append(torch.stack((start, high)))
        return edges

    def view(self, query: int, level: int, position: Tensor) -> Tensor | None:
        """float64 ``[2, 2]``: corners around a window and, along causal axes, the level's cell at
        the query's ``position`` ``[2]``, which may be outside the window. None: no window.
        """
        outline = self.outlines[level]
        if not outline.polygons:
            return None
        cell = (position * self.scales[level]).floor()
        low, high = (cell / self.scales[level], (cell + 1) / self.scales[level])
        corners = self.corners[query, level]
        extended = torch.stack((corners[0].minimum(low), corners[1].maximum(high)))
        return torch.where(torch.tensor(outline.causal), extended, corners)


def outline_window(window: AxisWindows, axes: Sequence[int]) -> WindowOutline:
    """The outline of a window of P axes in one or two ``axes``; one is drawn as a row."""
    if not min(window.sizes):
        return WindowOutline((), (False, False))
    sizes, dilations = (
        tuple(part[axis] for axis in axes) for part in (window.sizes, window.dilations)
    )
    causal = tuple(window.causal[axis] for axis in axes)
    if len(axes) == 1:
        sizes, dilations, causal = (1, *sizes), (1, *dilations), (False, *causal)
    drawn = AxisWindows(sizes, dilations, causal, window.is_ball)
    edges = causal[0], causal[1]
    if drawn.is_box() and max(dilations) == 1:
        height, width = sizes
        return WindowOutline((((0, 0), (0, width), (height, width), (height, 0)),), edges)
    top, left = (
        step * dilation for step, dilation in zip(drawn.first_steps(), dilations, strict=True)
    )
    cells = {(row - top, column - left) for row, column in window_offsets(drawn)}
    return WindowOutline(_trace(cells), edges)


def _trace(cells: set[Vertex]) -> tuple[Polygon, ...]:
    """Polygons around ``cells``, clockwise.

    No two cells of a window touch at a corner alone, so that one edge starts at each vertex.
    """
    edges = {}
    for row, column in sorted(cells):
        corners = (row, column), (row, column + 1), (row + 1, column + 1), (row + 1, column)
        beyond = (row - 1, column), (row, column + 1), (row + 1, column), (row, column - 1)
        for start, stop, neighbor in zip(corners, corners[1:] + corners[:1], beyond, strict=True):
            if neighbor not in cells:
                edges[start] = stop
    polygons = []
    for start in list(edges):
        if start in edges:
            vertices = [start]
            while (stop := edges.pop(vertices[-1])) != start:
                vertices.append(stop)
            polygons.append(_without_straight_angles(vertices))
    return tuple(polygons)


def _without_straight_angles(vertices: list[Vertex]) -> Polygon:
    neighbors = zip(
        vertices[-1:] + vertices[:-1], vertices, vertices[1:] + vertices[:1], strict=True
    )
    return tuple(
        vertex
        for before, vertex, after in neighbors
        if before[0] != after[0] and before[1] != after[1]
    )


def name_window(window: AxisWindows, axis_names: Sequence[str]) -> tuple[str, ...]:
    """The parts of a window's name, such as ``"window 5 × 5 × 8"``, ``"causal along time"``."""
    if not min(window.sizes):
        return ("not attended to",)
    parts = [f"window {_join(window.sizes)}{', ball' if window.is_ball else ''}"]
    if max(window.dilations) > 1:
        is_uniform = len(set(window.dilations)) == 1
        dilation = _join(window.dilations[:1] if is_uniform else window.dilations)
        parts.append(f"dilation {dilation}")
    if any(window.causal):
        names = [name for name, causal in zip(axis_names, window.causal, strict=True) if causal]
        parts.append(f"causal along {' and '.join(names)}")
    return tuple(parts)


def _join(numbers: Sequence[int]) -> str:
    return " × ".join(map(str, numbers))
