"""Tiles: groups of neighboring rows, and the union of their slices as runs.

A row is a query, and its columns are points in sorted order; or a row is a point, and its columns
are queries in sorted order. A window of a row covers several *slices* ``[start, stop)`` of columns.
A *tile* is a group of rows that follow one another in the traversal order, so that they are
neighbors in space. Their slices overlap, and a kernel that loads each column once for the whole
tile loads far fewer of them than one that takes the rows one by one.

The columns that a tile needs are the union of its slices. Sorted and merged, these form a few
*runs* of consecutive columns. The *entries* of the union are numbered through all runs, so that a
kernel takes them in blocks of equal size, however long the runs are. Three tensors describe them:

- ``firsts[i]``: the first entry of run ``i``, which is the total length of the runs before it.
- ``shifts[i]``: the run's first column minus its first entry.
- ``counts``: the number of runs and the number of entries.

Entry ``e`` is column ``e + shifts[i]``, where ``i`` is the last run with ``firsts[i] <= e``.

An example: a tile of three rows, with two slices each, at one level::

    column   0  1  2  3  4  5  6  7  8  9 10 11 12 13 14
    row 0          [-------)        [----)                  [2, 5)  [8, 10)
    row 1             [-------)        [----)               [3, 6)  [9, 11)
    row 2             [----)                    [----)      [3, 5)  [12, 14)

    union          #  #  #  #        #  #  #     #  #
    run            0  0  0  0        1  1  1     2  2
    entry          0  1  2  3        4  5  6     7  8

    sorted by start     [2, 5)  [3, 6)  [3, 5)  [8, 10)  [9, 11)  [12, 14)
    merged into runs    [2, 6)  [8, 11)  [12, 14)

    firsts = [0, 4, 7]      counts = [3, 9]
    shifts = [2, 4, 5]      2 - 0, 8 - 4 and 12 - 7

    entry 5: the last run with firsts[i] <= 5 is i = 1, so its column is 5 + 4 = 9

A tile loads 9 columns where its rows, one by one, would load 14. Not every row of the tile needs
every one of these columns: kernels compare the cells of rows and columns to find the pairs that lie
within a window. Slices that touch, as ``[2, 4)`` and ``[4, 6)`` do, are merged into one run. Levels
have runs of their own, since a row's window differs from level to level.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..backends.types import POINT_TILE, TILE, FindLists, FindRuns, NeighborSlices, Tiles
from ..window_shapes import Windows

SPARSE_RATIO = 32  # points per query (or the reverse) above which rows rarely share columns


class GroupedCells(NamedTuple):
    """The groups and cells of n queries or points, at S levels.

    Queries have a cell at each of the L levels, so S is L. A point has one at its own level alone,
    so S is 1. A row and a column are neighbors if their groups are equal and the point's cell, less
    the first cell of the query's window, is a cell of the window.

    Attributes:
        groups: int32 ``[S, n]``, ``image * n_levels + level``. Masked queries and points have
            negative groups, -1 for queries and -2 for points, so that these are never equal.
        cells: int32 ``[S, P, n]``, in key coordinates; those of queries are the first cells of
            their windows.
    """

    groups: Tensor
    cells: Tensor


def tile_rows(n_rows: int, n_items: int, rows_are_queries: bool) -> int:
    """The number of rows of a tile: `TILE` or `POINT_TILE`, or 1 if rows are too sparse to share
    columns.

    Args:
        n_rows: the number of rows.
        n_items: the number of points (queries) in the columns.
        rows_are_queries: whether rows are queries and columns points, not the other way round.
    """
    if n_rows * SPARSE_RATIO < n_items:
        return 1
    return TILE if rows_are_queries else POINT_TILE


def find_tiles(
    slices: NeighborSlices,
    rows: GroupedCells,
    columns: GroupedCells,
    n_slices: Sequence[int],
    windows: Windows,
    find_runs: FindRuns,
    find_lists: FindLists | None = None,
    *,
    rows_are_queries: bool = True,
) -> Tiles:
    """Cuts the traversal of ``slices`` into tiles and finds their runs.

    Args:
        slices: the slices of every row, level by level.
        rows, columns: groups and cells of both sides.
        n_slices: the number of slices at each level of a row.
        windows: of all levels.
        find_runs: a back end's implementation, see `backends.reference.find_runs`.
        find_lists: likewise, see `backends.ops.Ops.find_lists`; None: no tile has a list.
        rows_are_queries: whether rows are queries and columns points, not the other way round.
    """
    height = tile_rows(rows.groups.shape[1], columns.groups.shape[1], rows_are_queries)
    traversal, starts, stops, order = slices
    runs = find_runs(traversal, starts, stops, order.shape[0], n_slices, height)
    tensors = traversal, order, *runs, *rows, *columns
    if find_lists is None:
        lists = traversal.new_full((len(runs[0]), 2), -1)
        return Tiles(*tensors, lists, traversal[:0], traversal[:0])
    return Tiles(*tensors, *find_lists(tensors, windows, height, rows_are_queries))
