"""The specification in code: plain PyTorch on any device, twice differentiable.

Every other back end is tested against this one. It processes a chunk of queries at a time and
recomputes each chunk in the backward pass, so it stores the pairs of one chunk at most.
"""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._utils.constants import constant, widest_dtype
from .._utils.ragged import expand_ranges, starts_from_counts
from .._utils.random import hash_integers
from .layer_norm import layer_norm
from .transforms import transforms_active
from .types import Backend, PlanTensors

CHUNK = 1024  # queries


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: PlanTensors, background: tuple[Tensor, ...],
    bias: Tensor | None, query_mask: Tensor | None, seed: Tensor | None, scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns the attended values ``[N, H, dv]`` and the log-sum-exp ``[N, H]``, the latter in
    float32 or float64. ``bias`` ``[K, H]`` is added to the scaled logits.
    """

    def attend_chunk(queries: Tensor) -> tuple[Tensor, Tensor]:
        row, column, logits, values = score_pairs(
            queries, q, k, v, plan, background, bias, query_mask, scale
        )
        weights, lse = softmax(logits, row, queries.shape[0])
        if seed is not None:
            counted = dropout_columns(plan, column)
            query = queries[row] if plan.query_ids is None else plan.query_ids[queries[row]]
            keep = keep_mask(seed, query, counted, q.shape[1], dropout_p)
            weights = weights * keep / (1 - dropout_p)
        acc = values.new_zeros(queries.shape[0], *values.shape[1:])
        return acc.index_add(0, row, weights[..., None] * values).to(q.dtype), lse

    queries = torch.arange(q.shape[0], device=q.device)
    # An exported program is for any number of queries, so it cannot have one chunk after another.
    chunks = (queries,) if torch.compiler.is_exporting() else queries.split(CHUNK)
    if transforms_active() or torch.compiler.is_exporting():  # which have no saved-tensor hooks
        parts = [attend_chunk(queries) for queries in chunks]
    else:
        parts = [checkpoint(attend_chunk, queries, use_reentrant=False) for queries in chunks]
    out, lse = zip(*parts, strict=True)
    return torch.cat(out), torch.cat(lse)


def score_pairs(
    queries: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: PlanTensors,
    background: tuple[Tensor, ...], bias: Tensor | None, query_mask: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Lists the pairs of ``queries`` with their neighbors, then those with their empty cells.

    Returns, for M pairs: the index into ``queries`` ``[M]``; the column ``[M]``, which is the point
    or, for an empty cell, nnz + its slot; the logits ``[M, H]``; the values ``[M, H, dv]``. Masked
    queries have no pairs.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    active = plan.query_batch[queries] >= 0
    if query_mask is not None:
        active &= ~query_mask[queries]
    row, column, slot = list_pairs(plan, queries)
    row, column, slot = (part[active[row]] for part in (row, column, slot))
    # index_select: the gradient of plain indexing is not summed in the same order every time.
    logits = (_rows(q, queries[row], dtype) * _rows(k, column, dtype)).sum(-1)
    values = _rows(v, column, dtype)
    if background:
        empty = active[:, None].repeat(1, plan.window_slots())
        empty[row, slot] = False
        empty_row, empty_slot = empty.nonzero(as_tuple=True)
        query, level = queries[empty_row], slot_levels(plan)[empty_slot]
        level_queries, cell_keys, cell_values = background
        query_level = query * plan.n_levels() + level
        image_level = plan.query_batch[query] * plan.n_levels() + level
        row, column = torch.cat((row, empty_row)), torch.cat((column, plan.n_points() + empty_slot))
        q_rows = _rows(level_queries.flatten(0, 1), query_level, dtype)
        logits = torch.cat((logits, (q_rows * _rows(cell_keys, empty_slot, dtype)).sum(-1)))
        values = torch.cat((values, _rows(cell_values.flatten(0, 1), image_level, dtype)))
        slot = torch.cat((slot, empty_slot))
    logits = logits * scale
    if bias is not None:
        logits = logits + _rows(bias, slot, dtype)
    return row, column, logits, values


def _rows(x: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    return x.index_select(0, index).to(dtype)


def list_pairs(plan: PlanTensors, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lists the neighbors of ``queries`` int64 ``[n]``, int64 ``[M]`` each: the index into
    ``queries``, the point, and its slot: which of the K cells of the query's windows it lies in.
    """
    _, starts, stops, order = plan.query_slices
    starts, stops = (edge[queries].long() for edge in (starts, stops))
    n_slices = starts.shape[1]
    slice_index, index = expand_ranges(starts.flatten(), (stops - starts).flatten())
    row, window_row = slice_index // n_slices, slice_index % n_slices

    start, first_slot, level = _window_rows(plan)
    column = plan.point_columns[index] - plan.first_columns[queries[row], level[window_row]]
    slot = first_slot[window_row] + column - start[window_row]
    return row, order[index].long(), slot


def _window_rows(plan: PlanTensors) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row of the windows the first cell, from that of the window, the first slot, and the
    level, int64 ``[R]`` each.
    """
    start, width = plan.window_rows.long().unbind(1)
    levels = [level for level, count in enumerate(plan.slices_per_level()) for _ in range(count)]
    return start, starts_from_counts(width), constant(levels, plan.window_rows.device)


def slot_levels(plan: PlanTensors) -> Tensor:
    """int64 ``[K]``: the level of every slot of a query's windows."""
    levels = [level for level, count in enumerate(plan.cells_per_level()) for _ in range(count)]
    return constant(levels, plan.query_batch.device)


def softmax(logits: Tensor, row: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """Softmax of ``logits`` ``[M, H]`` within each row, and the rows' log-sum-exp ``[n, H]``."""
    lowest = logits.new_full((n_rows, logits.shape[1]), -torch.inf)
    row_max = lowest.scatter_reduce(0, row[:, None].expand_as(logits), logits.detach(), "amax")
    row_max = torch.where(row_max.isfinite(), row_max, 0)
    exponentials = (logits - row_max.index_select(0, row)).exp()
    row_sum = torch.zeros_like(row_max).index_add(0, row, exponentials)
    divisor = torch.where(row_sum == 0, 1, row_sum)
    lse = torch.where(row_sum == 0, -torch.inf, divisor.log() + row_max)
    return exponentials / divisor.index_select(0, row), lse


def dropout_columns(plan: PlanTensors, column: Tensor) -> Tensor:
    """The columns ``[M]`` of `score_pairs` as `keep_mask` takes them, see
    `PlanTensors.column_ids`.
    """
    if plan.column_ids is None:
        return column
    n_points = plan.n_points()
    slot = (column - n_points).clamp(min=0)
    return plan.column_ids[column.clamp(max=n_points)].long() + slot


def keep_mask(seed: Tensor, query: Tensor, column: Tensor, n_heads: int, rate: float) -> Tensor:
    """Bool ``[M, H]``: which weights dropout keeps.

    It is a hash of seed, head, query and column, so every back end and pass recomputes it and
    nothing is stored.
    """
    head = torch.arange(n_heads, device=query.device)
    return hash_integers(seed, (head, query[:, None], column[:, None])) >= int(rate * 2**32)


def rotate(x: Tensor, coordinates: Tensor, frequencies: Tensor) -> Tensor:
    """Rotates the channel pairs of ``x`` ``[n, H, d]`` by the angles ``coordinates @ frequencies``,
    with coordinates ``[n, C]`` and frequencies ``[C, H or 1, d / 2]``.

    Angles are float64, whatever the dtypes of the arguments, or float32 on a device without
    float64. So they are as exact at coordinates of 2^30 as near the origin. The rotation is
    computed in the dtype of x, float32 at least. Back ends that compute the gradients in that dtype
    too, as all others do, lose digits of the frequencies' gradients at large coordinates: these are
    sums over the rows of products with the coordinates, so float32 holds them to 2^-24 of the
    largest product, however small the sum is.

    The products are summed one by one. A matrix product would obey autocast and TF32, which cannot
    tell cell 300 from cell 301.
    """
    exact = widest_dtype(x.device)
    table, columns = frequencies.to(exact), coordinates.to(exact)[:, :, None, None].unbind(1)
    angles = columns[0] * table[0]
    for column, row in zip(columns[1:], table[1:], strict=True):
        angles = torch.addcmul(angles, column, row)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return apply_rotary(x, angles.cos().to(dtype), angles.sin().to(dtype))


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the channel pairs of ``x`` ``[..., d]`` by angles of which ``cos`` and ``sin``
    ``[..., d / 2]`` are given.
    """
    even, odd = x.unflatten(-1, (-1, 2)).to(torch.promote_types(x.dtype, cos.dtype)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return rotated.flatten(-2).to(x.dtype)


def project(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], norm: Sequence[Tensor],
    eps: float, residual: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Computes ``residual + layer_norm(x) @ weight.t() + bias`` for each of ``weights``.

    ``x`` is ``[n, E]``. ``biases`` holds one per weight or none; ``norm`` holds the weight and bias
    of the layer norm or nothing; ``residual`` may be None.
    """
    if norm:
        x = layer_norm(x, norm[0], norm[1], eps)
    outs = (F.linear(x, weight, bias) for weight, bias in itertools.zip_longest(weights, biases))
    return tuple(out if residual is None else residual + out for out in outs)


def find_slices(
    sorted_keys: Tensor, query_keys: Tensor, traversal: Tensor, level: Tensor, first: Tensor,
    width: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Searches the start and stop of every window row in ``sorted_keys``, int32 ``[N, R]`` each.

    ``query_keys`` ``[L, N]`` are the keys of the windows' first cells. Window row r belongs to
    level ``level[r]``; it has the ``width[r]`` keys from ``first[r]`` after that key on.
    ``traversal`` is the order in which a back end may process the queries.
    """
    first = (query_keys[level].t() + first).contiguous()
    return search_slices(sorted_keys, first, first + width - 1)


def search_slices(sorted_keys: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Searches the start and stop of the keys ``first`` to ``last`` in ``sorted_keys``, int32."""
    starts = torch.searchsorted(sorted_keys, first, out_int32=True)
    stops = torch.searchsorted(sorted_keys, last, right=True, out_int32=True)
    return starts, torch.maximum(starts, stops)


def find_runs(
    traversal: Tensor, starts: Tensor, stops: Tensor, n_columns: int, slices: Sequence[int],
    rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Joins the slices of tiles of ``rows`` rows: ``firsts``, ``shifts``, ``counts`` of `Tiles`.

    ``starts`` and ``stops`` ``[n, R]`` are the slices of windows, ``slices`` of them at each level,
    in an order of ``n_columns`` columns.
    """
    edges = [_by_tile(edge[traversal.long()].long(), slices, rows) for edge in (starts, stops)]
    parts = [_join(start, stop, n_columns) for start, stop in zip(*edges, strict=True)]
    firsts, shifts, counts = zip(*parts, strict=True)
    return torch.cat(firsts, 1).int(), torch.cat(shifts, 1).int(), torch.stack(counts, 1).int()


def _by_tile(edge: Tensor, slices: Sequence[int], rows: int) -> list[Tensor]:
    """``[n, R]`` as ``[T, rows * slices]`` for each level, padded with empty slices."""
    edge = F.pad(edge, (0, 0, 0, -edge.shape[0] % rows)).unflatten(0, (-1, rows))
    return [part.flatten(1) for part in edge.split(list(slices), 2)]


def _join(starts: Tensor, stops: Tensor, n_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """The union of each tile's slices ``[T, C]`` as runs: firsts and shifts ``[T, C]``, of which
    ``counts`` ``[T, 2]`` are valid.
    """
    starts = torch.where(starts < stops, starts, n_columns)
    starts, order = starts.sort(1)
    filled = starts < n_columns
    stops = torch.where(filled, stops.gather(1, order), 0)
    reached = F.pad(stops.cummax(1).values, (1, -1), value=-1)
    begins = filled & (starts > reached)
    new = torch.where(filled, (stops - torch.maximum(starts, reached)).clamp(min=0), 0)
    first = new.cumsum(1) - new
    # Runs move to the front, in order; everything else goes to one discarded column.
    column = torch.where(begins, begins.cumsum(1) - 1, starts.shape[1])
    zeros = torch.zeros_like(F.pad(first, (0, 1)))
    firsts, shifts = (zeros.scatter(1, column, part)[:, :-1] for part in (first, starts - first))
    return firsts, shifts, torch.stack((begins.sum(1), new.sum(1)), 1)


BACKEND = Backend(attend, rotate, project, find_slices, lambda device, dtype: None)
