"""Copies of points on periodic axes: dropout counts a copy as the point that it is of."""

import pytest
import torch
from problems import Inputs, make_inputs, make_scene
from torch import Tensor

from vicinal import NeighborhoodPlan
from vicinal._index.tiles import GroupedCells, find_tiles
from vicinal._utils.types import BackendName
from vicinal.backends import choose_backend, reference
from vicinal.backends.types import NeighborSlices, PlanTensors

# The interpreter computes with NumPy, which warns about values that kernels mask.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")

COPIED = torch.tensor([3, 17, 4, 29])


def plan_with_tiles(plan: NeighborhoodPlan) -> PlanTensors:
    cells = plan._query_cells(), plan._point_cells()
    return with_tiles(plan._tensors, plan._point_slices(), *cells)


def with_tiles(
    tensors: PlanTensors, point_slices: NeighborSlices, query_cells: GroupedCells,
    point_cells: GroupedCells,
) -> PlanTensors:  # fmt: skip
    n_slices, windows = tensors.slices_per_level(), (tensors.windows, reference.find_runs)
    cells = query_cells, point_cells
    return tensors._replace(
        query_tiles=find_tiles(tensors.query_slices, *cells, n_slices, *windows),
        point_tiles=find_tiles(point_slices, *cells[::-1], [max(n_slices)], *windows),
    )


def plan_of_copies(plan: NeighborhoodPlan) -> PlanTensors:
    """The plan in which copies, rows after those of the points, take the places of `COPIED`."""
    tensors, slices = plan._tensors, plan._tensors.query_slices
    n = plan.n_points
    order = slices.order.clone()
    for row, point in enumerate(COPIED.tolist()):
        order[slices.order == point] = n + row
    # No slice reaches what is appended.
    order = torch.cat((order, COPIED.int()))
    columns = torch.cat((tensors.point_columns, torch.zeros(len(COPIED), dtype=torch.int32)))
    groups, cells = plan._point_cells()
    groups, cells = (torch.cat((x, x[..., COPIED]), -1) for x in (groups, cells))
    groups[:, COPIED] = -2
    traversal, starts, stops, queries = plan._point_slices()
    rows = torch.arange(n, n + len(COPIED), dtype=torch.int32)
    starts, stops = (torch.cat((edge, edge[COPIED])) for edge in (starts, stops))
    point_slices = NeighborSlices(torch.cat((traversal, rows)), starts, stops, queries)
    tensors = tensors._replace(
        query_slices=slices._replace(order=order),
        point_columns=columns,
        column_ids=torch.cat((torch.arange(n), COPIED, torch.tensor([n]))).int(),
    )
    return with_tiles(tensors, point_slices, plan._query_cells(), GroupedCells(groups, cells))


def attended(backend: BackendName, inputs: Inputs, plan: PlanTensors, rate: float) -> list[Tensor]:
    """The result and the gradients; those of copies are added to those of their points."""
    inputs = inputs.fresh()
    q, k, v, background, mask, _ = inputs
    if plan.column_ids is not None:
        k, v = (torch.cat((x, x[COPIED])) for x in (k, v))
    cells, seed = tuple(background or ()), torch.tensor(2**40 + 7)
    chosen = choose_backend(backend, torch.device("cpu"), q.dtype)
    out, lse = chosen.attend(q, k, v, plan, cells, None, mask, seed, 0.5, rate)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out.pow(2).sum(), inputs.leaves())]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off where there is a GPU")
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("background", [False, True])
def test_dropout_counts_a_copy_as_its_point(backend: BackendName, background: bool) -> None:
    plan = make_scene(((6, 4), (5, 5)), (3, 5), (9, 0, 7), 40).plan()
    dtype = torch.float32 if backend == "triton" else torch.float64
    inputs = make_inputs(plan, heads=1, background=background, mask=True, dtype=dtype)
    copies, points = plan_of_copies(plan), plan_with_tiles(plan)
    assert set(COPIED.tolist()) & set(plan.pairs()[:, 1].tolist())
    tolerance = 1e-5 if backend == "triton" else 1e-12
    for left, right in zip(
        attended(backend, inputs, copies, 0.5), attended(backend, inputs, points, 0.5), strict=True
    ):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
