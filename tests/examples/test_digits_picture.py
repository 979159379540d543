"""The picture of what was found: true boxes, detections, and the points these attended to."""

import re

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from test_digits_scenes import strokes
from torch import Tensor

from examples.digits.picture import MISSED, TRUE, draw_detections
from examples.digits.scenes import SIZE, Batch, Scenes
from vicinal import FeaturePyramid, NeighborhoodWeights
from vicinal.visualize import AttentionRecord

STRIDE = 2
SIDE = SIZE // STRIDE


def scene(n_canvases: int) -> tuple[Batch, FeaturePyramid]:
    batch = Scenes(strokes(), seed=1).batch(range(n_canvases))
    cells = batch.coordinates // torch.tensor([1, STRIDE, STRIDE])
    values = torch.ones(len(cells), 1)
    shape = (SIDE, SIDE)
    return batch, FeaturePyramid.from_points(cells, values, shape, n_canvases, strides=(1, 4))


def digits_of(batch: Batch, image: int) -> tuple[Tensor, Tensor]:
    own = slice(*batch.box_offsets[image : image + 2].tolist())
    return batch.boxes[own] / STRIDE, batch.labels[own]


def detected(pyramid: FeaturePyramid, image: int, boxes: Tensor, labels: Tensor) -> AttentionRecord:
    """Each detection attends to the same three points of its image."""
    points = (pyramid.batch == image).nonzero()[:3, 0].repeat(len(boxes))
    offsets = torch.arange(len(boxes) + 1) * 3
    weights = NeighborhoodWeights(offsets, points, torch.full((len(points), 2), 1 / 3), None)
    return AttentionRecord(
        boxes[:, :2],
        weights,
        batch_index=image,
        boxes=boxes,
        labels=[str(label) for label in labels.tolist()],
        scores=torch.full((len(boxes),), 0.9),
    )


def numbers(title: str) -> list[int]:
    """The digits found, the digits, and the other detections."""
    return [int(number) for number in re.findall(r"\d+", title)]


def dashed(ax: Axes) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Color and (top, left, height, width) of each true box."""
    return [
        (
            to_hex(patch.get_edgecolor()),
            (patch.get_y(), patch.get_x(), patch.get_height(), patch.get_width()),
        )
        for patch in ax.patches
        if isinstance(patch, Rectangle) and patch.get_linestyle() == "--"
    ]


def test_true_boxes_are_drawn_and_missed_ones_highlighted() -> None:
    batch, pyramid = scene(1)
    boxes, labels = digits_of(batch, 0)
    wrong = labels.clone()
    wrong[0] = (wrong[0] + 1) % 10  # found, but taken for another digit
    record = detected(pyramid, 0, boxes[:-1] + 0.5, wrong[:-1])  # and the last not at all
    (ax, empty) = draw_detections(batch, pyramid, [record]).axes
    expected = torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]), 1).tolist()
    colors = [MISSED, *[TRUE] * (len(boxes) - 2), MISSED]
    assert dashed(ax) == [(color, tuple(box)) for color, box in zip(colors, expected, strict=True)]
    assert numbers(ax.get_title()) == [len(boxes) - 2, len(boxes), 1]
    assert ax.get_xlim() == (0, SIDE)
    assert ax.get_ylim() == (SIDE, 0)
    assert not empty.axison


def test_detections_have_their_digit_score_and_points() -> None:
    batch, pyramid = scene(2)
    records = [detected(pyramid, image, *digits_of(batch, image)) for image in (1, 0)]
    for ax, record in zip(draw_detections(batch, pyramid, records).axes, records, strict=True):
        assert record.labels is not None
        texts = {text.get_text() for text in ax.texts}
        assert texts <= {f"{label} 0.90" for label in record.labels}
        assert texts
        points = pyramid.positions()[record.weights.points[:3]].flip(1)
        dots = [torch.tensor(np.array(drawn.get_offsets())) for drawn in ax.collections[1:]]
        assert len(dots) == len(record)
        for drawn in dots:
            assert torch.equal(drawn.float(), points)


def test_canvases_without_detections_are_drawn() -> None:
    batch, pyramid = scene(1)
    boxes, labels = digits_of(batch, 0)
    record = detected(pyramid, 0, boxes[:0], labels[:0])
    ax = draw_detections(batch, pyramid, [record]).axes[0]
    assert numbers(ax.get_title()) == [0, len(boxes), 0]
    assert len(dashed(ax)) == len(boxes)
