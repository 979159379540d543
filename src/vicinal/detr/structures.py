"""Ragged batches of objects, queries and predictions: the rows of all images, concatenated.

Each structure has int64 offsets ``[B + 1]``: image ``b`` owns the rows
``offsets[b]:offsets[b + 1]``. Images may differ in their number of rows, and may have none.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._utils.checks import (
    as_integer,
    check_finite,
    check_offsets,
    check_range,
    check_tensor,
    reads_contents,
    refuse,
)
from .._utils.collation import batched_by_cat
from .._utils.ragged import offsets_from_ids, rank_in_image
from .._utils.ragged_tuples import cat_ragged
from ..placement import QueryPlacement
from ..pyramid import FeaturePyramid
from ..windows import check_position_dtype, warn_if_normalized
from .boxes import check_box_sizes, check_boxes

_MAX_CLASSES = 2**62


@batched_by_cat
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

    @property
    def placement(self) -> QueryPlacement:
        """Positions, offsets and levels, as ``make_plan`` and ``forward`` of attentions take."""
        return QueryPlacement(self.positions, self.offsets, self.levels)

    @classmethod
    def cat(cls, parts: Sequence["ObjectQueries"]) -> "ObjectQueries":
        """Makes one batch of the images of several, one after another.

        Args:
            parts: at least one. Either all of them have groups, or none has.

        Raises:
            ValueError: there is no part, parts differ in width, dtype or device, or the offsets of
                a part do not rise from 0 to its number of rows.

        Example:
            ```python
            import torch
            from vicinal.detr import ObjectQueries

            queries = ObjectQueries(
                embeddings=torch.randn(1, 8),
                boxes=torch.tensor([[5.0, 5, 2, 2]]),
                levels=torch.tensor([0]),
                offsets=torch.tensor([0, 1]),
            )
            assert ObjectQueries.cat([queries, queries]).offsets.tolist() == [0, 1, 2]
            ```
        """
        return cat_ragged(cls, parts)


@batched_by_cat
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

    @classmethod
    def cat(cls, parts: Sequence["Targets"]) -> "Targets":
        """Makes one batch of the images of several, one after another.

        Args:
            parts: at least one.

        Raises:
            ValueError: there is no part, parts differ in width, dtype or device, or the offsets of
                a part do not rise from 0 to its number of rows.

        Example:
            ```python
            import torch
            from vicinal.detr import Targets

            boxes, labels = torch.tensor([[10.0, 8.0, 4.0, 6.0]]), torch.tensor([2])
            image = Targets(boxes, labels, torch.tensor([0, 1]))
            assert Targets.cat([image, image]).offsets.tolist() == [0, 1, 2]
            ```
        """
        return cat_ragged(cls, parts)


@batched_by_cat
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

    @classmethod
    def cat(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Makes one batch of the images of several, one after another.

        Args:
            parts: at least one.

        Raises:
            ValueError: there is no part, parts differ in width, dtype or device, or the offsets of
                a part do not rise from 0 to its number of rows.

        Example:
            ```python
            import torch
            from vicinal.detr import Predictions

            boxes = torch.tensor([[10.0, 8.0, 4.0, 6.0]])
            image = Predictions(torch.zeros(1, 3), boxes, torch.tensor([0, 1]))
            assert Predictions.cat([image, image]).offsets.tolist() == [0, 1, 2]
            ```
        """
        return cat_ragged(cls, parts)


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
            assignment: integer ``[n]``, the object of each prediction or -1 for none, as
                `assign_points_to_boxes` returns it.

        Raises:
            ValueError: ``assignment`` is not an integer tensor ``[n]``.
        """
        assignment = check_tensor("assignment", assignment, ("n",), kind="integer").long()
        (prediction,) = torch.nonzero(assignment >= 0, as_tuple=True)
        return cls(prediction, assignment[prediction])


def check_object_queries(queries: Any, embed_dim: int, position_dim: int) -> ObjectQueries:
    """``queries`` as tensors; raises ValueError unless they match a decoder of these sizes."""
    if not isinstance(queries, ObjectQueries):
        refuse("queries", "ObjectQueries", queries)
    embeddings = check_tensor(
        "queries.embeddings", queries.embeddings, ("N", embed_dim), kind="floating"
    )
    n, device, groups = embeddings.shape[0], embeddings.device, queries.groups
    shape = (n, 2 * position_dim)
    check_tensor("queries.boxes", queries.boxes, shape, kind="floating", device=device)
    levels = check_tensor("queries.levels", queries.levels, (n,), kind="integer", device=device)
    if groups is not None:
        groups = check_tensor("queries.groups", groups, (n,), kind="integer", device=device).long()
    boxes, offsets = _check_boxes_and_offsets(
        "queries", queries.boxes, queries.offsets, None, device
    )
    return ObjectQueries(embeddings, boxes, levels.long(), offsets, groups)


def check_boxes_on_map(argument: str, boxes: Tensor, pyramid: FeaturePyramid) -> None:
    """Raises ValueError for boxes in a dtype that cannot hold the map's cells.

    Warns, on the CPU, where boxes seem to be in units of the map.
    """
    check_position_dtype(argument, boxes, pyramid.level_shapes)
    warn_if_normalized(argument, boxes, pyramid.level_shapes)


def check_targets(
    targets: Targets,
    position_dim: int | None,
    n_classes: int | None,
    batch_size: int | None,
    *,
    check_contents: bool | None = None,
    device: torch.device | None = None,
) -> Targets:
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
        device: of the boxes; NumPy arrays are copied to it. None (default): any.

    Returns:
        the targets as tensors, labels and offsets int64. Offsets of fewer than ``batch_size``
        images have the missing ones appended: the last images have no objects.

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
    counts = {"position_dim": position_dim, "n_classes": n_classes, "batch_size": batch_size}
    for name, count in counts.items():
        if count is not None and (as_integer(count) is None or count < 0):
            refuse(name, "a non-negative integer or None", count)
    boxes, offsets = _check_boxes_and_offsets(
        "targets", targets.boxes, targets.offsets, check_contents, device
    )
    n = boxes.shape[0]
    if position_dim is not None:
        check_tensor("targets.boxes", boxes, (n, 2 * position_dim))
    if batch_size is not None:
        offsets = pad_offsets("targets.offsets", offsets, batch_size)
    labels = check_tensor(
        "targets.labels", targets.labels, (n,), kind="integer", device=boxes.device
    ).long()
    if reads_contents(check_contents, boxes.device):
        check_range("targets.labels", labels, _MAX_CLASSES if n_classes is None else n_classes)
    return Targets(boxes, labels, offsets)


def check_predictions(
    predictions: Predictions, *, check_contents: bool | None = None
) -> Predictions:
    """Raises an error unless the parts of ``predictions`` fit each other and are finite.

    Args:
        predictions: of a detector.
        check_contents: whether to check values as well as shapes and dtypes, which synchronizes on
            a GPU; None (default): on the CPU only.

    Returns:
        the predictions as tensors, offsets int64.

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
    logits = check_tensor("predictions.logits", predictions.logits, ("N", "C"), kind="floating")
    device = logits.device
    rows = (logits.shape[0], "2P")
    check_tensor("predictions.boxes", predictions.boxes, rows, kind="floating", device=device)
    boxes, offsets = _check_boxes_and_offsets(
        "predictions", predictions.boxes, predictions.offsets, check_contents, device
    )
    if reads_contents(check_contents, device):
        check_finite("predictions.logits", logits)
    return Predictions(logits, boxes, offsets)


def check_predictions_and_targets(
    predictions: Predictions, targets: Targets
) -> tuple[Predictions, Targets]:
    """Both as tensors; raises ValueError unless they are valid and of the same images."""
    predictions = check_predictions(predictions)
    logits, boxes, offsets = predictions
    targets = check_targets(
        targets,
        boxes.shape[1] // 2,
        logits.shape[1],
        offsets.shape[0] - 1,
        device=logits.device,
    )
    return predictions, targets


def pad_offsets(argument: str, offsets: Tensor, batch_size: int) -> Tensor:
    """``offsets`` of ``batch_size`` images, of which the missing last ones have no rows.

    Raises ValueError for offsets of more images.
    """
    n_images = offsets.shape[0] - 1
    if n_images > batch_size:
        refuse(argument, f"offsets of {batch_size} images", f"offsets of {n_images} images")
    return torch.cat((offsets, offsets[-1:].expand(batch_size - n_images)))


def _check_boxes_and_offsets(
    name: str,
    boxes: Tensor,
    offsets: Tensor,
    check_contents: bool | None,
    device: torch.device | None,
) -> tuple[Tensor, Tensor]:
    """Boxes ``[n, 2P]`` and int64 offsets of their rows; raises ValueError for others."""
    boxes = check_boxes(f"{name}.boxes", boxes, device)
    boxes = check_tensor(f"{name}.boxes", boxes, ("n", "2P"), device=device)
    offsets = check_tensor(
        f"{name}.offsets", offsets, ("B + 1",), kind="integer", device=boxes.device
    ).long()
    if not offsets.shape[0]:
        refuse(f"{name}.offsets", "at least one number", offsets)
    if reads_contents(check_contents, boxes.device):
        check_offsets(f"{name}.offsets", offsets, boxes.shape[0])
        check_finite(f"{name}.boxes", boxes)
        check_box_sizes(f"{name}.boxes", boxes)
    return boxes, offsets


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
    chosen = order[rank < min(top_k, len(order))]
    return chosen, offsets_from_ids(image[chosen], batch_size)
