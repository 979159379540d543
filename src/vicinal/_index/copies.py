"""Copies of points: what windows reach across the seam of a periodic axis."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .._utils.constants import constant
from ..pyramid import FeaturePyramid
from ..window_shapes import Windows


class PointCopies(NamedTuple):
    """The C copies of points that windows reach across the seam of a periodic axis.

    Attributes:
        points: int64 ``[C]``, the row of the point that each copy is of.
        shifts: int64 ``[C, P]``, from the point's cell to that of the copy, in cells of its level:
            plus or minus the level's size along periodic axes, else 0.

    Example:
        ```python
        import torch
        from vicinal import FeaturePyramid, plan_neighborhoods

        points = torch.tensor([[0, 0], [0, 5]])  # image, cell on a circle of 16 cells
        pyramid = FeaturePyramid.from_points(
            points, torch.ones(2, 8), (16,), 1, strides=1, periodic_axes=(0,)
        )
        plan = plan_neighborhoods(torch.tensor([[15.5]]), torch.tensor([0, 1]), pyramid, [3])
        assert plan.copies.points.tolist() == [0]
        assert plan.copies.shifts.tolist() == [[16]]  # the point at cell 0 is also at cell 16
        assert plan.pairs().tolist() == [[0, 0]]
        ```
    """

    points: Tensor
    shifts: Tensor


def find_copies(
    coordinates: Tensor, misplaced: Tensor, pyramid: FeaturePyramid, windows: Windows
) -> PointCopies:
    """The copies of points that windows around cells inside the map reach.

    Along a periodic axis a point less than a window's reach from one edge is also one map's size
    beyond the other; along several of them, so is every combination.
    """
    dim, device = pyramid.position_dim, coordinates.device
    levels, cells = coordinates[:, -1], coordinates[:, 1:-1]
    if not pyramid.periodic_axes:
        return PointCopies(levels.new_zeros(0), levels.new_zeros(0, dim))
    reach = constant([window.reach() for window in windows], device)[levels]
    shape = constant(pyramid.level_shapes, device)[levels]
    rows: list[Tensor] = []
    shifts: list[Tensor] = []
    shift = torch.where(cells < reach, shape, 0)
    shift = torch.where(cells >= shape - reach, -shape, shift)
    for chosen in itertools.product((False, True), repeat=len(pyramid.periodic_axes)):
        axes = list(itertools.compress(pyramid.periodic_axes, chosen))
        if axes:
            reached = (shift[:, axes] != 0).all(1) & ~misplaced
            rows.append(reached.nonzero().flatten())
            moved = torch.zeros_like(shift)
            moved[:, axes] = shift[:, axes]
            shifts.append(moved[rows[-1]])
    return PointCopies(torch.cat(rows), torch.cat(shifts))
