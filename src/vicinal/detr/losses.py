"""The training loss of a detector: classes, distance and overlap of matched predictions."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from .._utils.checks import check_counts, check_range, check_tensor, is_real, reads_contents, refuse
from .._utils.modules import Module
from .._utils.ragged import batch_ids
from .boxes import Period, box_period, generalized_iou, iou, relative_l1
from .detector import DetectorOutput
from .focal import LossWeights, sigmoid_focal_loss, varifocal_loss
from .matching import HungarianMatcher, assign_points_to_boxes
from .structures import (
    Matches,
    Predictions,
    Targets,
    check_boxes_on_map,
    check_predictions_and_targets,
    check_targets,
)


class LossTerms(NamedTuple):
    """The weighted terms of a `DetectionLoss`; training minimizes their sum.

    Attributes:
        classes: scalar, the focal loss of all predictions.
        l1: scalar, the relative L1 distance of matched boxes from those of their objects.
        giou: scalar, one minus the generalized IoU of matched boxes and those of their objects.

    Example:
        ```python
        import torch
        from vicinal.detr import LossTerms

        terms = LossTerms(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0))
        assert sum(terms).item() == 6
        ```
    """

    classes: Tensor
    l1: Tensor
    giou: Tensor


@dataclass(frozen=True)
class DetectionLoss(LossWeights):
    """Focal loss of the classes, L1 and generalized IoU loss of the boxes.

    The loss of DETR (Carion et al., "End-to-End Object Detection with Transformers", 2020) with the
    focal loss of Deformable DETR (Zhu et al., 2021). Matched predictions have the class of their
    object, all others are background. It is computed in at least float32, under autocast too.

    Args:
        class_weight: weight of the focal loss of the classes; default 2.
        l1_weight: weight of the L1 distance relative to the object's size (`relative_l1`);
            default 5.
        giou_weight: weight of the generalized IoU loss; default 2.
        alpha: weight of the positive class in the focal loss; default 0.25.
        gamma: focusing parameter of the focal loss; default 2.
        quality: the target score of a matched prediction is the IoU of its box with that of its
            object (`varifocal_loss`), not 1; default False.

    Raises:
        ValueError: a weight is negative or not finite, or ``alpha`` is above 1.

    Example:
        ```python
        import torch
        from vicinal.detr import DetectionLoss, Matches, Predictions, Targets

        boxes = torch.tensor([[10.0, 8.0, 4.0, 6.0], [30.0, 9.0, 5.0, 5.0]])
        predictions = Predictions(torch.zeros(2, 3), boxes, torch.tensor([0, 2]))
        targets = Targets(boxes[:1] + 1, torch.tensor([2]), torch.tensor([0, 1]))
        matches = Matches(prediction=torch.tensor([0]), target=torch.tensor([0]))
        terms = DetectionLoss()(predictions, targets, matches, n_objects=1)
        assert all(term > 0 for term in terms)
        ```
    """

    quality: bool = False

    def __call__(
        self,
        predictions: Predictions,
        targets: Targets,
        matches: Matches,
        n_objects: Tensor | float,
        *,
        period: Period | None = None,
    ) -> LossTerms:
        """Computes the loss of predictions that are matched to objects.

        Args:
            predictions: of all images.
            targets: the objects of the same images.
            matches: from `HungarianMatcher`, or from `Matches.from_assignment` for one-to-many
                supervision; each prediction occurs at most once.
            n_objects: the divisor of all sums, see `mean_object_count`.
            period: ``[P]``, see `box_period`. None (default): no axis is periodic.

        Returns:
            weighted scalars.

        Raises:
            ValueError: predictions or targets are not valid (`check_predictions`,
                `check_targets`) or not of the same images, matches are out of range, or
                ``n_objects`` is not above 0.
        """
        _check_divisor(n_objects)
        predictions, targets = check_predictions_and_targets(predictions, targets)
        matches = _check_matches(matches, predictions, targets)
        boxes = predictions.boxes[matches.prediction]
        target_boxes = targets.boxes[matches.target]
        overlap = iou(boxes.detach(), target_boxes, period=period) if self.quality else None
        classes = self._class_loss(predictions.logits, targets.labels, matches, overlap)
        l1 = relative_l1(boxes, target_boxes, period=period)
        giou = generalized_iou(boxes, target_boxes, period=period)
        return LossTerms(
            self.class_weight * classes.sum() / n_objects,
            self.l1_weight * l1.sum() / n_objects,
            self.giou_weight * (1 - giou).sum() / n_objects,
        )

    def _class_loss(
        self,
        logits: Tensor,
        target_labels: Tensor,
        matches: Matches,
        overlap: Tensor | None,
    ) -> Tensor:
        """``[N]``, the loss of every prediction's logits; ``overlap`` is the quality of matches."""
        labels = torch.full(logits.shape[:1], -1, device=logits.device)
        labels.index_copy_(0, matches.prediction, target_labels[matches.target])
        if overlap is None:
            return sigmoid_focal_loss(logits, labels, self.alpha, self.gamma)
        quality = overlap.new_zeros(len(logits)).index_copy(0, matches.prediction, overlap)
        return varifocal_loss(logits, labels, quality, self.alpha, self.gamma)


class SetCriterion(Module):
    """The training loss of a `Detector`, over all decoder layers and the candidates.

    Every decoder layer is matched to the objects one to one, by a matching of its own (Carion et
    al., "End-to-End Object Detection with Transformers", 2020). Candidates for object queries are
    assigned one to many: every candidate inside an object's box is assigned to it, since only
    self-attention, in the decoder, suppresses duplicates. Denoising queries know their objects.

    Losses of layers are divided by the number of objects, those of candidates by the number of
    candidates inside boxes, those of denoising queries by their number; each is averaged over the
    processes of ``torch.distributed`` (`mean_object_count`). Where that is initialized, all
    processes must call the criterion.

    Args:
        matcher: matches predictions of decoder layers to objects; None (default):
            ``HungarianMatcher()``.
        loss: of decoder layers and denoising queries; None (default): ``DetectionLoss()``.
        candidate_loss: of candidates; None (default): ``loss``.

    Raises:
        ValueError: a part cannot be called.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid
        from vicinal.detr import (
            DetectorOutput, ObjectQueries, Predictions, QuerySelectionOutput, SetCriterion,
            Targets, sum_losses,
        )

        pyramid = FeaturePyramid(
            torch.randn(2, 8), torch.tensor([[0, 1, 1, 0], [0, 3, 2, 0]]), ((4, 4),), 1
        )
        boxes, offsets = torch.tensor([[1.5, 1.5, 2, 2], [3.5, 2.5, 2, 2]]), torch.tensor([0, 2])
        predictions = Predictions(torch.zeros(2, 3, requires_grad=True), boxes, offsets)
        queries = ObjectQueries(pyramid.values, boxes, pyramid.levels, offsets)
        rows = torch.arange(2)
        selection = QuerySelectionOutput(queries, predictions, pyramid.positions(), rows, rows)
        output = DetectorOutput(pyramid, selection, [predictions], [queries])

        targets = Targets(torch.tensor([[1.0, 1, 2, 2]]), torch.tensor([2]), torch.tensor([0, 1]))
        losses = SetCriterion()(output, targets)
        assert "layer 0 giou" in losses
        sum_losses(losses).backward()
        ```
    """

    def __init__(
        self,
        matcher: HungarianMatcher | None = None,
        loss: DetectionLoss | None = None,
        candidate_loss: DetectionLoss | None = None,
    ) -> None:
        super().__init__()
        parts = {"matcher": matcher, "loss": loss, "candidate_loss": candidate_loss}
        for name, part in parts.items():
            if part is not None and not callable(part):
                refuse(name, "a callable or None", part)
        self.matcher = HungarianMatcher() if matcher is None else matcher
        self.loss = DetectionLoss() if loss is None else loss
        self.candidate_loss = self.loss if candidate_loss is None else candidate_loss

    def forward(self, output: DetectorOutput, targets: Targets) -> dict[str, Tensor]:
        """Computes all losses; training minimizes their sum, see `sum_losses`.

        Args:
            output: of a `Detector`.
            targets: the objects of the same images, in the same units. On a map with periodic
                axes their boxes may pass the seam.

        Returns:
            weighted scalars by name: ``"candidates ..."``, ``"layer i ..."`` and, with denoising
            queries, ``"denoising i ..."``, each for ``classes``, ``l1`` and ``giou``.

        Raises:
            ValueError: targets are not valid (`check_targets`), not of the same images or in a
                dtype that cannot hold the map's cells, or predictions are not finite.
        """
        if not isinstance(output, DetectorOutput):
            refuse("output", "a DetectorOutput", output)
        candidates, device = output.selection.candidates, output.layers[0].logits.device
        targets = check_targets(targets, None, None, len(candidates.offsets) - 1, device=device)
        check_boxes_on_map("targets.boxes", targets.boxes, output.pyramid)
        period = box_period(output.pyramid)
        assignment = assign_points_to_boxes(
            output.selection.positions, candidates.offsets, targets, period=period
        )
        inside = Matches.from_assignment(assignment)
        n_objects = self._mean_count(len(targets.labels), device)
        n_inside = mean_object_count(len(inside.prediction), device)
        terms = {
            "candidates": self.candidate_loss(candidates, targets, inside, n_inside, period=period)
        }
        for index, predictions in enumerate(output.layers):
            matches = self.matcher(predictions, targets, period=period)
            terms[f"layer {index}"] = self.loss(
                predictions, targets, matches, n_objects, period=period
            )
        if output.denoising is not None:
            layers, matches = output.denoising
            n_noisy = self._mean_count(len(matches.target), device)
            for index, predictions in enumerate(layers):
                terms[f"denoising {index}"] = self.loss(
                    predictions, targets, matches, n_noisy, period=period
                )
        return {
            f"{stage} {name}": value
            for stage, losses in terms.items()
            for name, value in losses._asdict().items()
        }

    def _mean_count(self, n: int, device: torch.device) -> Tensor:
        """The divisor of losses of n objects, or of their copies."""
        return mean_object_count(n, device)


def sum_losses(losses: dict[str, Tensor]) -> Tensor:
    """Adds up all losses.

    Args:
        losses: scalars by name, as `SetCriterion` returns them.

    Returns:
        a scalar, to be minimized.

    Raises:
        ValueError: there are no losses, or one is not a scalar tensor.

    Example:
        ```python
        import torch
        from vicinal.detr import sum_losses

        assert sum_losses({"a": torch.tensor(1.0), "b": torch.tensor(2.0)}).item() == 3
        ```
    """
    scalars = list(losses.values()) if isinstance(losses, Mapping) else []
    if not scalars or not all(isinstance(x, Tensor) and x.dim() == 0 for x in scalars):
        refuse("losses", "at least one scalar tensor by name", losses)
    return torch.stack(scalars).sum()


def mean_object_count(n: Tensor | int, device: torch.device, *, copies: int = 1) -> Tensor:
    """Computes the mean number of objects per process, the divisor of a loss.

    ``torch.distributed`` averages gradients over processes. Losses that are divided by the mean
    number of objects weigh every object equally, whichever process has it. With an initialized
    process group this is a collective operation: all processes have to call it.

    Args:
        n: the number of objects of this process.
        device: of the result.
        copies: how many processes count the same objects, as the ranks that share a scene do.
            Default: 1.

    Returns:
        a float32 scalar: the number of objects of all processes, each counted once, at least 1,
        divided by the number of processes that have objects of their own.

    Raises:
        ValueError: ``n`` is not one number, or is negative, or ``copies`` is below 1.

    Example:
        ```python
        import torch
        from vicinal.detr import mean_object_count

        assert mean_object_count(5, torch.device("cpu")).item() == 5
        assert mean_object_count(0, torch.device("cpu")).item() == 1
        ```
    """
    if not isinstance(n, Tensor) and not (is_real(n) and 0 <= n < math.inf):
        refuse("n", "a number of objects, at least 0", n)
    if isinstance(n, Tensor) and n.numel() != 1:
        refuse("n", "one number of objects", n)
    check_counts(copies=copies)
    count = torch.as_tensor(n, dtype=torch.float32, device=device).clone()
    if not (dist.is_available() and dist.is_initialized()):
        return count.clamp(min=1)
    dist.all_reduce(count)
    # Clamped before the division: after it, a single object on two processes would count half.
    return (count / copies).clamp(min=1) * copies / dist.get_world_size()


def _check_divisor(n_objects: Any) -> None:
    """Raises ValueError unless it is a number above 0, which is not read from a GPU."""
    expected = "a number above 0, or a tensor with one"
    if isinstance(n_objects, Tensor):
        is_known = reads_contents(None, n_objects.device)
        if n_objects.numel() != 1 or (is_known and not n_objects.item() > 0):
            refuse("n_objects", expected, n_objects)
    elif not is_real(n_objects) or not 0 < n_objects < math.inf:
        refuse("n_objects", expected, n_objects)


def _check_matches(matches: Any, predictions: Predictions, targets: Targets) -> Matches:
    """``matches`` as int64 tensors; raises ValueError unless they are rows of both."""
    if not isinstance(matches, Matches):
        refuse("matches", "Matches", matches)
    device = predictions.logits.device
    prediction = check_tensor(
        "matches.prediction", matches.prediction, ("K",), kind="integer", device=device
    ).long()
    target = check_tensor(
        "matches.target", matches.target, prediction.shape, kind="integer", device=device
    ).long()
    if reads_contents(None, device):
        check_range("matches.prediction", prediction, len(predictions.logits))
        check_range("matches.target", target, len(targets.labels))
        if prediction.numel() and int(prediction.bincount().max()) > 1:
            refuse("matches.prediction", "each prediction at most once", "one of them twice")
        images = batch_ids(predictions.offsets, len(predictions.logits))[prediction]
        if (images != batch_ids(targets.offsets, len(targets.labels))[target]).any():
            refuse("matches", "pairs within an image", "a pair of two images")
    return Matches(prediction, target)
