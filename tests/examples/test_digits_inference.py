"""What a detector finds on canvases, in the canvas's own cells, and the points it attends to."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_digits_scenes import strokes

from examples.digits.inference import attention_records, confident_rows, detect, evaluate
from examples.digits.model import (
    HEADS,
    OUTWARD,
    STRIDES,
    DigitDetector,
    make_neighborhood_attention,
)
from examples.digits.scenes import CLASSES, Batch, Scene, Scenes, collate
from vicinal.detr import Detections, Predictions


class Oracle:
    """Finds all digits, shifted by given offsets."""

    def __init__(self, off: float = 0.0) -> None:
        self.off = off

    def eval(self) -> "Oracle":
        return self

    def detect(self, batch: Batch) -> Any:
        boxes = batch.boxes.clone()
        boxes[:, 0] += self.off * boxes[:, 2]
        logits = torch.where(torch.eye(CLASSES, dtype=torch.bool)[batch.labels], 4.0, -4.0)
        return SimpleNamespace(layers=[Predictions(logits, boxes / STRIDES[0], batch.box_offsets)])


@pytest.fixture(scope="module")
def detector() -> DigitDetector:
    torch.manual_seed(0)
    return DigitDetector()


def canvases(n: int) -> Batch:
    return Scenes(strokes(), seed=2).batch(range(n))


@pytest.mark.parametrize(("off", "expected"), [(0.0, (1, 1, 1)), (0.2, (0.4, 1, 0))])
def test_evaluation_uses_every_canvas_once(
    off: float, expected: tuple[float, float, float]
) -> None:
    asked: list[int] = []

    def batches(numbers: range) -> Batch:
        asked.extend(numbers)
        return Scenes(strokes(), seed=2).batch(numbers)

    oracle: Any = Oracle(off)
    assert evaluate(oracle, batches, 5, batch_size=2) == pytest.approx(expected)
    assert asked == list(range(5))


def test_boxes_are_in_cells_of_the_canvas() -> None:
    oracle: Any = Oracle()
    batch = canvases(2)
    found, _ = detect(oracle, batch)
    best = torch.cat(list(confident_rows(found, 0.5)))
    assert torch.allclose(found.boxes[best].sort(0).values, batch.boxes.sort(0).values)


def test_the_most_confident_are_rows_of_each_image() -> None:
    scores = torch.tensor([0.9, 0.2, 0.5, 0.4, 0.8])
    rows = torch.arange(5)
    found = Detections(torch.zeros(5, 4), rows, scores, rows, torch.tensor([0, 2, 2, 5]))
    assert [list(chosen) for chosen in confident_rows(found, 0.5)] == [[0], [], [2, 4]]


def test_attended_points_are_those_the_last_layer_weighs(detector: DigitDetector) -> None:
    batch = canvases(2)
    found, output = detect(detector, batch)
    least = float(found.scores.sort(descending=True).values[8])
    records = attention_records(detector, output, found, least)
    assert [record.batch_index for record in records] == [0, 1]
    assert sum(map(len, records)) >= 9
    for record, rows in zip(records, confident_rows(found, least), strict=True):
        assert record.labels == [str(label) for label in found.labels[rows].tolist()]
        assert record.boxes is not None
        assert torch.equal(record.boxes * STRIDES[0], found.boxes[rows])
        assert torch.equal(record.positions, output.queries[-1].positions[found.queries[rows]])
        offsets, points, weights, _ = record.weights
        assert (output.pyramid.batch[points] == record.batch_index).all()
        query = torch.arange(len(record)).repeat_interleave(offsets.diff())
        sums = weights.new_zeros(len(record), HEADS).index_add(0, query, weights)
        assert torch.allclose(sums[offsets.diff() > 0], torch.ones(()))


def test_canvases_without_points_or_digits(detector: DigitDetector) -> None:
    canvas = Scenes(strokes(), seed=2).scene(0)
    blank = Scene(*(part[:0] for part in canvas))
    clutter = Scene(canvas.cells, canvas.ink, blank.boxes, blank.labels)
    found, _ = detect(detector, collate([blank, canvas]))
    assert found.offsets[1] == 0
    assert len(found.scores) > 0
    for batch in (collate([blank, canvas]), collate([clutter]), collate([blank])):
        losses = detector.train()(batch)
        assert all(torch.isfinite(loss) for loss in losses.values())
        torch.stack(list(losses.values())).sum().backward()


def test_each_head_prefers_points_in_its_direction_at_first() -> None:
    bias = make_neighborhood_attention((5, 3, 3, 3)).get_parameter("relative_bias").detach()
    assert bias.shape == (25 + 9 + 9 + 9, HEADS)
    second, first = bias[2 * 5 + 4], bias[4 * 5 + 2]  # cells at the border, along either axis
    torch.testing.assert_close(
        second[[0, 2, 4]], OUTWARD * torch.tensor([1.0, 0, -1]), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        first[[0, 2, 6]], OUTWARD * torch.tensor([0.0, 1, -1]), atol=1e-5, rtol=0
    )
