"""Tensors as the kernels of tiles take them, and how these are launched."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..._utils.constants import constant
from ..types import Tiles
from .background import Cells
from .parts import Rows
from .tile_walk import Walk

_NARROWEST = 16  # what a matrix unit takes


def launch(kernel: Any, n_programs: int, *arguments: Any, num_warps: int, **constants: Any) -> None:
    """Runs ``n_programs`` of a kernel, none if that is zero."""
    if n_programs:
        # Products that are added are rounded once: what Triton does if not told varies.
        options = {"num_warps": num_warps, "enable_fp_fusion": True}
        kernel[(n_programs,)](*arguments, **options, **constants)


@contextlib.contextmanager
def on_device_of(x: Tensor) -> Iterator[None]:
    """Launches go to the current device, which need not be that of ``x``."""
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        yield


def cdiv(size: int, part: int) -> int:
    return -(-size // part)


def power_of_2(size: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(size - 1, 0).bit_length()


def heads(x: Tensor) -> Rows:
    """``[n, H, width]`` as it stands, or copied if its channels do not stand side by side."""
    if x.stride(2) != 1 or x.stride(1) * x.shape[1] >= 2**31:
        x = x.contiguous()
    return Rows(x, x.stride(0), x.stride(1))


class Problem:
    """The arguments of the attention ops; see there."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, query_mask: Tensor | None,
        background: list[Tensor], plan: list[Tensor], sizes: list[int], dim: int,
    ) -> None:  # fmt: skip
        self.sizes, self.dim, self.n_levels = sizes, dim, len(sizes)
        self.n_points, self.n_heads, self.device = len(k), k.shape[1], k.device
        self.heads = [heads(x) for x in (q, k, v)]
        self.background = background
        self.constants = _constants(k, v) | {"DIM": dim, "LEVELS": len(sizes)}

        n_tensors, slices = len(Tiles._fields), [size ** (dim - 1) for size in sizes]
        self.query_tiles = Tiles(*plan[:n_tensors])
        self.flags, starts, stops, point_columns, *point_tiles = plan[n_tensors:]
        self.levels = constant(_level_table(sizes, dim), self.device, torch.int32)
        self.query_walk = self._walk(self.query_tiles, len(q), len(k))
        if query_mask is not None:
            groups = self.query_tiles.row_groups.masked_fill(query_mask, -1)
            masked = self.query_tiles._replace(row_groups=groups)
            self.query_walk = self.query_walk._replace(tiles=masked)
        self.query_rows, self.query_programs = self._tiling(self.query_tiles, sum(slices))
        if point_tiles:
            tiles = Tiles(*point_tiles)
            self.point_walk = self._walk(tiles, len(k), len(q))
            self.point_rows, self.point_programs = self._tiling(tiles, max(slices))
        self.cells: Cells | None = None
        if background:
            query, key, value = background
            self.cells = Cells(
                heads(query.flatten(0, 1)), heads(key), heads(value.flatten(0, 1)),
                starts, stops, point_columns, sum(slices),
            )  # fmt: skip

    def _walk(self, tiles: Tiles, n_rows: int, n_others: int) -> Walk:
        n_groups = len(self.background[2]) * self.n_levels if self.background else 0
        sizes = n_rows, len(tiles.order), n_others, tiles.firsts.shape[1], n_groups
        return Walk(tiles, self.levels, *sizes, self.n_heads)

    def _tiling(self, tiles: Tiles, n_slices: int) -> tuple[int, int]:
        """Rows of a tile, and programs: one for a tile and a head."""
        n_tiles, capacity = tiles.firsts.shape
        return capacity // n_slices, n_tiles * self.n_heads


def widths(k: Tensor, v: Tensor) -> dict[str, int]:
    """The widths of heads, and what they are padded to."""
    return {
        "WIDTH": k.shape[2],
        "PADDED": max(_NARROWEST, power_of_2(k.shape[2])),
        "VALUE_WIDTH": v.shape[2],
        "VALUE_PADDED": max(_NARROWEST, power_of_2(v.shape[2])),
    }


def _constants(k: Tensor, v: Tensor) -> dict[str, int]:
    """Sizes that kernels are compiled for: as many warps as hold the tile's rows in registers.

    float32 has no exact product on matrix units; its multipliers need both factors in registers.
    """
    sizes, half = widths(k, v), k.dtype != torch.float32
    widest = max(sizes["PADDED"], sizes["VALUE_PADDED"])
    warps = min(max(widest // 32, 1), 4) if half else min(max(widest // 16, 2), 8)
    return {**sizes, "BLOCK": 32 if half else 16, "num_warps": warps}


def _level_table(sizes: list[int], dim: int) -> list[tuple[int, ...]]:
    """Of each level's windows: the radius, slices, slices before these, cells before these."""
    table: list[tuple[int, ...]] = []
    slices = cells = 0
    for size in sizes:
        table.append((size // 2, size ** (dim - 1), slices, cells))
        slices, cells = slices + size ** (dim - 1), cells + size**dim
    return table
