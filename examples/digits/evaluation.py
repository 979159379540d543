"""Average precision of detections, as COCO defines it."""

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
    """Average precision, averaged over the classes that occur; NaN if none does."""

    ap: float
    """Mean over the IoU thresholds 0.50, 0.55, ..., 0.95."""
    ap50: float
    ap75: float


def average_precision(
    detections: Iterable[Detections], targets: Iterable[Batch]
) -> AveragePrecision:
    """Evaluates detections with pycocotools; the best 100 per image count.

    Args:
        detections: of each batch, boxes in the units of the targets.
        targets: the batches.

    Raises:
        ValueError: the numbers of batches or of images differ.
    """
    from pycocotools.cocoeval import COCOeval  # optional: required for evaluation only

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
    # COCO returns -1 if there are no objects.
    return AveragePrecision(*(float(s) if s >= 0 else float("nan") for s in evaluation.stats[:3]))


def _records(
    boxes: Tensor, scores: Tensor, labels: Tensor, offsets: Tensor, first_image: int
) -> list[dict[str, Any]]:
    """COCO annotations, with boxes as left, top, width and height."""
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
        "annotations": [
            {"id": i, **record} for i, record in enumerate(records, 1)
        ],  # id 0 means no match
    }
    index.createIndex()
    return index
