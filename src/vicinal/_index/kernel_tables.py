"""A plan's geometry as tables of integers, for the kernels that make plans on a GPU."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._utils.caching import cached
from .._utils.checks import LevelShapes
from .._utils.constants import cached_on_gpu, constant
from ..window_shapes import Windows
from ..windows import centers_in_float64, full_shape
from .cell_keys import KeyLayout, key_layout

_NO_LAST_CELL = 2**31 - 1
_LARGEST_CELL = 2**31 - 128  # of int32, as float32

Rows = tuple[tuple[int, ...], ...]


class KernelTables(NamedTuple):
    """What the planning ops of a back end take besides tensors of queries and points.

    Attributes:
        layout: of the keys.
        levels: a row per level: the first key, the number of keys of an image; then for each axis
            the size, the distance of keys, the full size, the last cell of a periodic axis, the
            padding, and the distance from the first cell of a window to its center.
        query_slots: a row for each of a query's R slices: its level, what to add to the key of the
            window's first cell for the first and for the last key of the slice, and 1.
        point_slots: likewise for the slices of a point, whose windows are those of its level: what
            to add to its key. Each level has as many rows as the one with the most. The first
            number of a row is zero, the last is zero for rows that only fill up.
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
        fits = max(map(max, shapes)) <= 2**30 and max(map(max, pads)) < _LARGEST_CELL - 2**30
        return fits and n_keys <= 2**30 and n_queries * len(shapes) <= 2**30

    @cached_on_gpu
    def on(self, device: torch.device, key_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """The tables of levels, int64, and of the slots of queries and of points, in the dtype of
        keys, on a device.
        """
        query_slots, point_slots = (
            constant(table, device, key_dtype) for table in (self.query_slots, self.point_slots)
        )
        return constant(self.levels, device), query_slots, point_slots


@cached
def kernel_tables(
    shapes: LevelShapes, windows: Windows, batch_size: int, periodic_axes: tuple[int, ...]
) -> KernelTables | None:
    """The tables of maps and windows, kept for the next plans of the same ones; None for windows
    that the kernels do not take.
    """
    if not all(window.is_plain() for window in windows):
        return None
    layout = key_layout(shapes, windows, batch_size)
    double = int(centers_in_float64(shapes))
    widest = max(row.width for rows in layout.rows for row in rows)
    return KernelTables(
        layout,
        _level_rows(layout, periodic_axes),
        tuple(_query_slots(layout)),
        tuple(_point_slots(layout)),
        (batch_size, layout.n_keys, layout.curve_bits, layout.finest, double, max(widest, 1)),
    )


def _level_rows(layout: KeyLayout, periodic_axes: Sequence[int]) -> Rows:
    full = full_shape(layout.shapes)
    rows = []
    for level, shape in enumerate(layout.shapes):
        row = [layout.bases[level], layout.volumes[level]]
        firsts = layout.windows[level].first_steps()
        for axis, size in enumerate(shape):
            last = size - 1 if axis in periodic_axes else _NO_LAST_CELL
            row += [size, layout.strides[level][axis], full[axis], last]
            row += [layout.pads[level][axis], -firsts[axis]]
        rows.append(tuple(row))
    return tuple(rows)


def _query_slots(layout: KeyLayout) -> Iterator[tuple[int, ...]]:
    for level, rows in enumerate(layout.rows):
        yield from ((level, row.first, row.first + row.width - 1, 1) for row in rows)


def _point_slots(layout: KeyLayout) -> list[tuple[int, ...]]:
    most = max(map(len, layout.rows))
    slots: list[tuple[int, ...]] = []
    for rows in layout.rows:
        slots += [(0, 1 - row.first - row.width, -row.first, 1) for row in rows]
        slots += [(0, 1, 0, 0)] * (most - len(rows))  # as `CellKeys.rows_around` has them
    return slots
