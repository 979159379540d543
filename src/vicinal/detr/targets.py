"""What is to be found and what was: ragged batches of boxes, image after image."""

from typing import NamedTuple

from torch import Tensor

from .._checks import (
    check_finite,
    check_offsets,
    check_range,
    check_tensor,
    reads_contents,
    refuse,
)
from .boxes import check_boxes, check_sizes


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
    position_dim: int,
    n_classes: int,
    batch_size: int,
    *,
    check_contents: bool | None = None,
) -> None:
    """Refuses targets that cannot be those of ``batch_size`` images.

    Args:
        targets: the objects.
        position_dim: number of spatial dimensions, P.
        n_classes: number of classes, C.
        batch_size: number of images, B, empty ones counted.
        check_contents: whether to read numbers, which on a GPU waits for the device. None: on the
            CPU only.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, offsets that do not rise from 0 to
            M, labels that are no class, boxes that are not finite or not of positive size.
    """
    if not isinstance(targets, Targets):
        refuse("targets", "Targets", targets)
    boxes, labels, offsets = targets
    check_tensor("targets.boxes", boxes, ("M", 2 * position_dim), kind="floating")
    n, device = boxes.shape[0], boxes.device
    check_tensor("targets.labels", labels, (n,), kind="integer", device=device)
    check_tensor("targets.offsets", offsets, (batch_size + 1,), kind="integer", device=device)
    if reads_contents(check_contents, device):
        check_offsets("targets.offsets", offsets, n)
        check_range("targets.labels", labels, n_classes)
        check_finite("targets.boxes", boxes)
        check_sizes("targets.boxes", boxes)


def check_predictions(predictions: Predictions, *, check_contents: bool | None = None) -> None:
    """Refuses predictions whose parts do not fit each other; their numbers may be anything.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, offsets that do not rise from 0 to N.
    """
    if not isinstance(predictions, Predictions):
        refuse("predictions", "Predictions", predictions)
    logits, boxes, offsets = predictions
    check_tensor("predictions.logits", logits, ("N", "C"), kind="floating")
    n, device = logits.shape[0], logits.device
    check_tensor("predictions.boxes", boxes, (n, "2P"), kind="floating", device=device)
    check_boxes("predictions.boxes", boxes)
    check_tensor("predictions.offsets", offsets, ("B + 1",), kind="integer", device=device)
    if not len(offsets):
        refuse("predictions.offsets", "offsets that rise from 0", offsets)
    if reads_contents(check_contents, device):
        check_offsets("predictions.offsets", offsets, n)


def check_pair(predictions: Predictions, targets: Targets) -> None:
    """Refuses predictions, or targets that cannot be those of the same images."""
    check_predictions(predictions)
    logits, boxes, offsets = predictions
    check_targets(targets, boxes.shape[1] // 2, logits.shape[1], len(offsets) - 1)
    if targets.boxes.device != logits.device:
        refuse("targets.boxes", f"boxes on {logits.device}", targets.boxes)
