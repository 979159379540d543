"""Who sees whom, as contiguous slices of sorted orders, both ways.

Sorted by (level, image, cell), the points of every row of a window stand side by side, so a
neighborhood is ``R = sum(w[l] ** (P - 1))`` slices. The relation is symmetric: sorted by the cell
a query falls into, level by level, the queries that see a point stand in slices as well.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ._index.cell_keys import CellKeys
from ._index.tiles import GroupedCells, find_tiles
from ._utils.checks import (
    LevelShapes,
    check_finite,
    check_neighborhood_sizes,
    check_offsets,
    check_rows,
    check_tensor,
    reads_contents,
    refuse,
)
from ._utils.constants import computing, constant
from ._utils.ragged import batch_ids
from .backends import choose_backend
from .backends.reference import search_slices
from .backends.types import FindRuns, NeighborSlices, Tiles
from .pyramid import FeaturePyramid
from .windows import window_centers

_INT32_MAX = 2**31 - 1
T = TypeVar("T")


class _KeyedCells(NamedTuple):
    """Where queries and points are: what the second direction of a plan is made of."""

    keys: CellKeys
    centers: Tensor  # int64 [L, N, P], of the queries' windows
    query_keys: Tensor  # int64 [L, N]
    point_keys: Tensor  # int64 [nnz], -1 for points outside their level
    coordinates: Tensor  # int64 [nnz, P + 2]


@dataclass(frozen=True, repr=False, eq=False)
class NeighborhoodPlan:
    """The neighborhoods of N queries among nnz points; made by `plan_neighborhoods`.

    Shapes depend on N, nnz, the number of levels and the windows alone, never on contents.

    Attributes:
        query_slices: the points each query sees: starts and stops ``[N, R]``, order ``[nnz]``.
        query_batch: int32 ``[N]``, the image of every query, -1 for one that takes no part.
        center_columns: int32 ``[N, L]``, the last coordinate of every window's centre.
        point_columns: int32 ``[nnz]``, the last coordinate of the points, in sorted order.
        neighborhood_sizes: window width of each level.
        position_dim: number of spatial dimensions, P.
        batch_size: number of images.
        level_shapes: sizes of the levels.
    """

    query_slices: NeighborSlices
    query_batch: Tensor
    center_columns: Tensor
    point_columns: Tensor
    neighborhood_sizes: tuple[int, ...]
    position_dim: int
    batch_size: int
    level_shapes: LevelShapes
    _keyed_cells: "_KeyedCells"
    _maker: str = "python"  # see `computing`
    _found: dict[str, Any] = field(default_factory=dict)

    @property
    def point_slices(self) -> NeighborSlices:
        """The queries that see each point: starts and stops ``[nnz, max R[l]]``, order ``[L * N]``
        (one order of the queries per level, one after another). Found when first asked for.
        """
        return self._once("point_slices", self._find_point_slices)

    def query_tiles(self, find_runs: FindRuns) -> Tiles:
        """What tiles of queries see, by a back end's ``find_runs``. Found when first asked for."""
        return self._once("query_tiles", lambda: self._find_query_tiles(find_runs))

    def point_tiles(self, find_runs: FindRuns) -> Tiles:
        """The queries that see tiles of points, likewise."""
        return self._once("point_tiles", lambda: self._find_point_tiles(find_runs))

    def _once(self, name: str, find: Callable[[], T]) -> T:
        # By hand: compiled graphs do not take the lock of `functools.cached_property`.
        if name not in self._found:
            computer = computing(self.device)
            if computer != self._maker:
                return self._find_elsewhere(name, find, computer)
            self._found[name] = find()
        found: T = self._found[name]
        return found

    def _find_elsewhere(self, name: str, find: Callable[[], T], computer: str) -> T:
        """For others than the plan's maker. What a CUDA graph finds is there after its replays
        alone, so no plan of others may keep it; nor what a compiler makes, which may run in one.
        """
        if "compiler" in (computer, self._maker):
            return find()
        if computer == "graph":
            raise RuntimeError(f"{name} of a plan: run once before capturing a CUDA graph")
        raise RuntimeError(f"{name} of a plan: to be found in the CUDA graph that makes it")

    def _find_point_slices(self) -> NeighborSlices:
        keys, _, query_keys, point_keys, coordinates = self._keyed_cells
        image, cells, levels = coordinates[:, 0], coordinates[:, 1:-1], coordinates[:, -1]
        sorted_queries, order = torch.sort(query_keys, dim=1, stable=True)
        first, last = keys.rows_around(point_keys, levels)
        # A misplaced point's key is negative and so are all keys around it, or unused.
        last = last.masked_fill(point_keys[:, None] < 0, -1)
        starts, stops = search_slices(sorted_queries.flatten(), first, last)
        # Level by level: neighbors of one level see much the same queries, those of two do not.
        curve = keys.along_curve(cells, levels * self.batch_size + image)
        traversal = torch.argsort(curve, stable=True)
        return NeighborSlices(traversal.int(), starts, stops, order.flatten().int())

    def _find_query_tiles(self, find_runs: FindRuns) -> Tiles:
        if not self.fits_32_bits:
            refuse("level_shapes", "sizes below 2^30 for backend 'triton'", str(self.level_shapes))
        windows = self.neighborhood_sizes, self.position_dim
        cells = self._query_cells(), self._point_cells()
        return find_tiles(self.query_slices, *cells, *windows, find_runs)

    def _find_point_tiles(self, find_runs: FindRuns) -> Tiles:
        windows = [max(self.neighborhood_sizes)], self.position_dim
        cells = self._point_cells(), self._query_cells()
        return find_tiles(self.point_slices, *cells, *windows, find_runs)

    def _query_cells(self) -> GroupedCells:
        return self._once("query_cells", self._find_query_cells)

    def _point_cells(self) -> GroupedCells:
        return self._once("point_cells", self._find_point_cells)

    def _find_query_cells(self) -> GroupedCells:
        levels = torch.arange(self.n_levels, device=self.device)[:, None]
        groups = torch.where(self.query_batch < 0, -1, self.query_batch * self.n_levels + levels)
        return GroupedCells(
            groups.int(), self._keyed_cells.centers.transpose(1, 2).int().contiguous()
        )

    def _find_point_cells(self) -> GroupedCells:
        coordinates = self._keyed_cells.coordinates
        groups = coordinates[:, 0] * self.n_levels + coordinates[:, -1]
        groups = torch.where(self._keyed_cells.point_keys < 0, -2, groups)
        return GroupedCells(groups.int()[None], coordinates[:, 1:-1].t().int().contiguous()[None])

    @property
    def fits_32_bits(self) -> bool:
        """Whether 32-bit numbers hold all cells and the distances between them."""
        return max(map(max, self.level_shapes)) < 2**30

    @property
    def n_queries(self) -> int:
        return self.query_batch.shape[0]

    @property
    def n_points(self) -> int:
        return self.point_columns.shape[0]

    @property
    def n_levels(self) -> int:
        return len(self.neighborhood_sizes)

    @property
    def window_slots(self) -> int:
        """K, the number of cells in all windows of a query, empty ones counted."""
        return sum(size**self.position_dim for size in self.neighborhood_sizes)

    @property
    def device(self) -> torch.device:
        return self.query_batch.device

    def counts(self) -> Tensor:
        """int64 ``[N]``: the number of points that each query sees."""
        slices = self.query_slices
        return (slices.stops - slices.starts).sum(1)

    def pairs(self, queries: Tensor | None = None) -> Tensor:
        """int64 ``[M, 2]``: (query, point) rows, query by query, for looking and for tests.

        Args:
            queries: integer ``[n]``, the queries to list; all of them if None.
        """
        queries = self.check_queries(queries)
        row, point, _ = self.pairs_and_slots(queries)
        return torch.stack((queries[row], point), 1)

    def check_queries(self, queries: Tensor | None) -> Tensor:
        """``queries``, or all of them for None, as int64; refuses what are none."""
        return check_rows("queries", queries, self.n_queries, self.device)

    def pairs_and_slots(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """int64 ``[M]`` each: a pair's place in ``queries``, its point, and which of the K cells
        of the query's windows the point sits in.
        """
        starts, stops = (edge[queries].long() for edge in self.query_slices[1:3])
        n_rows = starts.shape[1]
        lengths = (stops - starts).flatten()
        slice_of = torch.repeat_interleave(lengths)
        first = starts.flatten() - (lengths.cumsum(0) - lengths)
        place = first[slice_of] + torch.arange(len(slice_of), device=self.device)
        query, row = slice_of // n_rows, slice_of % n_rows

        radius, first_slot, level = self._rows()
        column = self.point_columns[place] - self.center_columns[queries[query], level[row]]
        slot = first_slot[row] + radius[row] + column
        return query, self.query_slices.order[place].long(), slot

    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each of the R window rows: its radius, its first slot, its level."""
        rows = [
            (size // 2, size, level)
            for level, size in enumerate(self.neighborhood_sizes)
            for _ in range(size ** (self.position_dim - 1))
        ]
        radius, width, level = constant(rows, self.device).t()
        return radius, width.cumsum(0) - width, level

    def slot_levels(self) -> Tensor:
        """int64 ``[K]``: the level of every slot of a query's windows."""
        slots = [size**self.position_dim for size in self.neighborhood_sizes]
        levels = [level for level, count in enumerate(slots) for _ in range(count)]
        return constant(levels, self.device)

    def to(self, device: torch.device | str) -> "NeighborhoodPlan":
        """The same plan on another device."""
        if torch.device(device) == self.device:
            return self
        keys, *cells = self._keyed_cells
        return dataclasses.replace(
            self,
            query_slices=NeighborSlices(*(part.to(device) for part in self.query_slices)),
            query_batch=self.query_batch.to(device),
            center_columns=self.center_columns.to(device),
            point_columns=self.point_columns.to(device),
            _keyed_cells=_KeyedCells(keys.to(device), *(part.to(device) for part in cells)),
            _maker=computing(torch.device(device)),
            _found={},
        )

    def __repr__(self) -> str:
        counts = self.counts()
        mean, largest = (
            (float(counts.double().mean()), int(counts.max())) if len(counts) else (0, 0)
        )
        return (
            f"NeighborhoodPlan(queries={self.n_queries}, points={self.n_points}, "
            f"neighborhood_sizes={list(self.neighborhood_sizes)}, "
            f"position_dim={self.position_dim}, neighbors: mean {mean:.1f}, largest {largest}; "
            f"device={self.device})"
        )


def plan_neighborhoods(
    query_spatial_positions: Tensor,
    query_batch_offsets: Tensor,
    pyramid: FeaturePyramid,
    neighborhood_sizes: Sequence[int],
    *,
    check_contents: bool | None = None,
) -> NeighborhoodPlan:
    """Finds every query's neighborhood, once, for all layers that share cells and queries.

    Args:
        query_spatial_positions: floating ``[N, P]``, in cells of the full shape.
        query_batch_offsets: integer ``[B + 1]``: image ``b`` owns ``offsets[b]:offsets[b + 1]``.
        pyramid: the points.
        neighborhood_sizes: odd window width of each level, in cells of that level.
        check_contents: whether to look for bad offsets and positions that are not finite, which
            on a GPU waits for the device. None: on the CPU only. Unchecked, a query of no image
            or at no finite place sees nothing.

    Raises:
        ValueError: shapes, dtypes or devices do not fit each other, sizes are even or not
            positive, contents fail the check, or there are too many cells for 64-bit keys.
    """
    if not isinstance(pyramid, FeaturePyramid):
        refuse("pyramid", "a FeaturePyramid", pyramid)
    check_placement(query_spatial_positions, query_batch_offsets, pyramid, check_contents)
    sizes = check_neighborhood_sizes(neighborhood_sizes, pyramid.n_levels)
    n_queries, n_points = query_spatial_positions.shape[0], pyramid.values.shape[0]
    largest = _INT32_MAX // pyramid.n_levels
    if n_points > _INT32_MAX or n_queries > largest or pyramid.batch_size > largest:
        expected = "at most 2^31 points, queries x levels, and images x levels"
        refuse("query_spatial_positions", expected, query_spatial_positions)
    plan = _plan(query_spatial_positions, query_batch_offsets, pyramid, sizes)
    choose_backend(None, plan.device).prepare(plan)
    return plan


def check_placement(
    positions: Tensor, offsets: Tensor, pyramid: FeaturePyramid, check_contents: bool | None = None
) -> None:
    """Refuses positions and offsets that cannot be those of queries among the pyramid's points."""
    device = pyramid.coordinates.device
    name, shape = "query_spatial_positions", ("N", pyramid.position_dim)
    check_tensor(name, positions, shape, kind="floating", device=device)
    n_offsets = (pyramid.batch_size + 1,)
    check_tensor("query_batch_offsets", offsets, n_offsets, kind="integer", device=device)
    if reads_contents(check_contents, device):
        check_offsets("query_batch_offsets", offsets, len(positions))
        check_finite(name, positions)


def _plan(
    positions: Tensor, offsets: Tensor, pyramid: FeaturePyramid, sizes: tuple[int, ...]
) -> NeighborhoodPlan:
    device = positions.device
    keys = CellKeys(pyramid.level_shapes, sizes, pyramid.batch_size, device)
    image, centers = _place_queries(positions, offsets, pyramid, keys)
    levels = torch.arange(pyramid.n_levels, device=device)[:, None]
    query_keys = keys.of(centers, levels, image.clamp(min=0))

    misplaced = pyramid.misplaced()
    coordinates = pyramid.coordinates.long().masked_fill(misplaced[:, None], 0)
    cells, point_levels = coordinates[:, 1:-1], coordinates[:, -1]
    # Misplaced points come first, where no window reaches.
    point_keys = keys.of(cells, point_levels, coordinates[:, 0]).masked_fill(misplaced, -1)

    sorted_points, order = torch.sort(point_keys, stable=True)
    traversal = torch.argsort(keys.along_curve(centers[keys.finest], image), stable=True).int()
    find_slices = choose_backend(None, device).find_slices
    starts, stops = find_slices(sorted_points, query_keys, traversal, *keys.window_rows())
    return NeighborhoodPlan(
        query_slices=NeighborSlices(traversal, starts, stops, order.int()),
        query_batch=image.int(),
        center_columns=centers[..., -1].t().int().contiguous(),
        point_columns=cells[order, -1].int(),
        neighborhood_sizes=sizes,
        position_dim=pyramid.position_dim,
        batch_size=pyramid.batch_size,
        level_shapes=pyramid.level_shapes,
        _keyed_cells=_KeyedCells(keys, centers, query_keys, point_keys, coordinates),
        _maker=computing(device),
    )


def query_images(positions: Tensor, offsets: Tensor, batch_size: int) -> Tensor:
    """int64 ``[N]``: the image of queries at ``positions`` ``[N, P]``, whose images begin at
    ``offsets`` ``[B + 1]``; -1 for those of no image or at no finite place.
    """
    image = batch_ids(offsets, positions.shape[0])
    nowhere = (image >= batch_size) | ~positions.isfinite().all(1)
    return image.masked_fill(nowhere, -1)


def _place_queries(
    positions: Tensor, offsets: Tensor, pyramid: FeaturePyramid, keys: CellKeys
) -> tuple[Tensor, Tensor]:
    """The image of every query ``[N]``, -1 if it takes no part, and its windows' centres, int64
    ``[L, N, P]``.
    """
    image = query_images(positions, offsets, pyramid.batch_size)
    positions = positions.masked_fill(image[:, None] < 0, math.nan)
    return image, keys.clamp(window_centers(positions, pyramid.level_shapes))
