"""What back ends are given: plain tensors and numbers."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

FindRuns = Callable[..., tuple[Tensor, Tensor, Tensor]]  # see `backends.reference.find_runs`

TILE = 16  # rows of a tile: the least that a matrix unit takes


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
