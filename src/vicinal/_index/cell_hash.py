"""Which cells around a place hold points: a hash table, so that none is ever dense."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .._utils.checks import LevelShapes, refuse
from .._utils.constants import constant
from ..pyramid import FeaturePyramid
from .cell_keys import CellKeys

# 2^64 over the golden ratio, as a signed number: it spreads runs of neighboring keys evenly
# (Knuth, "The Art of Computer Programming", volume 3, section 6.4).
_SPREAD = -7046029254386353131
_REACH = 3  # cells: windows of `CellKeys` that hold a cell and the next, beyond the edge too


@dataclass(frozen=True, repr=False, eq=False)
class CellIndex:
    """The M cells of a pyramid that hold points; made by `index_cells`, good for any values.

    A place between cells has ``2 ** P`` of them around it, its corners. Where any of these holds
    a point, the table has an entry for all, under the key of the first.

    Attributes:
        cell_of_point: int64 ``[nnz]``, the number of every point's cell. Points may share one.
        n_cells: M.
        batch_size: number of images.
        level_shapes: sizes of the levels.
    """

    cell_of_point: Tensor
    n_cells: int
    batch_size: int
    level_shapes: LevelShapes
    _origins: Tensor  # int64 [B, L], the key of each level's first cell
    _steps: Tensor  # int64 [P, L], from the key of a cell to that of the next along an axis
    _starts: Tensor  # int32 [buckets], where each begins among the entries
    _fullest: int  # entries in the fullest bucket
    _keys: Tensor  # int64 [entries], bucket by bucket; the last are nobody's
    _corners: Tensor  # int32 [entries, 2 ** P], row-major; M where a cell is empty

    @property
    def n_points(self) -> int:
        return self.cell_of_point.shape[0]

    @property
    def device(self) -> torch.device:
        return self.cell_of_point.device

    def coalesce(self, values: Tensor) -> Tensor:
        """``[M, E]``: the sum over each cell's points of ``values`` ``[nnz, E]``."""
        cells = values.new_zeros(self.n_cells, values.shape[1])
        return cells.index_add(0, self.cell_of_point, values)

    def points_in(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """The points of ``cells`` (int64 ``[n]``), cell by cell, int64 ``[m]`` each: where in
        ``cells`` a point's cell is, and the point.
        """
        order = self.cell_of_point.sort(stable=True).indices
        counts = torch.bincount(self.cell_of_point, minlength=self.n_cells)
        lengths = counts[cells]
        place = torch.repeat_interleave(lengths)
        first = (counts.cumsum(0) - counts)[cells] - (lengths.cumsum(0) - lengths)
        return place, order[first[place] + torch.arange(len(place), device=self.device)]

    def find(self, images: Tensor, levels: Tensor, firsts: Sequence[Tensor]) -> Tensor:
        """The cells at the corners of places, int32 ``[n, H, 2 ** P, S]``; M where one is empty.

        Args:
            images: int64 ``[n]``, in [0, B).
            levels: int64 ``[S]``.
            firsts: for each axis whole floating numbers ``[n, H, S]``, the first of the corners,
                on the map or not.
        """
        key = self._origins[images][:, None, levels]
        sizes = constant(self.level_shapes, self.device, firsts[0].dtype)[levels].t()
        for first, step, size in zip(firsts, self._steps[:, levels], sizes, strict=True):
            # Beyond the map one cell is as empty as the next.
            key = key + first.clamp(min=-2).minimum(size).long() * step
        wanted = key.flatten()
        start = self._starts.index_select(0, _bucket(wanted, len(self._starts)))
        entry = torch.full_like(start, len(self._keys) - 1)
        for place in range(self._fullest):
            here = start + place
            entry = torch.where(self._keys.index_select(0, here) == wanted, here, entry)
        corners: Tensor = self._corners.index_select(0, entry).unflatten(0, key.shape)
        return corners.transpose(2, 3).contiguous()

    def __repr__(self) -> str:
        return (
            f"CellIndex(points={self.n_points}, cells={self.n_cells}, images={self.batch_size}, "
            f"level_shapes={self.level_shapes}; device={self.device})"
        )


def index_cells(pyramid: FeaturePyramid) -> CellIndex:
    """Finds the cells of all points, once, for all layers that share them.

    How many there are depends on the contents, so on a GPU this waits for the device.

    Raises:
        ValueError: not a pyramid, too many cells for 64-bit keys, or too many of them with points.
    """
    if not isinstance(pyramid, FeaturePyramid):
        refuse("pyramid", "a FeaturePyramid", pyramid)
    dim, device = pyramid.position_dim, pyramid.coordinates.device
    sizes = [_REACH] * pyramid.n_levels
    keys = CellKeys(pyramid.level_shapes, sizes, pyramid.batch_size, device)
    levels = torch.arange(pyramid.n_levels, device=device)
    images = torch.arange(max(pyramid.batch_size, 1), device=device)
    nowhere = levels.new_zeros(dim)
    origins = keys.of(nowhere, levels, images[:, None])
    unit = torch.eye(dim, dtype=torch.int64, device=device)[:, None]
    steps = keys.of(unit, levels, nowhere[0]) - keys.of(nowhere, levels, nowhere[0])

    misplaced = pyramid.misplaced()
    coordinates = pyramid.coordinates.masked_fill(misplaced[:, None], 0)
    point_keys = keys.of(coordinates[:, 1:-1], coordinates[:, -1], coordinates[:, 0])
    # Far below the key of any place.
    point_keys = point_keys.masked_fill(misplaced, -(2**62))
    cells, cell_of_point = torch.unique(point_keys, return_inverse=True)
    # All points of a cell write the same, so whichever is last does not matter.
    step = cells.new_zeros(dim, len(cells))
    step.index_copy_(1, cell_of_point, steps[:, coordinates[:, -1]])
    corners = constant(list(itertools.product((0, 1), repeat=dim)), device)
    firsts = cells - (corners[:, :, None] * step).sum(1)
    return CellIndex(
        cell_of_point,
        len(cells),
        pyramid.batch_size,
        pyramid.level_shapes,
        origins,
        steps,
        *_hash(firsts),
    )


def _hash(keys: Tensor) -> tuple[Tensor, int, Tensor, Tensor]:
    """Buckets, the fullest, keys and corners of the table: ``keys`` ``[2 ** P, M]`` are those of
    the places that have a cell for their first corner, their second, and so on.
    """
    n_corners, n_cells = keys.shape
    unique, entry = torch.unique(keys, return_inverse=True)
    if len(unique) >= 2**31:
        refuse("pyramid", "fewer than 2^31 places with points around them", str(len(unique)))
    corners = keys.new_full((n_corners, len(unique)), n_cells)
    corners.scatter_(1, entry, torch.arange(n_cells, device=keys.device).expand_as(keys))
    n_buckets = 1 << (4 * len(unique)).bit_length()
    bucket, order = _bucket(unique, n_buckets).sort(stable=True)
    starts = torch.searchsorted(bucket, torch.arange(n_buckets + 1, device=keys.device))
    fullest = int(starts.diff().max())
    return (
        starts[:-1].int(),
        fullest,
        F.pad(unique[order], (0, fullest + 1), value=-1),
        F.pad(corners.t()[order].int(), (0, 0, 0, fullest + 1), value=n_cells),
    )


def _bucket(keys: Tensor, n_buckets: int) -> Tensor:
    bits = n_buckets.bit_length() - 1
    return (keys * _SPREAD >> (64 - bits)) & (n_buckets - 1)
