"""The arguments of back ends: plain tensors and numbers, never a plan object."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._utils.constants import cached_on_gpu, constant
from ..window_shapes import (
    AxisWindows,
    WindowRow,
    Windows,
    cell_order,
    count_cells,
    count_rows,
    window_rows,
)

FindRuns = Callable[..., tuple[Tensor, Tensor, Tensor]]  # see `backends.reference.find_runs`
FindQuerySlices = Callable[..., "QuerySlices"]  # see `backends.ops.Ops.find_query_slices`
FindPointSlices = Callable[..., "NeighborSlices"]  # see `backends.ops.Ops.find_point_slices`
FindLists = Callable[..., tuple[Tensor, Tensor, Tensor]]  # see `backends.ops.Ops.find_lists`

TILE, POINT_TILE = 32, 16  # rows of a tile of queries, and of points
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
        first_columns: ``[N, L]``, see `PlanTensors`.
        query_keys: ``[L, N]``, the keys of the windows' first cells.
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
    first_columns: Tensor
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
        first_columns: int32 ``[N, L]``, the last coordinate of every window's first cell, in key
            coordinates, see `window_shapes.AxisWindows`.
        point_columns: int32 ``[nnz]``, the last coordinate of the points, in sorted order,
            likewise.
        windows: of each level.
        window_rows: int32 ``[R, 2]``, for each row of the windows its first cell, counted from the
            column of the window's first cell, and its width.
        query_ids: int32 ``[N]``, what dropout counts each query as. None: its row. Where they are
            given, ``column_ids`` are, too.
        column_ids: int32 ``[nnz + 1]``, what dropout counts each point as and, last, the number
            from which it counts the empty cells. A copy beyond the seam of a periodic axis, of
            which there may be C among the points, counts as the point that it is of. None: rows,
            and cells after all points.
        query_tiles: the points of tiles of queries, for back ends that have `Backend.find_runs`.
        point_tiles: the queries of tiles of points, likewise, where points need gradients.
    """

    query_slices: NeighborSlices
    query_batch: Tensor
    first_columns: Tensor
    point_columns: Tensor
    windows: Windows
    window_rows: Tensor
    query_ids: Tensor | None = None
    column_ids: Tensor | None = None
    query_tiles: Tiles | None = None
    point_tiles: Tiles | None = None

    # Methods, since torch 2.10 compiles no property of a named tuple.
    def n_queries(self) -> int:
        return self.query_batch.shape[0]

    def n_points(self) -> int:
        return self.point_columns.shape[0]

    def n_levels(self) -> int:
        return len(self.windows)

    def dropout_ids(self) -> list[Tensor]:
        """``query_ids`` and ``column_ids`` as ops take them: those that are not None."""
        return [ids for ids in (self.query_ids, self.column_ids) if ids is not None]

    def slices_per_level(self) -> list[int]:
        """The number of rows of a window of each level."""
        return slices_per_level(self.windows)

    def cells_per_level(self) -> list[int]:
        """The number of cells in a window of each level."""
        return [count_cells(window) for window in self.windows]

    def window_slots(self) -> int:
        """K, the number of cells in all windows of a query."""
        return sum(self.cells_per_level())


def slices_per_level(windows: Windows) -> list[int]:
    """The number of rows of a window of each level."""
    return [count_rows(window) for window in windows]


def slot_order(windows: Windows, device: torch.device) -> Tensor | None:
    """int64 ``[K]``: for each cell of the windows, in the order of their rows, its slot, which
    counts row-major; None if the orders are equal.
    """
    orders = list(map(cell_order, windows))
    if all(order is None for order in orders):
        return None
    slots: list[int] = []
    for window, order in zip(windows, orders, strict=True):
        first, n_cells = len(slots), count_cells(window)
        slots += [first + slot for slot in order or range(n_cells)]
    return constant(slots, device)


@cached_on_gpu
def row_table(windows: Windows, device: torch.device) -> Tensor:
    """`PlanTensors.window_rows` of these windows."""
    rows = [(row.start, row.width) for window in windows for row in window_rows(window)]
    return constant(rows, device, torch.int32)


class WindowTables(NamedTuple):
    """Windows as kernels that compare cells take them, int32, in key coordinates.

    Attributes:
        levels: ``[L, 2 + P]``, of each level the first of its ``box_rows``, -1 where a window has
            all cells of its box; the number of cells of the boxes of the levels before; then the
            size of the box along each axis.
        rows: ``[R, 3]``, of each row of the windows its first cell, see `PlanTensors.window_rows`,
            its width, and the number of cells of all rows before.
        box_rows: ``[B, 2]``, first cell and width of each row of the boxes of balls, row-major. B
            is 0 where all windows are boxes.
        box_slots: ``[C]``, the slot of each cell of all boxes, row-major, any for those that are
            not in the window. Without rows where windows are boxes, whose cells are their slots, or
            where no slots are wanted.
    """

    levels: Tensor
    rows: Tensor
    box_rows: Tensor
    box_slots: Tensor


@cached_on_gpu
def window_tables(windows: Windows, device: torch.device, *, slots: bool = False) -> WindowTables:
    """The tables of these windows; ``slots`` tells whether ``box_slots`` are wanted."""
    levels: list[tuple[int, ...]] = []
    rows: list[tuple[int, int, int]] = []
    box_rows: list[tuple[int, int]] = []
    n_cells = n_box_cells = 0
    windows = tuple(window.in_key_order() for window in windows)
    for window in windows:
        levels.append((-1 if window.is_box() else len(box_rows), n_box_cells, *window.sizes))
        for row in window_rows(window):
            rows.append((row.start, row.width, n_cells))
            n_cells += row.width
        n_box_cells += math.prod(window.sizes)
        if not window.is_box():
            box_rows += [(row.start, row.width) for row in _rows_of_box(window)]
    has_slots = slots and not all(window.is_box() for window in windows)
    box_slots = _slots_of_boxes(windows) if has_slots else []
    tables = (
        constant(_as_int32(table), device, torch.int32)
        for table in (levels, rows, box_rows, box_slots)
    )
    made = WindowTables(*tables)
    return made._replace(box_rows=made.box_rows.view(len(box_rows), 2))


def _as_int32(table: Sequence[Any]) -> Sequence[Any]:
    """``table`` with the numbers that int32 does not hold cut to their lowest 32 bits. They count
    cells of windows too large for tensors with a row per cell, so nothing reads them.
    """
    if table and isinstance(table[0], tuple):
        return [tuple(_as_int32(row)) for row in table]
    return [(x + 2**31) % 2**32 - 2**31 for x in table]


def _rows_of_box(window: AxisWindows) -> list[WindowRow]:
    """All rows of the box of a window, row-major; those of a ball may have no cells."""
    rows = {row.steps: row for row in window_rows(window)}
    steps = itertools.product(*map(range, window.sizes[:-1]))
    return [rows.get(step, WindowRow(step, 0, 0)) for step in steps]


def _slots_of_boxes(windows: Windows) -> list[int]:
    """`WindowTables.box_slots`, of windows with their axes in key order."""
    slots: list[int] = []
    first = 0
    for window in windows:
        for row in _rows_of_box(window):
            cells = range(first - row.start, first - row.start + window.sizes[-1])
            slots += [slot if first <= slot < first + row.width else 0 for slot in cells]
            first += row.width
    return slots


class Backend(NamedTuple):
    """One implementation of the ops that `backends.reference` defines."""

    attend: Callable[..., tuple[Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    project: Callable[..., tuple[Tensor, ...]]
    find_slices: Callable[..., tuple[Tensor, Tensor]]
    unsupported_reason: Callable[[torch.device, torch.dtype | None], str | None]
    """Why it cannot run on a device with floating-point tensors of a dtype; None if it can."""
    max_head_dim: int | None = None
    install_error: Callable[[], str | None] = lambda: None
    """Why it cannot run at all as it is installed; None if it can."""
    find_runs: FindRuns | None = None
    """Where given, the back end takes ``query_tiles`` and ``point_tiles``, found by this op."""
    find_lists: FindLists | None = None
    find_query_slices: FindQuerySlices | None = None
    """Where given, plans are made by this op and the next, in few launches."""
    find_point_slices: FindPointSlices | None = None
    sample: Callable[..., Tensor] | None = None
    """Deformable sampling, where the back end has a kernel of its own."""
