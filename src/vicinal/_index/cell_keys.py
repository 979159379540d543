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


class KeyLayout:
    """The numbers behind `CellKeys`: plain integers, for maps and windows of given sizes.

    Attributes:
        shapes, sizes, batch_size: as given.
        finest: the level with the most cells.
        pads: cells of padding on either side of each level.
        volumes: cells of a level of one image, with the padding.
        bases: the first key of each level.
        strides: ``[L][P]``, from the key of a cell to that of the next along an axis.
        radii: the radius of each level's windows.
        rows: for each level what to add to the key of a window's center for the middle of each of
            the window's rows.
        n_keys: keys are below this number.
        curve_bits: bits per axis of `CellKeys.along_curve`.

    Raises:
        ValueError: there are more cells than 64-bit keys can represent.
    """

    def __init__(self, shapes: LevelShapes, sizes: Sequence[int], batch_size: int) -> None:
        self.shapes, self.sizes, self.batch_size = shapes, tuple(sizes), batch_size
        self.finest, self.dim = finest_level(shapes), len(shapes[0])
        # Twice the radius: the window of a center beyond the edge stays in the padding.
        self.pads = [2 * (size // 2) + 1 for size in sizes]
        padded = [
            [size + 2 * margin for size in shape]
            for shape, margin in zip(shapes, self.pads, strict=True)
        ]
        self.volumes = [math.prod(shape) for shape in padded]
        # Without images, queries have keys all the same, those of image 0.
        n_images = max(batch_size, 1)
        self.n_keys = sum(self.volumes) * n_images
        if self.n_keys >= 2**62:
            refuse("level_shapes", "fewer than 2^62 cells in all, with their borders", str(shapes))
        # Enough for the longest axis, but key and group must fit in 61 bits.
        self.n_groups = n_images * len(shapes) + 1
        available = 46 if self.n_groups < 2**15 else 29
        self.curve_bits = min(max(map(max, padded)).bit_length(), available // self.dim)
        before = itertools.accumulate(self.volumes, initial=0)
        self.bases = [n_images * cells for cells in before][:-1]
        self.strides = [
            [math.prod(shape[axis + 1 :]) for axis in range(self.dim)] for shape in padded
        ]
        self.radii = [size // 2 for size in sizes]
        self.rows = [
            [
                sum(map(operator.mul, offset, stride))
                for offset in window_offsets(size, self.dim - 1)
            ]
            for size, stride in zip(sizes, self.strides, strict=True)
        ]

    @property
    def key_dtype(self) -> torch.dtype:
        """int32 where that holds all keys and, after them, all keys along the curve."""
        curve = self.n_groups << (self.curve_bits * self.dim)
        return torch.int32 if self.n_keys + curve < 2**31 else torch.int64


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
        self.layout, self._device = KeyLayout(shapes, sizes, batch_size), device
        self._pad = self._tensor(self.layout.pads)
        self._volume = self._tensor(self.layout.volumes)
        self._base = self._tensor(self.layout.bases)
        self._stride = self._tensor(self.layout.strides)
        self._shapes = self._tensor(shapes)
        self._radius = self._tensor(self.layout.radii)

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
            for level, (offsets, radius) in enumerate(
                zip(self.layout.rows, self.layout.radii, strict=True)
            )
            for offset in offsets
        ]
        level, offset, radius = (self._tensor(column) for column in zip(*rows, strict=True))
        return level, offset, radius

    def rows_around(self, keys: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
        """First and last keys ``[n, max w ** (P - 1)]`` of the rows of the windows centered on
        ``keys`` at ``levels``, ``[n]`` each. Rows that a level does not have are empty.
        """
        own = self.layout.rows
        width = max(map(len, own))
        rows = self._tensor([row + [0] * (width - len(row)) for row in own])
        used = self._tensor([len(row) for row in own])[levels, None]
        middles = keys[:, None] + rows[levels]
        radius = self._radius[levels, None]
        row_valid = torch.arange(width, device=keys.device) < used
        return middles - radius, torch.where(row_valid, middles + radius, -1)

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
