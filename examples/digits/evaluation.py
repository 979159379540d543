"""How well digits are found: average precision as COCO defines it."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.digits.scenes import CLASSES, Batch
from vicinal.detr import Detections


class AveragePrecision(NamedTuple):
    """Means over the classes that occur: NaN if none does."""

    ap: float
    """Mean over the overlaps 0.50, 0.55, ..., 0.95 from which on a box counts as found."""
    ap50: float
    ap75: float


def average_precision(
    detections: Iterable[Detections], targets: Iterable[Batch]
) -> AveragePrecision:
    """Of what was found on the canvases of ``targets``, batch by batch.

    The best 100 per image count. Boxes are in the units of the targets'.

    Raises:
        ValueError: not as many batches or images of one as of the other.
    """
    from pycocotools.cocoeval import COCOeval  # only those who evaluate need it

    found: list[dict[str, Any]] = []
    true: list[dict[str, Any]] = []
    n_images = 0
    for ours, batch in zip(detections, targets, strict=True):
        if len(ours.offsets) != len(batch.box_offsets):
            n = len(ours.offsets) - 1
            raise ValueError(f"detections: expected {batch.batch_size} images, got {n}")
        scores = torch.ones(len(batch.labels))
        found += _records(ours.boxes, ours.scores, ours.labels, ours.offsets, n_images)
        true += _records(batch.boxes, scores, batch.labels, batch.box_offsets, n_images)
        n_images += batch.batch_size
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_index(true, n_images), _index(found, n_images), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    # Where there was nothing to find, COCO says -1.
    return AveragePrecision(*(float(s) if s >= 0 else float("nan") for s in evaluation.stats[:3]))


def _records(
    boxes: Tensor, scores: Tensor, labels: Tensor, offsets: Tensor, first_image: int
) -> list[dict[str, Any]]:
    """Boxes in COCO's terms: left, top, width and height."""
    image = first_image + torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff().cpu())
    corners = torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]), 1)[:, [1, 0, 3, 2]]
    return [
        {
            "image_id": of,
            "category_id": label,
            "bbox": box,
            "area": box[2] * box[3],
            "score": score,
            "iscrowd": 0,
        }
        for of, label, box, score in zip(
            image.tolist(), labels.tolist(), corners.tolist(), scores.tolist(), strict=True
        )
    ]


def _index(records: Sequence[dict[str, Any]], n_images: int) -> Any:
    from pycocotools.coco import COCO

    index = COCO()
    index.dataset = {
        "images": [{"id": image} for image in range(n_images)],
        "categories": [{"id": label} for label in range(CLASSES)],
        "annotations": [{"id": i, **record} for i, record in enumerate(records, 1)],  # 0: no match
    }
    index.createIndex()
    return index
