"""Raw coordinates, in any unit, and the cells of a grid that lies over them; all in float64."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RawGrid(NamedTuple):
    """A regular grid.

    Attributes:
        origin: ``[P]``, the raw coordinates of the lower corner of cell 0.
        cell_size: ``[P]``, the size of a raw cell in raw units.
        strides: ``[P]``, raw cells per cell of the grid.
    """

    origin: Sequence[float]
    cell_size: Sequence[float]
    strides: Sequence[int]

    def cells_of(self, points: Tensor) -> Tensor:
        """Raw ``points`` ``[n, P]`` in cells of the grid, float64 ``[n, P]``."""
        columns = zip(points.unbind(1), *self, strict=True)
        # One after the other: raw cells are those of `voxelize`, also at their borders.
        cells = [offsets_from(raw, low) / size / step for raw, low, size, step in columns]
        return torch.stack(cells, 1)

    def points_of(self, cells: Tensor) -> Tensor:
        """The inverse of `cells_of`, float64 ``[n, P]``."""
        columns = zip(cells.unbind(1), *self, strict=True)
        points = [cell.double() * (step * size) + low for cell, low, size, step in columns]
        return torch.stack(points, 1)

    def cells_of_lengths(self, lengths: Tensor) -> Tensor:
        """Raw ``lengths`` ``[n, P]`` in cells of the grid, float64 ``[n, P]``."""
        return self._without_origin().cells_of(lengths)

    def lengths_of(self, cells: Tensor) -> Tensor:
        """The inverse of `cells_of_lengths`, float64 ``[n, P]``."""
        return self._without_origin().points_of(cells)

    def _without_origin(self) -> "RawGrid":
        return self._replace(origin=(0.0,) * len(self.origin))


def offsets_from(column: Tensor, low: float) -> Tensor:
    """``column - low`` in float64, of raw coordinates ``[n]`` along one axis.

    Integers are subtracted as such where ``low`` is a whole number: clocks in nanoseconds have more
    digits than float64.
    """
    if not column.is_floating_point() and float(low).is_integer():
        return (column.long() - int(low)).double()
    return column.double() - low


def lower_bound(column: Tensor) -> float:
    """The least of raw coordinates ``[n]``, rounded down to float64; 0 where there are none."""
    if not len(column):
        return 0.0
    least = column.min().item()
    low = float(least)
    return math.nextafter(low, -math.inf) if low > least else low


def keep_cells(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """``exact`` float64 in ``dtype``, lowered to the number before where rounding would raise it
    to the next whole number, that is to another cell.
    """
    rounded = exact.to(dtype)
    nearest = rounded.detach()
    raised = nearest.double().floor() > exact.detach().floor()
    below = torch.nextafter(nearest, torch.full_like(nearest, -math.inf))
    return rounded + torch.where(raised, below - nearest, 0)
