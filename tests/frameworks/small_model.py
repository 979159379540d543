"""A model of one block and a head, and samples for it."""

import torch
from torch import Tensor, nn

from vicinal import FeaturePyramid, SparseNeighborhoodAttentionBlock, collate_pyramids

WIDTH, SHAPE = 8, (16, 16)


class SmallModel(nn.Module):
    """Logits ``[B, 2]`` of the images of a pyramid."""

    def __init__(self, embed_dim: int = WIDTH, n_classes: int = 2) -> None:
        super().__init__()
        self.block = SparseNeighborhoodAttentionBlock(embed_dim, 2, 2, (3, 5))
        self.head = nn.Linear(embed_dim, n_classes)

    def forward(self, pyramid: FeaturePyramid) -> Tensor:
        values = self.block.encode(pyramid).values
        sums = values.new_zeros(pyramid.batch_size, values.shape[1])
        logits: Tensor = self.head(sums.index_add(0, pyramid.batch, values))
        return logits


class Encode(nn.Module):
    """The block on plain tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.block = SparseNeighborhoodAttentionBlock(WIDTH, 2, 2, (3, 5))

    def forward(self, values: Tensor, coordinates: Tensor, offsets: Tensor) -> Tensor:
        shapes, n_images = (SHAPE, (8, 8)), offsets.shape[0] - 1
        pyramid = FeaturePyramid(values, coordinates, shapes, n_images, check_contents=False)
        levels = pyramid.levels
        return self.block(values, pyramid.positions(), offsets, pyramid, query_level_indices=levels)


def make_samples(n: int, n_points: int = 20) -> list[tuple[FeaturePyramid, int]]:
    """Pyramids of one image, and labels."""
    samples = []
    for index in range(n):
        points = nn.functional.pad(torch.randint(0, SHAPE[0], (n_points, 2)), (1, 0))
        values = torch.randn(n_points, WIDTH)
        pyramid = FeaturePyramid.from_points(points, values, SHAPE, 1, strides=(1, 2))
        samples.append((pyramid, index % 2))
    return samples


def make_batch(n: int, n_points: int = 20) -> FeaturePyramid:
    pyramid: FeaturePyramid = collate_pyramids(make_samples(n, n_points))[0]
    return pyramid


def inputs_of(pyramid: FeaturePyramid) -> tuple[Tensor, Tensor, Tensor]:
    """What `Encode` takes."""
    return pyramid.values, pyramid.coordinates, pyramid.batch_offsets()
