"""Pooling: from the points of one grid to the points of a coarser one."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._utils.checks import refuse
from ._utils.constants import constant
from ._utils.types import Pooling
from .windows import coordinate_dtype

Pool = Callable[[Tensor, Tensor, int], Tensor]


def check_pooling(pooling: Pooling) -> Pool:
    """The function of that name; raises ValueError for an unknown one."""
    if not isinstance(pooling, str) or pooling not in _POOLING:
        refuse("pooling", f"one of {list(_POOLING)}", pooling)
    return _POOLING[pooling]


def pool_points(
    values: Tensor, cells: Tensor, stride: Sequence[int], shape: Sequence[int], pool: Pool
) -> tuple[Tensor, Tensor, Tensor]:
    """Pools points into cells of ``stride``.

    Args:
        values: ``[n, E]``.
        cells: int64 ``[n, P + 1]``, the image and the cell of every point.
        stride: ``[P]``.
        shape: ``[P]``, the size of the coarser grid.
        pool: see `check_pooling`.

    Returns:
        the pooled values ``[m, E]``; their images and cells int64 ``[m, P + 1]``, sorted; the row
        of them that each point belongs to, int64 ``[n]``.
    """
    coarse = cells.div(constant([1, *stride], cells.device), rounding_mode="floor")
    key = coarse[:, 0]
    for axis, size in enumerate(shape):
        key = key * size + coarse[:, axis + 1]
    unique, row = torch.unique(key, return_inverse=True)
    # All points of a cell write the same row, so their order does not matter.
    pooled_cells = coarse.new_empty(len(unique), coarse.shape[1]).index_copy_(0, row, coarse)
    return pool(values, row, len(unique)), pooled_cells, row


def _sum(values: Tensor, row: Tensor, n_rows: int) -> Tensor:
    # index_add, whose gradient reads rows: the gradient of scatter_reduce takes ten times as long.
    # The sum of integers is int64, as that of `torch.sum`.
    dtype = values.dtype if values.is_floating_point() else torch.int64
    wide = values.to(coordinate_dtype(dtype) if dtype.is_floating_point else dtype)
    return wide.new_zeros(n_rows, values.shape[1]).index_add(0, row, wide).to(dtype)


def _mean(values: Tensor, row: Tensor, n_rows: int) -> Tensor:
    dtype = values.dtype if values.is_floating_point() else torch.get_default_dtype()
    wide = values.to(coordinate_dtype(dtype))
    sums = wide.new_zeros(n_rows, values.shape[1]).index_add(0, row, wide)
    counts = torch.bincount(row, minlength=n_rows)
    return (sums / counts[:, None]).to(dtype)


def _max(values: Tensor, row: Tensor, n_rows: int) -> Tensor:
    index = row[:, None].expand_as(values)
    empty = values.new_zeros(n_rows, values.shape[1])
    return empty.scatter_reduce(0, index, values, "amax", include_self=False)


_POOLING: dict[str, Pool] = {"mean": _mean, "sum": _sum, "max": _max}
