"""Boxes against counts of cells, boxes without volume, and boxes near the limits of floats."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from detr_scenes import refused
from hypothesis import given
from hypothesis import strategies as st
from problems import assert_close
from torch import Tensor

from vicinal.detr import (
    apply_deltas,
    boxes_to_corners,
    corners_to_boxes,
    encode_boxes,
    generalized_iou,
    iou,
    pairwise_generalized_iou,
    pairwise_iou,
    relative_l1,
)

Corners = tuple[tuple[int, ...], tuple[int, ...]]
GRID = 5


@st.composite
def grid_boxes(draw: st.DrawFn) -> list[Corners]:
    """Two to five boxes of 1 to 3 axes, their corners on a grid, no side of length zero."""
    dim = draw(st.integers(1, 3))
    sides = st.tuples(*[st.integers(0, GRID)] * 2).filter(lambda ends: ends[0] != ends[1])
    box = st.lists(sides.map(sorted), min_size=dim, max_size=dim)
    boxes = draw(st.lists(box, min_size=2, max_size=5))
    return [(tuple(low for low, _ in box), tuple(high for _, high in box)) for box in boxes]


def cells(box: Corners) -> set[tuple[int, ...]]:
    return set(itertools.product(*itertools.starmap(range, zip(*box, strict=True))))


def counted(a: Corners, b: Corners) -> tuple[float, float]:
    """IoU and GIoU by counting cells of the grid."""
    shared, covered = len(cells(a) & cells(b)), len(cells(a) | cells(b))
    lows, highs = zip(a, b, strict=True)
    hull = len(cells((tuple(map(min, *lows)), tuple(map(max, *highs)))))
    return shared / covered, shared / covered - (hull - covered) / hull


def as_boxes(found: list[Corners], dtype: torch.dtype = torch.float64) -> Tensor:
    low, high = torch.tensor(found, dtype=dtype).unbind(1)
    return torch.cat(((low + high) / 2, high - low), 1)


def random_boxes(n: int, position_dim: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    center, size = torch.rand(2, n, position_dim, dtype=dtype)
    return torch.cat((4 * center, size + 0.1), 1)


@given(grid_boxes())
def test_overlaps_count_cells(found: list[Corners]) -> None:
    boxes = as_boxes(found)
    by_count = torch.tensor([[counted(a, b) for b in found] for a in found], dtype=torch.float64)
    assert_close(pairwise_iou(boxes, boxes), by_count[..., 0], 1e-15)
    assert_close(pairwise_generalized_iou(boxes, boxes), by_count[..., 1], 1e-14)


@given(grid_boxes())
def test_row_by_row_is_the_diagonal_of_pairwise(found: list[Corners]) -> None:
    a = as_boxes(found)
    b = a.roll(1, 0)
    assert torch.equal(iou(a, b), pairwise_iou(a, b).diagonal())
    assert torch.equal(generalized_iou(a, b), pairwise_generalized_iou(a, b).diagonal())


@given(grid_boxes())
def test_corners_and_back(found: list[Corners]) -> None:
    boxes = as_boxes(found)
    low, high = boxes_to_corners(boxes)
    assert torch.equal(torch.stack((low, high), 1), torch.tensor(found, dtype=torch.float64))
    assert torch.equal(corners_to_boxes(low, high), boxes)


@pytest.mark.parametrize("position_dim", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlaps_of_any_boxes_keep_their_bounds(position_dim: int, dtype: torch.dtype) -> None:
    boxes = random_boxes(60, position_dim, dtype)
    overlap, generalized = pairwise_iou(boxes, boxes), pairwise_generalized_iou(boxes, boxes)
    assert_close(overlap, overlap.t(), 2 * torch.finfo(dtype).eps)
    assert_close(generalized, generalized.t(), 2 * torch.finfo(dtype).eps)
    assert (overlap.diagonal() == 1).all()
    assert (generalized.diagonal() == 1).all()
    assert overlap.min() == 0
    assert overlap.max() == 1
    assert generalized.min() > -1
    assert (generalized <= overlap + 4 * torch.finfo(dtype).eps).all()


def points_and_flats(position_dim: int) -> Iterator[Tensor]:
    """Boxes on a grid of which one side, several or all have length zero."""
    for sides in itertools.product(((0, 0), (0, 1), (2, 2)), repeat=position_dim):
        if any(low == high for low, high in sides):
            low, high = torch.tensor(sides, dtype=torch.float64).unbind(1)
            yield corners_to_boxes(low, high)


@pytest.mark.parametrize("position_dim", [1, 2, 3])
def test_overlaps_without_volume_are_finite_with_finite_gradients(position_dim: int) -> None:
    boxes = torch.stack([*points_and_flats(position_dim), *random_boxes(3, position_dim)])
    boxes.requires_grad_()
    for function in (pairwise_iou, pairwise_generalized_iou):
        values = function(boxes, boxes)
        (grad,) = torch.autograd.grad(values.sum(), boxes)
        assert torch.isfinite(values).all()
        assert torch.isfinite(grad).all()
        assert (values.diagonal() == 1).all()


@given(grid_boxes())
def test_boxes_flat_in_the_same_plane_overlap_as_in_that_plane(found: list[Corners]) -> None:
    center, size = as_boxes(found).chunk(2, 1)
    plane, flat = torch.full_like(center[:, :1], 3), torch.zeros_like(center[:, :1])
    lifted = torch.cat((center, plane, size, flat), 1)
    boxes = torch.cat((center, size), 1)
    assert torch.equal(pairwise_iou(lifted, lifted), pairwise_iou(boxes, boxes))
    expected = pairwise_generalized_iou(boxes, boxes)
    assert torch.equal(pairwise_generalized_iou(lifted, lifted), expected)


def test_points_apart_and_points_in_boxes() -> None:
    point, other = torch.tensor([[1.0, 1, 0, 0]]), torch.tensor([[2.0, 3, 0, 0]])
    box = torch.tensor([[1.0, 1, 2, 2]])
    assert [iou(point, other).item(), generalized_iou(point, other).item()] == [0, -1]
    assert [iou(point, box).item(), generalized_iou(point, box).item()] == [0, 0]


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_overlaps_do_not_depend_on_scale_in_float32(scale: float) -> None:
    boxes = random_boxes(20, 3, torch.float32)
    scaled = (boxes * scale).requires_grad_()
    values = pairwise_generalized_iou(scaled, scaled)
    assert_close(values, pairwise_generalized_iou(boxes, boxes), 2e-6)
    (grad,) = torch.autograd.grad(values.sum() * scale, scaled)
    assert torch.isfinite(grad).all()


def test_tiny_boxes_far_apart_and_a_huge_box_have_finite_gradients() -> None:
    # What two of them cover of their hull is 1e-39, whose inverse is no finite float32.
    sizes = torch.tensor([[1e-20] * 3, [1e-13] * 3, [1e-13] * 3, [1e15, 1, 1]])
    centers = torch.tensor([[0.0] * 3, [0] * 3, [1] * 3, [1e18, 0, 0]])
    boxes = torch.cat((centers, sizes), 1).requires_grad_()
    values = pairwise_generalized_iou(boxes, boxes)
    (grad,) = torch.autograd.grad(values.sum(), boxes)
    assert torch.isfinite(values).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_overlaps_are_computed_in_float32(dtype: torch.dtype) -> None:
    boxes = (random_boxes(20) * 400).to(dtype)
    assert torch.equal(pairwise_iou(boxes, boxes), pairwise_iou(boxes.float(), boxes.float()))
    assert relative_l1(boxes, boxes.flip(0)).dtype == torch.float32


@pytest.mark.parametrize("position_dim", [1, 2, 3])
@pytest.mark.parametrize("function", [iou, generalized_iou, relative_l1])
def test_gradients(function: Callable[[Tensor, Tensor], Tensor], position_dim: int) -> None:
    a, b = random_boxes(8, position_dim), random_boxes(8, position_dim)
    near = b + 0.1 * torch.rand_like(b)
    inputs = torch.cat((a, near)).requires_grad_(), torch.cat((b, b)).requires_grad_()
    assert torch.autograd.gradcheck(function, inputs)


def test_relative_l1_by_hand() -> None:
    target = torch.tensor([[10.0, 20.0, 4.0, 8.0]])
    boxes = torch.tensor([[11.0, 16.0, 6.0, 8.0]])
    assert relative_l1(boxes, target).tolist() == [(1 / 4 + 4 / 8 + 2 / 4 + 0) / 4]
    assert_close(relative_l1(1000 * boxes, 1000 * target), relative_l1(boxes, target), 1e-6)


@pytest.mark.parametrize("position_dim", [1, 2, 3])
def test_encode_boxes_inverts_apply_deltas(position_dim: int) -> None:
    boxes, targets = random_boxes(30, position_dim), random_boxes(30, position_dim)
    assert_close(apply_deltas(boxes, encode_boxes(boxes, targets)), targets, 1e-14)
    moves = torch.randn(30, 2 * position_dim, dtype=torch.float64)
    assert_close(encode_boxes(boxes, apply_deltas(boxes, moves)), moves, 1e-13)
    assert torch.autograd.gradcheck(apply_deltas, (boxes.requires_grad_(), moves.requires_grad_()))


def test_apply_deltas_by_hand() -> None:
    boxes = torch.tensor([[10.0, 20.0, 2.0, 4.0]] * 2)
    moves = torch.tensor([[0.5, -1.0, 0.0, 2.0], [0.0, 0.0, 100.0, -100.0]])
    large, small = 2 * torch.e**4, 4 * torch.e**-4
    expected = torch.tensor([[11, 16, 2, 4 * torch.e**2], [10, 20, large, small]])
    assert_close(apply_deltas(boxes, moves), expected, 1e-4)


def test_apply_deltas_keeps_the_precision_of_the_boxes() -> None:
    boxes = torch.tensor([[300.1, 301.2, 2.0, 4.0]])
    moved = apply_deltas(boxes, torch.zeros(1, 4, dtype=torch.bfloat16))
    assert torch.equal(moved, boxes)


def test_no_boxes() -> None:
    none, boxes = torch.empty(0, 4), random_boxes(3, 2, torch.float32)
    assert pairwise_iou(none, boxes).shape == (0, 3)
    assert pairwise_generalized_iou(boxes, none).shape == (3, 0)
    assert relative_l1(none, none).shape == (0,)
    assert apply_deltas(none, none).shape == encode_boxes(none, none).shape == (0, 4)


BOXES = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
FLAT = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 0.0]])


@pytest.mark.parametrize(
    ("call", "argument", "came"),
    [
        (lambda: boxes_to_corners(torch.rand(2, 3)), "boxes", "[2, 3]"),
        (lambda: boxes_to_corners(torch.rand(2, 0)), "boxes", "[2, 0]"),
        (lambda: boxes_to_corners(torch.ones(2, 4, dtype=torch.int64)), "boxes", "int64"),
        (lambda: boxes_to_corners(torch.tensor(1.0)), "boxes", "[]"),
        (lambda: corners_to_boxes(torch.rand(2, 2), torch.rand(2, 3)), "high", "[2, 3]"),
        (lambda: pairwise_iou(BOXES, torch.rand(1, 6)), "b", "[1, 1, 6]"),
        (lambda: generalized_iou(torch.rand(1, 5), BOXES), "a", "[1, 5]"),
        (lambda: apply_deltas(BOXES, torch.rand(1, 2)), "deltas", "[1, 2]"),
        (lambda: encode_boxes(FLAT, FLAT), "boxes", "[1.0, 2.0, 3.0, 0.0] in row 1"),
        (lambda: encode_boxes(BOXES, -BOXES), "targets", "-4.0] in row 0"),
        (lambda: encode_boxes(BOXES, FLAT), "targets", "[2, 4]"),
    ],
)
def test_refusals(call: Callable[[], Any], argument: str, came: str) -> None:
    with refused(argument, came):
        call()
