"""The cells that a plan is found from, and is checked against."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._index.cell_keys import CellKeys
from ..placement import query_images
from ..pyramid import FeaturePyramid
from ..windows import window_centers


class KeyedCells(NamedTuple):
    """The cells of queries, points and copies with their keys, to find `point_slices` from.

    Cells and keys are int64, or int32 where a back end's kernels found them.
    """

    centers: Tensor  # [L, N, P], the centers of the queries' windows
    query_keys: Tensor  # [L, N]
    point_keys: Tensor  # [nnz + C], -1 for points outside their level
    coordinates: Tensor  # [nnz + C, P + 2]
    positions: Tensor  # [N, P], a copy of what the plan was made for


def query_cells(
    positions: Tensor, offsets: Tensor, pyramid: FeaturePyramid, keys: CellKeys
) -> tuple[Tensor, Tensor]:
    """The image of every query ``[N]``, -1 if invalid, and its windows' centers int64
    ``[L, N, P]``.
    """
    image = query_images(positions, offsets, pyramid.batch_size)
    positions = positions.masked_fill(image[:, None] < 0, math.nan)
    geometry = pyramid.level_shapes, pyramid.periodic_axes
    return image, keys.clamp(window_centers(positions, *geometry))


def in_equal_cells(planned: Tensor, positions: Tensor, pyramid: FeaturePyramid) -> bool:
    """Whether two tensors of positions fall into equal cells. It is quicker than `query_cells`;
    False may also mean that one is not finite.
    """
    if torch.equal(planned, positions):
        return True
    geometry = pyramid.level_shapes, pyramid.periodic_axes
    return torch.equal(window_centers(planned, *geometry), window_centers(positions, *geometry))
