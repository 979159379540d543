"""A rank's queries in two parts: those that see no point of other ranks, and the others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .._plan.search import join_column_ids
from ..nn._base import Inputs
from ..plan import NeighborhoodPlan, plan_neighborhoods
from ..pyramid import FeaturePyramid
from .plan import ShardedPlan, with_points


@dataclass(frozen=True, eq=False)
class QueryPart:
    """Some of a rank's queries, and a plan of them on some of the points that it knows.

    Attributes:
        queries: int64 ``[m]``, rows of the own queries, ascending.
        offsets: int64 ``[B + 1]``, the images in these rows.
        points: int64 ``[p]``, rows of own and received points, ascending.
        n_own: how many of these points are own ones.
        pyramid: these points. Their values take no memory.
        plan: of the queries on the points.
    """

    queries: Tensor
    offsets: Tensor
    points: Tensor
    n_own: int
    pyramid: FeaturePyramid
    plan: NeighborhoodPlan

    def select(self, inputs: Inputs) -> Inputs:
        """The ``inputs`` of the part's queries, on its points."""
        rows = self.queries
        mask, level = inputs.mask, inputs.level
        return inputs._replace(
            query=inputs.query[:0],  # it has been projected
            positions=inputs.positions[rows],
            offsets=self.offsets,
            level=level if isinstance(level, int) else level[rows],
            mask=None if mask is None else mask[rows],
            pyramid=self.pyramid,
        )

    def plan_with_ids(self, whole: ShardedPlan) -> NeighborhoodPlan:
        """The plan, in which dropout counts queries and points as it does in the ``whole`` plan."""
        tensors, n = whole._tensors, whole.n_points
        rows = torch.arange(max(n + 1, whole.n_queries), device=whole.device)
        query_ids = rows if tensors.query_ids is None else tensors.query_ids
        column_ids = rows[: n + 1] if tensors.column_ids is None else tensors.column_ids
        ids = torch.cat((column_ids[self.points], column_ids[-1:]))
        return self.plan._with_ids(
            query_ids[self.queries].int(), join_column_ids(ids, self.plan.copies)
        )


def divide_queries(plan: ShardedPlan, inputs: Inputs) -> tuple[QueryPart, QueryPart]:
    """The interior queries on the own points, and the others on what they see.

    Both parts keep the order of queries and points, so that every query sums over the same
    neighbors in the same order as in ``plan``. Layers that share the plan share the parts.
    """
    return plan._cached("query_parts", lambda: _find_parts(plan, inputs))


def _find_parts(plan: ShardedPlan, inputs: Inputs) -> tuple[QueryPart, QueryPart]:
    n = plan.n_own_points
    slices = plan._tensors.query_slices
    points = plan.points_of_keys(slices.order.long())
    received = torch.nn.functional.pad((points >= n).cumsum(0, dtype=torch.int32), (1, 0))
    outer = (received[slices.starts] != received[slices.stops]).any(1)
    interior, boundary = (~outer).nonzero().flatten(), outer.nonzero().flatten()
    own = torch.arange(n, device=plan.device)
    seen = torch.zeros(plan.n_points, dtype=torch.bool, device=plan.device)
    seen[points[_covered(slices.starts[boundary], slices.stops[boundary], len(points))]] = True
    seen[n:] = True
    return (
        _make_part(plan, inputs, interior, own, n),
        _make_part(plan, inputs, boundary, seen.nonzero().flatten(), int(seen[:n].sum())),
    )


def _covered(starts: Tensor, stops: Tensor, n: int) -> Tensor:
    """Bool ``[n]``: which of ``n`` entries lie in a slice, ``starts`` and ``stops`` int32."""
    bounds = torch.zeros(n + 1, dtype=torch.int32, device=starts.device)
    for edges, change in ((starts, 1), (stops, -1)):
        index = edges.flatten().long()
        bounds.scatter_add_(0, index, torch.full_like(edges, change).flatten())
    return bounds[:-1].cumsum(0) > 0


def _make_part(
    plan: ShardedPlan, inputs: Inputs, queries: Tensor, points: Tensor, n_own: int
) -> QueryPart:
    pyramid = with_points(inputs.pyramid, plan.coordinates[points])
    offsets = torch.searchsorted(queries, inputs.offsets.long())
    levels = inputs.query_levels()
    found = plan_neighborhoods(
        inputs.positions[queries],
        offsets,
        pyramid,
        plan.neighborhood_sizes,
        None if levels is None else levels[queries],
        check_contents=False,
    )
    return QueryPart(queries, offsets, points, n_own, pyramid, found)
