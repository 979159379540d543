"""Sparse COO maps: their check, and the sums of values that share a cell."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import refuse
from ..windows import coordinate_dtype


def coalesce(coo: Tensor) -> Tensor:
    """``coo`` with one row per cell. Half precisions are added in float32 and rounded once."""
    dtype = coo.dtype
    if coo.is_coalesced() or not dtype.is_floating_point or coordinate_dtype(dtype) == dtype:
        return coo.coalesce()
    return coo.to(coordinate_dtype(dtype)).coalesce().to(dtype)


def check_map_size(size: Sequence[int]) -> None:
    """Raises ValueError for a map that PyTorch cannot have, even one that stores nothing."""
    if math.prod(size) >= 2**63:
        expected = "a map of fewer than 2^63 numbers, zeros included"
        refuse("pyramid", expected, f"one of size {list(size)}")


def dim_of_coo(value: Any) -> int:
    """The number of spatial dimensions of a map ``[B, *full_shape, L, E]``, at least 1."""
    return max(value.dim() - 3, 1) if isinstance(value, Tensor) else 1


def check_coo(argument: str, value: Tensor, sizes: Sequence[int | str]) -> None:
    """Raises ValueError unless ``value`` is a sparse COO tensor of ``sizes``, those that are ints,
    with one dense dimension.
    """
    expected = f"a sparse COO tensor [{', '.join(map(str, sizes))}] with one dense dimension"
    is_coo = isinstance(value, Tensor) and value.layout == torch.sparse_coo
    if not is_coo or value.dense_dim() != 1 or value.dim() != len(sizes):
        refuse(argument, expected, value)
    if any(
        isinstance(want, int) and want != size
        for want, size in zip(sizes, value.shape, strict=True)
    ):
        refuse(argument, expected, value)
