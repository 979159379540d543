"""What is to be found and what was: ragged batches of boxes, image after image."""

from typing import NamedTuple

from torch import Tensor

from .._utils.checks import (
    check_finite,
    check_offsets,
    check_range,
    check_tensor,
    reads_contents,
    refuse,
)
from .boxes import check_box_sizes, check_boxes

_MOST_CLASSES = 2**62


class Targets(NamedTuple):
    """The objects of all images, one after another.

    Attributes:
        boxes: floating ``[M, 2P]``, centre and size per axis, in cells of the full shape.
        labels: int64 ``[M]``, the class of each, in [0, C).
        offsets: int64 ``[B + 1]``: image ``b`` owns the rows ``offsets[b]:offsets[b + 1]``.
    """

    boxes: Tensor
    labels: Tensor
    offsets: Tensor


class Predictions(NamedTuple):
    """What a detector says of its queries, those of all images one after another.

    Attributes:
        logits: floating ``[N, C]``, one sigmoid per class.
        boxes: floating ``[N, 2P]``, centre and size per axis, in cells of the full shape.
        offsets: int64 ``[B + 1]``: image ``b`` owns the rows ``offsets[b]:offsets[b + 1]``.
    """

    logits: Tensor
    boxes: Tensor
    offsets: Tensor


def check_targets(
    targets: Targets,
    position_dim: int | None,
    n_classes: int | None,
    batch_size: int | None,
    *,
    check_contents: bool | None = None,
) -> None:
    """Refuses targets that cannot be those of ``batch_size`` images.

    Args:
        targets: the objects.
        position_dim: number of spatial dimensions, P; None: any.
        n_classes: number of classes, C; None: any.
        batch_size: number of images, B, empty ones counted; None: any.
        check_contents: whether to read numbers, which on a GPU waits for the device. None: on the
            CPU only.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, offsets that do not rise from 0 to
            M, labels that are no class, boxes that are not finite or not of positive size.
    """
    if not isinstance(targets, Targets):
        refuse("targets", "Targets", targets)
    boxes, labels, offsets = targets
    _check_rows("targets", boxes, offsets, check_contents)
    n, device = boxes.shape[0], boxes.device
    if position_dim is not None:
        check_tensor("targets.boxes", boxes, (n, 2 * position_dim))
    if batch_size is not None:
        check_tensor("targets.offsets", offsets, (batch_size + 1,))
    check_tensor("targets.labels", labels, (n,), kind="integer", device=device)
    if reads_contents(check_contents, device):
        check_range("targets.labels", labels, _MOST_CLASSES if n_classes is None else n_classes)


def check_predictions(predictions: Predictions, *, check_contents: bool | None = None) -> None:
    """Refuses predictions whose parts do not fit each other, and numbers that are none.

    Args:
        predictions: of a detector.
        check_contents: as for `check_targets`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, offsets that do not rise from 0 to
            N, logits or boxes that are not finite, boxes that are not of positive size.
    """
    if not isinstance(predictions, Predictions):
        refuse("predictions", "Predictions", predictions)
    logits, boxes, offsets = predictions
    check_tensor("predictions.logits", logits, ("N", "C"), kind="floating")
    rows = (logits.shape[0], "2P")
    check_tensor("predictions.boxes", boxes, rows, kind="floating", device=logits.device)
    _check_rows("predictions", boxes, offsets, check_contents)
    if reads_contents(check_contents, logits.device):
        check_finite("predictions.logits", logits)


def check_pair(predictions: Predictions, targets: Targets) -> None:
    """Refuses predictions and targets that cannot be those of the same images."""
    check_predictions(predictions)
    logits, boxes, offsets = predictions
    check_targets(targets, boxes.shape[1] // 2, logits.shape[1], len(offsets) - 1)
    if targets.boxes.device != logits.device:
        refuse("targets.boxes", f"boxes on {logits.device}", targets.boxes)


def _check_rows(name: str, boxes: Tensor, offsets: Tensor, check_contents: bool | None) -> None:
    """Refuses all but boxes ``[n, 2P]`` and offsets of their rows."""
    check_boxes(f"{name}.boxes", boxes)
    check_tensor(f"{name}.boxes", boxes, ("n", "2P"))
    check_tensor(f"{name}.offsets", offsets, ("B + 1",), kind="integer", device=boxes.device)
    if not len(offsets):
        refuse(f"{name}.offsets", "at least one number", offsets)
    if reads_contents(check_contents, boxes.device):
        check_offsets(f"{name}.offsets", offsets, len(boxes))
        check_finite(f"{name}.boxes", boxes)
        check_box_sizes(f"{name}.boxes", boxes)
