"""Parts of space, and rows that travel to their owners and back."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.cluster import Cluster
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from vicinal import FeaturePyramid, QueryPlacement
from vicinal.distributed import Halo, SpacePartition, partition_space, plan_sharded

SHAPE = (70, 50)


def raw_points(n: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Image and cell of points, many to a cell, and their values."""
    generator = torch.Generator().manual_seed(seed)
    cells = [torch.randint(0, size, (n, 1), generator=generator) for size in (2, *SHAPE)]
    cells[1] = cells[1] ** 2 // SHAPE[0]  # denser at one end
    return torch.cat(cells, 1), torch.randn(n, 3, generator=generator, dtype=torch.float64)


def share(group: ProcessGroup, *tensors: Tensor) -> list[Tensor]:
    """This rank's rows, of shares of unequal size."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    edges = [len(tensors[0]) * r * r // n_ranks**2 for r in range(n_ranks + 1)]
    return [x[edges[rank] : edges[rank + 1]] for x in tensors]


def parts(
    group: ProcessGroup, options: dict[str, Any], n: int = 600
) -> tuple[list[Any], list[int]]:
    """The boxes, and how many points each has."""
    coordinates, _ = raw_points(n)
    own = share(group, coordinates)[0]
    if "weights" in options:
        options = {"weights": options["weights"](own)}
    part = partition_space(own, SHAPE, group, **options)
    counts = part.owners(coordinates[:, 1:]).bincount(minlength=len(part.boxes))
    return part.boxes.tolist(), counts.tolist()


def heavier_to_the_right(coordinates: Tensor) -> Tensor:
    return 0.1 + coordinates[:, 2].double()


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4])
def test_parts_are_aligned_boxes_that_tile_the_grid(n_ranks: int, cluster: Cluster) -> None:
    (boxes, counts), *others = cluster.run(n_ranks, parts, {})
    assert all(other == (boxes, counts) for other in others)
    edges = torch.tensor(boxes)
    assert ((edges % 8 == 0) | (edges == torch.tensor(SHAPE))).all()
    assert (edges[:, 1] - edges[:, 0]).prod(1).sum() == SHAPE[0] * SHAPE[1]
    assert sum(counts) == 600
    assert max(counts) < 1.5 * 600 / n_ranks


def test_weights_move_the_cuts(cluster: Cluster) -> None:
    (plain, _), _ = cluster.run(2, parts, {"align": (70, 1)})
    (boxes, _), _ = cluster.run(2, weighted_parts)
    assert boxes[0][1][1] > plain[0][1][1] + 5


def weighted_parts(group: ProcessGroup) -> tuple[list[Any], float]:
    coordinates, _ = raw_points()
    own = share(group, coordinates)[0]
    weights = heavier_to_the_right(own)
    part = partition_space(own, SHAPE, group, align=(70, 1), weights=weights)
    owners = part.owners(coordinates[:, 1:])
    costs = torch.zeros(2, dtype=torch.float64)
    costs.index_add_(0, owners, heavier_to_the_right(coordinates))
    assert costs.max() < 1.1 * costs.mean()
    return part.boxes.tolist(), float(costs.max())


def test_a_scene_without_points_is_divided(cluster: Cluster) -> None:
    (boxes, _), *_ = cluster.run(4, parts, {}, 0)
    edges = torch.tensor(boxes)
    assert (edges[:, 1] - edges[:, 0]).prod(1).sum() == SHAPE[0] * SHAPE[1]


def test_more_ranks_than_blocks(cluster: Cluster) -> None:
    (boxes, counts), *_ = cluster.run(4, parts, {"align": 70})
    assert sorted(counts) == [0, 0, 0, 600]
    assert sum(low == [0, 0] and high == list(SHAPE) for low, high in boxes) == 1


def pooled(group: ProcessGroup, periodic_axes: tuple[int, ...]) -> None:
    coordinates, values = raw_points()
    values = values.float().requires_grad_()
    shape = (64, 48) if periodic_axes else SHAPE
    coordinates = coordinates.minimum(torch.tensor([1, *shape]) - torch.tensor([0, 1, 1]))
    options: dict[str, Any] = {"periodic_axes": periodic_axes}
    one = FeaturePyramid.from_points(coordinates, values, shape, 2, **options)
    one.values.square().sum().backward()
    own = share(group, coordinates, values.detach())
    own[1].requires_grad_()
    part = partition_space(own[0], shape, group)
    scattered, rows = part.scatter(*own)
    pyramid = FeaturePyramid.from_points(scattered, rows, shape, 2, **options)
    everything = part.gather(pyramid)
    assert torch.equal(everything.coordinates, one.coordinates)
    assert torch.equal(everything.values, one.values)
    assert everything.strides == one.strides
    (everything.values.square().sum() / dist.get_world_size(group)).backward()
    assert values.grad is not None
    torch.testing.assert_close(own[1].grad, share(group, values.grad)[0])


@pytest.mark.parametrize("periodic_axes", [(), (0,)])
def test_pooling_of_parts_has_the_bits_of_one_process(
    periodic_axes: tuple[int, ...], cluster: Cluster
) -> None:
    cluster.run(3, pooled, periodic_axes)


def divided(group: ProcessGroup) -> str:
    coordinates, values = raw_points()
    part = partition_space(share(group, coordinates)[0], SHAPE, group, align=3)
    cells, rows = part.scatter(*share(group, coordinates, values))
    pyramid = FeaturePyramid.from_points(cells, rows, SHAPE, 2)
    positions, offsets = pyramid.positions(), pyramid.batch_offsets()
    with pytest.raises(ValueError, match="strides") as caught:
        plan_sharded(positions, offsets, pyramid, (3, 5, 7, 9), group=group)
    return str(caught.value)


def test_cuts_through_cells_are_refused_by_all(cluster: Cluster) -> None:
    messages = cluster.run(3, divided)
    assert len(set(messages)) == 1


def other_dtypes(group: ProcessGroup, dtype: torch.dtype) -> None:
    coordinates, _ = share(group, *raw_points(20))
    part = partition_space(coordinates, SHAPE, group)
    rows = torch.arange(len(coordinates))
    for size in ((), (3,), (2, 2)):

        def wide(x: Tensor, size: tuple[int, ...] = size) -> Tensor:
            return x.to(dtype).view(-1, *(1 for _ in size)).expand(-1, *size)

        route = part.route(coordinates, wide(rows))
        moved = route.scatter(wide(rows))
        assert torch.equal(moved, wide(route.scatter(rows)))
        assert torch.equal(route.gather(moved), wide(rows))
    # Along with a rank that has none.
    few = coordinates[: dist.get_rank(group)]
    assert sum(part.scatter(few, few[:, 0].to(dtype))[1].shape) <= 3
    halo = Halo(torch.arange(0), (0, 0, 0), (0, 0, 0), group)
    assert halo.extend(coordinates[:, 0].to(dtype)).shape == coordinates.shape[:1]


@pytest.mark.parametrize(
    "dtype", [torch.int16, torch.int8, torch.bool, torch.uint8, torch.complex64, torch.float16]
)
def test_rows_of_any_dtype_travel(dtype: torch.dtype, cluster: Cluster) -> None:
    cluster.run(3, other_dtypes, dtype)


def gathered_twice(group: ProcessGroup) -> None:
    """Derivatives of the sum over ranks of a loss that each computes of all points."""
    cells, _ = share(group, *raw_points(40))
    part = partition_space(cells, SHAPE, group)
    (cells,) = part.scatter(cells)
    pyramid = FeaturePyramid.from_points(cells, torch.ones(len(cells), 3), SHAPE, 2, strides=1)
    values = torch.rand(len(pyramid), 3, dtype=torch.float64, requires_grad=True)
    everything = part.gather(pyramid.with_values(values))
    n_ranks = dist.get_world_size(group)
    (first,) = torch.autograd.grad((everything.values**3).sum(), values, create_graph=True)
    torch.testing.assert_close(first.detach(), 3 * n_ranks * values.detach() ** 2)
    (second,) = torch.autograd.grad(first.sum(), values)
    torch.testing.assert_close(second, 6 * n_ranks * values.detach())


def test_gathering_is_twice_differentiable(cluster: Cluster) -> None:
    cluster.run(2, gathered_twice)


def routed(group: ProcessGroup) -> None:
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    generator = torch.Generator().manual_seed(rank)
    counts = [7, 0, 5] if rank else [0, 0, 0]  # rank 0 has no queries
    positions = torch.rand(sum(counts), 2, generator=generator) * 40 - 4  # some beyond the map
    offsets = torch.tensor([0, *counts]).cumsum(0)
    levels = torch.randint(0, 2, (sum(counts),), generator=generator).short()
    coordinates, values = raw_points()
    pyramid = FeaturePyramid.from_points(coordinates, values, SHAPE, 3, strides=(2, 4))
    part = partition_space(share(group, coordinates)[0], SHAPE, group)
    route = part.route_queries(QueryPlacement(positions, offsets, levels), pyramid)
    own = route.placement
    assert own is not None
    assert own.levels is not None
    cells = (own.positions * 2).floor().long().clamp(torch.tensor(0), torch.tensor(SHAPE) - 1)
    assert (part.owners(cells) == rank).all()
    assert len(own.offsets) == 4
    assert int(own.offsets[-1]) == len(own.positions) == len(own.levels)
    back = route.gather(torch.cat((own.positions, own.levels[:, None]), 1))
    assert torch.equal(back, torch.cat((positions, levels[:, None]), 1))
    images = torch.arange(3).repeat_interleave(torch.tensor(counts))
    assert torch.equal(route.scatter(images), torch.arange(3).repeat_interleave(own.offsets.diff()))
    x = torch.randn(len(positions), 4, dtype=torch.float64, requires_grad=True)
    route.gather(route.scatter(x) ** 2).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * x.detach())
    total = torch.tensor(float(len(own.positions)))
    dist.all_reduce(total, group=group)
    assert total == 12 * (n_ranks - 1)


def test_queries_travel_to_their_owners_and_back(cluster: Cluster) -> None:
    cluster.run(3, routed)


def refused(group: ProcessGroup, what: str) -> str:
    rank = dist.get_rank(group)
    coordinates, values = share(group, *raw_points())
    with pytest.raises(ValueError, match="expected") as caught:
        _call_wrongly(group, what if rank == 1 else "", coordinates, values)
    dist.barrier(group)
    return str(caught.value)


def _call_wrongly(group: ProcessGroup, what: str, coordinates: Tensor, values: Tensor) -> None:
    options: dict[str, Any] = {}
    if what == "outside":
        coordinates = coordinates.clone()
        coordinates[0, 1] = 70
    elif what == "weights":
        options["weights"] = torch.ones(len(coordinates))
    elif what == "align":
        options["align"] = 0
    elif what == "meta":
        coordinates = coordinates.to("meta")
    shape = (70, 60) if what == "spatial_shape" else SHAPE
    part = partition_space(coordinates, shape, group, **options)
    if what == "dtype":
        values = values.float()
    part.scatter(coordinates, values[:-1] if what == "rows" else values)


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("outside", "coordinates"),
        ("weights", "weights"),
        ("align", "align"),
        ("meta", "coordinates"),
        ("spatial_shape", "spatial_shape"),
        ("dtype", "rows"),
        ("rows", "rows"),
    ],
)
def test_all_ranks_refuse_what_one_has_wrong(what: str, word: str, cluster: Cluster) -> None:
    messages = cluster.run(3, refused, what)
    assert len(set(messages)) == 1
    assert word in messages[0]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_weights_are_finite_and_not_negative(value: float, cluster: Cluster) -> None:
    cluster.run(2, wrong_weight, value)


def wrong_weight(group: ProcessGroup, value: float) -> None:
    coordinates = share(group, raw_points()[0])[0]
    weights = torch.ones(len(coordinates))
    weights[-1:] = value
    with pytest.raises(ValueError, match="weights"):
        partition_space(coordinates, SHAPE, group, weights=weights)


def from_numpy(group: ProcessGroup) -> None:
    coordinates, values = share(group, *raw_points(50))
    arrays: list[Any] = [coordinates.numpy(), values.numpy()]
    part = partition_space(arrays[0], SHAPE, group)
    of_arrays = part.scatter(*arrays)
    for own, expected in zip(of_arrays, part.scatter(coordinates, values), strict=True):
        assert torch.equal(own, expected)


def test_arrays_travel(cluster: Cluster) -> None:
    cluster.run(2, from_numpy)


@pytest.mark.parametrize("shape", [(2**70, 24), (2**40, 24)])
def test_grids_of_too_many_blocks_are_refused(shape: tuple[int, ...], cluster: Cluster) -> None:
    cluster.run(2, too_large, shape)


def too_large(group: ProcessGroup, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="spatial_shape"):
        partition_space(torch.zeros(3, 3, dtype=torch.int64), shape, group)


def different_maps(group: ProcessGroup) -> None:
    cells = torch.tensor([[0, 8, 3, 0]])
    other: dict[str, Any] = {"strides": (2,)} if dist.get_rank(group) else {"periodic_axes": (0,)}
    pyramid = FeaturePyramid(torch.ones(1, 1), cells, ((16, 12),), 1, **other)
    part = SpacePartition([[[0, 0], [16, 24]], [[16, 0], [32, 24]]], group)
    placement = QueryPlacement(torch.tensor([[9.0, 3.0]]), torch.tensor([0, 1]))
    for call in (lambda: part.gather(pyramid), lambda: part.route_queries(placement, pyramid)):
        with pytest.raises(ValueError, match="periodic_axes"):
            call()


def test_pyramids_on_different_maps_are_refused(cluster: Cluster) -> None:
    cluster.run(2, different_maps)


def wrong_boxes(group: ProcessGroup, boxes: Any) -> str:
    with pytest.raises(ValueError, match="boxes: expected") as caught:
        SpacePartition(boxes, group).owners(torch.tensor([[9, 9]]))
    return str(caught.value)


@pytest.mark.parametrize(
    "boxes",
    [
        [[[0, 0], [8, 8]]],
        [[[0, 0], [8, 8]], [[7, 0], [9, 8]]],
        [[[0, 0], [0, 0]], [[3, 3], [3, 3]]],
        [[[0, 0], [4, 10]], [[5, 10], [10, 11]]],
        [[0, 1], [1, 2]],
        "two",
        None,
        {},
        torch.zeros(2, 2, 0, dtype=torch.int64),
    ],
)
def test_boxes_that_are_no_partition_are_refused(boxes: Any, cluster: Cluster) -> None:
    cluster.run(2, wrong_boxes, boxes)


def meshes(group: ProcessGroup) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "space"))
    coordinates, _ = raw_points()
    with pytest.raises(ValueError, match="mesh"):
        partition_space(coordinates, SHAPE, mesh)
    part = partition_space(coordinates, SHAPE, mesh["space"])
    assert len(part.boxes) == 2
    assert f"of rank {mesh['space'].get_local_rank()}" in repr(part)


def test_a_mesh_of_one_dimension_is_a_group(cluster: Cluster) -> None:
    cluster.run(4, meshes)


def test_without_ranks_there_is_no_group() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        partition_space(raw_points()[0], SHAPE)
