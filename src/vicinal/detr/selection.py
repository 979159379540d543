"""Selection of object queries among the encoder's points."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._utils.checks import (
    check_cells,
    check_counts,
    check_tensor,
    check_type,
    refuse,
)
from .._utils.modules import Module
from .._utils.ragged import offsets_from_ids
from ..nn.projections import call_norm, check_dtype
from ..pyramid import FeaturePyramid
from ..windows import level_scales
from .layers import DetectionHead, as_levels, check_has_levels, points_of_levels
from .structures import ObjectQueries, Predictions, top_k_per_image


class QuerySelectionOutput(NamedTuple):
    """What `QuerySelection` returns: object queries, and the candidates they were selected from.

    Attributes:
        queries: the object queries, N of them, by image and then by descending score.
        candidates: predictions at all n points of the levels that queries are selected from.
        positions: floating ``[n, P]``, the positions of these points, in cells of the full shape.
        points: int64 ``[n]``, the rows of these points in the pyramid, by image.
        chosen: int64 ``[N]``, the candidate that each query was made from.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid
        from vicinal.detr import QuerySelection

        coordinates = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 0], [0, 3, 3, 0]])
        pyramid = FeaturePyramid(torch.randn(3, 8), coordinates, ((4, 4),), batch_size=1)
        selection = QuerySelection(embed_dim=8, n_classes=3, n_queries=2)(pyramid)
        chosen = selection.candidates.logits[selection.chosen].amax(1)
        assert chosen[0] >= chosen[1]
        ```
    """

    queries: ObjectQueries
    candidates: Predictions
    positions: Tensor
    points: Tensor
    chosen: Tensor


class QuerySelection(Module):
    """Predicts objects at the encoder's points and makes the best of each image object queries.

    The two-stage variant of Deformable DETR (Zhu et al., "Deformable DETR", 2021): every point of
    the given levels predicts classes and a box, starting from a box of ``box_size`` cells around
    the point. It trains well with one-to-many supervision (`assign_points_to_boxes`).

    Args:
        embed_dim: width of the embeddings, E.
        n_classes: number of classes, C.
        n_queries: object queries per image; images with fewer candidates have fewer.
        levels: the levels whose points are candidates; None (default): all.
        position_dim: number of spatial dimensions, P; default 2.
        box_size: size of the initial boxes, in cells of the point's level; default 4.
        n_eval_queries: ``n_queries`` of a module in evaluation mode. None (default): as in
            training. More queries cost little without a backward pass, and find objects whose
            candidates rank below many candidates of other objects. `QuerySelfAttention` with
            ``max_queries`` must have room for them.

    Raises:
        ValueError: a size or a number of queries is below 1, ``box_size`` is not positive, or
            ``levels`` is empty or has negative numbers.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid
        from vicinal.detr import QuerySelection

        coordinates = torch.tensor([[0, 0, 0, 0], [0, 1, 2, 0], [0, 3, 3, 0]])
        pyramid = FeaturePyramid(torch.randn(3, 8), coordinates, ((4, 4),), batch_size=1)
        selection = QuerySelection(embed_dim=8, n_classes=3, n_queries=2)(pyramid)
        assert selection.queries.embeddings.shape == (2, 8)
        assert selection.candidates.logits.shape == (3, 3)
        ```
    """

    def __init__(
        self,
        embed_dim: int,
        n_classes: int,
        n_queries: int,
        levels: Sequence[int] | None = None,
        position_dim: int = 2,
        box_size: float = 4.0,
        n_eval_queries: int | None = None,
    ) -> None:
        super().__init__()
        eval_queries = n_queries if n_eval_queries is None else n_eval_queries
        check_counts(n_queries=n_queries, n_eval_queries=eval_queries)
        check_cells("box_size", box_size)
        self.n_queries, self.box_size = int(n_queries), box_size
        self.n_eval_queries = None if n_eval_queries is None else int(n_eval_queries)
        self.levels = as_levels("levels", levels)
        self.head = DetectionHead(embed_dim, n_classes, position_dim)
        self.project = nn.Linear(int(embed_dim), int(embed_dim))
        self.norm = nn.LayerNorm(int(embed_dim))

    def forward(self, pyramid: FeaturePyramid) -> QuerySelectionOutput:
        """Selects object queries.

        On a GPU this synchronizes, since the number of candidates depends on contents.

        Args:
            pyramid: points with values ``[nnz, E]``, in any order.

        Returns:
            the queries, whose boxes carry no gradient, and the candidates.

        Raises:
            ValueError: the pyramid has another width, dtype or number of dimensions, or lacks one
                of ``levels``.
        """
        self._check(pyramid)
        points = self._candidate_points(pyramid)
        embeddings = pyramid.values[points]
        dtype = pyramid.values.dtype
        positions, levels = pyramid.positions(dtype)[points], pyramid.levels[points]
        cell_sizes = 1 / level_scales(pyramid.level_shapes, positions)
        boxes = torch.cat((positions, self.box_size * cell_sizes[levels]), 1)
        logits, boxes = self.head(embeddings, boxes)
        offsets = offsets_from_ids(pyramid.batch[points], pyramid.batch_size)
        candidates = Predictions(logits, boxes, offsets)
        queries, chosen = self._select(pyramid, points, candidates)
        return QuerySelectionOutput(queries, candidates, positions, points, chosen)

    def _select(
        self, pyramid: FeaturePyramid, points: Tensor, candidates: Predictions
    ) -> tuple[ObjectQueries, Tensor]:
        """The object queries, and the candidates, at ``points``, that they are made from."""
        scores = candidates.logits.detach().amax(1)
        image = pyramid.batch[points]
        chosen, offsets = top_k_per_image(scores, image, pyramid.batch_size, self._count())
        rows = points[chosen]
        embeddings, boxes = self._embed(pyramid.values[rows]), candidates.boxes.detach()[chosen]
        return ObjectQueries(embeddings, boxes, pyramid.levels[rows], offsets), chosen

    def _count(self) -> int:
        """Object queries per image at most, in the mode of the module."""
        if self.training or self.n_eval_queries is None:
            return self.n_queries
        return self.n_eval_queries

    def _embed(self, values: Tensor) -> Tensor:
        """The embeddings of queries that are made from points with ``values``, in their dtype."""
        projected = self.project(values).to(values.dtype)  # in this dtype under autocast
        return call_norm(self.norm, projected)

    def _check(self, pyramid: FeaturePyramid) -> None:
        check_type("pyramid", pyramid, FeaturePyramid)
        width = self.head.embed_dim
        values = check_tensor("pyramid.values", pyramid.values, ("nnz", width), kind="floating")
        check_dtype("pyramid.values", values, self.head)
        if pyramid.position_dim != self.head.position_dim:
            refuse("pyramid", f"{self.head.position_dim} spatial dimensions", repr(pyramid))
        check_has_levels(pyramid, self.levels)

    def _candidate_points(self, pyramid: FeaturePyramid) -> Tensor:
        """int64 ``[n]``: the points of the levels that queries are selected from, by image."""
        points = points_of_levels(pyramid, self.levels)
        if points is None:
            return torch.argsort(pyramid.batch, stable=True)
        return points[torch.argsort(pyramid.batch[points], stable=True)]
