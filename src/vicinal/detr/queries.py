"""Object queries: what a decoder turns into detections."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._utils.checks import check_finite, check_offsets, check_tensor, reads_contents, refuse
from .._utils.ragged import offsets_from_ids
from .boxes import check_box_sizes


class ObjectQueries(NamedTuple):
    """The object queries of all images, one image after another; images may differ in number.

    Attributes:
        embeddings: ``[N, E]``.
        boxes: ``[N, 2P]``, where each looks for its object: centre, then size per axis, in cells
            of the full shape.
        levels: int64 ``[N]``, the level that each lives on.
        offsets: int64 ``[B + 1]``: image ``b`` owns the queries ``offsets[b]:offsets[b + 1]``.
        groups: int64 ``[N]`` or None: queries see those of their image and group alone. Denoising
            queries form groups of their own.
    """

    embeddings: Tensor
    boxes: Tensor
    levels: Tensor
    offsets: Tensor
    groups: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """``[N, P]``: the boxes' centres."""
        return self.boxes[:, : self.boxes.shape[1] // 2]


def check_queries(queries: ObjectQueries, embed_dim: int, position_dim: int) -> None:
    """Refuses what a decoder cannot take, by name."""
    if not isinstance(queries, ObjectQueries):
        refuse("queries", "ObjectQueries", queries)
    check_tensor("queries.embeddings", queries.embeddings, ("N", embed_dim), kind="floating")
    n, device = len(queries.embeddings), queries.embeddings.device
    where = (n, 2 * position_dim)
    check_tensor("queries.boxes", queries.boxes, where, kind="floating", device=device)
    check_tensor("queries.levels", queries.levels, (n,), kind="integer", device=device)
    check_tensor("queries.offsets", queries.offsets, ("B + 1",), kind="integer", device=device)
    if not len(queries.offsets):
        refuse("queries.offsets", "at least one number", queries.offsets)
    if queries.groups is not None:
        check_tensor("queries.groups", queries.groups, (n,), kind="integer", device=device)
    if reads_contents(None, device):
        check_offsets("queries.offsets", queries.offsets, n)
        check_finite("queries.boxes", queries.boxes)
        check_box_sizes("queries.boxes", queries.boxes)


def best_per_image(
    scores: Tensor, image: Tensor, batch_size: int, n_best: int
) -> tuple[Tensor, Tensor]:
    """Rows int64 ``[N]`` of the best of each image, best first, and offsets ``[B + 1]`` of these.

    ``scores`` ``[n]`` and ``image`` ``[n]`` are sorted by image; of equals the first goes first.
    """
    by_score = torch.argsort(scores, descending=True, stable=True)
    order = by_score[torch.argsort(image[by_score], stable=True)]
    starts = offsets_from_ids(image, batch_size)
    rank = torch.arange(len(order), device=order.device) - starts[image[order]]
    chosen = order[rank < n_best]
    return chosen, offsets_from_ids(image[chosen], batch_size)
