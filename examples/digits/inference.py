"""Detections of a trained detector, their average precision and their attention weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor

from examples.digits.evaluation import AveragePrecision, average_precision
from examples.digits.model import STRIDES, DigitDetector
from examples.digits.scenes import Batch
from vicinal import NeighborhoodWeights
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

    The weights of a detection are the mean over the reference points of its query.

    Args:
        model: the detector.
        output: from `detect`.
        found: from `detect`.
        min_score: minimum score of the detections to record.
    """
    layer, queries = model.detector.decoder.layers[-1], output.queries[-1]
    assert isinstance(layer, DecoderLayer)
    points, attention = layer.reference_points, cast(Any, layer.cross_attention)
    assert points is not None
    embeddings, n_points = points.embed(layer.self_attention(queries)), len(points.embeddings)
    placement = layer.placement(queries, output.pyramid)

    def record(image: int, chosen: Tensor) -> AttentionRecord:
        rows = found.queries[chosen]
        weights = attention.attention_weights(
            embeddings,
            **placement.arguments(),
            stacked_feature_maps=output.pyramid,
            queries=(
                rows[:, None] * n_points + torch.arange(n_points, device=rows.device)
            ).flatten(),
        )
        return AttentionRecord(
            queries.positions[rows],
            mean_weights(weights, n_points),
            name="last layer of the decoder",
            batch_index=image,
            boxes=found.boxes[chosen] / STRIDES[0],
            labels=[str(label) for label in found.labels[chosen].tolist()],
            scores=found.scores[chosen],
        )

    return [record(image, rows) for image, rows in enumerate(confident_rows(found, min_score))]


def mean_weights(weights: NeighborhoodWeights, n_points: int) -> NeighborhoodWeights:
    """The mean over the ``n_points`` reference points of each query; those without points in their
    windows do not count.
    """
    counts = weights.offsets.diff()
    n_seeing = (counts.view(-1, n_points) > 0).sum(1).repeat_interleave(n_points)
    share = weights.weights / n_seeing.repeat_interleave(counts)[:, None]
    return NeighborhoodWeights(weights.offsets[::n_points], weights.points, share, None)


def confident_rows(found: Detections, min_score: float) -> Iterable[Tensor]:
    """Yields the rows of ``found`` with at least ``min_score``, int64, for each image."""
    for start, stop in zip(found.offsets, found.offsets[1:], strict=False):
        yield (found.scores[start:stop] >= min_score).nonzero().squeeze(1) + start
