"""The cells that a plan is found from, and is checked against."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..placement import query_images
from ..pyramid import FeaturePyramid
from ..window_shapes import Windows
from ..windows import window_anchors, window_centers


class KeyedCells(NamedTuple):
    """The cells of queries, points and copies with their keys, to find `point_slices` from.

    Cells and keys are int64, or int32 where a back end's kernels found them.
    """

    first_cells: Tensor  # [L, N, P], of the queries' windows, in key coordinates
    query_keys: Tensor  # [L, N]
    point_keys: Tensor  # [nnz + C], -1 for points outside their level
    coordinates: Tensor  # [nnz + C, P + 2]
    positions: Tensor  # [N, P], a copy of what the plan was made for
    query_levels: Tensor | None  # [N], likewise, where windows depend on it

    def to(self, device: torch.device | str) -> "KeyedCells":
        """The same on another device."""
        levels = None if self.query_levels is None else self.query_levels.to(device)
        tensors = {name: x.to(device) for name, x in self._asdict().items() if x is not None}
        return KeyedCells(**{**tensors, "query_levels": levels})


class Queries(NamedTuple):
    """The queries of a plan, as `check_placement` returns them."""

    positions: Tensor  # [N, P]
    offsets: Tensor  # [B + 1]
    levels: Tensor | None  # [N], or None where no window depends on them


def query_cells(
    queries: Queries, pyramid: FeaturePyramid, windows: Windows
) -> tuple[Tensor, Tensor]:
    """The image of every query ``[N]``, -1 if invalid, and its windows' anchors int64
    ``[L, N, P]``.
    """
    positions, offsets, levels = queries
    image = query_images(positions, offsets, pyramid.batch_size)
    positions = positions.masked_fill(image[:, None] < 0, math.nan)
    shapes, axes = pyramid.level_shapes, pyramid.periodic_axes
    return image, window_anchors(positions, shapes, windows, levels, axes)


def in_equal_cells(planned: Tensor, positions: Tensor, pyramid: FeaturePyramid) -> bool:
    """Whether two tensors of positions fall into equal cells. It is quicker than `query_cells`;
    False may also mean that one is not finite.
    """
    if torch.equal(planned, positions):
        return True
    geometry = pyramid.level_shapes, pyramid.periodic_axes
    return torch.equal(window_centers(planned, *geometry), window_centers(positions, *geometry))
