"""Raw coordinates, in any unit, and the cells of a grid that lies over them.

Arithmetic is in float64. Integers, such as clocks in nanoseconds, may have more digits than float64
holds, so they are subtracted, compared and wrapped as integers.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import as_float

_EXACT = 2.0**53  # float64 holds all smaller whole numbers
_INT64 = 2**63
_HALF = 32  # bits of half an int64


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
        cells = [cells_from(raw, low, size) / step for raw, low, size, step in columns]
        return torch.stack(cells, 1)

    def points_of(self, cells: Tensor) -> Tensor:
        """The inverse of `cells_of`, float64 ``[n, P]``."""
        columns = zip(cells.unbind(1), *self, strict=True)
        points = [cell.double() * (step * size) + float(low) for cell, low, size, step in columns]
        return torch.stack(points, 1)

    def cells_of_lengths(self, lengths: Tensor) -> Tensor:
        """Raw ``lengths`` ``[n, P]`` in cells of the grid, float64 ``[n, P]``."""
        return self._without_origin().cells_of(lengths)

    def lengths_of(self, cells: Tensor) -> Tensor:
        """The inverse of `cells_of_lengths`, float64 ``[n, P]``."""
        return self._without_origin().points_of(cells)

    def _without_origin(self) -> "RawGrid":
        return self._replace(origin=(0.0,) * len(self.origin))


def cells_from(column: Tensor, low: float, size: float) -> Tensor:
    """``(column - low) / size`` in float64, of raw coordinates ``[n]`` along one axis.

    Its floor is that of exact arithmetic, up to 2^53, where all numbers are whole and ``column`` is
    of integers.
    """
    cells = _offsets_from(column, low) / size
    if not _all_whole(column, low, size):
        return cells
    column, low, size = column.long(), int(low), int(size)
    # Two divisions, since a difference may overflow.
    quotient = column // size
    borrow = column - quotient * size < low % size
    exact = (quotient - low // size - borrow.long()).double()
    kept = cells.clamp(exact, torch.nextafter(exact + 1, exact))
    return torch.where(cells.abs() < _EXACT, kept, cells)


def at_or_above(column: Tensor, bound: float) -> Tensor:
    """Bool ``[n]``: ``column >= bound``, exactly, for finite raw coordinates ``[n]``."""
    if column.is_floating_point():
        nearest = float(bound)
        least = nearest if nearest >= bound else math.nextafter(nearest, math.inf)
        return column.double() >= least
    whole = math.ceil(bound)
    if not -_INT64 <= whole < _INT64:
        return torch.full_like(column, whole < 0, dtype=torch.bool)
    return column.long() >= whole


def wrap_far(column: Tensor, low: float, period: float) -> Tensor:
    """Raw coordinates ``[n]``, those of integers moved into the period from ``low`` where float64
    does not hold their distance from it.
    """
    if not _all_whole(column, low, period, low + period):
        return column
    low, period = int(low), int(period)
    wrapped = (column.long() % period - low % period) % period + low
    return torch.where(_offsets_from(column, low).abs() < _EXACT, column.long(), wrapped)


def lower_bound(column: Tensor) -> float:
    """The least of raw coordinates ``[n]``, see `as_float`; 0 where there are none."""
    return as_float(column.min().item()) if len(column) else 0.0


def _offsets_from(column: Tensor, low: float) -> Tensor:
    """``column - low`` in float64; that of whole numbers is rounded once."""
    if not _all_whole(column, low):
        return column.double() - float(low)
    # Both halves are exact, and neither overflows.
    column, low = column.long(), int(low)
    mask = 2**_HALF - 1
    upper = ((column >> _HALF) - (low >> _HALF)).double()
    lower = ((column & mask) - (low & mask)).double()
    offsets: Tensor = upper * 2.0**_HALF + lower
    return offsets


def _all_whole(column: Tensor, *numbers: float) -> bool:
    """Whether ``column`` is of integers, and all ``numbers`` are whole and within int64."""
    whole = all(float(number).is_integer() and -_INT64 <= number < _INT64 for number in numbers)
    return whole and not column.is_floating_point()


def keep_cells(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """``exact`` float64 in ``dtype``, lowered to the number before where rounding would raise it
    to the next whole number, that is to another cell.
    """
    rounded = exact.to(dtype)
    nearest = rounded.detach()
    raised = (nearest.double().floor() > exact.detach().floor()) & nearest.isfinite()
    below = torch.nextafter(nearest, torch.full_like(nearest, -math.inf))
    return rounded + torch.where(raised, below - nearest, 0)
