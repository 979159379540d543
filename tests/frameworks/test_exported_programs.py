"""Programs of `torch.export` for any number of points, saved and loaded."""

import io
from typing import Any

import torch
from frameworks.small_model import Encode, SmallModel, inputs_of, make_batch
from torch import nn

from vicinal import FeaturePyramid
from vicinal.detr import DetectionHead

ANY = torch.export.Dim.DYNAMIC
ROWS = [{0: ANY}, {0: ANY}]  # of values and coordinates


def reloaded(module: nn.Module, arguments: tuple[Any, ...], dynamic_shapes: Any) -> Any:
    program = torch.export.export(module, arguments, dynamic_shapes=dynamic_shapes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def test_pyramids_of_any_number_of_points() -> None:
    model = SmallModel()
    loaded = reloaded(model, (make_batch(3),), (ROWS,))
    for n_points in (5, 20, 60):
        pyramid = make_batch(3, n_points)
        torch.testing.assert_close(loaded(pyramid), model(pyramid))


def test_tensors_of_any_number_of_points() -> None:
    model, rows = Encode(), torch.export.Dim("rows", min=2, max=2**20)
    shapes = {"values": {0: rows}, "coordinates": {0: rows}, "offsets": None}
    loaded = reloaded(model, inputs_of(make_batch(2)), shapes)
    for n_points in (5, 20, 60):
        inputs = inputs_of(make_batch(2, n_points))
        torch.testing.assert_close(loaded(*inputs), model(*inputs))


def test_the_reference_too() -> None:
    """Whose sizes depend on the contents of tensors."""
    model = Encode()
    reference = Encode()
    reference.load_state_dict(model.state_dict())
    reference.block.backend = reference.block.pos_encoding.backend = "reference"
    rows = torch.export.Dim("rows", min=2, max=2**20)
    shapes = {"values": {0: rows}, "coordinates": {0: rows}, "offsets": None}
    loaded = reloaded(reference, inputs_of(make_batch(2)), shapes)
    for n_points in (5, 60, 900):  # more queries than a chunk of the reference has
        inputs = inputs_of(make_batch(2, n_points))
        torch.testing.assert_close(loaded(*inputs), model(*inputs), rtol=0, atol=1e-5)


class OfRawPoints(nn.Module):
    def forward(self, pyramid: FeaturePyramid) -> torch.Tensor:
        return pyramid.with_values(2 * pyramid.values).values_of_points(level=0)


def make_pyramid_of_raw_points(n: int) -> FeaturePyramid:
    points = nn.functional.pad(torch.randint(0, 16, (n, 2)), (1, 0))
    kept: dict[str, Any] = {"strides": (1, 2), "keep_point_rows": True}
    return FeaturePyramid.from_points(points, torch.randn(n, 4), (16, 16), 1, **kept)


def test_values_of_any_number_of_raw_points() -> None:
    module = OfRawPoints()
    loaded = reloaded(module, (make_pyramid_of_raw_points(30),), ([{0: ANY}] * 4,))
    for n in (9, 50):
        pyramid = make_pyramid_of_raw_points(n)
        assert torch.equal(loaded(pyramid), module(pyramid))


def test_heads_of_any_number_of_queries() -> None:
    head = DetectionHead(8, 3)
    rows = torch.export.Dim("rows", min=2, max=2**20)
    arguments = torch.randn(5, 8), torch.rand(5, 4) + 1
    loaded = reloaded(head, arguments, ({0: rows}, {0: rows}))
    other = torch.randn(9, 8), torch.rand(9, 4) + 1
    for found, expected in zip(loaded(*other), head(*other), strict=True):
        torch.testing.assert_close(found, expected)
