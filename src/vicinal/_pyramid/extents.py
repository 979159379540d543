"""The raw cells that all levels of a map span."""

import operator
from collections.abc import Sequence

from torch import Tensor

from .._utils.checks import LevelShapes, refuse
from .._utils.strides import Strides


def extent_of_levels(
    argument: str, shapes: LevelShapes, strides: Strides, periodic_axes: Sequence[int]
) -> list[int]:
    """The raw cells along each axis that hold all levels; the same for all on a periodic axis."""
    levels = zip(shapes, strides, strict=True)
    extents = zip(*(map(operator.mul, *level) for level in levels), strict=True)
    held = []
    for axis, sizes in enumerate(extents):
        if axis in periodic_axes and len(set(sizes)) > 1:
            expected = f"levels of one extent, size times stride, along periodic axis {axis}"
            refuse(argument, expected, str(list(sizes)))
        held.append(max(sizes))
    return held


def extent_of_points(
    coordinates: Tensor, extent: Sequence[int], strides: Strides, periodic_axes: Sequence[int]
) -> list[int]:
    """``extent``, enlarged until it holds all points; a periodic axis keeps its own."""
    held = list(extent)
    for level, stride in enumerate(strides):
        cells = coordinates[coordinates[:, -1] == level, 1:-1]
        stops = (cells.amax(0) + 1).tolist() if cells.shape[0] else [0] * len(held)
        held = [
            max(size, stop * step) for size, stop, step in zip(held, stops, stride, strict=True)
        ]
    return [extent[axis] if axis in periodic_axes else size for axis, size in enumerate(held)]
