"""What a trained detector finds on canvases, how well, and where it looks."""

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
def find(model: DigitDetector, batch: Batch) -> tuple[Detections, DetectorOutput]:
    """The digits that were found, boxes in cells of the canvas, and what they came from."""
    output = model.eval().detect(batch)
    found = select_detections(output.layers[-1])
    return found._replace(boxes=found.boxes * STRIDES[0]), output


def evaluate(
    model: DigitDetector, batches: Callable[[range], Batch], n_canvases: int, at_once: int
) -> AveragePrecision:
    """On the first ``n_canvases``, of which ``at_once`` are looked at together."""
    found, there = [], []
    for first in range(0, n_canvases, at_once):
        batch = batches(range(first, min(first + at_once, n_canvases)))
        found.append(find(model, batch)[0])
        there.append(batch)
    return average_precision(found, there)


@torch.no_grad()
def attended(
    model: DigitDetector, output: DetectorOutput, found: Detections, least_score: float
) -> list[AttentionRecord]:
    """What the surest detections attended to in the decoder's last layer, image by image.

    Args:
        model: that made ``output``.
        output: of `find`, as is ``found``.
        least_score: of the detections to look at.
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

    return [record(image, rows) for image, rows in enumerate(surest(found, least_score))]


def surest(found: Detections, least_score: float) -> Iterable[Tensor]:
    """Rows of ``found`` with at least that score, int64, for each image."""
    for start, stop in zip(found.offsets, found.offsets[1:], strict=False):
        yield (found.scores[start:stop] >= least_score).nonzero().squeeze(1) + start
