"""Integer keys that sort the cells of all images and levels in one order."""

import itertools
import math
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from .._utils.checks import LevelShapes, refuse
from .._utils.constants import constant
from ..windows import finest_level, window_offsets


class CellKeys:
    """Keys that sort cells by (level, image, cell row-major), each level padded by its windows.

    The padding holds window centers outside the map whose windows still overlap it, and one more
    cell on either side for all centers farther away. So the rows of a window never run into each
    other, and the key of a cell is the key of its window's center plus a constant.

    Raises:
        ValueError: there are more cells than 64-bit keys can represent.
    """

    def __init__(
        self, shapes: LevelShapes, sizes: Sequence[int], batch_size: int, device: torch.device
    ) -> None:
        self.finest = finest_level(shapes)
        self.batch_size, self._level_shapes, self._sizes = batch_size, shapes, sizes
        self._device, self._dim = device, len(shapes[0])
        # Twice the radius: the window of a center beyond the edge stays in the padding.
        pad = [2 * (size // 2) + 1 for size in sizes]
        padded = [
            [size + 2 * margin for size in shape] for shape, margin in zip(shapes, pad, strict=True)
        ]
        volumes = [math.prod(shape) for shape in padded]
        if sum(volumes) * max(batch_size, 1) >= 2**62:
            refuse("level_shapes", "fewer than 2^62 cells in all, with their borders", str(shapes))
        # Bits per axis: enough for the longest, but key and group must fit in 64 bits.
        self._bits = min(max(map(max, padded)).bit_length(), 46 // self._dim)
        strides = [[math.prod(shape[axis + 1 :]) for axis in range(self._dim)] for shape in padded]
        before = itertools.accumulate(volumes, initial=0)
        self._pad = self._tensor(pad)
        self._volume = self._tensor(volumes)
        self._base = self._tensor([batch_size * cells for cells in before][:-1])
        self._stride = self._tensor(strides)
        self._shapes = self._tensor(shapes)
        self._radii = [size // 2 for size in sizes]
        self._radius = self._tensor(self._radii)
        # What to add to the key of a window's center for the middle of each of its rows.
        self._rows = [
            [
                sum(map(operator.mul, offset, stride))
                for offset in window_offsets(size, self._dim - 1)
            ]
            for size, stride in zip(sizes, strides, strict=True)
        ]

    def to(self, device: torch.device | str) -> "CellKeys":
        """The same keys for tensors on another device."""
        device = torch.device(device)
        return CellKeys(self._level_shapes, self._sizes, self.batch_size, device)

    def _tensor(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return constant(numbers, self._device)

    def clamp(self, centers: Tensor) -> Tensor:
        """Float centers ``[L, N, P]`` as int64. Those whose window misses the map, and NaN, go
        to the outermost cells of the padding.
        """
        # Clamped twice: to the range of int64, then exactly to the padded map.
        cells = torch.nan_to_num(centers, nan=-math.inf).clamp(-(2.0**62), 2.0**62).long()
        low, high = -self._radius[:, None] - 1, self._shapes + self._radius[:, None]
        return cells.clamp(low[:, None], high[:, None])

    def of(self, cells: Tensor, levels: Tensor, images: Tensor) -> Tensor:
        """Keys of ``cells`` ``[..., P]`` at ``levels`` in ``images``, broadcast to ``[...]``."""
        within = ((cells + self._pad[levels][..., None]) * self._stride[levels]).sum(-1)
        return self._base[levels] + images * self._volume[levels] + within

    def window_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """The R rows of a query's windows, ``[R]`` each: the level, what to add to the key of that
        level's center for the row's middle, and the radius of the row.
        """
        rows = [
            (level, offset, radius)
            for level, (offsets, radius) in enumerate(zip(self._rows, self._radii, strict=True))
            for offset in offsets
        ]
        level, offset, radius = (self._tensor(column) for column in zip(*rows, strict=True))
        return level, offset, radius

    def rows_around(self, keys: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """First and last keys ``[n, max w ** (P - 1)]`` of the rows of the windows centered on
        ``keys`` at ``levels``, ``[n]`` each. Rows that a level does not have are empty.
        """
        width = max(map(len, self._rows))
        rows = self._tensor([row + [0] * (width - len(row)) for row in self._rows])
        used = self._tensor([len(row) for row in self._rows])[levels, None]
        middles = keys[:, None] + rows[levels]
        radius = self._radius[levels, None]
        row_valid = torch.arange(width, device=keys.device) < used
        return middles - radius, torch.where(row_valid, middles + radius, -1)

    def along_curve(self, cells: Tensor, group: Tensor) -> Tensor:
        """Keys that sort ``cells`` ``[n, P]`` along a Z-order curve, group by group.

        Negative coordinates are clamped to zero. An offset instead would shift the blocks of the
        curve against the cells of coarser levels.
        """
        bits, dim = self._bits, self._dim
        spread = cells.clamp(min=0) & ((1 << bits) - 1)
        # Spreads the bits of a coordinate until they are dim apart: each step halves the runs of
        # adjacent bits and moves the upper halves up.
        for run in (1 << power for power in reversed(range((bits - 1).bit_length()))):
            runs = sum(((1 << run) - 1) << (run * dim * i) for i in range(-(-bits // run)))
            runs &= (1 << (bits * dim)) - 1
            spread = (spread | (spread << (run * (dim - 1)))) & runs
        axes = torch.arange(dim - 1, -1, -1, device=cells.device)
        return (group << (bits * dim)) + (spread << axes).sum(-1)
