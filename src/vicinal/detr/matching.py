"""Assignment of predictions to objects: one to one, or one to many."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import check_finite, check_offsets, check_tensor, reads_contents, refuse
from .._utils.ragged import expand_ranges
from ..backends.transforms import transforms_active
from ..windows import coordinate_dtype
from .boxes import Period, boxes_to_corners, center_offsets, generalized_iou, relative_l1
from .focal import LossWeights, focal_terms
from .structures import (
    Matches,
    Predictions,
    Targets,
    check_predictions,
    check_predictions_and_targets,
    check_targets,
)


@dataclass(frozen=True)
class HungarianMatcher(LossWeights):
    """Matches objects to predictions one to one, at minimal total cost per image.

    The bipartite matching of DETR (Carion et al., "End-to-End Object Detection with Transformers",
    2020). The cost of a pair is ``class_weight`` times the focal loss of the object's class as a
    positive minus that as a negative, plus ``l1_weight`` times the `relative_l1`, minus
    ``giou_weight`` times the `generalized_iou`. Requires SciPy (``pip install 'vicinal[detr]'``).

    Args:
        class_weight: weight of the focal loss of the class; default 2.
        l1_weight: weight of the L1 distance relative to the object's size; default 5.
        giou_weight: weight of the generalized IoU; default 2.
        alpha: weight of the positive class in the focal loss; default 0.25.
        gamma: focusing parameter of the focal loss; default 2.

    Raises:
        ValueError: a weight is negative or not finite, or ``alpha`` is above 1.

    Example:
        ```python
        import torch
        from vicinal.detr import HungarianMatcher, Predictions, Targets

        boxes = torch.tensor([[10.0, 8.0, 4.0, 6.0], [30.0, 9.0, 5.0, 5.0]])
        predictions = Predictions(torch.zeros(2, 3), boxes, torch.tensor([0, 2]))
        targets = Targets(boxes[1:] + 1, torch.tensor([2]), torch.tensor([0, 1]))
        matches = HungarianMatcher()(predictions, targets)
        assert matches.prediction.tolist() == [1]
        ```
    """

    @torch.no_grad()
    def __call__(
        self, predictions: Predictions, targets: Targets, *, period: Period | None = None
    ) -> Matches:
        """Matches the objects of every image.

        An image with fewer predictions than objects has as many matches as predictions. Costs of
        all images are computed together and, from a GPU, copied to the CPU at once.

        Args:
            predictions: of all images.
            targets: the objects of the same images.
            period: ``[P]``, see `box_period`. None (default): no axis is periodic.

        Returns:
            pairs, image by image, on the device of the predictions.

        Raises:
            ValueError: predictions or targets are not valid (`check_predictions`,
                `check_targets`) or not of the same images, or costs overflow.
            ImportError: SciPy is not installed.
        """
        predictions, targets = check_predictions_and_targets(predictions, targets)
        solve = _linear_sum_assignment()
        device = predictions.logits.device
        offsets = torch.stack((predictions.offsets, targets.offsets)).tolist()
        prediction, target = _pairs_within_images(offsets[0], offsets[1], device)
        costs = self._costs(predictions, targets, prediction, target, period).cpu()
        if not torch.isfinite(costs).all():
            check_predictions(predictions, check_contents=True)
            refuse("predictions", "boxes near enough for finite costs", "costs that overflow")

        first = 0
        pairs = [torch.empty(2, 0, dtype=torch.int64)]
        for rows, columns in _slices_per_image(*offsets):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            if 0 in shape:
                continue
            last = first + shape[0] * shape[1]
            own = costs[first:last].double().view(shape)
            # A tensor of `torch.func` does not become an array.
            row, column = solve(own.tolist() if transforms_active() else own.numpy())
            pairs.append(
                torch.stack(
                    (torch.as_tensor(row) + rows.start, torch.as_tensor(column) + columns.start)
                )
            )
            first = last
        return Matches(*torch.cat(pairs, 1).to(device))

    def _costs(
        self,
        predictions: Predictions,
        targets: Targets,
        prediction: Tensor,
        target: Tensor,
        period: Period | None,
    ) -> Tensor:
        """``[K]``: the cost of every pair of a row ``prediction`` and a row ``target``."""
        logits = predictions.logits[prediction, targets.labels[target]]
        positive, negative = focal_terms(logits, self.alpha, self.gamma)
        boxes, target_boxes = predictions.boxes[prediction], targets.boxes[target]
        return (
            self.class_weight * (positive - negative)
            + self.l1_weight * relative_l1(boxes, target_boxes, period=period)
            - self.giou_weight * generalized_iou(boxes, target_boxes, period=period)
        )


def assign_points_to_boxes(
    positions: Tensor, offsets: Tensor, targets: Targets, *, period: Period | None = None
) -> Tensor:
    """Assigns every point to the smallest object of its image whose box contains it.

    One-to-many supervision for dense predictions, as in FCOS (Tian et al., 2019). Points on the
    border of a box are inside; among boxes of equal volume the first is chosen.

    Args:
        positions: floating ``[n, P]``, in cells of the full shape.
        offsets: integer ``[B + 1]``: image ``b`` owns the points ``offsets[b]:offsets[b + 1]``.
        targets: the objects of the same images.
        period: ``[P]``, see `box_period`. None (default): no axis is periodic.

    Returns:
        int64 ``[n]``, rows of ``targets``, -1 for points outside all boxes.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or, on the CPU, positions are not finite
            or targets are not valid (`check_targets`).

    Example:
        ```python
        import torch
        from vicinal.detr import Targets, assign_points_to_boxes

        targets = Targets(
            torch.tensor([[5.0, 5.0, 4.0, 4.0]]), torch.tensor([0]), torch.tensor([0, 1])
        )
        points = torch.tensor([[4.0, 6.0], [9.0, 9.0]])
        assert assign_points_to_boxes(points, torch.tensor([0, 2]), targets).tolist() == [0, -1]
        ```
    """
    positions, offsets, targets = _check_points(positions, offsets, targets)
    n, device = len(positions), positions.device
    boxes = targets.boxes.to(coordinate_dtype(targets.boxes.dtype))
    low, high = boxes_to_corners(boxes)
    center = boxes[:, : positions.shape[1]]
    order = torch.argsort((high - low).log().sum(1), stable=True)
    # Comparisons run fastest over contiguous points, and ranks as int32: axes and objects first.
    n_targets, points = len(order), positions.t().contiguous()[:, None]  # [P, 1, n]
    low, high = low.t()[:, :, None], high.t()[:, :, None]  # [P, M, 1]
    rows = torch.arange(n_targets, dtype=torch.int32, device=device)
    rank = torch.empty_like(rows).index_copy_(0, order, rows)[:, None]  # [M, 1]

    smallest = torch.full((n,), n_targets, dtype=torch.int32, device=device)
    for own, objects in _slices_per_image(*torch.stack((offsets, targets.offsets)).tolist()):
        if objects.stop > objects.start:
            position = points[..., own]
            if period is not None:
                position = _near(position, center[objects], period)
            inside = ((low[:, objects] <= position) & (position <= high[:, objects])).all(0)
            smallest[own] = torch.where(inside, rank[objects], n_targets).amin(0)
    return torch.cat((order, order.new_full((1,), -1)))[smallest]


def _near(positions: Tensor, centers: Tensor, period: Period) -> Tensor:
    """``[P, m, n]``: ``positions`` ``[P, 1, n]`` by the short way from each of ``centers``
    ``[m, P]``.
    """
    centers = centers[None]  # [1, m, P]
    offsets = center_offsets(positions.permute(2, 1, 0), centers, period)
    return (centers + offsets).permute(2, 1, 0)


def _check_points(
    positions: Tensor, offsets: Tensor, targets: Targets
) -> tuple[Tensor, Tensor, Targets]:
    positions = check_tensor("positions", positions, ("n", "P"), kind="floating")
    n, position_dim = positions.shape
    device = positions.device
    offsets = check_tensor("offsets", offsets, ("B + 1",), kind="integer", device=device).long()
    targets = check_targets(targets, position_dim, None, len(offsets) - 1, device=device)
    if reads_contents(None, device):
        check_offsets("offsets", offsets, n)
        check_finite("positions", positions)
    return positions, offsets, targets


def _slices_per_image(
    first_offsets: list[int], second_offsets: list[int]
) -> Iterator[tuple[slice, slice]]:
    """Each image's rows in two ragged batches."""
    for first, second in zip(
        itertools.pairwise(first_offsets), itertools.pairwise(second_offsets), strict=True
    ):
        yield slice(*first), slice(*second)


def _pairs_within_images(
    first_offsets: list[int], second_offsets: list[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """int64 ``[K]`` each: all pairs of a first and a second row of the same image.

    Pairs are ordered by first row, then by second row.
    """
    first_counts, second_counts = (
        [stop - start for start, stop in itertools.pairwise(offsets)]
        for offsets in (first_offsets, second_offsets)
    )
    n_pairs = sum(n * m for n, m in zip(first_counts, second_counts, strict=True))
    # Of every first row: the number of second rows of its image, and the first of them.
    per_image = torch.tensor([second_counts, second_offsets[:-1]], dtype=torch.int64)
    repeats = torch.tensor(first_counts, dtype=torch.int64)
    count, start = torch.repeat_interleave(per_image, repeats, 1).to(device)
    return expand_ranges(start, count, n_pairs)


def _linear_sum_assignment() -> Callable[[Any], tuple[Any, Any]]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        needs = "HungarianMatcher needs scipy, which is not installed: pip install 'vicinal[detr]'"
        raise ImportError(needs) from error
    solve: Callable[[Any], tuple[Any, Any]] = linear_sum_assignment
    return solve
