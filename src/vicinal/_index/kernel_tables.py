"""A plan's geometry as tables of integers, for the kernels that make plans on a GPU."""

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._utils.checks import LevelShapes
from .._utils.constants import constant
from ..windows import centers_in_float64, full_shape
from .cell_keys import KeyLayout

_NO_LAST_CELL = 2**31 - 1
_LARGEST_CELL = 2**31 - 128  # of int32, as float32

Rows = tuple[tuple[int, ...], ...]


class KernelTables(NamedTuple):
    """What the planning ops of a back end take besides tensors of queries and points.

    Attributes:
        layout: of the keys.
        levels: a row per level: the first key, the number of keys of an image, padding, radius;
            then for each axis the size, the distance of keys, the full size, and the last cell of a
            periodic axis.
        query_slots: a row for each of a query's R slices: its level, what to add to the key of the
            center, the radius, and 1.
        point_slots: likewise for the slices of a point, whose windows are those of its level: each
            level has as many rows as the one with the most. The first number of a row is zero,
            the last is zero for rows that only fill up.
        numbers: the numbers of images and of keys, bits per axis of the curve, the finest level,
            whether centers are computed in float64, and the width of the widest window.
    """

    layout: KeyLayout
    levels: Rows
    query_slots: Rows
    point_slots: Rows
    numbers: tuple[int, ...]

    def fits(self, n_queries: int, n_keys: int) -> bool:
        """Whether int32 holds all cells, also those of windows beyond the map, and the indices of
        ``n_queries`` queries at all levels, and of ``n_keys`` points, with room for a search.
        """
        shapes, pads = self.layout.shapes, self.layout.pads
        fits = max(map(max, shapes)) <= 2**30 and max(pads) < _LARGEST_CELL - 2**30
        return fits and n_keys <= 2**30 and n_queries * len(shapes) <= 2**30

    def on(self, device: torch.device, key_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The tables of levels, int64, and of the slots of queries and of points, in the dtype of
        keys, on a device.
        """
        query_slots, point_slots = (
            constant(table, device, key_dtype) for table in (self.query_slots, self.point_slots)
        )
        return constant(self.levels, device), query_slots, point_slots


def kernel_tables(
    shapes: LevelShapes, sizes: Sequence[int], batch_size: int, periodic_axes: Sequence[int]
) -> KernelTables:
    """The tables of maps and windows of given sizes, kept for the next plans of the same sizes."""
    arguments = shapes, tuple(sizes), batch_size, tuple(periodic_axes)
    # The compiler warns of caches of functions.
    return _tables(*arguments) if torch.compiler.is_compiling() else _cached_tables(*arguments)


def _tables(
    shapes: LevelShapes, sizes: tuple[int, ...], batch_size: int, periodic_axes: tuple[int, ...]
) -> KernelTables:
    layout = KeyLayout(shapes, sizes, batch_size)
    double = int(centers_in_float64(shapes))
    return KernelTables(
        layout,
        _level_rows(layout, periodic_axes),
        tuple(
            (level, offset, radius, 1)
            for level, (offsets, radius) in enumerate(zip(layout.rows, layout.radii, strict=True))
            for offset in offsets
        ),
        tuple(_point_slots(layout)),
        (batch_size, layout.n_keys, layout.curve_bits, layout.finest, double, max(sizes)),
    )


_cached_tables = functools.lru_cache(maxsize=256)(_tables)


def _level_rows(layout: KeyLayout, periodic_axes: Sequence[int]) -> Rows:
    full = full_shape(layout.shapes)
    rows = []
    for level, shape in enumerate(layout.shapes):
        row = [layout.bases[level], layout.volumes[level], layout.pads[level], layout.radii[level]]
        for axis, size in enumerate(shape):
            last = size - 1 if axis in periodic_axes else _NO_LAST_CELL
            row += [size, layout.strides[level][axis], full[axis], last]
        rows.append(tuple(row))
    return tuple(rows)


def _point_slots(layout: KeyLayout) -> list[tuple[int, ...]]:
    width = max(map(len, layout.rows))
    return [
        (0, offset, radius, int(index < len(offsets)))
        for offsets, radius in zip(layout.rows, layout.radii, strict=True)
        for index, offset in enumerate(
            itertools.chain(offsets, itertools.repeat(0, width - len(offsets)))
        )
    ]
