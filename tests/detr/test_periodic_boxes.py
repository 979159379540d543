"""Boxes on maps with periodic axes: a scene moved across the seam gives the same numbers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from detr_scenes import (
    EMBED,
    HEADS,
    array,
    as_array,
    make_decoder,
    perturbed,
    random_images,
    refused,
)
from problems import assert_close
from torch import Tensor, nn

from vicinal import FeaturePyramid, SparseDeformableAttention, SparseNeighborhoodAttentionBlock
from vicinal.detr import (
    DetectionLoss,
    DetectorOutput,
    HungarianMatcher,
    ObjectQueries,
    Predictions,
    QuerySelectionOutput,
    SetCriterion,
    Targets,
    apply_deltas,
    assign_points_to_boxes,
    box_period,
    encode_boxes,
    generalized_iou,
    iou,
    pairwise_generalized_iou,
    pairwise_iou,
    relative_l1,
)

PERIOD = (16.0, math.inf)


def moved(boxes: Tensor, shift: float = -3.0) -> Tensor:
    """``boxes`` moved along the periodic axis, with centers in [0, 16)."""
    center = (boxes[:, :1] + shift) % PERIOD[0]
    return torch.cat((center, boxes[:, 1:]), 1)


def scene(seed: int = 0) -> tuple[Predictions, Targets]:
    """Boxes around the cell 3, which `moved` has on both sides of the seam."""
    return random_images([(9, 4), (7, 3)], seed=seed)


@pytest.mark.parametrize("compare", [pairwise_iou, pairwise_generalized_iou])
def test_overlaps_are_those_of_a_scene_far_from_the_seam(compare: Callable[..., Tensor]) -> None:
    predictions, targets = scene()
    expected = compare(predictions.boxes, targets.boxes)
    a, b = moved(predictions.boxes), moved(targets.boxes)
    assert_close(compare(a, b, period=PERIOD), expected, 1e-12)
    assert_close(compare(b, a, period=PERIOD), expected.t(), 1e-12)
    assert (compare(a, b) - expected).abs().max() > 0.1
    assert torch.equal(compare(a, b, period=(None, None)), compare(a, b))


@pytest.mark.parametrize("turns", [-2, -1, 1, 3])
def test_whole_turns_change_nothing(turns: int) -> None:
    predictions, targets = scene()
    a, b = predictions.boxes[:7], targets.boxes
    shift = torch.tensor([turns * PERIOD[0], 0, 0, 0], dtype=a.dtype)
    for compare in (iou, generalized_iou, relative_l1, encode_boxes):
        assert_close(compare(a + shift, b, period=PERIOD), compare(a, b), 1e-12)
        assert_close(compare(a, b + shift, period=PERIOD), compare(a, b), 1e-12)


@pytest.mark.parametrize("widths", [(12, 12), (15, 15), (10, 4), (16, 6), (16, 16), (20, 9)])
def test_wide_boxes_meet_on_both_sides_of_an_axis(widths: tuple[int, int]) -> None:
    """Against the cells that both cover, half a cell wide."""
    places = (torch.arange(32) + 0.5) / 2
    for shift in range(16):
        boxes = torch.tensor([[2.0, 1.0, widths[0], 2.0], [2.0 + shift, 1.0, widths[1], 2.0]])
        distances = (places - boxes[:, :1] + 8) % 16 - 8
        a, b = distances.abs() < boxes[:, 2:3] / 2
        expected = (a & b).sum() / (a | b).sum()
        assert_close(iou(boxes[0], boxes[1], period=PERIOD), expected, 1e-6)
        generalized = generalized_iou(boxes[0], boxes[1], period=PERIOD)
        assert expected - 1 <= generalized <= expected + 1e-6
        if (a | b).all():  # they enclose no more than the axis
            assert_close(generalized, expected, 1e-6)


def test_distances_and_deltas_take_the_short_way() -> None:
    a, b = torch.tensor([[15.0, 4, 2, 2]]), torch.tensor([[1.0, 4, 2, 4]])
    assert relative_l1(a, b, period=PERIOD).item() == (2 / 2 + 2 / 4) / 4
    deltas = encode_boxes(a, b, period=PERIOD)
    assert_close(deltas, torch.tensor([[1, 0, 0, math.log(2)]]), 1e-6)
    assert_close(apply_deltas(a, deltas), torch.tensor([[17.0, 4, 2, 4]]), 1e-6)
    b.requires_grad_()
    (grad,) = torch.autograd.grad(relative_l1(b, a, period=PERIOD).sum(), b)
    assert grad[0, 0] > 0  # beyond the seam, so towards it is down


def test_matches_and_losses_are_those_of_a_scene_far_from_the_seam() -> None:
    predictions, targets = scene()
    expected = HungarianMatcher()(predictions, targets)
    ours = predictions._replace(boxes=moved(predictions.boxes))
    theirs = targets._replace(boxes=moved(targets.boxes))
    matches = HungarianMatcher()(ours, theirs, period=PERIOD)
    assert torch.equal(matches.prediction, expected.prediction)
    assert torch.equal(matches.target, expected.target)
    for loss in (DetectionLoss(), DetectionLoss(quality=True)):
        got = loss(ours, theirs, matches, 7.0, period=PERIOD)
        for value, wanted in zip(got, loss(predictions, targets, expected, 7.0), strict=True):
            assert_close(value, wanted, 1e-12)


def test_assignments_are_those_of_a_scene_far_from_the_seam() -> None:
    _, targets = scene()
    generator = torch.Generator().manual_seed(1)
    positions = 6 * torch.rand(60, 2, generator=generator, dtype=torch.float64)
    offsets = torch.tensor([0, 40, 60])
    expected = assign_points_to_boxes(positions, offsets, targets)
    assert (expected >= 0).any()
    ours = torch.cat(((positions[:, :1] - 3) % PERIOD[0], positions[:, 1:]), 1)
    theirs = targets._replace(boxes=moved(targets.boxes))
    assert torch.equal(assign_points_to_boxes(ours, offsets, theirs, period=PERIOD), expected)
    assert not torch.equal(assign_points_to_boxes(ours, offsets, theirs), expected)


CROSS_ATTENTION: dict[str, Callable[[], nn.Module]] = {
    "deformable": lambda: SparseDeformableAttention(EMBED, HEADS, 1, 2),
    "neighborhood": lambda: SparseNeighborhoodAttentionBlock(EMBED, HEADS, 1, (5,)),
}


def ring(shift: int, values: Tensor, *, is_periodic: bool = True) -> FeaturePyramid:
    """``[16, 8]`` cells, moved by ``shift`` along the first axis."""
    cells = torch.cartesian_prod(torch.arange(1), torch.arange(16), torch.arange(8))
    cells[:, 1] = (cells[:, 1] + shift) % 16
    axes = (0,) if is_periodic else ()
    return FeaturePyramid.from_points(cells, values, (16, 8), 1, strides=1, periodic_axes=axes)


def queries_at(boxes: list[list[float]], shift: float = 0) -> ObjectQueries:
    generator = torch.Generator().manual_seed(1)
    n = len(boxes)
    embeddings = torch.randn(n, EMBED, dtype=torch.float64, generator=generator)
    centers = torch.tensor(boxes, dtype=torch.float64)
    centers[:, 0] += shift
    return ObjectQueries(embeddings, centers, torch.zeros(n).long(), torch.tensor([0, n]))


@pytest.mark.parametrize("kind", CROSS_ATTENTION)
def test_a_decoder_takes_boxes_beyond_the_seam(kind: str) -> None:
    values = torch.randn(128, EMBED, dtype=torch.float64)
    pyramid = ring(0, values)
    assert box_period(pyramid) == PERIOD
    assert box_period(ring(0, values, is_periodic=False)) is None
    queries = queries_at([[15.5, 4, 2, 2], [1.0, 3, 3, 3]])
    turn = torch.tensor([[16.0, 0, 0, 0], [-32, 0, 0, 0]], dtype=torch.float64)
    decoder = perturbed(make_decoder(attention=CROSS_ATTENTION[kind]))
    ours, theirs = (
        decoder(queries._replace(boxes=boxes), pyramid)[0]
        for boxes in (queries.boxes + turn, queries.boxes)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one.logits, other.logits, 1e-12)
        assert_close(one.boxes, other.boxes, 1e-12)


@pytest.mark.parametrize("kind", CROSS_ATTENTION)
def test_a_decoder_sees_the_same_on_both_sides_of_the_seam(kind: str) -> None:
    """One query, since the attention among queries has no seam."""
    values = torch.randn(128, EMBED, dtype=torch.float64)
    decoder = perturbed(make_decoder(attention=CROSS_ATTENTION[kind]))
    found = {
        shift: decoder(queries_at([[0.25, 4, 2, 2]], shift), ring(shift, values))[0]
        for shift in (0, 8)
    }
    for at_seam, far_from_it in zip(found[0], found[8], strict=True):
        assert_close(at_seam.logits, far_from_it.logits, 1e-12)
        assert_close(moved(at_seam.boxes, 8), moved(far_from_it.boxes, 0), 1e-12)
    plain, _ = decoder(queries_at([[0.25, 4, 2, 2]]), ring(0, values, is_periodic=False))
    assert (plain[0].logits - found[0][0].logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    "period", [(16.0,), 16.0, (16.0, 0.0), (16.0, -1), ("16", 2), (math.nan, 2)]
)
def test_wrong_periods_are_refused(period: Any) -> None:
    boxes = random_images([(3, 3)])[1].boxes
    for compare in (iou, generalized_iou, pairwise_iou, relative_l1, encode_boxes):
        with refused("period"):
            compare(boxes, boxes, period=period)


def test_arrays_of_numpy_are_taken() -> None:
    predictions, targets = scene()
    a, b = predictions.boxes[:7], targets.boxes
    for compare in (iou, generalized_iou, pairwise_iou, relative_l1, encode_boxes):
        got = compare(array(a), array(b), period=as_array(PERIOD))
        assert torch.equal(got, compare(a, b, period=PERIOD))


def test_a_criterion_uses_the_period_of_the_map() -> None:
    """The losses of a whole output, with predictions moved by a turn."""
    predictions, targets = random_images([(6, 3)])
    cells = torch.tensor([[0, x, 2] for x in range(6)])
    losses = []
    for turns in (0, 1):
        pyramid = FeaturePyramid.from_points(
            cells, torch.randn(6, EMBED).double(), (16, 8), 1, strides=1, periodic_axes=(0,)
        )
        shift = torch.tensor([16.0 * turns, 0, 0, 0])
        found = predictions._replace(boxes=predictions.boxes + shift)
        queries = ObjectQueries(pyramid.values, found.boxes, pyramid.levels, found.offsets)
        rows = torch.arange(6)
        positions = pyramid.positions(torch.float64)
        selection = QuerySelectionOutput(queries, found, positions, rows, rows)
        losses.append(
            SetCriterion()(DetectorOutput(pyramid, selection, [found], [queries]), targets)
        )
    for name, value in losses[0].items():
        assert_close(losses[1][name], value, 1e-12)
