"""The training loss: its terms against their formulas, and averaged over processes."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from detr_scenes import (
    CLASSES,
    OBJECTS,
    POINTS,
    PREDICTIONS,
    TARGETS,
    TARGETS_OF_OTHERS,
    WRONG_PREDICTIONS,
    WRONG_TARGETS,
    make_detector,
    make_pyramid,
    make_targets,
    perturbed,
    plain_focal,
    plain_giou,
    plain_varifocal,
    random_images,
    refused,
    spans,
)
from problems import assert_close
from started import light_context
from torch import Tensor

from vicinal.detr import (
    DetectionLoss,
    HungarianMatcher,
    LossTerms,
    Matches,
    Predictions,
    SetCriterion,
    Targets,
    assign_points_to_boxes,
    mean_object_count,
    sum_losses,
)

WEIGHTS: dict[str, Any] = {
    "class_weight": 1.5,
    "l1_weight": 0.7,
    "giou_weight": 2.5,
    "alpha": 0.3,
    "gamma": 1.5,
}
LOSS = DetectionLoss(**WEIGHTS)


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
def test_terms_match_their_formulas(position_dim: int, quality: bool) -> None:
    predictions, targets = near_images(position_dim)
    matches = HungarianMatcher(**WEIGHTS)(predictions, targets)
    parts = DetectionLoss(**WEIGHTS, quality=quality)(predictions, targets, matches, 7.0)
    expected = plain_parts(predictions, targets, matches, 7.0, quality)
    assert_close(torch.stack(parts), torch.tensor(expected, dtype=torch.float64), 1e-13)


def test_terms_of_one_to_many_assignment() -> None:
    predictions, targets = near_images()
    assigned = assign_points_to_boxes(predictions.boxes[:, :2], predictions.offsets, targets)
    matches = Matches.from_assignment(assigned)
    assert len(set(matches.target.tolist())) < len(matches.target), "one object, many predictions"
    parts = LOSS(predictions, targets, matches, torch.tensor(3.0))
    expected = plain_parts(predictions, targets, matches, 3.0, False)
    assert_close(torch.stack(parts), torch.tensor(expected, dtype=torch.float64), 1e-13)


@pytest.mark.parametrize("quality", [False, True])
def test_gradients_of_all_terms(quality: bool) -> None:
    predictions, targets = near_images()
    matches = HungarianMatcher(**WEIGHTS)(predictions, targets)
    loss = DetectionLoss(**WEIGHTS, quality=quality)
    logits = predictions.logits.clone().requires_grad_()
    boxes = predictions.boxes.clone().requires_grad_()

    def parts(logits: Tensor, boxes: Tensor) -> LossTerms:
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
    n_objects = mean_object_count(len(targets.labels), torch.device("cpu"))
    parts = DetectionLoss(**WEIGHTS, quality=quality)(predictions, targets, matches, n_objects)
    expected = plain_parts(predictions, targets, matches, max(len(targets.labels), 1), quality)
    assert_close(torch.stack(parts), torch.tensor(expected, dtype=torch.float64), 1e-13)
    torch.stack(parts).sum().backward()
    for value in predictions[:2]:
        assert value.grad is not None
        assert torch.isfinite(value.grad).all()


def test_perfect_predictions_have_almost_no_loss() -> None:
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
    assert mean_object_count(0, cpu).item() == 1
    assert mean_object_count(12, cpu).item() == 12
    n = torch.tensor(3)
    assert mean_object_count(n, cpu).item() == 3
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
    n_objects = mean_object_count(len(object_rows), torch.device("cpu"))
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
        cpu = torch.device("cpu")
        means = [mean_object_count(number, cpu).item() for number in (0, rank, n)]
        means += [mean_object_count(number, cpu, copies=2).item() for number in (0, 3)]
        torch.save((loss, grad, [*means, n.item()]), f"{directory}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_average_to_the_loss_and_gradient_of_one(tmp_path: Path) -> None:
    loss, grad = loss_and_gradient([0, 1])
    other = light_context().Process(target=train_apart, args=(1, str(tmp_path)), daemon=True)
    other.start()
    train_apart(0, str(tmp_path))
    other.join()
    assert other.exitcode == 0
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert_close((results[0][0] + results[1][0]) / 2, loss, 1e-13)
    assert_close((results[0][1] + results[1][1]) / 2, grad, 1e-12)
    shared = [1, 3]  # what both processes count is counted once
    expected = [[0.5, 0.5, 3, *shared, 0], [0.5, 0.5, 3, *shared, 6]]
    assert [numbers for _, _, numbers in results] == expected


ACCEPTED = HungarianMatcher()(PREDICTIONS, TARGETS)


@pytest.mark.parametrize(("predictions", "argument", "came"), WRONG_PREDICTIONS)
def test_refused_predictions(predictions: Any, argument: str, came: str) -> None:
    with refused(argument, came):
        LOSS(predictions, TARGETS, ACCEPTED, 4.0)


@pytest.mark.parametrize(("targets", "argument", "came"), [*WRONG_TARGETS, *TARGETS_OF_OTHERS])
def test_refused_targets(targets: Any, argument: str, came: str) -> None:
    with refused(argument, came):
        LOSS(PREDICTIONS, targets, ACCEPTED, 4.0)


@pytest.mark.parametrize(
    ("matches", "argument", "came"),
    [
        (tuple(ACCEPTED), "matches", "tuple"),
        (Matches(torch.tensor([7]), torch.tensor([0])), "matches.prediction", "7"),
        (Matches(torch.tensor([0]), torch.tensor([-1])), "matches.target", "-1"),
        (Matches(torch.tensor([0]), torch.tensor([1, 2])), "matches.target", "[2]"),
        (Matches(torch.tensor([0.0]), torch.tensor([1])), "matches.prediction", "float32"),
        (Matches(torch.tensor([0, 0]), torch.tensor([0, 0])), "matches.prediction", "twice"),
        (Matches(torch.tensor([0]), TARGETS.offsets[-1:] - 1), "matches", "two images"),
    ],
)
def test_refused_matches(matches: Any, argument: str, came: str) -> None:
    with refused(argument, came):
        LOSS(PREDICTIONS, TARGETS, matches, 4.0)


def inside_by_hand(positions: Tensor, offsets: Tensor, targets: Targets) -> Matches:
    """Each position with the smallest object that contains it."""
    pairs = []
    for rows, objects in zip(spans(offsets), spans(targets.offsets), strict=True):
        for row in range(rows.start, rows.stop):
            around = [
                target
                for target in range(objects.start, objects.stop)
                if all(
                    abs(float(x - center)) <= float(size) / 2
                    for x, center, size in zip(
                        positions[row], *targets.boxes[target].chunk(2), strict=True
                    )
                )
            ]
            if around:
                dim = positions.shape[1]
                smallest = min(around, key=lambda target: float(targets.boxes[target, dim:].prod()))
                pairs.append((row, smallest))
    return Matches(*torch.tensor(pairs, dtype=torch.int64).view(-1, 2).t())


@pytest.mark.parametrize("position_dim", [2, 3])
def test_layers_are_matched_one_to_one_and_candidates_one_to_many(position_dim: int) -> None:
    matcher, loss = HungarianMatcher(giou_weight=1.0), DetectionLoss(l1_weight=3.0)
    candidate_loss = DetectionLoss(class_weight=0.5)
    output = perturbed(make_detector(position_dim))(make_pyramid(POINTS, position_dim))
    targets = make_targets(OBJECTS, position_dim)
    candidates = output.selection.candidates
    inside = inside_by_hand(output.selection.positions, candidates.offsets, targets)
    assert len(inside.target) > len(inside.target.unique()) > 1  # many to one
    parts = {"candidates": candidate_loss(candidates, targets, inside, len(inside.target))}
    for index, predictions in enumerate(output.layers):
        matches = matcher(predictions, targets)
        assert len(matches.target) == len(matches.target.unique())
        parts[f"layer {index}"] = loss(predictions, targets, matches, sum(OBJECTS))
    losses = SetCriterion(matcher, loss, candidate_loss)(output, targets)
    assert list(losses) == [
        f"{stage} {part}"
        for stage in ("candidates", "layer 0", "layer 1")
        for part in ("classes", "l1", "giou")
    ]
    for stage, part in parts.items():
        for name, value in part._asdict().items():
            assert_close(losses[f"{stage} {name}"], value, 1e-12)
    assert_close(
        sum_losses(losses), sum(losses.values(), torch.zeros((), dtype=torch.float64)), 1e-12
    )


def test_the_candidate_loss_defaults_to_that_of_layers() -> None:
    loss = DetectionLoss(class_weight=0.25)
    assert SetCriterion(loss=loss).candidate_loss is loss
    other = DetectionLoss()
    assert SetCriterion(loss=loss, candidate_loss=other).candidate_loss is other


def test_invalid_targets_and_outputs_are_refused_by_name() -> None:
    output, loss = perturbed(make_detector())(make_pyramid((9, 8))), SetCriterion()
    targets = make_targets((2, 1))
    for argument, wrong in {
        "targets": tuple(targets),
        "targets.offsets": make_targets((2, 1, 1)),
        "targets.labels": targets._replace(labels=targets.labels + CLASSES),
        "targets.boxes": targets._replace(boxes=-targets.boxes),
    }.items():
        with refused(argument):
            loss(output, wrong)  # type: ignore[arg-type]
    with refused("output"):
        loss(output.layers, targets)  # type: ignore[arg-type]
