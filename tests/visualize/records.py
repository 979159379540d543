"""Records of attention weights for the tests, and the scenes they belong to."""

import itertools
from typing import Any

import torch
from problems import Scene, make_inputs, make_scene
from torch import Tensor

from vicinal import neighborhood_attention_weights
from vicinal.visualize import AttentionRecord

HEADS = 3
SCENE = make_scene(((16, 12), (8, 6)), (3, 5), (6, 4), 150, distinct=True)
LINE = make_scene(((40,), (20,)), (5, 7), (5, 0), 40)
CUBE = make_scene(((6, 5, 7), (3, 5, 4)), (3, 5), (4,), 120)
IMAGE = 1  # queries 6 to 9


def make_record(
    scene: Scene, image: int, *, background: bool = False, **options: Any
) -> tuple[AttentionRecord, dict[int, dict[int, Tensor]]]:
    """A record of all the image's queries, and by query and point the weights ``[H]`` it holds."""
    plan = scene.plan()
    inputs = make_inputs(plan, heads=HEADS, background=background)
    queries = torch.arange(int(scene.offsets[image]), int(scene.offsets[image + 1]))
    weights = neighborhood_attention_weights(
        inputs.q, inputs.k, plan, background=inputs.background, queries=queries
    )
    record = AttentionRecord(
        scene.positions[queries], weights, scene.sizes, batch_index=image, **options
    )
    by_point: dict[int, dict[int, Tensor]] = {}
    for query, (start, stop) in enumerate(itertools.pairwise(weights.offsets.tolist())):
        pairs = zip(weights.points[start:stop].tolist(), weights.weights[start:stop], strict=True)
        by_point[query] = dict(pairs)
    return record, by_point


def boxes_around(positions: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = 1 + 4 * torch.rand(positions.shape, generator=generator, dtype=positions.dtype)
    return torch.cat((positions, sizes), 1)


def busiest_query(scene: Scene, image: int) -> int:
    """The query of the image with the most neighbors."""
    first, last = int(scene.offsets[image]), int(scene.offsets[image + 1])
    return int(scene.plan().counts()[first:last].argmax())
