"""The specification in code: plain PyTorch on any device, differentiable twice.

Every other back end is held against this one. It takes a few queries at a time and computes
each of these chunks anew in the backward pass, so no more than a chunk's pairs is ever stored.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._utils.random import hash_integers

if TYPE_CHECKING:
    from ..plan import NeighborhoodPlan

CHUNK = 1024  # queries


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: "NeighborhoodPlan", background: tuple[Tensor, ...],
    query_mask: Tensor | None, seed: Tensor | None, scale: float, dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The attended values ``[N, H, dv]`` and, in float32 or float64, the log-sum-exp ``[N, H]``."""

    def chunk(queries: Tensor) -> tuple[Tensor, Tensor]:
        row, column, logits, values = pairs(queries, q, k, v, plan, background, query_mask, scale)
        weights, lse = softmax(logits, row, len(queries))
        if seed is not None:
            kept = keep_mask(seed, queries[row], column, q.shape[1], dropout_p)
            weights = weights * kept / (1 - dropout_p)
        attended = values.new_zeros(len(queries), *values.shape[1:])
        return attended.index_add(0, row, weights[..., None] * values).to(q.dtype), lse

    chunks = torch.arange(len(q), device=q.device).split(CHUNK)
    parts = [checkpoint(chunk, queries, use_reentrant=False) for queries in chunks]
    out, lse = zip(*parts, strict=True)
    return torch.cat(out), torch.cat(lse)


def pairs(
    queries: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: "NeighborhoodPlan",
    background: tuple[Tensor, ...], query_mask: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """A row per pair: its place in ``queries``, its column (the point, or nnz + the slot of an
    empty cell), its logits ``[M, H]``, its value ``[M, H, dv]``. Masked queries have none.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    seeing = plan.query_batch[queries] >= 0
    if query_mask is not None:
        seeing &= ~query_mask[queries]
    row, column, slot = plan.pairs_and_slots(queries)
    row, column, slot = (part[seeing[row]] for part in (row, column, slot))
    # index_select: the gradient of plain indexing is not summed in the same order every time.
    logits = (_rows(q, queries[row], dtype) * _rows(k, column, dtype)).sum(-1)
    values = _rows(v, column, dtype)
    if background:
        empty = seeing[:, None].repeat(1, plan.window_slots)
        empty[row, slot] = False
        bg_row, bg_slot = empty.nonzero(as_tuple=True)
        query, level = queries[bg_row], plan.slot_levels()[bg_slot]
        seen, keys, cell_values = background
        query_level = query * plan.n_levels + level
        image_level = plan.query_batch[query] * plan.n_levels + level
        row, column = torch.cat((row, bg_row)), torch.cat((column, plan.n_points + bg_slot))
        products = _rows(seen.flatten(0, 1), query_level, dtype) * _rows(keys, bg_slot, dtype)
        logits = torch.cat((logits, products.sum(-1)))
        values = torch.cat((values, _rows(cell_values.flatten(0, 1), image_level, dtype)))
    return row, column, logits * scale, values


def _rows(x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    return x.index_select(0, index).to(dtype)


def softmax(logits: Tensor, row: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Softmax of ``logits`` ``[M, H]`` within each row, and the rows' log-sum-exp ``[n, H]``."""
    lowest = logits.new_full((n_rows, logits.shape[1]), -torch.inf)
    top = lowest.scatter_reduce(0, row[:, None].expand_as(logits), logits.detach(), "amax")
    top = torch.where(top.isfinite(), top, 0)
    exponentials = (logits - top.index_select(0, row)).exp()
    total = torch.zeros_like(top).index_add(0, row, exponentials)
    nonempty = torch.where(total == 0, 1, total)
    lse = torch.where(total == 0, -torch.inf, nonempty.log() + top)
    return exponentials / nonempty.index_select(0, row), lse


def keep_mask(seed: Tensor, query: Tensor, column: Tensor, n_heads: int, rate: float) -> Tensor:
    """Which weights ``[M, H]`` dropout keeps: a hash of seed, head, query and column, so that any
    back end and any pass can tell without storing it.
    """
    head = torch.arange(n_heads, device=query.device)
    return hash_integers(seed, (head, query[:, None], column[:, None])) >= int(rate * 2**32)


def rotate(x: Tensor, coordinates: Tensor, frequencies: Tensor) -> Tensor:
    """Turns the channel pairs of ``x`` ``[n, H, d]`` by ``coordinates @ frequencies``, which are
    ``[n, C]`` and ``[C, H or 1, d / 2]``. Sums products one by one: a matrix product would follow
    autocast and TF32, in which cell 300 is cell 301.
    """
    table = frequencies.to(torch.promote_types(coordinates.dtype, torch.float32))
    columns = coordinates.to(table.dtype)[:, :, None, None].unbind(1)
    angles = columns[0] * table[0]
    for column, row in zip(columns[1:], table[1:], strict=True):
        angles = torch.addcmul(angles, column, row)
    return apply_rotary(x, angles.cos(), angles.sin())


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x`` ``[..., d]``, its channel pairs turned; cosine and sine are ``[..., d / 2]``."""
    even, odd = x.unflatten(-1, (-1, 2)).to(torch.promote_types(x.dtype, cos.dtype)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return turned.flatten(-2).to(x.dtype)


def project(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], norm: Sequence[Tensor],
    eps: float, residual: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``residual + norm(x) @ weight.t() + bias``, of ``x`` ``[n, E]``, for each of the weights.

    ``biases`` are as many or none; ``norm`` is the layer norm's weight and bias, or empty.
    """
    if norm:
        x = F.layer_norm(x, x.shape[1:], norm[0], norm[1], eps)
    outs = (F.linear(x, weight, bias) for weight, bias in itertools.zip_longest(weights, biases))
    return tuple(out if residual is None else residual + out for out in outs)


def find_slices(
    sorted_keys: Tensor, centers: Tensor, traversal: Tensor, level: Tensor, offset: Tensor,
    radius: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Where the rows of windows begin and end among ``sorted_keys``, int32 ``[N, R]`` each, for
    keys of ``centers`` ``[L, N]`` and rows of a level, offset and radius, ``[R]``.
    """
    middle = (centers[level].t() + offset).contiguous()
    return search_slices(sorted_keys, middle - radius, middle + radius)


def search_slices(sorted_keys: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Where keys from ``first`` to ``last`` begin and end among the sorted ones, int32."""
    starts = torch.searchsorted(sorted_keys, first, out_int32=True)
    stops = torch.searchsorted(sorted_keys, last, right=True, out_int32=True)
    return starts, torch.maximum(starts, stops)


def find_runs(
    traversal: Tensor, starts: Tensor, stops: Tensor, sizes: Sequence[int], position_dim: int,
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What tiles of ``rows`` traversal see together: firsts, shifts and counts of `tiles.Tiles`.

    The slices ``[n, R]`` of a row are those of windows of ``sizes``, one after another.
    """
    slices = [size ** (position_dim - 1) for size in sizes]
    edges = [_by_tile(edge[traversal.long()].long(), slices, rows) for edge in (starts, stops)]
    parts = [_join(start, stop) for start, stop in zip(*edges, strict=True)]
    firsts, shifts, counts = zip(*parts, strict=True)
    return torch.cat(firsts, 1).int(), torch.cat(shifts, 1).int(), torch.stack(counts, 1).int()


def _by_tile(edge: Tensor, slices: Sequence[int], rows: int) -> list[Tensor]:
    """``[n, R]`` as ``[T, rows * slices]`` for each level, filled up with empty slices."""
    edge = F.pad(edge, (0, 0, 0, -edge.shape[0] % rows)).unflatten(0, (-1, rows))
    return [part.flatten(1) for part in edge.split(list(slices), 2)]


def _join(starts: Tensor, stops: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The slices ``[T, C]`` of each tile as runs: firsts, shifts ``[T, C]`` and counts ``[T, 2]``.

    What is left behind the runs means nothing.
    """
    starts = torch.where(starts < stops, starts, torch.iinfo(torch.int64).max)
    starts, order = starts.sort(1)
    filled = starts < torch.iinfo(torch.int64).max
    stops = torch.where(filled, stops.gather(1, order), 0)
    reached = F.pad(stops.cummax(1).values, (1, -1), value=-1)
    begins = filled & (starts > reached)
    new = torch.where(filled, (stops - torch.maximum(starts, reached)).clamp(min=0), 0)
    first = new.cumsum(1) - new
    # Runs move to the front, in order; all others meet in one place behind them.
    place = torch.where(begins, begins.cumsum(1) - 1, starts.shape[1])
    room = torch.zeros_like(F.pad(first, (0, 1)))
    firsts, shifts = (room.scatter(1, place, part)[:, :-1] for part in (first, starts - first))
    return firsts, shifts, torch.stack((begins.sum(1), new.sum(1)), 1)
