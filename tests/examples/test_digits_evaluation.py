"""Average precision of cases that can be worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from examples.digits.evaluation import average_precision
from examples.digits.scenes import Batch
from vicinal.detr import Detections

BOXES = torch.tensor(
    [[50.0, 60.0, 20.0, 40.0], [200.0, 300.0, 30.0, 10.0], [30.0, 400.0, 24.0, 24.0]]
)
LABELS = torch.tensor([0, 3, 3])
OFFSETS = torch.tensor([0, 1, 1, 3])  # the image in the middle holds no digit
DOWN = torch.tensor([1.0, 0.0, 0.0, 0.0])


def targets(boxes: Tensor = BOXES, labels: Tensor = LABELS, offsets: Tensor = OFFSETS) -> Batch:
    return Batch(torch.zeros(0, 3).long(), torch.zeros(0), boxes, labels, offsets)


def found(
    boxes: Tensor,
    scores: list[float] | None = None,
    labels: Tensor = LABELS,
    offsets: Tensor = OFFSETS,
) -> Detections:
    scored = torch.tensor(scores or [0.9] * len(boxes))
    return Detections(boxes, labels, scored, torch.arange(len(boxes)), offsets)


def test_boxes_that_fit_make_one() -> None:
    assert average_precision([found(BOXES)], [targets()]) == pytest.approx((1, 1, 1))


def test_boxes_shifted_by_a_fifth_of_their_height_are_found_at_50_percent_only() -> None:
    shifted = BOXES + 0.2 * BOXES[:, 2:3] * DOWN  # overlap 0.8 / 1.2
    result = average_precision([found(shifted)], [targets()])
    assert result == pytest.approx((0.4, 1, 0))  # 0.50, 0.55, 0.60 and 0.65 of ten


def test_rows_are_not_columns() -> None:
    shifted = BOXES[:1] + torch.tensor([0.0, 10.0, 0.0, 0.0])  # a quarter of its width: 0.6
    one = torch.tensor([0, 1])
    result = average_precision(
        [found(shifted, labels=LABELS[:1], offsets=one)], [targets(BOXES[:1], LABELS[:1], one)]
    )
    assert result == pytest.approx((0.3, 1, 0))


def test_boxes_elsewhere_or_of_another_digit_find_nothing() -> None:
    assert average_precision([found(BOXES + 100 * DOWN)], [targets()]) == (0, 0, 0)
    assert average_precision([found(BOXES, labels=LABELS + 1)], [targets()]) == (0, 0, 0)


def test_no_detections_find_nothing() -> None:
    nothing = found(BOXES[:0], labels=LABELS[:0], offsets=torch.zeros(4).long())
    assert average_precision([nothing], [targets()]) == (0, 0, 0)


def test_without_digits_there_is_no_precision() -> None:
    nowhere = targets(BOXES[:0], LABELS[:0], torch.zeros(4).long())
    assert all(math.isnan(value) for value in average_precision([found(BOXES)], [nowhere]))
    assert all(math.isnan(value) for value in average_precision([], []))


@pytest.mark.parametrize(("score", "expected"), [(0.5, 1), (0.95, 0.5)])
def test_a_false_detection_counts_where_it_ranks_above_a_true_one(
    score: float, expected: float
) -> None:
    """On the image without digits: one of two detections of a 0, of which there is one."""
    boxes = torch.cat((BOXES[:1], BOXES[:1]))
    labels = torch.zeros(2).long()
    offsets = torch.tensor([0, 1, 2])
    result = average_precision(
        [found(boxes, [0.9, score], labels, offsets)],
        [targets(BOXES[:1], LABELS[:1], torch.tensor([0, 1, 1]))],
    )
    assert result == pytest.approx((expected,) * 3)


def test_batches_are_taken_together() -> None:
    """A detection's rank is among those of all batches."""
    parts = [targets(BOXES[:1], LABELS[1:2], torch.tensor([0, 1])) for _ in range(2)]
    one = torch.tensor([0, 1])
    ours = [
        found(BOXES[:1] + 100 * DOWN, [0.9], LABELS[1:2], one),
        found(BOXES[:1], [0.8], LABELS[1:2], one),
    ]
    # One of two found, ranking second: precision 1/2 up to recall 1/2, which is 51 of 101 levels.
    assert average_precision(ours, parts) == pytest.approx((0.5 * 51 / 101,) * 3)


def test_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    average_precision([found(BOXES)], [targets()])
    assert capsys.readouterr() == ("", "")


def test_refuses_other_numbers_of_images() -> None:
    with pytest.raises(ValueError, match=r"^detections: "):
        average_precision([found(BOXES)], [targets(offsets=torch.tensor([0, 3]))])
    with pytest.raises(ValueError, match="argument"):
        average_precision([], [targets()])
