"""What a detector is trained on: class, distance and overlap of matched predictions."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from .._utils.checks import check_range, check_tensor, reads_contents, refuse
from .boxes import generalized_iou, iou, relative_l1
from .focal import sigmoid_focal_loss, varifocal_loss
from .matching import Matches
from .targets import Predictions, Targets, check_pair
from .weights import Weights


class LossParts(NamedTuple):
    """Weighted parts of a loss, scalars each; what is minimised is their sum.

    Attributes:
        classes: focal loss of all predictions.
        l1: distance of matched boxes from their objects'.
        giou: one less the GIoU of matched boxes and their objects'.
    """

    classes: Tensor
    l1: Tensor
    giou: Tensor


@dataclass(frozen=True)
class DetectionLoss(Weights):
    """Focal loss of the classes, L1 and GIoU of the boxes (Carion et al. 2020, Zhu et al. 2021).

    Predictions that are matched with an object have its class, all others none. All is computed in
    float32 at least, under autocast too. For further arguments and refusals see `Weights`.

    Args:
        quality: the score of a matched prediction is to be the IoU of its box with its object's,
            not 1 (`varifocal_loss`, Zhang et al. 2021).
    """

    quality: bool = False

    def __call__(
        self,
        predictions: Predictions,
        targets: Targets,
        matches: Matches,
        n_objects: Tensor | float,
    ) -> LossParts:
        """The loss of ``predictions``, of which ``matches`` answer for objects.

        Args:
            predictions: of all images.
            targets: the objects of the same images.
            matches: from `HungarianMatcher`, or `Matches.inside` for one-to-many supervision; no
                prediction twice.
            n_objects: what the sums are divided by, see `mean_objects`.

        Raises:
            ValueError: predictions and targets that do not fit each other (`check_targets`), or
                matches that are not theirs.
        """
        check_pair(predictions, targets)
        _check_matches(matches, predictions, targets)
        boxes, to = predictions.boxes[matches.prediction], targets.boxes[matches.target]
        classes = self._classes(predictions, targets, matches, boxes, to)
        return LossParts(
            self.class_weight * classes.sum() / n_objects,
            self.l1_weight * relative_l1(boxes, to).sum() / n_objects,
            self.giou_weight * (1 - generalized_iou(boxes, to)).sum() / n_objects,
        )

    def _classes(
        self,
        predictions: Predictions,
        targets: Targets,
        matches: Matches,
        boxes: Tensor,
        to: Tensor,
    ) -> Tensor:
        """``[N]``: the loss of every prediction's logits."""
        logits = predictions.logits
        labels = torch.full(logits.shape[:1], -1, device=logits.device)
        labels[matches.prediction] = targets.labels[matches.target].long()
        if not self.quality:
            return sigmoid_focal_loss(logits, labels, self.alpha, self.gamma)
        overlap = iou(boxes.detach(), to)
        quality = overlap.new_zeros(len(logits)).index_copy(0, matches.prediction, overlap)
        return varifocal_loss(logits, labels, quality, self.alpha, self.gamma)


def _check_matches(matches: Matches, predictions: Predictions, targets: Targets) -> None:
    if not isinstance(matches, Matches):
        refuse("matches", "Matches", matches)
    rows = {"prediction": len(predictions.logits), "target": len(targets.labels)}
    device = predictions.logits.device
    for (name, n), indices in zip(rows.items(), matches, strict=True):
        pairs: list[int | str] = ["K"] if name == "prediction" else [len(matches.prediction)]
        check_tensor(f"matches.{name}", indices, pairs, kind="integer", device=device)
        if reads_contents(None, device):
            check_range(f"matches.{name}", indices, n)


def mean_objects(n: Tensor | int, device: torch.device) -> Tensor:
    """The number of objects per process, of at least 1 in all: what a loss is divided by.

    Where processes train together (``torch.distributed``), their gradients are averaged; divided
    by the mean, losses weigh every object alike, whichever process has it. All of them have to
    call this, each with its own ``n``.

    Returns:
        a float32 scalar on ``device``.
    """
    objects = torch.as_tensor(n, dtype=torch.float32, device=device).clone()
    if not (dist.is_available() and dist.is_initialized()):
        return objects.clamp(min=1)
    dist.all_reduce(objects)
    # At least 1 before it is shared out, or one object on two processes would count half.
    return objects.clamp(min=1) / dist.get_world_size()
