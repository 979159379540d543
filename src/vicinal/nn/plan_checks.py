"""Whether a plan was made for the queries, points and windows that it is used with."""

import torch
from torch import Tensor

from .._index.plan_checks import check_plan_facts, check_plan_points, refuse_plan
from .._plan.keyed_cells import Queries, in_equal_cells, query_cells
from .._utils.checks import reads_contents
from ..placement import query_images
from ..plan import NeighborhoodPlan
from ..pyramid import FeaturePyramid
from ..window_shapes import Window, causal_axes


def check_plan(
    plan: NeighborhoodPlan,
    positions: Tensor,
    offsets: Tensor,
    pyramid: FeaturePyramid,
    neighborhood_sizes: tuple[int | tuple[int, ...] | Window, ...],
    query_levels: Tensor | None = None,
    check_contents: bool | None = None,
) -> None:
    """Raises ValueError unless ``plan`` was made for these queries, points and windows.

    Queries may have moved within their cells. On a GPU only what needs no synchronization is
    compared, unless ``check_contents`` is True.

    Args:
        plan: the plan to check.
        positions, offsets, pyramid: of the queries and points, as `check_placement` returns them.
        neighborhood_sizes: of each level, as `as_windows` returns them.
        query_levels: ``[N]``, or None. Without causal axes nothing depends on them.
        check_contents: whether to compare tensor contents. None: on the CPU only.
    """
    facts = {
        "neighborhood_sizes": (plan.neighborhood_sizes, neighborhood_sizes),
        "level_spatial_shapes": (plan.level_shapes, pyramid.level_shapes),
        "periodic_axes": (plan.periodic_axes, pyramid.periodic_axes),
        "number of images": (plan.batch_size, pyramid.batch_size),
        "number of queries": (plan.n_queries, positions.shape[0]),
        "device": (plan.device, positions.device),
    }
    check_plan_facts(plan, facts)
    planned_points = plan._keyed_cells.coordinates[: plan.n_points]
    check_plan_points(plan, planned_points, pyramid, check_contents)
    if not reads_contents(check_contents, plan.device):
        return
    if not torch.equal(query_images(positions, offsets, plan.batch_size).int(), plan.query_batch):
        refuse_plan(plan, "images", "query_batch_offsets")
    _check_queries(plan, Queries(positions, offsets, query_levels), pyramid)


def _check_queries(plan: NeighborhoodPlan, queries: Queries, pyramid: FeaturePyramid) -> None:
    """Raises ValueError unless the queries fall into the cells that ``plan`` was made for."""
    planned, planned_levels = plan._keyed_cells.positions, plan._keyed_cells.query_levels
    if not causal_axes(plan._windows):
        queries = queries._replace(levels=None)
    levels = queries.levels
    equal_levels = planned_levels is None and levels is None
    if planned_levels is not None and levels is not None:
        equal_levels = torch.equal(planned_levels, levels)
        if not equal_levels:
            refuse_plan(plan, "query levels", "query_level_indices")
    equal_dtypes = planned.dtype == queries.positions.dtype
    if equal_levels and equal_dtypes and in_equal_cells(planned, queries.positions, pyramid):
        return
    _, anchors = query_cells(queries, pyramid, plan._windows)
    first_cells = plan._cell_keys().first_cells(anchors)
    if not torch.equal(first_cells, plan._keyed_cells.first_cells.long()):
        names = "query_spatial_positions", "query_level_indices"
        refuse_plan(plan, "query cells", names[0] if equal_levels else " and ".join(names))
