"""How losses of ranks add up to that of one process, as the page on several processes says."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from distributed.cluster import Cluster
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.parallel import DistributedDataParallel

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
from vicinal.detr import Encoder, EncoderLayer, FeedForward
from vicinal.distributed import SpacePartition, partition_space, shard_attention, sum_gradients

SHAPE, WIDTH = (64, 64), 8


def make_encoder() -> Encoder:
    torch.manual_seed(0)
    layers = [
        EncoderLayer(SparseNeighborhoodAttentionBlock(WIDTH, 2), FeedForward(WIDTH))
        for _ in range(2)
    ]
    return Encoder(layers, WIDTH).double()


def sum_of(pyramid: FeaturePyramid) -> Tensor:
    """A loss per point, summed."""
    return (pyramid.values * torch.linspace(1, 2, WIDTH).double()).sin().sum()


@dataclass
class Run:
    """What a rank backpropagates from, and how many ranks and points there are."""

    model: nn.Module
    part: SpacePartition
    own: FeaturePyramid
    n_ranks: int
    n_points: int


def own_rows(run: Run) -> Tensor:
    return sum_of(run.model(run.own)) / run.n_points


def own_rows_times_ranks(run: Run) -> Tensor:
    return run.n_ranks * own_rows(run)


def all_rows(run: Run) -> Tensor:
    return sum_of(run.part.gather(run.model(run.own))) / run.n_points


def all_rows_over_ranks(run: Run) -> Tensor:
    return all_rows(run) / run.n_ranks


def gradients(group: ProcessGroup, loss_of: Callable[[Run], Tensor], is_ddp: bool) -> float:
    """The largest difference of gradients of weights from those of one process."""
    generator = torch.Generator().manual_seed(2)
    points = torch.randint(0, SHAPE[0], (300, 2), generator=generator)
    points = nn.functional.pad(points, (1, 0))
    values = torch.randn(300, WIDTH, generator=generator).double()
    one, encoder = make_encoder(), make_encoder()
    whole = FeaturePyramid.from_points(points, values, SHAPE, 1)
    (sum_of(one(whole)) / len(whole)).backward()

    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    mine = points[rank::n_ranks], values[rank::n_ranks]
    part = partition_space(mine[0], SHAPE, group)
    own_points, own_values = part.scatter(*mine)
    own = FeaturePyramid.from_points(own_points, own_values, SHAPE, 1)
    shard_attention(encoder, group)
    model = DistributedDataParallel(encoder, process_group=group) if is_ddp else encoder
    loss_of(Run(model, part, own, n_ranks, len(whole))).backward()
    if not is_ddp:
        sum_gradients(encoder.parameters(), group)
    pairs = zip(one.parameters(), encoder.parameters(), strict=True)
    return max(float((a.grad - b.grad).abs().max()) for a, b in pairs)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("loss_of", "is_ddp"),
    [
        (own_rows, False),
        (all_rows_over_ranks, False),
        (own_rows_times_ranks, True),
        (all_rows, True),
    ],
)
@pytest.mark.parametrize("n_ranks", [2, 3])
def test_gradients_of_weights_are_those_of_one_process(
    loss_of: Callable[[Run], Tensor], is_ddp: bool, n_ranks: int, cluster: Cluster
) -> None:
    assert max(cluster.run(n_ranks, gradients, loss_of, is_ddp)) < 1e-14
