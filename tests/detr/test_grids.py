"""What results must not depend on: how far a grid is padded, and how far from its origin it is."""

from typing import Any

import pytest
import torch
from detr_scenes import CLASSES, EMBED, HEADS, make_detector, perturbed
from torch import Tensor, nn

from vicinal import FeaturePyramid, SparseDeformableAttention, SparseNeighborhoodAttentionBlock
from vicinal.detr import (
    DenoisingQueryGenerator,
    DetectorOutput,
    PointStem,
    QuerySelection,
    SetCriterion,
    Targets,
)

SCENE = 500  # cells along each axis that have points
SIZES = (500, 504, 512, 704)
STRIDES: list[tuple[int, Any]] = [
    (1, (2, 4, 8, 16)),
    (1, (1, 16)),
    (2, (1, 2, 4, 8)),
    (2, (2, 4, 8, 16)),
    (2, ((1, 4), (2, 8), (6, 16))),
    (3, (4, 8)),
    (3, ((2, 3, 4), (4, 6, 16))),
]


def make_attention(kind: str, n_levels: int, position_dim: int) -> nn.Module:
    if kind == "deformable":
        return SparseDeformableAttention(EMBED, HEADS, n_levels, 2, position_dim)
    return SparseNeighborhoodAttentionBlock(EMBED, HEADS, n_levels, [3] * n_levels, position_dim)


def scattered_points(position_dim: int, n: int = 150) -> tuple[Tensor, Tensor]:
    """Points of two images in clusters, so that they have neighbors, up to the last cell."""
    generator = torch.Generator().manual_seed(position_dim)
    centers = torch.randint(10, SCENE - 10, (n // 10, position_dim), generator=generator)
    centers[0], centers[1] = SCENE - 3, 3
    cells = centers.repeat(10, 1)
    cells += torch.randint(-3, 4, cells.shape, generator=generator)
    cells = cells.clamp(0, SCENE - 1)
    image = torch.randint(2, (len(cells), 1), generator=generator)
    values = torch.randn(len(cells), 1, generator=generator, dtype=torch.float64)
    return torch.cat((image, cells), 1), values


def make_objects(position_dim: int) -> Targets:
    generator = torch.Generator().manual_seed(9)
    center = 100 * torch.rand(5, position_dim, generator=generator, dtype=torch.float64)
    size = 5 + 20 * torch.rand(5, position_dim, generator=generator, dtype=torch.float64)
    labels = torch.arange(5) % CLASSES
    return Targets(torch.cat((center, size), 1), labels, torch.tensor([0, 2, 5]))


def numbers(
    pyramid: FeaturePyramid, output: DetectorOutput, losses: dict[str, Tensor]
) -> dict[str, Tensor]:
    """All that must have the same bits."""
    assert output.denoising is not None
    found = {
        "points": pyramid.coordinates,
        "stem": pyramid.values,
        "positions": pyramid.positions(torch.float64),
        "encoder": output.pyramid.values,
        "chosen": output.selection.chosen,
        "candidates": output.selection.candidates.boxes,
    }
    for index, layer in enumerate([*output.layers, *output.denoising.layers]):
        found |= {f"logits {index}": layer.logits, f"boxes {index}": layer.boxes}
    return found | losses


@pytest.mark.parametrize("kind", ["neighborhood", "deformable"])
@pytest.mark.parametrize(("position_dim", "strides"), STRIDES)
def test_the_size_of_the_grid_changes_no_bit(position_dim: int, strides: Any, kind: str) -> None:
    stem = perturbed(PointStem(1, EMBED, strides, (3, 3), (1, 3), position_dim))
    detector = perturbed(
        make_detector(
            position_dim,
            n_queries=7,
            denoiser=DenoisingQueryGenerator(EMBED, CLASSES, 1),
            attention=lambda: make_attention(kind, len(strides), position_dim),
        )
    )
    coordinates, values = scattered_points(position_dim)
    targets = make_objects(position_dim)
    results = []
    for size in SIZES:
        torch.manual_seed(0)  # of denoising
        pyramid = stem(coordinates, values, [size] * position_dim, 2)
        output = detector(pyramid, targets)
        results.append(numbers(pyramid, output, SetCriterion()(output, targets)))
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("strides", [(2, 4, 8, 16), ((2, 3), (4, 3), (4, 9))])
def test_boxes_are_raw_cells_over_the_least_stride_of_the_axis(strides: Any) -> None:
    """A candidate's box is around the raw cells that its cell pools, on a grid of any size."""
    stem = PointStem(1, EMBED, strides, (3,), (1,)).double()
    selection = QuerySelection(EMBED, CLASSES, 5, box_size=1.0).double()
    coordinates, values = scattered_points(2)
    pyramid = stem(coordinates, values, (SCENE, SCENE), 2, keep_point_rows=True)
    found = selection(pyramid)
    boxes = found.candidates.boxes[torch.argsort(found.points)]
    least = torch.tensor(stem.strides).amin(0)
    assert pyramid.point_rows is not None
    for level, stride in enumerate(torch.tensor(stem.strides)):
        rows = pyramid.point_rows[:, level]
        center, size = (boxes[rows].unflatten(1, (2, 2)) * least).unbind(1)
        assert torch.equal(size, stride.expand_as(size).double())
        lower = coordinates[:, 1:] // stride * stride
        assert torch.equal(center - size / 2, lower.double())
