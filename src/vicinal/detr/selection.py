"""Which points of the encoder become object queries."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._utils.checks import as_integer, check_cells, check_counts, check_tensor, refuse
from .._utils.constants import constant
from ..pyramid import FeaturePyramid
from ..windows import level_scales
from .heads import DetectionHead
from .queries import ObjectQueries, best_per_image
from .targets import Predictions


class Selection(NamedTuple):
    """What `QuerySelection` found.

    Attributes:
        queries: the object queries, by image the best candidates first.
        candidates: what was predicted at every point that could have been chosen.
        positions: ``[n, P]``, where these points are, in cells of the full shape.
        points: int64 ``[n]``, which points of the pyramid they are.
        chosen: int64 ``[N]``, the candidate that each query came from.
    """

    queries: ObjectQueries
    candidates: Predictions
    positions: Tensor
    points: Tensor
    chosen: Tensor


class QuerySelection(nn.Module):
    """Scores points of the encoder and makes the best of each image object queries.

    The two stages of Deformable DETR (Zhu et al., 2021): every point of the chosen levels predicts
    classes and a box, which begins as ``box_size`` cells around it. It trains well if every
    point inside an object's box is to predict it (`assign_inside`).

    Args:
        embed_dim: E.
        n_classes: number of classes, C.
        n_queries: how many an image has at most; images with fewer points have fewer.
        levels: whose points may be chosen; None: all.
        position_dim: number of spatial dimensions, P.
        box_size: of the boxes to begin with, in cells of the point's level.

    Raises:
        ValueError: sizes below 1, a ``box_size`` that is not positive, no or negative levels.
    """

    def __init__(
        self,
        embed_dim: int,
        n_classes: int,
        n_queries: int,
        levels: Sequence[int] | None = None,
        position_dim: int = 2,
        box_size: float = 4.0,
    ) -> None:
        super().__init__()
        check_counts(n_queries=n_queries)
        check_cells("box_size", box_size)
        if levels is not None and not (levels and all(map(_is_level, levels))):
            refuse("levels", "at least one level, none below 0", str(list(levels)))
        self.n_queries, self.box_size = n_queries, box_size
        self.levels = None if levels is None else tuple(levels)
        self.head = DetectionHead(embed_dim, n_classes, position_dim)
        self.project = nn.Linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, pyramid: FeaturePyramid) -> Selection:
        """Of a pyramid with embeddings ``[nnz, E]``, its points sorted by image.

        The number of candidates depends on contents, so a GPU is waited for.

        Raises:
            ValueError: a pyramid of another width or number of dimensions, one that lacks a level
                that was asked for, or points that are not sorted by image.
        """
        if not isinstance(pyramid, FeaturePyramid):
            refuse("pyramid", "a FeaturePyramid", pyramid)
        width = self.head.embed_dim
        check_tensor("pyramid.values", pyramid.values, ("nnz", width), kind="floating")
        if pyramid.position_dim != self.head.position_dim:
            refuse("pyramid", f"{self.head.position_dim} spatial dimensions", repr(pyramid))
        first_points = pyramid.batch_offsets()
        points = self._points(pyramid)
        embeddings = pyramid.values[points]
        dtype = pyramid.values.dtype
        positions, levels = pyramid.positions(dtype)[points], pyramid.levels[points]
        cell = 1 / level_scales(pyramid.level_shapes, positions)
        boxes = torch.cat((positions, self.box_size * cell[levels]), 1)
        logits, boxes = self.head(embeddings, boxes)
        image = pyramid.batch[points]
        chosen, offsets = best_per_image(
            logits.detach().amax(1), image, pyramid.batch_size, self.n_queries
        )
        queries = ObjectQueries(
            self.norm(self.project(embeddings[chosen]).to(dtype)),  # autocast or not
            boxes.detach()[chosen],
            levels[chosen],
            offsets,
        )
        # Candidates rise: those before an image's first point are of earlier images.
        candidates = Predictions(logits, boxes, torch.searchsorted(points, first_points))
        return Selection(queries, candidates, positions, points, chosen)

    def _points(self, pyramid: FeaturePyramid) -> Tensor:
        """int64 ``[n]``: the points of the levels that may be chosen from."""
        if self.levels is None:
            return torch.arange(len(pyramid), device=pyramid.values.device)
        if max(self.levels) >= pyramid.n_levels:
            refuse("pyramid", f"levels {list(self.levels)}", repr(pyramid))
        wanted = constant(self.levels, pyramid.values.device)
        return torch.isin(pyramid.levels, wanted).nonzero().flatten()


def _is_level(level: Any) -> bool:
    index = as_integer(level)
    return index is not None and index >= 0
