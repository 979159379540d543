"""What all conversions share: cells or raw points in, the points of one level out."""

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._utils.checks import as_integer, as_spatial_shape, refuse
from .._utils.types import Pooling, StridesLike
from ..pyramid import FeaturePyramid


class LevelPoints(NamedTuple):
    """The points of one level, sorted by image and cell.

    Attributes:
        coordinates: int64 ``[m, P + 1]``, image and cell of each point.
        values: ``[m, E]``.
        spatial_shape: number of cells along each axis.
        batch_size: number of images.
    """

    coordinates: Tensor
    values: Tensor
    spatial_shape: tuple[int, ...]
    batch_size: int


def pyramid_of_cells(
    coordinates: Tensor,
    values: Tensor,
    spatial_shape: Sequence[int],
    batch_size: int,
    *,
    strides: StridesLike,
    pooling: Pooling,
    periodic_axes: Sequence[int],
) -> FeaturePyramid:
    """A pyramid of points ``[n, P + 1]`` (image, cell) on a grid that the container has.

    It keeps the row of each point, so `FeaturePyramid.values_of_points` has the container's order.
    """
    return FeaturePyramid.from_points(
        coordinates,
        values,
        spatial_shape,
        batch_size,
        strides=strides,
        pooling=pooling,
        periodic_axes=periodic_axes,
        keep_point_rows=True,
    )


def points_of_level(
    pyramid: Any, level: int, spatial_shape: Sequence[int] | None = None
) -> LevelPoints:
    """The points of one level; ``spatial_shape`` is that of the result, None for the level's.

    Raises:
        ValueError: ``pyramid`` is no pyramid, it has no such level, or points lie outside
            ``spatial_shape``.
    """
    if not isinstance(pyramid, FeaturePyramid):
        refuse("pyramid", "a FeaturePyramid", pyramid)
    index = as_integer(level)
    if index is None or not 0 <= index < pyramid.n_levels:
        refuse("level", f"a level in [0, {pyramid.n_levels})", level)
    shape = pyramid.level_shapes[index]
    rows = (pyramid.levels == index).nonzero()[:, 0]
    coordinates = pyramid.coordinates[rows, :-1]
    if spatial_shape is not None:
        shape = _shape_that_holds(coordinates[:, 1:], spatial_shape)
    return LevelPoints(coordinates, pyramid.values[rows], shape, pyramid.batch_size)


def _shape_that_holds(cells: Tensor, spatial_shape: Sequence[int]) -> tuple[int, ...]:
    shape = as_spatial_shape(spatial_shape, cells.shape[1])
    if (cells >= torch.tensor(shape, device=cells.device)).any():
        refuse("spatial_shape", f"a shape that holds cells up to {cells.amax(0).tolist()}", shape)
    return shape


def import_library(name: str, package: str | None = None) -> ModuleType:
    """Imports a library on first use.

    Raises:
        ImportError: it is not installed; the message names the package that has it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:  # what is missing is something that it needs
            raise
        raise ImportError(
            f"this conversion needs {package or name}, which is not installed"
        ) from error
