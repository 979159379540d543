"""Ragged batches of objects, queries and predictions: the rows of all images, concatenated.

Each structure has int64 offsets ``[B + 1]``: image ``b`` owns the rows
``offsets[b]:offsets[b + 1]``. Images may differ in their number of rows, and may have none.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._utils.checks import (
    check_finite,
    check_offsets,
    check_range,
    check_tensor,
    reads_contents,
    refuse,
)
from .._utils.ragged import offsets_from_ids, rank_in_image
from .boxes import check_box_sizes, check_boxes

_MAX_CLASSES = 2**62


class ObjectQueries(NamedTuple):
    """Object queries of a batch of images: an embedding and a reference box each.

    Attributes:
        embeddings: floating ``[N, E]``.
        boxes: floating ``[N, 2P]``, center and size per axis, in cells of the full shape.
        levels: int64 ``[N]``, the pyramid level of each query, used by rotary encodings.
        offsets: int64 ``[B + 1]``: image ``b`` owns the queries ``offsets[b]:offsets[b + 1]``.
        groups: int64 ``[N]`` or None (one group): self-attention is restricted to queries of the
            same image and group. Denoising queries form groups of their own.

    Example:
        ```python
        import torch
        from vicinal.detr import ObjectQueries

        queries = ObjectQueries(
            embeddings=torch.randn(3, 8),
            boxes=torch.tensor([[5.0, 5, 2, 2], [9, 3, 4, 4], [1, 1, 2, 2]]),
            levels=torch.tensor([0, 1, 0]),
            offsets=torch.tensor([0, 2, 3]),  # two queries on the first image, one on the second
        )
        assert queries.positions.shape == (3, 2)
        ```
    """

    embeddings: Tensor
    boxes: Tensor
    levels: Tensor
    offsets: Tensor
    groups: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """``[N, P]``: the centers of the boxes, in cells of the full shape."""
        return self.boxes[:, : self.boxes.shape[1] // 2]


class Targets(NamedTuple):
    """Ground-truth objects of a batch of images.

    Attributes:
        boxes: floating ``[M, 2P]``, center and size per axis, in cells of the full shape.
        labels: int64 ``[M]``, the class of each object, in [0, C).
        offsets: int64 ``[B + 1]``: image ``b`` owns the objects ``offsets[b]:offsets[b + 1]``.

    Example:
        ```python
        import torch
        from vicinal.detr import Targets

        targets = Targets(
            boxes=torch.tensor([[10.0, 8.0, 4.0, 6.0]]),
            labels=torch.tensor([2]),
            offsets=torch.tensor([0, 1, 1]),  # the second image has no objects
        )
        assert len(targets.offsets) - 1 == 2
        ```
    """

    boxes: Tensor
    labels: Tensor
    offsets: Tensor


class Predictions(NamedTuple):
    """Class logits and boxes that a detector predicts for a batch of images.

    Attributes:
        logits: floating ``[N, C]``, one independent sigmoid per class.
        boxes: floating ``[N, 2P]``, center and size per axis, in cells of the full shape.
        offsets: int64 ``[B + 1]``: image ``b`` owns the rows ``offsets[b]:offsets[b + 1]``.

    Example:
        ```python
        import torch
        from vicinal.detr import Predictions

        predictions = Predictions(
            logits=torch.tensor([[2.0, -1.0, 0.0]]),
            boxes=torch.tensor([[10.0, 8.0, 4.0, 6.0]]),
            offsets=torch.tensor([0, 1]),
        )
        assert predictions.logits.sigmoid().argmax(1).item() == 0
        ```
    """

    logits: Tensor
    boxes: Tensor
    offsets: Tensor


class Matches(NamedTuple):
    """Pairs of a prediction and the object it is assigned to.

    Attributes:
        prediction: int64 ``[K]``, rows of the predictions, ascending.
        target: int64 ``[K]``, rows of the targets.

    Example:
        ```python
        import torch
        from vicinal.detr import Matches

        matches = Matches.from_assignment(torch.tensor([-1, 3, 0]))
        assert matches.prediction.tolist() == [1, 2]
        assert matches.target.tolist() == [3, 0]
        ```
    """

    prediction: Tensor
    target: Tensor

    @classmethod
    def from_assignment(cls, assignment: Tensor) -> "Matches":
        """Builds the pairs of all predictions that are assigned to an object.

        On a GPU this synchronizes, since the number of pairs depends on contents.

        Args:
            assignment: int64 ``[n]``, the object of each prediction or -1 for none, as
                `assign_points_to_boxes` returns it.
        """
        (prediction,) = torch.nonzero(assignment >= 0, as_tuple=True)
        return cls(prediction, assignment[prediction])


def check_object_queries(queries: ObjectQueries, embed_dim: int, position_dim: int) -> None:
    """Raises ValueError, naming the field, unless queries match a decoder of these sizes."""
    if not isinstance(queries, ObjectQueries):
        refuse("queries", "ObjectQueries", queries)
    check_tensor("queries.embeddings", queries.embeddings, ("N", embed_dim), kind="floating")
    n, device = len(queries.embeddings), queries.embeddings.device
    shape = (n, 2 * position_dim)
    check_tensor("queries.boxes", queries.boxes, shape, kind="floating", device=device)
    check_tensor("queries.levels", queries.levels, (n,), kind="integer", device=device)
    if queries.groups is not None:
        check_tensor("queries.groups", queries.groups, (n,), kind="integer", device=device)
    _check_boxes_and_offsets("queries", queries.boxes, queries.offsets, None)


def check_targets(
    targets: Targets,
    position_dim: int | None,
    n_classes: int | None,
    batch_size: int | None,
    *,
    check_contents: bool | None = None,
) -> None:
    """Raises an error unless ``targets`` are valid for ``batch_size`` images.

    The losses call this themselves. Call it with ``check_contents=True`` to validate a data set
    whose targets are on a GPU.

    Args:
        targets: the objects.
        position_dim: number of spatial dimensions, P; None: any.
        n_classes: number of classes, C; None: any.
        batch_size: number of images, B, those without objects included; None: any.
        check_contents: whether to check values as well as shapes and dtypes, which synchronizes on
            a GPU; None (default): on the CPU only.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, offsets do not ascend from 0 to M, labels
            are outside [0, C), or boxes are not finite or not of positive size.

    Example:
        ```python
        import torch
        from vicinal.detr import Targets, check_targets

        boxes, labels = torch.tensor([[10.0, 8.0, 4.0, 0.0]]), torch.tensor([2])
        try:
            check_targets(Targets(boxes, labels, torch.tensor([0, 1])), 2, 5, 1)
        except ValueError as error:
            assert "positive size" in str(error)
        ```
    """
    if not isinstance(targets, Targets):
        refuse("targets", "Targets", targets)
    boxes, labels, offsets = targets
    _check_boxes_and_offsets("targets", boxes, offsets, check_contents)
    n, device = boxes.shape[0], boxes.device
    if position_dim is not None:
        check_tensor("targets.boxes", boxes, (n, 2 * position_dim))
    if batch_size is not None:
        check_tensor("targets.offsets", offsets, (batch_size + 1,))
    check_tensor("targets.labels", labels, (n,), kind="integer", device=device)
    if reads_contents(check_contents, device):
        check_range("targets.labels", labels, _MAX_CLASSES if n_classes is None else n_classes)


def check_predictions(predictions: Predictions, *, check_contents: bool | None = None) -> None:
    """Raises an error unless the parts of ``predictions`` fit each other and are finite.

    Args:
        predictions: of a detector.
        check_contents: whether to check values as well as shapes and dtypes, which synchronizes on
            a GPU; None (default): on the CPU only.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, offsets do not ascend from 0 to N, logits
            or boxes are not finite, or boxes are not of positive size.

    Example:
        ```python
        import torch
        from vicinal.detr import Predictions, check_predictions

        boxes = torch.tensor([[10.0, 8.0, 4.0, 6.0]])
        check_predictions(Predictions(torch.zeros(1, 3), boxes, torch.tensor([0, 1])))
        ```
    """
    if not isinstance(predictions, Predictions):
        refuse("predictions", "Predictions", predictions)
    logits, boxes, offsets = predictions
    check_tensor("predictions.logits", logits, ("N", "C"), kind="floating")
    rows = (logits.shape[0], "2P")
    check_tensor("predictions.boxes", boxes, rows, kind="floating", device=logits.device)
    _check_boxes_and_offsets("predictions", boxes, offsets, check_contents)
    if reads_contents(check_contents, logits.device):
        check_finite("predictions.logits", logits)


def check_predictions_and_targets(predictions: Predictions, targets: Targets) -> None:
    """Raises ValueError unless predictions and targets are valid and of the same images."""
    check_predictions(predictions)
    logits, boxes, offsets = predictions
    check_targets(targets, boxes.shape[1] // 2, logits.shape[1], len(offsets) - 1)
    if targets.boxes.device != logits.device:
        refuse("targets.boxes", f"boxes on {logits.device}", targets.boxes)


def _check_boxes_and_offsets(
    name: str, boxes: Tensor, offsets: Tensor, check_contents: bool | None
) -> None:
    """Raises ValueError unless given boxes ``[n, 2P]`` and the offsets of their rows."""
    check_boxes(f"{name}.boxes", boxes)
    check_tensor(f"{name}.boxes", boxes, ("n", "2P"))
    check_tensor(f"{name}.offsets", offsets, ("B + 1",), kind="integer", device=boxes.device)
    if not len(offsets):
        refuse(f"{name}.offsets", "at least one number", offsets)
    if reads_contents(check_contents, boxes.device):
        check_offsets(f"{name}.offsets", offsets, len(boxes))
        check_finite(f"{name}.boxes", boxes)
        check_box_sizes(f"{name}.boxes", boxes)


def top_k_per_image(
    scores: Tensor, image: Tensor, batch_size: int, top_k: int
) -> tuple[Tensor, Tensor]:
    """Selects the ``top_k`` best rows of each image.

    Args:
        scores: ``[n]``; of equal scores the first row is selected first.
        image: int64 ``[n]``, the image of each row, ascending.
        batch_size: number of images, B.
        top_k: rows selected per image at most.

    Returns:
        the selected rows, int64 ``[N]``, by image and then by descending score; their offsets,
        int64 ``[B + 1]``.
    """
    by_score = torch.argsort(scores, descending=True, stable=True)
    order = by_score[torch.argsort(image[by_score], stable=True)]
    starts = offsets_from_ids(image, batch_size)
    rank = rank_in_image(image[order], starts)
    chosen = order[rank < top_k]
    return chosen, offsets_from_ids(image[chosen], batch_size)
