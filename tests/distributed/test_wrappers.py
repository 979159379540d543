"""Sharded encoders under what torch wraps round modules: DDP, FSDP2, checkpointing, compilers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.cluster import Cluster
from problems import assert_close
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock
from vicinal.detr import Encoder, EncoderLayer, FeedForward
from vicinal.distributed import ShardedPlan, partition_space, shard_attention, sum_gradients

SHAPE, EMBED, BATCH = (48, 40), 8, 2
GRAPHS = CompileCounterWithBackend("aot_eager")


def make_encoder(**options: Any) -> Encoder:
    torch.manual_seed(1)
    layers = [
        EncoderLayer(SparseNeighborhoodAttentionBlock(EMBED, 2, 2, (3, 5)), FeedForward(EMBED))
        for _ in range(2)
    ]
    return Encoder(layers, EMBED, **options).double()


def raw_points(scene: int, n: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(scene)
    cells = [torch.randint(0, size, (n, 1), generator=generator) for size in (BATCH, *SHAPE)]
    return torch.cat(cells, 1), torch.randn(n, EMBED, generator=generator, dtype=torch.float64)


def make_pyramid(cells: Tensor, rows: Tensor) -> FeaturePyramid:
    return FeaturePyramid.from_points(cells, rows, SHAPE, BATCH, strides=(1, 2))


def own_pyramid(space: ProcessGroup, scene: int, n: int = 300) -> FeaturePyramid:
    rank, n_ranks = dist.get_rank(space), dist.get_world_size(space)
    cells, rows = (x.tensor_split(n_ranks)[rank] for x in raw_points(scene, n))
    return make_pyramid(*partition_space(cells, SHAPE, space).scatter(cells, rows))


def loss_of(pyramid: FeaturePyramid) -> Tensor:
    """A sum over points that depends on where each of them is."""
    factors = torch.arange(1, EMBED + 1) * (pyramid.coordinates + 1.0).prod(1, keepdim=True)
    return (pyramid.values.square() * factors.sin()).sum()


def gradients_of_one(n_scenes: int, n: int = 300, **options: Any) -> dict[str, Tensor]:
    """Of the mean loss of scenes, in one process."""
    encoder = make_encoder(**options)
    for scene in range(n_scenes):
        (loss_of(encoder(make_pyramid(*raw_points(scene, n)))) / n_scenes).backward()
    return gradients(encoder)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        assert grad is not None
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def assert_same_gradients(module: nn.Module, expected: dict[str, Tensor]) -> None:
    found = gradients(module)
    assert list(found) == list(expected)
    for name, grad in expected.items():
        assert_close(found[name], grad, 1e-12 * max(1.0, float(grad.abs().max())))


Wrap = Callable[[Encoder, ProcessGroup], nn.Module]


def train(
    group: ProcessGroup, wrap: Wrap, options: dict[str, Any], n: int = 300, learned: bool = False
) -> None:
    """Compares gradients of a wrapped encoder with those of one process.

    The loss is the mean over scenes of what the ranks of each have in sum. Wrappers average over
    all ranks, so each rank has the loss of its own points times the number of ranks of a scene.
    With ``learned`` the values of the points need gradients, as those of a backbone do.
    """
    space, scene, n_scenes = group, 0, dist.get_world_size(group) // 2
    if n_scenes == 2:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "space"))
        space, scene = mesh["space"].get_group(), mesh["data"].get_local_rank()
    encoder = shard_attention(make_encoder(**options), space)
    keys = list(encoder.state_dict())
    wrapped = wrap(encoder, group)
    for step in range(2):  # wrappers arrange things in the first
        encoder.zero_grad()
        pyramid = own_pyramid(space, scene, n + step)
        pyramid.values.requires_grad_(learned)
        (loss_of(wrapped(pyramid)) * dist.get_world_size(space)).backward()
    assert list(encoder.state_dict()) == keys
    assert_same_gradients(encoder, gradients_of_one(n_scenes, n + 1, **options))


def with_ddp(encoder: Encoder, group: ProcessGroup) -> nn.Module:
    return DistributedDataParallel(encoder, process_group=group)


def with_fsdp(encoder: Encoder, group: ProcessGroup) -> nn.Module:
    """Every layer on its own, over the ranks of all scenes."""
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(encoder, mesh=mesh)
    assert isinstance(encoder, FSDPModule)
    return encoder


def with_fsdp_in_attention(encoder: Encoder, group: ProcessGroup) -> nn.Module:
    """Wraps the very modules that `shard_attention` gave other classes, copies over scenes."""
    mesh = DeviceMesh.from_group(group, "cpu")
    if dist.get_world_size(group) == 4:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "space"))
    for layer in encoder.layers:
        attention = layer.get_submodule("attention")
        before = type(attention)
        fully_shard(attention, mesh=mesh)
        assert isinstance(attention, before)
        assert isinstance(attention, FSDPModule)
    fully_shard(encoder, mesh=mesh)
    return encoder


def compiled_with_ddp(encoder: Encoder, group: ProcessGroup) -> nn.Module:
    return with_ddp(compiled_layers(encoder), group)


def compiled_with_fsdp(encoder: Encoder, group: ProcessGroup) -> nn.Module:
    return with_fsdp(compiled_layers(encoder), group)


def compiled_layers(encoder: Encoder) -> Encoder:
    for layer in encoder.layers:
        layer.compile(fullgraph=True, dynamic=True, backend=GRAPHS)
    return encoder


def train_compiled(group: ProcessGroup, wrap: Wrap) -> int:
    """Trains layers that share their graphs; the number of those."""
    GRAPHS.frame_count = 0
    train(group, wrap, {}, learned=True)
    return int(GRAPHS.frame_count)


WRAPPERS = [with_ddp, with_fsdp, with_fsdp_in_attention]


@pytest.mark.parametrize("n_ranks", [2, 4])
@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_those_of_one_process(
    n_ranks: int, wrap: Wrap, recompute: bool, cluster: Cluster
) -> None:
    """On ranks that share a scene, and on two scenes of two ranks each."""
    cluster.run(n_ranks, train, wrap, {"checkpoint": recompute})


def test_points_of_some_levels_are_queries(cluster: Cluster) -> None:
    cluster.run(2, train, with_ddp, {"query_levels": [1]})


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_ranks_without_points(wrap: Wrap, cluster: Cluster) -> None:
    cluster.run(2, train, wrap, {"checkpoint": True}, 0)


@pytest.mark.parametrize("wrap", [compiled_with_ddp, compiled_with_fsdp])
def test_compiled_layers(wrap: Wrap, cluster: Cluster) -> None:
    assert cluster.run(2, train_compiled, wrap) == [1, 1]


def recompute_block(group: ProcessGroup) -> None:
    """`torch.utils.checkpoint` round a block: its exchange happens again in the backward pass."""
    torch.manual_seed(1)
    block = shard_attention(SparseNeighborhoodAttentionBlock(EMBED, 2, 2, (3, 5)).double(), group)
    pyramid = own_pyramid(group, 0)
    plan = block.make_encoder_plan(pyramid)

    def encode(values: Tensor) -> FeaturePyramid:
        return block.encode(pyramid.with_values(values), plan)

    found = []
    for run in (encode, lambda x: checkpoint(encode, x, use_reentrant=False)):
        block.zero_grad()
        values = pyramid.values.detach().clone().requires_grad_()
        loss_of(run(values)).backward()
        assert values.grad is not None
        found.append((values.grad, *gradients(block).values()))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_a_block_recomputed_in_the_backward_pass(cluster: Cluster) -> None:
    cluster.run(2, recompute_block)


def compile_block(group: ProcessGroup) -> int:
    """Compares a compiled block with an eager one, on scenes of several sizes."""
    torch.manual_seed(1)
    block = shard_attention(SparseNeighborhoodAttentionBlock(EMBED, 2, 2, (3, 5)).double(), group)
    counter = CompileCounterWithBackend("aot_eager")

    def encode(values: Tensor, pyramid: FeaturePyramid, plan: ShardedPlan) -> Tensor:
        return block.encode(pyramid.with_values(values), plan).values

    compiled = torch.compile(encode, fullgraph=True, dynamic=True, backend=counter)
    counts = set()
    for n in (300, 400, 350):
        pyramid = own_pyramid(group, 0, n)
        plan = block.make_encoder_plan(pyramid)
        assert isinstance(plan, ShardedPlan)
        found = []
        for run in (encode, compiled):
            block.zero_grad()
            values = pyramid.values.detach().clone().requires_grad_()
            out = run(values, pyramid, plan)
            loss_of(pyramid.with_values(out)).backward()
            assert values.grad is not None
            found.append((out, values.grad, *gradients(block).values()))
        for x, y in zip(*found, strict=True):
            assert_close(y, x, 1e-12 * max(1.0, float(x.abs().max())))
        counts.add(counter.frame_count)
    assert min(counts) > 0
    return len(counts)


def test_one_graph_for_any_number_of_points(cluster: Cluster) -> None:
    assert cluster.run(2, compile_block) == [1, 1]


def summed_by_hand(group: ProcessGroup) -> None:
    """Gradients that ranks add up themselves."""
    encoder = shard_attention(make_encoder(), group)
    loss_of(encoder(own_pyramid(group, 0))).backward()
    sum_gradients(encoder.parameters(), group)
    assert_same_gradients(encoder, gradients_of_one(1))


def test_without_a_wrapper(cluster: Cluster) -> None:
    cluster.run(2, summed_by_hand)
