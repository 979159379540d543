"""The arguments of back ends: plain tensors and numbers, never a plan object."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FindRuns = Callable[..., tuple[Tensor, Tensor, Tensor]]  # see `backends.reference.find_runs`
FindQuerySlices = Callable[..., "QuerySlices"]  # see `backends.ops.Ops.find_query_slices`
FindPointSlices = Callable[..., "NeighborSlices"]  # see `backends.ops.Ops.find_point_slices`
FindLists = Callable[..., tuple[Tensor, Tensor, Tensor]]  # see `backends.ops.Ops.find_lists`

TILE = 16
LIST_BLOCK = 32  # entries of a block of a tile's list


class NeighborSlices(NamedTuple):
    """One direction of a plan: the neighbors of every row, as slices of an order, all int32.

    The neighbors of row ``i`` are ``order[starts[i, r]:stops[i, r]]`` for every ``r``. Rows are
    queries and neighbors points, or the other way round.

    Attributes:
        traversal: ``[n]``, the rows in an order in which neighbors in space are close together.
            Rows processed in this order find the data that they share in the cache.
        starts, stops: ``[n, R]``, the slices of each row.
        order: points in sorted order ``[nnz]``, or queries in sorted order, one order per level,
            ``[L * N]``.
    """

    traversal: Tensor
    starts: Tensor
    stops: Tensor
    order: Tensor


class QuerySlices(NamedTuple):
    """What the planning op of a back end finds: cells, keys and the slices of every query.

    int32, but for keys, which may be int64. The copies of points count as points.

    Attributes:
        query_batch: ``[N]``, the image of every query, -1 for an invalid one.
        query_groups, query_cells: ``[L, N]`` and ``[L, P, N]``, see `_index.tiles.GroupedCells`.
        center_columns: ``[N, L]``, see `PlanTensors`.
        query_keys: ``[L, N]``, the keys of the windows' centers.
        key_coordinates: floating ``[nnz, P + 1]``, the centers of the points' cells as positions,
            and the level, for the rotary encoding of keys.
        coordinates: ``[nnz, P + 2]``, image, cell and level, 0 where a point is misplaced.
        point_groups, point_cells: ``[1, nnz]`` and ``[1, P, nnz]``, likewise.
        sort_keys: ``[nnz + N]``, the points' keys, then those of the queries' traversal.
        traversal, starts, stops, order: see `NeighborSlices`.
        point_columns: ``[nnz]``, see `PlanTensors`.
    """

    query_batch: Tensor
    query_groups: Tensor
    query_cells: Tensor
    center_columns: Tensor
    query_keys: Tensor
    key_coordinates: Tensor
    coordinates: Tensor
    point_groups: Tensor
    point_cells: Tensor
    sort_keys: Tensor
    traversal: Tensor
    starts: Tensor
    stops: Tensor
    order: Tensor
    point_columns: Tensor


class Tiles(NamedTuple):
    """One direction of a plan as T tiles of rows, and the runs of each tile, all int32.

    See `_index.tiles` for what tiles and runs are, and for an example.

    Attributes:
        traversal: ``[n]``, the rows. A tile is ``C / R`` consecutive ones; the last may have fewer.
        order: the points (queries) of the columns, see `NeighborSlices`.
        firsts, shifts: ``[T, C]``, the runs, with space for as many as a tile has slices. The runs
            of a level begin where the slices of the levels before it would end; entries behind the
            last run of a level have no meaning.
        counts: ``[T, S, 2]``, at each of S levels the number of runs and the number of entries.
        row_groups, row_cells: the `GroupedCells` of the rows.
        column_groups, column_cells: the `GroupedCells` of the points (queries) of the columns.
        lists: ``[T, 2]``, the first block of each tile's list and how many blocks it has, -1 for
            a tile without a list. A block has `LIST_BLOCK` entries.
        items: ``[S]``, the points (queries) of all lists; any where an entry pads a block.
        members: ``[S]``, the rows that an entry is a neighbor of: bit i is set for the tile's
            i-th row.
    """

    traversal: Tensor
    order: Tensor
    firsts: Tensor
    shifts: Tensor
    counts: Tensor
    row_groups: Tensor
    row_cells: Tensor
    column_groups: Tensor
    column_cells: Tensor
    lists: Tensor
    items: Tensor
    members: Tensor


class PlanTensors(NamedTuple):
    """A plan as back ends take it.

    Attributes:
        query_slices: the points of each query: starts and stops ``[N, R]``, order ``[nnz]``.
        query_batch: int32 ``[N]``, the image of every query, -1 for an invalid one.
        center_columns: int32 ``[N, L]``, the last coordinate of every window's center.
        point_columns: int32 ``[nnz]``, the last coordinate of the points, in sorted order.
        neighborhood_sizes: window width of each level.
        position_dim: number of spatial dimensions, P.
        copy_points: int32 ``[C]``: the last C points are copies of these, beyond the seam of a
            periodic axis. Dropout counts a copy as the point that it is of. None: no copies.
        query_tiles: the points of tiles of queries, for back ends that have `Backend.find_runs`.
        point_tiles: the queries of tiles of points, likewise, where points need gradients.
    """

    query_slices: NeighborSlices
    query_batch: Tensor
    center_columns: Tensor
    point_columns: Tensor
    neighborhood_sizes: tuple[int, ...]
    position_dim: int
    copy_points: Tensor | None = None
    query_tiles: Tiles | None = None
    point_tiles: Tiles | None = None

    # Methods, since torch 2.10 compiles no property of a named tuple.
    def n_queries(self) -> int:
        return self.query_batch.shape[0]

    def n_points(self) -> int:
        return self.point_columns.shape[0]

    def n_levels(self) -> int:
        return len(self.neighborhood_sizes)

    def cells_per_level(self) -> list[int]:
        """The number of cells in a window of each level."""
        return [size**self.position_dim for size in self.neighborhood_sizes]

    def window_slots(self) -> int:
        """K, the number of cells in all windows of a query."""
        return sum(self.cells_per_level())


class Backend(NamedTuple):
    """One implementation of the ops that `backends.reference` defines."""

    attend: Callable[..., tuple[Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    project: Callable[..., tuple[Tensor, ...]]
    find_slices: Callable[..., tuple[Tensor, Tensor]]
    unsupported_reason: Callable[[torch.device, torch.dtype | None], str | None]
    """Why it cannot run on a device with floating-point tensors of a dtype; None if it can."""
    max_head_dim: int | None = None
    find_runs: FindRuns | None = None
    """Where given, the back end takes ``query_tiles`` and ``point_tiles``, found by this op."""
    find_lists: FindLists | None = None
    find_query_slices: FindQuerySlices | None = None
    """Where given, plans are made by this op and the next, in few launches."""
    find_point_slices: FindPointSlices | None = None
