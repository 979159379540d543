"""Modules whose attention spans the ranks against the same modules in one process."""

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.cluster import Cluster
from distributed.shares import own_share
from problems import assert_close
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vicinal import (
    FeaturePyramid,
    NeighborhoodPlan,
    QueryPlacement,
    SparseDeformableAttention,
    SparseNeighborhoodAttentionBlock,
)
from vicinal.detr import Encoder, EncoderLayer, FeedForward
from vicinal.distributed import (
    ShardedPlan,
    SpacePartition,
    partition_space,
    shard_attention,
    sum_gradients,
)

SHAPE = (80, 72)


class OwnBlock(SparseNeighborhoodAttentionBlock):
    """A block of a user."""

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return 2 * super().forward(*arguments, **options)


def make_encoder(block: type[SparseNeighborhoodAttentionBlock], **options: Any) -> nn.ModuleList:
    torch.manual_seed(1)
    return nn.ModuleList([block(16, 2, **options) for _ in range(3)]).double()


def run_encoder(
    layers: nn.ModuleList, pyramid: FeaturePyramid, background: Tensor | None
) -> FeaturePyramid:
    first = layers[0]
    assert isinstance(first, SparseNeighborhoodAttentionBlock)
    plan = first.make_encoder_plan(pyramid)
    for layer in layers:
        assert isinstance(layer, SparseNeighborhoodAttentionBlock)
        pyramid = layer.encode(pyramid, plan, background)
    return pyramid


def raw_points(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    cells = [torch.randint(0, size, (n, 1), generator=generator) for size in (2, *SHAPE)]
    return torch.cat(cells, 1), torch.randn(n, 16, generator=generator, dtype=torch.float64)


def encode(
    group: ProcessGroup,
    block: type[SparseNeighborhoodAttentionBlock],
    options: dict[str, Any],
    periodic_axes: tuple[int, ...],
    with_background: bool,
    n: int = 900,
    interior_first: bool = False,
) -> None:
    """Compares output and all gradients of three layers with those of one process."""
    coordinates, values = raw_points(n)
    values.requires_grad_()
    background = torch.randn(2, 4, 16, dtype=torch.float64) if with_background else None
    own_background = None if background is None else background.clone().requires_grad_()
    if background is not None:
        background.requires_grad_()
    one = make_encoder(block, **options)
    whole = FeaturePyramid.from_points(coordinates, values, SHAPE, 2, periodic_axes=periodic_axes)
    torch.manual_seed(5)
    expected = run_encoder(one, whole, background)
    weights = torch.randn_like(expected.values)
    (expected.values * weights).sum().backward()

    layers = make_encoder(block, **options)
    layers = shard_attention(layers, group, interior_first=interior_first)
    assert list(layers.state_dict()) == list(one.state_dict())
    own_values = own_share(group, values.detach()).clone().requires_grad_()
    own_coordinates = own_share(group, coordinates)
    part = partition_space(own_coordinates, SHAPE, group)
    cells, rows = part.scatter(own_coordinates, own_values)
    pyramid = FeaturePyramid.from_points(cells, rows, SHAPE, 2, periodic_axes=periodic_axes)
    torch.manual_seed(5)
    everything = part.gather(run_encoder(layers, pyramid, own_background))
    assert_close(everything.values, expected.values, 1e-12)
    ((everything.values * weights).sum() / dist.get_world_size(group)).backward()
    assert values.grad is not None
    assert own_values.grad is not None
    assert_close(own_values.grad, own_share(group, values.grad), 1e-12)
    leaves = list(zip(layers.parameters(), one.parameters(), strict=True))
    if own_background is not None and background is not None:
        leaves.append((own_background, background))  # type: ignore[arg-type]
    sum_gradients([own for own, _ in leaves], group)
    for own, other in leaves:
        assert own.grad is not None
        assert other.grad is not None
        assert_close(own.grad, other.grad, 1e-12 * max(1.0, float(other.grad.abs().max())))


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
def test_an_encoder_is_that_of_one_process(n_ranks: int, cluster: Cluster) -> None:
    cluster.run(n_ranks, encode, SparseNeighborhoodAttentionBlock, {}, (), False)


@pytest.mark.parametrize(
    "options",
    [
        {"relative_bias": True, "bias": True},
        {"norm_first": False, "rope_freq_group_pattern": "closure", "embed_dim": 16},
        {"rotary": False},
    ],
)
def test_with_options_and_background(options: dict[str, Any], cluster: Cluster) -> None:
    options = {**options, "rope_enforce_freq_groups_equal": False}
    options.pop("embed_dim", None)
    cluster.run(3, encode, SparseNeighborhoodAttentionBlock, options, (), True)


@pytest.mark.parametrize("periodic_axes", [(), (0,)])
def test_dropout_has_the_mask_of_one_process(
    periodic_axes: tuple[int, ...], cluster: Cluster
) -> None:
    options = {"dropout": 0.3}
    cluster.run(3, encode, SparseNeighborhoodAttentionBlock, options, periodic_axes, True)


def encode_with_feed_forward(
    group: ProcessGroup, attention: type[nn.Module], dropout: float, feed_forward_dropout: float
) -> None:
    """Compares a whole encoder in training with that of one process, with the same seed."""

    def make() -> Encoder:
        torch.manual_seed(1)
        layers = [
            EncoderLayer(
                attention(16, 2, dropout=dropout), FeedForward(16, None, feed_forward_dropout)
            )
            for _ in range(2)
        ]
        return Encoder(layers, 16).double()

    coordinates, values = raw_points(500)
    one, sharded = make(), shard_attention(make(), group)
    whole = FeaturePyramid.from_points(coordinates, values, SHAPE, 2)
    torch.manual_seed(5)
    expected = one(whole)
    part = partition_space(own_share(group, coordinates), SHAPE, group)
    cells, rows = part.scatter(own_share(group, coordinates), own_share(group, values))
    torch.manual_seed(5)
    own = sharded(FeaturePyramid.from_points(cells, rows, SHAPE, 2))
    everything = part.gather(own)
    assert_close(everything.values, expected.values, 1e-12)
    one.eval()
    assert (one(whole).values - expected.values).abs().max() > 0.1


@pytest.mark.parametrize("rates", [(0.2, 0.3), (0.0, 0.3)])
@pytest.mark.parametrize("attention", [SparseNeighborhoodAttentionBlock, SparseDeformableAttention])
def test_an_encoder_drops_what_one_process_drops(
    attention: type[nn.Module], rates: tuple[float, float], cluster: Cluster
) -> None:
    cluster.run(3, encode_with_feed_forward, attention, *rates)


@pytest.mark.parametrize(
    ("rotary_values", "interior_first"), [(False, False), (True, False), (True, True)]
)
def test_along_periodic_axes(rotary_values: bool, interior_first: bool, cluster: Cluster) -> None:
    block, options = SparseNeighborhoodAttentionBlock, {"rotary_values": rotary_values}
    background = not rotary_values  # which take none
    cluster.run(3, encode, block, options, (0, 1), background, 900, interior_first)


def test_ranks_without_points(cluster: Cluster) -> None:
    cluster.run(4, encode, SparseNeighborhoodAttentionBlock, {}, (), True, 2)


@pytest.mark.parametrize(
    ("n_ranks", "options", "periodic_axes", "n"),
    [
        (2, {}, (), 900),
        (3, {"dropout": 0.3, "relative_bias": True}, (), 900),
        (3, {"dropout": 0.3}, (0, 1), 500),
        (3, {"norm_first": False, "neighborhood_sizes": (3, 3, 3, 3)}, (0,), 900),
        (4, {"attention_dropout": 0.3}, (), 2),
    ],
)
def test_interior_queries_first(
    n_ranks: int,
    options: dict[str, Any],
    periodic_axes: tuple[int, ...],
    n: int,
    cluster: Cluster,
) -> None:
    block = SparseNeighborhoodAttentionBlock
    cluster.run(n_ranks, encode, block, options, periodic_axes, True, n, True)


def interior_bits(group: ProcessGroup) -> None:
    """Interior queries first change no bit, of results and of gradients of queries."""
    coordinates, values = raw_points(900)
    part = partition_space(own_share(group, coordinates), SHAPE, group)
    cells, rows = part.scatter(own_share(group, coordinates), own_share(group, values))
    own = FeaturePyramid.from_points(cells, rows.float(), SHAPE, 2)
    found = []
    for first in (False, True):
        torch.manual_seed(1)
        block = SparseNeighborhoodAttentionBlock(16, 2, neighborhood_sizes=(3, 3, 3, 3))
        shard_attention(block, group, interior_first=first)
        query = own.values.clone().requires_grad_()
        plan = block.make_encoder_plan(own)
        out = block(query, own.positions(), own.batch_offsets(), own, plan=plan,
                    query_level_indices=own.levels)  # fmt: skip
        (out * torch.linspace(-1, 1, 16)).sum().backward()
        assert query.grad is not None
        found.append((out.detach(), query.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert isinstance(plan, ShardedPlan)
    queries = plan.pairs()[plan.pairs()[:, 1] >= plan.n_own_points, 0].unique()
    assert 20 < len(queries) < len(own) - 20  # both parts have been in use


def test_interior_queries_first_change_no_bit(cluster: Cluster) -> None:
    cluster.run(2, interior_bits)


def test_a_subclass_keeps_its_methods(cluster: Cluster) -> None:
    cluster.run(2, encode, OwnBlock, {}, (), False)


def decode(group: ProcessGroup) -> None:
    """Object queries anywhere on any rank, on the points of all."""
    coordinates, values = raw_points(700)
    generator = torch.Generator().manual_seed(4)
    positions = torch.rand(50, 2, generator=generator, dtype=torch.float64) * 60 - 5
    query = torch.randn(50, 16, generator=generator, dtype=torch.float64)
    offsets = torch.tensor([0, 20, 50])
    torch.manual_seed(1)
    block = SparseNeighborhoodAttentionBlock(16, 2).double()
    whole = FeaturePyramid.from_points(coordinates, values, SHAPE, 2)
    expected = block(query, positions, offsets, whole)

    shard_attention(block, group)
    chosen = own_share(group, torch.arange(50))
    images = (chosen >= 20).long()
    own_offsets = torch.nn.functional.pad(images.bincount(minlength=2).cumsum(0), (1, 0))
    own_coordinates = own_share(group, coordinates)
    part = partition_space(own_coordinates, SHAPE, group)
    cells, values = part.scatter(own_coordinates, own_share(group, values))
    pyramid = FeaturePyramid.from_points(cells, values, SHAPE, 2)
    route = part.route_queries(QueryPlacement(positions[chosen], own_offsets), pyramid)
    assert route.placement is not None
    arguments = route.placement.arguments()
    out = block(route.scatter(query[chosen]), **arguments, stacked_feature_maps=pyramid)
    assert_close(route.gather(out), expected[chosen], 1e-12)
    rows = torch.tensor([0]) if len(route.sorting) else torch.tensor([], dtype=torch.int64)
    weights = block.attention_weights(
        route.scatter(query[chosen]), **arguments, stacked_feature_maps=pyramid, queries=rows
    )
    filled = weights.offsets.diff() > 0
    sums = torch.zeros(len(rows), 2, dtype=torch.float64)
    sums.index_add_(0, torch.arange(len(rows)).repeat_interleave(weights.offsets.diff()),
                    weights.weights)  # fmt: skip
    assert_close(sums[filled], torch.ones_like(sums[filled]), 1e-12)


def test_object_queries_attend_to_the_points_of_all_ranks(cluster: Cluster) -> None:
    cluster.run(3, decode)


def weigh(group: ProcessGroup) -> None:
    """Every query of every rank gives each point, by its cell, the weight of one process."""
    coordinates, values = raw_points(500)
    whole = FeaturePyramid.from_points(coordinates, values, SHAPE, 2)
    torch.manual_seed(1)
    block = SparseNeighborhoodAttentionBlock(16, 2).double()

    def weights_by_cells(
        pyramid: FeaturePyramid, plan: NeighborhoodPlan, known: Tensor
    ) -> dict[tuple[int, ...], Tensor]:
        """The weights of each pair, by coordinates of the query and of the point."""
        found = block.attention_weights(
            pyramid.values, pyramid.positions(torch.float64), pyramid.batch_offsets(), pyramid,
            query_level_indices=pyramid.levels, plan=plan,
        )  # fmt: skip
        queries = pyramid.coordinates.repeat_interleave(found.offsets.diff(), 0)
        pairs = torch.cat((queries, known[found.points]), 1).tolist()
        return dict(zip(map(tuple, pairs), found.weights, strict=True))

    expected = weights_by_cells(whole, block.make_encoder_plan(whole), whole.coordinates)
    shard_attention(block, group)
    own_coordinates = own_share(group, coordinates)
    part = partition_space(own_coordinates, SHAPE, group)
    cells, own_values = part.scatter(own_coordinates, own_share(group, values))
    own = FeaturePyramid.from_points(cells, own_values, SHAPE, 2)
    plan = block.make_encoder_plan(own)
    assert isinstance(plan, ShardedPlan)
    actual = weights_by_cells(own, plan, plan.coordinates)
    own_queries = set(map(tuple, own.coordinates.tolist()))
    assert actual.keys() == {pair for pair in expected if pair[:4] in own_queries}
    of_one = torch.stack([expected[pair] for pair in actual])
    assert_close(torch.stack(list(actual.values())), of_one, 1e-12)


def test_weights_are_those_of_one_process_point_by_point(cluster: Cluster) -> None:
    cluster.run(3, weigh)


def copies(group: ProcessGroup) -> None:
    layer = EncoderLayer(SparseNeighborhoodAttentionBlock(16, 2), FeedForward(16))
    encoder = shard_attention(Encoder([layer], 16).double(), group)
    coordinates, values = raw_points(100)
    boxes = [[[0, 0], [32, 72]], [[32, 0], [80, 72]]]
    part = SpacePartition(boxes, group)
    cells, rows = part.scatter(own_share(group, coordinates), own_share(group, values))
    pyramid = FeaturePyramid.from_points(cells, rows, SHAPE, 2)
    clone = copy.deepcopy(encoder)
    assert torch.equal(clone(pyramid).values, encoder(pyramid).values)


def other_groups(group: ProcessGroup) -> None:
    rank = dist.get_rank(group)
    alone = dist.new_group([rank], use_local_synchronization=True)
    blocks = [
        shard_attention(SparseNeighborhoodAttentionBlock(16, 2), ranks) for ranks in (group, alone)
    ]
    coordinates, values = (own_share(group, x) for x in raw_points(100))
    pyramid = FeaturePyramid.from_points(coordinates, values.float(), SHAPE, 2, strides=8)
    pyramid = FeaturePyramid(pyramid.values, pyramid.coordinates, pyramid.level_shapes * 4, 2)
    plan = blocks[1].make_encoder_plan(pyramid)
    with pytest.raises(ValueError, match="plan: expected a plan of the ranks"):
        blocks[0].encode(pyramid, plan)
    assert copy.deepcopy(plan).counts().equal(plan.counts())
    frozen = SparseNeighborhoodAttentionBlock(16, 2).requires_grad_(rank == 0)
    with pytest.raises(ValueError, match="module"):
        shard_attention(frozen, group)


def test_plans_of_other_ranks_and_unlike_modules_are_refused(cluster: Cluster) -> None:
    cluster.run(2, other_groups)


def test_copies_share_the_group(cluster: Cluster) -> None:
    cluster.run(2, copies)


def refusals(group: ProcessGroup) -> None:
    with pytest.raises(ValueError, match="module"):
        shard_attention(nn.Linear(2, 2), group)
    block = shard_attention(SparseNeighborhoodAttentionBlock(16, 2), group)
    with pytest.raises(ValueError, match="interior_first"):
        shard_attention(SparseNeighborhoodAttentionBlock(16, 2), group, interior_first=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sharded"):
        shard_attention(nn.ModuleList([block]), group)
    coordinates, values = raw_points(100)
    pyramid = FeaturePyramid.from_points(coordinates, values.float(), SHAPE, 2)
    plain = SparseNeighborhoodAttentionBlock(16, 2).make_encoder_plan(pyramid)
    with pytest.raises(ValueError, match="plan: expected a ShardedPlan"):
        block.encode(pyramid, plain)
    plan = block.make_encoder_plan(pyramid)
    fewer = FeaturePyramid.from_points(coordinates[:50], values[:50].float(), SHAPE, 2)
    with pytest.raises(ValueError, match="plan"):
        block.encode(fewer, plan)


def sums(group: ProcessGroup) -> None:
    rank = dist.get_rank(group)
    leaves = [torch.ones(2, requires_grad=True), torch.ones(3, 2, requires_grad=True)]
    frozen, wide = torch.ones(5), torch.ones(1, dtype=torch.float64, requires_grad=True)
    (leaves[0] * (rank + 1)).sum().backward()
    if rank:  # the other rank has no gradient
        (leaves[1] * 3 + wide).sum().backward()
    sum_gradients([frozen, *leaves, wide], group)
    assert [x.grad.unique().tolist() for x in leaves if x.grad is not None] == [[3.0], [3.0]]
    assert wide.grad is not None
    assert wide.grad.tolist() == [6.0]
    assert frozen.grad is None
    for wrong in (leaves[0], None, ["weight"]):
        with pytest.raises(ValueError, match="parameters"):
            sum_gradients(wrong, group)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="parameters"):
        sum_gradients(leaves[rank:], group)


def test_gradients_of_ranks_are_summed(cluster: Cluster) -> None:
    cluster.run(2, sums)


def test_wrong_modules_and_plans_are_refused(cluster: Cluster) -> None:
    cluster.run(1, refusals)
