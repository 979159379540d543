"""What neighbors see together: rows by the tile, and what a tile sees as few long runs.

Rows that are neighbors in space see much the same. A back end that takes a tile of them at a time
walks what any of them sees, once, and finds out by coordinates who sees what of it. The union of
a tile's slices is a list of runs: entry ``e`` of it is the column ``e + shifts[i]``, where ``i`` is
the last run with ``firsts[i] <= e``. Most of a tile's slices overlap, so runs are few.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..backends.types import TILE, FindRuns, NeighborSlices, Tiles

SCATTERED = 32  # others per row from which on rows are rarely neighbors


class GroupedCells(NamedTuple):
    """Where queries or points are: queries at all S levels, a point at its own, S is one.

    Attributes:
        groups: int32 ``[S, n]``: ``image * n_levels + level``. What takes no part has a negative
            one, of which no query's is a point's.
        cells: int32 ``[S, P, n]``, of queries those they fall into.
    """

    groups: Tensor
    cells: Tensor


def tile_rows(n_rows: int, n_others: int) -> int:
    """How many rows make a tile: one where they are so few that they stand apart."""
    return 1 if n_rows * SCATTERED < n_others else TILE


def find_tiles(
    slices: NeighborSlices,
    rows: GroupedCells,
    others: GroupedCells,
    sizes: Sequence[int],
    position_dim: int,
    find_runs: FindRuns,
) -> Tiles:
    """The tiles of ``slices``, which are those of windows of ``sizes``."""
    height = tile_rows(rows.groups.shape[1], others.groups.shape[1])
    traversal, starts, stops, order = slices
    runs = find_runs(traversal, starts, stops, sizes, position_dim, height)
    return Tiles(traversal, order, *runs, *rows, *others)
