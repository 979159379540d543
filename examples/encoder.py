"""An encoder of sparse neighborhood attention that tells which digit each stroke pixel is part of.

Every point of the pyramid is a query. Cells and queries stay the same from block to block, so one
plan serves them all, and only the values flow.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.canvas import Canvas
from vicinal import (
    FeaturePyramid,
    NeighborhoodPlan,
    NeighborhoodWeights,
    SparseNeighborhoodAttentionBlock,
    plan_neighborhoods,
)

EMBED_DIM = 256
HEADS = 8
STRIDES = (1, 2, 4, 8)
WINDOWS = (3, 5, 7, 9)
BLOCKS = 3
PATCH = 7  # cells a side that the stem sees


class Stem(nn.Module):
    """An embedding of every stroke pixel from the ink near it, at full and at half resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2 * PATCH**2, EMBED_DIM),
            nn.GELU(),
            nn.Linear(EMBED_DIM, EMBED_DIM),
            nn.LayerNorm(EMBED_DIM),
        )

    def forward(self, ink: Tensor, cells: Tensor) -> Tensor:
        """Ink ``[size, size]`` and cells ``[n, 2]`` to ``[n, EMBED_DIM]``."""
        halved = F.avg_pool2d(ink[None], 2, ceil_mode=True)[0]
        patches = (_patches(ink, cells), _patches(halved, cells // 2))
        embedding: Tensor = self.layers(torch.cat(patches, 1))
        return embedding


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = Stem()
        self.level_embedding = nn.Embedding(len(STRIDES), EMBED_DIM)
        self.blocks = nn.ModuleList(
            SparseNeighborhoodAttentionBlock(
                EMBED_DIM, HEADS, len(STRIDES), neighborhood_sizes=WINDOWS, bias=True
            )
            for _ in range(BLOCKS)
        )
        self.head = nn.Sequential(nn.LayerNorm(EMBED_DIM), nn.Linear(EMBED_DIM, 10))

    def forward(self, pyramid: FeaturePyramid, plan: NeighborhoodPlan) -> Tensor:
        """Logits ``[n, 10]`` of level 0, the cells with ink row by row."""
        attended = self.attend(pyramid, plan, BLOCKS)
        logits: Tensor = self.head(attended.values[attended.levels == 0])
        return logits

    def embed(self, canvas: Canvas) -> FeaturePyramid:
        """The stroke pixels as level 0, pooled to the other levels."""
        cells = canvas.cells
        coordinates = F.pad(cells, (1, 0))  # of image 0
        pyramid = FeaturePyramid.from_points(
            coordinates, self.stem(canvas.ink, cells), canvas.ink.shape, 1, strides=STRIDES
        )
        return pyramid.with_values(pyramid.values + self.level_embedding(pyramid.levels))

    def attend(
        self, pyramid: FeaturePyramid, plan: NeighborhoodPlan, n_blocks: int
    ) -> FeaturePyramid:
        """The pyramid after the first ``n_blocks`` blocks."""
        positions, offsets = pyramid.positions(), pyramid.batch_offsets()
        for block in self.blocks[:n_blocks]:
            values = block(
                pyramid.values,
                positions,
                offsets,
                pyramid,
                query_level_indices=pyramid.levels,
                plan=plan,
            )
            pyramid = pyramid.with_values(values)
        return pyramid

    def last_weights(
        self, pyramid: FeaturePyramid, plan: NeighborhoodPlan, queries: Tensor
    ) -> NeighborhoodWeights:
        """What the last block makes each of ``queries`` attend to, and how much."""
        pyramid = self.attend(pyramid, plan, BLOCKS - 1)
        block = self.blocks[-1]
        assert isinstance(block, SparseNeighborhoodAttentionBlock)
        return block.attention_weights(
            pyramid.values,
            pyramid.positions(),
            pyramid.batch_offsets(),
            pyramid,
            query_level_indices=pyramid.levels,
            plan=plan,
            queries=queries,
        )


def make_plan(pyramid: FeaturePyramid) -> NeighborhoodPlan:
    """Who sees whom, with every point a query."""
    return plan_neighborhoods(pyramid.positions(), pyramid.batch_offsets(), pyramid, WINDOWS)


def _patches(image: Tensor, cells: Tensor) -> Tensor:
    """``[n, PATCH ** 2]``: what the image holds around each of ``cells`` ``[n, 2]``."""
    padded = F.pad(image, [PATCH // 2] * 4)
    steps = torch.arange(PATCH)
    rows = cells[:, :1, None] + steps[:, None]  # [n, PATCH, 1]
    columns = cells[:, 1:, None] + steps  # [n, 1, PATCH]
    return padded[rows, columns].flatten(1)
