"""Who sees whom, as contiguous slices of sorted orders, both ways.

Sorted by (image, level, cell), the points of every row of a window stand side by side, so a
neighborhood is ``R = sum(w[l] ** (P - 1))`` slices. The relation is symmetric: sorted by the cell
a query falls into, level by level, the queries that see a point stand in slices as well.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import (
    LevelShapes,
    check_finite,
    check_neighborhood_sizes,
    check_offsets,
    check_tensor,
    reads_contents,
    refuse,
)
from .neighborhoods import finest_level, window_centers, window_offsets
from .pyramid import FeaturePyramid

_INT32_MAX = 2**31 - 1


class NeighborSlices(NamedTuple):
    """One direction of a plan: row ``i`` sees ``order[starts[i, r]:stops[i, r]]`` for every r.

    ``visits`` lists the rows so that neighbors in it are neighbors in space: whoever walks the
    rows in this order finds what they share in the cache. All are int32.
    """

    visits: Tensor
    starts: Tensor
    stops: Tensor
    order: Tensor


@dataclass(frozen=True, repr=False)
class NeighborhoodPlan:
    """The neighborhoods of N queries among nnz points; made by `plan_neighborhoods`.

    Shapes depend on N, nnz, the number of levels and the windows alone, never on contents.

    Attributes:
        query_slices: the points each query sees: starts and stops ``[N, R]``, order ``[nnz]``.
        point_slices: the queries that see each point: starts and stops ``[nnz, max R[l]]``,
            order ``[L * N]`` (one order of the queries per level, one after another).
        query_batch: int32 ``[N]``, the image of every query.
        center_columns: int32 ``[N, L]``, the last coordinate of every window's centre.
        point_columns: int32 ``[nnz]``, the last coordinate of the points, in sorted order.
        neighborhood_sizes: window width of each level.
        position_dim: number of spatial dimensions, P.
        batch_size: number of images.
    """

    query_slices: NeighborSlices
    point_slices: NeighborSlices
    query_batch: Tensor
    center_columns: Tensor
    point_columns: Tensor
    neighborhood_sizes: tuple[int, ...]
    position_dim: int
    batch_size: int

    @property
    def n_queries(self) -> int:
        return len(self.query_batch)

    @property
    def n_points(self) -> int:
        return len(self.point_columns)

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
        if queries is None:
            queries = torch.arange(self.n_queries, device=self.device)
        row, point, _ = self.pairs_and_slots(queries)
        return torch.stack((queries[row].long(), point), 1)

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
        radius, width, level = torch.tensor(rows, device=self.device).t()
        return radius, width.cumsum(0) - width, level

    def slot_levels(self) -> Tensor:
        """int64 ``[K]``: the level of every slot of a query's windows."""
        slots = [size**self.position_dim for size in self.neighborhood_sizes]
        levels = [level for level, count in enumerate(slots) for _ in range(count)]
        return torch.tensor(levels, device=self.device)

    def to(self, device: torch.device | str) -> "NeighborhoodPlan":
        def move(slices: NeighborSlices) -> NeighborSlices:
            return NeighborSlices(*(part.to(device) for part in slices))

        return dataclasses.replace(
            self,
            query_slices=move(self.query_slices),
            point_slices=move(self.point_slices),
            query_batch=self.query_batch.to(device),
            center_columns=self.center_columns.to(device),
            point_columns=self.point_columns.to(device),
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
    batch_size, device = pyramid.batch_size, pyramid.coordinates.device
    positions = query_spatial_positions
    check_tensor(
        "query_spatial_positions",
        positions,
        ("N", pyramid.position_dim),
        kind="floating",
        device=device,
    )
    check_tensor(
        "query_batch_offsets", query_batch_offsets, (batch_size + 1,), kind="integer", device=device
    )
    sizes = check_neighborhood_sizes(neighborhood_sizes, pyramid.n_levels)
    if max(len(pyramid), pyramid.n_levels * len(positions)) > _INT32_MAX:
        refuse("query_spatial_positions", "at most 2^31 points and queries x levels", positions)
    if reads_contents(check_contents, device):
        check_offsets("query_batch_offsets", query_batch_offsets, len(positions))
        check_finite("query_spatial_positions", positions)
    return _plan(positions, query_batch_offsets, pyramid, sizes)


def _plan(
    positions: Tensor, offsets: Tensor, pyramid: FeaturePyramid, sizes: tuple[int, ...]
) -> NeighborhoodPlan:
    device = positions.device
    grid = _Grid(pyramid.level_shapes, sizes, pyramid.batch_size, device)
    numbers = torch.arange(len(positions), device=device)
    batch = torch.searchsorted(offsets[1:].contiguous(), numbers, right=True)
    homeless = (batch >= pyramid.batch_size)[:, None]
    batch = batch.clamp(max=max(pyramid.batch_size - 1, 0))
    centers = window_centers(positions, pyramid.level_shapes).masked_fill(homeless, math.nan)
    centers = grid.clamp(centers)
    query_levels = torch.arange(pyramid.n_levels, device=device)[:, None].expand(-1, len(batch))
    query_keys = grid.keys(centers, query_levels, batch)

    misplaced = pyramid.misplaced()
    coordinates = pyramid.coordinates.long().masked_fill(misplaced[:, None], 0)
    image, cells, levels = coordinates[:, 0], coordinates[:, 1:-1], coordinates[:, -1]
    point_keys = grid.keys(cells, levels, image).masked_fill(misplaced, -1)

    sorted_points, point_order = torch.sort(point_keys, stable=True)
    sorted_queries, query_order = torch.sort(query_keys, dim=1, stable=True)
    query_visits = torch.argsort(grid.curve(centers[grid.finest], batch), stable=True)
    # Level by level: neighbors of one level see much the same queries, those of two do not.
    point_curve = grid.curve(cells, levels * pyramid.batch_size + image)
    point_visits = torch.argsort(point_curve, stable=True)

    rows = [grid.row_offsets(level) for level in range(grid.n_levels)]
    query_edges = [
        _edges(sorted_points, query_keys[level][:, None] + rows[level], sizes[level] // 2)
        for level in range(grid.n_levels)
    ]
    width = max(len(offset) for offset in rows)
    padded = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
    n_rows = torch.tensor([[len(row)] for row in rows], device=device)
    used = (torch.arange(width, device=device) < n_rows)[levels] & ~misplaced[:, None]
    radius = torch.tensor(sizes, device=device)[levels, None] // 2
    point_starts, point_stops = _edges(
        sorted_queries.flatten(), point_keys[:, None] + padded[levels], radius
    )
    return NeighborhoodPlan(
        NeighborSlices(
            query_visits.int(),
            torch.cat([starts for starts, _ in query_edges], 1),
            torch.cat([stops for _, stops in query_edges], 1),
            point_order.int(),
        ),
        NeighborSlices(
            point_visits.int(),
            point_starts,
            torch.where(used, point_stops, point_starts),
            query_order.flatten().int(),
        ),
        batch.int(),
        centers[..., -1].t().int().contiguous(),
        cells[point_order, -1].int(),
        sizes,
        pyramid.position_dim,
        pyramid.batch_size,
    )


class _Grid:
    """Keys that sort cells by (level, image, cell row-major), each level padded by its windows.

    The padding holds the centres that lie outside the map but still see a part of it, and one
    cell more on either side for those that see nothing. So a window's rows never run into each
    other, and the key of a neighboring cell is the key of its centre plus a constant.
    """

    def __init__(
        self, shapes: LevelShapes, sizes: Sequence[int], batch_size: int, device: torch.device
    ) -> None:
        self.n_levels = len(shapes)
        self.finest = finest_level(shapes)
        self._sizes, self._dim = sizes, len(shapes[0])
        # Twice the reach of a centre: from beyond the edge, its window's rows stay in the padding.
        pad = [2 * (size // 2) + 1 for size in sizes]
        padded = [
            [size + 2 * margin for size in shape] for shape, margin in zip(shapes, pad, strict=True)
        ]
        volumes = [math.prod(shape) for shape in padded]
        if sum(volumes) * max(batch_size, 1) >= 2**62:
            refuse("level_shapes", "fewer than 2^62 cells in all, with their borders", str(shapes))
        self._device = device
        # Enough for the longest axis; what does not fit beside the groups is dropped.
        self._bits = min(max(map(max, padded)).bit_length(), 46 // self._dim)
        strides = [[math.prod(shape[axis + 1 :]) for axis in range(self._dim)] for shape in padded]
        self._pad = torch.tensor(pad, device=device)
        self._volume = torch.tensor(volumes, device=device)
        self._base = (self._volume.cumsum(0) - self._volume) * batch_size
        self._stride = torch.tensor(strides, device=device)
        self._shapes = torch.tensor(shapes, device=device)
        self._reach = torch.tensor(sizes, device=device)[:, None] // 2 + 1

    def clamp(self, centers: Tensor) -> Tensor:
        """Float centres ``[L, N, P]`` as int64, those that see nothing put just outside."""
        low, high = -self._reach, self._shapes + self._reach - 1
        bounded = torch.nan_to_num(centers, nan=-math.inf).clamp(
            low[:, None].to(centers.dtype), high[:, None].to(centers.dtype)
        )
        return bounded.long()

    def keys(self, cells: Tensor, levels: Tensor, batch: Tensor) -> Tensor:
        """Keys of ``cells`` ``[..., P]`` at ``levels`` and in images ``batch``, ``[...]``."""
        within = ((cells + self._pad[levels][..., None]) * self._stride[levels]).sum(-1)
        return self._base[levels] + batch * self._volume[levels] + within

    def row_offsets(self, level: int) -> Tensor:
        """What to add to a centre's key for the middle of each of its window's rows."""
        rows = window_offsets([self._sizes[level]], self._dim - 1)[0].to(self._device)
        return (rows * self._stride[level, :-1]).sum(-1)

    def curve(self, cells: Tensor, group: Tensor) -> Tensor:
        """Keys that sort ``cells`` ``[n, P]`` along a Z-order curve, group by group."""
        cells = cells + self._reach.max()
        key = group
        for bit in reversed(range(self._bits)):
            for axis in range(self._dim):
                key = key * 2 + ((cells[:, axis] >> bit) & 1)
        return key


def _edges(sorted_keys: Tensor, middles: Tensor, radius: Tensor | int) -> tuple[Tensor, Tensor]:
    """Where rows of cells, ``radius`` to either side of ``middles``, begin and end, as int32."""
    starts = torch.searchsorted(sorted_keys, middles - radius, out_int32=True)
    stops = torch.searchsorted(sorted_keys, middles + radius, right=True, out_int32=True)
    return starts, stops
