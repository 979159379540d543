"""Everything in the two axes that are drawn: three dimensions are looked at along one of them.

Points that then lie in one place, one behind the other, are one place, and their weights add up.
A single dimension is a row one cell high.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .._utils.checks import LevelShapes, refuse
from ..pyramid import FeaturePyramid
from ..windows import level_scales, window_centers
from .record import AttentionRecord, check_record


@dataclass(frozen=True)
class Projection:
    """Keeps the shown ones of P axes and, where that is one, puts another before it."""

    axes: tuple[int, ...]
    along: int | None = None  # the axis that is not shown

    def __call__(self, x: Tensor, missing: float) -> Tensor:
        """``[..., P]`` to ``[..., 2]``, with ``missing`` along an axis that is not there."""
        kept = x[..., list(self.axes)]
        if len(self.axes) == 2:
            return kept
        return torch.nn.functional.pad(kept, (1, 0), value=missing)


class Places(NamedTuple):
    """Where the points of one image are, on the CPU."""

    pyramid: FeaturePyramid
    projection: Projection
    level_shapes: LevelShapes  # [L, 2]
    scales: Tensor  # float64 [L, 2]: cells of the level per cell of the full shape
    cells: Tensor  # int64 [m, 2]
    levels: Tensor  # int64 [m]
    place_of: Tensor  # int64 [nnz], -1 for points of other images

    @property
    def full_shape(self) -> tuple[int, int]:
        height, width = map(max, zip(*self.level_shapes, strict=True))
        return height, width

    def squares(self, places: Tensor) -> Tensor:
        """float64 ``[n, 2, 2]``: low and high corner of each, in cells of the full shape."""
        corners = torch.stack((self.cells[places], self.cells[places] + 1), 1)
        return corners / self.scales[self.levels[places]][:, None]


class Flat(NamedTuple):
    """An `AttentionRecord` in two dimensions, on the CPU, in float64."""

    positions: Tensor  # [n, 2]
    windows: Tensor | None  # [n, L, 2, 2]: low and high corner, in cells of the full shape
    boxes: Tensor | None  # [n, 2, 2], likewise
    offsets: Tensor  # int64 [n + 1]
    places: Tensor  # int64 [M]
    weights: Tensor  # [M, H]
    background: Tensor | None  # [n, L, H]

    def of(self, query: int) -> tuple[Tensor, Tensor]:
        """The places ``[m]`` that a query attends to, and their weights ``[m, H]``."""
        rows = slice(int(self.offsets[query]), int(self.offsets[query + 1]))
        return self.places[rows], self.weights[rows]


def choose_projection(position_dim: int, axis: int | None) -> Projection:
    """Two dimensions as they are; of three, ``axis`` (None: the first) is looked along.

    Raises:
        ValueError: more than three dimensions, or an axis where there is nothing to leave out.
    """
    if position_dim > 3:
        refuse("pyramid", "1 to 3 dimensions, for drawing", f"{position_dim}")
    if position_dim < 3:
        if axis is not None:
            refuse("axis", f"None beside {position_dim} dimensions", axis)
        return Projection(tuple(range(position_dim)))
    axis = 0 if axis is None else axis
    if not isinstance(axis, int) or axis not in range(3):
        refuse("axis", "0, 1 or 2", axis)
    return Projection(tuple(other for other in range(3) if other != axis), axis)


def find_places(pyramid: FeaturePyramid, batch_index: int, axis: int | None) -> Places:
    """The places of an image's points, level by level and row by row."""
    pyramid = pyramid.to("cpu")
    projection = choose_projection(pyramid.position_dim, axis)
    shapes = projection(torch.tensor(pyramid.level_shapes), 1)
    rows = torch.cat((pyramid.levels[:, None], projection(pyramid.cells, 0)), 1)
    here = (pyramid.batch == batch_index).nonzero().squeeze(1)
    places, inverse = torch.unique(rows[here], dim=0, return_inverse=True)
    return Places(
        pyramid,
        projection,
        tuple(map(tuple, shapes.tolist())),
        shapes.double() / shapes.amax(0),
        places[:, 1:],
        places[:, 0],
        torch.full((len(pyramid),), -1).index_copy_(0, here, inverse),
    )


def flatten(record: AttentionRecord, places: Places) -> Flat:
    """The record among `find_places` of its image."""
    check_record(record, places.pyramid)
    n, dim = record.positions.shape
    offsets, points, weights = (part.detach().cpu() for part in record.weights[:3])
    background = record.weights.background
    query = torch.repeat_interleave(offsets.diff())
    pairs = torch.stack((query, places.place_of[points]), 1)
    pairs, inverse = torch.unique(pairs, dim=0, return_inverse=True)
    summed = weights.new_zeros(len(pairs), record.n_heads, dtype=torch.float64)
    counts = torch.bincount(pairs[:, 0], minlength=n)
    boxes = None
    if record.boxes is not None:
        center, size = record.boxes.detach().cpu().double().split(dim, 1)
        boxes = _corners(center - size / 2, center + size / 2, places.projection)
    return Flat(
        places.projection(record.positions.detach().cpu().double(), 0.5),
        _windows(record, places),
        boxes,
        torch.cat((counts.new_zeros(1), counts.cumsum(0))),
        pairs[:, 1],
        summed.index_add_(0, inverse, weights.double()),
        None if background is None else background.detach().cpu().double(),
    )


def _windows(record: AttentionRecord, places: Places) -> Tensor | None:
    if record.neighborhood_sizes is None:
        return None
    shapes = places.pyramid.level_shapes
    centers = window_centers(record.positions.cpu(), shapes).double()  # [L, n, P]
    scales = level_scales(shapes, centers)[:, None]
    radii = torch.tensor(record.neighborhood_sizes)[:, None, None] // 2
    low, high = (centers - radii) / scales, (centers + radii + 1) / scales
    return _corners(low, high, places.projection).transpose(0, 1)


def _corners(low: Tensor, high: Tensor, projection: Projection) -> Tensor:
    return torch.stack((projection(low, 0), projection(high, 1)), -2)
