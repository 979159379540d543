"""Which prediction answers for which object: one to one, or all points inside a box."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._utils.checks import check_finite, check_offsets, check_tensor, reads_contents, refuse
from ..windows import coordinate_dtype
from .boxes import corners, generalized_iou, relative_l1
from .focal import focal_terms
from .targets import Predictions, Targets, check_pair, check_predictions, check_targets
from .weights import Weights


class Matches(NamedTuple):
    """Pairs of a prediction and the object it answers for.

    Attributes:
        prediction: int64 ``[K]``, rows of the predictions, rising.
        target: int64 ``[K]``, rows of the targets.
    """

    prediction: Tensor
    target: Tensor

    @classmethod
    def inside(cls, assigned: Tensor) -> "Matches":
        """From the int64 ``[n]`` of `assign_inside`: all that have a target. Waits for a GPU."""
        (prediction,) = torch.nonzero(assigned >= 0, as_tuple=True)
        return cls(prediction, assigned[prediction])


@dataclass(frozen=True)
class HungarianMatcher(Weights):
    """Matches each object to the prediction that costs least, one to one (Carion et al. 2020).

    Within each image the sum over the matched pairs is the smallest possible of ``class_weight``
    times what the object's class costs more than background in focal loss, plus ``l1_weight``
    times the distance in units of the object's size (`relative_l1`), less ``giou_weight`` times
    the GIoU. Needs ``scipy``. For arguments and refusals see `Weights`.
    """

    @torch.no_grad()
    def __call__(self, predictions: Predictions, targets: Targets) -> Matches:
        """Matches every image's objects, or as many as it has predictions.

        The costs of all images are found together and cross from a GPU in one transfer.

        Returns:
            pairs, image by image, on the device of the predictions.

        Raises:
            ValueError: predictions and targets that do not fit each other (`check_targets`), or
                numbers in the predictions that are not finite.
            ImportError: ``scipy`` is missing.
        """
        check_pair(predictions, targets)
        solve = _linear_sum_assignment()
        device = predictions.logits.device
        edges = torch.stack((predictions.offsets, targets.offsets)).tolist()
        prediction, target = _pairs_of_images(edges[0], edges[1], device)
        costs = self._costs(predictions, targets, prediction, target).cpu()
        if not torch.isfinite(costs).all():
            check_predictions(predictions, check_contents=True)
            refuse("predictions", "boxes near enough for finite costs", "costs that overflow")

        flat, first = costs.double().numpy(), 0
        pairs = [torch.empty(2, 0, dtype=torch.int64)]
        for (start, stop), (low, high) in zip(*map(itertools.pairwise, edges), strict=True):
            last = first + (stop - start) * (high - low)
            rows, columns = solve(flat[first:last].reshape(stop - start, high - low))
            pairs.append(
                torch.stack((torch.as_tensor(rows) + start, torch.as_tensor(columns) + low))
            )
            first = last
        return Matches(*torch.cat(pairs, 1).to(device))

    def _costs(
        self, predictions: Predictions, targets: Targets, prediction: Tensor, target: Tensor
    ) -> Tensor:
        """``[K]``: what each pair costs."""
        logits = predictions.logits[prediction, targets.labels[target]]
        present, absent = focal_terms(logits, self.alpha, self.gamma)
        boxes, to = predictions.boxes[prediction], targets.boxes[target]
        return (
            self.class_weight * (present - absent)
            + self.l1_weight * relative_l1(boxes, to)
            - self.giou_weight * generalized_iou(boxes, to)
        )


def assign_inside(positions: Tensor, offsets: Tensor, targets: Targets) -> Tensor:
    """Assigns every position to the smallest object of its image whose box holds it.

    One-to-many supervision: every point inside a box answers for it. Positions on a box's border
    are inside; of equal boxes the first counts.

    Args:
        positions: floating ``[n, P]``, in cells of the full shape.
        offsets: integer ``[B + 1]``: image ``b`` owns the positions ``offsets[b]:offsets[b + 1]``.
        targets: the objects.

    Returns:
        int64 ``[n]``, rows of the targets, -1 for positions outside all boxes.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, and on the CPU contents
            that cannot be right (`check_targets`).
    """
    check_tensor("positions", positions, ("n", "P"), kind="floating")
    n, position_dim = positions.shape
    device = positions.device
    check_tensor("offsets", offsets, ("B + 1",), kind="integer", device=device)
    check_targets(targets, position_dim, None, len(offsets) - 1)
    if reads_contents(None, device):
        check_offsets("offsets", offsets, n)
        check_finite("positions", positions)
    low, high = corners(targets.boxes.to(coordinate_dtype(targets.boxes.dtype)))
    order = torch.argsort((high - low).log().sum(1), stable=True)
    # Axes and objects stand before positions, and ranks are int32: both are what runs fast.
    n_targets, by_axis = len(order), positions.t().contiguous()[:, None]
    low, high = low.t()[:, :, None], high.t()[:, :, None]
    rows = torch.arange(n_targets, dtype=torch.int32, device=device)
    rank = torch.empty_like(rows).index_copy_(0, order, rows)[:, None]

    smallest = torch.full((n,), n_targets, dtype=torch.int32, device=device)
    edges = torch.stack((offsets, targets.offsets)).tolist()
    for (start, stop), (first, last) in zip(*map(itertools.pairwise, edges), strict=True):
        if last > first:
            place, objects = by_axis[..., start:stop], slice(first, last)
            inside = ((low[:, objects] <= place) & (place <= high[:, objects])).all(0)
            smallest[start:stop] = torch.where(inside, rank[objects], n_targets).amin(0)
    return torch.cat((order, order.new_full((1,), -1)))[smallest]


def _pairs_of_images(
    first_offsets: list[int], second_offsets: list[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """int64 ``[K]`` each: all pairs of a first row and a second row of the same image, image by
    image, each image's first rows one after another.
    """
    counts = [stop - start for start, stop in itertools.pairwise(second_offsets)]
    sizes = [stop - start for start, stop in itertools.pairwise(first_offsets)]
    total = sum(size * count for size, count in zip(sizes, counts, strict=True))
    # Of every first row: how many second rows its image has, and which of them is the first.
    per_image = torch.tensor([counts, second_offsets[:-1]], dtype=torch.int64)
    per_row = torch.repeat_interleave(per_image, torch.tensor(sizes, dtype=torch.int64), 1).to(
        device
    )
    count, start = per_row
    first = torch.repeat_interleave(count, output_size=total)
    before = count.cumsum(0) - count
    second = torch.arange(total, device=device) + (start - before)[first]
    return first, second


def _linear_sum_assignment() -> Callable[[Any], tuple[Any, Any]]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        needs = "HungarianMatcher needs scipy, which is not installed: pip install 'vicinal[detr]'"
        raise ImportError(needs) from error
    solve: Callable[[Any], tuple[Any, Any]] = linear_sum_assignment
    return solve
