"""The parts of a detector that owns a part of space on every rank, against one process."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from detr_scenes import CLASSES, EMBED, make_block, make_decoder, make_detector, stir
from distributed.cluster import Cluster
from distributed.shares import own_share
from problems import assert_close
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from vicinal import FeaturePyramid, SparseDeformableAttention, Window
from vicinal.detr import (
    DecoderLayer,
    DenoisingQueryGenerator,
    Detector,
    ObjectQueries,
    PointStem,
    QuerySelection,
    ReferencePoints,
    SetCriterion,
    Targets,
    sum_losses,
)
from vicinal.distributed import SpacePartition, partition_space, shard_attention, sum_gradients

SHAPE = (48, 64)
STRIDES = (2, 4)
ALIGN = 4
CHANNELS = 2


def raw_points(n: int, width: int = CHANNELS) -> tuple[Tensor, Tensor]:
    """Points of two images, some in one cell."""
    generator = torch.Generator().manual_seed(0)
    cells = [torch.randint(0, size, (n, 1), generator=generator) for size in (2, *SHAPE)]
    return torch.cat(cells, 1), torch.randn(n, width, generator=generator, dtype=torch.float64)


def scattered(group: ProcessGroup, coordinates: Tensor, values: Tensor) -> Any:
    """The partition, and the own points: cells and values."""
    own = own_share(group, coordinates)
    part = partition_space(own, SHAPE, group, align=ALIGN)
    return part, *part.scatter(own, own_share(group, values))


def prepared(module: nn.Module) -> Any:
    torch.manual_seed(1)
    stir(module, 0.2)
    return module.double()


def assert_same_gradients(
    group: ProcessGroup, own: nn.Module, one: nn.Module, divisor: int = 1
) -> None:
    """Of the parameters, summed over ranks and divided by ``divisor``."""
    sum_gradients(own.parameters(), group)
    for (name, ours), theirs in zip(own.named_parameters(), one.parameters(), strict=True):
        assert ours.grad is not None
        expected = torch.zeros_like(ours) if theirs.grad is None else theirs.grad
        scale = max(1.0, float(expected.abs().max()))
        assert_close(ours.grad / divisor, expected, 1e-12 * scale, name)


# ---------------------------------------------------------------------------------------- stem


def embed(group: ProcessGroup, options: dict[str, Any], axes: tuple[int, ...], n: int) -> None:
    coordinates, values = raw_points(n)
    values.requires_grad_()
    one = prepared(PointStem(CHANNELS, EMBED, STRIDES, **options))
    own = shard_attention(copy.deepcopy(one), group)
    expected = one(coordinates, values, SHAPE, 2, periodic_axes=axes)
    weights = torch.randn(expected.values.shape, dtype=torch.float64)
    (expected.values * weights).sum().backward()

    own_values = values.detach().clone().requires_grad_()
    part, cells, rows = scattered(group, coordinates, own_values)
    pyramid = own(cells, rows, SHAPE, 2, periodic_axes=axes, keep_point_rows=True)
    assert pyramid.point_rows.shape == (len(cells), len(STRIDES))
    everything = part.gather(pyramid)
    assert torch.equal(everything.coordinates, expected.coordinates)
    assert_close(everything.values, expected.values, 1e-12)
    ((everything.values * weights).sum() / dist.get_world_size(group)).backward()
    sum_gradients([own_values], group)
    assert values.grad is not None
    assert own_values.grad is not None
    assert_close(own_values.grad, values.grad, 1e-12)
    assert_same_gradients(group, own, one)


@pytest.mark.parametrize(
    ("options", "axes"),
    [
        ({}, ()),
        ({"window_sizes": (5, Window(5, shape="ball"))}, (0, 1)),
        ({"window_sizes": (Window(3, dilation=2), (7, 1))}, (1,)),
        ({"window_sizes": (Window((3, 4), causal=(False, True)), 3)}, ()),
        ({"window_sizes": (3, 3, 5), "window_strides": (1, 2, (4, 1))}, ()),
    ],
)
def test_windows_of_a_stem_see_the_points_of_all_ranks(
    options: dict[str, Any], axes: tuple[int, ...], cluster: Cluster
) -> None:
    cluster.run(3, embed, options, axes, 300)


def test_a_stem_on_ranks_without_points(cluster: Cluster) -> None:
    cluster.run(4, embed, {}, (), 2)


def wrong_points(group: ProcessGroup) -> str:
    stem = shard_attention(PointStem(1, 8), group)
    row = torch.tensor([[0, 3 + 90 * dist.get_rank(group), 4]])
    with pytest.raises(ValueError) as error:  # noqa: PT011
        stem(row, torch.ones(1, 1), SHAPE, 1)
    return str(error.value)


def test_all_ranks_refuse_what_the_stem_of_one_refuses(cluster: Cluster) -> None:
    first, second = cluster.run(2, wrong_points)
    assert first == second
    assert "rank 1" in first


# ----------------------------------------------------------------------------------- selection


def pyramids(
    group: ProcessGroup, n: int, decimals: int | None = None, axes: tuple[int, ...] = ()
) -> tuple[FeaturePyramid, FeaturePyramid, Tensor, Tensor, SpacePartition]:
    """That of all points and the own one, the values that they are made of, and the partition."""
    coordinates, values = raw_points(n, EMBED)
    if decimals is not None:
        coordinates = torch.unique(coordinates // 4 * 4, dim=0)  # none are averaged
        values = values[: len(coordinates)].round(decimals=decimals)
    own_values = values.clone().requires_grad_()
    values.requires_grad_()
    options: Any = {"strides": STRIDES, "periodic_axes": axes}
    whole = FeaturePyramid.from_points(coordinates, values, SHAPE, 2, **options)
    part, cells, rows = scattered(group, coordinates, own_values)
    own = FeaturePyramid.from_points(cells, rows, SHAPE, 2, **options)
    return whole, own, values, own_values, part


def assert_same_values_gradients(group: ProcessGroup, own: Tensor, one: Tensor) -> None:
    sum_gradients([own], group)
    assert own.grad is not None
    assert one.grad is not None
    scale = max([1.0, *one.grad.abs().flatten().tolist()])
    assert_close(own.grad, one.grad, 1e-12 * scale)


def select(
    group: ProcessGroup,
    n: int,
    levels: tuple[int, ...] | None,
    tied: bool,
    training: bool = True,
) -> None:
    whole, pyramid, values, own_values, _ = pyramids(group, n, 0 if tied else None)
    one = prepared(QuerySelection(EMBED, CLASSES, 20, levels, n_eval_queries=30)).train(training)
    if tied:  # few distinct scores
        with torch.no_grad():
            one.head.classes.weight.zero_()
            one.head.classes.weight[:, 0] = 1
            whole.values.data.clamp_(-1, 1)
            pyramid.values.data.clamp_(-1, 1)
    own = shard_attention(copy.deepcopy(one), group)
    expected, found = one(whole), own(pyramid)
    for name in ("embeddings", "boxes", "levels", "offsets"):
        ours, theirs = getattr(found.queries, name), getattr(expected.queries, name)
        assert ours.dtype == theirs.dtype
        assert_close(ours, theirs, 1e-12, name)
    is_own = found.chosen >= 0
    boxes = found.candidates.boxes.detach()[found.chosen[is_own]]
    assert torch.equal(found.queries.boxes[is_own], boxes)
    n_own = is_own.sum()
    dist.all_reduce(n_own, group=group)
    assert n_own == len(expected.chosen)
    (expected.queries.embeddings.square().sum() + expected.candidates.logits.sum()).backward()
    share = found.queries.embeddings.square().sum() / dist.get_world_size(group)
    (share + found.candidates.logits.sum()).backward()
    assert_same_values_gradients(group, own_values, values)
    assert_same_gradients(group, own, one)


@pytest.mark.parametrize(
    ("n", "levels", "training"),
    [(400, None, True), (400, (1,), True), (400, None, False), (7, None, True), (0, None, True)],
)
def test_all_ranks_select_the_queries_of_one_process(
    n: int, levels: tuple[int, ...] | None, training: bool, cluster: Cluster
) -> None:
    cluster.run(4, select, n, levels, False, training)


def select_on_other_maps(group: ProcessGroup) -> str:
    sizes = (8, 8 + dist.get_rank(group))
    pyramid = FeaturePyramid(torch.randn(1, EMBED), torch.tensor([[0, 1, 1, 0]]), (sizes,), 1)
    selection = shard_attention(QuerySelection(EMBED, CLASSES, 2), group)
    with pytest.raises(ValueError, match="level_shapes") as error:
        selection(pyramid)
    return str(error.value)


def test_all_ranks_refuse_to_select_on_different_maps(cluster: Cluster) -> None:
    first, second = cluster.run(2, select_on_other_maps)
    assert first == second


def test_of_equal_scores_the_first_cells_are_selected(cluster: Cluster) -> None:
    cluster.run(3, select, 600, None, True)


# ------------------------------------------------------------------------------------- decoder


def make_deformable() -> nn.Module:
    return SparseDeformableAttention(EMBED, 2, len(STRIDES), 3)


def object_queries() -> ObjectQueries:
    generator = torch.Generator().manual_seed(8)
    sizes = torch.tensor([24.0, 32.0], dtype=torch.float64)
    centers = torch.rand(30, 2, generator=generator, dtype=torch.float64) * sizes
    boxes = torch.cat((centers, 1 + torch.rand(30, 2, generator=generator).double()), 1)
    embeddings = torch.randn(30, EMBED, generator=generator, dtype=torch.float64)
    levels = torch.randint(2, (30,), generator=generator)
    return ObjectQueries(embeddings.requires_grad_(), boxes, levels, torch.tensor([0, 18, 30]))


def make_dropping_deformable() -> nn.Module:
    return SparseDeformableAttention(EMBED, 2, len(STRIDES), 3, dropout=0.3)


def decode(
    group: ProcessGroup,
    attention: Callable[[], nn.Module],
    n: int,
    checkpoint: bool,
    dropout: float = 0.0,
    at_sides: bool = False,
) -> None:
    """Dropout is that of one process with the seed of the first rank."""
    whole, pyramid, values, own_values, _ = pyramids(group, n, axes=(1,))
    decoder = make_decoder(attention=attention, checkpoint=checkpoint, dropout=dropout)
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        layer.reference_points = ReferencePoints(EMBED) if at_sides else None
    one = prepared(decoder)
    own = shard_attention(copy.deepcopy(one), group)
    queries, own_queries = object_queries(), object_queries()
    torch.manual_seed(2)
    expected, _ = one(queries, whole)
    torch.manual_seed(2 + dist.get_rank(group))
    found, _ = own(own_queries, pyramid)
    total, share = torch.zeros(()), torch.zeros(())
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours.logits, theirs.logits, 1e-12)
        assert_close(ours.boxes, theirs.boxes, 1e-11)
        total = total + theirs.logits.square().sum() + theirs.boxes.sum()
        share = share + ours.logits.square().sum() + ours.boxes.sum()
    total.backward()
    (share / dist.get_world_size(group)).backward()
    assert_same_gradients(group, own, one)
    assert_same_values_gradients(group, own_queries.embeddings, queries.embeddings)
    assert_same_values_gradients(group, own_values, values)


@pytest.mark.parametrize("attention", [make_block, make_deformable])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_all_ranks_decode_what_one_process_does(
    attention: Callable[[], nn.Module], checkpoint: bool, cluster: Cluster
) -> None:
    cluster.run(3, decode, attention, 500, checkpoint)


def make_dropping_block() -> nn.Module:
    block: nn.Module = make_block(dropout=0.3)
    return block


@pytest.mark.parametrize("attention", [make_dropping_block, make_deformable])
def test_queries_attend_from_the_sides_of_their_boxes(
    attention: Callable[[], nn.Module], cluster: Cluster
) -> None:
    cluster.run(3, decode, attention, 500, False, 0.2, True)


@pytest.mark.parametrize("attention", [make_dropping_block, make_dropping_deformable])
def test_decoding_with_dropout(attention: Callable[[], nn.Module], cluster: Cluster) -> None:
    cluster.run(3, decode, attention, 500, True, 0.2)


def encode_with_dropout(group: ProcessGroup) -> None:
    whole, pyramid, _, _, part = pyramids(group, 400)
    one = prepared(make_dropping_deformable())
    own = shard_attention(copy.deepcopy(one), group)
    torch.manual_seed(2)
    expected = one.encode(whole)
    torch.manual_seed(2)
    found = part.gather(own.encode(pyramid))
    assert_close(found.values, expected.values, 1e-12)


def test_deformable_attention_of_points_with_dropout(cluster: Cluster) -> None:
    cluster.run(3, encode_with_dropout)


def test_decoding_on_ranks_without_points(cluster: Cluster) -> None:
    cluster.run(4, decode, make_block, 2, False)


def decode_a_corner(group: ProcessGroup) -> list[int]:
    """How many queries each layer's attention has, where queries lie around the points of all."""
    _, pyramid, _, _, part = pyramids(group, 500)
    layer = shard_attention(make_decoder(1).double(), group).layers[0]
    assert isinstance(layer, DecoderLayer)
    queries = object_queries()
    seen: list[Tensor] = []
    layer.cross_attention.register_forward_pre_hook(
        lambda _, given, named: seen.append(named["query_spatial_positions"]), with_kwargs=True
    )
    alone = layer(queries, pyramid)
    planned = layer(queries, pyramid, layer.make_plan(queries, pyramid))
    assert torch.equal(alone, planned)
    owned = (part.owners((seen[0] * STRIDES[0]).long()) == dist.get_rank(group)).double().mean()
    assert owned > 0.8
    return [len(positions) for positions in seen]


def test_ranks_attend_from_the_queries_among_their_points(cluster: Cluster) -> None:
    counts = cluster.run(3, decode_a_corner)
    assert [sum(layer) for layer in zip(*counts, strict=True)] == [30, 30]
    assert all(0 < count < 30 for rank in counts for count in rank)


def decode_with_dropout(group: ProcessGroup) -> tuple[Tensor, Tensor]:
    _, pyramid, _, _, _ = pyramids(group, 400)
    decoder = shard_attention(prepared(make_decoder(dropout=0.3)), group)
    torch.manual_seed(dist.get_rank(group))
    before = torch.rand(5)
    torch.manual_seed(dist.get_rank(group))
    first, _ = decoder(object_queries(), pyramid)
    second, _ = decoder(object_queries(), pyramid)
    assert not torch.equal(first[-1].logits, second[-1].logits)
    if dist.get_rank(group) > 0:  # their own random numbers go on
        assert torch.equal(torch.rand(5), before)
    return first[-1].logits.detach(), second[-1].logits.detach()


def test_dropout_of_object_queries_is_the_same_on_all_ranks(cluster: Cluster) -> None:
    first, *others = cluster.run(3, decode_with_dropout)
    for other in others:
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])


# ------------------------------------------------------------------------------ whole detector


class Trained(nn.Module):
    """A stem, a detector and its loss."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem = PointStem(CHANNELS, EMBED, STRIDES)
        denoiser = DenoisingQueryGenerator(EMBED, CLASSES, 2)
        self.detector: Detector = make_detector(
            n_queries=12, denoiser=denoiser, attention=attention
        )
        self.loss = SetCriterion()

    def forward(self, coordinates: Tensor, values: Tensor, targets: Targets) -> dict[str, Tensor]:
        batch_size = len(targets.offsets) - 1
        pyramid = self.stem(coordinates, values, SHAPE, batch_size)
        losses: dict[str, Tensor] = self.loss(self.detector(pyramid, targets), targets)
        return losses


def make_targets(n: int) -> Targets:
    generator = torch.Generator().manual_seed(6)
    draws = torch.rand(2, n, 2, generator=generator, dtype=torch.float64)
    boxes = torch.cat((draws[0] * torch.tensor([24.0, 32.0]), 3 + 6 * draws[1]), 1)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    return Targets(boxes, labels, torch.tensor([0, n // 3, n]))


def train(
    group: ProcessGroup, attention: Callable[[], nn.Module], n_points: int, n_objects: int
) -> None:
    """Losses are means over ranks, as DDP averages gradients."""
    coordinates, values = raw_points(n_points)
    targets = make_targets(n_objects)
    one = prepared(Trained(attention))
    own = shard_attention(copy.deepcopy(one), group)
    assert list(own.state_dict()) == list(one.state_dict())
    torch.manual_seed(3)
    expected = losses_of_one(one, coordinates, values, targets)
    _, cells, rows = scattered(group, coordinates, values)
    torch.manual_seed(3 + dist.get_rank(group))
    losses = own(cells, rows, targets)
    sum_losses(losses).backward()
    n_ranks = dist.get_world_size(group)
    for name, loss in losses.items():
        mean = loss.detach() / n_ranks
        dist.all_reduce(mean, group=group)
        assert_close(mean, expected[name], 1e-11 * max(1.0, float(expected[name])), name)
    assert_same_gradients(group, own, one, n_ranks)


def losses_of_one(
    one: Trained, coordinates: Tensor, values: Tensor, targets: Targets
) -> dict[str, Tensor]:
    """Those of one process, which counts its objects alone, and its gradients."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(dist, "is_initialized", lambda: False)
        losses = one(coordinates, values, targets)
    sum_losses(losses).backward()
    return {name: loss.detach() for name, loss in losses.items()}


@pytest.mark.parametrize("attention", [make_block, make_deformable])
def test_a_detector_has_the_losses_and_gradients_of_one_process(
    attention: Callable[[], nn.Module], cluster: Cluster
) -> None:
    cluster.run(4, train, attention, 400, 9)


@pytest.mark.parametrize(("n_points", "n_objects"), [(300, 0), (300, 1), (3, 2)])
def test_with_few_objects_or_points(n_points: int, n_objects: int, cluster: Cluster) -> None:
    cluster.run(4, train, make_block, n_points, n_objects)


def train_on_a_mesh(group: ProcessGroup) -> None:
    """Two by two ranks under DDP: an image for each pair of ranks, and half of it for each rank."""
    coordinates, values = raw_points(400)
    targets = make_targets(9)
    one = prepared(Trained(make_block))
    own = copy.deepcopy(one)
    torch.manual_seed(0)
    expected = losses_of_one(one, coordinates, values, targets)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "space"))
    image, space = mesh.get_local_rank("data"), mesh["space"].get_group()
    rows = coordinates[:, 0] == image
    first, last = targets.offsets[image : image + 2].tolist()
    edges = torch.tensor([0, last - first])
    objects = Targets(targets.boxes[first:last], targets.labels[first:last], edges)
    moved = coordinates[rows] * torch.tensor([0, 1, 1])
    _, cells, points = scattered(space, moved, values[rows])
    parallel = DistributedDataParallel(shard_attention(own, mesh["space"]))
    torch.manual_seed(0)
    losses = parallel(cells, points, objects)
    sum_losses(losses).backward()
    total = sum_losses(losses).detach() / 4
    dist.all_reduce(total, group=group)
    assert_close(total, sum_losses(expected), 1e-11 * float(total))
    for (name, ours), theirs in zip(own.named_parameters(), one.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        scale = max(1.0, float(theirs.grad.abs().max()))
        assert_close(ours.grad, theirs.grad, 1e-12 * scale, name)


def test_images_over_one_dimension_of_a_mesh_and_space_over_another(cluster: Cluster) -> None:
    cluster.run(4, train_on_a_mesh)
