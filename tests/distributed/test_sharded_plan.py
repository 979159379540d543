"""Plans and attention of several ranks against one process."""

import time
from typing import Any

import pytest
import torch
from distributed.cluster import Cluster, RanksFailedError
from distributed.shares import (
    PROBLEMS,
    Owners,
    Problem,
    owned_by_first,
    owners_by_cell,
    owners_by_slab,
    plan_of_one,
    plan_of_share,
    share_of,
)
from problems import assert_close, make_inputs
from torch import Tensor
from torch.distributed import ProcessGroup

from vicinal import FeaturePyramid, neighborhood_attention
from vicinal._utils.types import BackendName
from vicinal.distributed import Halo, ShardedPlan, plan_sharded


def attend(
    group: ProcessGroup, problem: Problem, owners: Owners, dtype: torch.dtype, backend: BackendName
) -> None:
    """Compares output, log-sum-exp and gradients of a rank with those of one process."""
    scene = problem.scene()
    whole, share = plan_of_one(scene), share_of(scene, owners, group)
    plan = plan_of_share(scene, share, group)
    inputs = make_inputs(whole, dtype=dtype).fresh()
    out, lse = neighborhood_attention(
        inputs.q, append(whole, inputs.k), append(whole, inputs.v), whole, return_lse=True,
        backend=backend,
    )  # fmt: skip
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    out.backward(weights)
    q = inputs.q.detach()[share.queries].requires_grad_()
    k, v = (x.detach()[share.points].requires_grad_() for x in (inputs.k, inputs.v))
    keys, values = (plan.append_copies(plan.halo.extend(x)) for x in (k, v))
    own_out, own_lse = neighborhood_attention(
        q, keys, values, plan, return_lse=True, backend=backend
    )
    own_out.backward(weights[share.queries])
    assert torch.equal(own_out, out[share.queries])
    assert torch.equal(own_lse, lse[share.queries])
    assert torch.equal(grad_of(q), grad_of(inputs.q)[share.queries])
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert_close(grad_of(k), grad_of(inputs.k)[share.points], tolerance)
    assert_close(grad_of(v), grad_of(inputs.v)[share.points], tolerance)


def append(plan: Any, x: Tensor) -> Tensor:
    appended: Tensor = plan.append_copies(x)
    return appended


def grad_of(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("owners", [owners_by_cell, owners_by_slab, owned_by_first])
def test_attention_has_the_bits_of_one_process(name: str, owners: Owners, cluster: Cluster) -> None:
    cluster.run(4, attend, PROBLEMS[name], owners, torch.float64, "cpu")


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
def test_any_number_of_ranks(n_ranks: int, cluster: Cluster) -> None:
    cluster.run(n_ranks, attend, PROBLEMS["periodic"], owners_by_cell, torch.float64, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_have_the_bits_of_one_process(dtype: torch.dtype, cluster: Cluster) -> None:
    cluster.run(3, attend, PROBLEMS["3-D"], owners_by_cell, dtype, "cpu")


def test_reference_has_the_bits_of_one_process(cluster: Cluster) -> None:
    cluster.run(3, attend, PROBLEMS["3-D"], owners_by_cell, torch.float64, "reference")


def neighbors(group: ProcessGroup, problem: Problem, owners: Owners) -> tuple[int, int]:
    """Checks the pairs of a rank. Returns how many points came in and how many could be seen."""
    scene = problem.scene()
    whole, share = plan_of_one(scene), share_of(scene, owners, group)
    plan = plan_of_share(scene, share, group)
    pairs, own = whole.pairs(), plan.pairs()
    expected = scene.pyramid.coordinates[pairs[torch.isin(pairs[:, 0], share.queries)][:, 1]]
    assert torch.equal(plan.coordinates[own[:, 1]], expected)
    assert torch.equal(plan.counts(), whole.counts()[share.queries])
    return sum(plan.halo.receive), len(scene.pyramid) - len(share.points)


def test_pairs_are_those_of_one_process(cluster: Cluster) -> None:
    for problem in PROBLEMS.values():
        cluster.run(3, neighbors, problem, owners_by_slab)


def test_only_points_within_reach_are_sent(cluster: Cluster) -> None:
    wide = Problem(((200, 8),), (3,), (40,), 400)
    scene_halos = cluster.run(2, compact_halo, wide)
    assert max(scene_halos) < 40


def compact_halo(group: ProcessGroup, problem: Problem) -> int:
    """How many points come in where each rank has the queries and points of one half."""
    scene = problem.scene()
    rank = torch.distributed.get_rank(group)
    points = (scene.pyramid.coordinates[:, 1] >= 100) == bool(rank)
    queries = (scene.positions[:, 0] >= 100) == bool(rank)
    pyramid = FeaturePyramid(
        scene.pyramid.values[points], scene.pyramid.coordinates[points], problem.shapes, 1
    )
    offsets = torch.tensor([0, int(queries.sum())])
    plan = plan_sharded(scene.positions[queries], offsets, pyramid, problem.sizes, group=group)
    return sum(plan.halo.receive)


def test_the_halo_is_differentiable(cluster: Cluster) -> None:
    cluster.run(2, sum_of_squares)


def sum_of_squares(group: ProcessGroup) -> None:
    """The gradient of a row is the sum over all ranks that have it, and so is its own."""
    rank = torch.distributed.get_rank(group)
    halo = Halo(torch.tensor([0, 2]), (1, 1), (1, 1), group)  # row 0 to rank 0, row 2 to rank 1
    x = (torch.arange(3.0, dtype=torch.float64) + 10 * rank).requires_grad_()
    extended = halo.extend(x)
    came = 2 * rank
    assert extended.tolist() == [*x.tolist(), came, 10 + came]
    (first,) = torch.autograd.grad((extended**3).sum(), x, create_graph=True)
    assert torch.equal(first, x**2 * torch.tensor([6, 3, 6]))
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, x * torch.tensor([12, 6, 12]))


def exchange_meanwhile(group: ProcessGroup, problem: Problem) -> None:
    """An exchange with work in between has the bits of one at once, also of a second backward."""
    scene = problem.scene()
    plan = plan_of_share(scene, share_of(scene, owners_by_cell, group), group)
    x = torch.randn(plan.n_own_points, 3, dtype=torch.float64)
    weights = torch.randn(plan.n_points, 3, dtype=torch.float64)
    at_once, in_parts = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = plan.halo.extend(at_once)
    exchanges = [plan.halo.start(in_parts) for _ in range(2)]  # several at a time
    own = in_parts.sin()
    both = [exchange.finish() for exchange in exchanges]
    assert all(torch.equal(extended, expected) for extended in both)
    ((expected * weights).sum() + 2 * at_once.sin().sum()).backward()
    loss = (both[0] * weights).sum() + 0 * both[1].sum() + 2 * own.sum()
    loss.backward(retain_graph=True)
    assert torch.equal(grad_of(in_parts), grad_of(at_once))
    in_parts.grad = None
    loss.backward()
    assert torch.equal(grad_of(in_parts), grad_of(at_once))


@pytest.mark.parametrize("name", ["periodic", "few points", "no points"])
def test_an_exchange_lets_other_work_pass(name: str, cluster: Cluster) -> None:
    cluster.run(4, exchange_meanwhile, PROBLEMS[name])


def start_before_others(group: ProcessGroup) -> tuple[float, float]:
    """How long rank 0 takes to start an exchange, and to finish one that rank 1 starts late."""
    halo = Halo(torch.tensor([0, 1]), (1, 1), (1, 1), group)
    torch.distributed.barrier(group)
    if torch.distributed.get_rank(group) == 1:
        time.sleep(2)
    times = [time.monotonic()]
    exchange = halo.start(torch.ones(2))
    times.append(time.monotonic())
    exchange.finish()
    times.append(time.monotonic())
    return times[1] - times[0], times[2] - times[1]


def test_to_start_an_exchange_does_not_wait_for_others(cluster: Cluster) -> None:
    (started, finished), _ = cluster.run(2, start_before_others)
    assert started < 1
    assert finished > 0.5


def plan_round_trip(group: ProcessGroup) -> None:
    scene = PROBLEMS["periodic"].scene()
    plan = plan_of_share(scene, share_of(scene, owners_by_cell, group), group)
    moved = plan.to("meta")
    assert isinstance(moved, ShardedPlan)
    assert moved.halo.rows.device.type == "meta"
    assert "points" in repr(plan)


def test_a_plan_moves_to_another_device_with_its_halo(cluster: Cluster) -> None:
    cluster.run(2, plan_round_trip)


def refused(group: ProcessGroup, change: str) -> str:
    """The message of a plan of which rank 1 has other arguments."""
    scene = PROBLEMS["3-D"].scene()
    share, sizes = share_of(scene, owners_by_cell, group), scene.sizes
    positions, offsets, pyramid = scene.positions[share.queries], share.offsets, share.pyramid
    if torch.distributed.get_rank(group) == 1:
        if change == "positions":
            positions = positions.clone()
            positions[0] = torch.nan
        elif change == "sizes":
            sizes = (3, 5)
        elif change == "even":
            sizes = (3, 4)
        else:
            pyramid = FeaturePyramid(pyramid.values, pyramid.coordinates, ((6, 5, 4), (3, 3, 3)), 1)
    with pytest.raises(ValueError, match="expected") as caught:
        plan_sharded(positions, offsets, pyramid, sizes, group=group)
    torch.distributed.barrier(group)  # the group is in step
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("positions", "query_spatial_positions"),
        ("sizes", "neighborhood_sizes"),
        ("even", "neighborhood_sizes"),
        ("map", "level_shapes"),
    ],
)
def test_all_ranks_raise_the_same_refusal(change: str, word: str, cluster: Cluster) -> None:
    messages = cluster.run(3, refused, change)
    assert len(set(messages)) == 1
    assert word in messages[0]
    assert "rank 1" in messages[0]


def call_two(group: ProcessGroup) -> None:
    scene = PROBLEMS["3-D"].scene()
    share = share_of(scene, owners_by_cell, group)
    if torch.distributed.get_rank(group):
        from vicinal.distributed import SpacePartition

        SpacePartition([[[0, 0], [8, 8]], [[8, 0], [16, 8]]], group)
    plan_of_share(scene, share, group)


def test_ranks_in_different_calls_are_told(cluster: Cluster) -> None:
    with pytest.raises(RanksFailedError, match="SpacePartition") as caught:
        cluster.run(2, call_two)
    assert set(caught.value.errors) == {0, 1}


def halos_of_seams(group: ProcessGroup) -> None:
    """A small ring, on which each rank sees the points of the other across both seams."""
    scene = Problem(((8, 8), (4, 4)), (5, 3), (30,), 60, (0, 1)).scene()
    halo = plan_of_share(scene, share_of(scene, owners_by_slab, group), group).halo
    for rows in halo.rows.split(halo.send):
        assert len(rows.unique()) == len(rows)


def test_a_point_is_sent_once_per_rank(cluster: Cluster) -> None:
    cluster.run(3, halos_of_seams)


def wrong_halos(group: ProcessGroup) -> None:
    rows = torch.tensor([0, 1])
    for name, arguments in {
        "rows": (rows.float(), (2, 0), (0, 0), group),
        "send": (rows, (1, 0), (0, 0), group),
        "receive": (rows, (2, 0), (0,), group),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: "):
            Halo(*arguments)
    scene = PROBLEMS["2-D, an empty image, coarse first"].scene()
    share = share_of(scene, owners_by_slab, group)
    plan = plan_of_share(scene, share, group)
    other = FeaturePyramid(
        share.pyramid.values[1:], share.pyramid.coordinates[1:], share.pyramid.level_shapes, 3
    )
    with pytest.raises(ValueError, match="pyramid"):
        plan.extend(other)
    with pytest.raises(ValueError, match="pyramid"):
        plan.with_row_numbers(other if torch.distributed.get_rank(group) else share.pyramid)


def test_wrong_halos_and_other_points_are_refused(cluster: Cluster) -> None:
    cluster.run(2, wrong_halos)
