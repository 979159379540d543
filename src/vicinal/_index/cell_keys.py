"""Integer keys that sort the cells of all images and levels in one order."""

import itertools
import math
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._utils.caching import cached
from .._utils.checks import LevelShapes, refuse
from .._utils.constants import Numbers, constant
from ..window_shapes import AxisWindows, Windows, window_rows
from ..windows import finest_level


class RowKeys(NamedTuple):
    """A row of the windows of a level: the keys from ``key of the first cell + first`` on."""

    first: int
    width: int


class KeyLayout:
    """The numbers behind `CellKeys`: plain integers, for maps and windows of given sizes.

    Attributes:
        shapes, batch_size: as given.
        windows: as given, with their axes in key order.
        axes: ``[L][P]``, the axis that each key axis is.
        finest: the level with the most cells.
        pads: ``[L][P]``, by key axis as all that follow, cells of padding on either side of each
            level; along dilated axes, of the cells of each remainder.
        lengths: ``[L][P]``, cells along each axis without the padding; along dilated axes, those of
            a remainder.
        volumes: cells of a level of one image, with the padding.
        bases: the first key of each level.
        strides: ``[L][P]``, from the key of a cell to that of the next along an axis.
        rows: for each level the rows of its windows.
        n_keys: keys are below this number.
        curve_bits: bits per axis of `CellKeys.along_curve`.

    Raises:
        ValueError: there are more cells than 64-bit keys can represent.
    """

    def __init__(self, shapes: LevelShapes, windows: Windows, batch_size: int) -> None:
        self.shapes, self.batch_size = shapes, batch_size
        self.windows = tuple(window.in_key_order() for window in windows)
        self.axes = [window.key_axes() for window in windows]
        self.finest, self.dim = finest_level(shapes), len(shapes[0])
        self.pads = [[_pad(size) for size in window.sizes] for window in self.windows]
        self.lengths = [
            [
                _length(shape[axis], dilation)
                for axis, dilation in zip(axes, window.dilations, strict=True)
            ]
            for shape, axes, window in zip(shapes, self.axes, self.windows, strict=True)
        ]
        padded = [
            [_padded(shape[axis], window, axis) for axis in axes]
            for shape, axes, window in zip(shapes, self.axes, windows, strict=True)
        ]
        self.volumes = [math.prod(shape) for shape in padded]
        # Without images, queries have keys all the same, those of image 0.
        n_images = max(batch_size, 1)
        self.n_keys = sum(self.volumes) * n_images
        if self.n_keys >= 2**62:
            spans = [tuple(map(operator.mul, window.sizes, window.dilations)) for window in windows]
            came = f"{shapes} with windows that span {spans} cells"
            refuse("level_shapes", "fewer than 2^62 cells in all, with their borders", came)
        # Enough for the longest axis, but key and group must fit in 61 bits.
        self.n_groups = n_images * len(shapes) + 1
        available = 46 if self.n_groups < 2**15 else 29
        self.curve_bits = min(max(map(max, padded)).bit_length(), available // self.dim)
        before = itertools.accumulate(self.volumes, initial=0)
        self.bases = [n_images * cells for cells in before][:-1]
        self.strides = [
            [math.prod(shape[axis + 1 :]) for axis in range(self.dim)] for shape in padded
        ]
        # The key of cell 0 of image 0.
        self.origins = [
            base + sum(map(operator.mul, pads, strides))
            for base, pads, strides in zip(self.bases, self.pads, self.strides, strict=True)
        ]
        self.rows = list(map(_keys_of_rows, windows, self.strides))

    @property
    def key_dtype(self) -> torch.dtype:
        """int32 where that holds all keys and, after them, all keys along the curve."""
        curve = self.n_groups << (self.curve_bits * self.dim)
        return torch.int32 if self.n_keys + curve < 2**31 else torch.int64


@cached
def key_layout(shapes: LevelShapes, windows: Windows, batch_size: int) -> KeyLayout:
    """The `KeyLayout`, kept for the next plans of the same maps and windows."""
    return KeyLayout(shapes, windows, batch_size)


def longest_axis(shapes: LevelShapes, windows: Windows) -> int:
    """The most cells along an axis of any level, with their padding."""
    return max(
        _padded(cells, window, axis)
        for shape, window in zip(shapes, windows, strict=True)
        for axis, cells in enumerate(shape)
    )


def _padded(cells: int, window: AxisWindows, axis: int) -> int:
    """The cells along an axis of a level, all remainders one after another, each padded."""
    dilation = window.dilations[axis]
    return dilation * (_length(cells, dilation) + 2 * _pad(window.sizes[axis]))


def _length(cells: int, dilation: int) -> int:
    """How many of the cells along an axis have one remainder, at most."""
    return -(-cells // dilation)


def _pad(size: int) -> int:
    """The first cell of a window that overlaps the map is less than its size outside it."""
    return max(size, 1)


def _keys_of_rows(window: AxisWindows, strides: Sequence[int]) -> list[RowKeys]:
    return [
        RowKeys(sum(map(operator.mul, row.steps, strides)) + row.start, row.width)
        for row in window_rows(window)
    ]


class CellKeys:
    """Keys that sort cells by (level, image, cell row-major), each level padded by its windows.

    The cells are in key coordinates, see `window_shapes.AxisWindows`. The padding holds windows
    that overlap the map's edge, and one just outside on either side for all windows farther away.
    So the rows of a window never run into each other, and the key of a cell is the key of its
    window's first cell plus a constant.

    Raises:
        ValueError: there are more cells than 64-bit keys can represent.
    """

    def __init__(
        self, shapes: LevelShapes, windows: Windows, batch_size: int, device: torch.device
    ) -> None:
        self.layout, self._device = key_layout(shapes, windows, batch_size), device
        self._pad = self._tensor(self.layout.pads)
        self._length = self._tensor(self.layout.lengths)
        self._volume = self._tensor(self.layout.volumes)
        self._origin = self._tensor(self.layout.origins)
        self._stride = self._tensor(self.layout.strides)
        self._first = self._tensor([window.first_steps() for window in self.layout.windows])
        axes, natural = self.layout.axes, tuple(range(self.layout.dim))
        self._axes = None if all(own == natural for own in axes) else self._tensor(axes)
        dilations = [window.dilations for window in self.layout.windows]
        self._dilation = self._tensor(dilations) if max(map(max, dilations)) > 1 else None

    def _tensor(self, numbers: Numbers) -> Tensor:
        return constant(numbers, self._device)

    def first_cells(self, anchors: Tensor) -> Tensor:
        """The first cells of windows, in key coordinates, from their anchors ``[L, N, P]``.

        Windows that miss the map go to the outermost cells of the padding.
        """
        if self._axes is not None:
            anchors = anchors.gather(2, self._axes[:, None].expand_as(anchors))
        index, shift = self._split(anchors, self._dilation)
        low, high = -self._pad - self._first, self._length - self._first
        index = index.clamp(low[:, None], high[:, None]).add_(self._first[:, None])
        return index if shift is None else index.add_(shift)

    def key_cells(self, cells: Tensor, levels: Tensor) -> Tensor:
        """``cells`` ``[n, P]`` at ``levels`` ``[n]`` in key coordinates."""
        if self._axes is not None:
            cells = cells.gather(1, self._axes[levels])
        dilation = None if self._dilation is None else self._dilation[levels]
        index, shift = self._split(cells, dilation, levels)
        return index if shift is None else index + shift

    def _split(
        self, cells: Tensor, dilation: Tensor | None, levels: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Indices of cells among those of their remainder, and where these begin; None: at 0."""
        if dilation is None:
            return cells, None
        length = self._length + 2 * self._pad
        if levels is None:
            dilation, length = dilation[:, None], length[:, None]
        else:
            length = length[levels]
        index = torch.div(cells, dilation, rounding_mode="floor")
        return index, (cells - index * dilation) * length

    def of(self, cells: Tensor, levels: Tensor, images: Tensor) -> Tensor:
        """Keys of ``cells`` ``[..., P]``, in key coordinates, at ``levels`` in ``images``,
        broadcast to ``[...]``.
        """
        keys = torch.addcmul(self._origin[levels], images, self._volume[levels])
        for axis, strides in enumerate(self._stride.unbind(1)):  # faster than a sum over axes
            keys = torch.addcmul(keys, cells[..., axis], strides[levels])
        return keys

    def window_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The R rows of a query's windows, ``[R]`` each: the level, what to add to the key of that
        level's first cell for the first cell of the row, and the row's width.
        """
        rows = [(level, *row) for level, rows in enumerate(self.layout.rows) for row in rows]
        level, first, width = (self._tensor(column) for column in zip(*rows, strict=True))
        return level, first, width

    def rows_around(self, keys: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """The keys of the first cells of windows that have the cells of ``keys`` in a row.

        Args:
            keys, levels: ``[n]`` each, of cells.

        Returns:
            The first and the last key, ``[n, max R[l]]`` each, for each row of the windows of a
            cell's level. Rows that a level does not have are empty.
        """
        width = max(map(len, self.layout.rows))
        padding = RowKeys(0, 0)
        rows = [[*own, *[padding] * (width - len(own))] for own in self.layout.rows]
        firsts = self._tensor([[row.first for row in own] for own in rows])[levels]
        widths = self._tensor([[row.width for row in own] for own in rows])[levels]
        last = keys[:, None] - firsts
        return last - widths + 1, torch.where(widths > 0, last, -1)

    def along_curve(self, cells: Tensor, group: Tensor) -> Tensor:
        """Keys that sort ``cells`` ``[n, P]`` along a Z-order curve, group by group.

        Negative coordinates are clamped to zero. An offset instead would shift the blocks of the
        curve against the cells of coarser levels.
        """
        bits, dim = self.layout.curve_bits, self.layout.dim
        spread = cells.clamp(min=0) & ((1 << bits) - 1)
        # Spreads the bits of a coordinate until they are dim apart: each step halves the runs of
        # adjacent bits and moves the upper halves up.
        for run in (1 << power for power in reversed(range((bits - 1).bit_length()))):
            runs = sum(((1 << run) - 1) << (run * dim * i) for i in range(-(-bits // run)))
            runs &= (1 << (bits * dim)) - 1
            spread = (spread | (spread << (run * (dim - 1)))) & runs
        axes = torch.arange(dim - 1, -1, -1, device=cells.device)
        return (group << (bits * dim)) + (spread << axes).sum(-1)
