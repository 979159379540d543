"""Pooling: from the points of one grid to the points of coarser ones."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._utils.checks import refuse
from ._utils.constants import constant, widest_dtype
from ._utils.types import Pooling
from .windows import coordinate_dtype


class Pool(NamedTuple):
    """How the values of points in a cell become one.

    Attributes:
        reduce: the values of each cell ``[m, E]`` from values ``[n, E]``, the cell of each
            ``[n]``, and m.
        result_dtype: from the dtype of values.
        is_mean: whether the result is divided by the number of points.
        nests: whether cells of cells may be reduced in place of the points in them.
    """

    reduce: Callable[[Tensor, Tensor, int], Tensor]
    result_dtype: Callable[[torch.dtype], torch.dtype]
    is_mean: bool = False
    nests: bool = True


class PooledLevel(NamedTuple):
    """The cells of one stride that have points.

    Attributes:
        values: ``[m, E]``.
        cells: int64 ``[m, P + 1]``, their images and cells, sorted.
        row: int64 ``[n]``, the row of these that each point belongs to.
    """

    values: Tensor
    cells: Tensor
    row: Tensor


def check_pooling(pooling: Pooling) -> Pool:
    """The pool of that name; raises ValueError for an unknown one."""
    if not isinstance(pooling, str) or pooling not in _POOLING:
        refuse("pooling", f"one of {list(_POOLING)}", pooling)
    return _POOLING[pooling]


def pool_points(
    values: Tensor, cells: Tensor, stride: Sequence[int], shape: Sequence[int], pool: Pool
) -> PooledLevel:
    """Pools points into cells of ``stride``, see `pool_levels`."""
    return pool_levels(values, cells, [stride], [shape], pool)[0]


def pool_levels(
    values: Tensor,
    cells: Tensor,
    strides: Sequence[Sequence[int]],
    shapes: Sequence[Sequence[int]],
    pool: Pool,
) -> list[PooledLevel]:
    """Pools points into cells of every stride.

    A level whose cells consist of cells of the level before is pooled from that.

    Args:
        values: ``[n, E]``.
        cells: int64 ``[n, P + 1]``, the image and the cell of every point.
        strides: ``[L, P]``.
        shapes: ``[L, P]``, the size of each coarser grid.
        pool: see `check_pooling`.
    """
    dtype = pool.result_dtype(values.dtype)
    points = PooledLevel(
        _widen(values, dtype), cells, torch.arange(len(cells), device=cells.device)
    )
    levels: list[PooledLevel] = []
    before: Sequence[int] = [1] * len(strides[0])
    last = points
    for stride, shape in zip(strides, shapes, strict=True):
        if not pool.nests or any(size % fine for size, fine in zip(stride, before, strict=True)):
            before, last = [1] * len(stride), points
        ratio = [size // fine for size, fine in zip(stride, before, strict=True)]
        pooled = _pool(last, ratio, shape, pool)
        row = pooled.row if last is points else pooled.row[last.row]
        before, last = stride, pooled._replace(row=row)
        levels.append(last._replace(values=_finish(last.values, row, pool, dtype)))
    return levels


def _pool(
    points: PooledLevel, stride: Sequence[int], shape: Sequence[int], pool: Pool
) -> PooledLevel:
    """``points`` in cells of ``stride``, with ``row`` by these points."""
    cells = points.cells
    coarse = cells.div(constant([1, *stride], cells.device), rounding_mode="floor")
    pooled_cells, row = _distinct(coarse, shape)
    return PooledLevel(pool.reduce(points.values, row, len(pooled_cells)), pooled_cells, row)


def _distinct(cells: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The distinct rows of ``cells`` ``[n, P + 1]``, sorted, and the row of each, int64 ``[n]``."""
    n_cells = math.prod(shape)
    if n_cells >= 2**31 and len(cells) and n_cells * (int(cells[:, 0].max()) + 1) >= 2**63:
        distinct, row = torch.unique(cells, dim=0, return_inverse=True)  # slower
        return distinct, row
    key = cells[:, 0]
    for axis, size in enumerate(shape):
        key = key * size + cells[:, axis + 1]
    unique, row = torch.unique(key, return_inverse=True)
    # All points of a cell write the same row, so their order does not matter.
    return cells.new_empty(len(unique), cells.shape[1]).index_copy_(0, row, cells), row


def pool_rows(values: Tensor, row: Tensor, n_rows: int, pool: Pool) -> Tensor:
    """``[n_rows, E]``: the pooled values ``[n, E]`` of those of each ``row`` ``[n]``."""
    dtype = pool.result_dtype(values.dtype)
    return _finish(pool.reduce(_widen(values, dtype), row, n_rows), row, pool, dtype)


def _widen(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` in the dtype that results of ``dtype`` are computed in."""
    if values.dtype.is_floating_point:
        return values.to(coordinate_dtype(dtype))
    return values.to(widest_dtype(values.device) if dtype.is_floating_point else dtype)


def _finish(values: Tensor, row: Tensor, pool: Pool, dtype: torch.dtype) -> Tensor:
    """What was reduced of the points of each ``row``, as a result of ``dtype``."""
    if pool.is_mean:
        values = values / torch.bincount(row, minlength=len(values))[:, None]
    return values.to(dtype)


def _sum(values: Tensor, row: Tensor, n_rows: int) -> Tensor:
    # index_add, whose gradient reads rows: the gradient of scatter_reduce takes ten times as long.
    return values.new_zeros(n_rows, values.shape[1]).index_add(0, row, values)


def _max(values: Tensor, row: Tensor, n_rows: int) -> Tensor:
    index = row[:, None].expand_as(values)
    empty = values.new_zeros(n_rows, values.shape[1])
    return empty.scatter_reduce(0, index, values, "amax", include_self=False)


def _or(other: Callable[[], torch.dtype]) -> Callable[[torch.dtype], torch.dtype]:
    """The dtype of values if that is floating, else ``other``."""
    return lambda dtype: dtype if dtype.is_floating_point else other()


_POOLING: dict[str, Pool] = {
    "mean": Pool(_sum, _or(torch.get_default_dtype), is_mean=True),
    # The sum of integers is int64, as that of `torch.sum`.
    "sum": Pool(_sum, _or(lambda: torch.int64)),
    # The gradient of equal values is shared by all points of the cell, so it does not nest.
    "max": Pool(_max, lambda dtype: dtype, nests=False),
}
