"""Scenes of one process, and the share of them that each rank has."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from problems import Scene, make_scene
from torch import Tensor
from torch.distributed import ProcessGroup

from vicinal import FeaturePyramid, NeighborhoodPlan, Window, plan_neighborhoods
from vicinal.distributed import ShardedPlan, plan_sharded


@dataclass
class Problem:
    """A scene, by what makes it, so that every rank can make it again."""

    shapes: tuple[tuple[int, ...], ...]
    sizes: tuple[Any, ...]
    query_counts: tuple[int, ...]
    n_points: int
    periodic_axes: tuple[int, ...] = ()
    seed: int = 0

    def scene(self) -> Scene:
        made = make_scene(self.shapes, self.sizes, self.query_counts, self.n_points, seed=self.seed)
        pyramid = made.pyramid
        made.pyramid = FeaturePyramid(
            pyramid.values,
            pyramid.coordinates,
            pyramid.level_shapes,
            pyramid.batch_size,
            periodic_axes=self.periodic_axes,
        )
        return made


PROBLEMS = {
    "1-D": Problem(((40,), (13,)), (5, 3), (30, 20), 120),
    "2-D, an empty image, coarse first": Problem(((6, 4), (9, 8)), (3, 5), (25, 0, 25), 120),
    "3-D": Problem(((6, 5, 4), (3, 3, 2)), (3, 3), (40,), 150),
    "4-D": Problem(((4, 3, 3, 4), (2, 2, 2, 2)), (3, 1), (30,), 120),
    "balls and dilation": Problem(
        ((16, 16), (8, 8)), (Window(5, shape="ball"), Window(3, dilation=2)), (40, 20), 150
    ),
    "causal": Problem(((16, 16), (8, 8)), (Window((3, 4), causal=(False, True)), 3), (40, 20), 150),
    "a level left out": Problem(((16, 16), (8, 8)), (0, (5, 1)), (40,), 150),
    "periodic": Problem(((12, 16), (6, 8)), (5, 3), (40, 20), 150, (0,)),
    "periodic along both axes": Problem(((6, 8), (3, 4)), (5, 3), (40,), 100, (0, 1)),
    "few points": Problem(((12, 16), (6, 8)), (5, 3), (5, 1), 3),
    "no points": Problem(((12, 16),), (3,), (5,), 0),
}


def owners_by_cell(coordinates: Tensor, n_ranks: int) -> Tensor:
    """Any rank for each cell; points that share one have the same."""
    generator = torch.Generator().manual_seed(5)
    factors = torch.randint(1, 2**20, (coordinates.shape[1],), generator=generator)
    return (coordinates * factors).sum(1) // 7 % n_ranks


def owners_by_slab(coordinates: Tensor, n_ranks: int) -> Tensor:
    """A slab of each level per rank, of unequal widths: the last but one has nothing."""
    edges = torch.tensor([0, 3, 5, 5])[:n_ranks]
    return torch.searchsorted(edges, coordinates[:, 1].contiguous(), right=True) - 1


def owned_by_first(coordinates: Tensor, n_ranks: int) -> Tensor:
    """All other ranks have nothing."""
    return coordinates.new_zeros(len(coordinates))


Owners = Callable[[Tensor, int], Tensor]


@dataclass
class Share:
    """What a rank has of a scene."""

    queries: Tensor  # rows of the scene's queries
    points: Tensor  # rows of its points
    offsets: Tensor
    pyramid: FeaturePyramid


def share_of(scene: Scene, owners: Owners, group: ProcessGroup) -> Share:
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    points = (owners(scene.pyramid.coordinates, n_ranks) == rank).nonzero().flatten()
    images = torch.tensor(scene.images(), dtype=torch.int64)
    # Queries lie on other ranks than the points around them.
    generator = torch.Generator().manual_seed(9)
    placed = torch.randint(n_ranks, (len(images),), generator=generator)
    queries = (placed == rank).nonzero().flatten()
    counts = images[queries].bincount(minlength=scene.pyramid.batch_size)
    pyramid = FeaturePyramid(
        scene.pyramid.values[points],
        scene.pyramid.coordinates[points],
        scene.pyramid.level_shapes,
        scene.pyramid.batch_size,
        periodic_axes=scene.pyramid.periodic_axes,
    )
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return Share(queries, points, offsets, pyramid)


def plan_of_share(scene: Scene, share: Share, group: ProcessGroup) -> ShardedPlan:
    positions = scene.positions[share.queries]
    return plan_sharded(positions, share.offsets, share.pyramid, scene.sizes, group=group)


def plan_of_one(scene: Scene) -> NeighborhoodPlan:
    return plan_neighborhoods(scene.positions, scene.offsets, scene.pyramid, scene.sizes)
