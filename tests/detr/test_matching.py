"""Matching against all permutations, assignment to boxes against loops, and refusals."""

import itertools
import math
import sys
from typing import Any

import pytest
import torch
from detr_scenes import (
    CLASSES,
    PREDICTIONS,
    TARGETS,
    TARGETS_OF_OTHERS,
    WRONG_PREDICTIONS,
    WRONG_TARGETS,
    changed,
    plain_giou,
    random_images,
    refused,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vicinal.detr import (
    HungarianMatcher,
    Matches,
    Predictions,
    Targets,
    assign_points_to_boxes,
    matching,
)

MATCHER = HungarianMatcher(class_weight=1.5, l1_weight=0.7, giou_weight=2.5, alpha=0.3, gamma=1.5)


def plain_cost(logit: float, box: list[float], target: list[float]) -> float:
    p = 1 / (1 + math.exp(-logit))
    focal = -0.3 * math.pow(1 - p, 1.5) * math.log(p) + 0.7 * math.pow(p, 1.5) * math.log(1 - p)
    size = target[len(target) // 2 :] * 2
    off = [abs(a - b) / s for a, b, s in zip(box, target, size, strict=True)]
    return 1.5 * focal + 0.7 * sum(off) / len(off) - 2.5 * plain_giou(box, target)


def best_by_permutations(predictions: Predictions, targets: Targets) -> set[tuple[int, int]]:
    """The pairs of least cost, over all ways to pair each image's rows."""
    logits, boxes, offsets = (part.tolist() for part in predictions)
    objects, labels, object_offsets = (part.tolist() for part in targets)
    found: set[tuple[int, int]] = set()
    for queries, rows in zip(
        itertools.starmap(range, itertools.pairwise(offsets)),
        itertools.starmap(range, itertools.pairwise(object_offsets)),
        strict=True,
    ):
        few, many = sorted((queries, rows), key=len)
        ways = [
            [(a, b) if few is queries else (b, a) for a, b in zip(few, way, strict=True)]
            for way in itertools.permutations(many, len(few))
        ]
        costs = [
            sum(plain_cost(logits[q][labels[t]], boxes[q], objects[t]) for q, t in way)
            for way in ways
        ]
        found |= set(ways[costs.index(min(costs))])
    return found


def pairs(matches: Matches) -> list[tuple[int, int]]:
    return list(zip(matches.prediction.tolist(), matches.target.tolist(), strict=True))


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_matches_cost_least_of_all_permutations(
    sizes: list[tuple[int, int]], position_dim: int, seed: int
) -> None:
    predictions, targets = random_images(sizes, position_dim, seed)
    found = pairs(MATCHER(predictions, targets))
    assert len(found) == len(set(found)) == sum(min(n, m) for n, m in sizes)
    assert set(found) == best_by_permutations(predictions, targets)
    assert [prediction for prediction, _ in found] == sorted(prediction for prediction, _ in found)


@pytest.mark.parametrize(
    "sizes",
    [[(0, 0)], [(5, 0)], [(0, 5)], [(0, 3), (3, 0), (0, 0)], [(1, 1)], [(1, 4)], [(2, 1), (1, 6)]],
)
def test_images_without_objects_or_queries_and_with_one_query(sizes: list[tuple[int, int]]) -> None:
    predictions, targets = random_images(sizes)
    matches = MATCHER(predictions, targets)
    assert matches.prediction.dtype == matches.target.dtype == torch.int64
    assert set(pairs(matches)) == best_by_permutations(predictions, targets)


def test_no_images() -> None:
    predictions, targets = random_images([])
    assert pairs(MATCHER(predictions, targets)) == []


def test_good_predictions_are_matched_with_their_objects() -> None:
    _, targets = random_images([(0, 20), (0, 30)])
    shuffled = torch.cat((torch.randperm(20), 20 + torch.randperm(30)))
    logits = torch.nn.functional.one_hot(targets.labels[shuffled], CLASSES).double()
    predictions = Predictions(logits, targets.boxes[shuffled] + 1e-3, targets.offsets)
    matches = HungarianMatcher()(predictions, targets)
    assert torch.equal(matches.target, shuffled)


def test_the_class_decides_between_equal_boxes() -> None:
    targets = Targets(torch.tensor([[5.0, 5, 2, 2]]), torch.tensor([1]), torch.tensor([0, 1]))
    logits = torch.tensor([[4.0, -4.0, 0.0], [-4.0, -3.0, 0.0], [4.0, -3.5, 0.0]])
    predictions = Predictions(logits, targets.boxes.expand(3, 4), torch.tensor([0, 3]))
    assert pairs(HungarianMatcher()(predictions, targets)) == [(1, 0)]


def test_costs_are_computed_for_pairs_of_the_same_image_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = []

    def counting(a: Tensor, b: Tensor, **_: Any) -> Tensor:
        shapes.append(a.shape)
        return a.new_zeros(len(a))

    monkeypatch.setattr(matching, "generalized_iou", counting)
    MATCHER(*random_images([(7, 3)] * 50))
    assert shapes == [(50 * 7 * 3, 4)]


def test_matches_have_no_gradient() -> None:
    predictions, targets = random_images([(4, 2)])
    with torch.enable_grad():
        matches = MATCHER(
            predictions._replace(boxes=predictions.boxes.clone().requires_grad_()), targets
        )
    assert not matches.prediction.requires_grad


def test_matches_are_the_same_in_a_transform() -> None:
    predictions, targets = random_images([(0, 2), (4, 2), (3, 0)])

    def loss(logits: Tensor) -> tuple[Tensor, Matches]:
        matches = HungarianMatcher()(predictions._replace(logits=logits), targets)
        return logits[matches.prediction].sum(), matches

    _, found = torch.func.grad(loss, has_aux=True)(predictions.logits)
    assert pairs(found) == pairs(HungarianMatcher()(predictions, targets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_any_precision_and_offsets_of_any_integer_type(dtype: torch.dtype) -> None:
    predictions, targets = random_images([(6, 3), (4, 5)])
    half = predictions._replace(
        logits=predictions.logits.to(dtype),
        boxes=predictions.boxes.float(),
        offsets=predictions.offsets.int(),
    )
    wide = predictions._replace(logits=half.logits.double(), boxes=half.boxes.double())
    expected = MATCHER(wide, targets)
    assert pairs(MATCHER(half, targets._replace(labels=targets.labels.int()))) == pairs(expected)


def test_logits_of_any_size_give_finite_costs() -> None:
    predictions, targets = random_images([(6, 3)])
    huge = predictions._replace(logits=predictions.logits.float() * 1e30)
    assert len(pairs(HungarianMatcher(gamma=0.5)(huge, targets))) == 3


def test_boxes_too_far_for_a_finite_cost_are_refused() -> None:
    predictions, targets = random_images([(2, 2)])
    far = predictions._replace(boxes=(predictions.boxes * 3e37).float())
    targets = targets._replace(boxes=(targets.boxes / 1e3).float())
    with pytest.raises(ValueError, match="predictions: expected boxes near enough"):
        MATCHER(far, targets)


def test_without_scipy_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"pip install 'vicinal\[detr\]'"):
        MATCHER(*random_images([(2, 2)]))


def plain_assignment(positions: Tensor, offsets: Tensor, targets: Targets) -> list[int]:
    dim, boxes = positions.shape[1], targets.boxes.tolist()
    edges = zip(
        itertools.pairwise(offsets.tolist()),
        itertools.pairwise(targets.offsets.tolist()),
        strict=True,
    )
    found = []
    for (start, stop), (first, last) in edges:
        for position in positions[start:stop].tolist():
            holding = [
                (math.prod(boxes[row][dim:]), row)
                for row in range(first, last)
                if all(
                    center - size / 2 <= x <= center + size / 2
                    for x, center, size in zip(
                        position, boxes[row][:dim], boxes[row][dim:], strict=True
                    )
                )
            ]
            found.append(min(holding)[1] if holding else -1)
    return found


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(0, 1000),
)
def test_points_are_assigned_to_the_smallest_box_that_contains_them(
    sizes: list[tuple[int, int]], position_dim: int, seed: int
) -> None:
    predictions, targets = random_images(sizes, position_dim, seed)
    # On halves, so that many positions lie on borders and many boxes are equal in volume.
    positions = (predictions.boxes[:, :position_dim] * 2).round() / 2
    targets = targets._replace(boxes=(targets.boxes * 2).ceil() / 2)
    assigned = assign_points_to_boxes(positions, predictions.offsets, targets)
    assert assigned.dtype == torch.int64
    assert assigned.tolist() == plain_assignment(positions, predictions.offsets, targets)


def test_borders_are_inside_and_the_first_of_equal_boxes_is_chosen() -> None:
    boxes = torch.tensor([[4.0, 4, 8, 8], [2, 2, 2, 2], [4, 2, 2, 2], [2, 2, 2, 2]])
    targets = Targets(boxes, torch.zeros(4, dtype=torch.int64), torch.tensor([0, 4]))
    positions = torch.tensor([[0.0, 0], [1, 1], [3, 2], [5, 3], [8, 8], [8.001, 8], [2, 3.5]])
    assigned = assign_points_to_boxes(positions, torch.tensor([0, 7]), targets)
    assert assigned.tolist() == [0, 1, 1, 2, 0, -1, 0]


def test_the_smallest_box_is_that_of_least_volume() -> None:
    boxes = torch.tensor([[5.0, 5, 3, 3], [5, 5, 6, 1]])
    targets = Targets(boxes, torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2]))
    assert (
        assign_points_to_boxes(torch.tensor([[5.0, 5]]), torch.tensor([0, 1]), targets).item() == 1
    )


def test_points_are_assigned_to_boxes_of_their_own_image_only() -> None:
    boxes = torch.tensor([[4.0, 8.0]]).repeat(2, 1)
    targets = Targets(boxes, torch.zeros(2, dtype=torch.int64), torch.tensor([0, 0, 1, 2]))
    positions = torch.full((6, 1), 3.0)
    assigned = assign_points_to_boxes(positions, torch.tensor([0, 2, 3, 6]), targets)
    assert assigned.tolist() == [-1, -1, 0, 1, 1, 1]


@pytest.mark.parametrize(("predictions", "argument", "came"), WRONG_PREDICTIONS)
def test_refused_predictions(predictions: Any, argument: str, came: str) -> None:
    with refused(argument, came):
        MATCHER(predictions, TARGETS)


@pytest.mark.parametrize(
    ("targets", "argument", "came"),
    [
        *WRONG_TARGETS,
        *TARGETS_OF_OTHERS,
        (changed(TARGETS, "labels", 3, 3), "targets.labels", "to 3"),
    ],
)
def test_refused_targets(targets: Any, argument: str, came: str) -> None:
    with refused(argument, came):
        MATCHER(PREDICTIONS, targets)


@pytest.mark.parametrize(("targets", "argument", "came"), [*WRONG_TARGETS, *TARGETS_OF_OTHERS])
def test_refused_targets_of_positions(targets: Any, argument: str, came: str) -> None:
    with refused(argument, came):
        assign_points_to_boxes(torch.rand(5, 2), torch.tensor([0, 2, 5]), targets)


@pytest.mark.parametrize(
    ("positions", "offsets", "argument", "came"),
    [
        (torch.rand(5), [0, 2, 5], "positions", "[5]"),
        (torch.ones(5, 2).long(), [0, 2, 5], "positions", "int64"),
        (torch.full((5, 2), torch.nan), [0, 2, 5], "positions", "in row 0"),
        (torch.rand(5, 2), [0, 2, 4], "offsets", "to 4"),
        (torch.rand(5, 2), [0, 5], "targets.offsets", "2 images"),
        (torch.rand(5, 3), [0, 2, 5], "targets.boxes", "[4, 4]"),
    ],
)
def test_refused_positions(positions: Tensor, offsets: list[int], argument: str, came: str) -> None:
    with refused(argument, came):
        assign_points_to_boxes(positions, torch.tensor(offsets), TARGETS)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("class_weight", -1.0),
        ("l1_weight", math.inf),
        ("giou_weight", math.nan),
        ("alpha", 1.5),
        ("gamma", "2"),
    ],
)
def test_refused_weights(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{argument}: expected a finite number"):
        HungarianMatcher(**{argument: value})
