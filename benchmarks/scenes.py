"""The scene of the measures: particle tracks on a square image, as points of a feature pyramid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STEPS_PER_TRACK = 120
TURN_RADIANS = 0.1  # standard deviation of the turn at each step
EXTRA_MARKS = 4  # cells marked beside the track's own, at each step
EXTRA_SPREAD = 0.8  # standard deviation of their distance to it along each axis, in cells


class Scene(NamedTuple):
    """The points of one image, batch index 0; for a batch, concatenate and set column 0."""

    coordinates: Tensor
    """int64 [n, P + 2]: batch, *cell, level; ordered by (batch, level, cells row-major)."""
    level_shapes: tuple[tuple[int, ...], ...]
    """Spatial shape of every level, [L][P]."""


def particle_tracks(
    n_tracks: int, *, size: int = 512, strides: Sequence[int] = (1, 2, 4, 8), seed: int = 0
) -> Scene:
    """Points of `n_tracks` tracks on a `size` x `size` image, one level per stride by occupancy."""
    generator = torch.Generator().manual_seed(seed)
    marked = _marked_cells(n_tracks, size, generator)
    levels = []
    level_shapes = []
    for level, stride in enumerate(strides):
        width = math.ceil(size / stride)
        row, column = (marked // stride).unbind(-1)
        occupied = torch.unique(row * width + column)  # sorted, so cells come in row-major order
        levels.append(
            torch.stack(
                (
                    torch.zeros_like(occupied),
                    occupied // width,
                    occupied % width,
                    torch.full_like(occupied, level),
                ),
                dim=-1,
            )
        )
        level_shapes.append((width, width))
    return Scene(torch.cat(levels), tuple(level_shapes))


def _marked_cells(n_tracks: int, size: int, generator: torch.Generator) -> Tensor:
    """Full-size cells that the tracks mark inside the image, int64 [m, 2], repeats included."""
    start = size * torch.rand(n_tracks, 1, 2, generator=generator)
    heading = 2 * math.pi * torch.rand(n_tracks, 1, generator=generator)
    turns = TURN_RADIANS * torch.randn(n_tracks, STEPS_PER_TRACK, generator=generator)
    heading = heading + turns.cumsum(dim=1)
    steps = torch.stack((heading.sin(), heading.cos()), dim=-1)
    track = (start + steps.cumsum(dim=1)).floor().unsqueeze(2)  # [n_tracks, steps, 1, 2]

    spread = torch.randn(n_tracks, STEPS_PER_TRACK, EXTRA_MARKS, 2, generator=generator)
    marks = torch.cat((track, track + (EXTRA_SPREAD * spread).round()), dim=2)
    cells = marks.long().reshape(-1, 2)
    inside = ((cells >= 0) & (cells < size)).all(dim=-1)
    return cells[inside]
