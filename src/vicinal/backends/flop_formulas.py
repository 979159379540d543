"""Floating-point operations of attention and sampling, for `torch.utils.flop_counter`.

Products are counted, as torch counts those of its own attention: per head and pair of a query with
a point, or with an empty cell that has a background, ``2 d`` operations for the logit and ``2 dv``
for the value. How many pairs there are follows from the slices of the plan. Where these have no
contents, as fake tensors and those on the meta device, no pair is counted. Sampling takes ``2 d``
per head and corner of a location, occupied or not, and twice as many in the backward pass.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .._utils.checks import has_contents


class PairSlices(NamedTuple):
    """What tells the pairs of a plan.

    Attributes:
        starts, stops: ``[N, R]``, see `backends.types.NeighborSlices`.
        point_columns: ``[nnz]``, see `backends.types.PlanTensors`.
        valid: bool ``[N]``, the queries that belong to an image.
    """

    starts: Tensor
    stops: Tensor
    point_columns: Tensor
    valid: Tensor


class _Pairs(NamedTuple):
    points: int  # pairs with points
    cells: int  # pairs with empty cells


def register_attention(
    namespace: str, find_slices: Callable[[Sequence[Tensor]], PairSlices]
) -> None:
    """Registers the attention ops of a back end. ``find_slices`` takes what they take as plan."""

    def pairs_of(
        query_mask: Tensor | None, background: Sequence[Tensor], plan: Sequence[Tensor]
    ) -> _Pairs:
        if torch.compiler.is_compiling() or not has_contents(plan[0]):
            return _Pairs(0, 0)
        return _count_pairs(find_slices(plan), query_mask, background)

    ops = getattr(torch.ops, namespace)

    @register_flop_formula(ops.neighborhood_attention, get_raw=True)
    def _(
        q: Tensor, k: Tensor, v: Tensor, query_mask: Tensor | None, seed: Tensor | None,
        background: Sequence[Tensor], bias: Tensor | None, plan: Sequence[Tensor],
        *_: Any, **__: Any,
    ) -> int:  # fmt: skip
        pairs = pairs_of(query_mask, background, plan)
        return 2 * q.shape[1] * sum(pairs) * (q.shape[2] + v.shape[2])

    @register_flop_formula(ops.neighborhood_attention_backward, get_raw=True)
    def _(
        grad_out: Tensor, grad_lse: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor,
        v: Tensor, query_mask: Tensor | None, seed: Tensor | None, background: Sequence[Tensor],
        bias: Tensor | None, plan: Sequence[Tensor], slices: Sequence[int], scale: float,
        dropout_p: float, needs_queries: bool, needs_points: bool, **_: Any,
    ) -> int:  # fmt: skip
        # Empty cells matter to the gradients of queries, background and bias alone.
        points, cells = pairs_of(query_mask, background if needs_queries else [], plan)
        (n_heads, width), value_width = q.shape[1:], v.shape[2]
        both = width + value_width
        per_point = both + needs_queries * width + needs_points * both  # with the logits again
        return 2 * n_heads * (points * per_point + cells * (both + width + both))


def register_sampling(namespace: str) -> None:
    """Registers the sampling ops of a back end."""
    ops = getattr(torch.ops, namespace)

    def flops(table: list[int], locations: list[int]) -> int:
        *counts, n_axes = locations
        return 2 * math.prod(counts) * (1 << n_axes) * table[2]

    @register_flop_formula(ops.sample)
    def _(table: list[int], locations: list[int], *_: Any, **__: Any) -> int:
        return flops(table, locations)

    @register_flop_formula(ops.sample_backward)
    def _(grad: list[int], table: list[int], locations: list[int], *_: Any, **__: Any) -> int:
        return 2 * flops(table, locations)


def _count_pairs(
    slices: PairSlices, query_mask: Tensor | None, background: Sequence[Tensor]
) -> _Pairs:
    active = slices.valid if query_mask is None else slices.valid & ~query_mask
    starts, stops = (edge[active].long() for edge in (slices.starts, slices.stops))
    n_points = int((stops - starts).sum())
    if not background:
        return _Pairs(n_points, 0)
    # A cell holds the points of one column among those of a slice, which follow one another.
    columns = slices.point_columns
    begins = torch.ones_like(columns, dtype=torch.int64)
    begins[1:] = columns[1:] != columns[:-1]
    cells = begins.cumsum(0)
    starts, stops = starts[stops > starts], stops[stops > starts]
    n_occupied = int((cells[stops - 1] - cells[starts] + 1).sum())
    return _Pairs(n_points, int(active.sum()) * len(background[1]) - n_occupied)
