"""Deformable attention that samples the points of all ranks against that of one process."""

import math
from typing import Any

import pytest
import torch
from deformable_scenes import EMBED, make_module
from distributed.cluster import Cluster
from distributed.shares import (
    PROBLEMS,
    Owners,
    Problem,
    owned_by_first,
    owners_by_cell,
    owners_by_slab,
    share_of,
)
from problems import Scene, assert_close
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vicinal import FeaturePyramid, SparseDeformableAttention
from vicinal.distributed import shard_attention, sum_gradients

NAMES = [name for name in PROBLEMS if "level left out" not in name]


def attention_of(scene: Scene, reach: float) -> SparseDeformableAttention:
    """A module whose sampling locations are up to several times ``reach`` cells from queries."""
    torch.manual_seed(2)
    module = make_module(scene)
    with torch.no_grad():
        module.offset_proj.bias.mul_(reach)
    return module


def leaves_of(scene: Scene, background: bool) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    pyramid = scene.pyramid
    return {
        "query": draw(len(scene.positions), EMBED),
        "values": draw(len(pyramid), EMBED),
        "positions": scene.positions.double().clone().requires_grad_(),
        "background": draw(pyramid.batch_size, pyramid.n_levels, EMBED) if background else None,
    }


def attend(
    group: ProcessGroup, problem: Problem, owners: Owners, reach: float, background: bool
) -> None:
    """Compares output and all gradients with those of one process."""
    scene = problem.scene()
    share = share_of(scene, owners, group)
    module = attention_of(scene, reach)
    one, own = leaves_of(scene, background), leaves_of(scene, background)
    mask = torch.arange(len(scene.positions)) % 5 == 0

    def call(leaves: dict[str, Any], queries: Tensor, points: Tensor, **where: Any) -> Tensor:
        pyramid: FeaturePyramid = where["pyramid"]
        out: Tensor = module(
            leaves["query"][queries],
            leaves["positions"][queries],
            where["offsets"],
            pyramid.with_values(leaves["values"][points]),
            background_embedding=leaves["background"],
            query_mask=mask[queries],
        )
        return out

    every = torch.arange(len(mask)), torch.arange(len(scene.pyramid))
    out = call(one, *every, offsets=scene.offsets, pyramid=scene.pyramid)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).double()
    expected = gradients(module, one, out, weights)
    shard_attention(module, group)
    own_out = call(own, share.queries, share.points, offsets=share.offsets, pyramid=share.pyramid)
    assert_close(own_out, out[share.queries], 1e-12)
    actual = gradients(module, own, own_out, weights[share.queries], group)
    for name, grad in expected.items():
        scale = max(1.0, float(grad.abs().max())) if grad.numel() else 1.0
        assert_close(actual[name], grad, 1e-12 * scale, name)


def gradients(
    module: nn.Module,
    leaves: dict[str, Tensor | None],
    out: Tensor,
    weights: Tensor,
    group: ProcessGroup | None = None,
) -> dict[str, Tensor]:
    """Those of parameters and leaves, summed over the ranks of a group."""
    module.zero_grad()
    out.backward(weights)
    named = dict(module.named_parameters())
    named.update({name: leaf for name, leaf in leaves.items() if leaf is not None})  # type: ignore[misc]
    if group is not None:
        sum_gradients(named.values(), group)
    found = {}
    for name, leaf in named.items():
        assert leaf.grad is not None
        found[name] = leaf.grad.clone()
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("owners", [owners_by_cell, owners_by_slab, owned_by_first])
def test_it_is_that_of_one_process(name: str, owners: Owners, cluster: Cluster) -> None:
    cluster.run(4, attend, PROBLEMS[name], owners, 1.0, owners is owners_by_slab)


@pytest.mark.parametrize("name", ["periodic along both axes", "3-D"])
def test_locations_far_beyond_the_map_or_several_periods_away(name: str, cluster: Cluster) -> None:
    cluster.run(3, attend, PROBLEMS[name], owners_by_cell, 7.0, False)


def few_rows(group: ProcessGroup) -> int:
    """The number of points that a rank knows, by the weights of its queries."""
    shape = (4096,)
    cells = torch.arange(0, 4096, 2)
    owners = (cells >= 2048).long()
    own = cells[owners == torch.distributed.get_rank(group)]
    coordinates = torch.nn.functional.pad(own[:, None], (1, 0))
    values = torch.randn(len(own), 6)
    pyramid = FeaturePyramid.from_points(coordinates, values, shape, 1, strides=(1,))
    attention = shard_attention(SparseDeformableAttention(6, 2, 1, position_dim=1), group)
    weights = attention.attention_weights(
        pyramid.values, pyramid.positions(), pyramid.batch_offsets(), pyramid
    )
    return int(weights.points.max()) + 1 - len(pyramid)


def test_only_points_around_sampling_locations_are_sent(cluster: Cluster) -> None:
    assert all(0 < n < 6 for n in cluster.run(2, few_rows))


def weigh(group: ProcessGroup, problem: Problem) -> None:
    """Each query gives the points of all ranks the weights of one process."""
    scene = problem.scene()
    share = share_of(scene, owners_by_cell, group)
    module = attention_of(scene, 1.0)
    query = torch.randn(len(scene.positions), EMBED, dtype=torch.float64)
    values = torch.randn(len(scene.pyramid), EMBED, dtype=torch.float64)
    whole = scene.pyramid.with_values(values)
    expected = module.attention_weights(query, scene.positions.double(), scene.offsets, whole)
    shard_attention(module, group)
    own = share.pyramid.with_values(values[share.points])
    positions = scene.positions.double()[share.queries]
    found = module.attention_weights(query[share.queries], positions, share.offsets, own)
    for row, number in enumerate(share.queries.tolist()):
        ours = found.weights[found.offsets[row] : found.offsets[row + 1]]
        theirs = expected.weights[expected.offsets[number] : expected.offsets[number + 1]]
        assert_close(ours.sort(0).values, theirs.sort(0).values, 1e-12)


def test_weights_are_those_of_one_process(cluster: Cluster) -> None:
    cluster.run(3, weigh, PROBLEMS["periodic"])


def refusals(group: ProcessGroup) -> list[str]:
    messages = []
    attention = shard_attention(SparseDeformableAttention(6, 2, 1, position_dim=2), group)
    rank = torch.distributed.get_rank(group)
    pyramid = FeaturePyramid(torch.randn(1, 6), torch.tensor([[0, 1, 1, 0]]), ((4, 4),), 1)
    bad = torch.full((1, 2), math.nan if rank == 1 else 1.0)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        attention.make_plan(bad, torch.tensor([0, 1]), pyramid)
    messages.append(str(error.value))
    other = FeaturePyramid(pyramid.values, pyramid.coordinates, ((4, 4 + rank),), 1)
    with pytest.raises(ValueError, match="level_shapes") as error:
        attention(pyramid.values, torch.ones(1, 2), torch.tensor([0, 1]), other)
    messages.append(str(error.value))
    plan = attention.make_plan(torch.ones(1, 2), torch.tensor([0, 1]), pyramid)
    wider = FeaturePyramid(pyramid.values, pyramid.coordinates, ((9, 9),), 1)
    with pytest.raises(ValueError, match="plan"):
        attention(pyramid.values, torch.ones(1, 2), torch.tensor([0, 1]), wider, plan=plan)
    return messages


def test_refusals_are_shared(cluster: Cluster) -> None:
    first, second = cluster.run(2, refusals)
    assert first == second
    assert first[0].startswith("query_spatial_positions: ")
