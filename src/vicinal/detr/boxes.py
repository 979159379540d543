"""Axis-aligned boxes in any number of dimensions, as center and size: ``[n, 2P]``.

The first P numbers of a box are its center, the last P its size, both in cells of the full shape
and in the pyramid's order of axes.
"""

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import (
    as_list,
    as_tensor,
    check_tensor,
    check_type,
    is_real,
    reads_contents,
    refuse,
)
from ..pyramid import FeaturePyramid
from ..windows import coordinate_dtype, full_shape

Period = Sequence[float | None]

_MAX_LOG_SIZE_CHANGE = 4.0


def box_period(pyramid: FeaturePyramid) -> tuple[float, ...] | None:
    """Returns the period of boxes on a map with periodic axes.

    Functions and losses that compare boxes take it as their ``period``: the size of the map along
    each periodic axis, infinity or None along the others. Centers then differ by the short way
    around the axis, so that boxes may pass the seam.

    Args:
        pyramid: the map.

    Returns:
        ``[P]``, the size of the map along a periodic axis, in cells of the full shape, and infinity
        along the others; None without periodic axes.

    Raises:
        ValueError: ``pyramid`` is not a `FeaturePyramid`.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid
        from vicinal.detr import box_period

        points = torch.tensor([[0, 3, 5]])  # image, azimuth, height
        pyramid = FeaturePyramid.from_points(
            points, torch.ones(1, 8), (64, 16), batch_size=1, periodic_axes=(0,)
        )
        assert box_period(pyramid) == (64.0, float("inf"))
        ```
    """
    check_type("pyramid", pyramid, FeaturePyramid)
    axes, sizes = pyramid.periodic_axes, full_shape(pyramid.level_shapes)
    if not axes:
        return None
    return tuple(float(n) if axis in axes else math.inf for axis, n in enumerate(sizes))


def boxes_to_corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the lower and the upper corner of every box.

    Args:
        boxes: floating ``[..., 2P]``, center and size per axis.

    Returns:
        the lower and the upper corners, ``[..., P]`` each, in the units and dtype of ``boxes``.

    Raises:
        ValueError: ``boxes`` is not a floating tensor with an even number of columns.

    Example:
        ```python
        import torch
        from vicinal.detr import boxes_to_corners

        low, high = boxes_to_corners(torch.tensor([[10.0, 20.0, 4.0, 6.0]]))
        assert low.tolist() == [[8.0, 17.0]]
        assert high.tolist() == [[12.0, 23.0]]
        ```
    """
    center, size = check_boxes("boxes", boxes).chunk(2, -1)
    return center - size / 2, center + size / 2


def corners_to_boxes(low: Tensor, high: Tensor) -> Tensor:
    """Builds boxes from their lower and upper corners, the inverse of `boxes_to_corners`.

    Args:
        low: floating ``[..., P]``, the lower corners.
        high: floating ``[..., P]``, the upper corners, on the device of ``low``.

    Returns:
        boxes ``[..., 2P]``, center and size per axis.

    Raises:
        ValueError: the corners are not floating tensors of the same shape on the same device.

    Example:
        ```python
        import torch
        from vicinal.detr import corners_to_boxes

        boxes = corners_to_boxes(torch.tensor([[8.0, 17.0]]), torch.tensor([[12.0, 23.0]]))
        assert boxes.tolist() == [[10.0, 20.0, 4.0, 6.0]]
        ```
    """
    low = as_tensor("low", low)
    if not isinstance(low, Tensor) or not low.dim() or not low.is_floating_point():
        refuse("low", "a floating tensor of shape [..., P]", low)
    high = check_tensor("high", high, low.shape, kind="floating", device=low.device)
    return torch.cat(((low + high) / 2, high - low), -1)


def iou(a: Tensor, b: Tensor, *, period: Period | None = None) -> Tensor:
    """Computes the intersection over union (IoU) of boxes, element by element.

    An axis along which both boxes have size zero at the same coordinate is ignored, so two equal
    boxes of size zero have an IoU of 1.

    Args:
        a: floating ``[..., 2P]``, center and size per axis.
        b: floating ``[..., 2P]`` that broadcasts with ``a``, in the same units.
        period: ``[P]``, see `box_period`. None (default): no axis is periodic.

    Returns:
        ``[...]`` in [0, 1], at least float32.

    Raises:
        ValueError: the boxes are not floating or differ in their number of axes, or ``period`` does
            not have a size above 0 for each.

    Example:
        ```python
        import torch
        from vicinal.detr import iou

        a = torch.tensor([[1.0, 1.0, 2.0, 2.0]])
        b = torch.tensor([[2.0, 1.0, 2.0, 2.0]])
        assert iou(a, b).tolist() == [(torch.tensor(2.0) / 6).item()]
        ```
    """
    return _iou_and_coverage(a, b, period)[0]


def generalized_iou(a: Tensor, b: Tensor, *, period: Period | None = None) -> Tensor:
    """Computes the generalized IoU (GIoU) of boxes, element by element.

    The GIoU is the IoU minus the fraction of the smallest enclosing box that neither box covers
    (Rezatofighi et al., "Generalized Intersection over Union", 2019). It approaches -1 for small
    boxes far apart and is 1 for equal boxes, those of size zero included.

    Args:
        a: floating ``[..., 2P]``, center and size per axis.
        b: floating ``[..., 2P]`` that broadcasts with ``a``, in the same units.
        period: ``[P]``, see `box_period`. None (default): no axis is periodic.

    Returns:
        ``[...]`` in [-1, 1], at least float32.

    Raises:
        ValueError: the boxes are not floating or differ in their number of axes, or ``period`` does
            not have a size above 0 for each.

    Example:
        ```python
        import torch
        from vicinal.detr import generalized_iou

        box = torch.tensor([[1.0, 1.0, 2.0, 2.0]])
        far = torch.tensor([[99.0, 99.0, 2.0, 2.0]])
        assert generalized_iou(box, box).item() == 1
        assert generalized_iou(box, far).item() < -0.99
        ```
    """
    overlap, coverage = _iou_and_coverage(a, b, period)
    return overlap + coverage - 1


def pairwise_iou(a: Tensor, b: Tensor, *, period: Period | None = None) -> Tensor:
    """Computes the `iou` of every box of ``a`` with every box of ``b``.

    Args:
        a: floating ``[n, 2P]``, center and size per axis.
        b: floating ``[m, 2P]``, in the same units.
        period: ``[P]``, see `box_period`. None (default): no axis is periodic.

    Returns:
        ``[n, m]`` in [0, 1], at least float32.

    Raises:
        ValueError: the boxes are not floating or differ in their number of axes, or ``period`` does
            not have a size above 0 for each.

    Example:
        ```python
        import torch
        from vicinal.detr import pairwise_iou

        boxes = torch.tensor([[1.0, 1.0, 2.0, 2.0], [9.0, 9.0, 2.0, 2.0]])
        assert pairwise_iou(boxes, boxes).tolist() == [[1.0, 0.0], [0.0, 1.0]]
        ```
    """
    return iou(*_as_pairs(a, b), period=period)


def pairwise_generalized_iou(a: Tensor, b: Tensor, *, period: Period | None = None) -> Tensor:
    """Computes the `generalized_iou` of every box of ``a`` with every box of ``b``.

    Args:
        a: floating ``[n, 2P]``, center and size per axis.
        b: floating ``[m, 2P]``, in the same units.
        period: ``[P]``, see `box_period`. None (default): no axis is periodic.

    Returns:
        ``[n, m]`` in [-1, 1], at least float32.

    Raises:
        ValueError: the boxes are not floating or differ in their number of axes, or ``period`` does
            not have a size above 0 for each.

    Example:
        ```python
        import torch
        from vicinal.detr import pairwise_generalized_iou

        boxes = torch.tensor([[1.0, 1.0, 2.0, 2.0], [9.0, 9.0, 2.0, 2.0]])
        assert pairwise_generalized_iou(boxes, boxes).diagonal().tolist() == [1.0, 1.0]
        ```
    """
    return generalized_iou(*_as_pairs(a, b), period=period)


def relative_l1(boxes: Tensor, targets: Tensor, *, period: Period | None = None) -> Tensor:
    """Computes the mean absolute error of boxes, relative to the size of their targets.

    Each coordinate's error is divided by the size of the target along that axis, so small objects
    weigh as much as large ones.

    Args:
        boxes: floating ``[..., 2P]``, center and size per axis.
        targets: floating ``[..., 2P]`` that broadcasts with ``boxes``, in the same units.
        period: ``[P]``, see `box_period`. None (default): no axis is periodic.

    Returns:
        ``[...]``, the mean over the 2P numbers of a box, at least float32.

    Raises:
        ValueError: the boxes are not floating or differ in their number of axes, or ``period`` does
            not have a size above 0 for each.

    Example:
        ```python
        import torch
        from vicinal.detr import relative_l1

        boxes = torch.tensor([[11.0, 20.0, 4.0, 8.0]])
        targets = torch.tensor([[10.0, 20.0, 4.0, 8.0]])
        assert relative_l1(boxes, targets).item() == 1 / 4 / 4
        ```
    """
    boxes, targets = _as_comparable("boxes", boxes, "targets", targets)
    (center, size), (target_center, target_size) = boxes.chunk(2, -1), targets.chunk(2, -1)
    errors = center_offsets(center, target_center, period), size - target_size
    return (torch.cat(errors, -1).abs() / torch.cat((target_size, target_size), -1)).mean(-1)


def apply_deltas(boxes: Tensor, deltas: Tensor) -> Tensor:
    """Moves and scales boxes by deltas relative to their own size.

    The box parametrization of R-CNN (Girshick et al., "Rich Feature Hierarchies", 2014): the center
    moves by ``delta * size`` and the size is multiplied by ``exp(delta)``. Deltas of the size are
    clamped to [-4, 4], which bounds a change of size to a factor of about 55.

    Args:
        boxes: floating ``[n, 2P]``, center and size per axis.
        deltas: floating ``[n, 2P]``, first of the center, then of the size.

    Returns:
        boxes ``[n, 2P]`` in the dtype of ``boxes``.

    Raises:
        ValueError: shapes or devices differ, or ``boxes`` does not hold boxes.

    Example:
        ```python
        import torch
        from vicinal.detr import apply_deltas

        boxes = torch.tensor([[10.0, 20.0, 2.0, 4.0]])
        moved = apply_deltas(boxes, torch.tensor([[0.5, -1.0, 0.0, 0.0]]))
        assert moved.tolist() == [[11.0, 16.0, 2.0, 4.0]]
        ```
    """
    boxes = check_boxes("boxes", boxes)
    deltas = check_tensor("deltas", deltas, boxes.shape, kind="floating", device=boxes.device)
    center, size = boxes.chunk(2, -1)
    shift, growth = deltas.to(boxes.dtype).chunk(2, -1)
    growth = growth.clamp(-_MAX_LOG_SIZE_CHANGE, _MAX_LOG_SIZE_CHANGE)
    return torch.cat((center + shift * size, size * growth.exp()), -1)


def encode_boxes(boxes: Tensor, targets: Tensor, *, period: Period | None = None) -> Tensor:
    """Computes the deltas with which `apply_deltas` turns ``boxes`` into ``targets``.

    Args:
        boxes: floating ``[n, 2P]``, center and size per axis.
        targets: floating ``[n, 2P]``, in the same units.
        period: ``[P]``, see `box_period`. None (default): no axis is periodic.

    Returns:
        deltas ``[n, 2P]``, first of the center, then of the size, not clamped.

    Raises:
        ValueError: shapes or devices differ, ``period`` does not have a size above 0 for each
            axis, or, on the CPU, a size is not positive.

    Example:
        ```python
        import torch
        from vicinal.detr import apply_deltas, encode_boxes

        boxes = torch.tensor([[10.0, 20.0, 2.0, 4.0]])
        targets = torch.tensor([[11.0, 16.0, 3.0, 4.0]])
        torch.testing.assert_close(apply_deltas(boxes, encode_boxes(boxes, targets)), targets)
        ```
    """
    boxes = check_boxes("boxes", boxes)
    targets = check_tensor("targets", targets, boxes.shape, kind="floating", device=boxes.device)
    for argument, value in {"boxes": boxes, "targets": targets}.items():
        if reads_contents(None, boxes.device):
            check_box_sizes(argument, value)
    (center, size), (target_center, target_size) = boxes.chunk(2, -1), targets.chunk(2, -1)
    shift = center_offsets(target_center, center, period) / size
    return torch.cat((shift, (target_size / size).log()), -1)


def center_offsets(centers: Tensor, origins: Tensor, period: Period | None) -> Tensor:
    """``centers - origins`` ``[..., P]``, by the short way along periodic axes."""
    offsets = centers - origins
    if period is None:
        return offsets
    columns = list(offsets.unbind(-1))
    for axis, size in enumerate(as_period(period, len(columns))):
        if size != math.inf:
            turns = (columns[axis].detach() / size).round()
            columns[axis] = columns[axis] - turns * size
    return torch.stack(columns, -1)


def as_period(period: Any, position_dim: int) -> tuple[float, ...]:
    """``period`` as floats, infinity for None; raises ValueError unless P sizes above 0."""
    expected = f"a size above 0 or None for each of {position_dim} axes"
    given = as_list("period", period, expected)
    if not isinstance(given, Sequence) or len(given) != position_dim:
        refuse("period", expected, period)
    sizes = [math.inf if size is None else size for size in given]
    if not all(is_real(size) and size > 0 for size in sizes):
        refuse("period", expected, period)
    return tuple(map(float, sizes))


def check_boxes(argument: str, boxes: Any, device: torch.device | None = None) -> Tensor:
    """``boxes`` as a tensor; raises ValueError unless it is a floating ``[..., 2P]``."""
    boxes = as_tensor(argument, boxes, device)
    is_dense = isinstance(boxes, Tensor) and boxes.layout == torch.strided
    if (
        not is_dense
        or not boxes.is_floating_point()
        or not boxes.dim()
        or not boxes.shape[-1]
        or boxes.shape[-1] % 2
    ):
        refuse(argument, "a floating tensor of shape [n, 2P]", boxes)
    tensor: Tensor = boxes
    return tensor


def _as_comparable(a_name: str, a: Any, b_name: str, b: Any) -> tuple[Tensor, Tensor]:
    """Boxes of the same number of axes, in the wider of their dtypes, at least float32."""
    a = check_boxes(a_name, a)
    b = check_boxes(b_name, b, a.device)
    if a.shape[-1] != b.shape[-1] or a.device != b.device:
        refuse(b_name, f"boxes of {a.shape[-1] // 2} axes on {a.device}", b)
    rows = zip(reversed(a.shape), reversed(b.shape), strict=False)
    if any(n != m and 1 not in (n, m) for n, m in rows):
        refuse(b_name, f"boxes that broadcast with those of {a_name}, {list(a.shape)}", b)
    dtype = coordinate_dtype(torch.promote_types(a.dtype, b.dtype))
    return a.to(dtype), b.to(dtype)


def _as_pairs(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    """``[n, 1, 2P]`` and ``[1, m, 2P]``."""
    a = check_tensor("a", a, ("n", "2P"), kind="floating")
    b = check_tensor("b", b, ("m", "2P"), kind="floating", device=a.device)
    return a[:, None], b[None]


def check_box_sizes(argument: str, boxes: Tensor) -> None:
    """Raises ValueError for a size that is not positive in boxes ``[n, 2P]``. Reads contents."""
    positive = (boxes.chunk(2, -1)[1] > 0).all(-1)
    if not positive.all():
        row = int(positive.logical_not().nonzero()[0])
        refuse(argument, "boxes of positive size", f"{boxes[row].tolist()} in row {row}")


def _iou_and_coverage(a: Any, b: Any, period: Period | None) -> tuple[Tensor, Tensor]:
    """The IoU, and the fraction of the smallest enclosing box that is covered, ``[...]`` each.

    Lengths are normalized by the enclosing box, axis by axis: nothing overflows for large boxes,
    and the 0 / 0 of boxes without volume is replaced by its limit.
    """
    a, b = _as_comparable("a", a, "b", b)
    (a_center, a_size), (b_center, b_size) = a.chunk(2, -1), b.chunk(2, -1)
    # Corners relative to the center of b: those of far boxes would be rounded.
    offset = center_offsets(a_center, b_center, period)
    sizes = () if period is None else as_period(period, offset.shape[-1])
    if sizes:  # a longer box covers the axis once
        a_size, b_size = _at_most(a_size, sizes), _at_most(b_size, sizes)
    a_low, a_high = offset - a_size / 2, offset + a_size / 2
    b_low, b_high = -b_size / 2, b_size / 2
    enclosing = torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)
    shared = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0)
    if sizes:  # they may meet again on the other side
        reach = ((a_size + b_size) / 2 + offset.abs()).unbind(-1)
        again = [(far - size).clamp(min=0) for far, size in zip(reach, sizes, strict=True)]
        shared = shared + torch.stack(again, -1)
        enclosing = _at_most(enclosing, sizes)
    lengths = shared, a_high - a_low, b_high - b_low
    intersection, a_volume, b_volume = (
        functools.reduce(operator.mul, ratio.unbind(-1))
        for ratio in _safe_ratios(lengths, enclosing, 1)
    )
    # In this order rounding never makes the union smaller than the intersection.
    union = (a_volume - intersection) + b_volume
    (ratio,) = _safe_ratios([intersection], union, 0)
    return ratio, union


def _at_most(lengths: Tensor, sizes: Sequence[float]) -> Tensor:
    """``lengths`` ``[..., P]``, each at most the size of its axis, without a copy from the host."""
    columns = zip(lengths.unbind(-1), sizes, strict=True)
    return torch.stack([column.clamp(max=size) for column, size in columns], -1)


def _safe_ratios(parts: Sequence[Tensor], whole: Tensor, fallback: float) -> list[Tensor]:
    """Each part over ``whole``, or ``fallback`` with zero gradient where that is about zero."""
    is_valid = whole > torch.finfo(whole.dtype).tiny
    divisor = torch.where(is_valid, whole, 1)
    return [torch.where(is_valid, part / divisor, fallback) for part in parts]
