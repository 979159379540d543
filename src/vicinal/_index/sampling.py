"""Deformable sampling: weighted sums of values interpolated between the cells of a sparse pyramid.

The corners of sampling locations are recomputed in the backward pass, so that it stores as much as
the locations and their weights take. Where the back end has no kernel for it, torch's ops process a
chunk of queries at a time.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._utils.checks import has_contents
from .._utils.ragged import starts_from_counts
from ..backends import choose_backend
from ..backends.transforms import map_batch
from .cell_hash import CellIndex

_CHUNK = {"cpu": 2**19}  # corners of a chunk, about what the caches hold
_LARGE_CHUNK = 2**22


class _Corners(NamedTuple):
    """Corners ``[m]``, bag by bag; a bag is one head of one query (see `F.embedding_bag`)."""

    rows: Tensor  # int32 [m], of the flat table
    factors: Tensor  # [m], the factor of each row
    bags: Tensor  # [m]
    starts: Tensor  # [bags]


def sample(
    table: Tensor, index: CellIndex, images: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """Interpolates values at ``locations`` and sums them, weighted, for each query and head.

    The interpolation is linear along each axis between the centers of cells, which lie at integers
    plus one half (Zhu et al., "Deformable DETR", 2021, bilinear in images). It is once
    differentiable in the table, the locations and the weights. Results are the same bits on every
    run, on a CPU and with a back end's kernel.

    Args:
        table: floating ``[M, H, d]``, the values of the index's M cells, or ``[M + B * L, H, d]``,
            then those of empty cells, also beyond the map, by image and level; default zero.
        index: the occupied cells.
        images: int64 ``[N]``, the image of every query, in [0, B).
        locations: floating ``[N, H, L, K, P]``, in cells of each level.
        weights: ``[N, H, L, K]``, in the dtype of the table.

    Returns:
        ``[N, H, d]``.
    """
    native = choose_backend(None, table.device).sample
    if native is not None:
        return native(
            table, locations, weights, images, *index.lookup_arguments(),
            _has_background(table, index),
        )  # fmt: skip
    (out,) = _Sample.apply(table, index, images, locations, weights)
    sampled: Tensor = out
    return sampled


class CellWeights(NamedTuple):
    """The weights of n queries for the cells around their locations, sorted by query and cell."""

    queries: Tensor  # int64 [m]
    cells: Tensor  # int64 [m]
    weights: Tensor  # [m, H]
    empty: Tensor  # [n, L, H], the sum over the empty cells of each level


def cell_weights(
    index: CellIndex, images: Tensor, masked: Tensor, locations: Tensor, weights: Tensor
) -> CellWeights:
    """Returns the factors by which `sample` multiplies each cell's values, for inspection.

    Args:
        index, images, locations, weights: as for `sample`.
        masked: bool ``[n]``, True: the query, whose weights are zero, has no cells.
    """
    n_cells, heads = index.n_cells, weights.shape[1]
    cells, factors = _around(index, images, locations, weights)
    full = cells < n_cells
    sampled = full & ~masked[:, None, None, None]
    query, head, _, _ = sampled.nonzero(as_tuple=True)
    keys = query * n_cells + cells[sampled]
    pairs, pair = torch.unique(keys, return_inverse=True)
    summed = weights.new_zeros(len(pairs) * heads)
    summed = summed.index_add(0, pair * heads + head, factors[sampled])
    empty = factors.masked_fill(full, 0).unflatten(3, weights.shape[2:]).sum((2, 4))
    n_cells = max(n_cells, 1)
    return CellWeights(
        pairs // n_cells, pairs % n_cells, summed.view(-1, heads), empty.transpose(1, 2)
    )


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(
        table: Tensor, index: CellIndex, images: Tensor, locations: Tensor, weights: Tensor
    ) -> tuple[Tensor]:
        out = table.new_empty(len(locations), *table.shape[1:])
        rows = _rows(table, index)
        for chunk in _chunks(locations):
            corners = _corners(table, index, images[chunk], locations[chunk], weights[chunk])
            out[chunk] = _sum(rows, corners).view_as(out[chunk])
        return (out,)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> None:
        table, ctx.index, *given = inputs
        ctx.save_for_backward(table, *given)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        table, images, *given = ctx.saved_tensors
        grad_table, *grad_given = _Gradients.apply(grad, table, ctx.index, images, *given)
        return grad_table, None, None, *grad_given

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        raise NotImplementedError("deformable sampling has no forward-mode formulas")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return map_batch(_Sample, info.batch_size, in_dims, arguments)


class _Gradients(torch.autograd.Function):
    """The gradients of `_Sample`: a function, so that transforms of `torch.func` take it too."""

    @staticmethod
    def forward(
        grad: Tensor, table: Tensor, index: CellIndex, images: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        rows = _rows(table.detach(), index)
        grad_rows = torch.zeros_like(rows)
        grad_given = [torch.empty_like(x) for x in given]
        for chunk in _chunks(given[0]):
            part = grad[chunk].flatten(0, 1)
            with torch.enable_grad():
                leaves = [x[chunk].detach().requires_grad_() for x in given]
                corners = _corners(table, index, images[chunk], *leaves)
                if not _has_background(table, index) and has_contents(table):
                    corners = _first_rows(corners, table[:, :, 0].numel())
                out = _sum(rows, corners)
            parts = torch.autograd.grad(out, leaves, part)
            for whole, grad_leaf in zip(grad_given, parts, strict=True):
                whole[chunk] = grad_leaf
            grad_rows += _sum_transposed(corners, part, len(grad_rows))
        return grad_rows[: table[:, :, 0].numel()].view_as(table), *grad_given

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError("deformable sampling is differentiable once")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return map_batch(_Gradients, info.batch_size, in_dims, arguments)


def _chunks(locations: Tensor) -> Iterator[slice]:
    n, *sizes, dim = locations.shape
    corners = torch.Size(sizes).numel() * 2**dim
    size = max(1, _CHUNK.get(locations.device.type, _LARGE_CHUNK) // corners)
    return (slice(start, start + size) for start in range(0, n, size))


def _has_background(table: Tensor, index: CellIndex) -> bool:
    """Whether the table has values of empty cells."""
    return table.shape[0] > index.n_cells


def _rows(table: Tensor, index: CellIndex) -> Tensor:
    """The flat table; without values of empty cells followed by a row of zeros for each head."""
    padding = 0 if _has_background(table, index) else 1
    return F.pad(table, (0, 0, 0, 0, 0, padding)).flatten(0, 1)


def _corners(
    table: Tensor, index: CellIndex, images: Tensor, locations: Tensor, weights: Tensor
) -> _Corners:
    """The corners of ``locations`` in `_rows`."""
    n, heads, n_levels, _ = weights.shape
    cells, factors = _around(index, images, locations, weights)
    if _has_background(table, index):
        empty = index.n_cells + images[:, None] * n_levels + _levels(weights)
        cells = torch.where(cells == index.n_cells, empty.to(cells.dtype)[:, None, None], cells)
    numbers = torch.int32 if (len(table) + 1) * heads < 2**31 else torch.int64
    head = torch.arange(heads, device=locations.device, dtype=numbers)[:, None, None]
    rows = cells.to(numbers) * heads + head
    bags = torch.arange(n * heads, device=locations.device, dtype=numbers)
    per_bag = rows.shape[2] * rows.shape[3]
    return _Corners(
        rows.flatten(),
        factors.flatten(),
        bags[:, None].expand(-1, per_bag).flatten(),
        bags * per_bag,
    )


def _around(
    index: CellIndex, images: Tensor, locations: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The corners of ``locations``, ``[n, H, 2 ** P, L * K]`` each: their cells, numbered as by
    `CellIndex.find`, and the interpolation weight times the location's weight.
    """
    centered = [axis.flatten(2) - 0.5 for axis in locations.unbind(-1)]
    firsts = [axis.detach().floor() for axis in centered]
    factors = weights.flatten(2)[:, :, None]
    for axis, first in zip(reversed(centered), reversed(firsts), strict=True):
        upper = factors * (axis - first).to(factors.dtype)[:, :, None]
        factors = torch.cat((factors - upper, upper), 2)
    return index.find(images, _levels(weights), firsts), factors


def _levels(weights: Tensor) -> Tensor:
    """int64 ``[L * K]``: the level of each location of a head."""
    n_levels, n_points = weights.shape[2:]
    return torch.arange(n_levels, device=weights.device).repeat_interleave(n_points)


def _first_rows(corners: _Corners, n_rows: int) -> _Corners:
    """The corners in the first ``n_rows`` rows of the table."""
    kept = corners.rows < n_rows
    number = kept.nonzero().squeeze(1)
    counts = kept.view(len(corners.starts), -1).sum(1)
    rows, factors, bags = (part.index_select(0, number) for part in corners[:3])
    return _Corners(rows, factors, bags, starts_from_counts(counts).to(bags.dtype))


def _sum(table: Tensor, corners: _Corners) -> Tensor:
    """``[bags, d]``: the sum of each bag's rows of the flat table times their factors."""
    return F.embedding_bag(
        corners.rows, table, corners.starts, mode="sum", per_sample_weights=corners.factors
    )


def _sum_transposed(corners: _Corners, grads: Tensor, n_rows: int) -> Tensor:
    """``[n_rows, d]``, the transpose of `_sum`: for each row of the table the sum, in order, of its
    bags' gradients times its factors.
    """
    rows, order = corners.rows.sort(stable=True)
    starts = torch.searchsorted(rows, torch.arange(n_rows, dtype=rows.dtype, device=rows.device))
    return F.embedding_bag(
        corners.bags.index_select(0, order),
        grads,
        starts.to(corners.bags.dtype),
        mode="sum",
        per_sample_weights=corners.factors.detach().index_select(0, order),
    )
