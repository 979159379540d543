"""Strides of levels, and the level shapes that make positions exact."""

import math
from collections.abc import Sequence
from typing import Any

from .checks import LevelShapes, as_integer, as_integers, as_list, refuse

Strides = tuple[tuple[int, ...], ...]


def as_strides(strides: Any, position_dim: int, n_levels: int | None = None) -> Strides:
    """``strides`` as a tuple per level of one int per axis.

    Args:
        strides: one stride, or a sequence with one per level: an int, or one int per axis. A tensor
            or an array ``[L]`` or ``[L, P]`` serves as well.
        position_dim: number of spatial dimensions, P.
        n_levels: the number of levels, L; None: any.

    Raises:
        ValueError: ``strides`` is something else, or a stride is below 1.
    """
    levels = "" if n_levels is None else f"{n_levels} levels: "
    expected = f"{levels}integers of at least 1, or one for each of {position_dim} axes, per level"
    given = as_list("strides", strides, expected)
    given = [given] if as_integer(given) is not None else given
    if not isinstance(given, Sequence) or not given or len(given) != (n_levels or len(given)):
        refuse("strides", expected, strides)
    checked = []
    for level in given:
        stride = as_integer(level)
        numbers = as_integers(level) if stride is None else (stride,) * position_dim
        if numbers is None or len(numbers) != position_dim or min(numbers) < 1:
            refuse("strides", expected, strides)
        checked.append(numbers)
    return tuple(checked)


def shapes_from_strides(
    sizes: Sequence[int], strides: Strides, periodic_axes: Sequence[int], argument: str
) -> LevelShapes:
    """The shape of every level of a grid of ``sizes`` raw cells.

    Along each axis the grid is padded to a common multiple of the strides. So the size of a level
    times its stride is the same for all levels, and their scales are exact ratios of strides.

    Raises:
        ValueError: the size along a periodic axis, which is not padded, is not a multiple of every
            stride.
    """
    extents = []
    for axis, size in enumerate(sizes):
        multiple = math.lcm(*(level[axis] for level in strides))
        if axis in periodic_axes and size % multiple:
            expected = f"a multiple of all strides, {multiple}, along periodic axis {axis}"
            refuse(argument, expected, str(size))
        extents.append(-(-size // multiple) * multiple)
    return tuple(
        tuple(extent // stride for extent, stride in zip(extents, level, strict=True))
        for level in strides
    )


def least_strides(strides: Strides) -> tuple[int, ...]:
    """``[P]``: raw cells per cell of the full shape, along each axis."""
    return tuple(map(min, zip(*strides, strict=True)))


def check_strides_of_shapes(strides: Strides, level_shapes: LevelShapes) -> None:
    """Raises ValueError unless all levels times their strides have the same extent."""
    extents = {
        tuple(size * stride for size, stride in zip(*level, strict=True))
        for level in zip(level_shapes, strides, strict=True)
    }
    if len(extents) > 1:
        expected = f"strides with which all levels {list(level_shapes)} have the same extent"
        refuse("strides", expected, str(list(strides)))
