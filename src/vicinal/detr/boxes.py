"""Boxes of any number of axes, as centre and size: ``[n, 2P]``, in cells of the full shape."""

import functools
import operator

import torch
from torch import Tensor

from .._utils.checks import check_tensor, reads_contents, refuse
from ..windows import coordinate_dtype

LARGEST_LOG_SIZE = 4.0


def corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest and the highest corner, ``[..., P]`` each, of boxes ``[..., 2P]``."""
    check_boxes("boxes", boxes)
    center, size = boxes.chunk(2, -1)
    return center - size / 2, center + size / 2


def from_corners(low: Tensor, high: Tensor) -> Tensor:
    """Boxes ``[..., 2P]`` from their lowest and highest corners, ``[..., P]`` each.

    Raises:
        ValueError: corners that are no floating tensors of the same shape.
    """
    check_tensor("low", low, [*low.shape[:-1], "P"], kind="floating")
    check_tensor("high", high, low.shape, kind="floating", device=low.device)
    return torch.cat(((low + high) / 2, high - low), -1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union ``[...]`` of boxes ``[..., 2P]`` that broadcast, in float32 at least.

    An axis along which both boxes lie in the same plane is left out, so that equal boxes of size
    zero have 1. Two boxes that share nothing have 0.

    Raises:
        ValueError: boxes that are not floating or differ in their number of axes.
    """
    return _overlap(a, b)[0]


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU less the share of the boxes' hull that neither covers (Rezatofighi et al. 2019).

    ``[...]`` for boxes ``[..., 2P]`` that broadcast, in float32 at least; from -1 for boxes far
    apart to 1 for equal ones, those of size zero too.

    Raises:
        ValueError: boxes that are not floating or differ in their number of axes.
    """
    overlap, covered = _overlap(a, b)
    return overlap + covered - 1


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """``[n, m]``: `iou` of every box of ``a`` ``[n, 2P]`` with every box of ``b`` ``[m, 2P]``."""
    return iou(a[:, None], b[None])


def pairwise_generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """``[n, m]``: `generalized_iou` of every box of ``a`` with every box of ``b``."""
    return generalized_iou(a[:, None], b[None])


def relative_l1(boxes: Tensor, targets: Tensor) -> Tensor:
    """How far ``boxes`` ``[..., 2P]`` are from ``targets``, in units of the targets' size.

    ``[...]``, the mean over the axes of centre and size: small objects count as much as large ones.
    """
    dtype = coordinate_dtype(torch.promote_types(boxes.dtype, targets.dtype))
    size = targets.to(dtype).chunk(2, -1)[1]
    return ((boxes.to(dtype) - targets).abs() / torch.cat((size, size), -1)).mean(-1)


def refine(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Moves ``boxes`` ``[n, 2P]`` by ``deltas`` ``[n, 2P]``, in units of their own size.

    The centre moves by ``delta * size``, the size is multiplied by ``exp(delta)``; its delta is
    clamped to [-4, 4], so that no step shrinks or grows a box more than 55 times.

    Raises:
        ValueError: shapes that differ or are no boxes'.
    """
    check_boxes("boxes", boxes)
    check_tensor("deltas", deltas, boxes.shape, kind="floating", device=boxes.device)
    center, size = boxes.chunk(2, -1)
    shift, growth = deltas.to(boxes.dtype).chunk(2, -1)
    growth = growth.clamp(-LARGEST_LOG_SIZE, LARGEST_LOG_SIZE)
    return torch.cat((center + shift * size, size * growth.exp()), -1)


def deltas(boxes: Tensor, targets: Tensor) -> Tensor:
    """The deltas ``[n, 2P]`` by which `refine` moves ``boxes`` ``[n, 2P]`` onto ``targets``.

    Raises:
        ValueError: shapes that differ or are no boxes', and on the CPU sizes that are not positive.
    """
    check_boxes("boxes", boxes)
    check_tensor("targets", targets, boxes.shape, kind="floating", device=boxes.device)
    for argument, value in {"boxes": boxes, "targets": targets}.items():
        if reads_contents(None, boxes.device):
            check_box_sizes(argument, value)
    (center, size), (to_center, to_size) = boxes.chunk(2, -1), targets.chunk(2, -1)
    return torch.cat(((to_center - center) / size, (to_size / size).log()), -1)


def check_boxes(argument: str, boxes: Tensor) -> None:
    """Refuses all but a floating tensor ``[..., 2P]``."""
    is_floating = isinstance(boxes, Tensor) and boxes.is_floating_point()
    if not is_floating or not boxes.dim() or not boxes.shape[-1] or boxes.shape[-1] % 2:
        refuse(argument, "a floating tensor of shape [n, 2P]", boxes)


def check_box_sizes(argument: str, boxes: Tensor) -> None:
    """Refuses boxes ``[n, 2P]`` of a size that is not positive. Reads contents."""
    positive = (boxes.chunk(2, -1)[1] > 0).all(-1)
    if not positive.all():
        row = int(positive.logical_not().nonzero()[0])
        refuse(argument, "boxes of positive size", f"{boxes[row].tolist()} in row {row}")


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU, and the share of the boxes' hull that they cover, ``[...]`` each.

    Lengths are taken in units of the hull's, axis by axis: nothing overflows, however large boxes
    grow, and what is 0 / 0 for boxes without volume has its limit.
    """
    check_boxes("a", a)
    check_boxes("b", b)
    if a.shape[-1] != b.shape[-1]:
        refuse("b", f"boxes of {a.shape[-1] // 2} axes", b)
    dtype = coordinate_dtype(torch.promote_types(a.dtype, b.dtype))
    (a_low, a_high), (b_low, b_high) = corners(a.to(dtype)), corners(b.to(dtype))
    hull = torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)
    shared = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0)
    flat = torch.ones((), dtype=dtype, device=a.device)
    intersection, a_volume, b_volume = (
        functools.reduce(operator.mul, _ratio(length, hull, flat).unbind(-1))
        for length in (shared, a_high - a_low, b_high - b_low)
    )
    # In this order rounding never makes the union smaller than the intersection.
    union = (a_volume - intersection) + b_volume
    return _ratio(intersection, union, torch.zeros_like(flat)), union


def _ratio(part: Tensor, whole: Tensor, otherwise: Tensor) -> Tensor:
    """``part / whole``, or ``otherwise`` where ``whole`` is nothing, with gradients of zero."""
    something = whole > torch.finfo(whole.dtype).tiny
    return torch.where(something, part / torch.where(something, whole, 1), otherwise)
