"""Detections of a trained detector, their average precision and their attention weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from examples.digits.evaluation import AveragePrecision, average_precision
from examples.digits.model import STRIDES, DigitDetector
from examples.digits.scenes import Batch
from vicinal.detr import DecoderLayer, Detections, DetectorOutput, select_detections
from vicinal.visualize import AttentionRecord


@torch.no_grad()
def detect(model: DigitDetector, batch: Batch) -> tuple[Detections, DetectorOutput]:
    """Detects digits; returns detections in cells of the canvas, and the detector's output."""
    output = model.eval().detect(batch)
    found = select_detections(output.layers[-1])
    return found._replace(boxes=found.boxes * STRIDES[0]), output


def evaluate(
    model: DigitDetector, batches: Callable[[range], Batch], n_canvases: int, batch_size: int
) -> AveragePrecision:
    """Evaluates the first ``n_canvases`` canvases, in batches of ``batch_size``."""
    found, targets = [], []
    for first in range(0, n_canvases, batch_size):
        batch = batches(range(first, min(first + batch_size, n_canvases)))
        found.append(detect(model, batch)[0])
        targets.append(batch)
    return average_precision(found, targets)


@torch.no_grad()
def attention_records(
    model: DigitDetector, output: DetectorOutput, found: Detections, min_score: float
) -> list[AttentionRecord]:
    """Records the attention of confident detections in the last decoder layer, per image.

    Args:
        model: the detector.
        output: from `detect`.
        found: from `detect`.
        min_score: minimum score of the detections to record.
    """
    layer, queries = model.detector.decoder.layers[-1], output.queries[-1]
    assert isinstance(layer, DecoderLayer)
    embeddings = layer.self_attention(queries)
    attention: Any = layer.cross_attention

    def record(image: int, chosen: Tensor) -> AttentionRecord:
        rows = found.queries[chosen]
        weights = attention.attention_weights(
            embeddings,
            queries.positions,
            queries.offsets,
            output.pyramid,
            query_level_indices=queries.levels,
            queries=rows,
        )
        return AttentionRecord(
            queries.positions[rows],
            weights,
            getattr(attention, "neighborhood_sizes", None),
            name="last layer of the decoder",
            batch_index=image,
            boxes=found.boxes[chosen] / STRIDES[0],
            labels=[str(label) for label in found.labels[chosen].tolist()],
            scores=found.scores[chosen],
        )

    return [record(image, rows) for image, rows in enumerate(confident_rows(found, min_score))]


def confident_rows(found: Detections, min_score: float) -> Iterable[Tensor]:
    """Yields the rows of ``found`` with at least ``min_score``, int64, for each image."""
    for start, stop in zip(found.offsets, found.offsets[1:], strict=False):
        yield (found.scores[start:stop] >= min_score).nonzero().squeeze(1) + start
