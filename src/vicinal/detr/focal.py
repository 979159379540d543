"""The focal loss of Lin et al. 2017, and its relative for soft targets, from logits."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .._utils.checks import check_tensor, reads_contents, refuse
from ..windows import coordinate_dtype


def focal_terms(logits: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """What each logit costs if its class is there, and if it is not; in float32 at least.

    With ``p`` the sigmoid of the logit: ``-alpha (1 - p)^gamma log p`` and
    ``-(1 - alpha) p^gamma log(1 - p)``. Powers are taken of logarithms, so that no logit, however
    large, gives anything but finite values and gradients.
    """
    logits = logits.to(coordinate_dtype(logits.dtype))
    log_present, log_absent = logsigmoid(logits), logsigmoid(-logits)
    return (
        -alpha * (gamma * log_absent).exp() * log_present,
        -(1 - alpha) * (gamma * log_present).exp() * log_absent,
    )


def sigmoid_focal_loss(
    logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """Binary focal loss of every class, summed over the classes (Lin et al. 2017).

    Args:
        logits: floating ``[N, C]``.
        labels: int64 ``[N]``, the class of each row, -1 for background.
        alpha: weight of the class that is there; all others have ``1 - alpha``.
        gamma: how much less what is nearly right counts; 0 for cross-entropy.

    Returns:
        ``[N]``, in float32 at least.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, and on the CPU labels outside
            [-1, C).
    """
    is_class = _is_class(logits, labels)
    present, absent = focal_terms(logits, alpha, gamma)
    return torch.where(is_class, present, absent).sum(1)


def varifocal_loss(
    logits: Tensor, labels: Tensor, quality: Tensor, alpha: float = 0.25, gamma: float = 2.0
) -> Tensor:
    """As `sigmoid_focal_loss`, but for the class that is there cross-entropy with ``quality``,
    weighted by it (Zhang et al. 2021, with their alpha for ``1 - alpha``).

    Args:
        logits: floating ``[N, C]``.
        labels: int64 ``[N]``, the class of each row, -1 for background.
        quality: floating ``[N]`` in [0, 1], what the class's score should be; unused where the
            label is -1.
        alpha, gamma: of the focal loss of the classes that are not there.

    Returns:
        ``[N]``, in float32 at least.

    Raises:
        ValueError: as `sigmoid_focal_loss`.
    """
    is_class = _is_class(logits, labels)
    check_tensor("quality", quality, labels.shape, kind="floating", device=logits.device)
    _, absent = focal_terms(logits, alpha, gamma)
    logits = logits.to(absent.dtype)
    score = quality.to(absent.dtype)[:, None]
    present = -score * (score * logsigmoid(logits) + (1 - score) * logsigmoid(-logits))
    return torch.where(is_class, present, absent).sum(1)


def _is_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Bool ``[N, C]``: whether a column is its row's class."""
    check_tensor("logits", logits, ("N", "C"), kind="floating")
    check_tensor("labels", labels, logits.shape[:1], kind="integer", device=logits.device)
    n_classes = logits.shape[1]
    if reads_contents(None, logits.device):
        wrong = (labels < -1) | (labels >= n_classes)
        if wrong.any():
            span = f"labels from {int(labels.min())} to {int(labels.max())}"
            refuse("labels", f"classes in [0, {n_classes}), or -1", span)
    return labels[:, None] == torch.arange(n_classes, device=logits.device)
