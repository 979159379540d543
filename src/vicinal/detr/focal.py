"""Focal losses from logits, and the weights that the matching cost and the loss share."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .._utils.checks import check_tensor, is_real, reads_contents, refuse
from ..windows import coordinate_dtype


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms of a matching cost or a loss, and the parameters of the focal loss.

    The base class of `HungarianMatcher` and `DetectionLoss`.

    Args:
        class_weight: weight of the focal loss of the classes; default 2.
        l1_weight: weight of the L1 distance relative to the object's size (`relative_l1`);
            default 5.
        giou_weight: weight of the generalized IoU; default 2.
        alpha: weight of the positive class in the focal loss; default 0.25.
        gamma: focusing parameter of the focal loss; default 2.

    Raises:
        ValueError: a number is negative or not finite, or ``alpha`` is above 1.

    Example:
        ```python
        from vicinal.detr import LossWeights

        assert LossWeights(giou_weight=1.0).class_weight == 2.0
        ```
    """

    class_weight: float = 2.0
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    def __post_init__(self) -> None:
        for field in fields(LossWeights):
            _check_weights(**{field.name: getattr(self, field.name)})


def sigmoid_focal_loss(
    logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Computes the binary focal loss of all classes, summed over the classes.

    Lin et al., "Focal Loss for Dense Object Detection", 2017. All logits, however large, have
    finite losses and gradients.

    Args:
        logits: floating ``[N, C]``.
        labels: int64 ``[N]``, the class of each row, -1 for background.
        alpha: weight of the row's class; all other classes have the weight ``1 - alpha``.
        gamma: focusing parameter: how strongly well-classified examples are down-weighted; 0 gives
            the weighted cross-entropy.

    Returns:
        ``[N]``, at least float32.

    Raises:
        ValueError: shapes, dtypes or devices do not match, ``alpha`` or ``gamma`` are not as in
            `LossWeights`, or, on the CPU, labels are outside [-1, C).

    Example:
        ```python
        import torch
        from vicinal.detr import sigmoid_focal_loss

        logits = torch.tensor([[4.0, -4.0], [-4.0, 4.0]])
        loss = sigmoid_focal_loss(logits, torch.tensor([0, 0]))
        assert loss[0] < loss[1]
        ```
    """
    _check_weights(alpha=alpha, gamma=gamma)
    logits, labels = _check_labels(logits, labels)
    is_label = _one_hot(logits, labels)
    positive, negative = focal_terms(logits, alpha, gamma)
    return torch.where(is_label, positive, negative).sum(1)


def varifocal_loss(
    logits: Tensor, labels: Tensor, quality: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Computes the varifocal loss of all classes, summed over the classes.

    For the row's class this is the cross-entropy with the soft target ``quality``, weighted by
    ``quality``; for all other classes it is the `sigmoid_focal_loss` (Zhang et al., "VarifocalNet",
    2021, whose alpha is ``1 - alpha`` here).

    Args:
        logits: floating ``[N, C]``.
        labels: int64 ``[N]``, the class of each row, -1 for background.
        quality: floating ``[N]`` in [0, 1], the target score of the row's class; ignored where the
            label is -1.
        alpha: ``1 - alpha`` is the weight of the other classes.
        gamma: focusing parameter of the other classes.

    Returns:
        ``[N]``, at least float32.

    Raises:
        ValueError: shapes, dtypes or devices do not match, ``alpha`` or ``gamma`` are not as in
            `LossWeights`, or, on the CPU, labels are outside [-1, C).

    Example:
        ```python
        import torch
        from vicinal.detr import varifocal_loss

        logits, labels = torch.zeros(2, 3), torch.tensor([1, -1])
        loss = varifocal_loss(logits, labels, quality=torch.tensor([0.8, 0.0]))
        assert loss.shape == (2,)
        ```
    """
    _check_weights(alpha=alpha, gamma=gamma)
    logits, labels = _check_labels(logits, labels)
    is_label = _one_hot(logits, labels)
    quality = check_tensor("quality", quality, labels.shape, kind="floating", device=logits.device)
    _, negative = focal_terms(logits, alpha, gamma)
    logits = logits.to(negative.dtype)
    score = quality.to(negative.dtype)[:, None]
    positive = -score * (score * logsigmoid(logits) + (1 - score) * logsigmoid(-logits))
    return torch.where(is_label, positive, negative).sum(1)


def focal_terms(logits: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """The focal loss of each logit as a positive and as a negative, at least float32.

    With ``p = sigmoid(logit)``: ``-alpha (1 - p)^gamma log p`` and
    ``-(1 - alpha) p^gamma log(1 - p)``. Powers are computed as exponentials of logarithms, so
    values and gradients are finite for logits of any size.
    """
    logits = logits.to(coordinate_dtype(logits.dtype))
    log_p, log_1_minus_p = logsigmoid(logits), logsigmoid(-logits)
    return (
        -alpha * (gamma * log_1_minus_p).exp() * log_p,
        -(1 - alpha) * (gamma * log_p).exp() * log_1_minus_p,
    )


def _check_weights(**weights: Any) -> None:
    """Raises ValueError unless ``weights`` by name are valid for `LossWeights`."""
    for name, value in weights.items():
        largest = 1.0 if name == "alpha" else math.inf
        if not is_real(value) or not 0 <= value <= largest or value == math.inf:
            refuse(name, f"a finite number in [0, {largest}]", value)


def _check_labels(logits: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Both as tensors; raises ValueError unless they are logits and labels of the same rows."""
    logits = check_tensor("logits", logits, ("N", "C"), kind="floating")
    shape, n_classes = logits.shape[:1], logits.shape[1]
    labels = check_tensor("labels", labels, shape, kind="integer", device=logits.device)
    if reads_contents(None, logits.device):
        invalid = (labels < -1) | (labels >= n_classes)
        if invalid.any():
            span = f"labels from {int(labels.min())} to {int(labels.max())}"
            refuse("labels", f"classes in [0, {n_classes}), or -1", span)
    return logits, labels


def _one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    """Bool ``[N, C]``: whether a column is its row's label."""
    return labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
