"""How well points are labeled: accuracy, and the mean intersection over union of the classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from examples.formats.raw import IGNORED


class Quality(NamedTuple):
    """Attributes: all in [0, 1].

    accuracy: the share of points with the right label.
    miou: the mean of ``ious``, without those of classes that occur nowhere.
    ious: of each class, NaN for one that is neither true nor predicted anywhere.
    """

    accuracy: float
    miou: float
    ious: list[float]


def confusion(labels: Tensor, predicted: Tensor, n_classes: int) -> Tensor:
    """int64 ``[n_classes, n_classes]``: number of points by true and by predicted class.

    Points with the label `IGNORED` do not count.
    """
    known = labels != IGNORED
    cells = labels[known] * n_classes + predicted[known]
    cells = torch.bincount(cells, minlength=n_classes**2)
    return cells.view(n_classes, n_classes)


def quality(counts: Tensor) -> Quality:
    """The quality of labels, from their `confusion`, which may be a sum over scenes.

    The intersection over union of a class is the number of points that rightly have it over the
    number of those that have it, rightly or predicted (Everingham et al., "The Pascal Visual Object
    Classes Challenge", 2010).
    """
    counts = counts.double()
    right = counts.diagonal()
    ious = right / (counts.sum(0) + counts.sum(1) - right)
    return Quality(float(right.sum() / counts.sum()), float(ious.nanmean()), ious.tolist())
