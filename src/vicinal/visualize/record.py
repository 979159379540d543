"""What is drawn: some queries of one image, and the weights they give to points."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.checks import (
    check_finite,
    check_neighborhood_sizes,
    check_offsets,
    check_range,
    check_tensor,
    refuse,
)
from ..attention import NeighborhoodWeights
from ..pyramid import FeaturePyramid


@dataclass(frozen=True, eq=False, repr=False)
class AttentionRecord:
    """What n queries of one image attend to in one attention module.

    Weights come from ``attention_weights`` of `SparseNeighborhoodAttentionBlock` or
    `SparseDeformableAttention`, or from `neighborhood_attention_weights`, with ``queries``; those
    of any other attention will do, if told point by point. What points of one cell have is added
    up, so points that share a cell look heavier than they are where they share its weight.

    Args:
        positions: floating ``[n, P]``, where the queries are, in cells of the full shape.
        weights: of the same queries; the points are numbered as in the pyramid.
        neighborhood_sizes: window width of each level, as in the plan; None: no windows are drawn.
        name: of the module, say ``"decoder layer 2"``.
        batch_index: the image of the queries.
        levels: integer ``[n]``, the level each query lives on, as for points that are queries;
            None: they live on none.
        boxes: floating ``[n, 2P]``, centre then size along each axis, in cells of the full shape;
            None: queries are points.
        labels: a text per query, or None.
        scores: floating ``[n]``, or None.

    Raises:
        ValueError: sizes or dtypes do not fit each other, or numbers are not finite.
    """

    positions: Tensor
    weights: NeighborhoodWeights
    neighborhood_sizes: Sequence[int] | None = None
    name: str = "attention"
    batch_index: int = 0
    levels: Tensor | None = None
    boxes: Tensor | None = None
    labels: Sequence[str] | None = None
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        check_tensor("positions", self.positions, ("n", "P"), kind="floating")
        check_finite("positions", self.positions)
        n, dim = self.positions.shape
        self._check_weights(n)
        if self.levels is not None:
            check_tensor("levels", self.levels, (n,), kind="integer")
        for name, value, shape in (
            ("boxes", self.boxes, (n, 2 * dim)),
            ("scores", self.scores, (n,)),
        ):
            if value is not None:
                check_tensor(name, value, shape, kind="floating")
                check_finite(name, value if value.dim() == 2 else value[:, None])
        if self.labels is not None:
            if isinstance(self.labels, str) or not all(isinstance(x, str) for x in self.labels):
                refuse("labels", f"{n} texts", str(self.labels))
            if len(self.labels) != n:
                refuse("labels", f"{n} texts", f"{len(self.labels)} of them")

    def _check_weights(self, n: int) -> None:
        if not isinstance(self.weights, NeighborhoodWeights):
            refuse("weights", "NeighborhoodWeights", self.weights)
        offsets, points, weights, background = self.weights
        check_tensor("weights.offsets", offsets, (n + 1,), kind="integer")
        check_tensor("weights.points", points, ("M",), kind="integer")
        check_tensor("weights.weights", weights, (len(points), "H"), kind="floating")
        check_offsets("weights.offsets", offsets, len(points))
        check_finite("weights.weights", weights)
        if background is not None:
            heads = weights.shape[1]
            check_tensor("weights.background", background, (n, "L", heads), kind="floating")

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def n_heads(self) -> int:
        return self.weights.weights.shape[1]

    def describe(self, query: int) -> str:
        """The name of a query: its label and its score, or its number."""
        text = f"query {query}" if self.labels is None else self.labels[query]
        return text if self.scores is None else f"{text} {float(self.scores[query]):.2f}"


def check_record(record: AttentionRecord, pyramid: FeaturePyramid) -> None:
    """Refuses a record whose queries or weights are not of the pyramid's points."""
    if not isinstance(pyramid, FeaturePyramid):
        refuse("pyramid", "a FeaturePyramid", pyramid)
    if not isinstance(record, AttentionRecord):
        refuse("record", "an AttentionRecord", record)
    check_tensor("positions", record.positions, (len(record), pyramid.position_dim))
    check_range("batch_index", torch.tensor([record.batch_index]), pyramid.batch_size)
    points = record.weights.points.to(pyramid.coordinates.device)
    check_range("weights.points", points, len(pyramid))
    elsewhere = pyramid.batch[points] != record.batch_index
    if elsewhere.any():
        image = int(pyramid.batch[points[elsewhere][0]])
        refuse("weights.points", f"points of image {record.batch_index}", f"one of image {image}")
    if record.neighborhood_sizes is not None:
        check_neighborhood_sizes(record.neighborhood_sizes, pyramid.n_levels)
    if record.levels is not None:
        check_range("levels", record.levels, pyramid.n_levels)
    if record.weights.background is not None:
        levels = record.weights.background.shape[1]
        if levels != pyramid.n_levels:
            refuse("weights.background", f"{pyramid.n_levels} levels", f"{levels}")
