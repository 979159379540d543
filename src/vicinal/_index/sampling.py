"""The op: a weighted sum of what a sparse pyramid holds at places between its cells.

It takes a few queries at a time and finds the corners of their places anew in the backward pass:
what is stored is as large as the places and their weights.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cell_hash import CellIndex

_CHUNK = {"cpu": 2**19}  # corners at a time: not much more than caches hold
_LARGE_CHUNK = 2**22


class _Corners(NamedTuple):
    """Corners ``[m]``, bag by bag; a bag is a query's head."""

    rows: Tensor  # int32 [m], of the flat table
    shares: Tensor  # [m], what a row is multiplied with
    bags: Tensor  # [m]
    starts: Tensor  # [bags]


def sample(
    table: Tensor, index: CellIndex, images: Tensor, places: Tensor, weights: Tensor
) -> Tensor:
    """Interpolates what is at ``places``, weighs it and sums it up for each query and head.

    Interpolation is linear along each axis between the centres of cells, which are at whole
    numbers and a half (Zhu et al., "Deformable DETR", 2021, have images: bilinear). Differentiable
    once in the table, the places and the weights; on a CPU the same bits on every run.

    Args:
        table: floating ``[M + absent, H, d]``, what each of the index's M cells holds, then what
            empty cells hold, also beyond the map: ``B * L`` rows, by image and level, or one row
            of zeros for all.
        index: the cells.
        images: int64 ``[N]``, the image of every query, in [0, B).
        places: floating ``[N, H, L, K, P]``, in cells of each level.
        weights: ``[N, H, L, K]``, in the dtype of the table.

    Returns:
        ``[N, H, d]``.
    """
    out: Tensor = _Sample.apply(table, index, images, places, weights)
    return out


class CellWeights(NamedTuple):
    """What n queries give to the cells around their places: a row per query and cell, in order."""

    queries: Tensor  # int64 [m]
    cells: Tensor  # int64 [m]
    weights: Tensor  # [m, H]
    empty: Tensor  # [n, L, H], the sum over the empty cells of each level


def cell_weights(
    index: CellIndex, images: Tensor, silent: Tensor, places: Tensor, weights: Tensor
) -> CellWeights:
    """The factors by which `sample` multiplies each cell's values, for looking: all are stored.

    Args:
        index, images, places, weights: as for `sample`.
        silent: bool ``[n]``, True: the query, whose weights are zero, has no cells.
    """
    n_cells, heads = index.n_cells, weights.shape[1]
    cells, shares = _around(index, images, places, weights)
    full = cells < n_cells
    looked_at = full & ~silent[:, None, None, None]
    query, head, _, _ = looked_at.nonzero(as_tuple=True)
    keys = query * n_cells + cells[looked_at]
    pairs, pair = torch.unique(keys, return_inverse=True)
    summed = weights.new_zeros(len(pairs) * heads)
    summed = summed.index_add(0, pair * heads + head, shares[looked_at])
    empty = shares.masked_fill(full, 0).unflatten(3, weights.shape[2:]).sum((2, 4))
    n_cells = max(n_cells, 1)
    return CellWeights(
        pairs // n_cells, pairs % n_cells, summed.view(-1, heads), empty.transpose(1, 2)
    )


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, index: CellIndex, images: Tensor, places: Tensor, weights: Tensor
    ) -> Tensor:
        ctx.index = index
        ctx.save_for_backward(table, images, places, weights)
        out = table.new_empty(len(places), *table.shape[1:])
        for chunk in _chunks(places):
            corners = _corners(table, index, images[chunk], places[chunk], weights[chunk])
            out[chunk] = _sum(table.flatten(0, 1), corners).view_as(out[chunk])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, images, *given = ctx.saved_tensors
        table = table.detach()
        of_table = torch.zeros_like(table).flatten(0, 1)
        of_given = [torch.empty_like(x) for x in given]
        for chunk in _chunks(given[0]):
            part = grad[chunk].flatten(0, 1)
            with torch.enable_grad():
                leaves = [x[chunk].detach().requires_grad_() for x in given]
                corners = _corners(table, ctx.index, images[chunk], *leaves)
                if len(table) == ctx.index.n_cells + 1:
                    corners = _without(corners, table[:-1, :, 0].numel())
                out = _sum(table.flatten(0, 1), corners)
            parts = torch.autograd.grad(out, leaves, part)
            for whole, of_leaf in zip(of_given, parts, strict=True):
                whole[chunk] = of_leaf
            of_table += _spread(corners, part, len(of_table))
        return of_table.view_as(table), None, None, *of_given


def _chunks(places: Tensor) -> Iterator[slice]:
    n, *sizes, dim = places.shape
    corners = torch.Size(sizes).numel() * 2**dim
    size = max(1, _CHUNK.get(places.device.type, _LARGE_CHUNK) // corners)
    return (slice(start, start + size) for start in range(0, n, size))


def _corners(
    table: Tensor, index: CellIndex, images: Tensor, places: Tensor, weights: Tensor
) -> _Corners:
    """All corners of ``places`` in the flat table."""
    n, heads, n_levels, _ = weights.shape
    cells, shares = _around(index, images, places, weights)
    if len(table) > index.n_cells + 1:
        empty = index.n_cells + images[:, None] * n_levels + _levels(weights)
        cells = torch.where(cells == index.n_cells, empty.to(cells.dtype)[:, None, None], cells)
    numbers = torch.int32 if len(table) * heads < 2**31 else torch.int64
    head = torch.arange(heads, device=places.device, dtype=numbers)[:, None, None]
    rows = cells.to(numbers) * heads + head
    bags = torch.arange(n * heads, device=places.device, dtype=numbers)
    per_bag = rows.shape[2] * rows.shape[3]
    return _Corners(
        rows.flatten(),
        shares.flatten(),
        bags[:, None].expand(-1, per_bag).flatten(),
        bags * per_bag,
    )


def _around(
    index: CellIndex, images: Tensor, places: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The corners of ``places``, ``[n, H, 2 ** P, L * K]`` each: their cells, as `CellIndex.find`
    numbers them, and what interpolation and ``weights`` give them.
    """
    centered = [axis.flatten(2) - 0.5 for axis in places.unbind(-1)]
    firsts = [axis.detach().floor() for axis in centered]
    shares = weights.flatten(2)[:, :, None]
    for axis, first in zip(reversed(centered), reversed(firsts), strict=True):
        upper = shares * (axis - first).to(shares.dtype)[:, :, None]
        shares = torch.cat((shares - upper, upper), 2)
    return index.find(images, _levels(weights), firsts), shares


def _levels(weights: Tensor) -> Tensor:
    """int64 ``[L * K]``: the level of each place of a head."""
    n_levels, n_points = weights.shape[2:]
    return torch.arange(n_levels, device=weights.device).repeat_interleave(n_points)


def _without(corners: _Corners, n_rows: int) -> _Corners:
    """The corners in the table's first ``n_rows``."""
    here = corners.rows < n_rows
    number = here.nonzero().squeeze(1)
    counts = here.view(len(corners.starts), -1).sum(1)
    rows, shares, bags = (part.index_select(0, number) for part in corners[:3])
    return _Corners(rows, shares, bags, (counts.cumsum(0) - counts).to(bags.dtype))


def _sum(table: Tensor, corners: _Corners) -> Tensor:
    """``[bags, d]``: the sum of each bag's rows of the flat table, times their shares."""
    return F.embedding_bag(
        corners.rows, table, corners.starts, mode="sum", per_sample_weights=corners.shares
    )


def _spread(corners: _Corners, grads: Tensor, n_rows: int) -> Tensor:
    """``[n_rows, d]``, the transpose of `_sum`: for each row of the table the sum, in order, of
    its bags' grads times its shares.
    """
    order = corners.rows.sort(stable=True).indices
    counts = torch.bincount(corners.rows, minlength=n_rows)
    return F.embedding_bag(
        corners.bags.index_select(0, order),
        grads,
        (counts.cumsum(0) - counts).to(corners.bags.dtype),
        mode="sum",
        per_sample_weights=corners.shares.detach().index_select(0, order),
    )
