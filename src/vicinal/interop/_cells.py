"""What conversions of cells share whose containers have strides, negative cells or no shape."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._utils.checks import (
    as_integer,
    as_integers,
    as_list,
    check_finite,
    check_offsets,
    check_range,
    check_tensor,
    has_contents,
    refuse,
)
from .._utils.ragged import batch_ids
from .._utils.strides import as_strides
from .._utils.types import BoundsLike, Pooling, StridesLike
from ..pooling import check_pooling, pool_points
from ..pyramid import FeaturePyramid
from ..voxels import voxelize
from ..windows import as_periodic_axes, centers_of_cells
from ._common import LevelPoints, check_level, points_of_level, pyramid_of_points

_NEARLY_WHOLE = 1e-6  # of a cell: what rounding leaves of a whole number of cells


class StridedCells(NamedTuple):
    """The points of one level in the cells of a container, sorted by image and cell.

    Attributes:
        coordinates: int32 ``[m, P + 1]``, image and cell; cell 0 begins at raw coordinate 0.
        values: ``[m, E]``.
        stride: size of a cell along each axis, in raw units or raw cells.
        spatial_shape: along each axis, a number that all cells are below.
        batch_size: number of images.
    """

    coordinates: Tensor
    values: Tensor
    stride: tuple[int, ...]
    spatial_shape: tuple[int, ...]
    batch_size: int

    def corners(self) -> Tensor:
        """int32 ``[m, P]``, the lower corners of the cells: multiples of the stride.

        Raises:
            ValueError: one is out of range.
        """
        cells = self.coordinates[:, 1:].long()
        return as_int32(cells * cells.new_tensor(self.stride))


def attributes(argument: str, container: Any, kind: str, *names: str) -> list[Any]:
    """The attributes of a container.

    Raises:
        ValueError: it lacks one of them, so it is no ``kind``.
    """
    if not all(hasattr(container, name) for name in names):
        refuse(argument, f"{kind}, with {', '.join(names)}", container)
    return [getattr(container, name) for name in names]


def as_stride(argument: str, stride: Any, dim: int) -> tuple[int, ...]:
    """The stride of a container, one int or ``dim`` of them, as a tuple."""
    expected = f"an integer of at least 1, or one for each of {dim} axes"
    given = as_list(argument, stride, expected)
    one = as_integer(given)
    numbers = as_integers(given) if one is None else (one,) * dim
    if numbers is None or len(numbers) != dim or min(numbers) < 1:
        refuse(argument, expected, stride)
    return numbers


def images_of_offsets(argument: str, offsets: Any, n: int, device: torch.device) -> Tensor:
    """int64 ``[n]``, the image of every row, of offsets ``[B + 1]`` on any device."""
    offsets = check_tensor(argument, offsets, ("B + 1",), kind="integer")
    if not len(offsets):
        refuse(argument, "at least one number", offsets)
    check_offsets(argument, offsets, n)
    return batch_ids(offsets.to(device), n)


def pyramid_of_strided_cells(
    argument: str,
    raw: Tensor,
    images: Tensor,
    values: Tensor,
    *,
    stride: tuple[int, ...],
    batch_size: int | None,
    spatial_shape: Sequence[int] | None = None,
    bounds: BoundsLike | None,
    strides: StridesLike,
    pooling: Pooling,
    periodic_axes: Sequence[int],
) -> FeaturePyramid:
    """A pyramid of integer raw coordinates ``[n, P]``, the lower corners of cells of ``stride``.

    Without ``bounds`` the grid begins at 0. Where there are negative coordinates, it begins at the
    first multiple of all strides below them, so that coarser cells are those of strided pooling.

    Args:
        argument: what the coordinates are called in messages.
        raw: integer ``[n, P]``.
        images: integer ``[n]``.
        values: ``[n, E]``.
        stride: ``[P]``, the size of the container's cells, in raw units.
        batch_size: number of images. None: as many as ``images`` name.
        spatial_shape: ``[P]``, the least size of the grid from raw coordinate 0 on, in cells. None:
            that of the points.
        bounds: in raw units, see `voxelize`.
        strides: those of the pyramid's levels, in cells of ``stride``.
        pooling: see `FeaturePyramid.from_points`.
        periodic_axes: see `voxelize`.
    """
    dim = raw.shape[1]
    if not dim:
        refuse(argument, "at least one column beside that of the images", raw)
    _check_contents(argument, raw)
    raw = raw.long()
    if (raw % raw.new_tensor(stride) != 0).any():
        refuse(argument, f"multiples of the stride {stride}", "others")
    multiples = [
        size * math.lcm(*level)
        for size, level in zip(stride, zip(*as_strides(strides, dim), strict=True), strict=True)
    ]
    n_images = as_integer(batch_size)
    if batch_size is not None and (n_images is None or n_images < 0):
        refuse("batch_size", "a non-negative integer", batch_size)
    if n_images is None:
        n_images = int(images.max()) + 1 if len(images) else 0
    check_range(f"images of {argument}", images, n_images)
    extent = [0] * dim if spatial_shape is None else spatial_shape
    least_highs = [size * cells for size, cells in zip(stride, extent, strict=True)]
    voxels = voxelize(
        raw,
        images,
        cell_size=stride,
        bounds=_filled_bounds(bounds, raw, multiples, least_highs, periodic_axes),
        periodic_axes=periodic_axes,
        batch_size=n_images,
    )
    return voxels.pyramid(values, strides=strides, pooling=pooling)


def pyramid_of_raw_points(
    argument: str,
    positions: Tensor,
    images: Tensor | None,
    values: Tensor,
    *,
    batch_size: int | None,
    cell_size: float | Sequence[float],
    bounds: BoundsLike | None,
    strides: StridesLike,
    pooling: Pooling,
    periodic_axes: Sequence[int],
) -> FeaturePyramid:
    """A pyramid of ``positions`` ``[n, P]``, called ``argument`` in messages; see `voxelize`."""
    _check_contents(argument, positions)
    check_finite(argument, positions)
    return pyramid_of_points(
        positions,
        values,
        batch=images,
        batch_size=batch_size,
        cell_size=cell_size,
        bounds=bounds,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
    )


def _check_contents(argument: str, points: Tensor) -> None:
    if not has_contents(points):
        refuse(argument, "a tensor with contents, which the number of cells depends on", points)


def _filled_bounds(
    bounds: BoundsLike | None,
    raw: Tensor,
    multiples: Sequence[int],
    least_highs: Sequence[int],
    periodic_axes: Sequence[int],
) -> list[Any]:
    """``bounds`` with those of the points where there are none, but along periodic axes."""
    dim = len(multiples)
    axes = as_periodic_axes(periodic_axes, dim)
    expected = f"(low, high) or None for each of {dim} axes"
    spans = [None] * dim if bounds is None else as_list("bounds", bounds, expected)
    if not isinstance(spans, Sequence) or len(spans) != dim:
        refuse("bounds", expected, bounds)
    ends = raw if len(raw) else raw.new_zeros(1, dim)
    lows, highs = ends.amin(0).tolist(), ends.amax(0).tolist()
    return [
        (min(0, low // multiple * multiple), max(high + 1, least_high))
        if span is None and axis not in axes
        else span
        for axis, (span, low, high, multiple, least_high) in enumerate(
            zip(spans, lows, highs, multiples, least_highs, strict=True)
        )
    ]


def distinct_points_of_level(
    pyramid: Any, level: int, spatial_shape: Sequence[int] | None = None
) -> LevelPoints:
    """As `points_of_level`; sorted, and points that share a cell are added.

    Points that are so already are not copied.
    """
    points = points_of_level(pyramid, level, spatial_shape)
    if _ascend(points.coordinates):
        return points
    finest, shape = [1] * pyramid.position_dim, pyramid.level_shapes[check_level(pyramid, level)]
    values, coordinates, _ = pool_points(
        points.values, points.coordinates, finest, shape, check_pooling("sum")
    )
    return points._replace(values=values, coordinates=coordinates)


def _ascend(coordinates: Tensor) -> bool:
    """Whether each row of ``[m, P + 1]`` comes after the one before, and none twice."""
    above = torch.zeros_like(coordinates[1:, 0], dtype=torch.bool)
    for step in reversed(coordinates.diff(dim=0).unbind(1)):
        above = (step > 0) | (above & (step == 0))
    return bool(above.all())


def strided_cells_of_level(pyramid: Any, level: int) -> StridedCells:
    """The points of one level in cells that are counted from raw coordinate 0 on.

    Where origin or cell size of the pyramid are not known, raw coordinates are in raw cells from
    the map's corner. The stride is the size of the level's cells: in raw units where the pyramid's
    cell size is whole, as that of a container is; otherwise, such as in meters, in raw cells.

    Raises:
        ValueError: ``pyramid`` is no pyramid or does not know its strides, there is no such level,
            or the map's corner is not a whole number of the level's cells away from 0.
    """
    points = distinct_points_of_level(pyramid, level)
    sizes = raw_sizes(pyramid, level)
    shift = whole_cells(pyramid.origin or [0.0] * len(sizes), sizes)
    if shift is None:
        expected = f"an origin that is a multiple of the level's cells, {list(sizes)}, or None"
        refuse("pyramid", expected, f"the origin {list(pyramid.origin)}")
    whole = all(float(size).is_integer() for size in pyramid.cell_size or ())
    stride = tuple(map(int, sizes)) if whole else pyramid.strides[level]
    if max(stride) >= 2**31:
        refuse("pyramid", "cells of a size that int32 holds", f"a stride of {max(stride)}")
    coordinates = points.coordinates + points.coordinates.new_tensor([0, *shift])
    shape = tuple(cells + first for cells, first in zip(points.spatial_shape, shift, strict=True))
    return StridedCells(as_int32(coordinates), points.values, stride, shape, points.batch_size)


def as_int32(coordinates: Tensor) -> Tensor:
    """Coordinates as int32, which most containers ask for.

    Raises:
        ValueError: one is out of range.
    """
    if coordinates.numel() and int(coordinates.abs().max()) >= 2**31:
        refuse("pyramid", "cells that int32 holds", "larger ones")
    return coordinates.int()


def raw_sizes(pyramid: FeaturePyramid, level: int) -> tuple[float, ...]:
    """The size of the cells of one level, in raw units."""
    if pyramid.strides is None:
        refuse("pyramid", "a pyramid that knows the strides of its levels", pyramid)
    sizes = pyramid.cell_size or (1,) * pyramid.position_dim
    return tuple(size * stride for size, stride in zip(sizes, pyramid.strides[level], strict=True))


def whole_cells(distances: Sequence[float], sizes: Sequence[float]) -> list[int] | None:
    """``distances`` in cells of ``sizes``; None where one is not a whole number of cells."""
    cells = [distance / size for distance, size in zip(distances, sizes, strict=True)]
    if any(abs(number - round(number)) > _NEARLY_WHOLE for number in cells):
        return None
    return [round(number) for number in cells]


def centers_of_points(
    pyramid: FeaturePyramid, level: int, points: LevelPoints, dtype: torch.dtype
) -> Tensor:
    """``[m, P]``: the centers of the cells of points of one level, in raw units.

    Raises:
        ValueError: ``dtype`` is not floating.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        refuse("dtype", "a floating dtype", dtype)
    cells = points.coordinates[:, 1:]
    levels = torch.full_like(cells[:, 0], check_level(pyramid, level))
    centers = centers_of_cells(cells, levels, pyramid.level_shapes, torch.float64)
    return pyramid.raw_from_positions(centers).to(dtype)
