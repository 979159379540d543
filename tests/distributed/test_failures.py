"""What ends one rank ends all of them: refusals, deaths and hangs."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.pool import ThreadPool
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.cluster import Cluster, RanksFailedError
from torch import Tensor
from torch.distributed import ProcessGroup

from vicinal import FeaturePyramid, QueryPlacement, SparseNeighborhoodAttentionBlock
from vicinal.distributed import (
    ShardedPlan,
    SpacePartition,
    partition_space,
    plan_sharded,
    shard_attention,
)

SHAPE, EMBED, TIMEOUT = (32, 24), 8, 5.0  # seconds


def own_points(group: ProcessGroup) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    cells = [torch.randint(0, size, (200, 1), generator=generator) for size in (1, *SHAPE)]
    values = torch.randn(200, EMBED, generator=generator)
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    return torch.cat(cells, 1).tensor_split(n_ranks)[rank], values.tensor_split(n_ranks)[rank]


def make_pyramid(cells: Tensor, values: Tensor) -> FeaturePyramid:
    return FeaturePyramid.from_points(cells, values, SHAPE, 1, strides=(1, 2))


def make_block(**options: Any) -> SparseNeighborhoodAttentionBlock:
    torch.manual_seed(0)
    options = {"n_levels": 2, "neighborhood_sizes": (3, 3), **options}
    return SparseNeighborhoodAttentionBlock(EMBED, 2, **options)


# ----------------------------------------------------------------- ranks that do not agree


def different_rows(part: SpacePartition, cells: Tensor, values: Tensor, is_odd: bool) -> None:
    part.scatter(cells, values.double() if is_odd else values)


def more_rows(part: SpacePartition, cells: Tensor, values: Tensor, is_odd: bool) -> None:
    part.scatter(cells, *([values] * (1 + is_odd)))


def gradients_of_some(part: SpacePartition, cells: Tensor, values: Tensor, is_odd: bool) -> None:
    part.scatter(cells, values.requires_grad_(is_odd))


def constants_in_a_plan(part: SpacePartition, cells: Tensor, values: Tensor, is_odd: bool) -> None:
    pyramid = make_pyramid(*part.scatter(cells, values))
    pyramid.values.requires_grad_(is_odd)
    make_plan(part, pyramid)


def no_points_and_no_gradient(
    part: SpacePartition, cells: Tensor, values: Tensor, is_odd: bool
) -> None:
    n = 0 if is_odd else len(cells)
    make_plan(part, make_pyramid(cells[:n], values[:n].requires_grad_(not is_odd)))


def without_grad_mode(part: SpacePartition, cells: Tensor, values: Tensor, is_odd: bool) -> None:
    pyramid = make_pyramid(*part.scatter(cells, values.requires_grad_()))
    with torch.set_grad_enabled(is_odd):
        make_plan(part, pyramid)


def other_widths(part: SpacePartition, cells: Tensor, values: Tensor, is_odd: bool) -> None:
    make_plan(part, make_pyramid(cells, values[:, : 8 - is_odd]))


def gathered_dtypes(part: SpacePartition, cells: Tensor, values: Tensor, is_odd: bool) -> None:
    part.gather(make_pyramid(cells, values.double() if is_odd else values))


def other_positions(part: SpacePartition, cells: Tensor, values: Tensor, is_odd: bool) -> None:
    positions = torch.ones(3, 2, dtype=torch.float64 if is_odd else torch.float32)
    placement = QueryPlacement(positions, torch.tensor([0, 3]))
    part.route_queries(placement, make_pyramid(cells, values))


def too_few_levels(part: SpacePartition, cells: Tensor, values: Tensor, is_odd: bool) -> None:
    placement = QueryPlacement(
        torch.ones(3, 2), torch.tensor([0, 3]), torch.zeros(3 - is_odd).long()
    )
    part.route_queries(placement, make_pyramid(cells, values))


def other_windows(part: SpacePartition, cells: Tensor, values: Tensor, is_odd: bool) -> None:
    shard_attention(make_block(neighborhood_sizes=(3, 3 + 2 * is_odd)), part.group)


def other_dropout(part: SpacePartition, cells: Tensor, values: Tensor, is_odd: bool) -> None:
    shard_attention(make_block(dropout=0.5 * is_odd, attention_dropout=0.0), part.group)


def other_modules(part: SpacePartition, cells: Tensor, values: Tensor, is_odd: bool) -> None:
    layers = [make_block() for _ in range(1 + is_odd)]
    shard_attention(torch.nn.ModuleList(layers), part.group)


def no_attention(part: SpacePartition, cells: Tensor, values: Tensor, is_odd: bool) -> None:
    shard_attention(torch.nn.Linear(2, 2) if is_odd else make_block(), part.group)


def make_plan(part: SpacePartition, pyramid: FeaturePyramid) -> None:
    placement = pyramid.positions(), pyramid.batch_offsets()
    plan_sharded(*placement, pyramid, (3, 3), group=part.group)


Call = Callable[[SpacePartition, Tensor, Tensor, bool], None]


def refused(group: ProcessGroup, call: Call) -> str:
    cells, values = own_points(group)
    part = partition_space(cells, SHAPE, group)
    with pytest.raises(ValueError, match="expected") as caught:
        call(part, cells, values, dist.get_rank(group) == 1)
    dist.barrier(group)  # the group is in step
    return str(caught.value)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (different_rows, "rows"),
        (more_rows, "rows"),
        (gradients_of_some, "requires_grad"),
        (constants_in_a_plan, "requires_grad"),
        (no_points_and_no_gradient, "requires_grad"),
        (without_grad_mode, "requires_grad"),
        (other_widths, "pyramid.values"),
        (gathered_dtypes, "pyramid.values"),
        (other_positions, "placement.positions"),
        (too_few_levels, "placement.levels"),
        (other_windows, "module"),
        (other_dropout, "module"),
        (other_modules, "modules"),
        (no_attention, "module"),
    ],
)
def test_ranks_that_do_not_fit_each_other_are_refused(
    call: Call, word: str, cluster: Cluster
) -> None:
    messages = cluster.run(3, refused, call)
    assert len(set(messages)) == 1
    assert word in messages[0]
    assert "rank 1" in messages[0]


def coordinates_of_some_in_int32(group: ProcessGroup) -> None:
    cells, values = own_points(group)
    part = partition_space(cells, SHAPE, group)
    pyramid = make_pyramid(*part.scatter(cells, values))
    rank = dist.get_rank(group)
    if rank:
        narrow = pyramid.coordinates.int()
        shapes = pyramid.level_shapes
        pyramid = FeaturePyramid(pyramid.values, narrow, shapes, 1, strides=pyramid.strides)
    plan = shard_attention(make_block(), group).make_encoder_plan(pyramid)
    assert isinstance(plan, ShardedPlan)
    assert torch.equal(plan.coordinates[: len(pyramid)], pyramid.coordinates.long())
    everything = part.gather(pyramid).coordinates
    whole = [torch.empty_like(everything) for _ in range(2)]
    dist.all_gather(whole, everything, group=group)
    assert torch.equal(whole[0], whole[1])


def test_ranks_may_differ_in_the_dtype_of_coordinates(cluster: Cluster) -> None:
    cluster.run(2, coordinates_of_some_in_int32)


# ------------------------------------------------------------------- ranks that are lost


def train_until(group: ProcessGroup, end: Callable[[], None], moment: str) -> None:
    """Rank 1 ends at a moment of a training step. The other one does not wait long for it."""
    cells, values = own_points(group)
    block = shard_attention(make_block(), group)
    part = partition_space(cells, SHAPE, group)
    pyramid = make_pyramid(*part.scatter(cells, values.requires_grad_()))
    is_last, started = dist.get_rank(group) == 1, time.monotonic()
    if is_last and moment == "plan":
        end()
    plan = block.make_encoder_plan(pyramid)
    if is_last and moment == "forward":
        end()
    out = block.encode(pyramid, plan)
    if is_last and moment == "backward":
        end()
    try:
        out.values.sum().backward()
    finally:
        if not is_last:
            assert time.monotonic() - started < 3 * TIMEOUT


def die() -> None:
    os._exit(1)


def hang() -> None:
    time.sleep(TIMEOUT + 1.5)  # longer than the others wait
    raise RuntimeError("came back")


def ready(group: ProcessGroup) -> None:
    dist.barrier(group)


def errors_of(ranks: Cluster, end: Callable[[], None], moment: str) -> tuple[dict[int, str], float]:
    """Those of ranks of which one ends at a moment, and the seconds until all of them are known."""
    started = time.monotonic()
    with pytest.raises(RanksFailedError) as caught:
        ranks.run(2, train_until, end, moment)
    return caught.value.errors, time.monotonic() - started


@pytest.mark.parametrize(
    ("end", "moments"),
    [
        (die, ["plan"]),
        (die, ["forward"]),
        (die, ["backward"]),
        (hang, ["plan", "forward"]),  # at the same time, since they wait
    ],
    ids=["dies in plan", "dies in forward", "dies in backward", "hangs in plan, forward"],
)
def test_a_rank_that_is_lost_ends_the_others(end: Callable[[], None], moments: list[str]) -> None:
    clusters = [Cluster(2, timedelta(seconds=TIMEOUT)) for _ in moments]
    try:
        for ranks in clusters:
            ranks.run(2, ready)
        with ThreadPool(len(moments)) as threads:
            tasks = [(ranks, end, x) for ranks, x in zip(clusters, moments, strict=True)]
            found = threads.starmap(errors_of, tasks)
    finally:
        for ranks in clusters:
            ranks.stop()
    for moment, (errors, seconds) in zip(moments, found, strict=True):
        assert seconds < 4 * TIMEOUT, moment
        assert {die: "died", hang: "came back"}[end] in errors[1], moment
        assert errors[0].startswith("RuntimeError"), moment
        if moment == "plan":
            assert "plan_sharded" in errors[0]
