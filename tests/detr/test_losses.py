"""Losses against their plain formulas, and summed over processes."""

import math
import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import assert_close
from test_matching import (
    PREDICTIONS,
    TARGETS,
    TARGETS_OF_OTHERS,
    WRONG_PREDICTIONS,
    WRONG_TARGETS,
    assert_refusal,
    plain_giou,
    random_images,
)
from torch import Tensor

from vicinal.detr.focal import sigmoid_focal_loss, varifocal_loss
from vicinal.detr.losses import DetectionLoss, LossParts, mean_objects
from vicinal.detr.matching import HungarianMatcher, Matches, assign_inside
from vicinal.detr.targets import Predictions, Targets

WEIGHTS: dict[str, Any] = {
    "class_weight": 1.5,
    "l1_weight": 0.7,
    "giou_weight": 2.5,
    "alpha": 0.3,
    "gamma": 1.5,
}
LOSS = DetectionLoss(**WEIGHTS)


def plain_focal(logit: float, present: bool, alpha: float, gamma: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    if present:
        return -alpha * math.pow(1 - p, gamma) * math.log(p)
    return -(1 - alpha) * math.pow(p, gamma) * math.log(1 - p)


def plain_varifocal(logit: float, quality: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    return -quality * (quality * math.log(p) + (1 - quality) * math.log(1 - p))


@given(
    st.lists(
        st.tuples(st.lists(st.floats(-15, 15), min_size=3, max_size=3), st.integers(-1, 2)),
        min_size=1,
        max_size=5,
    ),
    st.floats(0, 1),
    st.floats(0, 5),
)
def test_focal_loss_is_its_formula(
    rows: list[tuple[list[float], int]], alpha: float, gamma: float
) -> None:
    logits = torch.tensor([row for row, _ in rows], dtype=torch.float64)
    labels = torch.tensor([label for _, label in rows])
    expected = [
        sum(plain_focal(logit, column == label, alpha, gamma) for column, logit in enumerate(row))
        for row, label in rows
    ]
    loss = sigmoid_focal_loss(logits, labels, alpha, gamma)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


def test_focal_loss_without_focus_is_cross_entropy() -> None:
    logits, labels = torch.randn(20, 4, dtype=torch.float64), torch.randint(-1, 4, (20,))
    classes = torch.nn.functional.one_hot(labels + 1, 5)[:, 1:].double()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, classes, reduction="none"
    )
    assert_close(2 * sigmoid_focal_loss(logits, labels, 0.5, 0), entropy.sum(1), 1e-14)


def test_varifocal_loss_is_its_formula() -> None:
    logits, labels = torch.randn(20, 3, dtype=torch.float64), torch.randint(-1, 3, (20,))
    quality = torch.rand(20, dtype=torch.float64)
    expected = [
        sum(
            plain_varifocal(logit, score) if column == label else plain_focal(logit, False, 0.3, 2)
            for column, logit in enumerate(row)
        )
        for row, label, score in zip(
            logits.tolist(), labels.tolist(), quality.tolist(), strict=True
        )
    ]
    loss = varifocal_loss(logits, labels, quality, 0.3, 2.0)
    assert_close(loss, torch.tensor(expected, dtype=torch.float64), 1e-14)


def test_varifocal_loss_of_scores_as_good_as_they_should_be_has_no_gradient() -> None:
    quality = torch.rand(5, dtype=torch.float64)
    logits = torch.logit(quality)[:, None].requires_grad_()
    varifocal_loss(logits, torch.zeros(5).long(), quality).sum().backward()
    assert logits.grad is not None
    assert_close(logits.grad, torch.zeros_like(logits), 1e-15)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradients_of_the_losses_of_logits(gamma: float) -> None:
    logits = (3 * torch.randn(6, 3, dtype=torch.float64)).requires_grad_()
    labels = torch.tensor([-1, 0, 1, 2, -1, 1])
    quality = torch.rand(6, dtype=torch.float64)
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda x: sigmoid_focal_loss(x, labels, 0.25, gamma),
        lambda x: varifocal_loss(x, labels, quality, 0.25, gamma),
    ]
    for loss in losses:
        assert torch.autograd.gradcheck(loss, (logits,))
        assert torch.autograd.gradgradcheck(loss, (logits,))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_have_finite_losses_and_gradients(gamma: float, dtype: torch.dtype) -> None:
    row = [-1e30, -1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4, 1e30]
    logits = torch.tensor(row, dtype=dtype)[:, None].repeat(2, 1).requires_grad_()
    labels = torch.tensor([0] * 9 + [-1] * 9)
    for loss in (
        sigmoid_focal_loss(logits, labels, 0.25, gamma),
        varifocal_loss(logits, labels, torch.full((18,), 0.5), 0.25, gamma),
    ):
        assert loss.dtype == torch.float32
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(grad).all()


def plain_parts(
    predictions: Predictions, targets: Targets, matches: Matches, n_objects: float, quality: bool
) -> list[float]:
    logits, boxes, _ = (part.tolist() for part in predictions)
    objects, labels, _ = (part.tolist() for part in targets)
    answers = dict(zip(matches.prediction.tolist(), matches.target.tolist(), strict=True))
    classes = l1 = giou = 0.0
    for query, row in enumerate(logits):
        label = labels[answers[query]] if query in answers else -1
        for column, logit in enumerate(row):
            if quality and column == label:
                classes += plain_varifocal(logit, plain_iou(boxes[query], objects[answers[query]]))
            else:
                classes += plain_focal(logit, column == label, 0.3, 1.5)
    for query, target in answers.items():
        box, to = boxes[query], objects[target]
        size = to[len(to) // 2 :] * 2
        l1 += sum(abs(a - b) / s for a, b, s in zip(box, to, size, strict=True)) / len(to)
        giou += 1 - plain_giou(box, to)
    return [1.5 * classes / n_objects, 0.7 * l1 / n_objects, 2.5 * giou / n_objects]


def plain_iou(a: list[float], b: list[float]) -> float:
    dim = len(a) // 2
    shared = a_volume = b_volume = 1.0
    for axis in range(dim):
        low = max(a[axis] - a[dim + axis] / 2, b[axis] - b[dim + axis] / 2)
        high = min(a[axis] + a[dim + axis] / 2, b[axis] + b[dim + axis] / 2)
        shared *= max(high - low, 0)
        a_volume, b_volume = a_volume * a[dim + axis], b_volume * b[dim + axis]
    return shared / (a_volume + b_volume - shared)


def near_images(position_dim: int = 2) -> tuple[Predictions, Targets]:
    """Images of 6, 2, 0 and 5 predictions and 3, 4, 2 and 0 objects, of which many overlap."""
    predictions, targets = random_images([(6, 3), (2, 4), (0, 2), (5, 0)], position_dim)
    boxes = predictions.boxes.clone()
    boxes[:3], boxes[6:8] = targets.boxes[:3] * 1.05, targets.boxes[3:5] * 0.9
    return predictions._replace(boxes=boxes), targets


@pytest.mark.parametrize("position_dim", [1, 2, 3])
@pytest.mark.parametrize("quality", [False, True])
def test_parts_are_their_formulas(position_dim: int, quality: bool) -> None:
    predictions, targets = near_images(position_dim)
    matches = HungarianMatcher(**WEIGHTS)(predictions, targets)
    parts = DetectionLoss(**WEIGHTS, quality=quality)(predictions, targets, matches, 7.0)
    expected = plain_parts(predictions, targets, matches, 7.0, quality)
    assert_close(torch.stack(parts), torch.tensor(expected, dtype=torch.float64), 1e-13)


def test_parts_of_all_positions_inside_boxes() -> None:
    predictions, targets = near_images()
    assigned = assign_inside(predictions.boxes[:, :2], predictions.offsets, targets)
    matches = Matches.inside(assigned)
    assert len(set(matches.target.tolist())) < len(matches.target), "one object, many predictions"
    parts = LOSS(predictions, targets, matches, torch.tensor(3.0))
    expected = plain_parts(predictions, targets, matches, 3.0, False)
    assert_close(torch.stack(parts), torch.tensor(expected, dtype=torch.float64), 1e-13)


@pytest.mark.parametrize("quality", [False, True])
def test_gradients_of_all_parts(quality: bool) -> None:
    predictions, targets = near_images()
    matches = HungarianMatcher(**WEIGHTS)(predictions, targets)
    loss = DetectionLoss(**WEIGHTS, quality=quality)
    logits = predictions.logits.clone().requires_grad_()
    boxes = predictions.boxes.clone().requires_grad_()

    def parts(logits: Tensor, boxes: Tensor) -> LossParts:
        return loss(Predictions(logits, boxes, predictions.offsets), targets, matches, 4.0)

    assert torch.autograd.gradcheck(lambda x: tuple(parts(x, predictions.boxes)), (logits,))
    assert torch.autograd.gradcheck(lambda x: tuple(parts(predictions.logits, x)[1:]), (boxes,))
    (of_classes,) = torch.autograd.grad(parts(logits, boxes).classes, boxes, allow_unused=True)
    assert of_classes is None
    (grad,) = torch.autograd.grad(torch.stack(parts(logits, boxes)).sum(), boxes)
    unmatched = torch.ones(len(boxes), dtype=torch.bool)
    unmatched[matches.prediction] = False
    assert (grad[unmatched] == 0).all()
    assert (grad[~unmatched] != 0).all()


@pytest.mark.parametrize(
    "sizes", [[(0, 0)], [(4, 0)], [(0, 4)], [(3, 0), (0, 3)], [(1, 1)], [(1, 5)]]
)
@pytest.mark.parametrize("quality", [False, True])
def test_images_without_objects_or_queries(sizes: list[tuple[int, int]], quality: bool) -> None:
    predictions, targets = random_images(sizes)
    predictions.logits.requires_grad_()
    predictions.boxes.requires_grad_()
    matches = HungarianMatcher(**WEIGHTS)(predictions, targets)
    n_objects = mean_objects(len(targets.labels), torch.device("cpu"))
    parts = DetectionLoss(**WEIGHTS, quality=quality)(predictions, targets, matches, n_objects)
    expected = plain_parts(predictions, targets, matches, max(len(targets.labels), 1), quality)
    assert_close(torch.stack(parts), torch.tensor(expected, dtype=torch.float64), 1e-13)
    torch.stack(parts).sum().backward()
    for value in predictions[:2]:
        assert value.grad is not None
        assert torch.isfinite(value.grad).all()


def test_perfect_predictions_cost_next_to_nothing() -> None:
    _, targets = random_images([(0, 5), (0, 3)])
    logits = 40 * torch.nn.functional.one_hot(targets.labels, 3).double() - 20
    predictions = Predictions(logits, targets.boxes, targets.offsets)
    matches = HungarianMatcher()(predictions, targets)
    for quality in (False, True):
        parts = DetectionLoss(quality=quality)(predictions, targets, matches, 8.0)
        assert max(parts) < 1e-7


def test_half_precision_losses_are_computed_in_float32_under_autocast_too() -> None:
    predictions, targets = near_images()
    targets = targets._replace(boxes=targets.boxes.float())
    half = predictions._replace(
        logits=predictions.logits.bfloat16(), boxes=predictions.boxes.float()
    )
    matches = HungarianMatcher()(half, targets)
    expected = DetectionLoss()(half._replace(logits=half.logits.float()), targets, matches, 4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = HungarianMatcher()(half, targets)
        actual = DetectionLoss()(half, targets, matches, 4.0)
    assert all(map(torch.equal, again, matches))
    for part, value in zip(actual, expected, strict=True):
        assert part.dtype == torch.float32
        assert torch.equal(part, value)


def test_number_of_objects_is_at_least_one() -> None:
    cpu = torch.device("cpu")
    assert mean_objects(0, cpu).item() == 1
    assert mean_objects(12, cpu).item() == 12
    n = torch.tensor(3)
    assert mean_objects(n, cpu).item() == 3
    assert n.item() == 3


# Of two images one has 5 objects and one has 2; a process has either, or both.
SPLIT = random_images([(6, 5), (4, 2)])


def rows_of(images: list[int], offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of ``images`` of a ragged batch, and their offsets."""
    edges = offsets.tolist()
    rows = torch.cat([torch.arange(edges[image], edges[image + 1]) for image in images])
    return rows, torch.nn.functional.pad(offsets.diff()[images].cumsum(0), (1, 0))


def loss_and_gradient(images: list[int]) -> tuple[Tensor, Tensor]:
    """The loss of ``images``, and its gradient by what is added to all logits and boxes."""
    (logits, boxes, offsets), (objects, labels, object_offsets) = SPLIT
    rows, offsets = rows_of(images, offsets)
    object_rows, object_offsets = rows_of(images, object_offsets)
    added = torch.full((2,), 0.1, dtype=torch.float64, requires_grad=True)
    predictions = Predictions(logits[rows] + added[0], boxes[rows] + added[1], offsets)
    targets = Targets(objects[object_rows], labels[object_rows], object_offsets)
    matches = HungarianMatcher()(predictions, targets)
    n_objects = mean_objects(len(object_rows), torch.device("cpu"))
    loss = torch.stack(DetectionLoss()(predictions, targets, matches, n_objects)).sum()
    (grad,) = torch.autograd.grad(loss, added)
    return loss.detach(), grad


def train_apart(rank: int, directory: str) -> None:
    """One of two processes, with one image: saves its loss and gradient in ``directory``."""
    store, patience = f"file://{directory}/store", timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", store, patience, world_size=2, rank=rank)
    try:
        loss, grad = loss_and_gradient([rank])
        n = torch.tensor(6.0 * rank)
        means = [mean_objects(number, torch.device("cpu")).item() for number in (0, rank, n)]
        torch.save((loss, grad, [*means, n.item()]), f"{directory}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_average_to_the_loss_and_gradient_of_one(tmp_path: Path) -> None:
    loss, grad = loss_and_gradient([0, 1])
    spawning = multiprocessing.get_context("spawn")
    other = spawning.Process(target=train_apart, args=(1, str(tmp_path)), daemon=True)
    other.start()
    train_apart(0, str(tmp_path))
    other.join()
    assert other.exitcode == 0
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_close((results[0][0] + results[1][0]) / 2, loss, 1e-13)
    assert_close((results[0][1] + results[1][1]) / 2, grad, 1e-12)
    assert [numbers for _, _, numbers in results] == [[0.5, 0.5, 3, 0], [0.5, 0.5, 3, 6]]


ACCEPTED = HungarianMatcher()(PREDICTIONS, TARGETS)


@pytest.mark.parametrize(("predictions", "argument", "came"), WRONG_PREDICTIONS)
def test_refused_predictions(predictions: Any, argument: str, came: str) -> None:
    with pytest.raises(ValueError, match="expected") as refusal:
        LOSS(predictions, TARGETS, ACCEPTED, 4.0)
    assert_refusal(refusal, argument, came)


@pytest.mark.parametrize(("targets", "argument", "came"), [*WRONG_TARGETS, *TARGETS_OF_OTHERS])
def test_refused_targets(targets: Any, argument: str, came: str) -> None:
    with pytest.raises(ValueError, match="expected") as refusal:
        LOSS(PREDICTIONS, targets, ACCEPTED, 4.0)
    assert_refusal(refusal, argument, came)


@pytest.mark.parametrize(
    ("matches", "argument", "came"),
    [
        (tuple(ACCEPTED), "matches", "tuple"),
        (Matches(torch.tensor([7]), torch.tensor([0])), "matches.prediction", "7"),
        (Matches(torch.tensor([0]), torch.tensor([-1])), "matches.target", "-1"),
        (Matches(torch.tensor([0]), torch.tensor([1, 2])), "matches.target", "[2]"),
        (Matches(torch.tensor([0.0]), torch.tensor([1])), "matches.prediction", "float32"),
    ],
)
def test_refused_matches(matches: Any, argument: str, came: str) -> None:
    with pytest.raises(ValueError, match="expected") as refusal:
        LOSS(PREDICTIONS, TARGETS, matches, 4.0)
    assert_refusal(refusal, argument, came)


@pytest.mark.parametrize(
    ("logits", "labels", "argument", "came"),
    [
        (torch.rand(4), torch.zeros(4).long(), "logits", "[4]"),
        (torch.zeros(4, 3).long(), torch.zeros(4).long(), "logits", "int64"),
        (torch.rand(4, 3), torch.zeros(3).long(), "labels", "[3]"),
        (torch.rand(4, 3), torch.zeros(4), "labels", "float32"),
        (torch.rand(4, 3), torch.tensor([0, 1, -1, 3]), "labels", "from -1 to 3"),
        (torch.rand(4, 3), torch.tensor([0, 1, -2, 2]), "labels", "from -2 to 2"),
    ],
)
def test_refused_logits_and_labels(
    logits: Tensor, labels: Tensor, argument: str, came: str
) -> None:
    with pytest.raises(ValueError, match="expected") as refusal:
        sigmoid_focal_loss(logits, labels)
    assert_refusal(refusal, argument, came)


def test_refused_quality() -> None:
    with pytest.raises(ValueError, match="expected") as refusal:
        varifocal_loss(torch.rand(4, 3), torch.zeros(4).long(), torch.rand(4, 3))
    assert_refusal(refusal, "quality", "[4, 3]")
