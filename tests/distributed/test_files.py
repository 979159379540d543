"""Scenes that ranks read in shares, and checkpoints that other numbers of ranks resume."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.cluster import Cluster
from problems import assert_close
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock, voxelize
from vicinal.detr import Encoder, EncoderLayer, FeedForward
from vicinal.distributed import partition_space, shard_attention

SHAPE, EMBED, STRIDES = (48, 40), 8, (1, 2)


def make_encoder() -> Encoder:
    torch.manual_seed(1)
    layers = [
        EncoderLayer(SparseNeighborhoodAttentionBlock(EMBED, 2, 2, (3, 5)), FeedForward(EMBED))
        for _ in range(2)
    ]
    return Encoder(layers, EMBED).double()


def write_scene(folder: Path, n_files: int) -> None:
    """Files of 40 points each, in meters, with an embedding each."""
    generator = torch.Generator().manual_seed(0)
    for index in range(n_files):
        size = torch.tensor(SHAPE) / 2
        points = torch.rand(40, 2, generator=generator, dtype=torch.float64) * size
        features = torch.randn(40, EMBED, generator=generator, dtype=torch.float64)
        torch.save((points, features), folder / f"{index}.pt")


def read(paths: list[Path]) -> tuple[Tensor, Tensor]:
    """The raw cells and embeddings of files."""
    empty = torch.zeros(0, 2).double(), torch.zeros(0, EMBED).double()
    chunks = [empty, *(torch.load(path, mmap=True) for path in paths)]
    points, features = map(torch.cat, zip(*chunks, strict=True))
    bounds = [(0, size / 2) for size in SHAPE]
    return voxelize(points, cell_size=0.5, bounds=bounds).coordinates, features


def make_pyramid(cells: Tensor, values: Tensor) -> FeaturePyramid:
    return FeaturePyramid.from_points(
        cells, values, SHAPE, 1, strides=STRIDES, keep_point_rows=True
    )


def read_in_shares(group: ProcessGroup, folder: Path) -> tuple[int, int]:
    """Compares results per raw point with those of one process that reads all files."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    paths = sorted(folder.iterdir())
    edges = [len(paths) * r // n_ranks for r in (rank, rank + 1)]
    one = make_encoder()(make_pyramid(*read(paths))).values_of_points(0)
    expected = one.tensor_split([40 * edge for edge in edges])[1]

    cells, features = read(paths[edges[0] : edges[1]])
    route = partition_space(cells, SHAPE, group, align=max(STRIDES)).route(cells, features)
    own_cells, own_features = route.scatter(cells), route.scatter(features)
    encoder = shard_attention(make_encoder(), group)
    encoded = encoder(make_pyramid(own_cells, own_features)).values_of_points(0)
    assert_close(route.gather(encoded), expected, 1e-12)
    return len(cells), len(own_cells)


@pytest.mark.parametrize("n_files", [7, 1])
def test_results_return_to_who_read_the_points(
    n_files: int, tmp_path: Path, cluster: Cluster
) -> None:
    write_scene(tmp_path, n_files)
    read, owned = zip(*cluster.run(3, read_in_shares, tmp_path), strict=True)
    assert sum(read) == sum(owned) == 40 * n_files
    assert max(owned) < 0.5 * 40 * n_files


# ----------------------------------------------------------------------------- checkpoints


class Training:
    """An encoder, what wraps it, and an optimizer, on any number of ranks of one scene."""

    def __init__(self, group: ProcessGroup | None, wrap: Callable[..., nn.Module] | None) -> None:
        self.group = group
        self.encoder = make_encoder()
        self.n_ranks = 1 if group is None else dist.get_world_size(group)
        generator = torch.Generator().manual_seed(0)
        cells = [torch.randint(0, size, (200, 1), generator=generator) for size in (1, *SHAPE)]
        values = torch.randn(200, EMBED, generator=generator, dtype=torch.float64)
        points: tuple[Tensor, ...] = torch.cat(cells, 1), values
        if group is not None:
            shard_attention(self.encoder, group)
            rank = dist.get_rank(group)
            coordinates, values = (x.tensor_split(self.n_ranks)[rank] for x in points)
            points = partition_space(coordinates, SHAPE, group).scatter(coordinates, values)
        self.pyramid = make_pyramid(*points)
        self.wrapped = self.encoder if wrap is None else wrap(self.encoder, group)
        self.optimizer = torch.optim.AdamW(self.wrapped.parameters(), lr=0.01)

    def step(self) -> None:
        self.optimizer.zero_grad()
        out = self.wrapped(self.pyramid)
        factors = torch.arange(1, EMBED + 1) * (out.coordinates + 1.0).prod(1, keepdim=True)
        (self.n_ranks * (out.values.square() * factors.sin()).sum()).backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        weights, steps = get_state_dict(self.wrapped, self.optimizer)
        return {"model": weights, "optimizer": steps}

    def save(self, path: Path) -> None:
        save(self.state(), checkpoint_id=path, process_group=self.group)

    def load(self, path: Path) -> None:
        state = self.state()
        load(state, checkpoint_id=path, process_group=self.group)
        set_state_dict(
            self.wrapped,
            self.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def weights(self) -> dict[str, Tensor]:
        """All of them, on the first rank."""
        options = StateDictOptions(full_state_dict=True)
        weights: dict[str, Any] = get_model_state_dict(self.wrapped, options=options)
        return weights


def with_ddp(encoder: Encoder, group: ProcessGroup) -> nn.Module:
    return DistributedDataParallel(encoder, process_group=group)


def with_fsdp(encoder: Encoder, group: ProcessGroup) -> nn.Module:
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in encoder.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(encoder, mesh=mesh)
    return encoder


Wrap = Callable[[Encoder, ProcessGroup], nn.Module]


def start(group: ProcessGroup, wrap: Wrap, path: Path) -> dict[str, Tensor]:
    """Two steps, a checkpoint, and a third step."""
    training = Training(group, wrap)
    training.step()
    training.step()
    training.save(path)
    training.step()
    assert list(training.state()["model"]) == list(make_encoder().state_dict())
    return training.weights()


def resume(group: ProcessGroup, wrap: Wrap, path: Path) -> dict[str, Tensor]:
    """The third step after the checkpoint."""
    training = Training(group, wrap)
    training.load(path)
    training.step()
    return training.weights()


@pytest.mark.parametrize("wrap", [with_ddp, with_fsdp])
@pytest.mark.parametrize("other", [with_ddp, with_fsdp])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # load, alone
def test_other_numbers_of_ranks_resume_a_checkpoint(
    wrap: Wrap, other: Wrap, tmp_path: Path, cluster: Cluster
) -> None:
    expected, *_ = cluster.run(2, start, wrap, tmp_path)
    resumed = [cluster.run(4, resume, other, tmp_path)[0]]
    alone = Training(None, None)  # one process without a group, and attention as it was
    alone.load(tmp_path)
    alone.step()
    for weights in (*resumed, alone.weights()):
        assert list(weights) == list(expected)
        for name, weight in expected.items():
            assert_close(weights[name], weight, 1e-9)
    one = Training(None, None)
    for _ in range(3):
        one.step()
    for name, weight in expected.items():
        assert_close(one.weights()[name], weight, 1e-9)
