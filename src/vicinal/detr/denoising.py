"""Denoising queries beside a detector's own, in training."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._utils.checks import check_cells, check_counts, refuse
from .._utils.ragged import batch_ids
from ..pyramid import FeaturePyramid
from ..windows import level_scales
from .matching import Matches
from .noisy_queries import noisy_queries
from .queries import ObjectQueries
from .targets import Predictions, Targets, check_targets


class Joined(NamedTuple):
    """Queries with denoising ones among them.

    Attributes:
        queries: all of them, image by image, a detector's own in group 0.
        own: int64 ``[N]``, the rows of the detector's own queries, in their order.
        offsets: int64 ``[B + 1]`` of these.
        noisy: int64 ``[D]``, the rows of the denoising queries.
        noisy_offsets: int64 ``[B + 1]`` of these.
        matches: which object each denoising query is to find.
    """

    queries: ObjectQueries
    own: Tensor
    offsets: Tensor
    noisy: Tensor
    noisy_offsets: Tensor
    matches: Matches

    def split(self, predictions: Predictions) -> tuple[Predictions, Predictions]:
        """Predictions of a detector's own queries, and of the denoising ones."""
        logits, boxes, _ = predictions
        return (
            Predictions(logits[self.own], boxes[self.own], self.offsets),
            Predictions(logits[self.noisy], boxes[self.noisy], self.noisy_offsets),
        )


class Denoiser(nn.Module):
    """Adds objects with noise to the queries, for the decoder to turn back into the objects.

    It learns what to do with a box before matching is of any use (Li et al., "DN-DETR", 2022).

    Args:
        embed_dim: E.
        n_classes: number of classes, C.
        n_groups: copies of every object; those of one group see one another alone.
        label_noise, box_noise: see `noisy_queries`.
        box_size: a query lives on the level where so many cells come nearest to its box.

    Raises:
        ValueError: sizes below 1, a ``box_size`` that is not positive.
    """

    def __init__(
        self,
        embed_dim: int,
        n_classes: int,
        n_groups: int = 3,
        label_noise: float = 0.2,
        box_noise: float = 0.4,
        box_size: float = 4.0,
    ) -> None:
        super().__init__()
        check_counts(embed_dim=embed_dim, n_classes=n_classes, n_groups=n_groups)
        check_cells("box_size", box_size)
        self.n_classes, self.n_groups = n_classes, n_groups
        self.label_noise, self.box_noise, self.box_size = label_noise, box_noise, box_size
        self.labels = nn.Embedding(n_classes, embed_dim)

    def forward(self, queries: ObjectQueries, targets: Targets, pyramid: FeaturePyramid) -> Joined:
        """The queries of a batch with noisy copies of its objects among them.

        Raises:
            ValueError: targets that cannot be, or of another batch than the queries.
        """
        n_own, device = len(queries.embeddings), queries.embeddings.device
        check_targets(targets, pyramid.position_dim, self.n_classes, len(queries.offsets) - 1)
        if targets.boxes.device != device:
            refuse("targets.boxes", f"boxes on {device}", targets.boxes)
        noisy = noisy_queries(
            targets,
            self.n_groups,
            label_noise=self.label_noise,
            box_noise=self.box_noise,
            n_classes=self.n_classes,
        )
        embeddings = self.labels(noisy.labels).to(queries.embeddings.dtype)
        image = torch.cat(
            (batch_ids(queries.offsets, n_own), batch_ids(noisy.offsets, len(noisy.boxes)))
        )
        order = torch.argsort(image, stable=True)
        groups = torch.cat((noisy.group.new_zeros(n_own), noisy.group + 1))
        joined = ObjectQueries(
            torch.cat((queries.embeddings, embeddings))[order],
            torch.cat((queries.boxes, noisy.boxes.to(queries.boxes)))[order],
            torch.cat((queries.levels, self._levels(noisy.boxes, pyramid)))[order],
            queries.offsets + noisy.offsets,
            groups[order],
        )
        row_of = torch.argsort(order)
        return Joined(
            joined, row_of[:n_own], queries.offsets, row_of[n_own:], noisy.offsets, noisy.matches
        )

    def _levels(self, boxes: Tensor, pyramid: FeaturePyramid) -> Tensor:
        """int64 ``[D]``: where ``box_size`` cells come nearest to the boxes, in logarithms."""
        size = boxes[:, pyramid.position_dim :].log().mean(1)
        cell = -level_scales(pyramid.level_shapes, boxes).log().mean(1)
        return (size[:, None] - cell - math.log(self.box_size)).abs().argmin(1)
