"""Voxels: the cells that raw points in any unit fall into."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._utils.checks import (
    as_float,
    as_integer,
    as_list,
    as_numbers,
    check_finite,
    check_offsets,
    check_range,
    check_tensor,
    has_contents,
    refuse,
)
from ._utils.collation import batched_by_cat
from ._utils.ragged import batch_ids
from ._utils.raw_grid import at_or_above, cells_from, lower_bound, wrap_far
from ._utils.types import BoundsLike, Pooling, StridesLike
from .pyramid import FeaturePyramid
from .windows import as_periodic_axes

_MOST_CELLS = 2**53  # along an axis: float64 holds each of them
_SAME_SIZE = 1e-6  # relative difference of cell sizes that are meant to be equal
_ROUNDING = 2.0**-49  # relative error of bounds that are meant to be a whole number of cells apart


@batched_by_cat
class Voxels(NamedTuple):
    """The cells of raw points. `voxelize` makes it.

    Attributes:
        coordinates: int64 ``[m, P + 1]``: image and cell of each point that lies inside the
            bounds, in the order of the points. Points may share a cell, and images need not be
            sorted.
        spatial_shape: the number of cells along each axis.
        origin: raw coordinates of the lower corner of cell 0, ``[P]``; ints where no float equals
            them, such as clocks in nanoseconds.
        cell_size: size of a cell in raw units, ``[P]``.
        rows: int64 ``[n]``, the row of ``coordinates`` that each point has, or -1 where it lies
            outside.
        batch: int64 ``[n]``, the image of each point.
        batch_size: number of images.
        periodic_axes: axes along which the grid repeats.

    Example:
        ```python
        import torch
        from vicinal import voxelize

        points = torch.tensor([[0.31, 2.7], [9.0, 0.0], [1.99, 0.0]])
        voxels = voxelize(points, cell_size=0.5, bounds=[(0, 2), (0, 4)])
        assert voxels.coordinates.tolist() == [[0, 0, 5], [0, 3, 0]]  # image, cell
        assert voxels.rows.tolist() == [0, -1, 1]  # the second point lies outside
        ```
    """

    coordinates: Tensor
    spatial_shape: tuple[int, ...]
    origin: tuple[float, ...]
    cell_size: tuple[float, ...]
    rows: Tensor
    batch: Tensor
    batch_size: int
    periodic_axes: tuple[int, ...] = ()

    @classmethod
    def cat(cls, parts: Sequence["Voxels"]) -> "Voxels":
        """The cells of the points of several batches, one after another.

        Args:
            parts: at least one, all of the same grid. Spatial shapes may differ along axes that are
                not periodic; the result has the largest.

        Raises:
            ValueError: there is no part, or parts differ in origin, cell size, periodic axes,
                number of cells of a period, or device.

        Example:
            ```python
            import torch
            from vicinal import Voxels, voxelize

            bounds = [(0, 1), (0, 1)]
            parts = [voxelize(torch.rand(n, 2), cell_size=0.1, bounds=bounds) for n in (3, 5)]
            assert Voxels.cat(parts).batch.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
            ```
        """
        _check_alike(parts)
        first = parts[0]
        n_images = itertools.accumulate((part.batch_size for part in parts), initial=0)
        n_rows = itertools.accumulate((len(part.coordinates) for part in parts), initial=0)
        shifts = list(zip(parts, n_images, n_rows, strict=False))
        coordinates = torch.cat([part.coordinates for part in parts])
        coordinates[:, 0] = torch.cat([part.coordinates[:, 0] + image for part, image, _ in shifts])
        return first._replace(
            coordinates=coordinates,
            spatial_shape=tuple(map(max, *(part.spatial_shape for part in (first, *parts)))),
            rows=torch.cat([torch.where(p.rows < 0, -1, p.rows + row) for p, _, row in shifts]),
            batch=torch.cat([part.batch + image for part, image, _ in shifts]),
            batch_size=sum(part.batch_size for part in parts),
        )

    def pyramid(
        self, features: Tensor, *, strides: StridesLike = (1, 2, 4, 8), pooling: Pooling = "mean"
    ) -> FeaturePyramid:
        """Pools the features of the points into a pyramid.

        The pyramid keeps origin, cell size and the rows of the points. So it converts raw
        coordinates to positions, and `FeaturePyramid.values_of_points` maps values on a level back
        to the points.

        Args:
            features: floating or integer ``[n, E]``, of all points, those outside included.
            strides: the size of each level's cells, in cells: one int or P ints per level. Default:
                1, 2, 4, 8.
            pooling: ``"mean"`` (default), ``"sum"`` or ``"max"``.

        Raises:
            ValueError: ``features`` is not a tensor with a row per point on the points' device, or
                as for `FeaturePyramid.from_points`.

        Example:
            ```python
            import torch
            from vicinal import voxelize

            points, features = 3 * torch.rand(100, 2), torch.randn(100, 16)
            pyramid = voxelize(points, cell_size=0.1).pyramid(features, strides=(1, 2, 4))
            assert pyramid.values_of_points(level=2).shape == (100, 16)
            ```
        """
        inside = self.rows >= 0
        shape = (len(self.rows), "E")
        features = check_tensor("features", features, shape, kind="number", device=self.rows.device)
        pooled = FeaturePyramid.from_points(
            self.coordinates,
            features[inside],
            self.spatial_shape,
            self.batch_size,
            strides=strides,
            pooling=pooling,
            periodic_axes=self.periodic_axes,
            origin=self.origin,
            cell_size=self.cell_size,
            keep_point_rows=True,
        )
        assert pooled.point_rows is not None
        rows = pooled.point_rows.new_full((len(inside), pooled.n_levels), -1)
        rows[inside] = pooled.point_rows
        return dataclasses.replace(
            pooled, point_rows=rows, point_batch=self.batch, check_contents=False
        )


def _check_alike(parts: Any) -> None:
    """Raises ValueError unless ``parts`` are of one grid."""
    if not isinstance(parts, Sequence) or not parts:
        refuse("parts", "at least one Voxels", parts)
    for index, part in enumerate(parts):
        if not isinstance(part, Voxels):
            refuse(f"parts[{index}]", "a Voxels", part)
        for (name, want), came in zip(_grid(parts[0]).items(), _grid(part).values(), strict=True):
            if want != came:
                refuse(f"parts[{index}].{name}", f"{want}, as of the first part", f"{came}")


def _grid(voxels: Voxels) -> dict[str, Any]:
    """What `Voxels` of one grid have in common."""
    shape, axes = voxels.spatial_shape, voxels.periodic_axes
    return {
        "origin": voxels.origin,
        "cell_size": voxels.cell_size,
        "periodic_axes": axes,
        "spatial_shape along periodic axes": [shape[axis] for axis in axes],
        "coordinates.device": voxels.coordinates.device,
    }


def voxelize(
    points: Tensor,
    batch: Tensor | None = None,
    offsets: Tensor | None = None,
    *,
    cell_size: float | Sequence[float],
    bounds: BoundsLike | None = None,
    periodic_axes: Sequence[int] = (),
    batch_size: int | None = None,
) -> Voxels:
    """Finds the cells of raw points in any unit.

    Arithmetic is in float64, so cells are exact for UTM coordinates in meters and for clocks in
    microseconds. Clocks in nanoseconds have more digits: they are exact as integers, in cells of a
    whole number of units and with bounds that are whole, given as integers where they exceed 2^53.
    The number of points inside depends on tensor contents, so on a GPU this synchronizes.

    Args:
        points: floating or integer ``[n, P]``, in any unit, a tensor or an array.
        batch: integer ``[n]``, the image of each point, in any order. None (default): see
            ``offsets``.
        offsets: integer ``[B + 1]``: image ``b`` has the points ``offsets[b]:offsets[b + 1]``. None
            (default): all points are in image 0, unless ``batch`` is given.
        cell_size: size of a cell in raw units, one number or one per axis.
        bounds: ``(low, high)`` in raw units for each axis. A point is inside if
            ``low <= x < high`` along all axes. None (default), or None for an axis: from the least
            coordinate of the points, with as many cells as hold all points. Give bounds where
            several batches, or the images of a batch, are to have the same grid.
        periodic_axes: axes along which space repeats, such as an azimuth. Their bounds are one
            period, into which points are wrapped, and must be given. Default: none.
        batch_size: number of images, empty images included. None (default): as many as ``batch``
            or ``offsets`` name.

    Returns:
        the cells of the points inside, the grid, and the row of every point.

    Raises:
        ValueError: shapes, dtypes or devices do not match, a point is not finite, ``batch`` or
            ``offsets`` do not fit the points, a cell size is not above 0, ``low`` is not below
            ``high``, there are more than 2^53 cells along an axis, or a period has no bounds or is
            not a whole number of cells.

    Example:
        ```python
        import math
        import torch
        from vicinal import voxelize

        points = torch.tensor([[3.2, 1.0], [-3.1, 5.0]])  # azimuth, height
        voxels = voxelize(
            points,
            cell_size=(math.pi / 180, 0.5),
            bounds=[(-math.pi, math.pi), (0, 10)],
            periodic_axes=[0],
        )
        assert voxels.spatial_shape == (360, 20)
        assert voxels.coordinates.tolist() == [[0, 3, 2], [0, 2, 10]]
        ```
    """
    points = check_tensor("points", points, ("n", "P"), kind="number").detach()
    dim = points.shape[1]
    if not dim:
        refuse("points", "at least one column", points)
    sizes = as_numbers("cell_size", cell_size, dim)
    if min(sizes) <= 0:
        refuse("cell_size", "sizes above 0", cell_size)
    axes = as_periodic_axes(periodic_axes, dim)
    spans = _as_bounds(bounds, dim, axes)
    if not has_contents(points):
        refuse("points", "a tensor with contents, which the number of cells depends on", points)
    images, n_images = _images(points, batch, offsets, batch_size)
    check_finite("points", points)
    inside = torch.ones_like(images, dtype=torch.bool)
    grid = []
    for axis, (column, size, span) in enumerate(zip(points.unbind(1), sizes, spans, strict=True)):
        line = _line(column, size, span, axis if axis in axes else None)
        inside &= line.inside
        grid.append(line)
    coordinates = torch.stack([images, *(line.cells for line in grid)], 1)[inside]
    return Voxels(
        coordinates,
        tuple(line.n_cells for line in grid),
        tuple(line.low for line in grid),
        tuple(line.cell_size for line in grid),
        (inside.cumsum(0) - 1).masked_fill(~inside, -1),
        images,
        n_images,
        axes,
    )


class _Line(NamedTuple):
    """One axis of a grid, and where the points are along it."""

    n_cells: int
    low: float
    cell_size: float
    cells: Tensor  # int64 [n]
    inside: Tensor  # bool [n]


def _line(
    column: Tensor, size: float, span: tuple[float, float] | None, periodic_axis: int | None
) -> _Line:
    """The cells of ``size`` along one axis, of which ``periodic_axis`` is the index if it is
    periodic, in ``span``, or in the span of the points ``column`` ``[n]``.
    """
    inside = torch.ones_like(column, dtype=torch.bool)
    if span is None:
        low = lower_bound(column)
        cells = cells_from(column, low, size).floor()
        largest = float(cells.max()) if len(cells) else 0.0
        n_cells = math.floor(_check_count(largest)) + 1
    elif periodic_axis is not None:
        low, period = span[0], _length(*span)
        n_cells = _cells_of_period(period, size, periodic_axis)
        size = period / n_cells
        # In cells, as for positions, so that both fall into the same cell at a border.
        cells = cells_from(wrap_far(column, low, period), low, size).remainder(n_cells).floor()
        # The remainder of a small negative number is rounded to the number of cells.
        cells = cells.masked_fill(cells >= n_cells, 0)
    else:
        low, n_cells = span[0], _cells_between(*span, size)
        inside = at_or_above(column, low) & ~at_or_above(column, span[1])
        cells = cells_from(column, low, size).floor()
    return _Line(n_cells, low, size, cells.clamp(0, n_cells - 1).long(), inside)


def _check_count(count: float) -> float:
    if count >= _MOST_CELLS:
        refuse("cell_size", "cells of which at most 2^53 lie along an axis", f"{float(count):.3g}")
    return count


def _length(low: float, high: float) -> float:
    """``high - low``; that of whole numbers is exact, see `as_float`."""
    length = float(high) - float(low)
    if math.isinf(length) or not (float(low).is_integer() and float(high).is_integer()):
        return length
    return as_float(int(high) - int(low))


def _cells_between(low: float, high: float, size: float) -> int:
    """The number of cells of ``size`` from ``low`` that hold all that is below ``high``."""
    _check_count(_length(low, high) / size)
    count = (Fraction(high) - Fraction(low)) / Fraction(size)
    whole = max(round(count), 1)
    # Ten cells of 0.1 are a little more than 1. Whole numbers are not rounded.
    rounded = not all(float(number).is_integer() for number in (low, high, size))
    error = _ROUNDING * (abs(low) + abs(high)) / size if rounded else 0
    return whole if abs(count - whole) <= error else math.ceil(count)


def _cells_of_period(period: float, size: float, axis: int) -> int:
    """The number of cells of ``size`` in a period, which must be a whole number."""
    count = _check_count(period / size)
    whole = max(round(count), 1)
    if abs(count - whole) > _SAME_SIZE * whole:
        fewer = max(math.floor(count), 1)
        expected = (
            f"a whole number of cells in the period {period} of axis {axis}, "
            f"such as cells of {period / fewer} or {period / (fewer + 1)}"
        )
        refuse("cell_size", expected, f"{size}, of which {count} fit")
    return whole


def _as_bounds(
    bounds: BoundsLike | None, dim: int, periodic_axes: Sequence[int]
) -> list[tuple[float, float] | None]:
    """``(low, high)`` of every axis, None where it is to be found from the points."""
    expected = f"(low, high) or None for each of {dim} axes"
    given = as_list("bounds", bounds, expected)
    given = [None] * dim if given is None else given
    if not isinstance(given, Sequence) or len(given) != dim:
        refuse("bounds", expected, bounds)
    spans: list[tuple[float, float] | None] = []
    for axis, span in enumerate(given):
        if span is None:
            if axis in periodic_axes:
                refuse("bounds", f"one period (low, high) for periodic axis {axis}", None)
            spans.append(None)
            continue
        numbers = f"two finite numbers (low, high) for axis {axis}"
        if not isinstance(as_list(f"bounds[{axis}]", span, numbers), Sequence):
            refuse("bounds", expected, bounds)
        low, high = as_numbers(f"bounds[{axis}]", span, 2, numbers)
        if low >= high:
            refuse(f"bounds[{axis}]", "low below high", span)
        spans.append((low, high))
    return spans


def _images(
    points: Tensor, batch: Tensor | None, offsets: Tensor | None, batch_size: int | None
) -> tuple[Tensor, int]:
    """The image of every point, int64 ``[n]``, and the number of images."""
    n, device = len(points), points.device
    size = 0 if batch_size is None else as_integer(batch_size)
    if size is None or size < 0:
        refuse("batch_size", "a non-negative integer", batch_size)
    if batch is not None and offsets is not None:
        refuse("offsets", "None where batch is given", offsets)
    if offsets is not None:
        offsets = check_tensor("offsets", offsets, ("B + 1",), kind="integer", device=device)
        if not len(offsets):
            refuse("offsets", "at least one number", offsets)
        check_offsets("offsets", offsets, n)
        images, named = batch_ids(offsets, n), len(offsets) - 1
    elif batch is not None:
        images = check_tensor("batch", batch, (n,), kind="integer", device=device).long()
        named = int(images.max()) + 1 if n else 0
        check_range("batch", images, named)
    else:
        images, named = torch.zeros(n, dtype=torch.int64, device=device), 1
    if batch_size is not None and size < named:
        refuse("batch_size", f"at least {named}, the number of images of the points", batch_size)
    return images, max(size, named)
